"""The memory that one engine takes to answer, in a process that does nothing else.

    python -m engines.bench.peak '{"directory": "build/..", "backend": "ort", ..}'

A process that holds pruned and baseline at once cannot tell them apart, and a peak never falls.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from engines.bench.settings import BenchSettings
from engines.bench.subjects import EngineSubject
from engines.bench.work import make_prompt, make_works
from engines.runtime.clock import Clock
from engines.runtime.engine import load_engine
from engines.runtime.memory import process_bytes
from flowcut.errors import EngineError, FlowCutError

REFUSED = 3
"""Exit code of a child whose last line on stderr is what a user can mend."""
STEPS = 2
"""Decode steps, after which all that an answer needs has been touched but rows of the cache."""


@dataclass(frozen=True)
class Peak:
    """Bytes.

    Attributes:
        process: most that the process had in memory, libraries and Python included; None where the system does not
            tell. Weights that are mapped from a file count once they are read.
        device: of a GPU's memory, what the sessions say they hold; None on a CPU.
    """

    process: int | None
    device: int | None


def peak(directory: Path, settings: BenchSettings) -> Peak:
    """Of one answer of a few tokens, at the greatest batch of `settings`.

    Raises:
        EngineError: the process failed, or what it said if that is for the user to mend.
    """
    asked = {
        "directory": str(directory),
        "backend": settings.backend,
        "threads": settings.threads,
        "exact": settings.exact,
        "pictures": [str(each) for each in settings.pictures],
        "question": settings.question,
        "prompt_tokens": settings.prompt_tokens,
        "batch": max(settings.batches),
    }
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "engines.bench.peak", json.dumps(asked)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, env=variables)
    if done.returncode == REFUSED:
        raise EngineError(done.stderr.strip().splitlines()[-1])
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise EngineError(
            f"peak memory of {directory} must be measured in a process of its own, got: {last.removesuffix('.')}. "
            "Leave it out with --no-memory."
        )
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def main(text: str) -> None:
    """In the child: the last line of stdout is a Peak."""
    asked = json.loads(text)
    options = {"threads": asked["threads"], "exact": asked["exact"], "picture_cache_mb": 0, "concurrency": 1}
    engine = load_engine(asked["directory"], asked["backend"], **options)
    prompt = make_prompt(engine.reader.tokenizer, engine.template, asked["question"], asked["prompt_tokens"])
    with make_works([Path(each) for each in asked["pictures"]], prompt, [asked["batch"]]) as works:
        EngineSubject("", "", engine).run(works[0], Clock(), min(STEPS, engine.manifest.limits.max_new_tokens - 1))
    held = sum(sum(kinds.values()) - kinds.get("pinned", 0) for kinds in engine.memory().sessions.values())
    found = Peak(process_bytes()[1], held if engine.backend != "ort" else None)
    sys.stdout.write(json.dumps(asdict(found)) + "\n")


if __name__ == "__main__":
    try:
        main(sys.argv[1])
    except FlowCutError as error:
        sys.stderr.write(f"{' '.join(str(error).split())}\n")
        sys.exit(REFUSED)
