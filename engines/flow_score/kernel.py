"""The two Triton kernels behind `flowcut::FlowScore` on TensorRT. Importing this file needs triton.

Two launches, joined by the per-head logits: a score needs sums over all keys, and nothing tells one block of an
ahead-of-time plugin that all the others are done. docs/plugin.md says why not one launch.

    flow_score_logits   a program: `BLOCK_S` keys of one image, all heads. Reads each element of K and V once.
    flow_score_combine  a program: `BLOCK_N` scores of one image. Reads the logits, not K or V.

Arguments are in the order in which TensorRT passes them: inputs, 32-bit integers, outputs. A float travels as the
integer with its bits (launch.py). Sums have a fixed order and there are no atomics, so results repeat
bit for bit. Everything is computed in float32.
"""

import triton
import triton.language as tl


@triton.jit
def flow_score_logits(
    q,
    v_source,
    k,
    v,
    logit_scale,
    semantic_scale,
    query_heads,
    heads,
    keys,
    q_batch,
    q_head,
    source_batch,
    source_head,
    key_head,
    key_row,
    logits,
    strength,
    HEAD_SIZE: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Logits of attention and similarity [B, query_heads + heads, keys] and strength [B, keys], float32.

    q, v_source: the source's row of query and value, [d] per head at (b * batch + h * head) * d.
    k, v: [d] per key and head at ((b * heads * keys) + h * key_head + s * key_row) * d.
    """
    image = tl.program_id(1).to(tl.int64)
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    d = tl.arange(0, BLOCK_D)
    group = query_heads // heads
    k += image * heads * keys * HEAD_SIZE
    v += image * heads * keys * HEAD_SIZE
    logits += image * (query_heads + heads) * keys
    total = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for first in range(0, heads, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        row = (h[:, None] * key_head + s[None, :] * key_row) * HEAD_SIZE  # [BLOCK_H, BLOCK_S]
        present = (h[:, None] < heads) & (s[None, :] < keys)
        inside = present[:, :, None] & (d < HEAD_SIZE)[None, None, :]
        value = tl.load(v + row[:, :, None] + d[None, None, :], mask=inside, other=0.0).to(tl.float32)
        key = tl.load(k + row[:, :, None] + d[None, None, :], mask=inside, other=0.0).to(tl.float32)
        total += tl.sum(value, 0)

        lane = (h < heads)[:, None] & (d < HEAD_SIZE)[None, :]
        at = ((image * source_batch + h * source_head) * HEAD_SIZE)[:, None] + d[None, :]
        source = tl.load(v_source + at, mask=lane, other=0.0).to(tl.float32) * semantic_scale.to(
            tl.float32, bitcast=True
        )
        similarity = tl.sum(value * source[:, None, :], 2)
        tl.store(logits + (query_heads + h)[:, None] * keys + s[None, :], similarity, mask=present)
        for member in range(group):
            query_head = h * group + member
            at = ((image * q_batch + query_head * q_head) * HEAD_SIZE)[:, None] + d[None, :]
            query = tl.load(q + at, mask=lane, other=0.0).to(tl.float32) * logit_scale.to(tl.float32, bitcast=True)
            attention = tl.sum(key * query[:, None, :], 2)
            tl.store(logits + query_head[:, None] * keys + s[None, :], attention, mask=present)
    mean = total / heads
    tl.store(strength + image * keys + s, tl.sum(tl.abs(mean), 1), mask=s < keys)


@triton.jit
def _share(
    logits, valid, heads, keys, source_in_keys, n, MASKED: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr
):
    """Head-mean softmax over `keys`, the source dropped if it is the first of them, divided by its sum: at n [BLOCK_N].

    Numbers of any size stay apart: per head the largest remaining logit is factored out, then the largest head.
    """
    share = tl.zeros_like(n).to(tl.float32)
    total = 0.0
    top = -float("inf")
    s = source_in_keys + n
    exists = _exists(valid, s, keys, MASKED)
    for first in range(0, heads, BLOCK_H):
        h = first + tl.arange(0, BLOCK_H)
        row = logits + h[:, None] * keys
        present = (h < heads)[:, None]
        best = tl.full([BLOCK_H], -float("inf"), tl.float32)
        rest = tl.zeros([BLOCK_H], tl.float32)
        for start in range(source_in_keys, keys, BLOCK_S):
            j = start + tl.arange(0, BLOCK_S)
            x = tl.load(row + j[None, :], mask=present & _exists(valid, j, keys, MASKED)[None, :], other=-float("inf"))
            greatest = tl.maximum(best, tl.max(x, 1))
            level = _finite(greatest)
            rest = rest * tl.exp(best - level) + tl.sum(tl.exp(x - level[:, None]), 1)
            best = greatest
        source = tl.load(logits + h * keys, mask=h < heads * source_in_keys, other=-float("inf"))
        most = _finite(tl.maximum(best, source))
        mass = rest * tl.exp(best - most) + tl.exp(source - most)
        leader = best - most - tl.log(tl.where(mass > 0, mass, 1.0))  # log share of the best row, -inf if there is none
        higher = tl.maximum(top, tl.max(leader, 0))
        level = _finite(higher)
        weight = tl.exp(leader - level)
        x = tl.load(row + s[None, :], mask=present & exists[None, :], other=-float("inf"))
        share = share * tl.exp(top - level) + tl.sum(weight[:, None] * tl.exp(x - _finite(best)[:, None]), 0)
        total = total * tl.exp(top - level) + tl.sum(weight * rest, 0)
        top = higher
    return share / tl.where(total > 0, total, 1.0)


@triton.jit
def _exists(valid, j, keys, MASKED: tl.constexpr):
    """Whether keys j are there: below `keys` and, where MASKED, valid."""
    exists = j < keys
    if MASKED:
        exists = exists & tl.load(valid + j, mask=exists, other=0).to(tl.int1)
    return exists


@triton.jit
def _finite(x):
    """0 for -inf, so that it can be subtracted."""
    return tl.where(x == -float("inf"), 0.0, x)


@triton.jit
def flow_score_combine(
    logits,
    strength,
    running,
    history,
    query_heads,
    heads,
    keys,
    source_in_keys,
    running_batch,
    semantic,
    strengthened,
    running_out,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """running_out [B, keys - source_in_keys] = history * running + (1 - history) * score, float32.

    running: [B, keys - source_in_keys] with running_batch = keys - source_in_keys, or one number for all with 0.
    semantic, strengthened: 0 leaves out that part of the score.
    """
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    image = tl.program_id(1).to(tl.int64)
    _, score = _score(
        logits,
        strength,
        running,
        image,
        n,
        query_heads,
        heads,
        keys,
        source_in_keys,
        semantic,
        strengthened,
        False,
        BLOCK_H,
        BLOCK_S,
    )
    _accumulate(running, running_out, score, image, n, history, keys - source_in_keys, running_batch)


@triton.jit
def flow_score_combine_masked(
    logits,
    strength,
    running,
    key_valid,
    history,
    query_heads,
    heads,
    keys,
    source_in_keys,
    running_batch,
    semantic,
    strengthened,
    running_out,
    entropy_ratio,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """`flow_score_combine` over the keys that exist, and each program's part of the entropy ratio.

    key_valid: [B, keys] bool. Scores of keys that do not exist are 0.
    entropy_ratio: [B, programs] float32; its sum over programs is -sum p ln p / ln n, 1 where n < 2.
    """
    tile = tl.program_id(0)
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    image = tl.program_id(1).to(tl.int64)
    valid = key_valid + image * keys
    p, score = _score(
        logits,
        strength,
        valid,
        image,
        n,
        query_heads,
        heads,
        keys,
        source_in_keys,
        semantic,
        strengthened,
        True,
        BLOCK_H,
        BLOCK_S,
    )
    _accumulate(running, running_out, score, image, n, history, keys - source_in_keys, running_batch)
    count = 0
    for start in range(source_in_keys, keys, BLOCK_S):
        s = start + tl.arange(0, BLOCK_S)
        count += tl.sum(tl.load(valid + s, mask=s < keys, other=0).to(tl.int32), 0)
    entropy = -tl.sum(p * tl.log(tl.where(p > 0, p, 1.0)), 0) / tl.log(tl.maximum(count, 2).to(tl.float32))
    flat = tl.where(tile == 0, 1.0, 0.0)
    tl.store(entropy_ratio + image * tl.num_programs(0) + tile, tl.where(count < 2, flat, entropy))


@triton.jit
def _score(
    logits,
    strength,
    valid,
    image,
    n,
    query_heads,
    heads,
    keys,
    source_in_keys,
    semantic,
    strengthened,
    MASKED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    """Attention's share and the score at n [BLOCK_N]; 0 where there is no such key."""
    logits += image * (query_heads + heads) * keys
    attention = tl.zeros_like(n).to(tl.float32)
    score = attention
    for part in range(0, 1 + semantic):  # attention, similarity
        rows = logits + part * query_heads * keys
        count = tl.where(part == 0, query_heads, heads)
        share = _share(rows, valid, count, keys, source_in_keys, n, MASKED, BLOCK_H, BLOCK_S)
        attention = tl.where(part == 0, share, attention)
        score += share
    if strengthened != 0:
        s = source_in_keys + n
        norm = tl.load(strength + image * keys + s, mask=s < keys, other=0.0)
        score = tl.where(score > 0, score * norm, 0.0)  # rows that do not exist may hold anything
    return attention, score


@triton.jit
def _accumulate(running, running_out, score, image, n, history, scored, running_batch):
    inside = n < scored
    weight = history.to(tl.float32, bitcast=True)
    # Without history nothing is read: it may be -inf, or one number for all, and its weight of 0 is no product.
    before = tl.load(running + image * running_batch + n, mask=n < tl.where(history > 0, scored, 0), other=0.0)
    tl.store(running_out + image * scored + n, weight * before + (1 - weight) * score, mask=inside)
