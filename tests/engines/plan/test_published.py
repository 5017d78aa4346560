"""Our counts beside the paper's: pieces put together are what graphs count to, and the pair is what they say it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.progress import Progress

from engines.flops import count_model
from engines.plan.published import (
    FIRST,
    NEXT,
    PUBLISHED,
    WAYS,
    Comparison,
    Pieces,
    Way,
    compare,
    count_pieces,
    fit,
    published_name,
)
from engines.plan.settings import PlanSettings
from engines.plan.subject import Subject, find_subject
from flowcut.budget import Budget


def subject(name: str, text: int = 40) -> Subject:
    return find_subject(PlanSettings(name, text_tokens=text))


def compared(name: str) -> Comparison:
    with Progress(disable=True) as progress:
        found = compare(subject(name), progress)
    assert found is not None
    return found


@pytest.fixture(scope="module")
def pieces() -> dict[str, Pieces]:
    budgets = {FIRST: Budget(64), NEXT: Budget(80, 160)}
    return {name: count_pieces(subject(name), budget) for name, budget in budgets.items()}


@pytest.fixture(scope="module")
def first() -> Comparison:
    return compared(FIRST)


@pytest.fixture(scope="module")
def second() -> Comparison:
    return compared(NEXT)


@pytest.mark.parametrize(("text", "budget"), [(83, Budget(576)), (83, Budget(64)), (7, Budget(192))])
def test_pieces_are_what_the_graph_of_that_length_counts_to(
    pieces: dict[str, Pieces], text: int, budget: Budget
) -> None:
    one = subject(FIRST, text)
    _, (decoder,), _ = one.graphs(budget)
    rows = budget.tokens + text
    sizes = {"batch": 1, "images": 1, "sequence": rows}
    causal = count_model(decoder, sizes, causal=True).by_group
    way = Way(vision=False, every_logit=False, causal=True)
    assert pieces[FIRST].total(way, rows, rows, False) == causal["linear"] + causal["attention"]
    every = replace(way, every_logit=True)
    assert pieces[FIRST].total(every, rows, rows, False) == causal["linear"] + causal["attention"] + (
        (rows - 1) * 2 * 4096 * 32064
    )
    masked = (
        count_model(decoder, sizes).by_group["attention"] // (rows + 128) * rows
    )  # of the cache's rows, the prompt's
    pairs = replace(way, causal=False)
    assert pieces[FIRST].total(pairs, rows, rows, False) == causal["linear"] + masked


def test_two_stages_are_what_llava_nexts_graph_counts_to(pieces: dict[str, Pieces]) -> None:
    one, budget = subject(NEXT, 83), Budget(80, 160)
    _, (decoder,), _ = one.graphs(budget)
    sizes = {"batch": 1, "images": 1, "sequence": 483, "pruned_sequence": 243}
    found = count_model(decoder, sizes, causal=True).by_group
    way = Way(vision=False, every_logit=False, causal=True)
    assert pieces[NEXT].total(way, 483, 243, True) == found["linear"] + found["attention"]


def test_pieces_are_a_closed_form(pieces: dict[str, Pieces]) -> None:
    layer = 2 * (4 * 4096**2 + 3 * 4096 * 11008)
    for found in pieces.values():
        assert (found.layers, found.layer, found.head, found.pair) == (32, layer, 2 * 4096 * 32064, 4 * 4096)
    tower = 4 * 1024**2 + 2 * 1024 * 4096
    outside = 576 * (1024 * 3 * 14**2 + 1024 * 4096 + 4096**2)
    one = 2 * (23 * 577 * tower + outside) + 23 * 4 * 577**2 * 1024
    assert pieces[FIRST].vision[0] == one
    assert pieces[NEXT].vision[0] == 5 * one


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_length_is_the_nearest(pieces: dict[str, Pieces], way: Way) -> None:
    one = pieces[NEXT]
    for tflops in (4.29, 31.03):
        n = one.length(way, tflops, pruned=False)
        off = [abs(one.total(way, m, m, False) - tflops * 1e12) for m in (n - 1, n, n + 1)]
        assert off[1] == min(off)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_text_tokens_are_those_that_suit_a_way_best(pieces: dict[str, Pieces], way: Way) -> None:
    found = fit(pieces[FIRST], way)
    for text in range(max(1, found.text_tokens - 5), found.text_tokens + 6):
        before = pieces[FIRST].total(way, 576 + text, 576 + text, False) / 1e12
        after = pieces[FIRST].total(way, 64 + text, 64 + text, True) / 1e12
        assert max(abs(before - 8.82), abs(after - 1.95)) >= found.off


def test_one_way_gives_llava_15s_pair_to_the_last_digit(first: Comparison) -> None:
    """Without vision, logits of every position, causal attention, 83 text tokens."""
    fitting = [way for way in first.ways if way["within_rounding"]]
    assert len(first.ways) == 8
    assert [(w["vision"], w["logits"], w["attention"], w["text_tokens"]) for w in fitting] == [
        (False, "every position", "causal", 83)
    ]
    assert (round(fitting[0]["before_tflops"], 2), round(fitting[0]["after_tflops"], 2)) == (8.82, 1.95)
    assert first.best.way == Way(False, True, True)


def test_the_pair_alone_implies_as_many_weights_as_the_decoder_has(first: Comparison) -> None:
    """(576 + t) a = 8.82e12 and (64 + t) a = 1.95e12."""
    a, t = first.implied["flops_per_token"], first.implied["text_tokens"]
    assert (576 + t) * a == pytest.approx(8.82e12)
    assert (64 + t) * a == pytest.approx(1.95e12)
    weights = first.counted["layer_weights"] + first.counted["head_weights"]
    assert weights < first.implied["weights"] < 1.02 * weights, "attention is the rest"


def test_steps_lead_from_our_count_to_the_published_one(first: Comparison) -> None:
    one = subject(FIRST)
    rows = [one.row(one.baseline), one.row(Budget(64))]
    ours = [sum(row.costs[stage].flops for stage in ("vision", "prefill")) / 1e12 for row in rows]
    assert [first.steps[0][name] for name in ("before_tflops", "after_tflops")] == ours
    last = first.steps[-1]
    assert last["before_tflops"] == pytest.approx(8.82, abs=0.005)
    assert last["after_tflops"] == pytest.approx(1.95, abs=0.005)


def test_2880_tokens_through_every_layer_are_more_than_published(second: Comparison) -> None:
    assert second.counted["layers_for_visual_tflops"] == pytest.approx(2 * 6.476e9 * 2880 / 1e12, rel=1e-3)
    assert second.counted["layers_for_visual_tflops"] > PUBLISHED[NEXT].before
    assert second.implied["weights"] < second.counted["layer_weights"]


def test_before_pruning_the_pair_is_a_picture_with_padding(second: Comparison) -> None:
    """As LLaVA-1.5's pair is counted, some 2165 visual tokens: a photograph of 3 to 2 has 2144 or 2160."""
    best = next(way for way in second.ways if way["text_tokens"] == second.best.text_tokens and not way["vision"])
    assert best["visual_before"] == 2165
    lengths = {tuple(each["picture"]): each["visual_before"] for each in second.pictures}
    assert lengths[640, 427] < best["visual_before"] < lengths[640, 480]
    assert second.steps[-1]["before_tflops"] == pytest.approx(31.03, abs=0.005)


def test_what_is_left_over_after_pruning_is_told(second: Comparison) -> None:
    assert second.steps[-1]["after_tflops"] - 4.29 == pytest.approx(-0.866, abs=0.001)
    assert all(way["two_stage_off_tflops"] < 0 for way in second.ways if not way["vision"])
    assert all(way["two_stage_off_tflops"] > 0 for way in second.ways if way["vision"])


def test_other_models_stand_beside_nothing() -> None:
    for name, layers in (("llava-tiny", None), ("llava-1.5-13b", None), (FIRST, 31)):
        one = find_subject(PlanSettings(name, decoder_layers=layers))
        assert published_name(one.config) is None
        with Progress(disable=True) as progress:
            assert compare(one, progress) is None
    assert published_name(subject(FIRST).config) == FIRST
    assert published_name(subject(NEXT).config) == NEXT
