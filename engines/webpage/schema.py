"""What bench.json holds, as far as the page shows it. Times are milliseconds; names are those of the file's keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from engines.webpage.fields import Amount, Count, Positive, Share, Whole
from engines.webpage.words import STAGES as TITLES

SCHEMA = 1
STAGES = ("preprocess", "vision", "prefill")
"""Of the time from the picture's file to the first token, in their order."""
ALL = (*STAGES, "total", "decode_per_token")
RATED = ("vision", "prefill", "total", "decode_per_token")
"""Stages that a speed-up is given for."""
GRAPHS = ("vision", "prefill", "decode")
"""What operations and bytes are counted of; "decode" is one step."""


@dataclass(frozen=True)
class Summary:
    """Of n times. spread: distance of the quartiles over the median."""

    median: Amount
    p90: Amount
    p99: Amount
    min: Amount
    max: Amount
    n: Count
    spread: Amount


@dataclass(frozen=True)
class Ratio:
    """A speed-up over n pairs with its 95% interval; flop_ratio is what counted operations allow, null if uncounted."""

    ratio: Amount
    low: Amount
    high: Amount
    n: Count
    flop_ratio: Positive | None = None
    share_of_flop_ratio: Amount | None = None


@dataclass(frozen=True)
class Stages:
    """A stage is null where a subject does not tell it from another. total: the picture's file to first token."""

    total: Summary
    preprocess: Summary | None = None
    vision: Summary | None = None
    prefill: Summary | None = None
    decode_per_token: Summary | None = None

    def get(self, name: str) -> Summary | None:
        """The stage of that name."""
        found: Summary | None = getattr(self, name)
        return found


@dataclass(frozen=True)
class Batch:
    """Measured at one number of prompts at once. Tokens are per prompt; flops and the like by GRAPHS.

    device_ms: of stages, inside the library, by CUDA events on TensorRT; without what surrounds a graph.
    """

    batch: Count
    visual_tokens: Whole
    text_tokens: Whole
    prompt_tokens: Whole
    stages: Stages
    decode_tokens_per_s: Amount | None = None
    flops: Mapping[str, Amount | None] | None = None
    bytes: Mapping[str, Amount | None] | None = None
    roofline_ms: Mapping[str, Amount | None] | None = None
    roofline_share: Mapping[str, Amount | None] | None = None
    device_ms: Mapping[str, Summary | None] | None = None

    @property
    def timed(self) -> list[tuple[str, Summary]]:
        """Everything that was timed, by its title, what the device saw behind the stage that it is of."""
        found = []
        for stage in ALL:
            for title, summary in (
                (TITLES[stage], self.stages.get(stage)),
                (f"{TITLES[stage]}, device", self._seen(stage)),
            ):
                if summary is not None:
                    found.append((title, summary))
        return found

    def _seen(self, stage: str) -> Summary | None:
        return (self.device_ms or {}).get(stage)


@dataclass(frozen=True)
class Subject:
    """An engine or a peer."""

    name: str
    title: str
    kind: Literal["engine", "peer"]
    model: str
    weights: str
    backend: str
    precision: str
    tokens: Count
    patches: Count
    batches: tuple[Batch, ...]
    directory: str | None = None
    sha256: str | None = None
    note: str = ""
    source_sha256: str | None = None
    built_for: Any = None
    vision_precision: str | None = None
    decoder_layers: Count | None = None
    llm_tokens: Count | None = None
    schedule: Any = None
    selector: str | None = None
    counts: tuple[Whole, ...] | None = None
    cuda_graphs: bool | None = None
    peak_memory_bytes: Whole | None = None
    device_memory_bytes: Whole | None = None

    def at(self, batch: int) -> Batch | None:
        """What was measured at that batch size."""
        return next((each for each in self.batches if each.batch == batch), None)


@dataclass(frozen=True)
class Comparison:
    """How many times faster `subject` is than `against`; ratios by RATED."""

    subject: str
    against: str
    batch: Count
    ratios: Mapping[str, Ratio | None]


@dataclass(frozen=True)
class KeptAgreement:
    """Of the patches kept with those of `reference`."""

    reference: str
    jaccard: Share
    pictures: Count


@dataclass(frozen=True)
class BaselineAgreement:
    """Of what the decoder says with what the baseline's does."""

    same_first_token: Share
    logits_cosine: float
    prompts: Count


@dataclass(frozen=True)
class Agreement:
    """kept_reason, baseline_reason: why the other is null."""

    kept: KeptAgreement | None = None
    baseline: BaselineAgreement | None = None
    kept_reason: str | None = None
    baseline_reason: str | None = None


@dataclass(frozen=True)
class Score:
    """Share of n questions answered right, with its 95% interval [low, high]."""

    accuracy: Share
    n: Count
    interval: tuple[Share, ...] = ()


@dataclass(frozen=True)
class Accuracy:
    """Over the questions of so many scenes."""

    pruned: Score
    baseline: Score | None = None
    scenes: Whole | None = None
    split: str | None = None


@dataclass(frozen=True)
class Roof:
    """What the machine can do at best. source: how that is known, "measured: .." or "published: .."."""

    name: str
    source: str
    flops_per_s: Positive
    bytes_per_s: Positive


@dataclass(frozen=True)
class Machine:
    """Where it was measured, how busy that was, and the versions of everything."""

    device: str
    kind: Literal["cpu", "gpu"]
    versions: Mapping[str, Any]
    cores: Count | None = None
    threads: Count | None = None
    load_before: Amount | None = None
    load_after: Amount | None = None
    clocks_mhz: Any = None
    gpu: Mapping[str, Any] | None = None
    other_work_cores: Amount | None = None
    memory_bytes: Whole | None = None
    roof: Roof | None = None


@dataclass(frozen=True)
class Bench:
    """One run of `flowcut bench`. mismatch: in what the baseline is another model or precision, empty as a rule."""

    command: str
    created: str
    model: str
    weights: str
    backend: str
    pruned: Subject
    comparisons: tuple[Comparison, ...]
    machine: Machine
    baseline: Subject | None = None
    peers: tuple[Subject, ...] = ()
    note: str = ""
    agreement: Agreement = field(default_factory=Agreement)
    accuracy: Accuracy | None = None
    accuracy_reason: str | None = None
    mismatch: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def subjects(self) -> tuple[Subject, ...]:
        """Everything that was measured, the pruned engine first."""
        return (self.pruned, *([self.baseline] if self.baseline else []), *self.peers)

    def subject(self, name: str) -> Subject | None:
        """The subject of that name."""
        return next((each for each in self.subjects if each.name == name), None)
