"""What `flowcut plan` predicts of LLaVA-1.5-7B and LLaVA-NeXT-7B on A100 and H100: writes plan.json and plan.md.

python docs/results/plan.py      # needs .[export]; two minutes, no weights, no GPU
"""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from markdown_parts import header, line, prose
from rich.progress import Progress

from engines.plan.grids import Grid, grids, heading, ms
from engines.plan.predict import TOTAL
from engines.plan.run import PlanSettings, plan
from flowcut.arguments_plan import add_plan
from flowcut.atomic import write_file

HERE = Path(__file__)
GPUS = ("A100", "H100")
COMMANDS = tuple(
    f"flowcut plan {model} --tokens {tokens} --precision {precision} --gpu {' '.join(GPUS)} --target-ms {target}"
    for model, tokens, target in (("llava-1.5-7b", "64 128 192", 5), ("llava-v1.6-vicuna-7b", "160 320 640", 20))
    for precision in ("fp16", "int4")
)
WAY = ("logits", "attention")
Data = Mapping[str, Any]


def main() -> None:
    data = {"plans": [{"command": command, "plan": made(command)} for command in COMMANDS]}
    write_file(HERE.with_suffix(".json"), (json.dumps(data, indent=1) + "\n").encode())
    write_file(HERE.with_suffix(".md"), page(data).encode())


def made(command: str) -> dict[str, Any]:
    """What the command prints as its last line."""
    with Progress(disable=True) as progress:
        return plan(settings(command), progress).to_dict()


def settings(command: str) -> PlanSettings:
    """As flowcut.cli makes them of the command's arguments."""
    parser = argparse.ArgumentParser()
    add_plan(parser.add_subparsers())
    arguments = vars(parser.parse_args(shlex.split(command)[1:]))
    names = PlanSettings.__dataclass_fields__
    return PlanSettings(**{name: value for name, value in arguments.items() if name in names})


# --- the page ---


def page(data: Data) -> str:
    lines = ["# Predicted: what is left after pruning, and where it goes", *introduction(data)]
    seen = set[str]()
    for each in data["plans"]:
        lines += section(each["command"], each["plan"], each["plan"]["model"] not in seen)
        seen.add(each["plan"]["model"])
    return "\n".join(lines) + "\n"


def introduction(data: Data) -> Iterator[str]:
    low, high = data["plans"][0]["plan"]["launch_us"]
    yield from prose(f"""
        Written by `plan.py`. Nothing here has run on a GPU: operations and bytes are counted from the graphs that
        would be exported, times are predicted from the makers' figures, a launch taken to be {low} to {high} us.
        [plan.md](../plan.md) says what is counted and what each column means.""")
    yield ""
    yield from header("", "GPU", "before, ms", "after, ms", "times faster", "times fewer operations", "memory's share")
    for each in data["plans"]:
        yield from summary(each["plan"])


def summary(found: Data) -> Iterator[str]:
    """The smallest budget, GPU by GPU."""
    index = min(range(len(found["budgets"])), key=lambda i: found["budgets"][i]["tokens"])
    tokens = found["budgets"][index]["tokens"]
    for gpu in found["gpus"]:
        whole, row = gpu["budgets"][0], gpu["budgets"][index]
        times = (each["times"][TOTAL]["roofline_ms"] for each in (whole, row))
        yield line(
            f"{found['model']}, {found['precision']}, {whole['tokens']} to {tokens} tokens",
            gpu["gpu"],
            *map(ms, times),
            *(f"{value:.2f}" for value in (row["speedup"][TOTAL]["roofline"], fewer(found, index))),
            f"{row['shares']['memory_bound']:.0%}",
        )


def fewer(found: Data, index: int) -> float:
    """How many times fewer operations vision and prefill take."""
    whole, row = (
        sum(found["budgets"][i]["flops"][stage]["least"] for stage in ("vision", "prefill")) for i in (0, index)
    )
    return float(whole / row)


def section(command: str, found: Data, with_published: bool) -> Iterator[str]:
    """One command's tables. The published figures stand once for each model."""
    yield from ("", f"## {heading(found)}", "", f"    {command}")
    shown = found if with_published else {**found, "published": None}
    for grid in grids(shown):
        yield from markdown(grid)
        if grid.title.startswith("predicted: where"):
            yield from findings(found)
    if with_published:
        yield from published_findings(found["published"])


def markdown(grid: Grid) -> Iterator[str]:
    yield from ("", f"**{grid.title[0].upper()}{grid.title[1:]}**", "")
    yield from header(*grid.columns)
    for row in grid.rows:
        yield line(*row)
    for note in grid.notes:
        yield from prose(note)


def findings(found: Data) -> Iterator[str]:
    """Where the remaining time goes, in words."""
    for gpu in found["gpus"]:
        index = min(range(len(found["budgets"])), key=lambda i: found["budgets"][i]["tokens"])
        row, shares = gpu["budgets"][index], gpu["budgets"][index]["shares"]
        times, positions = row["times"], ridge(found, gpu, index)
        prompt = found["budgets"][index]["prompt_tokens"]
        what = "reading weights" if shares["memory_bound"] > 0.5 else "arithmetic"
        yield from prose(f"""
            {gpu["gpu"]}, {row["tokens"]} tokens, predicted: {ms(times[TOTAL]["roofline_ms"])} ms remain,
            {shares["prefill"]:.0%} in the prefill and {shares["vision"]:.0%} in vision,
            {shares["linear"]:.0%} in products with weights, {shares["attention"]:.0%} in attention,
            {shares["scoring"]:.1%} in scoring, and {shares["launches"]:.0%} in launches. Most of it is {what}: a
            decoder's product computes for longer than it reads its weights from about {positions:.0f} positions on,
            and the prompt has {prompt}. So {fewer(found, index):.1f} times fewer operations are
            {row["speedup"][TOTAL]["roofline"]:.1f} times less time.""")


def published_findings(found: Data) -> Iterator[str]:
    """What the published pair turns out to be, in words."""
    best = found["best"]
    vision = "with vision" if best["vision"] else "without vision"
    way = f"{vision}, logits of {best['logits']}, attention: {best['attention']}"
    if not found["pictures"]:
        yield from prose(f"""
            **One way of eight gives the pair**: {way}, {best["text_tokens"]} text tokens give
            {best["before_tflops"]:.3f} and {best["after_tflops"]:.3f}, the published {found["before"]} and
            {found["after"]} to the last digit. What `plan` counts differs from it by the steps above, and what is left
            over rounds to nothing. Each way has one number to choose, its text tokens, so that a hit by chance is not
            excluded. The paper does not say how it counted: this is the likely way, not a known one.""")
        return
    ours = next(each for each in found["ways"] if all(each[name] == best[name] for name in ("vision", *WAY)))
    inside, outside = ([each for each in found["ways"] if each["vision"] == flag] for flag in (True, False))
    lengths = sorted((each["visual_before"], each["picture"]) for each in found["pictures"])
    below = max(each for each in lengths if each[0] <= ours["visual_before"])
    above = min(each for each in lengths if each[0] > ours["visual_before"])
    named = [f"{size[0]} x {size[1]} ({length})" for length, size in (below, above)]
    yield from prose(f"""
        **{found["before"]} fits pictures with padding**: in the way that gives LLaVA-1.5's pair ({way},
        {best["text_tokens"]} text tokens) it is {ours["visual_before"]} visual tokens, between those of {named[0]} and
        {named[1]}. Only a square has all {lengths[-1][0]}, newlines included, since padding is dropped;
        {found["visual"]} are its patches. Which pictures were counted is not known.""")
    yield from prose(f"""
        **{found["after"]} is left unexplained in that way**: our two stages count to
        {ours["two_stage_tflops"]:.3f}, off by {ours["two_stage_off_tflops"]:+.3f}; it would take
        {ours["visual_after"]} visual tokens in every layer, or {ours["two_stage_text_tokens"]} text tokens. With vision
        in, two stages are off by {spread(inside, "two_stage_off_tflops", "+.3f")}, and {found["after"]} is
        {spread(inside, "visual_after")} visual tokens in every layer, about the budget of {found["tokens"]} itself;
        with vision out it is {spread(outside, "visual_after")}. So the two models' pairs may have been counted
        differently, since with vision in no way gives LLaVA-1.5's to the last digit. Which stages, questions and
        pictures were counted is not known, and neither is this remainder.""")


def spread(ways: list[Data], name: str, form: str = "d") -> str:
    found = sorted(each[name] for each in ways)
    return f"{found[0]:{form}} to {found[-1]:{form}}"


def ridge(found: Data, gpu: Data, index: int) -> float:
    """Positions at which the decoder's products compute as long as they read, from what one budget counts to."""
    row = found["budgets"][index]
    reading = row["bytes"]["prefill"]["weights"] / gpu["bytes_per_s"]
    computing = row["flops"]["prefill"]["linear"] / gpu["flops_per_s"]
    early, late = row["prompt_tokens"], row["pruned_prompt_tokens"]
    layers = found["decoder_layers"]
    positions = early if late is None else (2 * early + (layers - 2) * late) / layers  # two layers see all
    return float(positions * reading / computing)


if __name__ == "__main__":
    main()
