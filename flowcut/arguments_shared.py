"""Grammar that several commands share."""

from __future__ import annotations

import argparse
from typing import Any


def command(commands: Any, name: str, summary: str, details: str, keys: str = "") -> argparse.ArgumentParser:
    """A subcommand. `keys` are those of its line of JSON."""
    epilog = f"The last line on stdout is JSON with the keys {keys}." if keys else None
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=summary, description=f"{summary[0].upper()}{summary[1:]}. {details}", epilog=epilog
    )
    parser.set_defaults(command=name)
    parser.add_argument("-v", "--verbose", action="count", default=0, help="log what is done; twice: everything")
    return parser


def add_model(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL",
        help="llava-tiny, llava-1.5-7b, llava-1.5-13b, llava-v1.6-vicuna-7b, llava-v1.6-vicuna-13b, or a directory in "
        "the Hugging Face llava or llava_next format",
    )
    add(
        "--weights",
        choices=["auto", "random"],
        default="auto",
        help="random: seeded weights at MODEL's true geometry, nothing is downloaded (default: auto)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of random weights (default: 0)")
    add(
        "--tokens",
        type=tokens,
        metavar="K",
        help="visual tokens kept per picture, or 'all'; of LLaVA-NeXT, where K is even and less than twice a tile's "
        "patches, half as many of each tile, then as many inside the language model "
        "(default: 11.1%% of the patches, 64 of LLaVA-1.5's 576; 160 of LLaVA-NeXT's 2880)",
    )


def add_llm_tokens(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--llm-tokens",
        type=llm_tokens,
        metavar="N",
        help="LLaVA-1.5: of these, visual tokens kept inside the language model after its second layer, fewer than "
        "--tokens, or 'all' (default: all)",
    )


def add_selector(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--selector",
        metavar="NAME",
        help="what chooses the patches: flowcut; FlowCut less a part, no-history, no-semantic or no-strength; or once, "
        "after the last layer: cls (by that layer's attention alone), grid or random-SEED, which need no picture. "
        "These three take the schedule static only (default: flowcut)",
    )


def llm_tokens(text: str) -> int | None:
    found = tokens(text)
    return None if isinstance(found, str) else found


def tokens(text: str) -> int | str:
    if text == "all":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or 'all', got {text!r}") from None
