"""One training loop for both stages: seeded, resumable at any minute, its curve written as it goes.

One process per core, each with its part of every batch: on two cores that is 1.4 times as fast as two threads. Matrices
inside layers are trained with Muon, all else with AdamW.
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from rich.progress import Progress, TaskID
from torch import Tensor, distributed, multiprocessing, nn
from torch.multiprocessing.spawn import ProcessException

from flowcut.errors import FlowCutError

SAVE_SECONDS = 60
LOG_EVERY = 25
MEASURES = 16


@dataclass(frozen=True)
class Plan:
    """How long and how fast a stage learns.

    The rate rises over `warmup` steps, then falls as a half cosine of `horizon` steps; from step `cool` on it falls in
    a straight line to 0 at `steps`.
    """

    steps: int
    batch: int
    rate: float
    warmup: int
    cool: int
    horizon: int
    weight_decay: float = 0.05
    seed: int = 0

    def rate_at(self, step: int) -> float:
        if step < self.warmup:
            return self.rate * (step + 1) / self.warmup
        if step > self.cool:
            return self.rate_at(self.cool) * (self.steps - step) / (self.steps - self.cool)
        return self.rate * 0.5 * (1 + math.cos(math.pi * (step - self.warmup) / max(1, self.horizon - self.warmup)))


class Lesson(Protocol):
    """What `fit` trains: a module, the loss of a step and a measure of success."""

    module: nn.Module

    def loss(self, rng: np.random.Generator, batch: int, part: slice) -> Tensor:
        """Mean loss over a part of the batch that `rng` decides."""

    def measure(self) -> Mapping[str, float]:
        """Accuracies on validation scenes."""


def fit(name: str, make: Callable[[], Lesson], plan: Plan, directory: Path, progress: Progress) -> None:
    """Train, going on from `directory`/<name>.pt where that exists, and leave the trained state there.

    Args:
        make: picklable; builds the same lesson in every process.
        directory: also gets <name>.jsonl, the curve, with accuracies sixteen times in all.

    Raises:
        FlowCutError: a worker fails or is killed; what it saved is gone on with the next time.
    """
    workers = min(len(os.sched_getaffinity(0)), plan.batch)
    reports: Any = multiprocessing.get_context("spawn").Queue()
    task = progress.add_task(name, total=plan.steps)
    with tempfile.TemporaryDirectory() as meeting:
        arguments = (name, make, plan, directory, workers, Path(meeting) / "store", reports)
        run = multiprocessing.start_processes(_work, arguments, workers, join=False, start_method="spawn")  # type: ignore[attr-defined, no-untyped-call]
        try:
            while not run.join(timeout=0.5):
                _show(progress, task, reports, name)
        except ProcessException as error:
            raise FlowCutError(
                f"{name} must train to its end, got in a worker process: {_last(str(error))}."
            ) from error
        finally:
            for process in run.processes:
                process.kill()
    _show(progress, task, reports, name)


def _last(report: str) -> str:
    """A traceback's last words, or all of what has no traceback, in one line."""
    lines = report.strip().splitlines()
    traced = [i for i, line in enumerate(lines) if line.startswith("  ")]
    return " ".join(lines[traced[-1] + 1 if traced else 0 :]).rstrip(".")


def load(name: str, module: nn.Module, directory: Path) -> None:
    """Take over what `fit` left."""
    module.load_state_dict(torch.load(directory / f"{name}.pt", weights_only=True)["module"])


def read_curve(name: str, directory: Path) -> list[dict[str, float]]:
    """The lines of the curve that `fit` wrote: step, loss, seconds, and in some of them accuracies."""
    return [json.loads(line) for line in (directory / f"{name}.jsonl").read_text(encoding="utf-8").splitlines()]


def _show(progress: Progress, task: TaskID, reports: Any, name: str) -> None:
    while not reports.empty():
        step, loss = reports.get()
        progress.update(task, completed=step, description=f"{name} (loss {loss:.3f})")


def _work(
    rank: int,
    name: str,
    make: Callable[[], Lesson],
    plan: Plan,
    directory: Path,
    workers: int,
    store: Path,
    reports: Any,
) -> None:
    """One worker process; the first one measures, writes and reports."""
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=workers)
    torch.manual_seed(plan.seed)
    lesson = make()
    parameters = [p for p in lesson.module.parameters() if p.requires_grad]
    optimizers = _optimizers(lesson.module, plan)
    path, curve = directory / f"{name}.pt", _Curve(directory / f"{name}.jsonl")
    start, seconds = _resume(path, lesson.module, optimizers)
    if rank == 0:
        curve.cut(start)
    part = slice(plan.batch * rank // workers, plan.batch * (rank + 1) // workers)
    began = saved = time.monotonic()
    for step in range(start, plan.steps):
        value = lesson.loss(np.random.Generator(np.random.PCG64([plan.seed, step])), plan.batch, part)
        value.backward()  # type: ignore[no-untyped-call]
        _average(parameters)
        nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = plan.rate_at(step)
            optimizer.step()
            optimizer.zero_grad()
        if rank == 0:
            curve.add(value.item())
            done, now = step + 1, time.monotonic()
            if done % LOG_EVERY == 0 or done == plan.steps:
                measured = done * MEASURES // plan.steps > (done - LOG_EVERY) * MEASURES // plan.steps
                extra = lesson.measure() if measured or done == plan.steps else {}
                reports.put((done, curve.write(done, seconds + now - began, extra)))
            if done == plan.steps or now - saved > SAVE_SECONDS:
                _save(path, lesson.module, optimizers, done, seconds + now - began)
                saved = now
    distributed.destroy_process_group()


def _average(parameters: list[nn.Parameter]) -> None:
    """Gradients become their mean over the workers."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients]) / distributed.get_world_size()
    distributed.all_reduce(flat)
    means = torch.split(flat, [g.numel() for g in gradients])
    for gradient, mean in zip(gradients, means, strict=True):
        gradient.copy_(mean.view_as(gradient))


def _optimizers(module: nn.Module, plan: Plan) -> list[torch.optim.Optimizer]:
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    hidden = [p for n, p in named if p.dim() == 2 and ".layers." in n]
    matrices = [p for n, p in named if p.dim() >= 2 and ".layers." not in n and "embed" not in n]
    others = [p for n, p in named if p.dim() < 2 or (".layers." not in n and "embed" in n)]
    groups = [{"params": matrices, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [
        torch.optim.Muon(hidden, plan.rate, plan.weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, plan.rate, betas=(0.9, 0.98), fused=True),
    ]


class _Curve:
    """<name>.jsonl: mean loss since the line before, seconds of training, sometimes accuracies."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._losses: list[float] = []

    def add(self, loss: float) -> None:
        self._losses.append(loss)

    def write(self, step: int, seconds: float, extra: Mapping[str, float]) -> float:
        loss = float(np.mean(self._losses))
        self._losses = []
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, "loss": loss, "seconds": round(seconds, 1), **extra}) + "\n")
        return loss

    def cut(self, step: int) -> None:
        """Forget what is said of steps that will be done again."""
        if self._path.exists():
            lines = self._path.read_text(encoding="utf-8").splitlines()
            self._path.write_text("".join(f"{x}\n" for x in lines if json.loads(x)["step"] <= step), encoding="utf-8")


def _save(path: Path, module: nn.Module, optimizers: list[torch.optim.Optimizer], step: int, seconds: float) -> None:
    partial = path.with_suffix(".partial")
    states = [o.state_dict() for o in optimizers]
    torch.save({"module": module.state_dict(), "optimizers": states, "step": step, "seconds": seconds}, partial)
    partial.replace(path)


def _resume(path: Path, module: nn.Module, optimizers: list[torch.optim.Optimizer]) -> tuple[int, float]:
    """Steps and seconds already done."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    module.load_state_dict(state["module"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return int(state["step"]), float(state["seconds"])
