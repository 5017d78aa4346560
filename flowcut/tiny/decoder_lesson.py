"""Stage 2 as a lesson: the tower's features and questions in, the answers' loss and accuracies out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.progress import Progress
from torch import Tensor, nn

from flowcut.config import LlavaConfig
from flowcut.tiny import decoder
from flowcut.tiny.asking import Asking
from flowcut.tiny.drawing import Labels, draw
from flowcut.tiny.questions import KINDS
from flowcut.tiny.scenes import Split
from flowcut.tiny.tower_lesson import VALIDATION

QUESTIONS = 24  # of one picture in a batch
MEASURED = 8  # pictures at once


@dataclass(frozen=True)
class MakeDecoderLesson:
    """Picklable: see `training.fit`. `work` holds features, questions and labels of both splits."""

    config: LlavaConfig
    work: Path
    scenes: int

    def __call__(self) -> DecoderLesson:
        return DecoderLesson(self)


class DecoderLesson:
    """See training.Lesson."""

    def __init__(self, setup: MakeDecoderLesson) -> None:
        student = decoder.Student(setup.config)
        self.module: nn.Module = student
        self._eos = setup.config.eos_token_ids[0]
        self._train = _read(setup.work, "train", setup.scenes)
        self._val = _read(setup.work, "val", VALIDATION)

    def loss(self, rng: np.random.Generator, batch: int, part: slice) -> Tensor:
        features, labels, asking = self._train
        length = int(rng.choice(list(decoder.LENGTHS), p=list(decoder.LENGTHS.values())))
        rows = rng.integers(0, len(features), batch)
        shown = decoder.shown_patches(rng, labels, rows, length)[part]
        questions = asking.draw(rng, rows, QUESTIONS)[part]
        seen = np.take_along_axis(features[rows[part]], shown[..., None], 1)
        logits, wanted = self._answer(seen, asking, questions)
        return decoder.loss(logits, wanted)

    @torch.no_grad()
    def measure(self) -> Mapping[str, float]:
        features, _, asking = self._val
        right: dict[str, list[bool]] = {kind: [] for kind in KINDS}
        for start in range(0, VALIDATION, MEASURED):
            scenes = np.arange(start, start + MEASURED)
            numbers = asking.start[scenes, None] + np.arange(QUESTIONS)
            own = numbers < asking.start[scenes + 1, None]
            questions = np.where(own, numbers, asking.start[scenes, None])
            logits, wanted = self._answer(features[scenes], asking, questions)
            hit = (logits.argmax(-1) == wanted).all(-1).numpy()
            for kind, good in zip(asking.kind[questions[own]], hit[own], strict=True):
                right[KINDS[kind]].append(bool(good))
        every = [x for kind in right.values() for x in kind]
        return {"accuracy": float(np.mean(every)), **{k: float(np.mean(v)) for k, v in right.items()}}

    def _answer(self, seen: NDArray[np.float16], asking: Asking, questions: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
        ids, places, wanted = (torch.from_numpy(x) for x in asking.batch(questions, self._eos))
        with torch.autocast("cpu", torch.bfloat16):
            logits: Tensor = self.module(
                torch.from_numpy(seen.astype(np.float32)), torch.from_numpy(asking.before), ids, places
            )
        return logits, wanted


def _read(work: Path, split: Split, scenes: int) -> tuple[NDArray[np.float16], Labels, Asking]:
    """Features, labels and questions of a split."""
    _, labels = draw(work / "scenes", split, scenes, Progress(disable=True))
    with np.load(work / f"questions-{split}.npz") as questions:
        return np.load(work / f"features-{split}.npy", mmap_mode="r"), labels, Asking(**questions)
