"""The grammar of what is done with an engine directory: `flowcut run`, `verify` and `inspect`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flowcut.arguments_shared import command

QUESTION = "What color is the circle?"


def add_run(commands: Any) -> None:
    parser = command(
        commands,
        "run",
        "ask an engine a question about a picture",
        "Answers greedily and prints what was kept and how long each stage took.",
        "answer, token_ids, ended, kept, prompt_tokens, pruned_prompt_tokens, latency_ms, model, weights, note, "
        "tokens, llm_tokens, selector, schedule, precision, vision_precision, backend and built_for; LLaVA-NeXT's also "
        "has grids, each picture's rows and columns of tiles: kept numbers the base tile's P patches first, then "
        "P + row * W + column of the tiles' patches, W a row",
    )
    _add_directory(parser)
    parser.add_argument(
        "--backend",
        choices=["auto", "rtx", "trt", "ort"],
        default="auto",
        help="ort runs everywhere; rtx and trt need a GPU and a directory built for them (default: auto = the "
        "directory's own, ort where that cannot run)",
    )
    add_question(parser)


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
        "Compares its files with the manifest's hashes; a difference is exit code 1.",
        "manifest, differences and ok",
    )
    _add_directory(parser)


def add_question(parser: argparse.ArgumentParser) -> Any:
    group = parser.add_argument_group("question")
    add = group.add_argument
    add("--image", type=Path, nargs="+", action="extend", metavar="FILE", help="pictures (default: a bundled one)")
    text = group.add_mutually_exclusive_group()
    text.add_argument("--question", metavar="TEXT", help=f"put into the model's template (default: {QUESTION})")
    text.add_argument("--prompt", metavar="TEXT", help="taken as it is, with one <image> per picture")
    add("--answer-tokens", type=int, metavar="N", help="longest answer shown (default: 32)")
    add("--repeats", type=int, default=5, metavar="N", help="timed runs after a warm-up, for at most 20 s (default: 5)")
    add("--threads", type=int, metavar="N", help="of ONNX Runtime on the CPU (default: its own choice)")
    return group


def _add_directory(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", type=Path, metavar="ENGINE_DIR", help="what `flowcut engine` wrote")
