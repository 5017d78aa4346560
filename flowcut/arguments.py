"""The command line's grammar: commands, options and what their help says. Knows none of the code that runs them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NoReturn, get_args

import flowcut
from flowcut.arguments_bench import add_bench
from flowcut.arguments_calibrate import add_calibrate
from flowcut.arguments_plan import add_plan
from flowcut.arguments_report import add_report
from flowcut.arguments_run import add_inspect, add_question, add_run, add_verify
from flowcut.arguments_shared import add_llm_tokens, add_model, add_selector, command, tokens
from flowcut.config import Precision

PRECISIONS = get_args(Precision)
EXAMPLES = """examples:
  flowcut engine llava-tiny --ask
  flowcut engine llava-1.5-7b --weights random --decoder-layers 2 --backend ort
  flowcut run build/llava-tiny-16-fp16-rtx --image cat.jpg --question "What is this?"
  flowcut prune llava-tiny --image cat.jpg --tokens 16 --overlay kept.png
  flowcut eval llava-tiny --tokens 16 --selector cls
  flowcut calibrate schedule llava-tiny --images photos --tokens 16 --out schedule.json
  flowcut plugin --target 86 90

The last line on stdout is one JSON object; `flowcut COMMAND --help` names its keys.
Exit codes: 0 done, 1 something to mend (stderr says what), 2 wrong syntax."""


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line rather than after ten of usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}. See {self.prog} --help.\n")


def make_parser() -> argparse.ArgumentParser:
    """Parses into a namespace whose `command` names the handler."""
    parser = Parser(
        prog="flowcut",
        description="LLaVA with most of its visual tokens pruned away: from checkpoint to\nTensorRT engine to answer.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=flowcut.__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    adders = (_add_engine, _add_export, _add_prune, add_run, _add_eval, add_bench, add_plan, add_report, add_calibrate)
    for add in (*adders, add_verify, add_inspect, _add_plugin):
        add(commands)
    return parser


def _add_engine(commands: Any) -> None:
    parser = command(
        commands,
        "engine",
        "export MODEL, compile it and write an engine directory",
        "The directory holds two ONNX graphs, the engines compiled from them, tokenizer, preprocessor settings and a "
        "manifest. It appears when it is complete, or not at all.",
        "directory, note, build_seconds, weight_bytes and engine_bytes; with --ask also those of `flowcut run`",
    )
    add_model(parser)
    parser.add_argument(
        "--backend",
        choices=["auto", "rtx", "trt", "ort"],
        default="auto",
        help="rtx: TensorRT-RTX, compiles without a GPU; trt: TensorRT; ort: stop at ONNX (default: auto = trt "
        "where tensorrt imports and a GPU is present, else rtx)",
    )
    parser.add_argument(
        "--compute-capability",
        action="append",
        default=[],
        metavar="SM",
        help="GPU to compile rtx engines for, such as sm86; may be repeated (default: Ampere and later)",
    )
    _add_build(parser)


def _add_export(commands: Any) -> None:
    parser = command(
        commands,
        "export",
        "write MODEL's two ONNX graphs as a directory for ONNX Runtime",
        "The same as `flowcut engine --backend ort`.",
        "directory, note, build_seconds, weight_bytes and engine_bytes; with --ask also those of `flowcut run`",
    )
    parser.set_defaults(backend="ort", compute_capability=[])
    add_model(parser)
    _add_build(parser)


def _add_build(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add_llm_tokens(parser)
    add("--schedule", default="static", help="static, masked or a FILE.json (default: static)")
    add_selector(parser)
    add(
        "--precision",
        choices=PRECISIONS,
        default="fp16",
        help="of the decoder, and of the vision tower but for int4, whose tower is int8 (fp16 with trt). fp32: ONNX "
        "Runtime only; int8, int4: weights; fp8: weights and activations, sm89 and later, takes a calibration "
        "(default: fp16)",
    )
    add("--vision-precision", choices=PRECISIONS, help="of the vision tower and the projector (default: see above)")
    add(
        "--calibration",
        metavar="FILE.safetensors",
        help="what `flowcut calibrate quantize` wrote: scales for int4, ranges for fp8; or 'none', with which int4 is "
        "rounded to nearest (default: calibration.safetensors beside the checkpoint, if there is one and all layers "
        "are built)",
    )
    add(
        "--stages",
        type=int,
        default=1,
        metavar="N",
        help="split the decoder into N graphs of consecutive layers, each compiled on its own, which takes less memory "
        "(default: 1)",
    )
    add("--decoder-layers", type=int, metavar="N", help="build only the first N decoder layers (to fit memory)")
    add("--max-batch", type=int, default=4, metavar="N", help="prompts at once (default: 4)")
    add("--max-images", type=int, default=4, metavar="N", help="pictures at once, of all prompts (default: 4)")
    add(
        "--max-prompt",
        type=int,
        metavar="N",
        help="longest prompt, with its visual tokens (default: those of one picture + 192)",
    )
    add("--max-new-tokens", type=int, default=128, metavar="N", help="longest answer (default: 128)")
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--out", type=Path, metavar="DIR", help="the directory to write")
    where.add_argument(
        "--out-root",
        type=Path,
        default=Path("build"),
        metavar="DIR",
        help="write DIR/<model>-<tokens>-<precision>-<backend>, with the selector after the tokens if it is not "
        "flowcut (default: build)",
    )
    add_question(parser).add_argument(
        "--ask",
        action="store_true",
        help="then ask it about a picture, and time it; implied by the options below",
    )


def _add_prune(commands: Any) -> None:
    parser = command(
        commands,
        "prune",
        "show which patches of a picture survive",
        "Runs the vision tower, in float32. Of LLaVA-NeXT it sees every tile, and what is kept of a picture's tiles is "
        "put together: the budget itself is reached inside the language model. That runs with --question only, its "
        "first two layers. A 7B then takes 2 GB of memory in all with torch; with ort 2.6 GB, and as much disk for a "
        "while.",
        "kept, counts, schedule, note and written; of LLaVA-NeXT kept and grids (rows and columns of tiles) are the "
        "pictures', counts and tile_kept the tiles', and llm_tokens is what the language model leaves of a picture at "
        "most. With --question there are question and llm_tokens, kept is what the language model leaves and "
        "kept_encoder what the encoder does",
    )
    add_model(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--image", type=Path, nargs="+", action="extend", metavar="FILE", help="pictures (default: a bundled one)"
    )
    source.add_argument(
        "--pixels", type=Path, metavar="FILE.npy", help="LLaVA-1.5: preprocessed pixel_values [B, 3, S, S]"
    )
    add = parser.add_argument
    add(
        "--question",
        metavar="TEXT",
        help="put about each picture alone: shows too what the language model drops, whose prompt's last token chooses "
        "(LLaVA-1.5: with --llm-tokens)",
    )
    add_llm_tokens(parser)
    add("--schedule", help="adaptive, static, masked or a FILE.json (default: adaptive; with ort masked, its equal)")
    add_selector(parser)
    add(
        "--backend",
        choices=["torch", "ort"],
        default="torch",
        help="ort exports a graph for ONNX Runtime, which adaptive does not have (default: torch)",
    )
    add(
        "--out",
        type=Path,
        metavar="FILE.npz",
        help="write kept [B, K], counts [B, L+1] and features [B, K, hidden]; of LLaVA-NeXT kept [pictures, N], which "
        "ends in -1, grids [pictures, 2], and tile_kept [tiles, K], counts and features of the tiles; with --question "
        "also kept_encoder",
    )
    add(
        "--overlay",
        type=Path,
        metavar="FILE.png",
        help="draw what is left after each pruning point, of LLaVA-NeXT after at most four, in the base tile and in "
        "the grid of the others; with --question the language model's is the last; several pictures get FILE-0.png, "
        "FILE-1.png, ..",
    )


def _add_eval(commands: Any) -> None:
    parser = command(
        commands,
        "eval",
        "count right answers to questions about rendered scenes",
        "The world of llava-tiny: six kinds of question, answered greedily; right is the exact word. A directory is "
        "asked as it was built, a checkpoint as the options say.",
        "accuracy, n, interval, by_type, model, note, tokens, llm_tokens, patches, selector, schedule, "
        "backend, precision, seeds, split, scenes and seconds",
    )
    add = parser.add_argument
    add("target", metavar="ENGINE_DIR|MODEL", help="an engine directory; or llava-tiny or another checkpoint")
    add(
        "--tokens",
        type=tokens,
        metavar="K",
        help="visual tokens kept per picture, or 'all' (default: 11.1%% of the patches, LLaVA-NeXT's 5.6%%)",
    )
    add_llm_tokens(parser)
    add(
        "--schedule",
        help="adaptive, static, masked or a FILE.json (default: adaptive; with ort masked, its equal; static where the "
        "selector has no other)",
    )
    add(
        "--selector",
        metavar="NAME",
        help="flowcut, no-history, no-semantic, no-strength, cls, grid, random-SEED, or random: the mean of random-0, "
        "random-1 and random-2 (default: flowcut)",
    )
    add(
        "--backend",
        choices=["auto", "torch", "ort", "rtx", "trt"],
        default="auto",
        help="of a checkpoint torch, or ort, which exports it for the occasion; of a directory what it was built for, "
        "or ort (default: auto = torch; the directory's own, ort where that cannot run)",
    )
    add("--precision", choices=PRECISIONS, help="of a checkpoint; others than fp32: ort only (default: fp32)")
    add("--calibration", metavar="FILE.safetensors", help="of a checkpoint in int4 or fp8 (default: its own, if any)")
    add("--split", choices=["test", "val"], default="test", help="which scenes (default: test)")
    add("--scenes", type=int, metavar="N", help="the first N of them (default: 400, or as --questions takes)")
    add("--questions", type=int, metavar="N", help="stop after exactly N questions (default: all, six a scene at most)")
    add("--answers", type=Path, metavar="FILE.jsonl", help="write every question and answer, a line each")
    add("--threads", type=int, metavar="N", help="of the CPU (default: the library's choice)")


def _add_plugin(commands: Any) -> None:
    parser = command(
        commands,
        "plugin",
        "tell about TensorRT's kernels for the scoring step, and verify them",
        "TensorRT runs the scoring step as a plugin, whose compiled kernels (PTX) it embeds in the engine. Registers, "
        "shared memory and spills are those of the kernels for each GPU; bytes are those of a scoring step. Then the "
        "kernels are compared with a reference, for every type and head size asked for: the PTX on the GPU where there "
        "is one, else their source in Triton's interpreter. Exit code 1 if they differ or nothing can run them, not if "
        "PTX is lacking. PTX is shipped for head sizes 32, 64 and 128; other PTX is compiled when an engine needs it, "
        "or now with --precompile, which takes triton but no GPU.",
        "targets, verified, verified_by, checks, bytes and ok",
    )
    add = parser.add_argument
    add(
        "--target",
        nargs="+",
        type=_compute_capability,
        metavar="SM",
        help="GPUs by compute capability, such as 86, 8.6 or sm86: 80, 86, 89, 90, 100, 120; another, such as 87, runs "
        "the PTX of the next lower, which is shown (default: all)",
    )
    add(
        "--head-size",
        nargs="+",
        type=int,
        metavar="D",
        help="multiples of 8 from 32 to 128 (default: 32 64 128, those shipped)",
    )
    add("--precision", nargs="+", metavar="TYPE", help="of K and V: fp16, bf16, fp32 (default: all)")
    add("--precompile", action="store_true", help="compile what is neither shipped nor cached, for later builds")


def _compute_capability(text: str) -> int:
    try:
        return int(text.removeprefix("sm").removeprefix("_").replace(".", "", 1))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a compute capability such as 86 or sm86, got {text!r}") from None
