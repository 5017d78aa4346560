"""The grammar of `flowcut plan`."""

from __future__ import annotations

import argparse
import textwrap
from typing import Any, get_args

from flowcut.arguments_shared import add_llm_tokens, add_selector, command, tokens
from flowcut.config import Precision

PRECISIONS = get_args(Precision)
EXAMPLES = """examples:
  flowcut plan llava-1.5-7b --tokens 64,128,192 --gpu A100 H100
  flowcut plan llava-1.5-7b --precision int4 --gpu "RTX 4090" --target-ms 20
  flowcut plan llava-v1.6-vicuna-7b --tokens 160 --picture 640x480
  flowcut plan build/llava-tiny-16-fp16-rtx"""


class _Flat(argparse.Action):
    """Lists, one after the other."""

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: Any = None) -> None:
        before = getattr(namespace, self.dest)
        setattr(namespace, self.dest, [*before, *(each for several in values for each in several)])


def add_plan(commands: Any) -> None:
    parser = command(
        commands,
        "plan",
        "predict what pruning saves on a GPU, before anything is built",
        "Counts operations and bytes of vision, prefill and a decode step from the graphs that would be exported, for "
        "some budgets and for the unpruned model, and says what GPUs would need for them at best, by their makers' "
        "figures. All times are predicted, none is measured. No weight is read and nothing is downloaded. LLaVA-1.5-7B "
        "and LLaVA-NeXT-7B, whole, are set beside the paper's TFLOPs too.",
        "label, model, note, decoder_layers, precision, vision_precision, schedule, selector, batch, text_tokens, "
        "new_tokens, picture, tiles, launch_us, budgets, gpus, target_ms, published and notes; docs/plan.md says what "
        "is in each",
    )
    parser.description, keys = (textwrap.fill(text or "", 79) for text in (parser.description, parser.epilog))
    parser.epilog, parser.formatter_class = f"{EXAMPLES}\n\n{keys}", argparse.RawDescriptionHelpFormatter
    _add_subject(parser)
    _add_prompt(parser)
    _add_machine(parser)


def _add_subject(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "model",
        metavar="MODEL|ENGINE_DIR",
        help="as `flowcut engine` takes it; or what that wrote, which is planned as it was built",
    )
    add(
        "--tokens",
        type=budgets,
        nargs="+",
        action=_Flat,
        metavar="K[,K]",
        default=[],
        help="visual tokens kept per picture, or 'all', as of `flowcut engine`; several are planned beside each other, "
        "and all tokens always (default: 11.1%% of the patches, LLaVA-NeXT's 5.6%%)",
    )
    add_llm_tokens(parser)
    add("--schedule", help="static, masked or a FILE.json (default: static)")
    add_selector(parser)
    add(
        "--precision",
        choices=PRECISIONS,
        help="of the decoder, and of the vision tower but for int4, whose tower is int8. int8 and int4 are multiplied "
        "in float16; fp8 at twice that rate; fp32 outside the tensor cores (default: fp16)",
    )
    add("--vision-precision", choices=PRECISIONS, help="of the vision tower and the projector (default: see above)")
    add("--decoder-layers", type=int, metavar="N", help="plan only the first N decoder layers")
    add("--weights", choices=["auto", "random"], default="auto", help="taken as of `flowcut engine`, and not read")
    add("--seed", type=int, default=0, metavar="N", help="likewise")


def _add_prompt(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("prompt").add_argument
    add("--batch", type=int, default=1, metavar="N", help="prompts at once, a picture each (default: 1)")
    add("--text-tokens", type=int, default=40, metavar="N", help="of each, beside its picture's (default: 40)")
    add("--picture", metavar="WxH", help="its size in pixels, which LLaVA-NeXT cuts into tiles (default: 672x672)")
    add("--new-tokens", type=int, default=128, metavar="N", help="longest answer, for the cache (default: 128)")


def _add_machine(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("prediction").add_argument
    add(
        "--gpu",
        nargs="+",
        action="extend",
        default=[],
        metavar="NAME",
        help="A100, H100, H200, L40S, 'RTX 4090', 'RTX 5090' or Orin (default: all that have the precision)",
    )
    add(
        "--target-ms",
        type=float,
        metavar="X",
        help="find the most tokens whose predicted vision and prefill take at most X ms together",
    )


def budgets(text: str) -> list[int | str]:
    """64,128 or all."""
    return [tokens(part) for part in text.split(",")]
