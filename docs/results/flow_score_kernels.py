"""FlowScore's kernels compiled for every target: writes flow_score_kernels.json and .md, and the PTX that is shipped.

Run it again whenever engines/flow_score/kernel.py or launch.py changed; a test compiles all and compares.
    python docs/results/flow_score_kernels.py     # needs .[kernels]; a minute on two cores, no GPU
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.flow_score.cache import ARCHIVE, SHIPPED, archive
from engines.flow_score.compile import OPTIONS, TARGETS, CompiledKernel, compile_kernels
from engines.progress import terminal_progress

JSON = Path(__file__).with_suffix(".json")
HEADER = """# FlowScore's kernels: registers, shared memory, spills

Written by `flow_score_kernels.py`, which compiles every kernel for every target; a test does so again and compares.
Registers per thread and dynamic shared memory per block, in bytes, are those of Triton {triton} and the `ptxas` that
comes with it; no GPU is needed. The PTX is version {ptx}: it loads with drivers R570 and later, on the target and
on later GPUs. What is for sm_100 Triton compiled as for sm_120, since as for sm_100 it runs on no later GPU; ptxas
assembled it for sm_100. Two of the three kernels read the logits that the first leaves, in float32 always.

| kernel | type | head size | threads | {targets} | spills |
|---|---|---:|---:|{columns}|---:|
"""
FOOTER = """
Cells: registers / bytes of shared memory. Spills: bytes per thread, the most of all targets. Compiling all {count} took
{total:.0f} s of one processor, {slowest:.1f} s the slowest. The archive that the package ships holds all of them in
{size:.0f} kB ({plain:.0f} kB of PTX).
"""


def row(kernel: CompiledKernel) -> dict[str, Any]:
    """What the test compares."""
    variant = kernel.variant
    return {
        **{"kernel": variant.kernel, "dtype": variant.dtype, "head_size": variant.head_size, "sm": kernel.sm},
        **{"threads": kernel.threads, "registers": kernel.registers, "shared_bytes": kernel.shared_bytes},
        "spills": kernel.spills,
    }


def table(kernels: Sequence[CompiledKernel]) -> str:
    """Markdown: a line for each variant."""
    lines = []
    for variant in SHIPPED:
        own = {kernel.sm: kernel for kernel in kernels if kernel.variant == variant}
        first = own[TARGETS[0]]
        cells = [variant.kernel, variant.dtype, str(variant.head_size or "any"), str(first.threads)]
        cells += [f"{own[sm].registers} / {own[sm].shared_bytes}" for sm in TARGETS]
        lines.append(f"| {' | '.join(cells)} | {max(kernel.spills for kernel in own.values())} |")
    return "\n".join(lines)


def main() -> None:
    jobs = [(variant, sm) for variant in SHIPPED for sm in TARGETS]
    with terminal_progress() as progress:
        kernels = list(progress.track(compile_kernels(jobs), total=len(jobs), description="compile"))
    ARCHIVE.write_bytes(archive(kernels))
    seconds = [kernel.seconds for kernel in kernels]
    record = {
        **{"triton": kernels[0].triton, "options": OPTIONS, "kernels": [row(kernel) for kernel in kernels]},
        "seconds": {"total": round(sum(seconds), 1), "slowest": round(max(seconds), 1)},
    }
    JSON.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    header = HEADER.format(
        triton=kernels[0].triton,
        ptx=OPTIONS["ptx_version"] / 10,
        targets=" | ".join(f"sm_{sm}" for sm in TARGETS),
        columns="|".join(["---:"] * len(TARGETS)),
    )
    footer = FOOTER.format(
        **{"count": len(kernels), "total": sum(seconds), "slowest": max(seconds)},
        **{"size": ARCHIVE.stat().st_size / 1e3, "plain": sum(len(kernel.ptx) for kernel in kernels) / 1e3},
    )
    JSON.with_suffix(".md").write_text(f"{header}{table(kernels)}\n{footer}", encoding="utf-8")


if __name__ == "__main__":
    main()
