"""A decoder in several graphs, run as one session.

Between two stages the hidden states stay where they are computed, in memory of their own, so that several requests may
be on their way. All stages of an engine share one device now; with one for each, they would be copied as they go on.
What else a stage returns is a result of the whole decoder, wherever in it the stage is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from engines.sessions.session import (
    Array,
    DeviceTensor,
    Feed,
    LayerTime,
    Result,
    Session,
    State,
    feeds_of,
    results_of,
    sizes_of,
)
from flowcut.contract import GraphContract
from flowcut.errors import EngineError


class ChainState:
    """The cache of each stage."""

    def __init__(self, batch: int, stages: Sequence[State]) -> None:
        self.batch = batch
        self.stages = tuple(stages)


class Chain:
    """Consecutive graphs of one decoder, see Session.

    Args:
        contract: of the whole decoder in one graph.
        stages: with the contracts of flowcut.contract.language_contracts, in their order; all of one backend.
    """

    def __init__(self, contract: GraphContract, stages: Sequence[Session]) -> None:
        self.contract, self.stages = contract, tuple(stages)

    def allocate_state(self, batch: int) -> ChainState:
        """See Session."""
        return ChainState(batch, [stage.allocate_state(batch) for stage in self.stages])

    def place(self, array: Array) -> DeviceTensor:
        """See Session."""
        return self.stages[0].place(array)

    def forget_times(self) -> None:
        """See Session."""
        for stage in self.stages:
            stage.forget_times()

    def layer_times(self) -> list[LayerTime]:
        """See Session."""
        times = [time for stage in self.stages for time in stage.layer_times()]
        return sorted(times, key=lambda time: -time.total_ms)

    def memory_bytes(self) -> Mapping[str, int]:
        """See Session."""
        return sum((Counter(stage.memory_bytes()) for stage in self.stages), Counter())

    def close(self) -> None:
        """See Session."""
        for stage in self.stages:
            stage.close()

    def run(self, feeds: Mapping[str, Feed], state: State | None = None, keep: Collection[str] = ()) -> Result:
        """See Session. device_ms is the sum over stages, without what passes between them."""
        sizes_of(self.contract, feeds, state)
        if not isinstance(state, ChainState):
            raise EngineError(f"{self.contract.name} must be run with a state that it allocated, got another's.")
        asked = {spec.name for spec in results_of(self.contract)}
        known, arrays, kept, device_ms = dict(feeds), dict[str, Array](), dict[str, DeviceTensor](), 0.0
        for stage, own in zip(self.stages, state.stages, strict=True):
            wanted = {spec.name: known[spec.name] for spec in feeds_of(stage.contract)}
            results = {spec.name for spec in results_of(stage.contract)}
            result = stage.run(wanted, own, {*keep} | (results - asked))
            known |= {**result.arrays, **result.kept}
            arrays |= {name: array for name, array in result.arrays.items() if name in asked}
            kept |= {name: tensor for name, tensor in result.kept.items() if name in asked}
            device_ms += result.device_ms
        return Result(arrays, kept, device_ms)
