"""The grammar of `flowcut bench`."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path
from typing import Any

from flowcut.arguments_run import QUESTION
from flowcut.arguments_shared import command

EXAMPLES = """examples:
  flowcut engine llava-tiny && flowcut engine llava-tiny --tokens all
  flowcut bench build/llava-tiny-16-fp16-rtx --baseline build/llava-tiny-144-fp16-rtx --scenes 50
  flowcut bench build/llava-tiny-16-fp16-rtx --batch 1,4 --prompt-tokens 60 --peers"""


def add_bench(commands: Any) -> None:
    parser = command(
        commands,
        "bench",
        "measure prefill latency, beside an unpruned baseline",
        "Both engines take turns in this process; warm-up rounds are not counted, and a clock is read when the device "
        "has finished. Tables, and in a directory bench.json, bench.md, bench.svg, bench.png and kept.png.",
        "schema, model, backend, weights, pruned, baseline, peers, speedup (vision, prefill and total), comparisons, "
        "agreement, accuracy, mismatch, warnings, machine and settings; docs/bench.md says what is in each",
    )
    parser.description, keys = (textwrap.fill(text or "", 79) for text in (parser.description, parser.epilog))
    parser.epilog, parser.formatter_class = f"{EXAMPLES}\n\n{keys}", argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("directory", type=Path, metavar="ENGINE_DIR", help="what `flowcut engine` wrote")
    add("--baseline", type=Path, metavar="ENGINE_DIR", help="to compare with: the same model with --tokens all")
    add(
        "--allow-mismatch",
        action="store_true",
        help="compare with a baseline of another model or precision; every output then says so",
    )
    add(
        "--backend",
        choices=["auto", "rtx", "trt", "ort"],
        default="auto",
        help="of both; rtx and trt need a GPU (default: auto = the directory's own, ort where that cannot run)",
    )
    _add_work(parser)
    _add_timing(parser)
    _add_facts(parser)
    add(
        "--out",
        type=Path,
        metavar="DIR",
        help="directory for the results, new or of an earlier benchmark (default: ENGINE_DIR.bench beside it)",
    )


def _add_work(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("work").add_argument
    add("--batch", type=numbers, default=(1,), metavar="N[,N]", help="prompts at once, a picture each (default: 1)")
    add("--image", type=Path, nargs="+", action="extend", metavar="FILE", help="pictures (default: a bundled one)")
    add("--question", default=QUESTION, metavar="TEXT", help=f"put into the model's template (default: {QUESTION})")
    add(
        "--prompt-tokens",
        type=int,
        metavar="N",
        help="lengthen the question until the prompt has exactly N tokens beside the picture's (default: as it is)",
    )
    add("--new-tokens", type=int, default=16, metavar="N", help="length of an answer, whatever ends it (default: 16)")


def _add_timing(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("timing").add_argument
    add("--repeats", type=int, default=20, metavar="N", help="rounds that count (default: 20)")
    add("--warmup", type=int, default=3, metavar="N", help="rounds before them (default: 3)")
    add("--threads", type=int, metavar="N", help="of the CPU (default: all cores)")
    add(
        "--cuda-graphs",
        choices=["both", "on", "off"],
        default="on",
        help="on a GPU: decode steps as CUDA graphs, kernel by kernel, or both in turns, for which engines are loaded "
        "twice (default: on)",
    )
    add(
        "--exact",
        action="store_true",
        help="on a CPU: multiply int8 and int4 weights by activations as they are, several times slower",
    )
    add("--peers", action="store_true", help="also transformers (sdpa), this project's eager PyTorch, ONNX Runtime")


def _add_facts(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what stands beside the times").add_argument
    add("--compare", type=int, default=8, metavar="N", help="drawn scenes on which agreement is measured (default: 8)")
    add("--scenes", type=int, default=0, metavar="N", help="count right answers about llava-tiny's first N test scenes")
    add("--checkpoint", metavar="MODEL", help="what the engine was built from (default: as its manifest says)")
    add("--profile", action="store_true", help="also which kinds of nodes take the time, in runs of their own")
    add("--no-memory", dest="memory", action="store_false", help="do not measure peak memory, which loads engines anew")


def numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or several, as 1,4,8, got {text!r}") from None
