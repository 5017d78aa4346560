"""The grammar of what is done with an engine directory: `flowcut run`, `verify` and `inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flowcut.arguments_shared import command

SCENE = Path(__file__).parent / "assets" / "example" / "scene.png"
QUESTION = "What color is the circle?"
"""What is asked about which picture where nobody says."""


def add_run(commands: Any) -> None:
    parser = command(
        commands,
        "run",
        "ask an engine a question about a picture",
        "Prints the answer, what was kept and how long each stage took.",
        "answer, token_ids, ended, finish, kept, prompt_tokens, pruned_prompt_tokens, latency_ms, model, weights, "
        "note, tokens, llm_tokens, selector, schedule, precision, vision_precision, backend and built_for; "
        "LLaVA-NeXT's also has grids, each picture's rows and columns of tiles: kept numbers the base tile's P patches "
        "first, then P + row * W + column of the tiles' patches, W a row; after several questions there is earlier, "
        "the answers to all but the last, which is timed",
    )
    _add_directory(parser)
    parser.add_argument(
        "--backend",
        choices=["auto", "rtx", "trt", "ort"],
        default="auto",
        help="ort runs everywhere; rtx and trt need a GPU and a directory built for them (default: auto = the "
        "directory's own, ort where that cannot run)",
    )
    _add_sampling(parser)
    add_question(parser, chat=True).add_argument(
        "--profile",
        action="store_true",
        help="also show where the timed runs spent their time, node by node, which slows them, and what memory is "
        "used; the line of JSON then has profile and memory too",
    )


def add_verify(commands: Any) -> None:
    parser = command(
        commands,
        "verify",
        "compare torch, ONNX Runtime and TensorRT on an engine's graphs",
        "TensorRT is compared where there is a GPU. Names, shapes, types, kept patches and values, with tolerances.",
        "directory, model, note, precision, inputs, tolerance, rows and ok",
    )
    _add_directory(parser)
    parser.add_argument(
        "--checkpoint", metavar="MODEL", help="the alias or directory it was built from (default: as the manifest says)"
    )


def add_inspect(commands: Any) -> None:
    parser = command(
        commands,
        "inspect",
        "say what an engine directory is",
        "Compares names, kinds and sizes of its files with the manifest, at once whatever the size; a difference is "
        "exit code 1.",
        "manifest, differences and ok; differences are those of files, a line each; with --check also checks, each "
        "with name, verdict (ok, differs or not applicable here) and detail",
    )
    _add_directory(parser)
    parser.add_argument(
        "--check",
        action="store_true",
        help="check all that is checked before an engine is loaded on this machine: the hash of every file, the "
        "library's version, the GPU; exit code 0 where all is well, 1 with one line that says what differs",
    )


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("answer").add_argument
    add(
        "--temperature",
        type=float,
        default=0.0,
        metavar="T",
        help="draw tokens by their logits divided by T; 0: the likeliest, whatever --top-k, --top-p and --seed say "
        "(default: 0)",
    )
    add("--top-k", type=int, metavar="K", help="draw among the K likeliest (default: all)")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw among the likeliest that add up to P (default: 1)")
    add(
        "--repetition-penalty",
        type=float,
        default=1.0,
        metavar="X",
        help="above 1: tokens of the prompt and of the answer so far become rarer (default: 1)",
    )
    add("--seed", type=int, metavar="N", help="of the draws, to draw the same again (default: other draws every time)")
    add(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the answer where this would begin; may be repeated",
    )
    add("--stream", action="store_true", help="print the answer as it comes, before all else")


def add_question(parser: argparse.ArgumentParser, chat: bool = False) -> Any:
    """`chat`: whether there may be several questions, one after the other."""
    group = parser.add_argument_group("question")
    add = group.add_argument
    add("--image", type=Path, nargs="+", action="extend", metavar="FILE", help="pictures (default: a bundled one)")
    text = group.add_mutually_exclusive_group()
    text.add_argument(
        "--question",
        action="append" if chat else "store",
        metavar="TEXT",
        help="put into the model's chat template"
        + "; repeated: the turns of one chat about the same pictures" * chat
        + f" (default: {QUESTION})",
    )
    text.add_argument("--prompt", metavar="TEXT", help="taken as it is, with one <image> per picture")
    add("--answer-tokens", type=int, metavar="N", help="longest answer shown (default: 32)")
    add("--repeats", type=int, default=5, metavar="N", help="timed runs after a warm-up, for at most 20 s (default: 5)")
    add("--threads", type=int, metavar="N", help="of ONNX Runtime on the CPU (default: its own choice)")
    return group


def _add_directory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="ENGINE_DIR", help="what `flowcut engine` wrote")
