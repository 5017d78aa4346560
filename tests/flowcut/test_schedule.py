"""Schedules: the counts of the closed form, files, bounds."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import references
from hypothesis import given
from hypothesis import strategies as st

from flowcut.checkpoint import random_weights
from flowcut.config import LlavaConfig, TextConfig, VisionConfig
from flowcut.errors import ConfigError
from flowcut.fingerprint import vision_sha256
from flowcut.schedule import (
    Schedule,
    check_tokens,
    closed_form,
    default_tokens,
    drop_count,
    layers_left,
    make_schedule,
    pruning_points,
)

LLAVA = VisionConfig()  # CLIP-L/14-336
TINY = VisionConfig(64, 128, 12, 4, 56, 7)

# (N - 64) / sqrt(left) * (1 - 0.81) by hand, for LLaVA-1.5's 576 patches: left, N before, drop rounded, N after
LLAVA_BY_HAND = [
    (20, 576, 22, 554),  # 21.75
    (18, 554, 22, 532),  # 21.94
    (16, 532, 22, 510),  # 22.23
    (14, 510, 23, 487),  # 22.65
    (12, 487, 23, 464),  # 23.20
    (10, 464, 24, 440),  # 24.03
    (8, 440, 25, 415),  # 25.26
    (6, 415, 27, 388),  # 27.23
    (4, 388, 31, 357),  # 30.78
    (2, 357, 39, 318),  # 39.36
    (0, 318, 254, 64),
]


def write(path: Path, data: Any) -> str:
    path.write_text(json.dumps(data), encoding="utf-8")
    return str(path)


def test_llava_is_pruned_after_every_other_layer_up_to_21() -> None:
    assert pruning_points(24) == [1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21]
    assert [layers_left(24, i) for i in (1, 20, 21)] == [20, 1, 0]


@pytest.mark.parametrize(("layers", "points"), [(3, [0]), (4, [1]), (5, [0, 2]), (10, [1, 3, 5, 7]), (2, [])])
def test_the_last_layer_that_counts_is_always_a_pruning_point(layers: int, points: list[int]) -> None:
    assert pruning_points(layers) == points


@pytest.mark.parametrize(("left", "before", "drop", "after"), LLAVA_BY_HAND)
def test_drop_count_is_the_rule_by_hand(left: int, before: int, drop: int, after: int) -> None:
    assert drop_count(before, 64, left, 0.9) == drop == before - after


def test_closed_form_of_llava_is_the_table_by_hand() -> None:
    assert closed_form(LLAVA, 64) == tuple(row[3] for row in LLAVA_BY_HAND)
    assert closed_form(LLAVA, 64) == (554, 532, 510, 487, 464, 440, 415, 388, 357, 318, 64)


def test_half_a_patch_rounds_to_even() -> None:
    assert drop_count(12, 2, 1, 0.5) == 8  # 10 * 0.75 = 7.5
    assert drop_count(8, 2, 1, 0.5) == 4  # 6 * 0.75 = 4.5


def test_drop_count_never_goes_below_the_budget_or_beyond_one_patch() -> None:
    assert drop_count(20, 5, 1, 0.0) == 15
    assert drop_count(20, 5, 1, 1.0) == 0
    assert drop_count(1, 1, 2, 0.0) == 0


@given(
    layers=st.integers(3, 40),
    grid=st.integers(1, 30),
    share=st.floats(0, 1, exclude_max=True),
)
def test_counts_fall_and_end_at_the_budget(layers: int, grid: int, share: float) -> None:
    vision = VisionConfig(64, 128, layers, 4, 7 * grid, 7)
    tokens = 1 + int(share * vision.patches)
    counts = closed_form(vision, tokens)
    assert len(counts) == len(references.spec_points(layers)) == len(pruning_points(layers))
    assert counts[-1] == tokens
    assert all(a >= b for a, b in pairwise((vision.patches, *counts)))


@given(patches=st.integers(1, 600), surplus=st.integers(0, 600), left=st.integers(1, 40), e=st.floats(0, 1))
def test_drop_count_agrees_with_the_reference_rule(patches: int, surplus: int, left: int, e: float) -> None:
    keep = references.adaptive_rule(left + 3, patches)(0, patches + surplus, e)
    assert patches + surplus - drop_count(patches + surplus, patches, left, e) == keep


@pytest.mark.parametrize(
    ("spec", "counts"), [("adaptive", ()), ("static", (60, 56, 51, 45, 8)), ("masked", (64, 64, 64, 64, 8))]
)
def test_bare_names(spec: str, counts: tuple[int, ...]) -> None:
    schedule = make_schedule(spec, TINY, 8)
    assert schedule == Schedule(spec, 64, 8, counts)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["no-history", "no-semantic", "no-strength"])
@pytest.mark.parametrize("spec", ["adaptive", "static", "masked"])
def test_an_ablation_is_pruned_where_flowcut_is(spec: str, name: str) -> None:
    schedule = make_schedule(spec, TINY, 8, name)
    assert schedule == replace(make_schedule(spec, TINY, 8), selector=name)
    assert schedule.points(12) == pruning_points(12) == [1, 3, 5, 7, 9]
    assert list(schedule.scored_layers(12)) == ([1, 3, 5, 7, 9] if name == "no-history" else list(range(10)))


@pytest.mark.parametrize("name", ["cls", "grid", "random-3"])
def test_a_one_shot_selector_has_one_point_after_the_last_layer_before_hidden_state_minus_2(name: str) -> None:
    schedule = make_schedule("static", TINY, 8, name)
    assert schedule == Schedule("static", 64, 8, (8,), name)
    assert schedule.points(12) == list(schedule.scored_layers(12)) == [10]
    assert schedule.points(24) == [22]


@pytest.mark.parametrize("spec", ["adaptive", "masked"])
@pytest.mark.parametrize("name", ["cls", "grid", "random"])
def test_a_one_shot_selector_has_no_count_that_follows_the_data(name: str, spec: str) -> None:
    rule = rf"schedule must be static with the selector {name}.* once.* got '{spec}'\. Ask for static, or"
    with pytest.raises(ConfigError, match=rule):
        make_schedule(spec, TINY, 8, name)
    with pytest.raises(ConfigError, match=r"schedule\.counts must be \[8\] with the selector .*got \[60, 8\]"):
        Schedule("static", 64, 8, (60, 8), name)


@pytest.mark.parametrize("name", ["no-history", "cls", "grid"])
@pytest.mark.parametrize("spec", ["adaptive", "static", "masked"])
def test_all_tokens_are_pruned_by_no_selector(spec: str, name: str) -> None:
    assert make_schedule(spec, TINY, 64, name) == Schedule("off", 64, 64, (), name)


def test_a_selector_has_one_spelling() -> None:
    assert make_schedule("static", TINY, 8, "random").selector == "random-0"
    assert Schedule.from_dict({**GOOD, "counts": [8], "selector": "random-01"}).selector == "random-1"


def test_a_file_without_a_selector_is_flowcuts(tmp_path: Path) -> None:
    file = write(tmp_path / "schedule.json", GOOD)
    assert make_schedule(file, TINY, 8) == make_schedule(file, TINY, 8, "flowcut")
    assert make_schedule(file, TINY, 8).to_dict() == {**GOOD, "selector": "flowcut"}


def test_a_file_says_its_selector_unless_another_is_asked_for(tmp_path: Path) -> None:
    file = write(tmp_path / "schedule.json", make_schedule("static", TINY, 8, "random-4").to_dict())
    assert make_schedule(file, TINY, 8) == make_schedule(file, TINY, 8, "random-04")
    assert make_schedule(file, TINY, 8).selector == "random-4"
    with pytest.raises(ConfigError, match=r"'selector': 'flowcut'}, got .*'selector': 'random-4'}.*--selector"):
        make_schedule(file, TINY, 8, "flowcut")
    with pytest.raises(ConfigError, match="selector must be one of"):
        make_schedule(file, TINY, 8, "clever")


@pytest.mark.parametrize("spec", ["adaptive", "static", "masked"])
def test_nothing_is_pruned_when_tokens_equals_patches(spec: str) -> None:
    assert make_schedule(spec, TINY, 64) == Schedule("off", 64, 64)


def test_default_is_64_of_llavas_576() -> None:
    assert default_tokens(576) == 64
    assert default_tokens(64) == 7
    assert default_tokens(1) == 1


@pytest.mark.parametrize("spec", ["adaptive", "static", "masked"])
def test_survives_json(spec: str, tmp_path: Path) -> None:
    schedule = make_schedule(spec, TINY, 8)
    file = write(tmp_path / "schedule.json", schedule.to_dict())
    assert make_schedule(file, TINY, 8) == schedule


def test_off_survives_json() -> None:
    off = Schedule("off", 64, 64)
    assert Schedule.from_dict(json.loads(json.dumps(off.to_dict()))) == off


@pytest.mark.parametrize("tokens", [0, -1, 65, True, 8.0, "8"])
def test_tokens_outside_the_patches_are_refused_with_the_bounds(tokens: Any) -> None:
    with pytest.raises(ConfigError, match=r"^tokens must be in 1\.\.64 .*, got "):
        check_tokens(tokens, 64)
    with pytest.raises(ConfigError, match=r"tokens must be in 1\.\.64"):
        make_schedule("static", TINY, tokens)


@pytest.mark.parametrize(
    ("vision", "tokens", "shown"),
    [
        (LLAVA, 8, ["576", "64", "11", "5"]),
        (TINY, 16, ["'tokens': 16", "'tokens': 8"]),
        (replace(TINY, num_hidden_layers=10), 8, ["'pruning points': 4", "'pruning points': 5"]),
    ],
    ids=["patches", "tokens", "layers"],
)
def test_a_file_for_another_geometry_is_refused_with_both_values(
    vision: VisionConfig, tokens: int, shown: list[str], tmp_path: Path
) -> None:
    file = write(tmp_path / "schedule.json", make_schedule("static", TINY, 8).to_dict())
    with pytest.raises(ConfigError) as error:
        make_schedule(file, vision, tokens)
    assert all(text in str(error.value) for text in (file, *shown))
    assert "\n" not in str(error.value)


GOOD = {"kind": "static", "patches": 64, "tokens": 8, "counts": [60, 56, 51, 45, 8]}


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"kind": "dynamic"}, "schedule.kind"),
        ({"kind": ["static"]}, "schedule.kind"),
        ({"kind": "off", "counts": []}, "schedule.kind"),
        ({"kind": "adaptive"}, "schedule.counts"),
        ({"counts": []}, "schedule.counts"),
        ({"counts": [60, 61, 51, 45, 8]}, "schedule.counts must fall"),
        ({"counts": [65, 56, 51, 43, 8]}, "schedule.counts must fall"),
        ({"counts": [60, 56, 51, 43, 9]}, "schedule.counts must fall"),
        ({"counts": [60, 56, 51, 43.5, 8]}, "integers"),
        ({"counts": [60, 56, True, 43, 8]}, "integers"),
        ({"counts": "abc"}, "integers"),
        ({"counts": None}, "integers"),
        ({"tokens": "8"}, "integers"),
        ({"tokens": 0}, "tokens must be in"),
        ({"patches": None}, "integers"),
        ({"extra": 1}, "keys"),
        ({"selector": "clever"}, "selector must be one of flowcut, .*got 'clever'"),
        ({"selector": None}, "selector must be one of flowcut, .*got None"),
        ({"selector": ["cls"]}, "selector must be one of flowcut, .*got"),
        ({"selector": "cls"}, r"schedule.counts must be \[8\]"),
    ],
    ids=str,
)
def test_bad_files_are_refused_naming_the_field(change: dict[str, Any], field: str, tmp_path: Path) -> None:
    file = write(tmp_path / "schedule.json", {**GOOD, **change})
    with pytest.raises(ConfigError, match=field) as error:
        make_schedule(file, TINY, 8)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "3", "null", '{"kind": "static"}'])
def test_files_that_are_no_schedule_are_refused(content: str, tmp_path: Path) -> None:
    path = tmp_path / "schedule.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match="schedule"):
        make_schedule(str(path), TINY, 8)


def calibrated(**change: Any) -> dict[str, Any]:
    """A schedule file that says what it was calibrated on."""
    return {**GOOD, "calibration": {"geometry": asdict(TINY), "vision_sha256": "f" * 64, "agreement": {}} | change}


def test_what_a_file_was_calibrated_on_is_no_part_of_the_schedule(tmp_path: Path) -> None:
    schedule = make_schedule(write(tmp_path / "schedule.json", calibrated()), TINY, 8)
    assert schedule.to_dict() == {**GOOD, "selector": "flowcut"}
    assert Schedule.from_dict(calibrated()) == schedule


def test_a_file_calibrated_on_another_geometry_is_refused_with_both_values(tmp_path: Path) -> None:
    file = write(tmp_path / "schedule.json", calibrated())
    other = replace(TINY, hidden_size=128, layer_norm_eps=1e-6)
    values = r"for {'hidden_size': 128, 'layer_norm_eps': 1e-06}, got {'hidden_size': 64, 'layer_norm_eps': 1e-05}"
    with pytest.raises(ConfigError, match=values):
        make_schedule(file, other, 8)


def test_a_file_calibrated_on_another_checkpoint_is_refused_with_both_hashes(tmp_path: Path) -> None:
    config = LlavaConfig(TINY, TextConfig(64, 128, 1, 4, 4, 64), image_token_id=1)
    weights = random_weights(config)
    own = vision_sha256(weights)
    with pytest.raises(ConfigError, match=rf"this checkpoint, .* sha256 {own[:12]}, got one for ffffffffffff\."):
        make_schedule(write(tmp_path / "schedule.json", calibrated()), TINY, 8, weights=weights)
    right = write(tmp_path / "schedule.json", calibrated(vision_sha256=own))
    assert make_schedule(right, TINY, 8, weights=weights).counts == tuple(GOOD["counts"])
    with pytest.raises(ConfigError, match=own[:12]):
        make_schedule(right, TINY, 8, weights=random_weights(config, seed=1))


def test_weights_are_read_for_calibrated_files_only(tmp_path: Path) -> None:
    class Unread:
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(name)

    unread: Any = Unread()
    for spec in ("static", "masked", "adaptive", write(tmp_path / "schedule.json", GOOD)):
        make_schedule(spec, TINY, 8, weights=unread)
    with pytest.raises(AssertionError):
        make_schedule(write(tmp_path / "schedule.json", calibrated()), TINY, 8, weights=unread)


@pytest.mark.parametrize("origin", [None, [], {}, {"geometry": asdict(TINY)}, {"geometry": 1, "vision_sha256": ""}])
def test_a_calibration_that_does_not_say_its_origin_is_refused(origin: Any, tmp_path: Path) -> None:
    file = write(tmp_path / "schedule.json", {**GOOD, "calibration": origin})
    with pytest.raises(ConfigError, match=r"must say geometry and vision_sha256 in its calibration"):
        make_schedule(file, TINY, 8)


def test_an_absent_file_and_an_unknown_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"readable JSON"):
        make_schedule(str(tmp_path / "absent.json"), TINY, 8)
    with pytest.raises(ConfigError, match=r"adaptive, static, masked or a \.json file, got 'fast'"):
        make_schedule("fast", TINY, 8)
