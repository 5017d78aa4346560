"""May two engine directories be compared, and does what is asked fit them: known before anything is loaded."""

from __future__ import annotations

from typing import Any

from engines.bench.settings import BenchSettings
from engines.loading import choose_backend
from flowcut.anyres import image_slots
from flowcut.artifacts import Manifest, read_manifest
from flowcut.errors import ConfigError
from flowcut.integrity import MANIFEST

REPORT = "report.html"
RESULTS = ("bench.json", "bench.md", "bench.png", "bench.svg", "kept.png", "kept-baseline.png", REPORT)
"""Files of a directory of results, which a later benchmark replaces; but for a report of the user's, which stays."""


def manifests(settings: BenchSettings) -> tuple[Manifest, Manifest | None, list[str]]:
    """Of the directory and of its baseline, and how they differ where they may.

    Raises:
        EngineError: not an engine directory, or a backend that it does not have or that cannot run here.
        ConfigError: a baseline of something else, or a batch or an answer beyond what a directory was built for.
    """
    own = read_manifest(settings.directory)
    if settings.scenes and own.weights == "random":
        raise ConfigError(f"scenes must be 0 with random weights, whose answers mean nothing, got {settings.scenes}.")
    other = None if settings.baseline is None else read_manifest(settings.baseline)
    for directory, manifest in ((settings.directory, own), (settings.baseline, other)):
        if manifest is not None:
            choose_backend(manifest, settings.backend)
            _check_fits(settings, str(directory), manifest)
    found = [] if other is None else mismatches(own, other, settings.backend)
    if found and not settings.allow_mismatch:
        raise ConfigError(
            f"baseline must be the same model, built alike but for its visual tokens, got {settings.baseline}, whose "
            f"{'; '.join(found)}. Build another baseline with --tokens all, or compare all the same with "
            "--allow-mismatch, which every output then says."
        )
    return own, other, found


def mismatches(own: Manifest, baseline: Manifest, backend: str) -> list[str]:
    """What makes a ratio of the two mean something else than pruning, one line each."""
    rows: dict[str, tuple[Any, Any]] = {
        "model": (own.model, baseline.model),
        "geometry": (own.geometry, baseline.geometry),
        "weights": (_weights(own), _weights(baseline)),
        "precision": (own.precision, baseline.precision),
        "vision precision": (own.vision_precision, baseline.vision_precision),
        "calibration": (_calibration(own), _calibration(baseline)),
        "stages": (own.stages, baseline.stages),
        "room for text": (_text_room(own), _text_room(baseline)),
        "room for the answer": (own.limits.max_new_tokens, baseline.limits.max_new_tokens),
        "backend": (choose_backend(own, backend), choose_backend(baseline, backend)),
    }
    patches = baseline.geometry.vision.patches
    if baseline.tokens < patches or baseline.llm_tokens is not None:
        kept = baseline.budget.label(baseline.geometry)
        rows["visual tokens"] = ("all of them", f"{kept} of {patches * baseline.geometry.max_tiles}")
    if own.sha256 and own.sha256 == baseline.sha256:
        rows["engine"] = ("another", "this very one")
    shown = {"geometry": (_size(own), _size(baseline))}
    lines = []
    for name, pair in rows.items():
        if pair[0] != pair[1]:
            ours, theirs = shown.get(name, pair)
            lines.append(f"{name} is {theirs}, not {ours}")
    return lines


def check_out(settings: BenchSettings) -> None:
    """Raise ConfigError unless the results may be written: into a directory that is new, empty or of such results."""
    out = settings.results
    remedy = "Name another with --out."
    if not out.parent.is_dir():
        raise ConfigError(f"out must be in an existing directory, got {str(out)!r}. {remedy}")
    if out.exists() and not out.is_dir():
        raise ConfigError(f"out must be a directory, got the file {str(out)!r}. {remedy}")
    if out.is_dir() and (foreign := sorted({each.name for each in out.iterdir()} - set(RESULTS))):
        what = "an engine directory, which is sealed" if MANIFEST in foreign else f"{', '.join(foreign[:3])} in it"
        raise ConfigError(
            f"out must be new, empty or hold results of flowcut bench, got {str(out)!r}: {what}. {remedy}"
        )


def _check_fits(settings: BenchSettings, directory: str, manifest: Manifest) -> None:
    limits, most = manifest.limits, max(settings.batches)
    for field, limit, option in (
        ("prompts", limits.max_batch, "--max-batch"),
        ("pictures", limits.max_images, "--max-images"),
    ):
        if most > limit:
            raise ConfigError(
                f"batch must be at most {limit} ({field} at once that {directory} was built for), got {most}. Build "
                f"it again with {option} {most}."
            )
    room = _text_room(manifest)
    if settings.prompt_tokens is not None and settings.prompt_tokens > room:
        raise ConfigError(
            f"prompt_tokens must be at most {room} (what {directory} has room for beside a picture), got "
            f"{settings.prompt_tokens}. Build it again with a greater --max-prompt."
        )
    if settings.new_tokens > limits.max_new_tokens:
        raise ConfigError(
            f"new_tokens must be at most {limits.max_new_tokens} (the longest answer that {directory} was built for), "
            f"got {settings.new_tokens}. Build it again with --max-new-tokens {settings.new_tokens}."
        )


def _size(manifest: Manifest) -> str:
    vision, text = manifest.geometry.vision, manifest.geometry.text
    return (
        f"{vision.num_hidden_layers} x {vision.hidden_size} of {vision.image_size} px and "
        f"{text.num_hidden_layers} x {text.hidden_size}"
    )


def _weights(manifest: Manifest) -> str:
    seed = f" seed {manifest.seed}" if manifest.weights == "random" else f" {manifest.source_sha256[:12]}"
    return manifest.weights + seed


def _text_room(manifest: Manifest) -> int:
    """Tokens of the longest prompt beside one picture's: ONNX Runtime's attention takes the time of the whole cache."""
    return manifest.limits.max_prompt - image_slots(manifest.geometry, manifest.tokens)


def _calibration(manifest: Manifest) -> str:
    return str(manifest.calibration.get("sha256", "none"))[:12]
