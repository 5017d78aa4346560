"""Operations of LLaVA-NeXT-7B's prefill, pruned and not, counted from the exported graphs: writes .json and .md.

python docs/results/llava_next_flops.py      # needs .[export]; seconds, no weights, no GPU
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from markdown_parts import header, line, prose

from engines.flops import Flops, count_model
from export.language import language_model
from export.vision import vision_model
from flowcut.aliases import Model, resolve
from flowcut.anyres import choose_tiling, vision_feeds
from flowcut.atomic import write_file
from flowcut.budget import make_budget
from flowcut.contract import Limits, language_contract, vision_contract
from flowcut.schedule import make_schedule

HERE = Path(__file__)
MODEL, PICTURE, TEXT_TOKENS, PRECISION = "llava-v1.6-vicuna-7b", 672, 80, "fp16"
BUDGETS: tuple[int | str, ...] = ("all", 640, 320, 160)
PUBLISHED = {"tokens": 160, "before_tflops": 31.03, "after_tflops": 4.29}
"""Of 2880 visual tokens: FlowCut, arXiv 2505.19536."""
Data = Mapping[str, Any]


def main() -> None:
    model = resolve(MODEL, random=True)
    data = {
        "model": MODEL,
        "picture": [PICTURE, PICTURE],
        "text_tokens": TEXT_TOKENS,
        "precision": PRECISION,
        "published": PUBLISHED,
        "rows": {str(budget): measured(model, budget) for budget in BUDGETS},
    }
    write_file(HERE.with_suffix(".json"), (json.dumps(data, indent=1) + "\n").encode())
    write_file(HERE.with_suffix(".md"), page(data).encode())


def measured(model: Model, tokens: int | str) -> dict[str, Any]:
    """One budget: lengths, and operations of both graphs for one picture and one prompt."""
    config, budget = model.config, make_budget(model.config, tokens)
    schedule = make_schedule("static", config.vision, budget.tokens)
    cut = choose_tiling(config, PICTURE, PICTURE)
    (visual,) = vision_feeds(config, budget.tokens, [cut]).rows
    sequence = TEXT_TOKENS + visual
    limits = Limits(max_batch=1, max_images=1, max_prompt=sequence, max_new_tokens=1)
    contract = vision_contract(config, budget.tokens, PRECISION, limits)
    vision = vision_model(model.weights, contract, schedule, PRECISION, {})
    language = language_contract(config, budget.tokens, PRECISION, limits, budget.llm_tokens)
    sizes = {"batch": 1, "images": 1, "sequence": sequence}
    if budget.llm_tokens is not None:
        sizes["pruned_sequence"] = sequence - max(0, visual - budget.llm_tokens)
    decoder = language_model(model.weights, language, PRECISION, {})
    return {
        "tiles": cut.tiles,
        "per_tile": budget.tokens,
        "visual": visual,
        "sequence": sequence,
        "pruned_sequence": sizes.get("pruned_sequence"),
        "counts": list(schedule.counts),
        "vision": groups(count_model(vision, {"images": 1, "tiles": cut.tiles})),
        "language": groups(count_model(decoder, sizes)),
        "language_causal": groups(count_model(decoder, sizes, causal=True)),
    }


def groups(flops: Flops) -> dict[str, int]:
    return {**flops.by_group, "total": flops.total}


# --- the page ---


def total(row: Data) -> int:
    return int(row["vision"]["total"] + row["language"]["total"])


def ratios(data: Data, tokens: int | str) -> dict[str, float]:
    """How many times fewer operations than with all tokens."""
    whole, row = data["rows"]["all"], data["rows"][str(tokens)]
    parts = ("vision", "language", "language_causal")
    return {**{part: whole[part]["total"] / row[part]["total"] for part in parts}, "total": total(whole) / total(row)}


def page(data: Data) -> str:
    lines = ["# FLOPs of LLaVA-NeXT-7B's prefill", *introduction(data), *table(data), *findings(data)]
    return "\n".join(lines) + "\n"


def introduction(data: Data) -> Iterator[str]:
    whole, (width, height) = data["rows"]["all"], data["picture"]
    patches = whole["tiles"] * whole["per_tile"]
    yield from prose(f"""
        Written by `llava_next_flops.py`: {data["model"]}, one picture of {width} x {height} pixels, which is
        {whole["tiles"]} tiles of {whole["per_tile"]} patches, and {data["text_tokens"]} text tokens, room for the
        template and a question. With all tokens the picture is {whole["visual"]} visual tokens: {patches} patches and
        {whole["visual"] - patches} newlines. Pruned to T, the encoder leaves T/2 of every tile, without newlines, the
        language model T of them after its second layer.""")
    yield from prose(f"""
        Counted from the nodes of the exported {data["precision"]} graphs (engines/flops.py), the very ones that an
        engine is built from, with caches of one row beyond the prompt; weights take no part. A multiplication and an
        addition are two operations. Attention counts all pairs of query and key, as masked attention computes them; a
        causal kernel skips half, see below. Scoring is in; sorting is in
        as one operation per score and gathering, which computes nothing, as none. The tower's schedule is static with
        the closed form's counts, as `make engine` takes it without calibration.""")


def table(data: Data) -> Iterator[str]:
    yield ""
    yield from header("T", "visual tokens, layers 0 and 1", "layers 2 to 31", "vision, TFLOP", "language", "together")
    for tokens, row in data["rows"].items():
        left = row["visual"] if row["pruned_sequence"] is None else row["pruned_sequence"] - data["text_tokens"]
        figures = (row["vision"]["total"], row["language"]["total"], total(row))
        yield line(tokens, str(row["visual"]), str(left), *(f"{n / 1e12:.3f}" for n in figures))
    yield ""
    yield from header("T", "vision, times fewer", "language", "together", "language, causal kernel")
    for tokens in data["rows"]:
        times = ratios(data, tokens)
        names = ("vision", "language", "total", "language_causal")
        yield line(tokens, *(f"{times[name]:.2f}" for name in names))


def findings(data: Data) -> Iterator[str]:
    published, whole = data["published"], data["rows"]["all"]
    row, times = data["rows"][str(published["tokens"])], ratios(data, published["tokens"])
    before, after = published["before_tflops"], published["after_tflops"]
    patches = whole["tiles"] * whole["per_tile"]
    linear = whole["language"]["linear"] / whole["sequence"] / 2
    yield from prose(f"""
        **At {published["tokens"]} tokens the prefill takes {times["total"]:.1f} times fewer operations, vision
        included, and {times["language"]:.1f} times fewer without it**; the published ratio is
        {before} / {after} = {before / after:.1f}. No picture has more visual tokens than such a
        square one, whose tiles have no padding: others gain less.""")
    yield from prose(f"""
        The published {before} TFLOP cannot be every multiply-add of {patches} tokens counted as two: the decoder's
        linear layers alone, {linear / 1e9:.2f} x 10^9 weights, take
        {2 * linear * patches / 1e12:.1f} TFLOP for them. How it was counted is not said where we could see it, so
        the two ratios may be compared, the two sums may not.""")
    yield from prose(f"""
        What is left at {published["tokens"]}: vision {row["vision"]["total"] / total(row):.0%}, as the tower sees all
        {whole["per_tile"]} patches of every tile until its first pruning point; the decoder's first two layers see
        {row["sequence"]} rows, the others {row["pruned_sequence"]}. FlowScore is
        {(row["vision"]["scoring"] + row["language"]["scoring"]) / total(row):.3%} of it. These are operations, not
        milliseconds: latency has not yet been run on a GPU.""")


if __name__ == "__main__":
    main()
