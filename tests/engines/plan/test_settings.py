"""What a user may ask of a plan."""

from __future__ import annotations

from typing import Any

import pytest

from engines.plan.settings import PlanSettings
from flowcut.errors import ConfigError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"batch": 0}, "batch must be an integer of at least 1, got 0"),
        ({"batch": True}, "batch must be an integer of at least 1, got True"),
        ({"text_tokens": 0}, "text_tokens must be an integer of at least 1, got 0"),
        ({"new_tokens": -1}, "new_tokens must be an integer of at least 1, got -1"),
        ({"target_ms": 0.0}, "target_ms must be a number above 0, got 0.0"),
        ({"target_ms": -3}, "target_ms must be a number above 0, got -3"),
        ({"target_ms": float("nan")}, "target_ms must be a number above 0, got nan"),
        ({"target_ms": float("inf")}, "target_ms must be a number above 0, got inf"),
        ({"precision": "fp4"}, "precision must be one of fp32, fp16, .*, got 'fp4'"),
        ({"vision_precision": "half"}, "vision_precision must be one of fp32, .*, got 'half'"),
        *[
            ({"picture": text}, "picture must be WxH in pixels, as 640x480, got ")
            for text in ("", "640", "640x", "x480", "0x480", "640x480x3", "-1x5", "1e3x5", "9999999x5", (640,), (0, 1))
        ],
    ],
)
def test_what_cannot_be_planned_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        PlanSettings("llava-tiny", **given)


@pytest.mark.parametrize("given", ["640x480", "640X480", " 640x480 ", (640, 480)])
def test_a_picture_is_its_width_and_height(given: str | tuple[int, int]) -> None:
    assert PlanSettings("llava-tiny", picture=given).size == (640, 480)


def test_the_default_picture_has_as_many_tiles_as_can_be() -> None:
    assert PlanSettings("llava-tiny").size == (672, 672)
