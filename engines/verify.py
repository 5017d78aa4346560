"""Compare torch, ONNX Runtime and TensorRT on the graphs of an engine directory, through Polygraphy's runners.

The files are run as they lie there. Torch is the reference for ONNX Runtime, which is the reference for TensorRT: what
was compiled is the ONNX file, and where both disagree with the checkpoint the first comparison says so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.backends import MODULES, gpu_present
from engines.comparison import (
    FAILED,
    NOT_RUN,
    OK,
    WEIGHTS,
    Judge,
    Lead,
    Report,
    Row,
    Tolerance,
    print_report,
    tolerance,
    vision_tolerance,
)
from engines.loading import graph_contracts, graph_precisions
from engines.numerics import CALIBRATION, Numerics
from engines.runners import Feeds, engine_runner, onnx_runner, polygraphy, run_steps, sizes_of_feeds
from engines.session import Array, feeds_of, results_of
from engines.stored import stored_weights, worst
from engines.widen import NOTE, widened_contract
from flowcut.aliases import ALIASES, resolve
from flowcut.artifacts import Manifest, check_files, read_manifest
from flowcut.checkpoint import Weights, random_weights
from flowcut.contract import GraphContract, TensorSpec
from flowcut.deps import require
from flowcut.errors import CheckpointError, ConfigError, EngineError, FlowCutError
from flowcut.schedule import Schedule

if TYPE_CHECKING:
    from engines.reference import ExportedWeights, TorchVision

__all__ = ["Report", "print_report", "verify"]

LOG = logging.getLogger("flowcut.verify")
TEXT_TOKENS, IMAGE_AT, LENGTH_STEP, DECODE_STEPS = 24, 4, 5, 3
"""Of the prompts: text beside a picture, where it begins, by how much lengths differ, steps after the prefill."""
STORED = 1e-6
"""Allowed for a weight in the file: none but what float32 loses on the way."""


def verify(directory: Path, *, checkpoint: str | None = None, seed: int = 0, samples: int = 2) -> Report:
    """Run both graphs of an engine directory on seeded inputs and compare what comes out.

    Memory: one graph at a time in float32, 4 bytes a parameter (27 GB for a 7B decoder), in torch and on ONNX Runtime.

    Args:
        checkpoint: a model as `flowcut engine` takes it; None takes the manifest's hint.
        seed: of pictures and prompts.
        samples: pictures, and prompts of different lengths; no more than the engine's limits.

    Raises:
        EngineError: not an engine directory, or a bf16 one whose float32 weights have no room.
        CheckpointError: `checkpoint` is not the one that the directory was built from.
        FlowCutError: `checkpoint` cannot be read, or polygraphy or onnxruntime is not installed.
    """
    if samples < 1:
        raise ConfigError(f"samples must be at least 1, got {samples}.")
    manifest = read_manifest(directory)
    require("onnxruntime", extra="cpu")
    with polygraphy(manifest.backend):
        weights, why_not = _reference_weights(manifest, checkpoint)
        exported = None if weights is None else _exported(directory, manifest, weights)
        check = _Verification(directory, manifest, exported, why_not)
        check.run(seed, samples)
    return Report(
        directory=str(directory),
        model=manifest.model,
        note=manifest.note,
        precision=manifest.precision,
        vision_precision=manifest.vision_precision,
        graphs=manifest.graphs,
        inputs=check.inputs,
        rows=tuple(check.rows),
    )


@dataclass
class _Verification:
    """One run of `verify`. `weights` are each graph's, by its name; `why_not` says why there are none."""

    directory: Path
    manifest: Manifest
    weights: Mapping[str, ExportedWeights] | None
    why_not: str
    rows: list[Row] = field(default_factory=list)
    inputs: str = ""

    def run(self, seed: int, samples: int) -> None:
        manifest, limits = self.manifest, self.manifest.limits
        # What comes and goes are numpy's arrays: where a cache is bf16, it is float32 here.
        vision, *stages = map(widened_contract, graph_contracts(manifest))
        if wide := [graph for graph, own in graph_precisions(manifest).items() if own == "bf16"]:
            LOG.warning("%s: %s.", ", ".join(wide), NOTE)
        self._check_files()
        pixels = pictures(min(samples, limits.max_images), manifest.geometry.vision.image_size, seed)
        embeds = self._vision(vision, pixels.astype(vision.inputs[0].dtype))
        steps, lengths = prompts(manifest, embeds, min(samples, limits.max_batch), seed)
        for stage in stages:
            steps = self._language(stage, steps, lengths)
        texts = ", ".join(map(str, lengths))
        self.inputs = (
            f"{len(pixels)} pictures; prompts of {texts} tokens and {len(steps) - 1} decode steps; seed {seed}"
        )

    def _check_files(self) -> None:
        problems = check_files(self.directory, self.manifest)
        verdict, detail = (FAILED, "; ".join(problems)) if problems else (OK, f"{len(self.manifest.files)} files")
        self.rows.append(Row("directory", "manifest", "files", "size, sha256", verdict, detail=detail))

    def _vision(self, contract: GraphContract, pixels: Array) -> Array:
        """image_embeds for the language graph: the reference's, else the first that there are."""
        steps = [{"pixel_values": pixels}]
        with ExitStack() as stack:
            torch = stack.enter_context(self._torch_vision(contract)) if self.weights else None
            results = self._run_all(contract, steps, nullcontext(torch) if torch else None)
            lead: Lead | None = partial(torch.lead, pixels) if torch else None
            patches = self.manifest.geometry.vision.patches
            allowed = partial(vision_tolerance, self.manifest.vision_precision, self.manifest.precision)
            for judge, got, expected in _pairs(contract, results, allowed):
                self.rows += judge.vision(got[0], expected[0], patches, lead)
        return _first_finite(results, contract.outputs[0], [sizes_of_feeds(contract, steps[0])])[0]

    def _language(self, contract: GraphContract, steps: Sequence[Feeds], lengths: Array) -> list[Feeds]:
        """Check one stage of the decoder; the inputs with its `hidden`, for the next one."""
        wanted = [s.name for s in feeds_of(contract)]
        feeds = [{name: step[name] for name in wanted} for step in steps]
        (result,) = results_of(contract)
        results = self._run_all(contract, feeds, self._torch_language(contract) if self.weights else None)
        for judge, got, expected in _pairs(contract, results, partial(tolerance, self.manifest.precision)):
            for i, (a, b) in enumerate(zip(got, expected, strict=True)):
                name = f"{result.name}, decode {i}" if i else f"{result.name}, prefill"
                self.rows.append(judge.values(name, a[result.name], b[result.name]))
            used = lengths + len(steps) - 1
            self.rows.append(judge.values_worst("cache", _used(got[-1], used), _used(expected[-1], used)))
        passed = _first_finite(results, result, [sizes_of_feeds(contract, step) for step in feeds])
        return [step | {result.name: array} for step, array in zip(steps, passed, strict=True)]

    def _torch_vision(self, contract: GraphContract) -> TorchVision:
        from engines.reference import TorchVision

        assert self.weights is not None
        return TorchVision(self.weights[contract.name], contract, Schedule.from_dict(self.manifest.schedule))

    def _torch_language(self, contract: GraphContract) -> Any:
        from engines.reference import TorchLanguage

        assert self.weights is not None
        return TorchLanguage(self.weights[contract.name], contract)

    def _run_all(
        self, contract: GraphContract, steps: Sequence[Feeds], reference: AbstractContextManager[Any] | None
    ) -> dict[str, list[Feeds]]:
        """Outputs of every step by runner, each the next one's reference; runners that do not run are rows instead.

        One after another: their weights are not in memory together.
        """
        graph, results = contract.name, {}
        if reference is None:
            self.rows.append(Row(graph, "checkpoint", "torch", "all", NOT_RUN, detail=self.why_not))
        else:
            self._check_weights(graph)
            with reference as torch:
                results["torch"] = run_steps(torch, contract, steps)
        for name, make in self._runners(graph).items():
            try:
                with make() as runner:
                    if name == "onnxruntime":
                        self._check_metadata(graph, runner)
                    results[name] = run_steps(runner, contract, steps)
            except Exception as error:  # those of ONNX Runtime, TensorRT and Polygraphy share no base class
                detail = " ".join(str(error).split())
                self.rows.append(Row(graph, "contract", name, "signature", FAILED, detail=detail))
            else:
                self.rows.append(Row(graph, "contract", name, "signature", OK))
        return results

    def _runners(self, graph: str) -> dict[str, Any]:
        """Makers of the runners whose files are in the directory, where they can run."""
        backend, bf16 = self.manifest.backend, graph_precisions(self.manifest)[graph] == "bf16"
        makers: dict[str, Any] = {"onnxruntime": lambda: onnx_runner(self.directory / f"{graph}.onnx", bf16)}
        if backend == "ort":
            return makers
        why_not = "no CUDA GPU" if not gpu_present() else ""
        if bf16 and graph != "vision":
            why_not = why_not or "its cache is bf16, which numpy has not"
        if why_not:
            self.rows.append(Row(graph, "onnxruntime", MODULES[backend], "all", NOT_RUN, detail=why_not))
        else:
            makers[MODULES[backend]] = lambda: engine_runner(self.directory / f"{graph}.engine", backend)
        return makers

    def _check_weights(self, graph: str) -> None:
        """What is stored in the ONNX file against the checkpoint."""
        assert self.weights is not None
        try:
            found = worst(stored_weights(self.directory / f"{graph}.onnx", self.weights[graph]))
        except EngineError as error:
            self.rows.append(Row(graph, "checkpoint", "onnx", WEIGHTS, FAILED, detail=str(error)))
            return
        verdict = OK if found.error <= STORED else FAILED
        detail = f"greatest at {found.name}"
        self.rows.append(Row(graph, "checkpoint", "onnx", WEIGHTS, verdict, found.error, STORED, detail))

    def _check_metadata(self, graph: str, runner: Any) -> None:
        """What the ONNX file says of itself against the manifest."""
        expected = expected_metadata(self.manifest, graph)
        got = runner.sess.get_modelmeta().custom_metadata_map
        problems = [f"{k} must be {v!r}, got {got.get(k)!r}" for k, v in expected.items() if got.get(k) != v]
        verdict = FAILED if problems else OK
        self.rows.append(Row(graph, "manifest", "onnxruntime", "metadata", verdict, detail="; ".join(problems)))


def _pairs(
    contract: GraphContract, results: Mapping[str, list[Feeds]], allowed: Callable[[str], Tolerance]
) -> Iterator[tuple[Judge, list[Feeds], list[Feeds]]]:
    """Each runner with the one before it."""
    for reference, runner in pairwise(results):
        yield Judge(contract.name, reference, runner, allowed(runner)), results[runner], results[reference]


def _first_finite(
    results: Mapping[str, list[Feeds]], spec: TensorSpec, sizes: Sequence[Mapping[str, int]]
) -> list[Array]:
    """An output of every step, of the first runner that has finite ones; else random numbers."""
    for outputs in results.values():
        arrays = [output[spec.name] for output in outputs]
        if all(np.isfinite(array).all() for array in arrays):
            return arrays
    rng = np.random.default_rng(0)
    return [rng.standard_normal(spec.shape(each)).astype(spec.dtype) for each in sizes]


def _exported(directory: Path, manifest: Manifest, weights: Weights) -> dict[str, ExportedWeights]:
    """The tensors as each graph holds them, by its name.

    Raises:
        ConfigError: the directory's calibration is of another checkpoint.
    """
    from calib.calibration import load_calibration
    from engines.reference import ExportedWeights

    calibration = load_calibration(directory / CALIBRATION, weights) if manifest.calibration else None
    numerics = Numerics(manifest.precision, manifest.vision_precision, manifest.stages, calibration)
    source = numerics.weights(weights)
    return {
        graph: ExportedWeights(source, precision, numerics.ranges)
        for graph, precision in graph_precisions(manifest).items()
    }


def expected_metadata(manifest: Manifest, graph: str) -> dict[str, str]:
    """What the exporter writes into the ONNX file of a graph."""
    return {
        "flowcut.model": manifest.model,
        "flowcut.note": manifest.note,
        "flowcut.source_sha256": manifest.source_sha256,
        "flowcut.tokens": str(manifest.tokens),
        "flowcut.schedule": json.dumps(dict(manifest.schedule), sort_keys=True),
        "flowcut.precision": graph_precisions(manifest)[graph],
    }


def pictures(count: int, size: int, seed: int) -> Array:
    """Smooth seeded pixel_values with a little noise, float32 [count, 3, size, size], unit variance."""
    rng = np.random.default_rng([seed, 0])
    y, x = np.mgrid[0:size, 0:size] / size
    waves = (
        rng.uniform(-6, 6, (count, 3, 8, 2)),
        rng.uniform(0, 2 * np.pi, (count, 3, 8)),
        rng.normal(size=(count, 3, 8)),
    )
    out = 0.3 * rng.standard_normal((count, 3, size, size))
    for i in range(8):
        frequency, phase, height = (w[:, :, i, ..., None, None] for w in waves)
        out += height * np.sin(2 * np.pi * (frequency[:, :, 0] * x + frequency[:, :, 1] * y) + phase)
    scaled: Array = (out / out.std()).astype(np.float32)
    return scaled


def prompts(manifest: Manifest, image_embeds: Array, batch: int, seed: int) -> tuple[list[Feeds], Array]:
    """A prefill of `batch` prompts, the first ones with a picture each, and decode steps of seeded tokens.

    Returns:
        The inputs of every step without the cache, and the prompts' lengths [batch].
    """
    rng, tokens, limits = np.random.default_rng([seed, 1]), manifest.tokens, manifest.limits
    vocabulary = manifest.geometry.text.vocab_size
    longest = min(limits.max_prompt, tokens + TEXT_TOKENS)
    lengths = np.maximum(longest - LENGTH_STEP * np.arange(batch), 1)
    image_rows = np.full((batch, longest), -1)
    for i in range(min(batch, len(image_embeds))):
        room = min(tokens, max(0, int(lengths[i]) - IMAGE_AT - 1))  # less where max_prompt is very short
        image_rows[i, IMAGE_AT : IMAGE_AT + room] = i * tokens + np.arange(room)
    prefill = {
        "input_ids": rng.integers(0, vocabulary, (batch, longest)),
        "position_ids": np.tile(np.arange(longest), (batch, 1)),
        "image_rows": image_rows,
        "last_token": lengths - 1,
        "image_embeds": image_embeds,
    }
    decode = [
        {
            "input_ids": rng.integers(0, vocabulary, (batch, 1)),
            "position_ids": (lengths + step)[:, None],
            "image_rows": np.full((batch, 1), -1),
            "last_token": np.zeros(batch, np.int64),
            "image_embeds": image_embeds,
        }
        for step in range(min(DECODE_STEPS, limits.max_new_tokens))
    ]
    return [prefill, *decode], lengths


def _reference_weights(manifest: Manifest, checkpoint: str | None) -> tuple[Weights | None, str]:
    """The tensors that the directory was built from, or why there are none. A wrong `checkpoint` is an error."""
    try:
        require("torch", extra="torch")
        weights = _open_weights(manifest, checkpoint)
    except FlowCutError as error:
        if checkpoint is not None:
            raise
        return None, str(error)
    if weights is None:
        return None, "checkpoint not found; pass --checkpoint DIR"
    if weights.sha256 == manifest.source_sha256:
        return weights, ""
    problem = f"the one that was exported (sha256 {manifest.source_sha256 or 'not known'}), got {weights.sha256}"
    if checkpoint is not None:
        raise CheckpointError(f"checkpoint must be {problem}. Pass another --checkpoint, or build the engine again.")
    return None, f"{manifest.model} is not {problem}; pass --checkpoint DIR"


def _open_weights(manifest: Manifest, checkpoint: str | None) -> Weights | None:
    layers = manifest.geometry.text.num_hidden_layers
    if checkpoint is not None:
        return resolve(checkpoint, decoder_layers=layers).weights
    if manifest.weights == "random":
        return random_weights(manifest.geometry, manifest.seed)
    if manifest.source in ALIASES or Path(manifest.source).is_dir():
        return resolve(manifest.source, decoder_layers=layers).weights
    return None


def _used(outputs: Feeds, lengths: Array) -> Feeds:
    """The cache, with zeros in the rows that no token of a sequence has written: padding may leave anything there."""
    used = {}
    for name, array in outputs.items():
        if name.startswith("present."):
            rows = np.arange(array.shape[2]) < lengths[:, None]  # [B, C]
            used[name] = np.where(rows[:, None, :, None], array, 0)
    return used
