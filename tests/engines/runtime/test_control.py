"""What ends a request early."""

from __future__ import annotations

import multiprocessing
import threading
from typing import Any

import numpy as np
import pytest

from engines.runtime import control
from engines.runtime.control import LOOK_S, Control
from flowcut.errors import ConfigError, RequestCancelled, RequestTimeout


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Its one element is the time."""
    now = [1000.0]
    monkeypatch.setattr(control, "monotonic", lambda: now[0])
    return now


def test_without_limits_it_never_ends(clock: list[float]) -> None:
    unlimited = Control()
    clock[0] = 1e9
    unlimited.check()
    assert unlimited.left_s() is None
    assert unlimited.wait_s() > 1  # nothing to look for


@pytest.mark.parametrize("timeout_s", [2.5, 3, np.float32(2.5), np.int64(3)])
def test_time_is_up_when_it_is_up(clock: list[float], timeout_s: Any) -> None:
    limited = Control(timeout_s)
    clock[0] += float(timeout_s) - 0.5
    limited.check()
    assert limited.left_s() == limited.wait_s() == 0.5
    clock[0] += 0.5
    with pytest.raises(RequestTimeout, match=r"must be answered within timeout_s=.*, got no answer by then"):
        limited.check()
    clock[0] += 5
    assert (limited.left_s(), limited.wait_s()) == (-5.0, 0.0)


def test_its_event_cancels_it() -> None:
    event = threading.Event()
    watching, other = Control(None, event), Control()
    watching.check()
    assert watching.wait_s() == LOOK_S
    event.set()
    with pytest.raises(RequestCancelled):
        watching.check()
    other.check()


def test_calling_one_off_leaves_others_with_the_same_event_alone() -> None:
    event = threading.Event()
    one, other = Control(None, event), Control(None, event)
    one.call_off()
    with pytest.raises(RequestCancelled):
        one.check()
    other.check()
    assert not event.is_set()


def test_who_is_cancelled_and_late_was_cancelled(clock: list[float]) -> None:
    both = Control(1.0)
    both.call_off()
    clock[0] += 2
    with pytest.raises(RequestCancelled):
        both.check()


@pytest.mark.parametrize("timeout_s", [0, -1, 0.0, float("nan"), float("inf"), 10**400, "3", True, [1], 1j])
def test_a_timeout_is_a_number_of_seconds(timeout_s: Any) -> None:
    with pytest.raises(ConfigError, match="timeout_s must be a number of seconds above 0, or None, got") as caught:
        Control(timeout_s)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cancel", [True, 0, lambda: True, threading.Lock(), multiprocessing.Event])
def test_cancel_is_an_event_of_threading(cancel: Any) -> None:
    with pytest.raises(ConfigError, match=r"cancel must be a threading\.Event or None, got \w+\. Another"):
        Control(None, cancel)
