"""The pruning step alone: ties, counts, valid rows and independence of images, on hand-made q, k, v."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from references import capped_rule
from torch import Tensor

from flowcut.pruner import Pruner
from flowcut.schedule import Kind, Schedule

PATCHES, TOKENS, LAYERS, HEADS, SIZE = 12, 3, 8, 2, 4  # pruning points 1, 3, 5


def schedule(kind: Kind, counts: tuple[int, ...] = (), selector: str = "flowcut") -> Schedule:
    return Schedule(kind, PATCHES, TOKENS, counts, selector)


SCHEDULES = {
    "adaptive": schedule("adaptive"),
    "static": schedule("static", (9, 7, 3)),
    "masked": schedule("masked", (12, 12, 3)),
    "masked-tight": schedule("masked", (8, 5, 3)),
    "no-history": schedule("masked", (12, 12, 3), "no-history"),
    "no-semantic": schedule("adaptive", (), "no-semantic"),
}


def equal_scores(batch: int = 1) -> Tensor:
    """q, k, v [3, B, H, N+1, d] whose patches all score exactly the same, and whose products are exact."""
    return torch.ones(3, batch, HEADS, PATCHES + 1, SIZE)


def with_strength(strength: list[float], batch: int = 1) -> Tensor:
    """Scores proportional to `strength`: attention is flat, and v only differs where v[0] does not look."""
    qkv = torch.zeros(3, batch, HEADS, PATCHES + 1, SIZE)
    qkv[2, :, :, 1:, 1] = torch.tensor(strength)
    return qkv


def run(schedule: Schedule, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Feed the same q, k, v to every layer; `hidden` of a row is its number, CLS is -1. hidden, kept, counts."""
    batch = qkv.shape[1]
    pruner = Pruner(schedule, LAYERS, batch, torch.device("cpu"))
    hidden = torch.arange(-1, PATCHES)[None, :, None].repeat(batch, 1, 1).float()
    for layer in range(LAYERS - 1):
        rows = (hidden[:, :, 0] + 1).long()[:, None, :, None].expand(-1, HEADS, -1, SIZE)
        q, k, v = (x.gather(2, rows) for x in qkv)
        hidden = pruner.after_layer(layer, q, k, v, hidden)
    kept, counts, _ = pruner.finish()
    return hidden, kept, counts


@pytest.mark.parametrize("name", SCHEDULES)
def test_equal_scores_keep_the_lower_patch_numbers(name: str) -> None:
    hidden, kept, _ = run(SCHEDULES[name], equal_scores())
    assert kept.tolist() == [[0, 1, 2]]
    assert hidden[0, :, 0].tolist() == [-1, 0, 1, 2]


@pytest.mark.parametrize("name", SCHEDULES)
def test_equal_scores_among_others_keep_the_lower_patch_numbers(name: str) -> None:
    strength = [1.0, 2, 1, 2, 1, 2, 1, 9, 1, 2, 1, 2]
    _, kept, _ = run(SCHEDULES[name], with_strength(strength))
    assert kept.tolist() == [[1, 3, 7]]


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_best_stay_in_spatial_order_behind_cls(name: str) -> None:
    strength = [1.0, 5, 9, 2, 3, 4, 5, 6, 0, 1, 8, 7]
    hidden, kept, counts = run(SCHEDULES[name], with_strength(strength))
    assert kept.tolist() == [[2, 10, 11]]
    assert hidden[0, :, 0].tolist() == [-1, 2, 10, 11]
    assert counts[0, 0] == PATCHES
    assert counts[0, LAYERS - 2] == counts[0, LAYERS] == TOKENS


def test_counts_of_static_are_the_schedules_after_each_pruning_point() -> None:
    _, _, counts = run(SCHEDULES["static"], equal_scores())
    assert counts.tolist() == [[12, 12, 9, 9, 7, 7, 3, 3, 3]]


def test_flat_attention_drops_nothing_before_the_last_pruning_point() -> None:
    for kind in ("adaptive", "masked"):
        _, _, counts = run(SCHEDULES[kind], equal_scores())
        assert counts.tolist() == [[12, 12, 12, 12, 12, 12, 3, 3, 3]]


def peaked(batch: int = 1) -> Tensor:
    """CLS looks at one patch only, so the entropy is 0 and the rule drops the most it ever does."""
    qkv = with_strength([float(i) for i in range(PATCHES)], batch)
    qkv[0, :, :, 0], qkv[1, :, :, -1] = 1, 1000
    return qkv


@pytest.mark.parametrize(("name", "capacities"), [("masked", (12, 12)), ("masked-tight", (8, 5))])
def test_masked_keeps_what_the_rule_says_but_no_more_than_the_capacity(name: str, capacities: tuple[int, int]) -> None:
    rule = capped_rule(LAYERS, TOKENS, capacities)
    first = rule(1, PATCHES, 0.0)
    second = rule(3, first, 0.0)
    hidden, kept, counts = run(SCHEDULES[name], peaked())
    assert counts.tolist() == [[12, 12, first, first, second, second, 3, 3, 3]]
    assert kept.tolist() == [[9, 10, 11]]
    assert hidden.isfinite().all()


def test_masked_follows_the_rule_image_by_image() -> None:
    both = torch.cat([equal_scores(), peaked()], 1)
    _, kept, counts = run(SCHEDULES["masked"], both)
    for b, alone in enumerate((equal_scores(), peaked())):
        _, kept_alone, counts_alone = run(SCHEDULES["masked"], alone)
        assert torch.equal(kept[b], kept_alone[0])
        assert torch.equal(counts[b], counts_alone[0])
    assert not torch.equal(counts[0], counts[1])


def test_masked_attends_to_valid_rows_only() -> None:
    pruner = Pruner(SCHEDULES["masked"], LAYERS, 1, torch.device("cpu"))
    q, k, v = peaked()
    hidden = torch.zeros(1, PATCHES + 1, 1)
    before = pruner.attention_mask()
    assert before is not None
    assert before.all()
    hidden = pruner.after_layer(1, q, k, v, hidden)
    mask = pruner.attention_mask()
    assert mask is not None
    _, counts, _ = pruner.finish()
    assert mask.flatten().tolist() == [True] * (int(counts[0, 1]) + 1) + [False] * (PATCHES - int(counts[0, 1]))
    assert counts[0, 1] < PATCHES == hidden.shape[1] - 1


@pytest.mark.parametrize("kind", ["static", "adaptive"])
def test_nothing_is_masked_where_every_row_is_valid(kind: str) -> None:
    assert Pruner(SCHEDULES[kind], LAYERS, 1, torch.device("cpu")).attention_mask() is None


def test_nothing_happens_with_pruning_off() -> None:
    off = Schedule("off", PATCHES, PATCHES)
    hidden, kept, counts = run(off, equal_scores(2))
    assert hidden.shape == (2, PATCHES + 1, 1)
    assert kept.tolist() == [list(range(PATCHES))] * 2
    assert (counts == PATCHES).all()


def test_layers_after_the_budget_is_reached_are_not_scored() -> None:
    """The rest of the layers get a NaN, which any score would carry on."""
    early = schedule("static", (3, 3, 3))
    pruner = Pruner(early, LAYERS, 1, torch.device("cpu"))
    q, k, v = equal_scores()
    hidden = pruner.after_layer(1, q, k, v, torch.zeros(1, PATCHES + 1, 1))
    broken = torch.full((1, HEADS, TOKENS + 1, SIZE), torch.nan)
    assert torch.equal(pruner.after_layer(3, broken, broken, broken, hidden), hidden)


@pytest.mark.parametrize("selector", ["cls", "random-5"])
def test_a_one_shot_selector_reads_the_last_layer_or_none_and_keeps_the_best_of_all(selector: str) -> None:
    """What may not be read is NaN, which any score would carry on."""
    pruner = Pruner(schedule("static", (TOKENS,), selector), LAYERS, 2, torch.device("cpu"))
    hidden = torch.arange(-1, PATCHES)[None, :, None].repeat(2, 1, 1).float()
    broken = torch.full((2, HEADS, PATCHES + 1, SIZE), torch.nan)
    for layer in range(LAYERS - 2):
        assert pruner.after_layer(layer, broken, broken, broken, hidden) is hidden
    q, k = torch.ones(2, 2, HEADS, PATCHES + 1, SIZE)
    k[:, :, 1:] = torch.tensor([1.0, 5, 9, 2, 3, 4, 9, 6, 0, 1, 8, 9])[:, None]
    hidden = pruner.after_layer(LAYERS - 2, *((q, k) if selector == "cls" else (broken, broken)), broken, hidden)
    kept, counts, trace = pruner.finish()
    raw = np.random.PCG64(5).random_raw(PATCHES)
    expected = {"cls": [2, 6, 11], "random-5": sorted(int((raw < x).sum()) for x in raw[-TOKENS:])}
    assert kept.tolist() == [expected[selector]] * 2
    assert hidden[:, 1:, 0].tolist() == kept.tolist()
    assert counts.tolist() == [[PATCHES] * (LAYERS - 1) + [TOKENS] * 2] * 2
    assert [layer for layer, _ in trace] == [LAYERS - 2]


@pytest.mark.parametrize("kind", ["adaptive", "masked"])
def test_without_history_only_the_layers_that_prune_are_read(kind: Kind) -> None:
    counts = (12, 12, 3) if kind == "masked" else ()
    pruner = Pruner(schedule(kind, counts, "no-history"), LAYERS, 1, torch.device("cpu"))
    hidden = torch.zeros(1, PATCHES + 1, 1)
    for layer in range(LAYERS - 1):
        q, k, v = peaked()[:, :, :, : hidden.shape[1]] if layer in (1, 3, 5) else torch.full((3, 1, 1, 1, 1), torch.nan)
        hidden = pruner.after_layer(layer, q, k, v, hidden)
    kept, _, _ = pruner.finish()
    assert kept.shape == (1, TOKENS)


def test_trace_tells_what_each_pruning_point_kept() -> None:
    pruner = Pruner(SCHEDULES["static"], LAYERS, 1, torch.device("cpu"))
    qkv, hidden = with_strength([float(i) for i in range(PATCHES)]), torch.zeros(1, PATCHES + 1, 1)
    for layer, n in ((1, 13), (3, 10), (5, 8)):
        q, k, v = qkv[:, :, :, [0, *range(14 - n, 13)]]
        hidden = pruner.after_layer(layer, q, k, v, hidden)
    trace = pruner.finish()[2]
    assert [(layer, [t.tolist() for t in kept]) for layer, kept in trace] == [
        (1, [list(range(3, 12))]),
        (3, [list(range(5, 12))]),
        (5, [[9, 10, 11]]),
    ]
