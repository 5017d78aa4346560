"""`flowcut plan`: count the graphs of some budgets, and predict what GPUs would need for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.progress import Progress

from engines.flops import GROUPS
from engines.plan.costs import Cost
from engines.plan.predict import TOTAL, Machine, Times, find_machines, shares, times_dict
from engines.plan.published import Comparison, compare
from engines.plan.settings import PlanSettings
from engines.plan.stages import STAGES
from engines.plan.subject import Row, Subject, find_subject
from engines.plan.target import Target, find_target
from engines.roofline import LAUNCH_US
from flowcut.deps import require
from flowcut.selector import FLOWCUT

__all__ = ["Plan", "PlanSettings", "plan"]
LABEL = "predicted"
RATIOS = ("vision", "prefill", TOTAL, "decode")
"""Of which a speed-up is told."""


@dataclass(frozen=True)
class Plan:
    """What was counted, and what is predicted of it.

    Attributes:
        rows: the baseline, then the budgets asked for.
        targets: by GPU; empty where no target was given.
        notes: what else has to be said, a line each.
        published: for the models of the paper, whole.
    """

    subject: Subject
    rows: tuple[Row, ...]
    machines: tuple[Machine, ...]
    targets: dict[str, Target]
    notes: tuple[str, ...]
    published: Comparison | None

    @property
    def baseline(self) -> Row:
        return self.rows[0]

    def times(self, machine: Machine) -> list[dict[str, Times]]:
        """Of each row, by stage."""
        return [machine.times(row) for row in self.rows]

    def to_dict(self) -> dict[str, Any]:
        """docs/plan.md says what each key is."""
        subject, settings = self.subject, self.subject.settings
        anyres = subject.config.anyres
        return {
            "label": LABEL,
            "model": subject.name,
            "note": subject.note,
            "decoder_layers": subject.config.text.num_hidden_layers,
            "precision": subject.precision,
            "vision_precision": subject.vision,
            "schedule": subject.schedule,
            "selector": subject.selector or FLOWCUT,
            "batch": settings.batch,
            "text_tokens": settings.text_tokens,
            "new_tokens": settings.new_tokens,
            "picture": list(settings.size) if anyres else None,
            "tiles": subject.tiles,
            "launch_us": list(LAUNCH_US),
            "budgets": [self._counted(row) for row in self.rows],
            "gpus": [self._predicted(machine) for machine in self.machines],
            "target_ms": settings.target_ms,
            "published": None if self.published is None else self.published.to_dict(),
            "notes": list(self.notes),
        }

    def _counted(self, row: Row) -> dict[str, Any]:
        """What one budget asks for, whatever runs it."""
        return {
            "tokens": row.asked,
            "baseline": row is self.baseline,
            "llm_tokens": row.budget.llm_tokens,
            "counts": list(row.counts),
            "visual_tokens": row.visual,
            "prompt_tokens": row.lengths.prompt,
            "pruned_prompt_tokens": row.lengths.pruned,
            "flops": {name: _flops(row.costs[name]) for name in STAGES},
            "bytes": {name: _bytes(row.costs[name]) for name in STAGES},
            "cache_bytes": row.cache_bytes,
            "cache_bytes_saved": self.baseline.cache_bytes - row.cache_bytes,
            "stored_weight_bytes": row.weight_bytes,
        }

    def _predicted(self, machine: Machine) -> dict[str, Any]:
        found, gpu = self.times(machine), machine.gpu
        target = self.targets.get(gpu.name)
        return {
            "gpu": gpu.name,
            "label": LABEL,
            "flops_per_s": machine.decoder.flops_per_s,
            "vision_flops_per_s": machine.vision.flops_per_s,
            "bytes_per_s": machine.decoder.bytes_per_s,
            "source": machine.decoder.source,
            "memory_bytes": gpu.memory_bytes,
            "budgets": [
                {
                    "tokens": row.asked,
                    "times": {name: times_dict(times[name]) for name in (*STAGES, TOTAL)},
                    "speedup": {name: speedup(found[0], times, name) for name in RATIOS},
                    "shares": shares(times),
                    "fits_memory": machine.fits(row),
                }
                for row, times in zip(self.rows, found, strict=True)
            ],
            "target": None if target is None else target.to_dict(),
        }


def speedup(before: dict[str, Times], after: dict[str, Times], stage: str) -> dict[str, float]:
    """How many times faster by each figure."""
    a, b = before[stage], after[stage]
    return {name: getattr(a, name) / getattr(b, name) for name in ("roofline", "low", "high")}


def plan(settings: PlanSettings, progress: Progress) -> Plan:
    """Count the baseline and every budget asked for, and predict.

    Raises:
        ConfigError: a model, budget, GPU or length that there is not. EngineError: an engine directory that cannot be
            used. FlowCutError: onnx or onnx_ir is not installed.
    """
    require("onnx_ir", extra="export")
    subject = find_subject(settings)
    machines, notes = find_machines(settings.gpu, subject.precision, subject.vision)
    budgets = [subject.baseline, *subject.budgets()]
    for budget in budgets:
        subject.check(budget)  # all of them, before any is counted
    task = progress.add_task("counting graphs", total=len(budgets))
    rows = []
    for budget in budgets:
        rows.append(subject.row(budget))
        progress.advance(task)
    progress.remove_task(task)
    return Plan(
        subject,
        tuple(rows),
        tuple(machines),
        _targets(subject, machines, settings.target_ms, progress),
        tuple(notes),
        compare(subject, progress),
    )


def _targets(
    subject: Subject, machines: Sequence[Machine], target_ms: float | None, progress: Progress
) -> dict[str, Target]:
    """By GPU."""
    if target_ms is None:
        return {}
    found = {}
    for machine in machines:
        task = progress.add_task(f"{machine.gpu.name}: budget for {target_ms:g} ms", total=None)
        found[machine.gpu.name] = find_target(subject, machine, target_ms, lambda task=task: progress.advance(task))  # type: ignore[misc]
        progress.remove_task(task)
    return found


def _flops(cost: Cost) -> dict[str, int]:
    """Operations by kind, their sum, and the least that a kernel can do with which knows the mask."""
    groups = {group: cost.by_group[group] for group in GROUPS}
    return {**groups, "total": cost.flops, "least": cost.flops if cost.least_flops is None else cost.least_flops}


def _bytes(cost: Cost) -> dict[str, int]:
    """What passes at least once, by what it is, and the upper figure of activations."""
    return {
        "weights": cost.weight_bytes,
        "cache": cost.state_bytes,
        "inputs_and_outputs": cost.io_bytes,
        "total": cost.bytes,
        "activations_at_most": cost.activation_bytes,
    }
