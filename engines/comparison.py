"""What `verify` found: one row per runner and output, the tolerances they are judged by, and the judging itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

Array = NDArray[Any]
OK, TIE, FAILED, NOT_RUN = "ok", "tie", "FAILED", "not run"


class Led(NamedTuple):
    """What the reference computes when it keeps another runner's patches.

    Gaps are between scores at one pruning point, over the lowest score that stays there.

    Attributes:
        image_embeds: [images, T, D].
        widest_gap: how far at most a patch that had to go was above one that took its place; 0 if none had to.
        closest_call: least gap between the last patch that stays and the first that goes.
    """

    image_embeds: Array
    widest_gap: float
    closest_call: float


Lead = Callable[[Array], Led]
"""From the patches to keep, [images, T]."""


@dataclass(frozen=True)
class Tolerance:
    """What one precision may differ by.

    Attributes:
        values: max|a-b| / max|b| over one output.
        score_gap: patches whose scores are closer than this, relative to the lowest that stays, are equal as far as the
            precision can tell; which of them is kept is a tie.
        agreement: least Jaccard of two kept sets where no scores are at hand to tell ties.
    """

    values: float
    score_gap: float
    agreement: float


# Measured with ONNX Runtime's CPU provider against torch, on llava-tiny and at CLIP-L/14-336 geometry. fp32: values and
# scores to 2e-6. fp16: image_embeds to 1e-3, logits, cache and scores to 2e-3. The allowances leave room for other
# kernels and deeper decoders; a wrong scale, mask or weight is far beyond them.
TOLERANCES = {
    "fp32": Tolerance(values=1e-4, score_gap=2e-5, agreement=1.0),
    "fp16": Tolerance(values=2e-2, score_gap=1e-2, agreement=0.9),
}
AFTER_TIE = 0.1
"""Allowed for image_embeds where a tie was decided differently on the way: a patch that was dropped later has looked at
others, and been looked at, for some layers. Measured: 6e-3 with 64 of 576 patches, 3e-2 with 16 of 144."""


@dataclass(frozen=True)
class Row:
    """One comparison: `runner` against `reference`.

    Attributes:
        output: a graph's output; or "signature" (names, shapes, types), "metadata", "size, sha256", "all".
        verdict: "ok", "tie" (kept patches differ among equal scores only), "FAILED", or "not run".
        error, tolerance: what was measured and what is allowed; None where nothing was measured.
        detail: why, in words.
    """

    graph: str
    reference: str
    runner: str
    output: str
    verdict: str
    error: float | None = None
    tolerance: float | None = None
    detail: str = ""


@dataclass(frozen=True)
class Report:
    """All rows of one engine directory.

    Attributes:
        note: what every output has to say about the model ("random weights", or nothing).
        inputs: what the graphs were run on.
    """

    directory: str
    model: str
    note: str
    precision: str
    inputs: str
    rows: tuple[Row, ...]

    @property
    def compared(self) -> set[str]:
        """Graphs whose values were compared at least once."""
        return {r.graph for r in self.rows if r.error is not None}

    @property
    def ok(self) -> bool:
        """Nothing failed, and the values of both graphs were compared with something."""
        return self.compared == {"vision", "language"} and all(r.verdict != FAILED for r in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: an error that is not a finite number is written as text."""
        rows = [asdict(r) | {"error": _json_number(r.error)} for r in self.rows]
        tolerance = asdict(TOLERANCES[self.precision]) | {"values_after_tie": AFTER_TIE}
        return {**asdict(self), "ok": self.ok, "tolerance": tolerance, "rows": rows}


def relative_error(got: Array, expected: Array) -> float:
    """max|a-b| / max|b| in float64; infinite where b is all zero and a is not, nan where either is not finite."""
    a, b = got.astype(np.float64), expected.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.nan
    difference, scale = float(np.abs(a - b).max(initial=0.0)), float(np.abs(b).max(initial=0.0))
    return difference / scale if scale else (math.inf if difference else 0.0)


def jaccard(a: Array, b: Array) -> float:
    """The least agreement of two kept sets over images: a, b [images, T]."""
    pairs = zip(a.tolist(), b.tolist(), strict=True)
    return min(len(set(x) & set(y)) / len(set(x) | set(y)) for x, y in pairs)


@dataclass(frozen=True)
class Judge:
    """Makes the rows of one graph, for one runner against one reference."""

    graph: str
    reference: str
    runner: str
    tolerance: Tolerance

    def values(self, output: str, got: Array, expected: Array, detail: str = "") -> Row:
        error = relative_error(got, expected)
        detail = detail if math.isfinite(error) else "not finite"
        return self._row(output, error, self.tolerance.values, detail)

    def values_worst(self, output: str, got: Mapping[str, Array], expected: Mapping[str, Array]) -> Row:
        """Several tensors in one row: the one that differs most, by name."""
        errors = {name: relative_error(got[name], expected[name]) for name in expected}
        worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
        return self._row(output, errors[worst], self.tolerance.values, f"greatest at {worst}")

    def vision(
        self, got: Mapping[str, Array], expected: Mapping[str, Array], patches: int, lead: Lead | None
    ) -> list[Row]:
        """Kept patches and image_embeds, each [images, T, ..]. `lead` tells ties from errors where it is given.

        Where the kept patches differ, so do the features, rightly. The reference is therefore led through the runner's
        patches; without `lead` only common patches are compared, which still have seen other neighbours.
        """
        kept, embeds = got["kept"], got["image_embeds"]
        if problem := kept_problem(kept, patches):
            return [Row(self.graph, self.reference, self.runner, "kept", FAILED, detail=problem)]
        agreement = jaccard(kept, expected["kept"])
        same = self._row("kept", 0.0, self.tolerance.score_gap)
        values = self.values("image_embeds", embeds, expected["image_embeds"])
        if agreement == 1.0 and (values.verdict == OK or lead is None):
            return [same, values]
        if lead is None:
            return self._unled(got, expected, agreement)
        led = lead(kept)
        return [
            same if agreement == 1.0 else self._tie(led, agreement),
            self._led_values(embeds, led),
        ]

    def _tie(self, led: Led, agreement: float) -> Row:
        row = self._row("kept", led.widest_gap, self.tolerance.score_gap)
        verdict = TIE if row.verdict == OK else FAILED
        detail = f"agreement {agreement:.3f}; the error is the widest score gap among swapped patches"
        return replace(row, verdict=verdict, reference="torch", detail=detail)

    def _led_values(self, embeds: Array, led: Led) -> Row:
        """Against torch keeping the same patches. Which others it dropped on the way is known up to ties only."""
        row = replace(self.values("image_embeds", embeds, led.image_embeds), reference="torch")
        tied = max(led.closest_call, led.widest_gap) <= self.tolerance.score_gap
        if row.verdict == FAILED and tied and row.error is not None and row.error <= AFTER_TIE:
            detail = "another of equal score may have been dropped on the way"
            return replace(row, verdict=TIE, tolerance=AFTER_TIE, detail=detail)
        return row

    def _unled(self, got: Mapping[str, Array], expected: Mapping[str, Array], agreement: float) -> list[Row]:
        floor = self.tolerance.agreement
        detail = f"agreement {agreement:.3f}, at least {floor}: without the checkpoint's scores ties cannot be told"
        return [
            self._row("kept", 1.0 - agreement, 1.0 - floor, detail),
            self.values("image_embeds", *_common(got, expected), "of the common patches only"),
        ]

    def _row(self, output: str, error: float, tolerance: float, detail: str = "") -> Row:
        verdict = OK if error <= tolerance else FAILED
        return Row(self.graph, self.reference, self.runner, output, verdict, error, tolerance, detail)


def kept_problem(kept: Array, patches: int) -> str:
    """Why `kept` [images, T] cannot be patch numbers; empty where it can."""
    if kept.min(initial=0) < 0 or kept.max(initial=0) >= patches:
        return f"must be in 0..{patches - 1}, got {kept.min()}..{kept.max()}"
    if (np.diff(kept, axis=1) <= 0).any():
        return "must be ascending"
    return ""


SHORT = {"onnxruntime": "ort", "tensorrt_rtx": "rtx", "tensorrt": "trt"}
"""Runners as the table calls them: it has to fit 80 columns."""


def print_report(console: Console, report: Report) -> None:
    """A table of the rows, and one line of summary."""
    title = f"{report.directory}: {report.model}, {report.precision}" + (f" ({report.note})" if report.note else "")
    console.print(Text(title))  # not the table's own, which would wrap at its width
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in ("graph", "runner", "against", "output", "error", "allowed", "verdict"):
        table.add_column(column, justify="right" if column in ("error", "allowed") else "left", no_wrap=True)
    styles = {OK: "green", TIE: "yellow", FAILED: "bold red"}
    for r in report.rows:
        names = (SHORT.get(name, name) for name in (r.runner, r.reference))
        texts = (r.graph, *names, r.output, _number(r.error), _number(r.tolerance))
        table.add_row(*map(Text, texts), Text(r.verdict, styles.get(r.verdict, "dim")))
    console.print(table)
    for r in report.rows:
        if r.detail and r.verdict != OK:
            what = f"{r.graph}, {r.runner}, {r.output}: {r.verdict}: {r.detail}"
            console.print(Text(what, styles.get(r.verdict, "")))
    console.print(f"Errors are max|a-b| / max|b|, those of kept relative score gaps. Inputs: {report.inputs}.")
    missing = sorted({"vision", "language"} - report.compared)
    if missing:
        console.print(f"Not verified: the values of {' and '.join(missing)} were compared with nothing.")


def _common(got: Mapping[str, Array], expected: Mapping[str, Array]) -> tuple[Array, Array]:
    """image_embeds of the patches that both kept, [n, D]."""
    a, b = [], []
    for i, (x, y) in enumerate(zip(got["kept"], expected["kept"], strict=True)):
        _, at_x, at_y = np.intersect1d(x, y, return_indices=True)
        a.append(got["image_embeds"][i, at_x])
        b.append(expected["image_embeds"][i, at_y])
    return np.concatenate(a), np.concatenate(b)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _json_number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)
