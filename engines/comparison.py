"""What `verify` found: one row per runner and output, the tolerances they are judged by, and the judging itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from flowcut.anyres import NO_TOKEN
from flowcut.contract import exchange_dtype
from flowcut.printable import printable

Array = NDArray[Any]
OK, TIE, FAILED, NOT_RUN = "ok", "tie", "FAILED", "not run"
WEIGHTS, KEPT, COUNTS, EARLY = "weights", "kept_tokens", ("lengths", "pruned_lengths"), "early cache"
"""Outputs of rows: of a decoder that drops visual tokens, which stay, how many tokens there are, and the cache of the
layers before that."""
_NOT_VALUES = {WEIGHTS, KEPT, *COUNTS, EARLY}


class Led(NamedTuple):
    """What the reference computes when it keeps another runner's patches.

    Gaps are between scores at one pruning point, over the lowest score that stays there.

    Attributes:
        image_embeds: per picture its visual tokens [n, D].
        widest_gap: how far at most a patch that had to go was above one that took its place; 0 if none had to.
        firm_gap: the same over the points before which no tie was met: after one, which others were dropped is not
            known, and scores are other ones.
        closest_call: least gap between the last patch that stays and the first that goes.
    """

    image_embeds: Sequence[Array]
    widest_gap: float
    firm_gap: float
    closest_call: float


Lead = Callable[[Sequence[Array], float], Led]
"""From what to keep of each picture, and the gap up to which two scores are a tie."""


@dataclass(frozen=True)
class Tolerance:
    """What one precision may differ by.

    Attributes:
        values: max|a-b| / max|b| over one output.
        score_gap: patches whose scores are closer than this, relative to the lowest that stays, are equal as far as the
            precision can tell; which of them is kept is a tie.
        agreement: least Jaccard of two kept sets where no scores are at hand to tell ties.
        after_tie: the same where a tie was met on the way, after which scores are other ones.
    """

    values: float
    score_gap: float
    agreement: float
    after_tie: float


# Measured with ONNX Runtime's CPU provider against torch on llava-tiny, 20 seeds, and for fp32 and fp16 at
# CLIP-L/14-336 geometry. fp32: values and scores to 2e-6. fp16: image_embeds to 1e-3 (9e-3 after a tie), hidden,
# logits, cache and scores to 2e-3; int8 and int4, which compute in float16, the same. fp8 rounds activations: where
# float16's last digit takes one across the middle of two FP8 numbers, these are 6 to 12% apart. Half such a digit in
# image_embeds changes torch's own logits by 3 to 8%; measured: values to 7e-2, kept sets down to an agreement of 0.6.
# bf16's are eight times fp16's, as it has three bits less, and not yet run: ONNX Runtime computes it in float32.
# The allowances leave room for other kernels and deeper decoders. A wrong mask or layer is far beyond them; one wrong
# weight or scale need not be, and is found in the file (engines.stored).
TOLERANCES = {
    "fp32": Tolerance(values=1e-4, score_gap=2e-5, agreement=1.0, after_tie=0.7),
    "fp16": Tolerance(values=2e-2, score_gap=1e-2, agreement=0.9, after_tie=0.7),
    "bf16": Tolerance(values=1.6e-1, score_gap=8e-2, agreement=0.7, after_tie=0.5),
    "int8": Tolerance(values=2e-2, score_gap=1e-2, agreement=0.9, after_tie=0.7),
    "int4": Tolerance(values=2e-2, score_gap=1e-2, agreement=0.9, after_tie=0.7),
    "fp8": Tolerance(values=2e-1, score_gap=1e-1, agreement=0.5, after_tie=0.5),
}
_WIDENED = Tolerance(values=2e-3, score_gap=1e-3, agreement=0.9, after_tie=0.7)
"""bf16 weights in float32. Measured: 6e-7, image_embeds 3e-4 for quick_gelu's factor, which is bf16 in the graph."""
AFTER_TIE = 0.1
"""Allowed for image_embeds where a tie was decided differently on the way: a patch that was dropped later has looked at
others, and been looked at, for some layers. Measured: 6e-3 with 64 of 576 patches, 3e-2 with 16 of 144."""


def tolerance(precision: str, runner: str) -> Tolerance:
    """Of a graph, its runner against its reference."""
    return _WIDENED if (precision, runner) == ("bf16", "onnxruntime") else TOLERANCES[precision]


def vision_tolerance(vision: str, language: str, runner: str) -> Tolerance:
    """Of the vision graph, whose image_embeds have the decoder's type: in float16 they lose what a fp16 graph does."""
    own, rounded = tolerance(vision, runner), exchange_dtype(language) == "float16"
    return replace(own, values=max(own.values, TOLERANCES["fp16"].values)) if rounded else own


@dataclass(frozen=True)
class Row:
    """One comparison: `runner` against `reference`.

    Attributes:
        output: a graph's output; or "signature" (names, shapes, types), "metadata", "size, sha256", "all", WEIGHTS.
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
        precision: the decoder's.
        graphs: those of the directory.
        inputs: what the graphs were run on.
    """

    directory: str
    model: str
    note: str
    precision: str
    vision_precision: str
    graphs: tuple[str, ...]
    inputs: str
    rows: tuple[Row, ...]

    @property
    def compared(self) -> set[str]:
        """Graphs whose values, those that all their layers had a part in, were compared at least once."""
        return {r.graph for r in self.rows if r.error is not None and r.output not in _NOT_VALUES}

    @property
    def ok(self) -> bool:
        """Nothing failed, and the values of all graphs were compared with something."""
        return self.compared == set(self.graphs) and all(r.verdict != FAILED for r in self.rows)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: an error that is not a finite number is written as text."""
        rows = [asdict(r) | {"error": _json_number(r.error)} for r in self.rows]
        language = asdict(tolerance(self.precision, "onnxruntime"))
        vision = asdict(vision_tolerance(self.vision_precision, self.precision, "onnxruntime"))
        vision |= {"values_after_tie": AFTER_TIE}
        return {**asdict(self), "ok": self.ok, "tolerance": language, "vision_tolerance": vision, "rows": rows}


def relative_error(got: Array, expected: Array) -> float:
    """max|a-b| / max|b| in float64; infinite where b is all zero and a is not, nan where either is not finite."""
    a, b = got.astype(np.float64), expected.astype(np.float64)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return math.nan
    difference, scale = float(np.abs(a - b).max(initial=0.0)), float(np.abs(b).max(initial=0.0))
    return difference / scale if scale else (math.inf if difference else 0.0)


def jaccard(a: Iterable[Array], b: Iterable[Array]) -> float:
    """The least agreement of two kept sets over pictures, which have such sets each."""
    pairs = [(set(x.tolist()), set(y.tolist())) for x, y in zip(a, b, strict=True)]
    return min((len(x & y) / len(x | y) for x, y in pairs if x | y), default=1.0)


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

    def values_worst(
        self, output: str, got: Mapping[str, Array], expected: Mapping[str, Array], detail: str = ""
    ) -> Row:
        """Several tensors in one row: the one that differs most, by name."""
        errors = {name: relative_error(got[name], expected[name]) for name in expected}
        worst = max(errors, key=lambda name: math.inf if math.isnan(errors[name]) else errors[name])
        return self._row(output, errors[worst], self.tolerance.values, f"greatest at {worst}{detail and ', '}{detail}")

    def vision(
        self, got: Mapping[str, Array], expected: Mapping[str, Array], numbers: int, lead: Lead | None
    ) -> list[Row]:
        """Kept patches and image_embeds, each [images, slots, ..]. `lead` tells ties from errors where it is given.

        `numbers`: kept are below it, patch numbers or LLaVA-NeXT's places.

        Where the kept patches differ, so do the features, rightly. The reference is therefore led through the runner's
        patches; without `lead` only common patches are compared, which still have seen other neighbours.
        """
        if problem := kept_problem(got, numbers):
            return [self.unmeasured("kept", FAILED, problem)]
        (kept, embeds), (others, theirs) = _real(got), _real(expected)
        agreement = jaccard(kept, others)
        same = self._row("kept", 0.0, self.tolerance.score_gap)
        if agreement == 1.0:
            values = self.values("image_embeds", np.concatenate(embeds), np.concatenate(theirs))
            if values.verdict == OK or lead is None:
                return [same, values]
        if lead is None:
            common = _common((kept, embeds), (others, theirs))
            return [self.unled("kept", agreement), self.values("image_embeds", *common, "of the common patches only")]
        led = lead(kept, self.tolerance.score_gap)
        return [
            same if agreement == 1.0 else self._tie(led, agreement),
            self._led_values(embeds, led),
        ]

    def unmeasured(self, output: str, verdict: str, detail: str) -> Row:
        """A verdict without figures, and why."""
        return Row(self.graph, self.reference, self.runner, output, verdict, detail=detail)

    def exact(self, output: str, got: Array, expected: Array) -> Row:
        """Whole numbers that leave no room."""
        return self._row(output, float(np.abs(got - expected).max(initial=0)), 0.0)

    def tokens(self, agreement: float, gap: float | None) -> Row:
        """What stays of pictures inside the decoder: `gap` is the widest between scores of those that were swapped, as
        torch has them; None where nobody knows."""
        if agreement == 1.0:
            return self._row(KEPT, 0.0, self.tolerance.score_gap)
        if gap is None:
            return self.unled(KEPT, agreement)
        row = self._row(KEPT, gap, self.tolerance.score_gap)
        detail = f"agreement {agreement:.3f}; the error is the widest score gap among swapped tokens"
        return replace(row, verdict=TIE if row.verdict == OK else FAILED, detail=detail)

    def unled(self, output: str, agreement: float) -> Row:
        """Two kept sets where nobody can be asked for the scores."""
        floor = self.tolerance.agreement
        detail = f"agreement {agreement:.3f}, at least {floor}: without the checkpoint's scores ties cannot be told"
        return self._row(output, 1.0 - agreement, 1.0 - floor, detail)

    def _tie(self, led: Led, agreement: float) -> Row:
        row = self._row("kept", led.widest_gap, self.tolerance.score_gap)
        verdict, detail = (
            TIE if row.verdict == OK else FAILED,
            "the error is the widest score gap among swapped patches",
        )
        after_tie = led.firm_gap <= self.tolerance.score_gap and agreement >= self.tolerance.after_tie
        if verdict == FAILED and after_tie:
            row = self._row("kept", led.firm_gap, self.tolerance.score_gap)
            verdict, detail = TIE, "others were dropped before, of equal score, so that later scores are other ones"
        return replace(row, verdict=verdict, reference="torch", detail=f"agreement {agreement:.3f}; {detail}")

    def _led_values(self, embeds: Sequence[Array], led: Led) -> Row:
        """Against torch keeping the same patches. Which others it dropped on the way is known up to ties only."""
        if [each.shape for each in embeds] != [each.shape for each in led.image_embeds]:
            detail = "torch cannot keep the same patches and no others"
            return Row(self.graph, "torch", self.runner, "image_embeds", FAILED, detail=detail)
        values = self.values("image_embeds", np.concatenate(embeds), np.concatenate(led.image_embeds))
        row = replace(values, reference="torch")
        tied = max(led.closest_call, led.firm_gap) <= self.tolerance.score_gap
        if row.verdict == FAILED and tied and row.error is not None and row.error <= AFTER_TIE:
            detail = "another of equal score may have been dropped on the way"
            return replace(row, verdict=TIE, tolerance=AFTER_TIE, detail=detail)
        return row

    def _row(self, output: str, error: float, tolerance: float, detail: str = "") -> Row:
        verdict = OK if error <= tolerance else FAILED
        return Row(self.graph, self.reference, self.runner, output, verdict, error, tolerance, detail)


def kept_problem(outputs: Mapping[str, Array], numbers: int) -> str:
    """Why `kept` [images, slots], as far as image_lengths say, cannot be ascending numbers; empty where it can."""
    kept = outputs["kept"]
    for row, length in zip(kept, outputs.get("image_lengths", np.full(len(kept), kept.shape[1])), strict=True):
        if not 1 <= length <= len(row):
            return f"image_lengths must be in 1..{len(row)}, got {length}"
        real, rest = row[:length], row[length:]
        if problem := numbers_problem(real, numbers):
            return problem
        if (rest != NO_TOKEN).any():
            return f"must be {NO_TOKEN} behind image_lengths ({length}), got {rest.min()}..{rest.max()}"
    return ""


def numbers_problem(kept: Array, numbers: int) -> str:
    """Why `kept` [n] cannot be ascending numbers below `numbers`; empty where it can."""
    if len(kept) and not 0 <= kept.min() <= kept.max() < numbers:
        return f"must be in 0..{numbers - 1}, got {kept.min()}..{kept.max()}"
    return "must be ascending" if (np.diff(kept) <= 0).any() else ""


SHORT = {"onnxruntime": "ort", "tensorrt_rtx": "rtx", "tensorrt": "trt"}
"""Runners as the table calls them: it has to fit 80 columns."""


def print_report(console: Console, report: Report) -> None:
    """A table of the rows, and one line of summary."""
    eyes = "" if report.vision_precision == report.precision else f", vision {report.vision_precision}"
    note = f" ({report.note})" if report.note else ""
    title = f"{report.directory}: {report.model}, {report.precision}{eyes}{note}"
    console.print(Text(printable(title)))  # not the table's own, which would wrap at its width
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
            console.print(Text(printable(what), styles.get(r.verdict, "")))
    console.print(f"Errors are max|a-b| / max|b|, those of kept relative score gaps. Inputs: {report.inputs}.")
    missing = sorted(set(report.graphs) - report.compared)
    if missing:
        console.print(f"Not verified: the values of {' and '.join(missing)} were compared with nothing.")


Real = tuple[list[Array], list[Array]]
"""Per picture what was kept [n], and the visual tokens [n, D]."""


def _real(outputs: Mapping[str, Array]) -> Real:
    """Without the rows that mean nothing."""
    kept, embeds = outputs["kept"], outputs["image_embeds"]
    lengths = outputs.get("image_lengths", np.full(len(kept), kept.shape[1]))
    pairs = [(k[:n], e[:n]) for k, e, n in zip(kept, embeds, lengths, strict=True)]
    return [k for k, _ in pairs], [e for _, e in pairs]


def _common(got: Real, expected: Real) -> tuple[Array, Array]:
    """image_embeds of the patches that both kept, [n, D]."""
    a, b = [], []
    for x, y, embeds, others in zip(got[0], expected[0], got[1], expected[1], strict=True):
        _, at_x, at_y = np.intersect1d(x, y, return_indices=True)
        a.append(embeds[at_x])
        b.append(others[at_y])
    return np.concatenate(a), np.concatenate(b)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _json_number(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)
