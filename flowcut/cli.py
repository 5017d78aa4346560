"""The `flowcut` command. Parses, calls one function, prints; everything heavy is imported by the handler that needs it.

Exit codes: 0 done, 1 something the user can mend (one line on stderr says what), 2 wrong command-line syntax.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import flowcut
from flowcut.errors import ConfigError, FlowCutError

if TYPE_CHECKING:
    from rich.console import Console

SCENE = Path(__file__).parent / "assets" / "example" / "scene.png"
QUESTION = "What colour is the circle?"
EXAMPLES = """examples:
  flowcut engine llava-tiny --ask
  flowcut engine llava-1.5-7b --weights random --decoder-layers 2 --backend ort
  flowcut run build/llava-tiny-16-fp16-rtx --image cat.jpg --question "What is this?"
  flowcut prune llava-tiny --image cat.jpg --tokens 16 --overlay kept.png

The last line on stdout is always one JSON object."""


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit."""
    arguments = _parser().parse_args(argv)
    logging.basicConfig(
        level=(logging.WARNING, logging.INFO, logging.DEBUG)[min(arguments.verbose, 2)],
        format="%(name)s: %(message)s",
        stream=sys.stderr,
    )
    try:
        result = arguments.run(arguments)
        print(json.dumps(result))
        sys.stdout.flush()
    except FlowCutError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted; nothing half-written was left behind.")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of stdout went away
        sys.exit(1)
    except OSError as error:
        _fail(f"{error.filename or 'the file system'}: {error.strerror or error}.")
    sys.exit(1 if result.get("ok") is False else 0)


def _fail(message: str) -> NoReturn:
    print(f"flowcut: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(1)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flowcut",
        description="LLaVA with most of its visual tokens pruned away: from checkpoint to TensorRT engine to answer.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=flowcut.__version__)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_engine(commands)
    _add_prune(commands)
    _add_run(commands)
    _add_verify(commands)
    _add_inspect(commands)
    return parser


def _command(commands: Any, name: str, help_text: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help_text, description=help_text)
    parser.set_defaults(run=run)
    parser.add_argument("-v", "--verbose", action="count", default=0, help="log what is done; twice: everything")
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="llava-tiny, llava-1.5-7b, llava-1.5-13b, or a directory in Hugging Face llava format",
    )
    parser.add_argument(
        "--weights",
        choices=["auto", "random"],
        default="auto",
        help="random: seeded weights at MODEL's true geometry, nothing is downloaded (default: auto)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of random weights (default: 0)")
    parser.add_argument(
        "--tokens",
        type=_tokens,
        metavar="K",
        help="visual tokens kept per picture, or 'all' (default: 11.1%% of the patches, 64 of LLaVA-1.5's 576)",
    )


def _add_engine(commands: Any) -> None:
    for name, help_text in (
        ("engine", "export MODEL, compile it and write an engine directory"),
        ("export", "write MODEL's two ONNX graphs as a directory for ONNX Runtime (engine --backend ort)"),
    ):
        parser = _command(commands, name, help_text, _engine)
        _add_model(parser)
        add = parser.add_argument
        add("--schedule", default="static", help="static, masked or a FILE.json (default: static)")
        add(
            "--precision",
            choices=["fp16", "fp32"],
            default="fp16",
            help="fp32 runs on ONNX Runtime only (default: fp16)",
        )
        if name == "engine":
            add(
                "--backend",
                choices=["auto", "rtx", "trt", "ort"],
                default="auto",
                help="rtx: TensorRT-RTX, compiles without a GPU; trt: TensorRT; ort: stop at ONNX (default: auto = trt "
                "where tensorrt imports and a GPU is present, else rtx)",
            )
        else:
            parser.set_defaults(backend="ort")
        add("--decoder-layers", type=int, metavar="N", help="build only the first N decoder layers (to fit memory)")
        add("--max-batch", type=int, default=4, help="prompts at once (default: 4)")
        add("--max-images", type=int, default=4, help="pictures at once, of all prompts (default: 4)")
        add("--max-prompt", type=int, metavar="TOKENS", help="longest prompt with its visual tokens (default: K + 192)")
        add("--max-new-tokens", type=int, default=128, help="longest answer (default: 128)")
        if name == "engine":
            add(
                "--compute-capability",
                action="append",
                default=[],
                metavar="SM",
                help="target of rtx engines such as sm86; may be repeated (default: Ampere and later)",
            )
        else:
            parser.set_defaults(compute_capability=[])
        where = parser.add_mutually_exclusive_group()
        where.add_argument("--out", type=Path, metavar="DIR", help="the directory to write")
        where.add_argument(
            "--out-root",
            type=Path,
            default=Path("build"),
            metavar="DIR",
            help="write DIR/<model>-<tokens>-<precision>-<backend> (default: build)",
        )
        add("--ask", action="store_true", help="then ask it a question about a picture, with a latency table")
        _add_question(parser)


def _add_question(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--image", type=Path, action="append", metavar="FILE", help="a picture (default: a bundled one)"
    )
    text = parser.add_mutually_exclusive_group()
    text.add_argument("--question", help=f"put into LLaVA-1.5's template (default: {QUESTION})")
    text.add_argument("--prompt", help="taken as it is, with one <image> per picture")
    parser.add_argument("--answer-tokens", type=int, default=32, metavar="N", help="longest answer shown (default: 32)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs after a warm-up (default: 5, or 20 s)")
    parser.add_argument("--threads", type=int, help="of ONNX Runtime on the CPU (default: its own choice)")


def _add_prune(commands: Any) -> None:
    parser = _command(commands, "prune", "show which patches of a picture survive", _prune)
    _add_model(parser)
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--image", type=Path, action="append", metavar="FILE", help="a picture; may be repeated")
    source.add_argument("--pixels", type=Path, metavar="FILE.npy", help="preprocessed pixel_values [B, 3, S, S]")
    add = parser.add_argument
    add("--schedule", default="adaptive", help="adaptive, static, masked or a FILE.json (default: adaptive)")
    add("--backend", choices=["torch", "ort"], default="torch", help="ort needs fixed shapes (default: torch)")
    add("--out", type=Path, metavar="FILE.npz", help="write kept [B, K], counts [B, L+1] and features [B, K, hidden]")
    add("--overlay", type=Path, metavar="FILE.png", help="draw what is left after each pruning point")


def _add_run(commands: Any) -> None:
    parser = _command(commands, "run", "ask an engine a question about a picture", _run)
    parser.add_argument("directory", type=Path, metavar="ENGINE_DIR")
    parser.add_argument(
        "--backend",
        default="auto",
        help="ort, or the one it was built for (default: that one, ort where it cannot run)",
    )
    _add_question(parser)


def _add_verify(commands: Any) -> None:
    parser = _command(
        commands, "verify", "compare torch, ONNX Runtime and, with a GPU, TensorRT on an engine's graphs", _verify
    )
    parser.add_argument("directory", type=Path, metavar="ENGINE_DIR")
    parser.add_argument("--checkpoint", metavar="MODEL", help="where the weights came from, if not an alias")


def _add_inspect(commands: Any) -> None:
    parser = _command(commands, "inspect", "say what an engine directory is", _inspect)
    parser.add_argument("directory", type=Path, metavar="ENGINE_DIR")


def _engine(arguments: argparse.Namespace) -> dict[str, Any]:
    from engines import report
    from engines.pipeline import BuildSettings, build_directory
    from engines.progress import terminal_progress

    settings = BuildSettings(
        model=arguments.model,
        random=arguments.weights == "random",
        seed=arguments.seed,
        tokens=arguments.tokens,
        schedule=arguments.schedule,
        precision=arguments.precision,
        backend=arguments.backend,
        decoder_layers=arguments.decoder_layers,
        max_batch=arguments.max_batch,
        max_images=arguments.max_images,
        max_prompt=arguments.max_prompt,
        max_new_tokens=arguments.max_new_tokens,
        compute_capabilities=tuple(arguments.compute_capability),
        out=arguments.out,
        out_root=arguments.out_root,
    )
    with terminal_progress() as progress:
        result = build_directory(settings, progress)
    console = _console()
    report.built(console, result)
    summary = {
        "directory": str(result.directory),
        "note": result.manifest.note,
        "build_seconds": dict(result.manifest.build_seconds),
        "engine_bytes": {name: r.engine_bytes for name, r in result.reports.items()},
    }
    return {**summary, **_ask(console, result.directory, "auto", arguments)} if arguments.ask else summary


def _run(arguments: argparse.Namespace) -> dict[str, Any]:
    return _ask(_console(), arguments.directory, arguments.backend, arguments)


def _ask(console: Console, directory: Path, backend: str, arguments: argparse.Namespace) -> dict[str, Any]:
    from engines import report
    from engines.ask import ask
    from engines.runtime import load_engine
    from flowcut.prompt import question_prompt

    if arguments.repeats < 1:
        raise ConfigError(f"repeats must be at least 1, got {arguments.repeats}.")
    images = arguments.image or [SCENE]
    prompt = (
        arguments.prompt
        if arguments.prompt is not None
        else question_prompt(arguments.question or QUESTION, len(images))
    )
    engine = load_engine(directory, backend, arguments.threads)
    new_tokens = min(arguments.answer_tokens, engine.manifest.limits.max_new_tokens)
    answer = ask(engine, images, prompt, new_tokens, arguments.repeats)
    report.answered(console, engine, prompt, images, answer)
    return answer.to_dict(engine)


def _prune(arguments: argparse.Namespace) -> dict[str, Any]:
    from engines import report
    from engines.pipeline import token_count
    from engines.progress import terminal_progress
    from engines.prune import overlays, prune_ort, prune_torch, read_pixels, write_outputs
    from flowcut.aliases import resolve
    from flowcut.preprocess import ImageSettings, open_image, pixel_values
    from flowcut.schedule import make_schedule

    model = resolve(arguments.model, random=arguments.weights == "random", seed=arguments.seed)
    vision = model.config.vision
    schedule = make_schedule(arguments.schedule, vision, token_count(arguments.tokens, vision.patches))
    settings = ImageSettings.from_directory(model.files, vision.image_size)
    if arguments.pixels:
        pixels = read_pixels(arguments.pixels, vision.image_size)
    else:
        pixels = pixel_values([open_image(path) for path in arguments.image or [SCENE]], settings)
    with terminal_progress() as progress:
        if arguments.backend == "ort":
            result = prune_ort(model, schedule, pixels, progress)
        else:
            result = prune_torch(model, schedule, pixels)
    pages = overlays(result, pixels, settings, vision.grid) if arguments.overlay else []
    written = write_outputs(result, arguments.out, pages, arguments.overlay)
    report.pruned(_console(), result, vision.patches)
    return {
        "kept": result.kept.tolist(),
        "counts": result.counts.tolist(),
        "schedule": schedule.to_dict(),
        "note": model.note,
        "written": written,
    }


def _verify(arguments: argparse.Namespace) -> dict[str, Any]:
    from engines.verify import print_report, verify

    result = verify(arguments.directory, checkpoint=arguments.checkpoint)
    print_report(_console(), result)
    return result.to_dict()


def _inspect(arguments: argparse.Namespace) -> dict[str, Any]:
    from engines import report
    from flowcut.artifacts import check_files, read_manifest

    manifest = read_manifest(arguments.directory)
    report.inspected(_console(), arguments.directory, manifest)
    differences = check_files(arguments.directory, manifest)
    for difference in differences:
        print(f"flowcut: {difference}", file=sys.stderr)
    return {"manifest": json.loads(manifest.to_json()), "differences": differences, "ok": not differences}


def _console() -> Console:
    from rich.console import Console

    return Console(highlight=False, soft_wrap=False)


def _tokens(text: str) -> int | str:
    if text == "all":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number or 'all', got {text!r}") from None
