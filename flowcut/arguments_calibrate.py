"""The grammar of `flowcut calibrate`: one command below it for each thing that pictures decide."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from flowcut.arguments_shared import add_llm_tokens, add_model, add_selector, command


def add_calibrate(commands: Any) -> None:
    """`calibrate`, whose own commands set `command` to both words."""
    parser = commands.add_parser(
        "calibrate",
        help="choose an engine's constants from pictures",
        description="Choose an engine's constants from pictures.",
    )
    below = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_schedule(below)
    _add_quantize(below)


def _add_schedule(commands: Any) -> None:
    parser = command(
        commands,
        "schedule",
        "choose how many patches each pruning point keeps",
        "Runs the adaptive schedule, in PyTorch, over the pictures. One half of them gives the constants of a static "
        "schedule and the capacities of a masked one, the most that was seen; on the other half both are compared with "
        "adaptive. Of LLaVA-NeXT every tile is a sample. Run again after an interruption, it continues. The same "
        "inputs give the same bytes.",
        "schedule, masked_schedule, model, note, tokens, tokens_per_tile, selector, choose, counts, capacities, "
        "pictures, samples, skipped, agreement, flops_share and clamp_rate",
    )
    parser.set_defaults(command="calibrate schedule")
    add_model(parser)
    _add_images(parser)
    add = parser.add_argument
    add(
        "--out",
        type=Path,
        required=True,
        metavar="FILE.json",
        help="the static schedule; the masked one is written beside it as FILE.masked.json",
    )
    add(
        "--choose",
        default="median",
        metavar="RULE",
        help="median, p90 or max of adaptive's counts; or flops=X: what agrees best, of the schedules tried, with at "
        "most the share X of the unpruned tower's operations (default: median)",
    )
    add_selector(parser)


def _add_quantize(commands: Any) -> None:
    parser = command(
        commands,
        "quantize",
        "measure what int4 and fp8 need to know of MODEL",
        "Runs MODEL in float32, in PyTorch, over the pictures, each with a question whose answer is not generated: the "
        "vision tower, then the decoder layer by layer. int4 gets a scale for every channel (AWQ), fp8 the largest "
        "input of every linear layer. Run again after an interruption, it continues. The same inputs give the same "
        "bytes.",
        "calibration, sha256, bytes, model, note, precision, pictures, skipped, tokens, ranges, scales and error",
    )
    parser.set_defaults(command="calibrate quantize")
    add_model(parser)
    add_llm_tokens(parser)
    _add_images(parser, limit=32)
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="FILE.safetensors", help="the file that --calibration takes")
    add(
        "--precision",
        choices=["int4", "fp8", "all"],
        default="all",
        help="what to measure for; fp8 alone is faster, as no scales are searched for (default: all)",
    )
    add("--schedule", default="static", help="adaptive, static, masked or a FILE.json (default: static)")
    add(
        "--question",
        action="append",
        default=[],
        metavar="TEXT",
        help="put into the model's template; may be repeated, pictures take them in turn (default: five general ones)",
    )
    add("--decoder-layers", type=int, metavar="N", help="measure only the first N decoder layers")


def _add_images(parser: argparse.ArgumentParser, limit: int | None = None) -> None:
    add = parser.add_argument
    add("--images", type=Path, required=True, metavar="DIR", help="a directory of pictures, with its folders")
    add(
        "--limit",
        type=int,
        default=limit,
        metavar="N",
        help=f"use the first N pictures by name (default: {limit or 'all'})",
    )
    add("--threads", type=int, metavar="N", help="of the CPU (default: the library's choice)")
