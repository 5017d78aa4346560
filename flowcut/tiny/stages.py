"""From nothing to llava-tiny: draw, tower, features, questions, decoder, write. Each stage goes on where it stopped."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from safetensors.torch import save
from tokenizers import Tokenizer

from flowcut.atomic import write_file
from flowcut.config import LlavaConfig
from flowcut.errors import CheckpointError
from flowcut.preprocess import ImageSettings
from flowcut.tensors import expected_tensors
from flowcut.tiny import decoder, files, tower
from flowcut.tiny.asking import ask
from flowcut.tiny.decoder_lesson import MakeDecoderLesson
from flowcut.tiny.drawing import draw
from flowcut.tiny.scenes import Split
from flowcut.tiny.tower_lesson import VALIDATION, MakeTowerLesson
from flowcut.tiny.training import Plan, fit, load, read_curve

Scale = Literal["full", "smoke"]


@dataclass(frozen=True)
class Recipe:
    """How much of everything. `scenes` are drawn for the tower, `asked` of them are asked about."""

    scenes: int
    asked: int
    tower: Plan
    decoder: Plan


RECIPES: dict[Scale, Recipe] = {
    "full": Recipe(24000, 16000, Plan(3300, 32, 1.5e-3, 200, 2000, 5000), Plan(2250, 16, 2e-3, 150, 1600, 3600)),
    "smoke": Recipe(256, 128, Plan(30, 16, 1.5e-3, 10, 20, 30), Plan(30, 16, 2e-3, 10, 20, 30)),
}


def train(scale: Scale, work: Path, out: Path, progress: Progress, fast: bool = True) -> dict[str, object]:
    """Make the checkpoint `out` with what is missing in `work`, and return how the training went.

    Args:
        fast: compile the training step, which needs a C++ compiler and a minute.

    Raises:
        CheckpointError: `work` was begun with another recipe.
        FlowCutError: a worker or the disk fails.
    """
    recipe = RECIPES[scale]
    work.mkdir(parents=True, exist_ok=True)
    _same_recipe(work / "recipe.json", recipe)
    model = work / "model"
    files.write_tiny(model)
    config = LlavaConfig.from_file(model / "config.json")
    settings = ImageSettings.from_directory(model, config.vision.image_size)
    scenes = work / "scenes"
    pictures = {"train": draw(scenes, "train", recipe.scenes, progress)[0]}
    pictures["val"], _ = draw(scenes, "val", VALIDATION, progress)
    teach = MakeTowerLesson(config.vision, settings, scenes, recipe.scenes, fast)
    fit("tower", teach, recipe.tower, work, progress)
    trained = _tower(config, work)
    parts: tuple[tuple[Split, int, bool], ...] = (("train", recipe.asked, False), ("val", VALIDATION, True))
    for split, count, exact in parts:
        _features(trained, settings, work, split, pictures[split][:count], exact, progress)
        _questions(model / "tokenizer.json", work, split, count, progress)
    fit("decoder", MakeDecoderLesson(config, work, recipe.scenes), recipe.decoder, work, progress)
    _publish(config, trained, work, out)
    return history(work)


def _same_recipe(path: Path, recipe: Recipe) -> None:
    wanted = json.dumps(asdict(recipe), indent=1) + "\n"
    if path.exists() and path.read_text(encoding="utf-8") != wanted:
        raise CheckpointError(f"{path.parent} must hold this recipe's work, got another's. Remove it or name another.")
    write_file(path, wanted.encode())


def _tower(config: LlavaConfig, work: Path) -> tower.Tower:
    """The trained tower, rounded to the float16 of the checkpoint."""
    teacher = tower.Teacher(config.vision)
    load("tower", teacher, work)
    trained = teacher.tower.eval()
    for parameter in trained.parameters():
        parameter.data = parameter.half().float()
    return trained


@torch.no_grad()
def _features(
    trained: tower.Tower,
    settings: ImageSettings,
    work: Path,
    split: Split,
    pictures: NDArray[np.uint8],
    exact: bool,
    progress: Progress,
) -> None:
    """Hidden state -2 of every patch, [pictures, N, hidden] float16. What is only trained on may be bfloat16's."""
    path, count = work / f"features-{split}.npy", len(pictures)
    if path.exists():
        return
    mean, std = torch.tensor(settings.mean), torch.tensor(settings.std)
    shape = (count, trained.config.patches, trained.config.hidden_size)
    partial = path.with_suffix(".partial")
    features = np.lib.format.open_memmap(partial, "w+", np.float16, shape)
    task = progress.add_task(f"features of {count} {split} scenes", total=count)
    for start in range(0, count, 64):
        stop = min(start + 64, count)
        with torch.autocast("cpu", torch.bfloat16, enabled=not exact):
            states = trained(tower.to_patches(np.array(pictures[start:stop]), mean, std))
        features[start:stop] = states[-2][:, 1:].float().numpy()
        progress.advance(task, stop - start)
    features.flush()
    partial.replace(path)


def _questions(tokenizer: Path, work: Path, split: Split, count: int, progress: Progress) -> None:
    path = work / f"questions-{split}.npz"
    if not path.exists():
        asking = ask(Tokenizer.from_file(str(tokenizer)), split, count, split == "train", progress)
        content = io.BytesIO()
        np.savez(content, **asdict(asking))
        write_file(path, content.getvalue())


def _publish(config: LlavaConfig, trained: tower.Tower, work: Path, out: Path) -> None:
    """The checkpoint's files into `out`, weights last."""
    student = decoder.Student(config)
    load("decoder", student, work)
    tensors = {f"vision_tower.vision_model.{name}": x for name, x in trained.state_dict().items()}
    tensors = {name: x.half().contiguous() for name, x in (tensors | student.state_dict()).items()}
    if {name: tuple(x.shape) for name, x in tensors.items()} != expected_tensors(config):
        raise CheckpointError("the trained tensors must be those of flowcut/tensors.py, got others. Mend the names.")
    out.mkdir(parents=True, exist_ok=True)
    for file in sorted((work / "model").iterdir()):
        shutil.copyfile(file, out / file.name)
    write_file(out / "model.safetensors", save(tensors, metadata={"format": "pt"}))


def history(work: Path) -> dict[str, object]:
    """What `train` did in `work`: its recipe, and the curve of each stage, which says how long it took."""
    curves = {name: read_curve(name, work) for name in ("tower", "decoder")}
    return {"recipe": json.loads((work / "recipe.json").read_text(encoding="utf-8")), **curves}
