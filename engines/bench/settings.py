"""What to measure, as a user says it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from engines.backends import CHOICES
from engines.options import Options
from flowcut.arguments_run import QUESTION, SCENE
from flowcut.config import is_integer
from flowcut.errors import ConfigError, EngineError

GRAPHS = ("both", "on", "off")
SUFFIX = ".bench"


@dataclass(frozen=True)
class BenchSettings:
    """Attributes:
    directory: the engine directory.
    baseline: another to compare it with, unpruned as a rule; None: none.
    backend: as load_engine takes it, for both.
    batches: prompts at once, one after the other.
    pictures: each prompt's; more prompts than pictures are asked about marked copies.
    question: put into the model's template.
    prompt_tokens: the question is lengthened until the prompt has so many beside the picture's; None: as it is.
    repeats, warmup: rounds that count, and rounds before them.
    new_tokens: of an answer, so one decode step less.
    threads: of the CPU; None: all cores.
    peers: measure transformers, eager PyTorch and ONNX Runtime as well.
    checkpoint: what the directory was built from, for agreement and peers; None: as its manifest says.
    compare: drawn scenes on which, besides `pictures`, kept patches and first tokens are compared.
    scenes: of llava-tiny's test set, to count right answers; 0: none.
    cuda_graphs: on a GPU, start decode steps with CUDA graphs, without, or measure both, which loads engines twice.
    profile: say at the end which ops take the time.
    exact: see engines.options.Options.
    allow_mismatch: compare with a baseline of another model or precision.
    memory: measure peak memory, in a process for each.
    out: directory for the results; None: the engine directory's name with SUFFIX.
    """

    directory: Path
    baseline: Path | None = None
    backend: str = "auto"
    batches: tuple[int, ...] = (1,)
    pictures: tuple[Path, ...] = (SCENE,)
    question: str = QUESTION
    prompt_tokens: int | None = None
    repeats: int = 20
    warmup: int = 3
    new_tokens: int = 16
    threads: int | None = None
    peers: bool = False
    checkpoint: str | None = None
    compare: int = 8
    scenes: int = 0
    cuda_graphs: Literal["both", "on", "off"] = "on"
    profile: bool = False
    exact: bool = False
    allow_mismatch: bool = False
    memory: bool = True
    out: Path | None = None

    def __post_init__(self) -> None:
        least = {"repeats": 1, "warmup": 0, "new_tokens": 1, "compare": 0, "scenes": 0}
        least |= {name: 1 for name in ("threads", "prompt_tokens") if getattr(self, name) is not None}
        for name, lowest in least.items():
            _check_number(name, getattr(self, name), lowest)
        for batch in self.batches:
            _check_number("batch", batch, 1)
        if not self.batches or len(set(self.batches)) < len(self.batches):
            raise ConfigError(f"batch must be one number or several different ones, got {list(self.batches)}.")
        if self.backend not in CHOICES:
            raise EngineError(f"backend must be one of {', '.join(CHOICES)}, got {self.backend!r}.")
        if self.cuda_graphs not in GRAPHS:
            raise ConfigError(f"cuda_graphs must be one of {', '.join(GRAPHS)}, got {self.cuda_graphs!r}.")
        Options(threads=self.threads)  # which knows how many there may be
        if not self.pictures:
            raise ConfigError("image must be at least one picture, got none.")

    @property
    def results(self) -> Path:
        """The directory for the results. An engine directory is sealed, so they lie beside it."""
        return results_of(self.directory) if self.out is None else self.out


def results_of(engine: Path) -> Path:
    """Where the results of an engine directory lie unless told otherwise: beside it, or beside what a link leads to; in
    the user's words where these lead there."""
    whole = engine.resolve()
    folder = engine.parent if engine.parent.resolve() == whole.parent and engine.name != ".." else whole.parent
    return folder / (whole.name + SUFFIX)


def _check_number(name: str, value: object, least: int) -> None:
    if not is_integer(value) or value < least:
        raise ConfigError(f"{name} must be a whole number, at least {least}, got {value!r}.")
