"""What docs/algorithm.md says, computed a second time: float64, one image, one row at a time.

Slow and plain on purpose, nothing shared with the packages. Tests compare the torch modules and the ONNX graphs with
it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

Array = np.ndarray[Any, Any]
KeepRule = Callable[[int, int, float], int]
"""keep(layer, patches present, entropy ratio) -> patches to keep, asked at every pruning point but the last."""


class Score(NamedTuple):
    """One layer's score [N], entropy ratio, and the greatest |logit|, which bounds what float32 can give.

    tolerance: relative error that float32 logits allow: `score_tolerance`; but where the terms of a logit cancel to
        less than half of their sum, it is that sum that is rounded.
    rounding [N]: absolute error that float32 allows besides where heads cancel in the mean value, else 0.
    """

    score: Array
    entropy_ratio: float
    largest_logit: float
    tolerance: float = 1e-5
    rounding: Array | float = 0.0


class Pruned(NamedTuple):
    """One image: kept [T], counts [L+1] and features [T, hidden]."""

    kept: Array
    counts: list[int]
    features: Array


class Tensors(Protocol):
    """Where the tower's weights come from."""

    def load(self, name: str) -> Array: ...


def relative_error(got: ArrayLike, expected: ArrayLike) -> float:
    """max|a-b| / max|b|, the error measure of every tolerance here; of numpy arrays or torch tensors."""
    a, b = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    assert a.shape == b.shape, f"shapes {a.shape} and {b.shape}"
    return float(np.abs(a - b).max() / np.abs(b).max())


def score_tolerance(largest_logit: float) -> float:
    """What float32 logits allow of a score's relative error."""
    return 1e-5 + 4 * 2.0**-24 * largest_logit


def flow_score(q: Array, k: Array, v: Array, selector: str = "flowcut") -> Score:
    """Score of patches 1..N of one image from q, k, v [H, N+1, d] (any dtype), as that selector has it."""
    return key_scores(q[:, 0], v[:, 0], k, v, 1 / np.sqrt(np.longdouble(q.shape[-1])), selector=selector)


def key_scores(
    q: Array,
    v_source: Array,
    k: Array,
    v: Array,
    logit_scale: float,
    semantic_scale: float = 1.0,
    source_in_keys: int = 1,
    valid: Array | None = None,
    selector: str = "flowcut",
) -> Score:
    """Score of one image's keys, the source left out if it is the first of them; 0 and ratio 1 where none is valid.

    q [H * G, d], of which query head i belongs to key head i // G, v_source [H, d], k and v [H, S, d], valid [S].
    """
    heads, keys, _ = k.shape
    rows = np.arange(keys) if valid is None else np.flatnonzero(valid)
    score, scored = np.zeros(keys - source_in_keys), rows[rows >= source_in_keys] - source_in_keys
    if len(scored) == 0:
        return Score(score, 1.0, 0.0)
    q, v_source, k, v = (x.astype(np.longdouble) for x in (q, v_source, k[:, rows], v[:, rows]))
    of_query = np.arange(len(q)) * heads // len(q)
    terms = [q[:, None] * k[of_query] * np.longdouble(logit_scale)]  # [H * G, S, d]
    terms.append(v_source[:, None] * v * np.longdouble(semantic_scale))
    absent = -np.inf * np.ones((1, 1 - source_in_keys))  # a source that is not there has no share
    rel, sem = (_normalised(np.hstack([absent.repeat(len(x), 0), x.sum(-1)])) for x in terms)
    values = v[:, source_in_keys:]
    strength = np.abs(values.mean(0)).sum(-1)
    parts = {"no-semantic": rel * strength, "no-strength": rel + sem, "cls": rel}
    score[scored] = parts.get(selector, (rel + sem) * strength)
    largest, summed = (float(max(x.max() for x in each)) for each in _sizes(terms))
    rounding, uncancelled = np.zeros_like(score), np.abs(values).mean(0).sum(-1)
    rounding[scored] = np.where(uncancelled > 16 * strength, 8 * 2.0**-24 * (rel + sem) * uncancelled, 0)
    tolerance = max(score_tolerance(largest), score_tolerance(summed / 2))
    return Score(score, _entropy_ratio(rel), largest, tolerance, rounding)


def _sizes(terms: list[Array]) -> tuple[list[Array], list[Array]]:
    """|logits|, and what they would be if their terms did not cancel."""
    return [np.abs(x.sum(-1)) for x in terms], [np.abs(x).sum(-1) for x in terms]


def _normalised(logits: Array) -> Array:
    """Mean over heads of the softmax of logits [H, N+1], CLS dropped, divided by its sum: in logarithms throughout."""
    log_share = (logits - _log_sum_exp(logits, 1))[:, 1:]
    log_mean = _log_sum_exp(log_share, 0)[0]  # the number of heads cancels
    share: Array = np.exp(log_mean - _log_sum_exp(log_mean, 0))
    return share


def _log_sum_exp(x: Array, axis: int) -> Array:
    top = x.max(axis, keepdims=True)
    total: Array = top + np.log(np.exp(x - top).sum(axis, keepdims=True))
    return total


def _entropy_ratio(p: Array) -> float:
    if len(p) <= 1:
        return 1.0
    return float(-sum(x * math.log(x) for x in p.astype(float) if x > 0) / math.log(len(p)))


def adaptive_rule(layers: int, tokens: int) -> KeepRule:
    """docs/algorithm.md's rule. Python's round is half to even, as asked."""

    def keep(layer: int, patches: int, entropy_ratio: float) -> int:
        left = layers - 2 - layer - 1
        drop = 0 if patches <= 1 else round((patches - tokens) / math.sqrt(left) * (1 - entropy_ratio**2))
        return max(patches - drop, tokens)

    return keep


def capped_rule(layers: int, tokens: int, capacities: Sequence[int]) -> KeepRule:
    """docs/algorithm.md's `masked`: min(rule, capacity). Invalid rows take part in nothing, so here they are gone."""
    rule, points = adaptive_rule(layers, tokens), spec_points(layers)
    return lambda layer, patches, e: min(rule(layer, patches, e), capacities[points.index(layer)])


def constant_rule(layers: int, counts: Sequence[int]) -> KeepRule:
    """docs/algorithm.md's `static`."""
    points = spec_points(layers)
    return lambda layer, patches, e: counts[points.index(layer)]


def spec_points(layers: int) -> list[int]:
    """Pruning points, counted back from the last layer before hidden state -2."""
    return sorted(range(layers - 3, -1, -2))


def tower(
    weights: Tensors,
    pixels: Array,
    sizes: Sequence[int],
    tokens: int,
    keep: KeepRule,
    selector: str = "flowcut",
    constant: ArrayLike = (),
) -> Pruned:
    """CLIP up to hidden state -2 with FlowCut or another selector, float64.

    Args:
        pixels: [3, S, S], one image.
        sizes: layers, heads, patch size.
        constant: the scores [N] of a selector that reads no layer.
    """
    layers, heads, patch = sizes

    def load(name: str) -> Array:
        return weights.load(f"vision_tower.vision_model.{name}").astype(np.float64)

    hidden = _layer_norm(_embed(load, pixels.astype(np.float64), patch), load, "pre_layrnorm")
    numbers, running, counts = np.arange(len(hidden) - 1), np.zeros(0), [len(hidden) - 1]
    one_shot = selector == "cls" or len(np.asarray(constant)) > 0
    points = [layers - 2] if one_shot else spec_points(layers)
    for layer in range(layers - 1):
        hidden, scored = _encoder_layer(hidden, load, f"encoder.layers.{layer}.", heads, selector)
        if len(numbers) > tokens:
            forgets = layer == 0 or one_shot or selector == "no-history"
            running = scored.score if forgets else (running + scored.score) / 2
            if layer in points:
                running = np.asarray(constant) if len(np.asarray(constant)) else running
                count = tokens if layer == points[-1] else keep(layer, len(numbers), scored.entropy_ratio)
                rows = sorted(sorted(range(len(numbers)), key=lambda j: (-running[j], j))[:count])
                hidden, numbers, running = hidden[[0, *(j + 1 for j in rows)]], numbers[rows], running[rows]
        counts.append(len(numbers))
    return Pruned(numbers, [*counts, counts[-1]], hidden[1:])


def _embed(load: Callable[[str], Array], pixels: Array, patch: int) -> Array:
    kernel = load("embeddings.patch_embedding.weight")
    grid = pixels.shape[-1] // patch
    cells = [
        pixels[:, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch] for y in range(grid) for x in range(grid)
    ]
    rows = [load("embeddings.class_embedding"), *(np.einsum("ocyx,cyx->o", kernel, cell) for cell in cells)]
    return np.stack(rows) + load("embeddings.position_embedding.weight")


def _encoder_layer(
    hidden: Array, load: Callable[[str], Array], name: str, heads: int, selector: str
) -> tuple[Array, Score]:
    def linear(x: Array, part: str) -> Array:
        return x @ load(f"{name}{part}.weight").T + load(f"{name}{part}.bias")

    x = _layer_norm(hidden, load, f"{name}layer_norm1")
    q, k, v = (
        linear(x, f"self_attn.{p}").reshape(len(x), heads, -1).swapaxes(0, 1) for p in ("q_proj", "k_proj", "v_proj")
    )
    logits = q @ k.swapaxes(1, 2) / math.sqrt(q.shape[-1])
    share = np.exp(logits - logits.max(-1, keepdims=True))
    attended = (share / share.sum(-1, keepdims=True)) @ v
    hidden = hidden + linear(attended.swapaxes(0, 1).reshape(len(x), -1), "self_attn.out_proj")
    x = linear(_layer_norm(hidden, load, f"{name}layer_norm2"), "mlp.fc1")
    return hidden + linear(x / (1 + np.exp(-1.702 * x)), "mlp.fc2"), flow_score(q, k, v, selector)


def _layer_norm(x: Array, load: Callable[[str], Array], name: str) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    deviation = np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5)
    out: Array = centred / deviation * load(f"{name}.weight") + load(f"{name}.bias")
    return out
