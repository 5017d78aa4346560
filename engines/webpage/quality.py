"""What a speed-up costs: right answers, or agreement with what was there before, or why neither is known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from engines.webpage.schema import Bench, Score
from engines.webpage.words import UNKNOWN, count, percent

_SILENT = "its bench.json holds none"
_RANDOM = "the weights are random, so that no answer is right or wrong"


@dataclass(frozen=True)
class Quality:
    """To be said beside every speed-up.

    Attributes:
        known: whether there is any figure.
        short: a few characters, for a chart's axis.
        lines: in full, what is known first, then why the rest is not.
    """

    known: bool
    short: str
    lines: tuple[str, ...]

    @property
    def text(self) -> str:
        """All of it on one line."""
        return "; ".join(self.lines)


def quality(bench: Bench, subject: str = "pruned") -> Quality:
    """Of one subject of a run. Only the pruned engine is held against others."""
    if subject != "pruned":
        return _of_another(bench, subject)
    parts = (_accuracy(bench), _agreement(bench), _overlap(bench))
    known, unknown = [part for part in parts if part.short], [part for part in parts if part.line and not part.short]
    lines = tuple(part.line for part in (*known, *unknown))
    return Quality(bool(known), known[0].short if known else UNKNOWN, lines)


class _Part(NamedTuple):
    """One kind of evidence. short is empty where there is none, and then line says why; both where it is not asked."""

    short: str
    line: str


def _accuracy(bench: Bench) -> _Part:
    found = bench.accuracy
    if found is None:
        return _Part(
            "", f"accuracy {UNKNOWN}{_because(bench.accuracy_reason or _RANDOM * (bench.weights == 'random'))}"
        )
    line = f"accuracy {_score(found.pruned)}{_beside(found.baseline)}"
    return _Part(f"right {percent(found.pruned.accuracy, 1)}", line)


def _agreement(bench: Bench) -> _Part:
    found = bench.agreement.baseline
    if found is None:
        why = f"agreement with the baseline {UNKNOWN}{_because(bench.agreement.baseline_reason)}"
        return _Part("", why if bench.baseline else "")
    same = percent(found.same_first_token)
    line = f"agreement with the baseline: same first token {same}, cosine of logits {found.logits_cosine:.3f}"
    return _Part(f"agree {same}", f"{line} ({count(found.prompts, 'prompt')})")


def _overlap(bench: Bench) -> _Part:
    found = bench.agreement.kept
    if found is None:
        return _Part("", f"overlap of the kept patches {UNKNOWN}{_because(bench.agreement.kept_reason)}")
    share = f"{found.jaccard:.2f}"
    line = f"kept patches overlap {share} with {found.reference} ({count(found.pictures, 'picture')})"
    return _Part(f"overlap {share}", line)


def _of_another(bench: Bench, subject: str) -> Quality:
    score = bench.accuracy.baseline if bench.accuracy is not None and subject == "baseline" else None
    if score is not None:
        return Quality(True, f"right {percent(score.accuracy, 1)}", (f"accuracy {_score(score)}",))
    return Quality(False, UNKNOWN, (f"accuracy and agreement of {subject} {UNKNOWN}: they are measured of pruned",))


def _score(score: Score) -> str:
    interval = f" (95% {' to '.join(percent(each, 1) for each in score.interval)})" if score.interval else ""
    return f"{percent(score.accuracy, 1)}{interval} of {count(score.n, 'question')}"


def _beside(baseline: Score | None) -> str:
    return "" if baseline is None else f", the baseline's {_score(baseline)}"


def _because(reason: str | None) -> str:
    return f": {reason.rstrip('.') if reason else _SILENT}"
