"""The timed part: subjects in turns, stage by stage. Knows neither engines nor devices."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from engines.bench.subjects import STAGES, Output, Subject, Work
from engines.bench.timing import turns
from engines.runtime.clock import Clock


@dataclass
class Runs:
    """One subject's at one batch size.

    Attributes:
        stages: milliseconds, one for each round: STAGES, "total" of these, and "decode_per_token" if there are steps.
        device_ms: what the device's own events measured, by stage, one for each round.
        output: of its first run, a warm-up if there is one.
    """

    stages: dict[str, list[float]] = field(default_factory=dict)
    device_ms: dict[str, list[float]] = field(default_factory=dict)
    output: Output | None = None

    def add(self, clock: Clock, output: Output, steps: int) -> None:
        """A round that counts."""
        stages = {stage: clock.stages[stage] for stage in STAGES}
        stages["total"] = sum(stages.values())
        if steps:
            stages["decode_per_token"] = clock.stages["decode"] / steps
        for kept, found in ((self.stages, stages), (self.device_ms, output.device_ms)):
            for stage, ms in found.items():
                kept.setdefault(stage, []).append(ms)


def measure(
    subjects: Sequence[Subject],
    work: Work,
    steps: int,
    warmup: int,
    repeats: int,
    reading: Callable[[], float],
    advance: Callable[[], None],
) -> list[Runs]:
    """Each subject's runs, in the order of `subjects`.

    Args:
        reading: a clock in seconds that waits for the device, see engines.bench.timing.synchronised.
        advance: called behind each run, warm-up or not, outside of what is timed.
    """
    found = [Runs() for _ in subjects]
    for subject in subjects:
        subject.prepare(work)
    with _no_collection():
        for number, index in turns(len(subjects), warmup, repeats):
            clock = Clock(reading)
            output = subjects[index].run(work, clock, steps)
            runs = found[index]
            runs.output = runs.output or output
            if number >= 0:
                runs.add(clock, output, steps)
            del output
            gc.collect()
            advance()
    return found


@contextmanager
def _no_collection() -> Iterator[None]:
    """Python's garbage is collected between runs, not within: visiting torch's objects takes a while."""
    before = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
