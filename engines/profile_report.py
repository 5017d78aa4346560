"""What `flowcut run --profile` shows beneath the latency: where the time went, and the memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engines.layer_profile import LayerProfile
from engines.runtime.memory import MemoryReport

OPS = 8
"""Kinds of nodes that are shown."""
HIDDEN = "(not told)"
LONGEST = 120
"""Letters of a name. TensorRT strings together those of all nodes that it made one."""


def profiled(console: Console, profile: Mapping[str, LayerProfile]) -> None:
    """Two tables for each of "vision" and "language": kinds of nodes and single nodes, dearest first."""
    for graph, found in profile.items():
        console.print(Text(f"\n{graph}: {found.nodes} nodes, {found.total_ms:.1f} ms in the runs above", "bold"))
        if not found.nodes:
            continue
        kinds = _table("kind of node", "calls", "ms", "share")
        for op in found.ops[:OPS]:
            kinds.add_row(op.op or HIDDEN, str(op.calls), f"{op.total_ms:.2f}", f"{op.share:.1%}")
        if rest := found.ops[OPS:]:
            ms, share = sum(op.total_ms for op in rest), sum(op.share for op in rest)
            kinds.add_row(f"{len(rest)} other kinds", str(sum(op.calls for op in rest)), f"{ms:.2f}", f"{share:.1%}")
        console.print(kinds)
        nodes = _table("slowest nodes", "kind", "calls", "ms")
        for node in found.slowest:
            nodes.add_row(_shortened(node.name), node.op or HIDDEN, str(node.calls), f"{node.total_ms:.2f}")
        console.print(nodes)


def remembered(console: Console, report: MemoryReport) -> None:
    """What the engine and its process take."""
    console.print(Text("\nmemory", "bold"))
    table = _table("of the engine", "MB")
    for name, count in _rows(report):
        table.add_row(name, "-" if count is None else f"{count / 1e6:.1f}")
    console.print(table)


def _rows(report: MemoryReport) -> Iterator[tuple[str, int | None]]:
    for graph, count in report.files.items():
        yield f"{graph}, on the disk", count
    for name, kinds in report.sessions.items():
        yield from ((f"{name}, {kind} of its session", count) for kind, count in kinds.items())
    yield "KV cache of one prompt", report.cache_per_prompt
    yield "KV caches, at most", report.cache_at_most
    yield "pictures already seen", report.pictures
    yield "pictures already seen, at most", report.pictures_at_most
    yield "this process now", report.resident
    yield "this process at its peak", report.peak


def _shortened(name: str) -> str:
    return name if len(name) <= LONGEST else name[: LONGEST - 2] + ".."


def _table(first: str, *others: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="left" if name == "kind" else "right")
    return table
