"""How an engine directory is run: what a user may set without building again."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from flowcut.config import is_integer
from flowcut.errors import ConfigError

MOST_THREADS = 64
"""Unless there are more cores. ONNX Runtime starts as many as it is told: a thousand take minutes."""


@dataclass(frozen=True)
class Options:
    """Of engines.load_engine, which takes each by its name.

    Attributes:
        threads: of ONNX Runtime on the CPU, for one graph at a time; None leaves it to choose: the physical cores, to
            each of which it ties one thread. With a number they go wherever the system puts them: `taskset` says where
            they may.
        spin: on the CPU, threads that have no work wait for more without letting go of their core, though only while a
            graph runs. False is for cores that are shared with others: it takes less of them and is slower.
        exact: on the CPU, multiply int8 and int4 weights by activations as they are, as TensorRT does. ONNX Runtime
            rounds these to int8 too, unless told not to, and is several times as fast.
        concurrency: requests that have their KV cache at once; on a GPU all of their memory is allocated when the
            engine is loaded, but for the contexts and CUDA graphs of decode steps: the first two steps of each batch
            size in each place make them. Two overlap the copies of the next with the work of the present.
        waiting: requests that may wait for one of these to end; one more is refused with QueueFull.
        picture_cache_mb: for visual tokens of pictures already seen, in MB of 10**6 bytes, so that a second question
            about a picture does not run vision; 0 turns it off.
        cuda_graphs: on a GPU, start a decode step as one CUDA graph instead of kernel by kernel.
        profile: measure every layer, which slows all of them (see Session.layer_times).
    """

    threads: int | None = None
    spin: bool = True
    exact: bool = False
    concurrency: int = 2
    waiting: int = 256
    picture_cache_mb: int = 64
    cuda_graphs: bool = True
    profile: bool = False

    @staticmethod
    def make(given: Mapping[str, Any]) -> Options:
        """Options by their names.

        Raises:
            ConfigError: also for a name that none of them has.
        """
        known = [field.name for field in fields(Options)]
        if unknown := sorted(given.keys() - set(known)):
            raise ConfigError(f"options must be of {', '.join(known)}, got {', '.join(unknown)}.")
        return Options(**given)

    def __post_init__(self) -> None:
        least = {"threads": 1, "concurrency": 1, "waiting": 0, "picture_cache_mb": 0}
        for name, lowest in least.items():
            value = getattr(self, name)
            if value is None and name == "threads":
                continue
            if not is_integer(value):
                raise ConfigError(f"{name} must be a whole number, at least {lowest}, got {value!r}.")
            if value < lowest:
                raise ConfigError(f"{name} must be at least {lowest}, got {value!r}.")
        cores = os.cpu_count() or 1
        if self.threads is not None and self.threads > max(MOST_THREADS, cores):
            raise ConfigError(
                f"threads must be at most {max(MOST_THREADS, cores)}, got {self.threads} (here are {cores} cores)."
            )
        for name in ("spin", "exact", "cuda_graphs", "profile"):
            if not isinstance(value := getattr(self, name), bool):
                raise ConfigError(f"{name} must be True or False, got {value!r}.")
