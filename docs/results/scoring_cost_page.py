"""scoring_cost.json as a page for people; scoring_cost.py writes both. All numbers come from the .json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from markdown_parts import line, paragraph, table

Section = Mapping[str, Any]
BUILT, FUSED, ZEROED = "two launches", "fused into attention", "one launch and a zeroing"


def page(data: Mapping[str, Section]) -> str:
    parts = {"roofline": roofline_page, "agreement": agreement_page, "cpu": cpu_page}
    lines = ["# What scoring costs", "", "Written by `scoring_cost.py`, whose parts run one by one (`--part`)."]
    for name, write in parts.items():
        lines += ["", *(write(data[name]) if name in data else [f"## {name}", "", "Not run yet."])]
    return "\n".join(lines) + "\n"


def roofline_page(section: Section) -> Iterator[str]:
    low, high = section["launch_us"]
    yield "## On a GPU: predicted, nothing has run on one"
    yield from paragraph(f"""
        CLIP-L/14-336, {section["keys"]} tokens, fp16. `layer` is the least time of an encoder layer: its products
        at the peak rate, or reading its weights if that takes longer. Low: everything from L2, {low} us a launch.
        High: everything from device memory, {high} us a launch. That range of launch costs is an assumption;
        engines/roofline.py names the source of every figure. Where no measurement of L2's bandwidth is known to us,
        low is the launches alone. Latency within a kernel is not counted, and neither are the layer's own launches,
        of which there are at least seven: where launches are most of the cost, the true share of a true layer is
        smaller than this.""")
    for batch in section["batches"]:
        yield from batch_table(batch)
    yield from findings(section)
    yield from design_table(section)


def batch_table(batch: Section) -> Iterator[str]:
    moved, layer = batch["traffic"], batch["layer"]
    yield from paragraph(f"""
        **{batch["images"]} image{"s" * (batch["images"] > 1)}.** A layer: {layer["flops"] / 1e9:.1f} GFLOP,
        {layer["weight_bytes"] / 1e6:.1f} MB of weights. Scoring: {moved["kv_bytes"] / 1e6:.2f} MB of K and V once,
        {moved["logits_written"] / 1e3:.0f} kB of logits written and {moved["logits_read"] / 1e3:.0f} kB read,
        mostly from L2. Q, K, V and attention's output together: {batch["neighbour_bytes"] / 1e6:.1f} MB.""")
    yield from table(
        *("GPU", "layer, us", "K and V from device, us", "share of layer", "from L2, us", "share", "logits by L2, us"),
        *("two launches, us", "share", "low to high", "L2 holds Q, K, V and output"),
    )
    for name, t in batch["gpus"].items():
        whole = t["layer_us"]
        limit = "arithmetic" if t["arithmetic_us"] >= t["weights_us"] else "weights"
        yield line(
            *(name, f"{whole:.1f} ({limit})", f"{t['kv_device_us']:.2f}", f"{t['kv_device_us'] / whole:.1%}"),
            *(number(t["kv_l2_us"]), share(t["kv_l2_us"], whole), number(t["logits_l2_us"])),
            *(span(t["launches_us"], 1.0, ".1f"), span(t["launches_us"], whole), span(t["designs"][BUILT], whole)),
            "yes" if t["l2_holds_neighbours"] else "no",
        )


def findings(section: Section) -> Iterator[str]:
    one = section["batches"][0]["gpus"]
    shares = {name: t["kv_device_us"] / t["layer_us"] for name, t in one.items()}
    least, most = min(shares, key=shares.__getitem__), max(shares, key=shares.__getitem__)
    launches = {name: t["launches_us"][1] / t["layer_us"] for name, t in one.items()}
    dear = max(launches, key=launches.__getitem__)
    yield from paragraph(f"""
        K and V from device memory cost {shares[least]:.1%} ({least}) to {shares[most]:.1%} ({most}) of a layer, at
        any batch: what matters is how many FLOP a GPU does per byte it can read, and GeForce does half as many
        where sums are float32. A batch shares the launches.""")
    yield from paragraph(f"""
        At one image it is the launches that are dear, not the bytes: up to {launches[dear]:.0%} of a layer on
        {dear}. Scoring needs q, k and v alone, and its result is wanted at the next pruning point, so a second
        stream could hide it. Whether TensorRT uses one is for a GPU to tell.""")


def design_table(section: Section) -> Iterator[str]:
    one, many = section["batches"][0], section["batches"][-1]
    scored = section["scored_layers"]
    yield from paragraph(
        "**What would change.** Low to high, as a share of a layer, one image unless it says otherwise:"
    )
    yield from table(
        *("GPU", "as built", FUSED, f"{many['images']} images at once"),
        *(f"{scored[1]} layers scored instead of {scored[0]}, mean", ZEROED),
    )
    for name, t in one["gpus"].items():
        whole, designs, batch = t["layer_us"], t["designs"], many["gpus"][name]
        fewer = [us * scored[1] / scored[0] for us in designs[BUILT]]
        yield line(
            *(name, span(designs[BUILT], whole), span(designs[FUSED], whole)),
            *(span(batch["designs"][BUILT], batch["layer_us"]), span(fewer, whole), span(designs[ZEROED], whole)),
        )
    moved = one["traffic"]
    saved = moved["logits_written"] + moved["logits_read"]
    yield from paragraph(f"""
        Fused: attention has K and V on chip; it would write the logits of CLS's row, and one small launch remains.
        It takes an attention kernel of our own in place of TensorRT's. Fewer layers scored: other patches are kept,
        see below. One launch: blocks that wait for each other keep their logits in registers, which saves
        {saved / 1e3:.0f} kB of traffic an image, nearly all of it within L2. But the counter they wait on has to be
        zeroed by another launch, and all of them must be on the GPU at once, which a kernel embedded in an engine
        cannot ask for. A last block that combines alone needs the zeroing as well, saves no logits and leaves the
        rest of the GPU idle meanwhile. It is two launches either way, and the simple two were built.""")


def agreement_page(section: Section) -> Iterator[str]:
    yield "## Scoring only at pruning points: measured"
    yield from paragraph(f"""
        {section["model"]} (weights {section["sha256"][:12]}), the first {section["scenes"]} scenes of the
        {section["split"]} split, eager PyTorch, fp32: {section["points"]} layers scored instead of
        {section["scored"]}, each score averaged with the running one as before. Against scoring every layer:
        Jaccard of the patches kept in the end and at each pruning point, how often the count kept at a point is
        equal, and its mean difference in patches. Then right answers, with 95% intervals over scenes, and the share
        of answers that differ.""")
    yield from table(
        *("schedule", "tokens", "Jaccard", "at each point", "counts equal", "differ by"),
        *("right, every layer", "right, points only", "answers that differ"),
    )
    for found in section["rows"]:
        yield line(
            *(found["schedule"], str(found["tokens"]), f"{found['jaccard']:.3f}"),
            " ".join(f"{value:.2f}" for value in found["jaccard_at_points"]),
            *(f"{found['equal_counts']:.1%}", f"{found['count_difference']:.2f}"),
            *(accuracy(found["every_layer"]), accuracy(found["at_points"]), f"{found['answers_that_differ']:.1%}"),
        )
    shared = [found["jaccard"] for found in section["rows"]]
    least, most = min(shared), max(shared)
    gains = sorted(f["at_points"]["accuracy"] - f["every_layer"]["accuracy"] for f in section["rows"])
    yield from paragraph(f"""
        It is another pruner: {1 - most:.0%} to {1 - least:.0%} of the patches that either keeps, the other does
        not. Right answers on this model change by {gains[0] * 100:+.1f} to {gains[-1] * 100:+.1f} points. Each
        score counts half of what is known so far, so scoring fewer layers gives early ones more weight; whether
        that is the reason is a guess, and llava-tiny's scores are not CLIP's (score_parts.md). Every layer is
        scored because FlowCut does it, and its reference outputs need it.""")


def cpu_page(section: Section) -> Iterator[str]:
    yield "## On a CPU: measured"
    yield from paragraph(f"""
        Pruned vision graph of CLIP-L/14-336, {section["keys"]} tokens at first, {section["tokens"]} patches kept,
        schedule {section["schedule"]}, seeded-random weights. ONNX Runtime {section["onnxruntime"]},
        {section["threads"]} threads, {section["processor"]}. With scoring against the same graph whose FlowScore
        returns constants, run by turns in one process; the overhead is the median of the pairs' ratios, less 1,
        with its bootstrapped 95% interval. The profile is of
        {next(iter(section["precisions"].values()))["profile"]["runs"]} other runs: scoring's nodes, of all nodes'
        time.""")
    yield from table(
        *("precision", "pairs", "with scoring, ms", "with constants, ms", "overhead", "95%", "quartiles of the pairs"),
        "share in the profile",
    )
    for name, found in section["precisions"].items():
        yield line(
            *(name, str(found["n"]), f"{found['scored_ms']:.0f}", f"{found['constant_ms']:.0f}"),
            *(f"{found['overhead']:.1%}", span(found["interval"], 1.0), span(found["quartiles"], 1.0)),
            f"{found['profile']['share']:.1%}",
        )
    for name, found in section["precisions"].items():
        ops = ", ".join(
            f"{op} {ms:.1f}" for op, ms in sorted(found["profile"]["ops_ms"].items(), key=lambda x: -x[1])[:6]
        )
        yield from paragraph(f"Scoring's dearest ops in {name}, ms of {found['profile']['total_ms']:.0f} a run: {ops}.")


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def share(value: float | None, whole: float) -> str:
    return "-" if value is None else f"{value / whole:.1%}"


def span(bounds: Iterable[float], whole: float, form: str = ".1%") -> str:
    low, high = (format(value / whole, form) for value in bounds)
    return f"{low} to {high}"


def accuracy(score: Mapping[str, Any]) -> str:
    low, high = score["interval"]
    return f"{score['accuracy']:.1%} ({low:.1%} to {high:.1%})"
