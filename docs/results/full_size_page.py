"""full_size.json as a page for people; full_size.py writes both. All numbers come from the .json."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from markdown_parts import line, paragraph, table

Row = Mapping[str, Any]
Data = Mapping[str, Row]
CHECKPOINT = "int4-checkpoint"
# What, key of the row or of its peaks, limit in seconds or bytes.
INT4_LIMITS = (
    ("wall time", "wall_s", 12 * 60.0),
    ("peak anonymous memory", "anonymous_bytes", 12e9),
    ("new disk, the directory", "directory_bytes", 9e9),
    ("new disk, most at any time", "disk_bytes", 9e9),
)
LIMITS = (
    *(("int4", *limit) for limit in INT4_LIMITS),
    *((CHECKPOINT, *limit) for limit in INT4_LIMITS),
    ("fp16", "peak anonymous memory", "anonymous_bytes", 20e9),
    ("fp16-2-stages", "peak anonymous memory", "anonymous_bytes", 20e9),
)
GROWTH = (("int4-4-layers", "int4-8-layers"), ("int4-8-layers", "int4"))
LAYER_BYTES = 0.3e9
ENGINE_FACTOR, CODE_BYTES = 1.05, 60e6
RUN = "int4-run"
STAGES = {"vision": "vision, ms", "prefill": "prefill, ms", "decode_per_token": "decode per token, ms"}
NOT_YET = "not yet run"


class Check(NamedTuple):
    """A line of the table of limits; `ok` is None where nothing was measured."""

    setting: str
    what: str
    limit: str
    measured: str = NOT_YET
    ok: bool | None = None


def page(data: Data) -> str:
    models = ", ".join(sorted({row["model"] for row in data.values()})) or NOT_YET
    lines = [f"# Full size on an ordinary machine: {models}"]
    for part in (introduction, limits_part, builds_part, graphs_part, run_part, machines_part, commands_part):
        lines += part(data)
    return "\n".join(lines) + "\n"


def introduction(data: Data) -> Iterator[str]:
    yield from paragraph("""
        Written by `full_size.py`. **The weights are seeded-random**: sizes, memory and times do not depend on their
        values; quality does, and nothing here tells of it. No GPU takes part.""")
    yield from checkpoint_words(data.get(CHECKPOINT))
    longest = max((row["peaks"]["longest_gap_s"] for row in data.values()), default=0.0)
    yield from paragraph(f"""
        Memory is what no file backs, RssAnon + VmSwap, of a process and all its descendants together, sampled ten
        times a second (longest time between two samples: {longest:.2f} s). Pages of mapped files are not in it; pages
        shared after a fork count twice. Disk is blocks of files, half-written and temporary ones included. GB are
        10^9 bytes, GiB 2^30; limits are in GB.""")


def checkpoint_words(row: Row | None) -> list[str]:
    facts = row and row["checkpoint"]
    what = facts and f" ({facts['shards']} safetensors shards of {facts['dtype']}, {size(facts['tensor_bytes'])})"
    return paragraph(f"""
        `{CHECKPOINT}` is `int4` from a checkpoint on the disk in the Hugging Face format{what or ""}, memory-mapped and
        not in the page cache at the start, in place of tensors that are drawn when asked for. Its values are
        seeded-random too. It is written before the command is measured, and is no part of new disk.""")


# --- limits ---


def limits_part(data: Data) -> Iterator[str]:
    yield from ["", "## Limits", *table("setting", "what", "limit", "measured", "ok")]
    for check in checks(data):
        yield line(*check[:4], {None: "-", True: "yes", False: "**no**"}[check.ok])
    yield from paragraph("In fp16 one of the two has to hold: the decoder as one engine, or as two.")


def checks(data: Data) -> Iterator[Check]:
    for setting, what, key, limit in LIMITS:
        yield below(setting, what, key, limit, data.get(setting))
    for shorter, longer in GROWTH:
        yield growth(shorter, longer, data)
    yield engine_sizes(data)
    yield answers(data.get(RUN))


def below(setting: str, what: str, key: str, limit: float, row: Row | None) -> Check:
    write = duration if key == "wall_s" else size
    check = Check(setting, what, f"< {write(limit)}")
    if row is None or row["error"]:
        return failed(check, row)
    value = {**row["peaks"], **row}[key]
    return check._replace(measured=write(value), ok=value < limit)


def failed(check: Check, row: Row | None) -> Check:
    """What an absent or failed row makes of a check."""
    return check if row is None else check._replace(measured=f"failed: {row['error']}", ok=False)


def growth(shorter: str, longer: str, data: Data) -> Check:
    """Peak memory per added decoder layer, between two settings."""
    check = Check(f"{shorter} to {longer}", "peak anonymous memory per added layer", f"< {size(LAYER_BYTES)}")
    rows = [data.get(name) for name in (shorter, longer)]
    for row in rows:
        if row is None or row["error"]:
            return failed(check, row)
    few, many = (row for row in rows if row is not None)
    added = many["decoder_layers"] - few["decoder_layers"]
    value = (many["peaks"]["anonymous_bytes"] - few["peaks"]["anonymous_bytes"]) / added
    return check._replace(measured=f"{size(value)} ({added} layers)", ok=value < LAYER_BYTES)


def engine_sizes(data: Data) -> Check:
    """Of all engines the one that uses most of what it may."""
    check = Check("all", "engine, of 1.05 x its graph's weights + 60 MB", "<= 100%")
    shares = {
        f"{name}, {graph}": sizes["engine_bytes"] / allowed(sizes["weight_bytes"])
        for name, row in data.items()
        for graph, sizes in row.get("graphs", {}).items()
    }
    if not shares:
        return check
    worst = max(shares, key=shares.__getitem__)
    return check._replace(measured=f"at most {shares[worst]:.1%} ({worst})", ok=shares[worst] <= 1)


def allowed(weight_bytes: float) -> float:
    return ENGINE_FACTOR * weight_bytes + CODE_BYTES


def answers(row: Row | None) -> Check:
    check = Check(RUN, "ONNX Runtime answers a question", ">= 1 token")
    if row is None or row["error"]:
        return failed(check, row)
    tokens = len(row["result"]["token_ids"])
    return check._replace(measured=f"{tokens} tokens", ok=tokens >= 1)


# --- what was measured ---


def builds_part(data: Data) -> Iterator[str]:
    yield from ["", "## Builds"]
    columns = ("wall, s", "seconds of each stage", "peak anonymous", "at, s", "largest process", "with shared memory")
    yield from table("setting", "decoder layers", *columns, "with mapped files", "directory", "disk at most")
    for name, row in data.items():
        if "decoder_layers" in row:
            stages = ", ".join(f"{stage} {s:.0f}" for stage, s in row["result"].get("build_seconds", {}).items())
            peaks = row["peaks"]
            yield line(
                *(name, str(row["decoder_layers"]), f"{row['wall_s']:.0f}", row["error"] or stages),
                *(size(peaks["anonymous_bytes"]), f"{peaks['anonymous_at_s']:.0f}"),
                *(size(peaks["largest_process_bytes"]), size(peaks["with_shared_memory_bytes"])),
                *(size(peaks["resident_bytes"]), size(row["directory_bytes"]), size(peaks["disk_bytes"])),
            )


def graphs_part(data: Data) -> Iterator[str]:
    yield from ["", "## Engines and their weights"]
    yield from table("setting", "graph", "weights", "ONNX files", "engine", "engine / weights", "allowed", "ok")
    for name, row in data.items():
        for graph, sizes in row.get("graphs", {}).items():
            weights, engine = sizes["weight_bytes"], sizes["engine_bytes"]
            ratio, most = f"{engine / weights:.3f}", allowed(weights)
            cells = (megabytes(weights), megabytes(sizes["onnx_bytes"]), megabytes(engine), ratio, megabytes(most))
            yield line(name, graph, *cells, "yes" if engine <= most else "**no**")
    yield from paragraph("Weights are all initializers of a graph, as the compiler is given them.")


def run_part(data: Data) -> Iterator[str]:
    yield from ["", "## One question to the int4 directory, on ONNX Runtime's CPU kernels"]
    row = data.get(RUN)
    if row is None or row["error"]:
        yield from paragraph(f"{RUN}: {NOT_YET if row is None else row['error']}.")
        return
    latency, peaks = row["result"]["latency_ms"], row["peaks"]
    yield from table("wall, s", "runs", "prompt tokens", "answer tokens", *STAGES.values(), "anonymous", "with files")
    yield line(
        *(f"{row['wall_s']:.0f}", str(latency["prefill"]["n"])),
        *(str(row["result"]["prompt_tokens"]), str(len(row["result"]["token_ids"]))),
        *(milliseconds(latency[stage]["median"]) for stage in STAGES),
        *(size(peaks["anonymous_bytes"]), size(peaks["resident_bytes"])),
    )
    yield from paragraph("Medians over the runs after a warm-up. The weights are random, so the answer means nothing.")


def machines_part(data: Data) -> Iterator[str]:
    yield from ["", "## Where and when"]
    yield from table("setting", "begun (UTC)", "processor", "cores", "memory", "load before", "OMP_NUM_THREADS")
    for name, row in data.items():
        here = row["machine"]
        cells = (str(here["cores"]), size(here["memory_bytes"]), f"{here['load']:.2f}", here["omp_num_threads"] or "-")
        yield line(name, here["created"], here["processor"], *cells)
    yield from paragraph("""
        Load is the average of the minute before the command. Other work on the machine makes the seconds longer, so
        those of two settings differ by it as well.""")
    found = sorted({", ".join(f"{k} {v}" for k, v in row["machine"]["versions"].items()) for row in data.values()})
    yield from paragraph("; or ".join(found) and f"Versions: {'; or '.join(found)}.")


def commands_part(data: Data) -> Iterator[str]:
    yield from ["", "## Commands", ""]
    yield "    # TMPDIR is a folder beside the directory, so that temporary files are seen"
    yield f"    # {CHECKPOINT}'s model is a directory that full_size.py writes before and removes after the command"
    yield from (f"    {row['command']}" for row in data.values())


# --- words ---


def size(count: float) -> str:
    return f"{count / 1e9:.2f} GB ({count / 2**30:.2f} GiB)"


def megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} min"


def milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}"
