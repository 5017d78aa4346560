"""The grammar of `flowcut report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowcut.arguments_shared import command


def add_report(commands: Any) -> None:
    parser = command(
        commands,
        "report",
        "show benchmarks as one page of HTML",
        "Latency and speed-up against tokens kept, measured speed-up against the FLOP limit, stages, kept patches, and "
        "accuracy or agreement beside every speed-up. Several directories, of other budgets of one model on one "
        "machine, make curves; what cannot be compared is kept apart. The page is one file that loads nothing.",
        "report, bytes, groups (each with title, directories and lines, each with title and tokens), mismatch, "
        "warnings and missing (pictures that a directory does not have)",
    )
    parser.add_argument(
        "directories",
        type=Path,
        nargs="+",
        metavar="DIR",
        help="what `flowcut bench` wrote, or the engine directory beside it",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("report.html"), metavar="FILE.html", help="the page (default: report.html)"
    )
