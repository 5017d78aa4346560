"""What one run of a graph asks for: operations, and bytes by what they are, counted node by node. No weight is read.

    weight       constants, as they are stored (int4 two to a byte, scales beside them), each once; of a table that is
                 gathered from, or of rotary angles, the rows that are read
    state        the KV cache: rows that earlier runs wrote are read, rows of this run are written
    io           other inputs and outputs of the graph
    activation   what nodes hand each other, written once and read by everyone who takes it

The first three have to pass through a GPU's memory at least once; activations do only as far as caches and fusion leave
them, so they are an upper figure and no part of `bytes`.

The cache. The graph's attention takes the whole cache, all C rows of it, and masks those behind a query's position
(export/language.py); a kernel that knows the mask to be causal reads and computes the rows in use alone. `flops` counts
what the graph says, C rows, as engines.flops does and ONNX Runtime computes. `least_flops` and the cache's bytes count
the rows in use, as a lower bound has to. So every row in use passes once: the older ones are read, the new ones
written, and whether attention finds the new ones in L2 is the kernel's affair.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING

from engines.flops import GATHERING, GROUPS, VIEWS, CountedNode, FlatGraph, counted_nodes, flat_graph

if TYPE_CHECKING:
    import onnx_ir as ir

PAST, PRESENT = "past.", "present."
_SCORING = "flowcut"
_SHAPES = ("Shape", "Size")  # read no element


@dataclass(frozen=True)
class NodeCost:
    """One node's share. `group` is one of engines.flops.GROUPS, writing the cache being attention's; `moves` tells
    whether it computes or moves anything."""

    group: str
    flops: int
    least_flops: int
    weight_bytes: int = 0
    state_bytes: int = 0
    io_bytes: int = 0
    activation_bytes: int = 0
    moves: bool = True

    @property
    def bytes(self) -> int:
        """What must pass through device memory at least once."""
        return self.weight_bytes + self.state_bytes + self.io_bytes


@dataclass(frozen=True)
class Cost:
    """One run of a graph, or of several one after the other.

    Attributes:
        by_group: `flops` by engines.flops.GROUPS.
        least_flops: `flops`, but attention over the cache takes the rows in use only; None: the same.
        nodes: what the sums are of, in order; () where only the sums are known.
        scorings: FlowScore nodes, each two launches where it is a plugin.
    """

    flops: int
    weight_bytes: int
    state_bytes: int
    io_bytes: int
    activation_bytes: int
    by_group: Mapping[str, int]
    least_flops: int | None = None
    nodes: tuple[NodeCost, ...] = field(default=(), repr=False)
    scorings: int = 0

    @property
    def bytes(self) -> int:
        """What must pass through device memory at least once."""
        return self.weight_bytes + self.state_bytes + self.io_bytes

    @property
    def parts(self) -> tuple[NodeCost, ...]:
        """The nodes, or all as one."""
        least = self.flops if self.least_flops is None else self.least_flops
        whole = (self.weight_bytes, self.state_bytes, self.io_bytes, self.activation_bytes)
        return self.nodes or (NodeCost("rest", self.flops, least, *whole),)

    @staticmethod
    def of(nodes: Iterable[NodeCost], scorings: int = 0) -> Cost:
        """The sums of nodes."""
        nodes = tuple(nodes)
        names = ("flops", "weight_bytes", "state_bytes", "io_bytes", "activation_bytes", "least_flops")
        sums = {name: sum(getattr(node, name) for node in nodes) for name in names}
        groups = {group: sum(node.flops for node in nodes if node.group == group) for group in GROUPS}
        return Cost(**sums, by_group=groups, nodes=nodes, scorings=scorings)


def together(costs: Iterable[Cost]) -> Cost:
    """Of graphs that run one after the other. What one hands to the next is in both."""
    costs = tuple(costs)
    return Cost.of((node for cost in costs for node in cost.parts), sum(cost.scorings for cost in costs))


def count_cost(model: ir.Model, sizes: Mapping[str, int], past: Mapping[str, int] | None = None) -> Cost:
    """Count a graph of flowcut.contract.

    Args:
        sizes: of every named dimension of the inputs.
        past: rows of each sequence that earlier runs wrote, by cache input; 0 for those not named.

    Raises:
        ConfigError, EngineError, FlowCutError: as engines.flops.count.
    """
    flat = flat_graph(model, sizes)
    scorings = sum(node.domain == _SCORING for node in model.graph)
    return Cost.of(_Bytes(flat, past or {}).costs(), scorings)


class _Bytes:
    """Follows a graph's values in order: constants, cache, inputs, and what nodes hand each other."""

    def __init__(self, flat: FlatGraph, past: Mapping[str, int]) -> None:
        self._flat, self._past = flat, past
        graph = flat.graph
        self._constants = {str(name): frozenset({str(name)}) for name in graph.initializers}
        inputs = [str(value.name) for value in graph.inputs]
        self._state = {name: name for name in inputs if name.startswith(PAST)}  # value -> the cache it is
        self._unread = {name for name in inputs if name not in self._state}
        self._inputs = frozenset(self._unread)
        outputs = {str(value.name) for value in graph.outputs}
        self._outputs = {name for name in outputs if not name.startswith(PRESENT)}
        self._charged = dict[str, int]()  # bytes of each constant that were counted
        self._read = set[str]()  # caches whose old rows were counted

    def costs(self) -> Iterator[NodeCost]:
        for each in counted_nodes(self._flat):
            if each.group is None:
                self._keep(each.node)
            else:
                yield self._cost(each, each.group)

    def _keep(self, node: ir.Node) -> None:
        """A node that depends on no input: what it makes is what it is made of."""
        sources = frozenset[str]().union(*(self._constants[name] for name in _names(node.inputs)))
        self._constants |= dict.fromkeys(_names(node.outputs), sources)

    def _cost(self, each: CountedNode, group: str) -> NodeCost:
        node, op = each.node, each.node.op_type
        if op in _SHAPES:
            return NodeCost(group, each.flops, each.flops, moves=False)
        names, made = list(dict.fromkeys(_names(node.inputs))), _names(node.outputs)
        weight = sum(self._constant(node, name) for name in names if name in self._constants)
        cached = [name for name in names if name in self._state]
        state = self._cache(node, cached)
        io = sum(map(self._first, names)) + sum(self._size(name) for name in made if name in self._outputs)
        between = [n for n in names if n not in self._constants and n not in self._inputs and n not in self._state]
        between += [name for name in made if name not in self._outputs and name not in self._state]
        least = self._least(each) if op == "Attention" and cached else each.flops
        moved = 0 if op in VIEWS else sum(map(self._size, between))
        return NodeCost("attention" if cached else group, each.flops, least, weight, state, io, moved, op not in VIEWS)

    def _constant(self, node: ir.Node, name: str) -> int:
        """Bytes of the constants behind `name` that no node before has read."""
        new = 0
        for source in self._constants[name]:
            needed = min(self._size(source), self._looked_up(node, name))
            before = self._charged.get(source, 0)
            self._charged[source] = max(needed, before)
            new += max(0, needed - before)
        return new

    def _looked_up(self, node: ir.Node, name: str) -> int:
        """How much of a constant a node can read at most: of a table, its rows."""
        inputs = [value.name if value is not None else None for value in node.inputs]
        if node.op_type in GATHERING and name == inputs[0]:
            return self._size(_names(node.outputs)[0])
        if node.op_type == "RotaryEmbedding" and name in inputs[1:3] and len(inputs) > 3:
            row = self._size(name) // self._flat.shapes[name][0]
            return prod(self._flat.shapes[str(inputs[3])]) * row
        return sys.maxsize

    def _cache(self, node: ir.Node, cached: list[str]) -> int:
        """Bytes of cache rows that a node writes, or is the first to read."""
        if not cached:
            return 0
        if node.op_type == "TensorScatter":
            self._state |= dict.fromkeys(_names(node.outputs), self._state[cached[0]])
            return self._size(str(node.inputs[1].name)) if node.inputs[1] is not None else 0
        caches = {self._state[name] for name in cached} - self._read
        self._read |= caches
        return sum(self._past.get(cache, 0) * self._size(cache) // self._flat.shapes[cache][2] for cache in caches)

    def _first(self, name: str) -> int:
        """Bytes of an input of the graph that no node has read before."""
        if name not in self._unread:
            return 0
        self._unread.remove(name)
        return self._size(name)

    def _least(self, each: CountedNode) -> int:
        """Operations over the rows in use: every query sees those before this run, and its own and earlier ones."""
        q, k = (self._flat.shapes[str(value.name)] for value in each.node.inputs[:2] if value is not None)
        past = self._past.get(self._state[str(each.node.inputs[1].name)], 0)  # type: ignore[union-attr]
        queries, keys = q[-2], k[-2]
        return each.flops // (queries * keys) * (queries * past + queries * (queries + 1) // 2)

    def _size(self, name: str) -> int:
        return self._flat.bytes_of(name)


def _names(values: Iterable[ir.Value | None]) -> list[str]:
    return [str(value.name) for value in values if value is not None and value.name]


def stored_bytes(model: ir.Model) -> int:
    """Of all constants of a graph, as they are stored: what its weights take of a GPU's memory."""
    tensors = (value.const_value for value in model.graph.initializers.values())
    return sum(-(-tensor.size * tensor.dtype.bitwidth // 8) for tensor in tensors if tensor is not None)
