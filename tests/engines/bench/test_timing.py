"""Timing hygiene, on a fake clock and a fake device: synchronised readings, turns, warm-up, and order statistics."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest

from engines.bench.measure import Runs, measure
from engines.bench.subjects import Output, Work
from engines.bench.timing import Ratio, Summary, synchronised, turns
from engines.runtime.clock import Clock

WORK = Work((), ("<image>",))


@dataclass
class FakeDevice:
    """Time that passes only where somebody waits. What is launched takes no time until it is waited for, as on a GPU.

    log: "sync", "read" and what ran, in order.
    """

    now: float = 0.0
    pending: float = 0.0
    log: list[str] = field(default_factory=list)

    def launch(self, seconds: float) -> None:
        self.pending += seconds

    def synchronize(self) -> None:
        self.log.append("sync")
        self.now += self.pending
        self.pending = 0.0

    def read(self) -> float:
        self.log.append("read")
        return self.now


@dataclass
class FakeSubject:
    """Launches its stages, of which each round's seconds are told by `cost(round)`."""

    name: str
    device: FakeDevice
    cost: Callable[[int], float]
    title: str = ""
    rounds: int = 0
    prepared: int = 0

    def prepare(self, work: Work) -> None:
        self.prepared += 1

    def run(self, work: Work, clock: Clock, steps: int) -> Output:
        self.device.log.append(self.name)
        seconds = self.cost(self.rounds)
        self.rounds += 1
        for stage, share in (("preprocess", 1), ("vision", 2), ("prefill", 4)):
            self.device.launch(share * seconds)
            clock.stop(stage)
        for _ in range(steps):
            self.device.launch(8 * seconds)
        if steps:
            clock.stop("decode")
        return Output(np.zeros((1, 4), np.float32), [], [1], [2], device_ms={"vision": 7.0})


def run(
    device: FakeDevice, costs: dict[str, Callable[[int], float]], warmup: int, repeats: int, steps: int = 2
) -> list[Runs]:
    subjects = [FakeSubject(name, device, cost) for name, cost in costs.items()]
    reading = synchronised(device.synchronize, device.read)
    return measure(subjects, WORK, steps, warmup, repeats, reading, lambda: None)


def test_a_stage_takes_what_its_work_on_the_device_takes() -> None:
    found = run(FakeDevice(), {"a": lambda _: 0.001}, warmup=0, repeats=3)[0].stages
    assert found["preprocess"] == pytest.approx([1.0] * 3)
    assert found["vision"] == pytest.approx([2.0] * 3)
    assert found["prefill"] == pytest.approx([4.0] * 3)
    assert found["total"] == pytest.approx([7.0] * 3)
    assert found["decode_per_token"] == pytest.approx([8.0] * 3)


def test_without_waiting_the_same_work_would_seem_to_take_no_time() -> None:
    """The fake has teeth: an unsynchronised clock sees nothing of what was launched."""
    device = FakeDevice()
    subject = FakeSubject("a", device, lambda _: 0.001)
    runs = measure([subject], WORK, 2, 0, 3, device.read, lambda: None)[0]
    assert runs.stages["total"] == [0.0] * 3


def test_every_reading_comes_right_behind_a_wait() -> None:
    device = FakeDevice()
    run(device, {"a": lambda _: 0.001, "b": lambda _: 0.002}, warmup=1, repeats=2)
    reads = [i for i, event in enumerate(device.log) if event == "read"]
    assert len(reads) == 2 * 3 * 5  # subjects, rounds; begin and four stages
    assert all(device.log[i - 1] == "sync" for i in reads)


def test_a_run_begins_with_a_waited_for_reading_so_that_none_pays_for_another() -> None:
    """What one subject leaves on the device is not the next one's."""
    device = FakeDevice()
    subjects = [FakeSubject("a", device, lambda _: 0.001), FakeSubject("b", device, lambda _: 0.001)]
    leave = iter([5.0, 0.0] * 10)
    found = measure(
        subjects, WORK, 0, 0, 4, synchronised(device.synchronize, device.read), lambda: device.launch(next(leave))
    )
    assert found[1].stages["preprocess"] == pytest.approx([1.0] * 4)


def test_warm_up_is_not_counted() -> None:
    slow_at_first: Callable[[int], float] = lambda number: 1.0 if number < 3 else 0.001  # noqa: E731
    found = run(FakeDevice(), {"a": slow_at_first, "b": slow_at_first}, warmup=3, repeats=5)
    for runs in found:
        assert Summary.of(runs.stages["total"]).max == pytest.approx(7.0)
        assert len(runs.stages["total"]) == len(runs.device_ms["vision"]) == 5


def test_one_round_less_of_warm_up_would_be_seen() -> None:
    slow_at_first: Callable[[int], float] = lambda number: 1.0 if number < 3 else 0.001  # noqa: E731
    found = run(FakeDevice(), {"a": slow_at_first}, warmup=2, repeats=5)[0]
    assert Summary.of(found.stages["total"]).max == pytest.approx(7000.0)


def test_two_subjects_take_turns_and_every_other_round_goes_backwards() -> None:
    device = FakeDevice()
    run(device, {"a": lambda _: 0.0, "b": lambda _: 0.0}, warmup=1, repeats=3)
    order = "".join(event for event in device.log if event in "ab")
    assert order == "ab" + "ba" + "ab" + "ba"


@pytest.mark.parametrize("subjects", [3, 4, 7])
def test_of_more_none_follows_itself_and_each_follows_every_other(subjects: int) -> None:
    """What ran last has its weights in the caches: none may have that for itself more often than another."""
    order = [subject for _, subject in turns(subjects, 0, 200)]
    after = np.zeros((subjects, subjects), int)
    for before, behind in pairwise(order):
        after[before, behind] += 1
    assert np.diag(after).tolist() == [0] * subjects
    others = after[~np.eye(subjects, dtype=bool)]
    assert others.min() > 0.4 * others.mean()


def test_garbage_is_collected_between_runs_and_not_within() -> None:
    device, within, before = FakeDevice(), list[bool](), gc.isenabled()
    run(device, {"a": lambda _: within.append(gc.isenabled()) or 0.0}, warmup=0, repeats=3)
    assert (within, gc.isenabled()) == ([False] * 3, before)


def test_of_few_rounds_the_interval_is_the_range() -> None:
    ratio = Ratio.of([1.0, 1.0, 1.0], [2.0, 4.0, 3.0])
    assert (ratio.ratio, ratio.low, ratio.high) == (3.0, 2.0, 4.0)


@pytest.mark.parametrize(("subjects", "warmup", "repeats"), [(1, 0, 1), (2, 3, 20), (5, 1, 4)])
def test_each_round_has_each_subject_once(subjects: int, warmup: int, repeats: int) -> None:
    found = list(turns(subjects, warmup, repeats))
    assert len(found) == len(set(found)) == subjects * (warmup + repeats)
    rounds = [number for number, _ in found]
    assert rounds == sorted(rounds)
    assert rounds[0] == -warmup
    assert rounds[-1] == repeats - 1


def test_what_slows_the_machine_for_a_while_leaves_the_ratio_alone() -> None:
    """The second half of the rounds is ten times as slow for both."""
    drift: Callable[[int], float] = lambda number: 1.0 if number < 10 else 10.0  # noqa: E731
    a, b = run(FakeDevice(), {"a": drift, "b": lambda n: 3 * drift(n)}, warmup=0, repeats=20)
    ratio = Ratio.of(a.stages["total"], b.stages["total"])
    assert (ratio.ratio, ratio.low, ratio.high, ratio.n) == pytest.approx((3.0, 3.0, 3.0, 20))


@pytest.mark.parametrize("n", [2, 5, 10, 101])
def test_percentiles_are_those_of_pythons_statistics(n: int) -> None:
    values = np.random.default_rng(n).lognormal(size=n).tolist()
    hundredths = statistics.quantiles(values, n=100, method="inclusive")
    found = Summary.of(values)
    assert found.median == pytest.approx(statistics.median(values))
    assert found.p90 == pytest.approx(hundredths[89])
    assert found.p99 == pytest.approx(hundredths[98])
    assert found.spread == pytest.approx((hundredths[74] - hundredths[24]) / found.median)
    assert (found.min, found.max, found.n) == (min(values), max(values), n)


def test_p90_of_ten_known_values() -> None:
    """By hand: the place 0.9 * 9 = 8.1 lies a tenth of the way from the ninth value to the tenth."""
    assert Summary.of([10, 1, 2, 3, 4, 5, 6, 7, 8, 9]).p90 == pytest.approx(9 + 0.1 * (10 - 9))


def test_one_run_is_its_own_summary() -> None:
    assert Summary.of([3.0]) == Summary(3.0, 3.0, 3.0, 3.0, 3.0, 1, 0.0)


def test_a_wide_spread_is_said() -> None:
    assert Summary.of([1.0, 1.0, 1.2, 1.2]).wide
    assert not Summary.of([1.0, 1.01, 1.02, 1.03]).wide


def test_the_interval_holds_the_ratio_and_narrows_with_more_rounds() -> None:
    rng = np.random.default_rng(0)
    few, many = (Ratio.of(rng.normal(1, 0.05, n).tolist(), rng.normal(2, 0.1, n).tolist()) for n in (8, 400))
    for ratio in (few, many):
        assert ratio.low <= ratio.ratio <= ratio.high
    assert many.high - many.low < (few.high - few.low) / 2
    assert many.low < 2.0 < many.high


def test_the_share_of_the_flop_ratio() -> None:
    ratio = Ratio.of([1.0, 1.0], [4.0, 4.0], flop_ratio=5.0)
    assert ratio.share_of_flop_ratio == pytest.approx(0.8)
    assert Ratio.of([1.0], [4.0]).to_dict()["share_of_flop_ratio"] is None
