"""Which requests are answered together: whatever a batch is, the engine was built for it, and nobody waits for ever."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from engines.runtime.ticket import is_full, together
from flowcut.contract import Limits

LIMITS = st.builds(Limits, max_batch=st.integers(1, 6), max_images=st.integers(1, 6))


def jobs(counts: list[int]) -> list[Any]:
    """By age, with so many pictures each."""
    return [SimpleNamespace(number=i, request=SimpleNamespace(pictures=(0,) * n)) for i, n in enumerate(counts)]


@given(LIMITS, st.data())
def test_a_batch_holds_the_oldest_and_all_later_ones_that_fit(limits: Limits, data: st.DataObject) -> None:
    counts = data.draw(st.lists(st.integers(0, limits.max_images), max_size=12))
    batch = [job.number for job in together(jobs(counts), limits)]
    assert batch == sorted(batch)
    assert batch[:1] == [0][: len(counts)]
    assert len(batch) <= limits.max_batch
    assert sum(counts[i] for i in batch) <= limits.max_images
    for left in set(range(len(counts))) - set(batch):
        before = [i for i in batch if i < left]
        room = len(before) < limits.max_batch and sum(counts[i] for i in before) + counts[left] <= limits.max_images
        assert not room, "one that had room when its turn came was left behind"


@given(LIMITS, st.data())
def test_everybody_has_a_turn_before_as_many_batches_as_were_ahead(limits: Limits, data: st.DataObject) -> None:
    line = jobs(data.draw(st.lists(st.integers(0, limits.max_images), max_size=12)))
    for turn in range(1, len(line) + 1):
        gone = together(line, limits)
        assert all(job.number >= turn for job in line if job not in gone)
        line = [job for job in line if job not in gone]
    assert line == []


@given(LIMITS, st.data())
def test_to_a_full_batch_no_picture_can_be_added(limits: Limits, data: st.DataObject) -> None:
    line = jobs(data.draw(st.lists(st.integers(0, limits.max_images), max_size=12)))
    batch = together(line, limits)
    newcomer = jobs([1])
    assert is_full(batch, limits) == (together(batch + newcomer, limits) == batch)
