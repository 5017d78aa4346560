"""What `verify` compares of a decoder's results, of every step, and what of them it hands to the next stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from engines.comparison import Judge, Row
from engines.runners import Feeds
from engines.session import Array, results_of
from engines.verify_inputs import Prompts
from flowcut.budget import PRUNE_LAYER
from flowcut.contract import GraphContract, TensorSpec

KEPT, COUNTS = "kept_tokens", ("lengths", "pruned_lengths")
"""Results of a decoder that drops visual tokens, beside its values."""


def decoder_values(
    judge: Judge, contract: GraphContract, pair: tuple[list[Feeds], list[Feeds]], asked: Prompts
) -> Iterator[Row]:
    """Everything of every step but which tokens stay."""
    got, expected = pair
    names = [spec.name for spec in results_of(contract) if spec.name != KEPT]
    for name in (name for name in names if name in COUNTS):
        ours, theirs = (np.stack([step[name] for step in steps]) for steps in pair)
        yield judge.exact(name, ours, theirs)
    (result,) = (name for name in names if name not in COUNTS)
    for i, (a, b) in enumerate(zip(got, expected, strict=True)):
        name = f"{result}, decode {i}" if i else f"{result}, prefill"
        rows = None if i else asked.pruned_lengths
        yield judge.values(name, _written(a[result], rows), _written(b[result], rows))
    more = len(asked.steps) - 1
    used = asked.lengths + more, asked.pruned_lengths + more
    yield judge.values_worst("cache", _used(got[-1], *used), _used(expected[-1], *used))


def _written(hidden: Array, lengths: Array | None) -> Array:
    """Hidden states [B, S, D], with zeros in padding where `lengths` are given; logits [B, V] as they are."""
    if hidden.ndim < 3 or lengths is None:
        return hidden
    return np.where((np.arange(hidden.shape[1]) < lengths[:, None])[..., None], hidden, 0)


def first_finite(
    results: Mapping[str, list[Feeds]], specs: Sequence[TensorSpec], sizes: Sequence[Mapping[str, int]]
) -> list[Feeds]:
    """Outputs of every step, of the first runner that has finite ones; else random numbers, and counts of one."""
    for outputs in results.values():
        found = [{spec.name: output[spec.name] for spec in specs} for output in outputs]
        if all(np.isfinite(array).all() for each in found for array in each.values()):
            return found
    rng = np.random.default_rng(0)

    def random(spec: TensorSpec, size: Mapping[str, int]) -> Array:
        whole, shape = spec.dtype == "int64", spec.shape(size)
        return np.ones(shape, np.int64) if whole else rng.standard_normal(shape).astype(spec.dtype)

    return [{spec.name: random(spec, size) for spec in specs} for size in sizes]


def _used(outputs: Feeds, lengths: Array, pruned_lengths: Array) -> Feeds:
    """The cache, with zeros in the rows that no token of a sequence has written: padding may leave anything there."""
    used = {}
    for name, array in outputs.items():
        if name.startswith("present."):
            written = lengths if int(name.split(".")[1]) <= PRUNE_LAYER else pruned_lengths
            rows = np.arange(array.shape[2]) < written[:, None]  # [B, C]
            used[name] = np.where(rows[:, None, :, None], array, 0)
    return used
