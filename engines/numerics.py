"""What an engine computes in: precisions of both graphs, the calibration they need, the decoder's stages.

Checked before a tensor is read: which precision a backend and a GPU have, and how much memory and disk it will take.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calib.rounding import block_size
from engines.backends import Backend, gpu_sm, target_capabilities, trt_module
from engines.widen import free_memory
from flowcut.aliases import ALIASES, Model
from flowcut.checkpoint import Weights
from flowcut.config import QUANTIZED, LlavaConfig, Precision
from flowcut.errors import ConfigError, EngineError
from flowcut.tensors import expected_tensors

if TYPE_CHECKING:
    from calib.calibration import Calibration

LOG = logging.getLogger("flowcut.engines")
CALIBRATION = "calibration.safetensors"
"""Beside a checkpoint: used where none is named. In an engine directory: the one that was used."""
NEEDED_SM = {"bf16": 80, "fp8": 89}
"""The least compute capability that has a type, of those that not every GPU has that TensorRT-RTX compiles for."""
DEFAULT_SM = 80
"""The least that TensorRT-RTX compiles for unless told otherwise."""
COMPILER_SHARE = (1.1, 2.1)
"""Memory that compiling takes, of a graph's weights: as they are, and rounded (docs/results/full_size.md)."""
_PARTS = ("language", "vision")


@dataclass(frozen=True)
class Numerics:
    """What both graphs are exported with.

    Attributes:
        precision: the decoder's; vision: the tower's and the projector's.
        stages: graphs that the decoder is split into.
        calibration: what int4 and fp8 were given; None where neither is used, or int4 is rounded without.
    """

    precision: Precision
    vision: Precision
    stages: int = 1
    calibration: Calibration | None = None

    @property
    def ranges(self) -> Mapping[str, float]:
        return self.calibration.ranges if self.calibration else {}

    def weights(self, source: Weights) -> Weights:
        """`source`, with the calibration's scales folded in where weights become int4."""
        parts = self._parts({"int4"})
        if self.calibration is None or not parts:
            return source
        from calib.calibration import smoothed

        return smoothed(source, self.calibration, parts)

    def record(self) -> dict[str, Any]:
        """What the manifest says of the calibration; empty without one."""
        if self.calibration is None:
            return {}
        return {"sha256": self.calibration.sha256, "pictures": len(self.calibration.info.get("pictures", []))}

    def _parts(self, precisions: Collection[str]) -> set[str]:
        return {part for part, own in zip(_PARTS, (self.precision, self.vision), strict=True) if own in precisions}


def choose_numerics(
    model: Model, backend: Backend, precision: Precision, vision: Precision | None, stages: int, calibration: str | None
) -> tuple[Numerics, Path | None]:
    """Precisions with their defaults, and the calibration they need, with the file it came from.

    Args:
        vision: None: the decoder's, but int8 where that is int4, fp16 with TensorRT.
        calibration: a file, "none", or None for the checkpoint's own where there is one; that is of all its layers, so
            not for fewer.

    Raises:
        ConfigError: a precision without the calibration or shapes it needs, or stages beyond the layers.
    """
    chosen = vision or _vision_default(precision, backend)
    if not 1 <= stages <= model.config.text.num_hidden_layers:
        raise ConfigError(f"stages must be in 1..{model.config.text.num_hidden_layers} (layers), got {stages}.")
    _check_blocks(model.config, precision, chosen)
    used = {precision, chosen} & {"int4", "fp8"}
    if calibration not in (None, "none") and not used:
        raise ConfigError(
            f"calibration must be left out for precisions {precision} and {chosen}, which take none, got "
            f"{calibration!r}."
        )
    path = _calibration_file(model, calibration)
    if path is None or not used:
        if "fp8" in used:
            raise ConfigError(
                "calibration must be given for precision fp8, which rounds activations too, got none. `flowcut "
                f"calibrate quantize {_named(model)} --images DIR --out FILE.safetensors` makes one for --calibration."
            )
        return Numerics(precision, chosen, stages), None
    from calib.calibration import load_calibration

    found = load_calibration(path, model.weights)
    for own, has in (("int4", found.scales), ("fp8", found.ranges)):
        if own in used and not has:
            remedy = ", or round to nearest with --calibration none." if own == "int4" else "."
            raise ConfigError(
                f"calibration {path} must have been made with --precision {own} or all for precision {own}, got one "
                f"without. Calibrate again{remedy}"
            )
    return Numerics(precision, chosen, stages, found), path


def _named(model: Model) -> str:
    """The arguments that mean this model."""
    name = model.name if model.name in ALIASES else str(model.files)
    full = LlavaConfig.from_file(model.files / "config.json").text.num_hidden_layers
    layers = model.config.text.num_hidden_layers
    return name + " --weights random" * model.weights.random + f" --decoder-layers {layers}" * (layers != full)


def _vision_default(precision: Precision, backend: Backend) -> Precision:
    """The tower loses patches' ranks in int4, and is a twentieth of the weights. TensorRT documents weights alone in
    int4 only."""
    if precision != "int4":
        return precision
    return "fp16" if backend == "trt" else "int8"


def _calibration_file(model: Model, calibration: str | None) -> Path | None:
    if calibration == "none":
        return None
    if calibration is not None:
        return Path(calibration).expanduser()
    own = model.files / CALIBRATION
    whole = LlavaConfig.from_file(model.files / "config.json") == model.config
    return own if own.is_file() and whole and not model.weights.random else None


def _check_blocks(config: LlavaConfig, precision: Precision, vision: Precision) -> None:
    """int4 rounds whole blocks of inputs."""
    for sizes, own in ((config.text, precision), (config.vision, vision)):
        if own == "int4":
            block_size(sizes.hidden_size)
            block_size(sizes.intermediate_size)


def check_precision(backend: Backend, precisions: Collection[str], compute_capabilities: Sequence[str] = ()) -> None:
    """Refuse, before anything is exported, what a backend or a GPU cannot compute.

    Raises:
        EngineError: fp32 for rtx and trt, or a type that a GPU lacks.
    """
    if backend == "ort":
        return
    if "fp32" in precisions:
        raise EngineError(
            f"precision must be one of fp16, bf16, {', '.join(QUANTIZED)} for backend {backend}, of both graphs, got "
            "'fp32': TensorRT-RTX has no float32 attention kernel with a KV cache (it reports \"not decomposable\"), "
            "and TensorRT is not known to have one. Choose another, or BACKEND=ort (--backend ort) for fp32."
        )
    for precision in sorted(NEEDED_SM.keys() & set(precisions)):
        targets = [int(name.lower().removeprefix("sm")) for name in compute_capabilities]
        if backend == "trt":
            targets = [sm for sm in [gpu_sm()] if sm is not None]
        if lacking := [f"sm{sm}" for sm in targets if sm < NEEDED_SM[precision]]:
            raise EngineError(
                f"precision must be one of {', '.join(_on(min(targets)))} on {', '.join(lacking)}, got {precision!r}, "
                f"which GPUs have from sm{NEEDED_SM[precision]} on. Choose one of these, or another GPU."
            )
    if backend == "trt" and "int8" in precisions:  # NVIDIA's documentation: "weight-only quantization ... for INT4"
        LOG.warning("TensorRT documents weights alone in int4 only: int8 may be refused, or be slow. Not yet run.")


def build_targets(backend: Backend, precisions: Collection[str], given: Sequence[str]) -> tuple[str, ...]:
    """GPUs to compile for: those given, else all that have the precision's types; () leaves it to the compiler."""
    needed = max((NEEDED_SM.get(precision, 0) for precision in precisions), default=0)
    if given or needed <= DEFAULT_SM or backend != "rtx":
        return tuple(given)
    return tuple(name for name in target_capabilities(trt_module(backend)) if int(name.removeprefix("sm")) >= needed)


def weight_bytes(config: LlavaConfig, numerics: Numerics) -> int:
    """Of both graphs, near enough to tell whether they fit a disk."""
    total = 0
    for name, shape in expected_tensors(config).items():
        own = numerics.vision if name.startswith(("vision_tower.", "multi_modal_projector.")) else numerics.precision
        layer = ".layers." in name or name.startswith("multi_modal_projector.")
        linear = len(shape) == 2 and layer
        total += int(prod(shape) * _bytes(own if linear else "fp32" if own == "fp32" else "fp16"))
    return total


def warn_of_memory(config: LlavaConfig, numerics: Numerics) -> None:
    """Say so where compiling will probably take more memory than there is, and what takes less."""
    whole = weight_bytes(config, numerics)
    tower = weight_bytes(replace(config, text=replace(config.text, num_hidden_layers=1)), numerics)
    graph = (whole - tower) / numerics.stages + tower
    needed, free = graph * COMPILER_SHARE[numerics.precision in QUANTIZED], free_memory()
    if free is not None and free < needed:
        LOG.warning(
            "Compiling takes about %.0f GB of memory, and %.0f GB are free. --stages %d or --precision int4 take less.",
            needed / 1e9, free / 1e9, numerics.stages * 2,
        )  # fmt: skip


def _bytes(precision: Precision) -> float:
    """Of one weight, its share of the scales included."""
    return {"fp32": 4, "fp16": 2, "bf16": 2, "int8": 1, "fp8": 1, "int4": 0.5 + 2 / 64}[precision]


def _on(sm: int) -> list[str]:
    """Precisions that a GPU has."""
    return [precision for precision in ("fp16", "bf16", *QUANTIZED) if NEEDED_SM.get(precision, 0) <= sm]
