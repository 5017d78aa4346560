"""prefill_latency.json as a page for people; prefill_latency.py writes both. All numbers come from the .json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markdown_parts import line, prose, table

Section = Mapping[str, Any]
GOAL = 0.9
"""Of the FLOP ratio."""
ADAPTIVE = "overlap with adaptive"


def page(data: Mapping[str, Section]) -> str:
    pages = {"language": language_page, "vision": vision_page, "tiny": tiny_page, "peers": peers_page}
    lines = [
        "# Prefill latency, measured against what it could be",
        "",
        "`make results RESULTS=prefill_latency` writes it; parts of `prefill_latency.py` run one by one (`--part`).",
    ]
    lines += prose(f"""ONNX Runtime on a CPU; nothing here has run on a GPU. All engines of a table take turns in one
        process, each round in another order, after warm-up; a speed-up is the median of the ratios of runs of the same
        round, with its bootstrapped 95% interval, against the unpruned engine. The FLOP limit is how many times fewer
        operations the pruned graph has, counted from the file; to be reached are {GOAL:.0%} of it, and "kept" and
        "missed" are computed from the numbers. docs/bench.md says more of the method.""")
    for name, write in pages.items():
        found = data.get(name)
        lines += ["", *([f"## {name}", "", "Not run yet."] if not found else write(found))]
    return "\n".join(lines) + "\n"


def language_page(section: Section) -> Iterator[str]:
    yield "## The decoder's prefill, by visual tokens kept"
    yield from prose("""On seeded-random weights it means nothing whether pruned and unpruned agree. What fewer
        tokens cost a trained model is in accuracy_by_tokens.md, and a trained tower's agreement is below.""")
    for found in section.values():
        layers = "all" if found["layers"] is None else f"the first {found['layers']}"
        yield from head(
            found,
            f"LLaVA-1.5-7B's geometry, {found['precision']}, seeded-random weights, {layers} of its decoder layers, "
            f"{found['text_tokens']} text tokens",
        )
        yield from table(
            "visual tokens", "prompt", "prefill, ms", "p90", "spread", "times faster", "95%", "FLOP limit", "of it",
            "verdict", "of roofline",
        )  # fmt: skip
        for name, subject in found["subjects"].items():
            yield line(
                *measured(name, subject, "prefill"), *faster(found, name, "prefill"), roofline(subject, "prefill")
            )
        yield from whole(found)


def whole(found: Section) -> Iterator[str]:
    """What the whole decoder would take, if time follows the operations."""
    factors = found["whole"]
    if factors is None:
        return
    seconds = {
        name: subject["batches"][0]["stages"]["prefill"]["median"] * factors[name] / 1e3
        for name, subject in found["subjects"].items()
    }
    told = ", ".join(f"{each:.1f} s with {name}" for name, each in seconds.items())
    most, least = min(factors.values()), max(factors.values())
    ratios = ", ".join(f"{seconds['all'] / seconds[name]:.2f} with {name}" for name in seconds if name != "all")
    yield from prose(f"""**Extrapolated, not measured:** all 32 layers have {most:.2f} to {least:.2f} times the
        operations of those that ran; at the same rate a prefill would take {told}, which is {ratios} times faster.""")


def vision_page(found: Section) -> Iterator[str]:
    yield "## The vision tower, by schedule"
    yield from head(
        found,
        f"CLIP-L/14-336, the whole tower of LLaVA-1.5-7B, float32, seeded-random weights, {found['tokens']} of 576 "
        "patches kept",
    )
    yield from schedule_rows(found)
    yield from prose("""Every pruned tower scores 22 layers, which the unpruned one does not. A steep schedule
        is fast for free, hence the overlap with what adaptive keeps, mean over drawn scenes that no schedule was chosen
        on. On random weights adaptive drops little before its last point, and what it keeps means nothing; a trained
        tower's is below.""")


def tiny_page(found: Section) -> Iterator[str]:
    yield "## A trained tower"
    yield from head(found, f"llava-tiny, whose weights are trained, float32, {found['tokens']} of 144 patches kept")
    yield from schedule_rows(found)
    yield from prose("""Its 12 layers are 128 wide: an op takes microseconds, of which what ONNX Runtime does around it
        is a part that pruning does not shrink, and the ops of scoring, which the unpruned tower has not, are a larger
        share of so narrow a layer. What the schedules are worth in right answers: schedules.md.""")
    yield from profile(found["profile"], ("vision",), most=16)


def schedule_rows(found: Section) -> Iterator[str]:
    yield from table(
        "schedule", "vision, ms", "p90", "spread", "times faster", "95%", "FLOP limit", "of it", "verdict", ADAPTIVE,
    )  # fmt: skip
    for name, subject in found["subjects"].items():
        cells = measured(name, subject, "vision")
        overlap = found["agreement"].get(name)
        told = "-" if overlap is None else f"{overlap['jaccard']:.3f} ({overlap['pictures']} pictures)"
        yield line(cells[0], *cells[2:], *faster(found, name, "vision"), told)
    yield from prose("Patches that leave each pruning point:")
    yield from table("schedule", "counts")
    for name, subject in found["subjects"].items():
        yield line(name, " ".join(map(str, subject["counts"])) or "nothing is dropped")


def peers_page(found: Section) -> Iterator[str]:
    yield "## Beside its peers"
    layers = "all" if found["layers"] is None else f"the first {found['layers']}"
    yield from head(found, f"{found['model']} ({found['note']}), {layers} of its decoder layers, float32")
    yield from ("", "![Stages of every subject, and speed-ups](prefill_latency.svg)")
    yield from prose("`flowcut bench ENGINE_DIR --baseline ENGINE_DIR --peers --profile`, medians in ms:")
    subjects = [found["pruned"], found["baseline"], *found["peers"]]
    runs = found["pruned"]["batches"][0]["stages"]["prefill"]["n"]
    yield from table("subject", "visual tokens", "vision", "prefill", "time to first token", "p90", "each token", "n")
    for subject in subjects:
        batch = subject["batches"][0]
        stages = batch["stages"]
        medians = (f"{stages[stage]['median']:.0f}" for stage in ("vision", "prefill", "total"))
        token, p90 = f"{stages['decode_per_token']['median']:.1f}", f"{stages['total']['p90']:.0f}"
        yield line(subject["title"], str(batch["visual_tokens"]), *medians, p90, token, str(runs))
    kept, first = found["agreement"]["kept"], found["agreement"]["baseline"]
    yield from prose(f"""Agreement, which means nothing on random weights: {kept["jaccard"]:.3f} of the patches that
        {kept["reference"]} keeps (Jaccard, {kept["pictures"]} pictures); first token as the baseline's:
        {first["same_first_token"]:.0%} of {first["prompts"]}.""")
    yield from prose("Times that the pruned engine is faster than each, in the same rounds, with 95% intervals:")
    yield from table("beside", "vision", "prefill", "time to first token", "each token")
    for each in found["comparisons"]:
        yield line(each["against"], *(interval(each["ratios"][stage]) for stage in RATED))
    eager = next(each for each in found["comparisons"] if each["against"] == "eager-static")["ratios"]["prefill"]
    verdict = "kept" if eager["ratio"] >= 1 else "**missed**"
    yield from prose(f"""ONNX Runtime's pruned prefill is to be no slower than eager PyTorch on the same shapes
        (`eager-static`): {eager["ratio"]:.2f} times as fast ({eager["low"]:.2f} to {eager["high"]:.2f}, n =
        {eager["n"]}), {verdict}.""")
    yield from profile(found["profile"])


RATED = ("vision", "prefill", "total", "decode_per_token")


def profile(found: Section, graphs: Sequence[str] = ("vision", "language"), most: int = 8) -> Iterator[str]:
    for graph in graphs:
        own, other = found["pruned"][graph], found["baseline"][graph]
        against = dict(other["ops"])
        yield from prose(f"""Kinds of nodes of `{graph}` by the time they take, ms a run, from runs of their own:
            {own["total_ms"]:.0f} of all nodes pruned, {other["total_ms"]:.0f} unpruned.""")
        yield from table("kind of node", "pruned", "unpruned", "ratio")
        for op, ms in own["ops"][:most]:
            theirs = against.get(op)
            ratio = "-" if theirs is None or not ms else f"{theirs / ms:.2f}"
            yield line(op, f"{ms:.1f}", "-" if theirs is None else f"{theirs:.1f}", ratio)


def head(found: Section, what: str) -> Iterator[str]:
    """What was measured, and where."""
    machine = found["machine"]
    versions, roof = machine["versions"], machine["roof"]
    named = ", ".join(f"{name} {versions[name]}" for name in ("python", "numpy", "onnxruntime", "torch"))
    yield from prose(f"""**{what}.** {machine["threads"]} thread{"s" * (machine["threads"] > 1)} on {machine["cores"]}
        cores, {machine["device"]}; others took {machine["other_work_cores"]:.2f} cores meanwhile; roof
        {roof["flops_per_s"] / 1e9:.0f} GFLOP/s and {roof["bytes_per_s"] / 1e9:.1f} GB/s; {named};
        {found["created"]}.""")
    if (peak := found.get("peak_memory_bytes")) is not None:
        whole = machine["memory_bytes"]
        yield from prose(f"""The process took {peak / 1e9:.1f} GB of the machine's {whole / 1e9:.1f}, mapped weights
            included.""")
    for warning in found["warnings"]:
        yield from prose(f"*{warning}*")


def measured(name: str, subject: Section, stage: str) -> tuple[str, ...]:
    batch = subject["batches"][0]
    one = batch["stages"][stage]
    spread = f"{one['spread']:.1%}"
    return name, str(batch["prompt_tokens"]), f"{one['median']:.1f}", f"{one['p90']:.1f}", spread


def faster(found: Section, name: str, stage: str) -> tuple[str, ...]:
    if name not in found["comparisons"]:
        return ("1", "", "1", "", "")
    ratio = found["comparisons"][name]["ratios"][stage]
    share = ratio["share_of_flop_ratio"]
    kept = "kept" if share >= GOAL and ratio["ratio"] > 1 else "**missed**"
    bounds = f"{ratio['low']:.2f} to {ratio['high']:.2f}"
    return f"{ratio['ratio']:.2f}", bounds, f"{ratio['flop_ratio']:.2f}", f"{share:.0%}", kept


def roofline(subject: Section, stage: str) -> str:
    return f"{subject['batches'][0]['roofline_share'][stage]:.0%}"


def interval(ratio: Section) -> str:
    return f"{ratio['ratio']:.2f} ({ratio['low']:.2f} to {ratio['high']:.2f})"
