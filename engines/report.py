"""Results as tables for people. Each goes with a line of JSON for programs, printed by the command."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from engines.ask import Answer
from engines.pipeline import Built
from engines.prune import Pruned
from engines.runtime import LlavaEngine
from flowcut.artifacts import Manifest

UNITS = {"preprocess": "pictures and prompt", "decode_per_token": "one further token"}


def built(console: Console, result: Built) -> None:
    """Where the engine is, what is in it and what making it took."""
    table = Table(title=f"{result.directory}", title_justify="left")
    for column in ("file", "MB"):
        table.add_column(column, justify="right" if column == "MB" else "left")
    for name, record in sorted(result.manifest.files.items()):
        table.add_row(name, f"{record.bytes / 1e6:.2f}")
    console.print(table)
    stages = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result.manifest.build_seconds.items())
    console.print(f"built in {sum(result.manifest.build_seconds.values()):.1f} s ({stages})")
    for name, report in result.reports.items():
        code_mb = (report.engine_bytes - report.weight_bytes) / 1e6
        console.print(f"{name}: {report.layers} network layers, {code_mb:.1f} MB of engine beyond its weights")
    _say_note(console, result.manifest)


def answered(console: Console, engine: LlavaEngine, prompt: str, images: list[Path], answer: Answer) -> None:
    """The question, the answer, what was kept and how long each stage took."""
    manifest = engine.manifest
    patches = manifest.geometry.vision.patches
    console.print(Text.assemble(("picture  ", "bold"), ", ".join(str(path) for path in images)))
    console.print(Text.assemble(("prompt   ", "bold"), prompt.replace("\n", " ")))
    console.print(Text.assemble(("answer   ", "bold"), repr(answer.generation.texts[0])))
    for numbers in answer.generation.kept[0]:
        console.print(Text.assemble(("kept     ", "bold"), f"{len(numbers)} of {patches} patches"))
        console.print(_grid(numbers.tolist(), manifest.geometry.vision.grid))
    where = "ONNX Runtime" if engine.backend == "ort" else {"rtx": "TensorRT-RTX", "trt": "TensorRT"}[engine.backend]
    table = Table(title=f"latency on {where}, batch 1, {answer.prompt_tokens} prompt tokens", title_justify="left")
    for column in ("stage", "median ms", "p90 ms", "n"):
        table.add_column(column, justify="left" if column == "stage" else "right")
    for stage, values in answer.latency_ms.items():
        name = stage.replace("_", " ") + (f" ({UNITS[stage]})" if stage in UNITS else "")
        table.add_row(name, f"{values['median']:.2f}", f"{values['p90']:.2f}", f"{values['n']:.0f}")
    console.print(table)
    if engine.backend != manifest.backend:
        console.print(
            f"The {manifest.backend} engines cannot run on this machine; ONNX Runtime ran the very graphs they were "
            "compiled from. These are not GPU latencies."
        )
    _say_note(console, manifest)


def pruned(console: Console, result: Pruned, patches: int) -> None:
    """Patches left after each pruning point, per picture."""
    table = Table(title="patches that leave each pruning point", title_justify="left")
    table.add_column("layer", justify="right")
    for i in range(len(result.kept)):
        table.add_column(f"picture {i}", justify="right")
    table.add_row("input", *[str(patches)] * len(result.kept))
    for layer, numbers in result.trace:
        table.add_row(str(layer), *[str(len(n)) for n in numbers])
    console.print(table)


def inspected(console: Console, directory: Path, manifest: Manifest) -> None:
    """What an engine directory is."""
    vision, text, limits = manifest.geometry.vision, manifest.geometry.text, manifest.limits
    table = Table(title=str(directory), title_justify="left", show_header=False)
    rows = {
        "model": manifest.model + (f" ({manifest.note})" if manifest.note else ""),
        "visual tokens": f"{manifest.tokens} of {vision.patches}",
        "schedule": f"{manifest.schedule['kind']} {manifest.schedule['counts'] or ''}",
        "precision": manifest.precision,
        "backend": f"{manifest.backend} {' '.join(manifest.compute_capabilities)}",
        "vision": f"{vision.num_hidden_layers} layers of {vision.hidden_size}, {vision.image_size} px, "
        f"patches of {vision.patch_size} px",
        "language": f"{text.num_hidden_layers} layers of {text.hidden_size}, vocabulary {text.vocab_size}",
        "limits": f"batch {limits.max_batch}, pictures {limits.max_images}, prompt {limits.max_prompt} tokens, "
        f"answer {limits.max_new_tokens} tokens",
        "created": manifest.created,
        "source": manifest.source_sha256[:16],
    }
    for name, value in rows.items():
        table.add_row(name, value)
    for name, record in sorted(manifest.files.items()):
        table.add_row(name, f"{record.bytes / 1e6:.2f} MB")
    console.print(table)


def _say_note(console: Console, manifest: Manifest) -> None:
    if manifest.note:
        console.print(Text(f"{manifest.note}: answers and kept patches mean nothing, timings do."))


def _grid(kept: list[int], grid: int) -> Text:
    """The picture's patches as a map: a block where one was kept."""
    marked = set(kept)
    lines = ("".join("█" if row * grid + col in marked else "·" for col in range(grid)) for row in range(grid))
    return Text("\n".join("  " + line for line in lines))
