"""Which part of FlowCut's score finds the things of a picture, layer by layer: writes score_parts.md.

    .venv/bin/python docs/results/score_parts.py     # half a minute on two cores

On llava-tiny, unpruned, 100 validation scenes, whose renderer says what each patch shows.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from flowcut.aliases import resolve
from flowcut.preprocess import ImageSettings, pixel_values
from flowcut.scoring import flow_score
from flowcut.tiny.drawing import GROUND, labels
from flowcut.tiny.scenes import make_scene, render
from flowcut.vision import VisionModel

SCENES = 100
PARTS = ("rel", "sem", "strength", "score", "no-semantic")
HEADER = f"""# Which part of the score finds things

Written by `score_parts.py`: the probability that a patch that shows a thing scores above a patch that shows ground, in
the same picture (0.5 is chance, below 0.5 prefers ground), each layer's own score before it is accumulated. llava-tiny,
unpruned, {SCENES} validation scenes. `score` is (rel + sem) * strength, `no-semantic` is rel * strength.

| layer | {" | ".join(PARTS)} |
|---:|{"---:|" * len(PARTS)}
"""


def main() -> None:
    model = resolve("llava-tiny")
    tower = VisionModel.from_weights(model.weights).vision_tower["vision_model"]
    scenes = [make_scene("val", number) for number in range(SCENES)]
    owner = np.stack([labels(scene).owner for scene in scenes])
    settings = ImageSettings.from_directory(model.files, model.config.vision.image_size)
    pixels = torch.from_numpy(pixel_values([render(scene) for scene in scenes], settings))
    lines = []
    with torch.inference_mode():
        hidden = tower.pre_layrnorm(tower.embeddings(pixels))
        for number, layer in enumerate(tower.encoder["layers"]):
            q, k, v = layer.project(hidden)
            found = [f"{found_first(part, owner):.2f}" for part in parts(q, k, v)]
            lines.append(f"| {number} | {' | '.join(found)} |\n")
            hidden = layer(hidden, q, k, v, None)
    (Path(__file__).parent / "score_parts.md").write_text(HEADER + "".join(lines), encoding="utf-8")


def parts(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> list[NDArray[np.float32]]:
    """[B, N] of each of PARTS."""
    strength = v.mean(1)[:, 1:].abs().sum(-1)
    rel = flow_score(q, k, v, semantic=False, strength=False).score
    both = flow_score(q, k, v, strength=False).score
    return [part.numpy() for part in (rel, both - rel, strength, both * strength, rel * strength)]


def found_first(score: NDArray[np.float32], owner: NDArray[np.int8]) -> float:
    """Mean over pictures of the area under the curve, thing against ground."""
    areas = []
    for values, shown in zip(score, owner, strict=True):
        thing, ground = values[shown >= 0], values[shown == GROUND]
        areas.append((thing[:, None] > ground).mean() + (thing[:, None] == ground).mean() / 2)
    return float(np.mean(areas))


if __name__ == "__main__":
    main()
