"""What `verify` compares of a decoder's results, of every step, and what of them it hands to the next stage."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from engines.comparison import COUNTS, EARLY, KEPT, NOT_RUN, Judge, Row, numbers_problem
from engines.runners import Feeds
from engines.sessions.session import Array, results_of
from engines.verify_inputs import Prompts
from flowcut.budget import PRUNE_LAYER
from flowcut.contract import GraphContract, TensorSpec


def kept_problem(kept: Array, asked: Prompts) -> str:
    """Why `kept` [images, T], as far as it means anything, cannot be numbers of the pictures' tokens, ascending; empty
    where it can."""
    each = zip(kept, asked.kept, asked.tokens, strict=True)
    return next(filter(None, (numbers_problem(row[:n], tokens) for row, n, tokens in each)), "")


def same_tokens(ours: Sequence[Array], theirs: Sequence[Array], asked: Prompts) -> Array:
    """[B] bool: prompts of whose pictures the same tokens stay; also one without pictures."""
    same, prompts = np.ones(len(asked.lengths), bool), asked.steps[0]["image_spans"][:, 0]
    for prompt, a, b in zip(prompts, ours, theirs, strict=True):
        same[prompt] &= np.array_equal(a, b)
    return same


def decoder_values(
    judge: Judge, contract: GraphContract, pair: tuple[list[Feeds], list[Feeds]], asked: Prompts, same: Array
) -> Iterator[Row]:
    """Everything of every step but which tokens stay.

    same: [B] bool, the prompts of which both kept the same tokens. Of the others only what does not depend on that is
        compared: how many tokens there are, and the cache of the layers before.
    """
    got, expected = pair
    names = [spec.name for spec in results_of(contract) if spec.name != KEPT]
    detail = "" if same.all() else "of the prompts that keep the same tokens only"
    for name in (name for name in names if name in COUNTS):
        ours, theirs = (np.stack([step[name] for step in steps]) for steps in pair)
        yield judge.exact(name, ours, theirs)
    (result,) = (name for name in names if name not in COUNTS)
    for i, (a, b) in enumerate(zip(got, expected, strict=True) if same.any() else ()):
        name = f"{result}, decode {i}" if i else f"{result}, prefill"
        rows = None if i else asked.pruned_lengths
        yield judge.values(name, _written(a[result], rows)[same], _written(b[result], rows)[same], detail)
    yield _cache(judge, got[-1], expected[-1], asked, same, detail)
    if not same.all():
        numbers = ", ".join(str(i + 1) for i in np.flatnonzero(~same))
        why = f"of prompt {numbers} (of {len(same)}): other visual tokens stay there, and nothing says what follows"
        yield judge.unmeasured("other values", NOT_RUN, f"{why}; pass --checkpoint DIR")


def _cache(judge: Judge, got: Feeds, expected: Feeds, asked: Prompts, same: Array, detail: str) -> Row:
    """The cache of all layers, of those behind the pruning as far as the `same` tokens stay."""
    more = len(asked.steps) - 1
    used = asked.lengths + more, asked.pruned_lengths + more
    ours, theirs = (
        {name: rows if _early(name) else rows[same] for name, rows in _used(outputs, *used).items()}
        for outputs in (got, expected)
    )
    if same.any():
        return judge.values_worst("cache", ours, theirs, detail)
    ours, theirs = ({name: rows for name, rows in each.items() if _early(name)} for each in (ours, theirs))
    return judge.values_worst(EARLY, ours, theirs)


def _early(name: str) -> bool:
    """Whether a cache is of a layer that sees every token."""
    return int(name.split(".")[1]) <= PRUNE_LAYER


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
            written = lengths if _early(name) else pruned_lengths
            rows = np.arange(array.shape[2]) < written[:, None]  # [B, C]
            used[name] = np.where(rows[:, None, :, None], array, 0)
    return used
