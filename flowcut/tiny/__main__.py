"""`make tiny`: train llava-tiny from nothing."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from flowcut.arguments import Parser
from flowcut.deps import require
from flowcut.errors import FlowCutError


def main() -> int:
    arguments = _parser().parse_args()
    fast = arguments.scale == "full" and shutil.which(os.environ.get("CXX", "g++")) is not None
    work = arguments.work or Path("build") / f"tiny-{arguments.scale}"
    out = arguments.out or work / "llava-tiny"
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    if work.exists() and not work.is_dir():
        print(f"flowcut.tiny: work must be a directory, got the file {work}. Name another.", file=sys.stderr)
        return 1
    started = time.monotonic()
    try:
        for library in ("torch", "safetensors"):
            require(library, extra="torch")
        from flowcut.tiny.stages import train

        with Progress(*columns, console=Console(stderr=True)) as progress:
            history = train(arguments.scale, work, out, progress, fast)
    except (FlowCutError, OSError) as error:
        print(f"flowcut.tiny: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("flowcut.tiny: interrupted. The same command goes on from here.", file=sys.stderr)
        return 1
    print(json.dumps({"checkpoint": str(out), "seconds": round(time.monotonic() - started, 1), **history}))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="python -m flowcut.tiny",
        description="Train llava-tiny from nothing: draw its scenes, teach its tower, then projector and decoder. "
        "Stops and goes on wherever it is interrupted: everything is in --work.",
        epilog="The last line on stdout is JSON with the keys checkpoint, seconds, recipe, tower and decoder; the last "
        "two are the curves.",
    )
    add = parser.add_argument
    add("--scale", choices=["full", "smoke"], default="full", help="smoke: seconds, learns little (default: full)")
    add("--work", type=Path, metavar="DIR", help="scenes and states of training (default: build/tiny-<scale>)")
    add("--out", type=Path, metavar="DIR", help="the checkpoint to write (default: <work>/llava-tiny)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
