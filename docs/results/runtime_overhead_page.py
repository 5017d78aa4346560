"""runtime_overhead.json as a page for people; runtime_overhead.py writes both. All numbers come from the .json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markdown_parts import line, prose, table

Section = Mapping[str, Any]
LARGE = """Of a picture as large as a telephone's, decoding the file and making it small takes longer than all else."""
SHARE, STEP_MS, FLAT, HELP_S, LOAD_S = 0.02, 1.0, 0.10, 0.3, 1.5
"""What is to be kept below: of a prefill, of a decode step, between positions, and seconds of starting."""
PARTS = {
    "open": "open and decode the picture",
    "hash": "hash its pixels",
    "tokenize": "tokenize the prompt",
    "resize": "resize and normalize",
    "bind": "check and bind tensors",
    "rest": "all else",
}


def page(data: Mapping[str, Sequence[Section]]) -> str:
    pages = {"overhead": overhead_page, "positions": positions_page, "memory": memory_page, "start": start_page}
    lines = [
        "# What the Python runtime costs",
        "",
        "Written by `runtime_overhead.py`, whose parts run one by one (`--part`).",
    ]
    lines += prose("""ONNX Runtime on a CPU, float32, seeded-random weights. Times are medians and 90th percentiles.
        What they are to stay below is stated with each; "kept" and "missed" are computed from the numbers.""")
    for name, write in pages.items():
        found = data.get(name)
        lines += ["", *([f"## {name}", "", "Not run yet."] if not found else write(found))]
    return "\n".join(lines) + "\n"


def overhead_page(sections: Sequence[Section]) -> Iterator[str]:
    yield "## Outside ONNX Runtime's own run"
    for section in sections:
        yield from head(section)
        yield from prose(f"""`LlavaEngine.prefill` of one picture and one question, the whole call, and how much of it
            passes outside session.run; to be below {SHARE:.0%}. {LARGE}""")
        yield from table(
            "picture", "n", "prefill, ms", "p90", "inside, ms", "outside, ms", "p90", "share", "p90", "verdict"
        )
        for row in section["prefill"]:
            ms, share = row["ms"], row["share"]
            yield line(
                *(picture(row), str(share["n"]), *pair(ms["total"]), f"{ms['inside']['median']:.2f}"),
                *(
                    *pair(ms["outside"]),
                    f"{share['median']:.2%}",
                    f"{share['p90']:.2%}",
                    verdict(share["median"] < SHARE),
                ),
            )
        yield from prose("Of the outside, medians of each part in ms:")
        yield from table("picture", *PARTS.values())
        for row in section["prefill"]:
            yield line(picture(row), *(f"{row['ms'][part]['median']:.3f}" for part in PARTS))
        yield from decode_part(section["decode"])
        yield from second_part(section["second_question"])


def decode_part(found: Section) -> Iterator[str]:
    ms = found["ms"]
    yield from prose(f"""A decode step, the mean over an answer's {found["steps"]} steps, of which this is the median
        over {found["answers"]} answers; outside session.run it is to be below {STEP_MS:.0f} ms.""")
    yield from table(
        "step, ms", "p90", "inside, ms", "outside, ms", "p90", "of it binding", "of it all else", "verdict"
    )
    yield line(
        *(*pair(ms["total"]), f"{ms['inside']['median']:.2f}", *pair(ms["outside"], 3)),
        *(f"{ms['bind']['median']:.3f}", f"{ms['rest']['median']:.3f}", verdict(ms["outside"]["median"] < STEP_MS)),
    )


def second_part(found: Section) -> Iterator[str]:
    first, second = found["with_vision"], found["without_vision"]
    yield from prose(f"""A second question about the same picture finds its visual tokens, so that vision does not run:
        prefill takes {second["median"]:.1f} ms (p90 {second["p90"]:.1f}, n = {second["n"]}) instead of
        {first["median"]:.1f} (p90 {first["p90"]:.1f}), {1 - second["median"] / first["median"]:.0%} less.""")


def positions_page(sections: Sequence[Section]) -> Iterator[str]:
    yield "## A decode step by its place in the cache"
    for section in sections:
        rows = section["rows"]
        yield from head(section)
        yield from prose(f"""Medians of {section["rounds"]} steps at each position, in turns, so that what slows the
            machine for a while slows all positions. The last two columns are from ONNX Runtime's profile of as many
            others, whose nodes are timed one by one: `Attention`, and all others, among them TensorScatter, which
            writes the cache.""")
        yield from table("position", "step, ms", "attention, ms", "its share of nodes", "all other nodes, ms")
        for row in rows:
            attention, others = row["attention_ms"], row["others_ms"]
            yield line(
                *(f"{row['position']:,}", f"{row['step_ms']:.2f}", f"{attention:.3f}"),
                *(f"{attention / (attention + others):.1%}", f"{others:.2f}"),
            )
        yield from flatness(rows)


def flatness(rows: Sequence[Section]) -> Iterator[str]:
    steps, rest = [row["step_ms"] for row in rows], [row["others_ms"] for row in rows]
    yield from prose(f"""From the first position to the last, a step takes {change(steps)}, attention
        {change([row["attention_ms"] for row in rows])}, and all other nodes {change(rest)}. Apart from attention the
        largest of them is {spread(rest):.1%} above the smallest; to be within {FLAT:.0%}:
        {verdict(spread(rest) <= FLAT)}.""")


def memory_page(sections: Sequence[Section]) -> Iterator[str]:
    yield "## Memory over many steps"
    for section in sections:
        yield from head(section)
        seen, report = section["resident"], section["report"]
        low, high = min(count for _, count in seen[1:]), max(count for _, count in seen[1:])
        cache_mb = section["cache_bytes"] / 1e6
        yield from prose(f"""One answer of {section["steps"]:,} steps, after another that does not count; its cache,
            {cache_mb:.1f} MB, is touched before it begins, so that rows that come into use are no growth. In memory:
            after step {seen[1][0]}: {seen[1][1] / 1e6:.2f} MB; after step {seen[-1][0]:,}: {seen[-1][1] / 1e6:.2f} MB,
            {section["growth_bytes"] / 1e3:+.0f} kB or {section["bytes_per_step"]:+.1f} bytes a step. In between, looked
            at {len(seen)} times, {low / 1e6:.2f} to {high / 1e6:.2f} MB. A step that kept its logits would add
            kilobytes, one that copied the cache and kept it {cache_mb:.1f} MB.""")
        yield from prose(f"""The process at its peak: {report["peak"] / 1e6:.0f} MB, of which Python, numpy and ONNX
            Runtime are the most; weights on the disk: {sum(report["files"].values()) / 1e6:.1f} MB.""")


def start_page(sections: Sequence[Section]) -> Iterator[str]:
    yield "## Starting"
    for section in sections:
        yield from head(section)
        yield from prose("Each in processes of their own, after one that does not count. Seconds:")
        yield from table("what", "n", "median", "p90", "to be below", "verdict")
        for name, what, bound in (
            ("help", "`flowcut --help`, the whole process", HELP_S),
            ("process", "a process that loads llava-tiny and ends", None),
            ("import", "in it, `import engines.runtime.engine`", None),
            ("load", "in it, `load_engine`", LOAD_S),
        ):
            found = section[name]
            kept = "" if bound is None else verdict(found["median"] < bound)
            cells = (str(found["n"]), f"{found['median']:.3f}", f"{found['p90']:.3f}")
            yield line(what, *cells, "" if bound is None else f"{bound:.1f}", kept)


def head(section: Section) -> Iterator[str]:
    """What was measured, and where."""
    here = section["machine"]
    versions = here["versions"]
    installed = ", ".join(f"{name} {versions[name]}" for name in ("python", "numpy", "onnxruntime") if name in versions)
    threads = f"{section['threads']} thread{'s' * (section['threads'] > 1)}"
    yield from prose(f"""**{section["title"]}.** {threads} on {here["cores"]} cores,
        {here["processor"]}; load {here["load"]:.2f} before; {installed}; {here["created"]}.""")


def picture(row: Section) -> str:
    width, height = row["size"]
    return f"{row['picture']}, {width} x {height}"


def pair(found: Section, digits: int = 2) -> tuple[str, str]:
    """Median and 90th percentile."""
    return f"{found['median']:.{digits}f}", f"{found['p90']:.{digits}f}"


def change(values: Sequence[float]) -> str:
    return f"{values[0]:.2f} and {values[-1]:.2f} ms ({values[-1] / values[0] - 1:+.0%})"


def spread(values: Sequence[float]) -> float:
    """How far the largest is above the smallest."""
    return max(values) / min(values) - 1


def verdict(kept: bool) -> str:
    return "kept" if kept else "**missed**"
