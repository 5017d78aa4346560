"""A plan as tables of text, made of its JSON: for the terminal and for docs/results alike."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from engines.plan.predict import KINDS, TOTAL

Data = Mapping[str, Any]
_SHORT = {"launches": "launch"}


@dataclass(frozen=True)
class Grid:
    """A table whose columns but the first hold numbers, and what is said below it."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    notes: tuple[str, ...] = field(default=())


def grids(data: Data, gpus: Sequence[str] = ()) -> Iterator[Grid]:
    """All that there is to say of a plan.

    Args:
        gpus: whose predictions are shown; none: all.
    """
    yield counted(data)
    shown = [gpu for gpu in data["gpus"] if not gpus or gpu["gpu"] in gpus]
    yield predicted(shown)
    yield where(shown)
    if data["target_ms"] is not None:
        yield targets(data, shown)
    if data["published"] is not None:
        yield from published(data["published"])


def heading(data: Data) -> str:
    """What was planned, in one line."""
    own, eyes = data["precision"], data["vision_precision"]
    precision = own if own == eyes else f"decoder {own}, vision {eyes}"
    note = f" ({data['note']})" if data["note"] else ""
    picture = ""
    if data["picture"] is not None:
        width, height = data["picture"]
        picture = f", pictures of {width} x {height} in {data['tiles']} tiles"
    return f"{data['model']}{note}, {precision}, batch {data['batch']}, {data['text_tokens']} text tokens{picture}"


def counted(data: Data) -> Grid:
    """What each budget asks for, whatever runs it."""
    rows = tuple(tuple(_counted(row)) for row in data["budgets"])
    columns = ("tokens", "prompt", "vision", "prefill", "step, GB", "cache, MB", "saved, MB")
    answer = f"Cache: of a prompt and {data['new_tokens']} new tokens"
    weights = data["budgets"][0]["stored_weight_bytes"] / 1e9
    note = (
        f"Vision and prefill in GFLOP. A step is one of decoding: what it moves. {answer}. Weights: {weights:.2f} GB."
    )
    return Grid("counted from the graphs", columns, rows, (note,))


def _counted(row: Data) -> Iterator[str]:
    yield _budget(row)
    pruned = row["pruned_prompt_tokens"]
    yield str(row["prompt_tokens"]) + (f", then {pruned}" if pruned else "")
    for stage in ("vision", "prefill"):
        yield f"{row['flops'][stage]['total'] / 1e9:.1f}"
    yield f"{row['bytes']['decode']['total'] / 1e9:.2f}"
    yield f"{row['cache_bytes'] / 1e6:.1f}"
    yield "-" if row["baseline"] else f"{row['cache_bytes_saved'] / 1e6:.1f}"


def predicted(gpus: Sequence[Data]) -> Grid:
    """Times of every GPU."""
    columns = ("GPU", "tokens", "vision", "prefill", "both", "low", "high", "faster", "decode")
    rows = tuple(tuple(_predicted(gpu, i)) for gpu in gpus for i in range(len(gpu["budgets"])))
    notes = [
        "Milliseconds, of the roofline but for low and high, which are of both: with launches, fused, and unfused. "
        "Faster: by the roofline. Decode: one step. Nothing has been run."
    ]
    for gpu in gpus:
        lacking = [str(row["tokens"]) for row in gpu["budgets"] if row["fits_memory"] is False]
        if lacking:
            size = gpu["memory_bytes"] / 1e9
            notes.append(
                f"{gpu['gpu']}: weights and cache do not fit its {size:.0f} GB at {', '.join(lacking)} tokens."
            )
    slower = [gpu["gpu"] for gpu in gpus if any(row["speedup"][TOTAL]["low"] < 1 for row in gpu["budgets"])]
    if slower:
        notes.append(
            f"With launches, which the roofline leaves out, pruning is predicted to be slower on {', '.join(slower)}: "
            "compare low."
        )
    return Grid("predicted from published figures", columns, rows, tuple(notes))


def _predicted(gpu: Data, index: int) -> Iterator[str]:
    row = gpu["budgets"][index]
    times = row["times"]
    yield gpu["gpu"] if index == 0 else ""
    yield str(row["tokens"])
    for stage in ("vision", "prefill", TOTAL):
        yield ms(times[stage]["roofline_ms"])
    yield from (ms(times[TOTAL][name]) for name in ("low_ms", "high_ms"))
    yield "-" if index == 0 else f"{row['speedup'][TOTAL]['roofline']:.2f}x"
    yield ms(times["decode"]["roofline_ms"])


def where(gpus: Sequence[Data]) -> Grid:
    """Where the time before the first token goes."""
    titles = [_SHORT.get(kind, kind) for kind in KINDS]
    columns = ("GPU", "tokens", "prefill", *titles, "memory")
    rows = []
    for gpu in gpus:
        for i, row in enumerate(gpu["budgets"]):
            shares = row["shares"]
            names = ("prefill", *KINDS, "memory_bound")
            rows.append((gpu["gpu"] if i == 0 else "", str(row["tokens"]), *(f"{shares[name]:.0%}" for name in names)))
    note = (
        "Shares of low: prefill's, the rest being vision's; then of both by kind. Memory: the share of the roofline in "
        "nodes that move bytes for longer than they compute."
    )
    return Grid("predicted: where vision and prefill spend it", columns, tuple(rows), (note,))


def targets(data: Data, gpus: Sequence[Data]) -> Grid:
    """The greatest budget that meets the target."""
    rows: list[tuple[str, ...]] = []
    for gpu in gpus:
        found = gpu["target"]
        rows.append((gpu["gpu"], "-" if found["tokens"] is None else str(found["tokens"]), ms(found["total_ms"])))
    least = [gpu["gpu"] for gpu in gpus if not gpu["target"]["met"]]
    every = [gpu["gpu"] for gpu in gpus if gpu["target"]["verdict"].startswith("even")]
    notes = (
        [f"By the roofline no budget meets it on {', '.join(least)}: what the least one takes is shown."]
        if least
        else []
    )
    notes += [f"By the roofline even all tokens meet it on {', '.join(every)}."] if every else []
    title = f"predicted: most tokens within {data['target_ms']:g} ms of vision and prefill"
    return Grid(title, ("GPU", "tokens", "roofline, ms"), tuple(rows), tuple(notes))


def published(found: Data) -> Iterator[Grid]:
    """Our counts beside the paper's."""
    before, after, best = found["before"], found["after"], found["best"]
    rows: list[tuple[str, ...]] = [
        (s["change"], _tera(s["before_tflops"]), _tera(s["after_tflops"])) for s in found["steps"]
    ]
    last = found["steps"][-1]
    rows.append(("published", f"{before:.2f}", f"{after:.2f}"))
    off = (last["before_tflops"] - before, last["after_tflops"] - after)
    rows.append(("left over", *(f"{each:+.3f}" for each in off)))
    title = f"TFLOPs beside {found['source']}, {found['visual']} to {found['tokens']} visual tokens"
    yield Grid(title, ("one change at a time", "all", str(found["tokens"])), tuple(rows), tuple(_implied(found)))
    if "before_tflops" in found["ways"][0]:
        yield _ways(found)
    else:
        yield _next_ways(found)
        yield _pictures(found, best["text_tokens"])


def _implied(found: Data) -> Iterator[str]:
    implied, counted = found["implied"], found["counted"]
    yield (
        f"The pair itself implies {implied['flops_per_token'] / 1e9:.2f} GFLOP a token and "
        f"{implied['text_tokens']:.0f} text tokens: {implied['weights'] / 1e9:.2f} x 10^9 weights at two operations "
        f"each. Counted: {counted['layer_weights'] / 1e9:.3f} x 10^9 in the layers, "
        f"{counted['head_weights'] / 1e9:.3f} in the head."
    )
    layers = counted["layers_for_visual_tflops"]
    if layers > found["before"]:
        yield (
            f"{found['visual']} tokens through the layers' weights alone take {layers:.2f} TFLOPs, more than the "
            f"{found['before']} published: fewer were counted."
        )


def _ways(found: Data) -> Grid:
    columns = ("vision", "logits of", "attention", "text tokens", "all", str(found["tokens"]), "off", "rounds to it")
    rows = tuple(
        (
            *_way(way),
            str(way["text_tokens"]),
            *(f"{way[name]:.3f}" for name in ("before_tflops", "after_tflops", "off_tflops")),
            "yes" if way["within_rounding"] else "no",
        )
        for way in found["ways"]
    )
    fitting = sum(way["within_rounding"] for way in found["ways"])
    note = (
        f"{fitting} of {len(rows)} ways give both published figures to their last digit, each with the text tokens "
        "that suit it best. That this is how they were counted is likely, and not known."
    )
    return Grid("ways to count, products alone, TFLOPs", columns, rows, (note,))


def _next_ways(found: Data) -> Grid:
    columns = (
        "vision",
        "logits of",
        "attention",
        "text",
        "visual before",
        "after",
        "two stages",
        "off",
        "or text, before",
    )
    rows = tuple(
        (
            *_way(way),
            *(str(way[name]) for name in ("text_tokens", "visual_before", "visual_after")),
            f"{way['two_stage_tflops']:.3f}",
            f"{way['two_stage_off_tflops']:+.3f}",
            f"{way['two_stage_text_tokens']}, {way['two_stage_visual_before']}",
        )
        for way in found["ways"]
    )
    note = (
        f"With LLaVA-1.5's text tokens: the visual tokens, the same in all layers, that {found['before']} and "
        f"{found['after']} TFLOPs are; what our two stages of pruning count to, five tiles; and the text tokens at "
        "which those meet it, with what the unpruned picture would then be."
    )
    return Grid("what each way makes of the pair", columns, rows, (note,))


def _pictures(found: Data, text: int) -> Grid:
    columns = ("picture", "tiles", "visual tokens", "pruned", "all, TFLOPs", f"{found['tokens']}, TFLOPs")
    rows = []
    for each in found["pictures"]:
        early, late = each["visual_after"]
        size = " x ".join(map(str, each["picture"]))
        figures = (_tera(each["before_tflops"]), _tera(each["after_tflops"]))
        rows.append((size, str(each["tiles"]), str(each["visual_before"]), f"{early}, then {late}", *figures))
    note = (
        f"The language model alone, {text} text tokens, counted as fits LLaVA-1.5 best. Which pictures and questions "
        "were counted is not known, and so neither is what is left over."
    )
    return Grid("what pictures take", columns, tuple(rows), (note,))


def _way(way: Data) -> tuple[str, str, str]:
    return "in" if way["vision"] else "out", way["logits"].removesuffix(" position"), way["attention"]


def _budget(row: Data) -> str:
    if row["baseline"]:
        return f"{row['tokens']} (all)"
    inside = row["llm_tokens"]
    return f"{row['tokens']} to {inside}" if inside and inside != row["tokens"] else str(row["tokens"])


def _tera(value: float) -> str:
    return f"{value:.3f}"


def ms(value: float) -> str:
    """Three digits or so."""
    return f"{value:.1f}" if value >= 100 else f"{value:.2f}" if value >= 1 else f"{value:.3f}"
