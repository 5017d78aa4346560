"""What the libraries say, as far as it is kept."""

from __future__ import annotations

import logging

from engines.listeners import KEPT, BuildLog


def test_a_log_keeps_the_last_messages_of_each_kind() -> None:
    log = BuildLog()
    for i in range(3 * KEPT):
        log.add(logging.ERROR, f"error {i}")
        log.add(logging.WARNING, f"warning {i}")
    assert list(log.errors) == [f"error {i}" for i in range(2 * KEPT, 3 * KEPT)]
    assert list(log.warnings) == [f"warning {i}" for i in range(2 * KEPT, 3 * KEPT)]


def test_reasons_are_taken_once() -> None:
    log = BuildLog()
    log.add(logging.ERROR, "first.")
    log.add(logging.ERROR, "CUDA driver version is insufficient")
    assert (log.reasons(), log.take(), log.take()) == ("first", "first", "no reason was logged")
    log.add(logging.ERROR, "second")
    assert log.take() == "second"
