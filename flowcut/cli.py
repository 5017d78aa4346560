"""The `flowcut` command. Parses, calls one function, prints; everything heavy is imported by the handler that needs it.

Exit codes: 0 done, 1 something the user can mend (one line on stderr says what), 2 wrong command-line syntax.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import os
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from flowcut.arguments import make_parser
from flowcut.arguments_run import QUESTION, SCENE
from flowcut.errors import EngineError, FlowCutError
from flowcut.printable import printable

if TYPE_CHECKING:
    from rich.console import Console

    from engines.ask import Question
    from engines.pipeline import BuildSettings

Result = dict[str, Any]
Settings = TypeVar("Settings")
BUILDERS = ("engine", "export")


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run a command and exit."""
    arguments = make_parser().parse_args(argv)
    _prepare_process(arguments.verbose)
    try:
        result = HANDLERS[arguments.command](arguments)
        print(json.dumps(result))
        sys.stdout.flush()
    except FlowCutError as error:
        _fail(str(error))
    except KeyboardInterrupt:
        _fail("interrupted" + _after_interruption(arguments.command))
    except MemoryError as error:
        _fail(f"memory must be enough for this, got too little ({error}). Fewer decoder layers or pictures take less.")
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader of stdout went away
        sys.exit(1)
    except OSError as error:
        where = error.filename or "the disk"
        _fail(f"{where} must be there to read or write, got: {error.strerror or error}. Check permissions and space.")
    sys.exit(1 if result.get("ok") is False else 0)


def _prepare_process(verbosity: int) -> None:
    logging.basicConfig(
        level=(logging.WARNING, logging.INFO, logging.DEBUG)[min(verbosity, 2)],
        format="%(name)s: %(message)s",
        stream=sys.stderr,
    )
    warnings.filterwarnings("ignore", module=r"PIL\.")  # of odd pictures: those that cannot be used are an error
    if sys.stdout is None:  # closed by who started us
        sys.stdout = open(os.devnull, "w")  # noqa: PTH123, SIM115
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an answer may hold what the terminal cannot show
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _terminated)


def _terminated(signum: int, frame: object) -> NoReturn:
    """Clean up as after Ctrl-C, undisturbed: `timeout` sends its signal twice."""
    signal.signal(signum, signal.SIG_IGN)
    raise KeyboardInterrupt


def _after_interruption(command: str) -> str:
    if command in BUILDERS:
        return "; nothing half-written was left behind."
    return "; the same command continues." if command.startswith("calibrate") else "."


def _fail(message: str) -> NoReturn:
    _complain(message)
    sys.exit(1)


def _complain(message: str) -> None:
    print(f"flowcut: {printable(' '.join(message.split()))}", file=sys.stderr)


def _engine(arguments: argparse.Namespace) -> Result:
    from engines import report
    from engines.pipeline import build_directory
    from engines.progress import terminal_progress

    settings = build_settings(arguments)
    asks = arguments.ask or arguments.image or arguments.question is not None or arguments.prompt is not None
    question = _question(arguments) if asks else None
    with terminal_progress() as progress:
        result = build_directory(settings, progress, question.check_fits if question else None)
    console = _console()
    report.built(console, result)
    files = result.manifest.files
    summary = {
        "directory": str(result.directory),
        "note": result.manifest.note,
        "build_seconds": dict(result.manifest.build_seconds),
        "weight_bytes": {name: files[f"{name}.onnx.data"].bytes for name in result.manifest.graphs},
        "engine_bytes": {name: r.engine_bytes for name, r in result.reports.items()},
    }
    if question is None:
        return summary
    console.print()
    return {**summary, **_ask(console, result.directory, "auto", arguments.threads, question)}


def build_settings(arguments: argparse.Namespace) -> BuildSettings:
    """What `flowcut engine` and `flowcut export` were told to build."""
    from engines.pipeline import BuildSettings

    given = {
        "random": arguments.weights == "random",
        "compute_capabilities": tuple(arguments.compute_capability),
    }
    return _settings(BuildSettings, arguments, **given)


def _settings(kind: type[Settings], arguments: argparse.Namespace, **others: Any) -> Settings:
    """A dataclass of settings: `others`, and of its other fields those that are arguments of the same names."""
    names = {field.name for field in fields(kind)}  # type: ignore[arg-type]
    return kind(**{name: value for name, value in vars(arguments).items() if name in names} | others)


def _run(arguments: argparse.Namespace) -> Result:
    from engines.runtime.sampling import Sampling

    names = ("temperature", "top_k", "top_p", "repetition_penalty", "seed", "stop")
    sampling = Sampling(**{name: getattr(arguments, name) for name in names})
    question, where = replace(_question(arguments), sampling=sampling), (arguments.directory, arguments.backend)
    return _ask(_console(), *where, arguments.threads, question, profile=arguments.profile, stream=arguments.stream)


def _question(arguments: argparse.Namespace) -> Question:
    """What the user asks, checked before anything is built or loaded."""
    from engines.ask import Question

    images, template = tuple(arguments.image or [SCENE]), arguments.prompt is None
    asked = QUESTION if arguments.question is None else arguments.question
    *earlier, last = [asked] if isinstance(asked, str) else asked
    text = last if template else arguments.prompt
    question = Question(images, text, arguments.answer_tokens, arguments.repeats, template, tuple(earlier))
    question.check()
    return question


def _ask(
    console: Console,
    directory: Path,
    backend: str,
    threads: int | None,
    question: Question,
    profile: bool = False,
    stream: bool = False,
) -> Result:
    from engines import report
    from engines.ask import ask
    from engines.runtime.engine import load_engine

    # Without a cache of pictures, each repeat is to see the picture.
    engine = load_engine(directory, backend, threads=threads, picture_cache_mb=0, profile=profile)
    answer = ask(engine, question, _show if stream else None)
    if stream:
        print("\n")
    report.answered(console, engine, question, answer)
    return answer.to_dict(engine, question)


def _show(text: str) -> None:
    """A piece of an answer, without what would move the terminal's cursor."""
    print(printable(text, keep="\n\t"), end="", flush=True)


def _prune(arguments: argparse.Namespace) -> Result:
    from engines import report
    from engines.progress import terminal_progress
    from engines.prune import PruneSettings, prune

    images = () if arguments.pixels else tuple(arguments.image or [SCENE])
    settings = _settings(PruneSettings, arguments, random=arguments.weights == "random", images=images)
    with terminal_progress() as progress:
        outcome = prune(settings, progress)
    report.pruned(_console(), outcome)
    return outcome.to_dict()


def _eval(arguments: argparse.Namespace) -> Result:
    from engines.evaluate import evaluate
    from engines.evaluate_report import evaluated
    from engines.evaluate_target import EvalSettings
    from engines.progress import terminal_progress

    settings = _settings(EvalSettings, arguments)
    with terminal_progress() as progress:
        result = evaluate(settings, progress)
    evaluated(_console(), result)
    return result.to_dict()


def _calibrate_schedule(arguments: argparse.Namespace) -> Result:
    from calib.report import calibrated
    from calib.schedule import ScheduleSettings, calibrate_schedule
    from engines.progress import terminal_progress

    settings = _settings(ScheduleSettings, arguments, random=arguments.weights == "random")
    with terminal_progress() as progress:
        result = calibrate_schedule(settings, progress)
    calibrated(_console(), result)
    return result.to_dict()


def _calibrate_quantize(arguments: argparse.Namespace) -> Result:
    from calib.quantize import QuantizeSettings, calibrate_quantize
    from calib.quantize_report import quantized
    from engines.progress import terminal_progress

    given = {"random": arguments.weights == "random", "questions": tuple(arguments.question)}
    settings = _settings(QuantizeSettings, arguments, **given)
    with terminal_progress() as progress:
        result = calibrate_quantize(settings, progress)
    quantized(_console(), result)
    return result.to_dict()


def _bench(arguments: argparse.Namespace) -> Result:
    from engines.bench.files import write_results
    from engines.bench.run import bench
    from engines.bench.settings import BenchSettings
    from engines.bench.show import measured
    from engines.progress import terminal_progress

    pictures = tuple(arguments.image or [SCENE])
    settings = _settings(BenchSettings, arguments, pictures=pictures, batches=arguments.batch)
    with terminal_progress(redraw=False) as progress:
        found = bench(settings, progress)
    measured(_console(), found, write_results(settings, found))
    return found.to_dict()


def _plan(arguments: argparse.Namespace) -> Result:
    from engines.plan.run import PlanSettings, plan
    from engines.plan.table import planned
    from engines.progress import terminal_progress

    settings = _settings(PlanSettings, arguments, random=arguments.weights == "random")
    with terminal_progress() as progress:
        result = plan(settings, progress)
    planned(_console(), result)
    return result.to_dict()


def _report(arguments: argparse.Namespace) -> Result:
    from engines.progress import terminal_progress
    from engines.webpage.report import ReportSettings, write_report
    from engines.webpage.table import reported

    with terminal_progress() as progress:
        result = write_report(ReportSettings(directories=tuple(arguments.directories), out=arguments.out), progress)
    reported(_console(), result)
    return result.to_dict()


def _verify(arguments: argparse.Namespace) -> Result:
    from engines.verify import print_report, verify

    result = verify(arguments.directory, checkpoint=arguments.checkpoint)
    print_report(_console(), result)
    if not result.ok:
        _complain(f"{arguments.directory} could not be verified: see the rows above that are not ok.")
    return result.to_dict()


def _inspect(arguments: argparse.Namespace) -> Result:
    from engines import report
    from engines.inspection import inspect_directory

    try:
        found = inspect_directory(arguments.directory, arguments.check)
    except EngineError as error:
        if not (arguments.check and arguments.directory.is_dir()):
            raise
        _complain(str(error))
        return {"manifest": None, "differences": [str(error)], "checks": [], "ok": False}
    report.inspected(_console(), arguments.directory, found.manifest)
    report.checked(_console(), found.checks)
    if not found.ok:
        _complain(found.complaint)
    return found.to_dict()


def _plugin(arguments: argparse.Namespace) -> Result:
    from engines.flow_score.report import PluginSettings, plugin, print_report
    from engines.progress import terminal_progress

    chosen = {"targets": arguments.target, "head_sizes": arguments.head_size, "precisions": arguments.precision}
    given = {name: tuple(values) for name, values in chosen.items() if values is not None}
    settings = PluginSettings(**given, precompile=arguments.precompile)
    with terminal_progress() as progress:
        result = plugin(settings, progress)
    print_report(_console(), result)
    if not result.verified:
        _complain(result.complaint)
    return result.to_dict()


def _console() -> Console:
    """Plain text: file names and answers may hold what rich takes for markup."""
    from rich.console import Console

    return Console(highlight=False, markup=False, emoji=False)


HANDLERS: dict[str, Callable[[argparse.Namespace], Result]] = {
    "engine": _engine,
    "export": _engine,
    "prune": _prune,
    "run": _run,
    "eval": _eval,
    "calibrate schedule": _calibrate_schedule,
    "calibrate quantize": _calibrate_quantize,
    "bench": _bench,
    "plan": _plan,
    "report": _report,
    "verify": _verify,
    "inspect": _inspect,
    "plugin": _plugin,
}
