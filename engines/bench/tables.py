"""A benchmark as tables, for a terminal and for Markdown alike: what is shown is decided here, how is not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from engines.bench.records import RATIOS, TITLES, Batch, Benchmark, Comparison, Measured
from engines.bench.timing import Summary
from engines.report import LIBRARIES

NOT_KNOWN = "-"
ALONE = {False: "inside the library", True: "by CUDA events"}
ELSEWHERE = "These are not GPU latencies."
OPS = 12
"""Kinds of nodes that are shown, dearest first."""
MEMORY = {
    "peak memory of a process that answers": "peak_memory_bytes",
    "held on the GPU by its sessions": "device_memory_bytes",
}


@dataclass(frozen=True)
class Grid:
    """A table. The first column is text, the others are numbers. notes: what its reader has to know."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()


def alarms(found: Benchmark) -> list[str]:
    """What no reader may miss, before all else."""
    lines = [f"MISMATCH, so that no ratio is pruning's alone: {line}" for line in found.mismatch]
    if found.head["note"]:
        random = found.head["weights"] == "random"
        means = "kept patches, agreement and answers mean nothing, timings do." if random else "timings are of that."
        lines.append(f"{found.head['note']}: {means}")
    about = found.pruned.about
    for precision in sorted({peer.about["precision"] for peer in found.peers} - {about["precision"]}):
        names = [peer.name for peer in found.peers if peer.about["precision"] == precision]
        lines.append(f"{', '.join(names)} compute in {precision}, not in {about['precision']}.")
    if about["built_for"] != about["backend"]:
        ran, wanted = LIBRARIES[about["backend"]], LIBRARIES[about["built_for"]]
        lines.append(f"Not {wanted}, which the directory was compiled for: {ran} ran the same graphs. {ELSEWHERE}")
    return lines


def grids(found: Benchmark, full: bool = True) -> Iterator[Grid]:
    """The tables, in the order to read them. full: with the stages of every peer."""
    for i, batch in enumerate(found.pruned.batches):
        yield speedups(found, i, batch)
        for subject in found.subjects:
            if full or subject not in found.peers:
                yield times(subject, subject.batches[i])
    if found.peers:
        yield peers(found)
    yield from profile(found)


def speedups(found: Benchmark, index: int, batch: Batch) -> Grid:
    """Pruned against its baseline, and what says whether that is any good."""
    title = f"speed-up at {found.pruned.batches[index].visual_tokens} visual tokens a prompt, batch {batch.batch}"
    header = ("stage", "times faster", "95%", "FLOP limit", "of it")
    rows = []
    for each in _against(found, "baseline", batch.batch):
        for stage in RATIOS:
            if (ratio := each.ratios.get(stage)) is not None:
                interval = f"{ratio.low:.2f}-{ratio.high:.2f}"
                limit = NOT_KNOWN if ratio.flop_ratio is None else f"{ratio.flop_ratio:.2f}"
                rows.append((TITLES[stage], f"{ratio.ratio:.2f}", interval, limit, _share(ratio.share_of_flop_ratio)))
    notes = [*agreement_lines(found)] if rows else ["no baseline was given: --baseline ENGINE_DIR"]
    return Grid(title, header, rows, notes)


def times(subject: Measured, batch: Batch) -> Grid:
    """One subject's stages."""
    runs = next(iter(batch.stages.values())).n
    title = f"{subject.name}: {subject.title}, batch {batch.batch}, {batch.prompt_tokens} prompt tokens"
    header = (f"ms, {runs} run{'s' * (runs > 1)}", "median", "p90", "p99", "spread", "of roofline")
    rows: list[tuple[str, ...]] = []
    for stage, name in TITLES.items():
        if (one := batch.stages.get(stage)) is not None:
            spread = f"{one.spread:.0%}{' !' * one.wide}"
            cells = (f"{one.median:.2f}", f"{one.p90:.2f}", f"{one.p99:.2f}", spread)
            rows.append((name, *cells, _share(batch.share_of_roofline(stage))))
    alone = ALONE[subject.about["backend"] in ("rtx", "trt")]
    for stage, values in batch.device_ms.items():
        if any(values):
            rows.append((f"{stage}, {alone}", f"{Summary.of(values).median:.2f}", *[NOT_KNOWN] * 4))
    notes = [] if batch.tokens_per_s is None else [f"decode: {batch.tokens_per_s:.1f} tokens/s"]
    for what, key in MEMORY.items():
        if (count := subject.about.get(key)) is not None:
            notes.append(f"{what}: {count / 1e6:,.0f} MB")
    return Grid(title, header, rows, notes)


def peers(found: Benchmark) -> Grid:
    """Everything that ran, beside the pruned engine: how many times slower each is."""
    header = ("beside", "batch", "ms", "vision", "prefill", "first token", "token")
    rows, at = [], {(one.name, batch.batch): batch for one in found.subjects for batch in one.batches}
    for each in found.comparisons:
        cells = [f"{each.ratios[stage].ratio:.2f}" if stage in each.ratios else NOT_KNOWN for stage in RATIOS]
        median = at[each.against, each.batch].stages["total"].median
        rows.append((each.against, str(each.batch), f"{median:.1f}", *cells))
    title = f"times that {found.pruned.name} is faster than each, in the same rounds"
    notes = ["ms: its own time to first token", *(f"{peer.name}: {peer.title}" for peer in found.peers)]
    return Grid(title, header, rows, notes)


def profile(found: Benchmark) -> Iterator[Grid]:
    """Ops by the time that they take, pruned beside baseline."""
    own, other = found.profile.get("pruned", {}), found.profile.get("baseline", {})
    for graph, entry in own.items():
        against = dict(other.get(graph, {}).get("ops", []))
        rows = [("all nodes", *_op(entry["total_ms"], other.get(graph, {}).get("total_ms")))]
        rows += [(op or "(not told)", *_op(ms, against.get(op))) for op, ms in entry["ops"][:OPS]]
        note = "From runs of their own, one engine after the other: for shares of a graph's time, not for speed-ups."
        header = ("kind of node", "pruned", "baseline", "ratio")
        yield Grid(f"{graph}: where the time goes, ms a run", header, rows, [note])


def agreement_lines(found: Benchmark) -> Iterator[str]:
    """What goes with every speed-up."""
    told = found.agreement
    if (kept := told.get("kept")) is not None:
        yield (
            f"patches kept: {kept['jaccard']:.3f} of those that {kept['reference']} keeps (Jaccard, {kept['pictures']} "
            f"picture{'s' * (kept['pictures'] > 1)})"
        )
    elif told.get("kept_reason"):
        yield f"patches kept: agreement with adaptive is not known ({told['kept_reason'].rstrip('.')})"
    if (first := told.get("baseline")) is not None:
        yield (
            f"first token as the baseline's: {first['same_first_token']:.0%} of {first['prompts']}; logits' cosine "
            f"{first['logits_cosine']:.4f}"
        )
    yield from accuracy_lines(found.accuracy)


def accuracy_lines(accuracy: Any) -> Iterator[str]:
    if accuracy is None:
        yield "right answers: not asked for (--scenes N counts them on llava-tiny's scenes)"
        return
    said = []
    for name in ("pruned", "baseline"):
        if (score := accuracy[name]) is not None:
            low, high = score["interval"]
            said.append(f"{name} {score['accuracy']:.1%} ({low:.1%}-{high:.1%})")
    n = accuracy["pruned"]["n"]
    yield f"right answers: {', '.join(said)} of {n} questions about {accuracy['scenes']} {accuracy['split']} scenes"


def _against(found: Benchmark, name: str, batch: int) -> list[Comparison]:
    return [each for each in found.comparisons if each.against == name and each.batch == batch]


def _share(value: float | None) -> str:
    return NOT_KNOWN if value is None else f"{value:.0%}"


def _op(ours: float, theirs: float | None) -> tuple[str, str, str]:
    if theirs is None:
        return f"{ours:.2f}", NOT_KNOWN, NOT_KNOWN
    return f"{ours:.2f}", f"{theirs:.2f}", f"{theirs / ours:.2f}" if ours else NOT_KNOWN
