"""Results as tables for people, 80 columns wide. Each goes with a line of JSON for programs, printed by the command."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engines.ask import Answer, Question
from engines.pipeline import Built
from engines.prune import Outcome
from engines.runtime import LlavaEngine
from flowcut.artifacts import Manifest
from flowcut.selector import FLOWCUT, selector_note

LIBRARIES = {"ort": "ONNX Runtime", "rtx": "TensorRT-RTX", "trt": "TensorRT"}
STAGES = {
    "preprocess": "preprocess pictures and prompt",
    "vision": "vision: encode and prune",
    "prefill": "prefill: read the prompt",
    "time_to_first_token": "time to first token",
    "decode_per_token": "each further token",
}


def built(console: Console, result: Built) -> None:
    """Where the engine is, what is in it and what making it took."""
    _heading(console, f"built {result.directory}")
    if result.replaced:
        console.print(Text(f"in place of a build of something else: {result.replaced}"))
    table = _table("file", "size")
    for name, record in sorted(result.manifest.files.items()):
        table.add_row(name, _size(record.bytes))
    console.print(table)
    console.print(f"precision: {_precision(result.manifest)}")
    for name, value in result.manifest.build_seconds.items():
        console.print(f"{name}: {value:.1f} s{_compiled(name, result)}")
    _say_note(console, result.manifest)


def answered(console: Console, engine: LlavaEngine, question: Question, answer: Answer) -> None:
    """The question, the answer, what was kept and how long each stage took."""
    manifest, plain = engine.manifest, console.options.ascii_only
    text = answer.generation.texts[0]
    _field(console, "prompt", " ".join(question.prompt.split()))
    _field(console, "answer", ascii(text) if plain else repr(text))
    if not answer.generation.ended[0]:
        _field(console, "", f"cut after {len(answer.generation.token_ids[0])} tokens; --answer-tokens N asks for more")
    for path, numbers in zip(question.images, answer.generation.kept[0], strict=True):
        _field(console, "picture", str(path))
        patches, chosen = manifest.geometry.vision.patches, selector_note(manifest.schedule)
        _field(console, "kept", f"{len(numbers)} of {patches} patches{chosen}")
        console.print(_map(numbers.tolist(), manifest.geometry.vision.grid, "#." if plain else "█·"))
    runs = max(int(values["n"] or 0) for values in answer.latency_ms.values())
    _heading(console, f"\nlatency on {LIBRARIES[engine.backend]}, {answer.prompt_tokens} prompt tokens, batch 1")
    table = _table(f"milliseconds over {runs} run{'s' * (runs > 1)}", "median", "p90")
    for stage, values in answer.latency_ms.items():
        table.add_row(STAGES[stage], _milliseconds(values["median"]), _milliseconds(values["p90"]))
    console.print(table)
    if engine.backend != manifest.backend:
        console.print(
            f"Not {LIBRARIES[manifest.backend]}, which this directory was compiled for: ONNX Runtime ran the very "
            "graphs that were compiled. These are not GPU latencies."
        )
    _say_note(console, manifest)


def pruned(console: Console, outcome: Outcome) -> None:
    """Patches left after each pruning point, a row per picture."""
    result, patches = outcome.pruned, outcome.schedule.patches
    if result.trace:
        kind = outcome.schedule.kind
        _heading(console, f"schedule {kind}: patches left at the input and after each layer that prunes")
        if outcome.schedule.selector != FLOWCUT:
            _field(console, "selector", outcome.schedule.selector)
        table = _table("picture", "input", *[str(layer) for layer, _ in result.trace])
        for i in range(len(result.kept)):
            table.add_row(str(i), str(patches), *[str(len(numbers[i])) for _, numbers in result.trace])
        console.print(table)
    else:
        console.print(f"Nothing is pruned: all {patches} patches stay.")
    for path in outcome.written:
        _field(console, "wrote", path)
    if outcome.note:
        console.print(f"{outcome.note}: which patches are kept means nothing.")


def inspected(console: Console, directory: Path, manifest: Manifest) -> None:
    """What an engine directory is."""
    vision, text, limits = manifest.geometry.vision, manifest.geometry.text, manifest.limits
    targets = ", ".join(manifest.compute_capabilities) or "default targets"
    rows = {
        "model": manifest.model + (f" ({manifest.note})" if manifest.note else ""),
        "source": f"sha256 {manifest.source_sha256[:16]}.." if manifest.source_sha256 else "",
        "visual tokens": f"{manifest.tokens} of {vision.patches} patches",
        "schedule": f"{manifest.schedule['kind']} {', '.join(map(str, manifest.schedule['counts']))}"
        + selector_note(manifest.schedule),
        "precision": _precision(manifest),
        "compiled for": "ONNX Runtime" if manifest.backend == "ort" else f"{LIBRARIES[manifest.backend]}, {targets}",
        "vision": f"{vision.num_hidden_layers} layers, width {vision.hidden_size}, {vision.image_size} px in patches "
        f"of {vision.patch_size}",
        "language": f"{text.num_hidden_layers} layers, width {text.hidden_size}, vocabulary {text.vocab_size}"
        + f", {manifest.stages} stages" * (manifest.stages > 1),
        "at once": f"{limits.max_batch} prompts, {limits.max_images} pictures",
        "longest": f"prompt {limits.max_prompt} tokens, answer {limits.max_new_tokens} tokens",
        "built": f"{manifest.created} in {sum(manifest.build_seconds.values()):.1f} s",
        "with": ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items())),
    }
    _heading(console, str(directory))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(name, value)
    for name, record in sorted(manifest.files.items()):
        table.add_row(name, _size(record.bytes))
    console.print(table)


def _precision(manifest: Manifest) -> str:
    """Of both graphs, with how it came about where there is a choice."""
    calibrated = f", calibrated on {manifest.calibration['pictures']} pictures" if manifest.calibration else ""
    nearest = (
        ", rounded to nearest" if not calibrated and "int4" in (manifest.precision, manifest.vision_precision) else ""
    )
    return f"decoder {manifest.precision}, vision {manifest.vision_precision}{calibrated}{nearest}"


def _compiled(stage: str, result: Built) -> str:
    """What became of the graph that the stage compiled."""
    report = result.reports.get(stage.removeprefix("compile "))
    if report is None:
        return ""
    code = _size(report.engine_bytes - report.weight_bytes)
    return f", {report.layers} network layers, {code} beyond the weights"


def _heading(console: Console, text: str) -> None:
    console.print(Text(text, "bold"), soft_wrap=True)


def _field(console: Console, name: str, value: str) -> None:
    """Not wrapped, so that a path can be copied."""
    console.print(Text.assemble((f"{name:<9}", "bold"), value), soft_wrap=True)


def _table(first: str, *numbers: str) -> Table:
    """A column of names and columns of numbers."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right")
    return table


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _size(count: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


def _say_note(console: Console, manifest: Manifest) -> None:
    if manifest.note:
        random = "random weights" in manifest.note
        console.print(f"{manifest.note}: answers {'and kept patches ' if random else ''}mean nothing, timings do.")


def _map(kept: list[int], grid: int, marks: str) -> Text:
    """The picture's patches: the first mark where one was kept, the second elsewhere."""
    marked = set(kept)
    lines = ("".join(marks[row * grid + col not in marked] for col in range(grid)) for row in range(grid))
    return Text("\n".join("         " + line for line in lines))
