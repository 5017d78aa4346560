"""Whether FlowScore's kernels give the right scores on this machine, by a dozen small cases in float64."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engines.flow_score.cache import SHIPPED_HEAD_SIZES
from engines.flow_score.launch import LOGITS, Variant
from engines.flow_score.run import Launch, score
from flowcut.deps import available, require

Array = NDArray[np.float64]
LARGEST_BOUND = 0.01
"""Logits that allow a larger relative error are too large for float32: the score must only be finite."""


@dataclass(frozen=True)
class KernelCheck:
    """One case and how it went.

    Attributes:
        shape: images, key heads, keys, head size.
        relative_error: the largest of all scores (and entropy ratios).
        allowed_error: 1e-5 + 4 * 2^-24 * the largest logit, since logits are float32.
        ok: within the bound; where that passes 0.01, finite and not negative.
    """

    name: str
    dtype: str
    shape: tuple[int, int, int, int]
    relative_error: float
    allowed_error: float
    ok: bool


@dataclass(frozen=True)
class _Case:
    name: str
    dtype: str = "fp16"
    head_size: int = 64
    keys: int = 23  # a multiple of no tile
    v_scale: float = 1.0
    group: int = 1
    token_major: bool = False
    source_in_keys: int = 1
    masked: bool = False
    history: float = 0.0
    batch: int = 1
    heads: int = 3


CASES = (
    _Case("fp16", keys=67),  # more than a program scores
    _Case("bf16", "bf16"),
    _Case("fp32", "fp32"),
    _Case("head size 32", head_size=32, batch=2),
    _Case("head size 128", head_size=128),
    _Case("head size 72", "bf16", head_size=72),
    _Case("many heads", heads=17),
    _Case("masked", masked=True, keys=67),
    _Case("grouped", group=4, heads=2, source_in_keys=0),
    _Case("token major", token_major=True, batch=2),
    _Case("small values", v_scale=1e-4),
    _Case("large values", "fp32", v_scale=1e3),
    _Case("history", history=0.5, batch=2),
    _Case("one score", keys=2),
)


def check_kernels(launch: Launch, device: str = "cpu", variants: Iterable[Variant] = ()) -> list[KernelCheck]:
    """Every case on the device: the interpreter's is "cpu", compiled kernels need "cuda".

    Compiled ones are checked at the head sizes that are shipped, where there is no Triton to compile another.

    Args:
        variants: more types and head sizes to check, a case each where no other has them.

    Raises:
        FlowCutError: what `launch` needs is not there.
    """
    shipped_only = device != "cpu" and not available("triton")
    known = {(case.dtype, case.head_size) for case in CASES}
    more = dict.fromkeys((v.dtype, v.head_size) for v in variants if v.kernel == LOGITS)
    asked = [_Case(f"{dtype}, head size {size}", dtype, size) for dtype, size in more if (dtype, size) not in known]
    cases = [case for case in (*CASES, *asked) if case.head_size in SHIPPED_HEAD_SIZES or not shipped_only]
    return [_check(launch, case, seed, device) for seed, case in enumerate(cases)]


def _check(launch: Launch, case: _Case, seed: int, device: str) -> KernelCheck:
    torch = require("torch", "torch")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}[case.dtype]
    rng = np.random.default_rng(seed)
    shape = case.batch, case.heads, case.keys, case.head_size
    q = rng.standard_normal((case.batch, case.heads, case.group, case.head_size), np.float32)
    k, v, source = (rng.standard_normal(shape, np.float32) * np.float32(x) for x in (1, case.v_scale, case.v_scale))
    tensors = [torch.from_numpy(x).to(device, dtype) for x in (q, v if case.source_in_keys else source, k, v)]
    valid = rng.random((case.batch, case.keys)) < 0.7
    valid[:, 0] = True
    running = rng.random((case.batch, case.keys - case.source_in_keys), np.float32)
    got = score(
        launch,
        *([x.transpose(1, 2).contiguous() for x in tensors] if case.token_major else tensors),
        logit_scale=case.head_size**-0.5,
        history=case.history,
        running=torch.from_numpy(running).to(device),
        source_in_keys=case.source_in_keys,
        key_valid=torch.from_numpy(valid).to(device) if case.masked else None,
        group=case.group,
        token_major=case.token_major,
    )
    arrays = [x.double().cpu().numpy() for x in tensors]
    rows = valid if case.masked else np.ones_like(valid)
    images = [_expected(case, [x[b] for x in arrays], rows[b], running[b]) for b in range(case.batch)]
    return _compare(case, shape, got, images)


def _expected(case: _Case, qkv: list[Array], valid: NDArray[np.bool_], running: Array) -> tuple[Array, float, float]:
    """Scores [N], entropy ratio and largest logit of one image, as docs/algorithm.md has it; in logarithms."""
    (q, source, k, v), first = qkv, case.source_in_keys
    attention = np.einsum("hgd,hsd->hgs", q, k).reshape(-1, case.keys) * case.head_size**-0.5
    similarity = np.einsum("hd,hsd->hs", source[:, 0], v)
    shares = [_share(np.where(valid, x, -np.inf), first) for x in (attention, similarity)]
    norm = np.abs(v.mean(0)).sum(-1)[first:]
    p = shares[0][shares[0] > 0]
    count = int(valid[first:].sum())
    ratio = float(-(p * np.log(p)).sum() / math.log(count)) if count > 1 else 1.0
    scores = case.history * running + (1 - case.history) * (shares[0] + shares[1]) * norm
    return scores, ratio, float(max(np.abs(attention).max(), np.abs(similarity).max()))


def _share(logits: Array, first: int) -> Array:
    """Head mean of the softmax of logits [heads, S] from key `first` on, divided by its sum."""
    log_share = (logits - np.logaddexp.reduce(logits, 1, keepdims=True))[:, first:]
    log_mean = np.logaddexp.reduce(log_share, 0)
    share: Array = np.exp(log_mean - np.logaddexp.reduce(log_mean))
    return share


def _compare(
    case: _Case, shape: tuple[int, int, int, int], got: tuple[Any, Any], images: list[tuple[Array, float, float]]
) -> KernelCheck:
    scores = got[0].double().cpu().numpy()
    error = _relative_error(scores, np.stack([image[0] for image in images]))
    if case.masked:
        ratios = np.array([[image[1]] for image in images])
        error = float(np.maximum(error, _relative_error(got[1].double().cpu().numpy(), ratios)))  # NaN stays
    allowed = 1e-5 + 4 * 2.0**-24 * max(image[2] for image in images)
    sound = bool(np.isfinite(scores).all() and (scores >= 0).all())
    ok = sound and (error <= allowed or allowed > LARGEST_BOUND)
    return KernelCheck(case.name, case.dtype, shape, error, allowed, ok)


def _relative_error(got: Array, expected: Array) -> float:
    """Against each expected number, no less than the least one of float32: smaller shares are 0 there."""
    floor = np.finfo(np.float32).tiny
    return float((np.abs(got - expected) / np.maximum(expected, floor)).max())
