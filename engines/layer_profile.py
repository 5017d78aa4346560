"""Where a profiled engine spends its time, by kind of node and by node: see engines.options.Options.profile."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from engines.runtime.model import Model
from engines.sessions.session import LayerTime

SLOWEST = 10


@dataclass(frozen=True)
class OpTime:
    """All nodes of one kind.

    Attributes:
        op: "" where the engine library hides it.
        calls, total_ms: of all of them together.
        share: of what all nodes of the graph took.
    """

    op: str
    calls: int
    total_ms: float
    share: float


@dataclass(frozen=True)
class LayerProfile:
    """One graph, or a decoder in several.

    Attributes:
        nodes: how many there are that took time.
        total_ms: what they took. A run takes more: the library's own work between them is not in it.
        ops: the dearest kind first.
        slowest: the dearest nodes.
    """

    nodes: int
    total_ms: float
    ops: tuple[OpTime, ...]
    slowest: tuple[LayerTime, ...]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def layer_profile(times: Iterable[LayerTime], slowest: int = SLOWEST) -> LayerProfile:
    """Sum up what a session measured."""
    nodes = sorted(times, key=lambda time: -time.total_ms)
    total_ms = sum(node.total_ms for node in nodes)
    kinds: dict[str, list[LayerTime]] = {}
    for node in nodes:
        kinds.setdefault(node.op, []).append(node)
    ops = [_op_time(op, those, total_ms) for op, those in kinds.items()]
    return LayerProfile(len(nodes), total_ms, tuple(sorted(ops, key=lambda op: -op.total_ms)), tuple(nodes[:slowest]))


def _op_time(op: str, nodes: Sequence[LayerTime], whole_ms: float) -> OpTime:
    total_ms = sum(node.total_ms for node in nodes)
    return OpTime(op, sum(node.calls for node in nodes), total_ms, total_ms / whole_ms if whole_ms else 0.0)


def forget_times(model: Model) -> None:
    """Leave what ran so far, a warm-up, out of `collect`."""
    for session in (model.vision, model.language):
        session.forget_times()


def collect(model: Model) -> Mapping[str, LayerProfile]:
    """Of "vision" and "language" what ran since `forget_times`. To be asked once, see Session.layer_times."""
    sessions = {"vision": model.vision, "language": model.language}
    return {name: layer_profile(session.layer_times()) for name, session in sessions.items()}
