"""Results as tables for people, 80 columns wide. Each goes with a line of JSON for programs, printed by the command."""

from __future__ import annotations

from collections.abc import Sequence, Set
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engines.ask import Answer, Question
from engines.pipeline import Built
from engines.profile_report import profiled, remembered
from engines.prune_result import Outcome, Pruned
from engines.runtime.engine import LlavaEngine
from engines.trust import Check
from flowcut.anyres import choose_tiling
from flowcut.artifacts import Manifest
from flowcut.config import LlavaConfig
from flowcut.contract import pruned_limit
from flowcut.printable import printable
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
    _field(console, "prompt", " ".join(answer.prompt.split()))
    _field(console, "answer", ascii(text) if plain else repr(text))
    if not answer.generation.ended[0]:
        _field(console, "", f"cut after {len(answer.generation.token_ids[0])} tokens; --answer-tokens N asks for more")
    for path, size, numbers in zip(question.images, question.sizes, answer.generation.kept[0], strict=True):
        _field(console, "picture", str(path))
        maps = _maps(manifest.geometry, size, numbers.tolist(), "#." if plain else "█·")
        whole, chosen = sum(each.patches for each in maps), selector_note(manifest.schedule)
        few = manifest.geometry.anyres and len(numbers) < (manifest.llm_tokens or 0)
        padding = "; those in the padding are gone" * few
        _field(console, "kept", f"{len(numbers)} of {whole} patches{_behind(manifest)}{padding}{chosen}")
        for each in maps:
            if len(maps) > 1:
                _field(console, "", each.title)
            console.print(each.text)
    runs = max(int(values["n"] or 0) for values in answer.latency_ms.values())
    length = f"{answer.prompt_tokens} prompt tokens"
    if manifest.llm_tokens is not None:
        length += f" ({answer.generation.pruned_prompt_tokens[0]} from the third layer on)"
    slowed = ", slowed by --profile" * bool(answer.profile)
    _heading(console, f"\nlatency on {LIBRARIES[engine.backend]}, {length}, batch 1{slowed}")
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
    profiled(console, answer.profile)
    if answer.memory is not None:
        remembered(console, answer.memory)


def pruned(console: Console, outcome: Outcome) -> None:
    """Patches left after each pruning point, a row per picture; of LLaVA-NeXT one per tile."""
    result, patches = outcome.pruned, outcome.schedule.patches
    if result.trace:
        kind = outcome.schedule.kind
        _heading(console, f"schedule {kind}: patches left at the input and after each layer that prunes")
        if outcome.schedule.selector != FLOWCUT:
            _field(console, "selector", outcome.schedule.selector)
        table = _table("picture", "input", *[str(layer) for layer, _ in result.trace])
        for i, name in enumerate(_towers_images(result)):
            table.add_row(name, str(patches), *[str(len(numbers[i])) for _, numbers in result.trace])
        console.print(table)
    else:
        where = " in the encoder" * (result.left is not None)
        console.print(f"Nothing is pruned{where}: all {patches} patches{' of every tile' * bool(result.tilings)} stay.")
    for i, (numbers, each) in enumerate(zip(result.merged, result.tilings, strict=True)):
        dropped = each.tiles * outcome.schedule.tokens - len(numbers)
        _field(console, f"{i}", f"{len(numbers)} patches of {each.tiles} tiles; {dropped} more were in the padding")
    _say_left(console, outcome)
    for path in outcome.written:
        _field(console, "wrote", path)
    if outcome.note:
        console.print(f"{outcome.note}: which patches are kept means nothing.")


def _say_left(console: Console, outcome: Outcome) -> None:
    """What the language model leaves of each picture; without a question only how many it would."""
    result = outcome.pruned
    if result.left is None:
        if outcome.llm_tokens is not None:
            most = f"at most {outcome.llm_tokens} of a picture's"
            console.print(f"After its second layer the language model leaves {most}; --question TEXT shows which.")
        return
    _heading(console, "language model: patches left after its second layer")
    _field(console, "question", " ".join((outcome.question or "").split()))
    for i, (numbers, kept) in enumerate(zip(result.left, result.encoder, strict=True)):
        _field(console, f"{i}", f"{len(numbers)} of {len(kept)} patches")


def _towers_images(result: Pruned) -> list[str]:
    """A name for each image that the tower saw, short enough for a table of eleven pruning points."""
    if not result.tilings:
        return [str(i) for i in range(len(result.kept))]
    grids = [[f"r{r + 1}c{c + 1}" for r in range(each.rows) for c in range(each.columns)] for each in result.tilings]
    return [f"{i} {name}" for i, grid in enumerate(grids) for name in ("base", *grid)]


def inspected(console: Console, directory: Path, manifest: Manifest) -> None:
    """What an engine directory is."""
    vision, text, limits = manifest.geometry.vision, manifest.geometry.text, manifest.limits
    targets = ", ".join(manifest.compute_capabilities) or "default targets"
    rows = {
        "model": manifest.model + (f" ({manifest.note})" if manifest.note else ""),
        "source": f"sha256 {manifest.source_sha256[:16]}.." if manifest.source_sha256 else "",
        "visual tokens": _visual_tokens(manifest),
        "schedule": f"{manifest.schedule['kind']} {', '.join(map(str, manifest.schedule['counts']))}"
        + selector_note(manifest.schedule),
        "precision": _precision(manifest),
        "compiled for": "ONNX Runtime" if manifest.backend == "ort" else f"{LIBRARIES[manifest.backend]}, {targets}",
        "vision": f"{vision.num_hidden_layers} layers, width {vision.hidden_size}, {vision.image_size} px in patches "
        f"of {vision.patch_size}",
        "language": f"{text.num_hidden_layers} layers, width {text.hidden_size}, vocabulary {text.vocab_size}"
        + f", {manifest.stages} stages" * (manifest.stages > 1),
        "at once": f"{limits.max_batch} prompts, {limits.max_images} pictures",
        "longest": f"{_longest_prompt(manifest)}, answer {limits.max_new_tokens} tokens",
        "built": f"{manifest.created} in {sum(manifest.build_seconds.values()):.1f} s",
        "with": ", ".join(f"{name} {version}" for name, version in sorted(manifest.versions.items())),
    }
    _heading(console, str(directory))
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for name, value in rows.items():
        table.add_row(name, printable(value))
    for name, record in sorted(manifest.files.items()):
        table.add_row(printable(name), _size(record.bytes))
    console.print(table)
    if manifest.command:
        _field(console, "command", manifest.command)


def checked(console: Console, checks: Sequence[Check]) -> None:
    """What was asked before an engine is loaded; nothing where it was not."""
    if not checks:
        return
    _heading(console, "\nchecks")
    table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    for each in checks:
        table.add_row(each.name, each.verdict, printable(each.detail))
    console.print(table)


def _longest_prompt(manifest: Manifest) -> str:
    """With a picture and, where its tokens are dropped in the decoder, without: later layers have room for less."""
    text, kept = f"prompt {manifest.limits.max_prompt} tokens", manifest.llm_tokens
    if kept is None:
        return text
    without = pruned_limit(manifest.geometry, manifest.tokens, kept, manifest.limits)
    return f"{text} ({without} without a picture)"


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
    console.print(Text(printable(text, keep="\n"), "bold"), soft_wrap=True)


def _field(console: Console, name: str, value: str) -> None:
    """Not wrapped, so that a path can be copied."""
    console.print(Text.assemble((f"{name:<9}", "bold"), printable(value)), soft_wrap=True)


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
        what = f"answers {'and kept patches ' if random else ''}mean nothing, timings do."
        console.print(f"{printable(manifest.note)}: {what}")


def _visual_tokens(manifest: Manifest) -> str:
    geometry, tokens = manifest.geometry, manifest.tokens
    text = f"{tokens} of {geometry.vision.patches} patches"
    if geometry.anyres:
        text += f" of each of at most {geometry.max_tiles} tiles"
    return text + _behind(manifest)


def _behind(manifest: Manifest) -> str:
    """What the language model drops."""
    kept = manifest.llm_tokens
    return "" if kept is None else f", at most {kept} of a picture behind the decoder's second layer"


class _Map(NamedTuple):
    """Patches of a picture or of a part of it, and which were kept."""

    title: str
    patches: int
    text: Text


def _maps(config: LlavaConfig, size: tuple[int, int], kept: list[int], marks: str) -> list[_Map]:
    """One map of a picture; of LLaVA-NeXT's the base tile, then the grid of the others without its padding."""
    side = config.vision.grid
    cut = choose_tiling(config, *size)
    base = _map(
        "base", {divmod(number, side) for number in kept if number < side * side}, range(side), range(side), marks
    )
    if cut.tiles == 1:
        return [base]
    inside = {divmod(number - side * side, cut.grid[1]) for number in kept if number >= side * side}
    return [base, _map(f"{cut.rows} x {cut.columns} tiles", inside, *cut.seen, marks)]


def _map(title: str, kept: Set[tuple[int, int]], rows: range, columns: range, marks: str) -> _Map:
    """The first mark where a patch was kept, the second elsewhere."""
    lines = ("".join(marks[(row, column) not in kept] for column in columns) for row in rows)
    return _Map(title, len(rows) * len(columns), Text("\n".join("         " + line for line in lines)))
