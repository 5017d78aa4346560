"""What a benchmark found, as data: what bench.json holds, documented in docs/bench.md."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engines.bench.timing import WIDEST, Ratio, Summary

SCHEMA = 1
COUNTED = {"vision": "vision", "prefill": "prefill", "decode_per_token": "decode"}
"""Stages whose operations are counted from graphs, by the name of the count."""
RATIOS = ("vision", "prefill", "total", "decode_per_token")
TITLES = {
    "preprocess": "preprocess",
    "vision": "vision",
    "prefill": "prefill",
    "total": "time to first token",
    "decode_per_token": "each further token",
}


@dataclass(frozen=True)
class Counted:
    """One stage, counted from its graph: see engines.plan.costs.Cost.

    Attributes:
        flops: operations. bytes: that pass through memory at least once.
        roofline_ms: see engines.plan.roof.Roof.bound_ms; None where the device's roof is not known.
    """

    flops: int
    bytes: int
    roofline_ms: float | None


@dataclass(frozen=True)
class Batch:
    """One subject at one batch size.

    Attributes:
        visual_tokens, text_tokens, prompt_tokens: of a prompt, as the decoder's first layer sees it.
        runs: milliseconds by stage, one for each round; TITLES has the stages. "total" is from the picture's file to
            the first token.
        device_ms: of "vision" and "prefill" as the device's events measured them, without copies;
            on ONNX Runtime its own run.
        counted: by the names of COUNTED's values; empty where nothing could be counted.
    """

    batch: int
    visual_tokens: int
    text_tokens: int
    prompt_tokens: int
    runs: Mapping[str, Sequence[float]]
    device_ms: Mapping[str, Sequence[float]] = field(default_factory=dict)
    counted: Mapping[str, Counted] = field(default_factory=dict)

    @property
    def stages(self) -> dict[str, Summary]:
        return {stage: Summary.of(values) for stage, values in self.runs.items()}

    @property
    def tokens_per_s(self) -> float | None:
        """While decoding, all prompts together."""
        step = self.stages.get("decode_per_token")
        return None if step is None else self.batch * 1e3 / step.median

    def share_of_roofline(self, stage: str) -> float | None:
        """The roofline's time over the measured median."""
        counted = self.counted.get(COUNTED.get(stage, ""))
        if counted is None or counted.roofline_ms is None or stage not in self.runs:
            return None
        return counted.roofline_ms / self.stages[stage].median

    def to_dict(self) -> dict[str, Any]:
        known = self.counted
        shares = {COUNTED[stage]: self.share_of_roofline(stage) for stage in COUNTED if stage in self.runs}
        roofs = {name: each.roofline_ms for name, each in known.items()}
        with_roof = bool(known) and all(value is not None for value in roofs.values())
        return {
            "batch": self.batch,
            "visual_tokens": self.visual_tokens,
            "text_tokens": self.text_tokens,
            "prompt_tokens": self.prompt_tokens,
            "stages": {stage: summary.to_dict() for stage, summary in self.stages.items()},
            "device_ms": {stage: Summary.of(values).to_dict() for stage, values in self.device_ms.items()},
            "decode_tokens_per_s": None if self.tokens_per_s is None else round(self.tokens_per_s, 3),
            "flops": {name: each.flops for name, each in known.items()} or None,
            "bytes": {name: each.bytes for name, each in known.items()} or None,
            "roofline_ms": {name: round(value, 5) for name, value in roofs.items() if value is not None}
            if with_roof
            else None,
            "roofline_share": {name: round(value, 4) for name, value in shares.items() if value is not None}
            if with_roof
            else None,
        }


@dataclass(frozen=True)
class Measured:
    """One subject.

    Attributes:
        about: what it is: the manifest's words for an engine, fewer for a peer.
        kept: numbers of the patches left of the first prompt's picture; None where nothing says.
    """

    name: str
    title: str
    about: Mapping[str, Any]
    batches: Sequence[Batch]
    kept: Sequence[int] | None = None

    def to_dict(self) -> dict[str, Any]:
        kept = None if self.kept is None else [list(self.kept)]
        batches = [batch.to_dict() for batch in self.batches]
        return {"name": self.name, "title": self.title, **self.about, "kept": kept, "batches": batches}


@dataclass(frozen=True)
class Comparison:
    """How many times faster `subject` is than `against`, by stage of RATIOS."""

    subject: str
    against: str
    batch: int
    ratios: Mapping[str, Ratio]

    def to_dict(self) -> dict[str, Any]:
        ratios = {stage: ratio.to_dict() for stage, ratio in self.ratios.items()}
        return {"subject": self.subject, "against": self.against, "batch": self.batch, "ratios": ratios}


@dataclass(frozen=True)
class Benchmark:
    """All of it."""

    head: Mapping[str, Any]
    pruned: Measured
    baseline: Measured | None
    peers: Sequence[Measured]
    comparisons: Sequence[Comparison]
    agreement: Mapping[str, Any]
    accuracy: Mapping[str, Any] | None
    mismatch: Sequence[str]
    warnings: Sequence[str]
    machine: Mapping[str, Any]
    settings: Mapping[str, Any]
    profile: Mapping[str, Any] = field(default_factory=dict)

    @property
    def subjects(self) -> list[Measured]:
        return [self.pruned, *([] if self.baseline is None else [self.baseline]), *self.peers]

    @property
    def speedup(self) -> dict[str, float] | None:
        """Of the first batch size over the baseline; None without one."""
        found = next((each for each in self.comparisons if each.against == "baseline"), None)
        if found is None:
            return None
        return {stage: round(found.ratios[stage].ratio, 4) for stage in ("vision", "prefill", "total")}

    def to_dict(self) -> dict[str, Any]:
        """See docs/bench.md."""
        return {
            "schema": SCHEMA,
            **self.head,
            "pruned": self.pruned.to_dict(),
            "baseline": None if self.baseline is None else self.baseline.to_dict(),
            "peers": [peer.to_dict() for peer in self.peers],
            "speedup": self.speedup,
            "comparisons": [each.to_dict() for each in self.comparisons],
            "agreement": dict(self.agreement),
            "accuracy": self.accuracy,
            "accuracy_reason": None if self.accuracy else "not asked for: --scenes N counts right answers",
            "mismatch": list(self.mismatch),
            "warnings": list(self.warnings),
            "machine": dict(self.machine),
            "settings": dict(self.settings),
            **({"profile": self.profile} if self.profile else {}),
        }

    def to_json(self) -> bytes:
        """For a file."""
        return (json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n").encode()


def compare(pruned: Measured, other: Measured) -> list[Comparison]:
    """At every batch size. Operations are compared where both were counted."""
    found = []
    for ours, theirs in zip(pruned.batches, other.batches, strict=True):
        limits = _flop_ratios(ours, theirs)
        ratios = {
            stage: Ratio.of(ours.runs[stage], theirs.runs[stage], limits.get(stage))
            for stage in RATIOS
            if stage in ours.runs and stage in theirs.runs
        }
        found.append(Comparison(pruned.name, other.name, ours.batch, ratios))
    return found


def _flop_ratios(ours: Batch, theirs: Batch) -> dict[str, float]:
    """Theirs over ours; of "total" vision and prefill together, since nothing else has operations to count. Of a decode
    step none: reading the weights takes its time."""
    if not ours.counted or not theirs.counted:
        return {}
    groups = {"vision": ("vision",), "prefill": ("prefill",), "total": ("vision", "prefill")}
    sums = {
        stage: [sum(batch.counted[name].flops for name in names) for batch in (theirs, ours)]
        for stage, names in groups.items()
    }
    return {stage: most / least for stage, (most, least) in sums.items()}


def spread_warnings(subjects: Sequence[Measured]) -> list[str]:
    """A line for each subject and batch size with medians that may not be trusted to a tenth."""
    lines = []
    for subject in subjects:
        for batch in subject.batches:
            stages = [pair for pair in batch.stages.items() if pair[0] != "preprocess"]  # which takes few milliseconds
            wide = [f"{TITLES[stage]} {each.spread:.0%}" for stage, each in stages if each.wide]
            if wide:
                lines.append(f"{subject.name}, batch {batch.batch}: spread above {WIDEST:.0%}: {', '.join(wide)}.")
    if lines:
        lines.append(
            "A wide spread: the machine had other work, or a stage is too short for its clock. Measure again on an "
            "idle machine, or with more --repeats."
        )
    return lines
