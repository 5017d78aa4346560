"""What fewer pruning points save in engine bytes and cost in agreement, at CLIP-L/14-336: writes fewer_points.md.

Every distinct sequence length is code in the engine. At a point that a schedule skips, what came in stays.
    PYTHONPATH=tests python docs/results/fewer_points.py     # needs .[dev]; five minutes on two cores
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import recipe
import torch

from engines.build import build_engine
from export.builder import save
from export.vision import vision_model
from flowcut.checkpoint import Weights, open_checkpoint
from flowcut.contract import Limits, vision_contract
from flowcut.schedule import Schedule, closed_form, make_schedule, pruning_points
from flowcut.vision import VisionModel

TOKENS, IMAGES = 64, 4
STEPS = {"every point": 1, "every 2nd": 2, "every 4th": 4, "the last only": 11}
HEADER = f"""# Fewer pruning points: engine size against agreement

Written by `fewer_points.py`. CLIP-L/14-336, {TOKENS} of 576 patches, fp16 engine of TensorRT-RTX, {IMAGES} seeded
pictures. **The weights are seeded-random**: their CLS attention is nearly flat, `adaptive` drops almost everything at
the last point, and so agreement says nothing of a trained tower. Sizes do not depend on the weights' values.

| counts from | pruned at | counts | engine beyond weights, MB | Jaccard with adaptive |
|---|---|---|---:|---:|
"""


def engine_megabytes(weights: Weights, schedule: Schedule, path: Path) -> float:
    """Megabytes of engine beyond the weights; `path` takes the ONNX file."""
    contract = vision_contract(weights.config, schedule.tokens, "fp16", Limits())
    save(vision_model(weights, contract, schedule, "fp16", {}), path)
    report = build_engine(path, path.with_suffix(".engine"), contract, "rtx")
    return (report.engine_bytes - report.weight_bytes) / 1e6


def thinned(counts: tuple[int, ...], step: int) -> tuple[int, ...]:
    """Keep every step-th point, counted back from the last; the others keep what came in."""
    pruned_at = range(len(counts) - 1, -1, -step)
    return tuple(next((counts[i] for i in pruned_at if i <= j), 576) for j in range(len(counts)))


def jaccard(a: list[list[int]], b: list[list[int]]) -> float:
    return sum(len({*x} & {*y}) / len({*x} | {*y}) for x, y in zip(a, b, strict=True)) / len(a)


def rows(weights: Weights, path: Path) -> Iterator[str]:
    vision, model = weights.config.vision, VisionModel.from_weights(weights)
    pixels = torch.from_numpy(np.concatenate([recipe.pixels(336, 1, seed) for seed in range(IMAGES)]))
    adaptive = model.features(pixels, make_schedule("adaptive", vision, TOKENS))
    points = [p + 1 for p in pruning_points(vision.num_hidden_layers)]
    mean = tuple(adaptive.counts[:, points].double().mean(0).round().int().tolist())
    yield f"| - | nowhere | 576 | {engine_megabytes(weights, Schedule('off', 576, 576), path):.1f} | - |"
    for source, base in {"adaptive's mean": mean, "closed form": closed_form(vision, TOKENS)}.items():
        for name, step in STEPS.items():
            schedule = Schedule("static", 576, TOKENS, thinned(base, step))
            size = engine_megabytes(weights, schedule, path)
            agreement = jaccard(model.features(pixels, schedule).kept.tolist(), adaptive.kept.tolist())
            yield f"| {source} | {name} | {' '.join(map(str, schedule.counts))} | {size:.1f} | {agreement:.3f} |"


@torch.inference_mode()
def main() -> None:
    with tempfile.TemporaryDirectory() as directory:
        recipe.write(directory, *recipe.PRESETS["clip-l"], 0, "float16")
        lines = list(rows(open_checkpoint(Path(directory)), Path(directory) / "vision.onnx"))
    Path(__file__).with_suffix(".md").write_text(HEADER + "\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
