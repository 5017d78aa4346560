"""A lesson of a few parameters, in a module of its own: worker processes import it by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from flowcut.tiny import training

ALWAYS, NEVER = -1, 10**9  # seconds


class SmallNet(nn.Module):
    """Every kind of parameter that optimizers are chosen for: [B] tokens to [B, 3]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.body = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(8, 6), nn.Linear(6, 8)])})
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 3)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        first, second = self.body["layers"].children()
        out: Tensor = self.head(self.norm(x + second(torch.tanh(first(x)))))
        return out


@dataclass(frozen=True)
class MakeSmallLesson:
    """Picklable. The state is saved after every step before `unsaved_from`; step `fails_at` raises."""

    fails_at: int | None = None
    unsaved_from: int = NEVER

    def __call__(self) -> SmallLesson:
        return SmallLesson(self)


class SmallLesson:
    """See flowcut.tiny.training.Lesson. Each token has a number of its own, to be told as three digits."""

    def __init__(self, setup: MakeSmallLesson) -> None:
        self.module: nn.Module = SmallNet()
        self._setup = setup
        self._step: int | None = None

    def loss(self, rng: np.random.Generator, batch: int, part: slice) -> Tensor:
        step = int(rng.bit_generator.seed_seq.entropy[1])  # type: ignore[attr-defined]
        if step == self._setup.fails_at:
            raise ValueError(f"no electricity\nat step {step}")
        training.SAVE_SECONDS = ALWAYS if step < self._setup.unsaved_from else NEVER
        tokens = torch.from_numpy(rng.integers(0, 11, batch)[part])
        return (self.module(tokens) - wanted(tokens)).square().mean()

    @torch.no_grad()
    def measure(self) -> Mapping[str, float]:
        tokens = torch.arange(11)
        return {"error": (self.module(tokens) - wanted(tokens)).abs().mean().item()}


def wanted(tokens: Tensor) -> Tensor:
    """[B, 3]: binary digits."""
    return torch.stack([(tokens >> i) % 2 for i in range(3)], -1).float()
