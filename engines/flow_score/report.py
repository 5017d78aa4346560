"""`flowcut plugin`: what FlowScore's kernels take on each target, what they move, and whether they are right here."""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from engines.backends import gpu_sm
from engines.flow_score.cache import SHIPPED_HEAD_SIZES, Found, keep, look_up, target_for, user_cache
from engines.flow_score.check import LARGEST_BOUND, KernelCheck, check_kernels
from engines.flow_score.compile import TARGETS, compile_kernels
from engines.flow_score.launch import COMBINE, COMBINE_MASKED, DTYPES, LOGITS, Call, Variant
from engines.flow_score.run import Launch, interpreter, ptx_launch
from engines.flow_score.traffic import Traffic, traffic
from flowcut.config import TextConfig, VisionConfig
from flowcut.deps import available
from flowcut.tiny.files import TINY_CLIP


@dataclass(frozen=True)
class PluginSettings:
    """Which kernels to tell about. Raises EngineError where there are none such.

    Attributes:
        targets: compute capabilities without the dot; one that no PTX is for stands for the next lower.
        head_sizes, precisions: of the logits kernel; the others have one form.
        precompile: compile what is neither shipped nor cached.
    """

    targets: tuple[int, ...] = TARGETS
    head_sizes: tuple[int, ...] = SHIPPED_HEAD_SIZES
    precisions: tuple[str, ...] = DTYPES
    precompile: bool = False

    def __post_init__(self) -> None:
        for target in self.targets:
            target_for(target)
        self.variants()

    def variants(self) -> list[Variant]:
        """Each once, in the order given."""
        logits = [Variant(LOGITS, dtype, size) for size in self.head_sizes for dtype in self.precisions]
        return list(dict.fromkeys([*logits, Variant(COMBINE), Variant(COMBINE_MASKED)]))


@dataclass(frozen=True)
class Row:
    """A kernel for a target; `found` is None where it is not compiled yet."""

    sm: int
    variant: Variant
    found: Found | None

    def to_dict(self) -> dict[str, Any]:
        names = ("registers", "shared_bytes", "spills", "threads")
        facts = {name: getattr(self.found.kernel, name) if self.found else None for name in names}
        source = self.found.source if self.found else None
        return {"sm": self.sm, **asdict(self.variant), **facts, "source": source}


@dataclass(frozen=True)
class Step:
    """Bytes of one scoring step of a model, batch 1."""

    model: str
    call: Call
    dtype: str
    head_size: int
    moved: Traffic

    def to_dict(self) -> dict[str, Any]:
        totals = {"total_bytes": self.moved.total_bytes, "device_bytes": self.moved.device_bytes}
        sizes = {"keys": self.call.keys, "heads": self.call.heads, "head_size": self.head_size}
        return {"model": self.model, **sizes, "dtype": self.dtype, **asdict(self.moved), **totals}


@dataclass(frozen=True)
class PluginReport:
    """What `plugin` found.

    Attributes:
        rows, steps: of the tables.
        checks: comparisons with the reference, none where nothing could run.
        verified_by: what ran the kernels: "triton interpreter", "GPU sm_90"; empty where nothing could.
    """

    rows: list[Row]
    steps: list[Step]
    checks: list[KernelCheck]
    verified_by: str

    @property
    def verified(self) -> bool:
        return bool(self.checks) and all(check.ok for check in self.checks)

    @property
    def complaint(self) -> str:
        """One line; empty where the kernels are verified."""
        if self.verified:
            return ""
        if failed := [check.name for check in self.checks if not check.ok]:
            return (
                f"kernels must agree with the reference, got {len(failed)} cases that do not: {'; '.join(failed[:5])}."
            )
        return (
            "kernels are not verified: that takes triton and torch, which interpret them. In the checkout: "
            "pip install -e '.[kernels,torch]'"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "targets": [row.to_dict() for row in self.rows],
            "verified": self.verified,
            "verified_by": self.verified_by,
            "checks": [_check_to_dict(check) for check in self.checks],
            "bytes": [step.to_dict() for step in self.steps],
            "ok": self.verified,
        }


def _check_to_dict(check: KernelCheck) -> dict[str, Any]:
    error = check.relative_error if math.isfinite(check.relative_error) else None  # JSON has no NaN
    return {**asdict(check), "relative_error": error}


def plugin(settings: PluginSettings, progress: Progress) -> PluginReport:
    """Look kernels up, compile those that lack if asked to, count bytes, verify.

    Raises:
        EngineError: what is shipped is damaged, the compiler failed, or what it compiled cannot be kept.
        FlowCutError: triton is not installed and something must be compiled.
    """
    targets, variants = dict.fromkeys(map(target_for, settings.targets)), settings.variants()
    found = {(v, sm): look_up(v, sm) for sm in targets for v in variants}
    if settings.precompile:
        lacking = [job for job, one in found.items() if one is None]
        kernels = compile_kernels(lacking) if lacking else iter(())
        for kernel in progress.track(kernels, total=len(lacking), description="compile"):
            keep(kernel)
            found[kernel.variant, kernel.sm] = Found(kernel, "compiled")
    rows = [Row(sm, variant, one) for (variant, sm), one in found.items()]
    verified_by, launch, device = _launch()
    task = progress.add_task("verify", total=None)
    checks = check_kernels(launch, device, variants) if launch else []
    progress.remove_task(task)
    return PluginReport(rows, list(_steps(settings.precisions)), checks, verified_by)


def _launch() -> tuple[str, Launch | None, str]:
    """What can run kernels here, by name, and torch's device for it: the GPU, else Triton's interpreter."""
    if not available("torch"):
        return "", None, ""
    sm = gpu_sm()
    if sm is not None and sm >= TARGETS[0] and _cuda_works():
        return f"GPU sm_{sm}", ptx_launch(), "cuda"
    return ("triton interpreter", interpreter(), "cpu") if available("triton") else ("", None, "")


def _cuda_works() -> bool:
    """Whether torch has CUDA and cuda.core is installed; a GPU alone does not suffice."""
    return bool(available("cuda") and available("cuda.core") and importlib.import_module("torch").cuda.is_available())


def _steps(precisions: Iterable[str]) -> Iterable[Step]:
    """Scoring steps of models that are in use. The in-LLM step's source, a text token, is not among its keys."""
    sizes: dict[str, Any] = {f.name: TINY_CLIP[f.name] for f in fields(VisionConfig) if f.name in TINY_CLIP}
    tiny, clip, text = VisionConfig(**sizes), VisionConfig(), TextConfig()
    tiles = 5  # LLaVA-NeXT's: the whole picture and four parts
    for dtype in dict.fromkeys(precisions):
        for model, vision in (("CLIP-L/14-336", clip), ("llava-tiny", tiny)):
            call = Call(1, vision.num_attention_heads, vision.patches + 1, token_major=True)
            yield Step(model, call, dtype, vision.head_size, traffic(call, dtype, vision.head_size))
        call = Call(1, text.num_key_value_heads, tiles * clip.patches)
        moved = traffic(call, dtype, text.head_size, source_in_keys=0)
        yield Step("LLaVA-NeXT-7B in-LLM", call, dtype, text.head_size, moved)


def print_report(console: Console, report: PluginReport) -> None:
    """Tables for people, 80 columns wide."""
    table = _table(["target", "kernel"], ["registers", "shared B", "spills B", "threads", "PTX"])
    for row in report.rows:
        if table.row_count and row.variant == report.rows[0].variant:
            table.add_section()
        facts = row.to_dict()
        numbers = [facts[name] for name in ("registers", "shared_bytes", "spills", "threads")]
        label = row.variant.label.removeprefix("flow_score_")
        source = facts["source"] or "none"
        table.add_row(f"sm_{row.sm}", label, *("-" if n is None else str(n) for n in numbers), source)
    console.print(table)
    if not all(row.found for row in report.rows):
        console.print(
            f"none: `flowcut plugin --precompile` with the same options compiles it into {user_cache()}", soft_wrap=True
        )
    _print_bytes(console, report.steps)
    if report.checks:
        _print_checks(console, report)


def _print_bytes(console: Console, steps: Iterable[Step]) -> None:
    console.print("\nKilobytes of one scoring step, batch 1. Loads that repeat cost L2; device memory sees one.")
    table = _table(["model"], ["type", "keys", "heads x d", "K and V", "all loads", "device"])
    for step in steps:
        moved = [step.moved.kv_bytes, step.moved.total_bytes, step.moved.device_bytes]
        sizes = [step.dtype, str(step.call.keys), f"{step.call.heads} x {step.head_size}"]
        table.add_row(step.model, *sizes, *(f"{count / 1e3:,.0f}" for count in moved))
    console.print(table)


def _print_checks(console: Console, report: PluginReport) -> None:
    console.print(f"\nRelative errors against float64, run by {report.verified_by}")
    table = _table(["case"], ["type", "B x H x S x d", "error", "allowed", ""])
    for check in report.checks:
        numbers = [check.dtype, " x ".join(map(str, check.shape)), f"{check.relative_error:.1e}"]
        allowed = f"{check.allowed_error:.1e}" if check.allowed_error <= LARGEST_BOUND else "finite"
        table.add_row(check.name, *numbers, allowed, "ok" if check.ok else "WRONG")
    console.print(table)


def _table(names: Iterable[str], numbers: Iterable[str]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    for name in names:
        table.add_column(name, no_wrap=True)
    for name in numbers:
        table.add_column(name, justify="right", no_wrap=True)
    return table
