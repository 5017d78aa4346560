"""schedules.json in words and pictures: schedules.md and .svg."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markdown_parts import line, paragraph, table

ADAPTIVE, FULL, MASKED, CLOSED = "adaptive", "masked, full capacity", "masked, calibrated", "static, closed form"
MEDIAN, P90, MAX = "static, median", "static, p90", "static, max"
SEVEN, HALF = "static, flops=0.7", "static, flops=0.5"
BUDGETS = (1 / 3, 2 / 9, 1 / 9)
"""Shares of the patches."""
SIZES = (10, 40, 200, 400)
"""How many pictures constants are chosen from, in the second part."""
RESAMPLES = 2000
Section = Mapping[str, Any]
Span = tuple[float, float, float]
"""A mean, and where with 95% confidence it lies."""


class Row(NamedTuple):
    """A schedule: its kind, what --choose said if it was calibrated, and how it is drawn."""

    label: str
    kind: str
    choose: str | None = None
    colour: str = "#000000"
    marker: str = "o"


# Colours of Okabe and Ito, which most people tell apart, and markers for the others.
ROWS = (
    Row(ADAPTIVE, "adaptive", None, "#000000", "o"),
    Row(FULL, "masked", None, "#999999", "s"),
    Row(MASKED, "masked", "median", "#009E73", "D"),
    Row(CLOSED, "static", None, "#D55E00", "X"),
    Row(MEDIAN, "static", "median", "#0072B2", "P"),
    Row(P90, "static", "p90", "#56B4E9", "^"),
    Row(MAX, "static", "max", "#CC79A7", "v"),
    Row(SEVEN, "static", "flops=0.7", "#E69F00", "<"),
    Row(HALF, "static", "flops=0.5", "#7A5230", ">"),
)


def page(data: Section) -> str:
    """The .md."""
    return "\n".join([*introduction(data), *tables(data), *findings(data), *sizes(data)]) + "\n"


def budgets(data: Section) -> list[int]:
    return sorted({r["tokens"] for r in data["results"].values() if "tokens" in r}, reverse=True)


def found(data: Section, tokens: int, label: str) -> Section:
    result: Section = data["results"][f"{tokens} {label}"]
    return result


# --- figures ---


def held_out(result: Section) -> Section:
    figures: Section = result["agreement"]["held_out"]
    return figures


def jaccard(result: Section, half: str = "held_out") -> float:
    return float(np.mean(result["agreement"][half]["each"]))


def over_points(result: Section) -> float:
    """Mean over the pruning points of the mean over pictures."""
    return float(np.mean([point["mean"] for point in held_out(result)["agreement"]["kept_jaccard"]]))


def gain(one: Section, other: Section) -> Span:
    """How much better `one` agrees with adaptive than `other` on the same held-out pictures."""
    return resampled(np.subtract(held_out(one)["each"], held_out(other)["each"]), np.ones(len(held_out(one)["each"])))


def more_right(one: Section, other: Section) -> Span:
    """Difference of accuracies, on the same questions; drawn are scenes."""
    right = [np.array([int(digit) for digit in result["scenes"]["right"]]) for result in (one, other)]
    return resampled(right[0] - right[1], np.array([int(digit) for digit in one["scenes"]["asked"]]))


def resampled(values: np.ndarray, weights: np.ndarray) -> Span:
    """Sum of values over sum of weights, and the middle 95% of it over RESAMPLES draws with replacement."""
    rng = np.random.Generator(np.random.PCG64(0))
    rows = rng.integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.percentile(values[rows].sum(1) / weights[rows].sum(1), (2.5, 97.5))
    return float(values.sum() / weights.sum()), float(low), float(high)


# --- the page ---


def introduction(data: Section) -> Iterator[str]:
    half = held_out(found(data, budgets(data)[0], ADAPTIVE))["pictures"]
    n = found(data, budgets(data)[0], ADAPTIVE)["n"]
    note = f" **{data['note']}: these numbers mean nothing.**" if data["note"] else ""
    yield "# Schedules with constants, beside adaptive"
    yield from paragraph(f"""
        Written by `schedules.py`: {data["model"]} (weights {data["sha256"][:12]}), eager PyTorch, fp32.{note}
        Constants and capacities are those that `flowcut calibrate schedule` chose from {data["pictures"] - half} of
        the first {data["pictures"]} scenes of the val split. The other {half} are held out; on them every schedule
        is compared with adaptive, as the schedule files have it. Right answers are of {n} questions about the first
        {data["scenes"]} scenes of the test split. [docs/schedules.md](../schedules.md) says what the schedules
        are.""")
    yield from paragraph("""
        *Constants*: patches that leave each pruning point, of adaptive their mean. *FLOPs*: share of the unpruned
        tower's, layers that feed hidden state -2 only (calib/flops.py); of adaptive the mean over pictures, of masked
        those of its capacities, which are its shapes. *Kept*: Jaccard index of the sets of patches kept by the schedule
        and by adaptive on held-out pictures: at the end, mean and least; the same on the pictures that the constants
        were chosen from; and the mean over pruning points. *Cosine*: between the features of patches that both kept.
        *Clamped*: pictures of which adaptive keeps more than a capacity somewhere. *Right*: percent of right answers
        with 95% intervals, and the difference from adaptive on the same questions, paired by scene (2000 bootstrap
        draws).""")
    yield from ["", "![Agreement and right answers against FLOPs](schedules.svg)"]


def tables(data: Section) -> Iterator[str]:
    for tokens in budgets(data):
        share = f"{tokens} of {data['patches']} patches ({tokens / data['patches']:.0%})"
        yield from table(
            *(share, "constants", "FLOPs", "kept, end", "least", "of chosen from", "over points", "cosine", "clamped"),
            *("right", "less adaptive"),
        )
        adaptive = found(data, tokens, ADAPTIVE)
        for one in ROWS:
            yield line(one.label, *cells(found(data, tokens, one.label), adaptive))


def cells(result: Section, adaptive: Section) -> Iterator[str]:
    figures = held_out(result)
    yield " ".join(f"{count:.0f}" for count in result["counts"] or figures["mean_counts"])
    yield f"{figures['flops_share']:.1%}"
    yield f"{jaccard(result):.3f}"
    yield f"{figures['agreement']['final_jaccard']['min']:.3f}"
    yield f"{jaccard(result, 'calibration'):.3f}"
    yield f"{over_points(result):.3f}"
    yield f"{figures['agreement']['feature_cosine']['mean']:.4f}"
    yield "-" if figures["clamped"] is None else f"{figures['clamped']:.0%}"
    low, high = result["interval"]
    yield f"{result['accuracy'] * 100:.1f} ({low * 100:.1f}-{high * 100:.1f})"
    yield "-" if result is adaptive else points(more_right(result, adaptive))


def findings(data: Section) -> Iterator[str]:
    """What the tables say; tests/test_schedules_page.py holds the words against the .json."""
    some = budgets(data)

    def each(form: Callable[[int], str]) -> str:
        return ", ".join(form(tokens) for tokens in some)

    def one(tokens: int, label: str) -> Section:
        return found(data, tokens, label)

    def better(tokens: int, label: str, than: str) -> str:
        return "{:+.3f} ({:+.3f} to {:+.3f})".format(*gain(one(tokens, label), one(tokens, than)))

    def cost(label: str) -> str:
        return each(lambda tokens: f"{held_out(one(tokens, label))['flops_share']:.0%}")

    def ends(label: str, half: str = "held_out") -> str:
        return each(lambda tokens: f"{jaccard(one(tokens, label), half):.3f}")

    def answers(label: str, than: str) -> str:
        return each(lambda tokens: points(more_right(one(tokens, label), one(tokens, than))))

    yield from ["", "## What they say"]
    yield from paragraph(f"""
        Figures are for {each(str)} patches, in this order; differences are paired, with 95% intervals.""")
    yield from paragraph(f"""
        **The median agrees better than the closed form, and is cheaper.** Kept:
        {each(lambda tokens: better(tokens, MEDIAN, CLOSED))}; FLOPs {cost(MEDIAN)} instead of {cost(CLOSED)}. On this
        model the closed form keeps more than adaptive does, on average, at every point but the last.""")
    yield from paragraph(f"""
        **More patches on the way are not more agreement.** p90 and max drop later than the median and cost more. Kept,
        p90 less median: {each(lambda tokens: better(tokens, P90, MEDIAN))}; max less median:
        {each(lambda tokens: better(tokens, MAX, MEDIAN))}. A patch that stays longer than with adaptive is scored once
        more, and is a key to all others meanwhile.""")
    yield from paragraph(f"""
        **Nor is agreement accuracy.** Right answers, median less closed form: {answers(MEDIAN, CLOSED)} points; max
        less median: {answers(MAX, MEDIAN)}. Adaptive is what a schedule stands in for, not the best there is: what
        drops late may answer better and agree less. At half of the FLOPs ({HALF}) a schedule keeps {ends(HALF)} as
        adaptive does, yet right answers change by {answers(HALF, ADAPTIVE)} points.""")
    yield from paragraph(f"""
        **Masked with calibrated capacities has the shapes, and the FLOPs, of static max, and agrees best**: kept
        {ends(MASKED)}, where static max has {ends(MAX)}. Of the held-out pictures it clamps
        {each(lambda tokens: f"{held_out(one(tokens, MASKED))['clamped']:.0%}")}. Full capacity costs {cost(FULL)},
        calibrated {cost(MASKED)}, adaptive itself {cost(ADAPTIVE)}; what masks and counts cost on the device is not in
        these.""")
    yield from paragraph(f"""
        **flops=X does not overfit by much.** Kept on the pictures that it was searched on, less kept on held-out ones:
        {each(lambda tokens: f"{gap(one(tokens, SEVEN)):+.3f}")} with 0.7,
        {each(lambda tokens: f"{gap(one(tokens, HALF)):+.3f}")} with 0.5; the closed form, which has seen no picture,
        has {each(lambda tokens: f"{gap(one(tokens, CLOSED)):+.3f}")}. That it agrees less than the median is its
        budget's doing: adaptive costs more.""")
    yield from paragraph("""
        **There is little to save in this tower**: adaptive drops most of the surplus at the last point, after which one
        of the eleven layers is left. The decoder gains whatever the schedule.""")


def gap(result: Section) -> float:
    """How much better a schedule agrees on the pictures that it may have been chosen from."""
    return jaccard(result, "calibration") - jaccard(result)


def sizes(data: Section) -> Iterator[str]:
    yield from ["", "## How many pictures"]
    draws = draws_by_size(data)
    tokens = budgets(data)[-1]
    yield from paragraph(f"""
        Median constants and capacities for {tokens} patches from more and from fewer pictures, half of which are held
        out. Draws of one size share no picture. *Held out*: kept at the end, on the draw's own held-out half. *Others*:
        the same on {min(200, data["scenes"])} scenes that no draw has, where adaptive and the constants can be
        compared between draws. Mean over draws, and least to most. Medians settle
        with few pictures; greatest counts, of which a capacity is one, take more.""")
    yield from table("pictures", "draws", "held out", "others", "clamped, of others", "constants of the first draw")
    for size, some in draws.items():
        held, others, clamped = ([one[name] for one in some] for name in ("held_out", "others", "clamped"))
        yield line(
            *(str(size), str(len(some)), spread(held, ".3f"), spread(others, ".3f"), spread(clamped, ".0%")),
            " ".join(map(str, some[0]["counts"])),
        )


def draws_by_size(data: Section) -> dict[int, list[Section]]:
    some = [(name, one) for name, one in sorted(data["results"].items()) if "draw" in name]
    present = sorted({one["pictures"] for _, one in some})
    return {size: [one for _, one in some if one["pictures"] == size] for size in present}


def points(span: Span) -> str:
    """In percentage points."""
    mean, low, high = (f"{value * 100:+.1f}" for value in span)
    return f"{mean} ({low} to {high})"


def spread(values: Sequence[float], form: str) -> str:
    mean, low, high = (format(value, form) for value in (float(np.mean(values)), min(values), max(values)))
    return mean if len(values) == 1 else f"{mean} ({low} to {high})"


# --- the picture ---


def plot(path: Path, data: Section) -> None:
    """A column for each budget: agreement above, right answers below, against FLOPs."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "flowcut", "svg.fonttype": "path", "font.size": 9})
    some = budgets(data)
    figure, panels = plt.subplots(2, len(some), figsize=(12, 6.5), sharex=True, sharey="row", layout="constrained")
    for tokens, (above, below) in zip(some, panels.T, strict=True):
        for one in ROWS:
            draw(above, below, one, found(data, tokens, one.label))
        above.set_title(f"{tokens} of {data['patches']} patches", loc="left", fontweight="bold")
        below.set_xlabel("FLOPs, % of the unpruned tower")
    panels[0, 0].set_ylabel("kept as by adaptive (Jaccard)")
    panels[1, 0].set_ylabel("right answers, %")
    for panel in panels.flat:
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def draw(above: Any, below: Any, one: Row, result: Section) -> None:
    x, accuracy, (low, high) = held_out(result)["flops_share"] * 100, result["accuracy"], result["interval"]
    style = {"color": one.colour, "marker": one.marker, "linestyle": "", "markersize": 6}
    above.plot([x], [jaccard(result)], label=one.label, **style)
    bars = [[(accuracy - low) * 100], [(high - accuracy) * 100]]
    below.errorbar([x], [accuracy * 100], bars, elinewidth=0.8, capsize=2, **style)
