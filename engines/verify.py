"""Compare torch, ONNX Runtime and TensorRT on the graphs of an engine directory, through Polygraphy's runners.

The files are run as they lie there. Torch is the reference for ONNX Runtime, which is the reference for TensorRT: what
was compiled is the ONNX file, and where both disagree with the checkpoint the first comparison says so.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.backends import MODULES, gpu_present
from engines.comparison import FAILED, NOT_RUN, OK, TOLERANCES, Judge, Lead, Report, Row, print_report
from engines.profiles import check_tensors
from engines.session import Array, results_of, state_pairs
from flowcut.aliases import ALIASES, resolve
from flowcut.artifacts import Manifest, check_files, read_manifest
from flowcut.checkpoint import Weights, random_weights
from flowcut.contract import GraphContract, TensorSpec, language_contract, vision_contract
from flowcut.deps import require
from flowcut.errors import CheckpointError, ConfigError, EngineError, FlowCutError
from flowcut.schedule import Schedule

if TYPE_CHECKING:
    from engines.reference import TorchVision

__all__ = ["Report", "print_report", "verify"]

LOG = logging.getLogger("flowcut.verify")
TEXT_TOKENS, IMAGE_AT, LENGTH_STEP, DECODE_STEPS = 24, 4, 5, 3
"""Of the prompts: text beside a picture, where it begins, by how much lengths differ, steps after the prefill."""
Feeds = dict[str, Array]


def verify(directory: Path, *, checkpoint: str | None = None, seed: int = 0, samples: int = 2) -> Report:
    """Run both graphs of an engine directory on seeded inputs and compare what comes out.

    Memory: one graph at a time in float32, 4 bytes a parameter (27 GB for a 7B decoder), in torch and on ONNX Runtime.

    Args:
        checkpoint: a model as `flowcut engine` takes it; None takes the manifest's hint.
        seed: of pictures and prompts.
        samples: pictures, and prompts of different lengths; no more than the engine's limits.

    Raises:
        EngineError: not an engine directory, or one in bfloat16.
        CheckpointError: `checkpoint` is not the one that the directory was built from.
        FlowCutError: `checkpoint` cannot be read, or polygraphy or onnxruntime is not installed.
    """
    if samples < 1:
        raise ConfigError(f"samples must be at least 1, got {samples}.")
    manifest = read_manifest(directory)
    if manifest.precision not in TOLERANCES:
        raise EngineError(
            f"precision must be one of {', '.join(TOLERANCES)} to be verified, got {manifest.precision!r}: numpy, "
            "through which tensors come and go, has no such type."
        )
    require("onnxruntime", extra="cpu")
    with _polygraphy(manifest.backend):
        check = _Verification(directory, manifest, *_reference_weights(manifest, checkpoint))
        check.run(seed, samples)
    return Report(str(directory), manifest.model, manifest.note, manifest.precision, check.inputs, tuple(check.rows))


@dataclass
class _Verification:
    """One run of `verify`. `why_not` says why there are no weights."""

    directory: Path
    manifest: Manifest
    weights: Weights | None
    why_not: str
    rows: list[Row] = field(default_factory=list)
    inputs: str = ""

    def run(self, seed: int, samples: int) -> None:
        manifest, limits = self.manifest, self.manifest.limits
        built_for = (manifest.geometry, manifest.tokens, manifest.precision, limits)
        vision, language = vision_contract(*built_for), language_contract(*built_for)
        self._check_files()
        pixels = pictures(min(samples, limits.max_images), manifest.geometry.vision.image_size, seed)
        embeds = self._vision(vision, pixels.astype(vision.inputs[0].dtype))
        steps, lengths = prompts(manifest, embeds, min(samples, limits.max_batch), seed)
        self._language(language, steps, lengths)
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
            for judge, got, expected in self._pairs(contract, results):
                self.rows += judge.vision(got[0], expected[0], patches, lead)
        for outputs in results.values():
            if np.isfinite(embeds := outputs[0]["image_embeds"]).all():
                return embeds
        spec = contract.outputs[0]
        random = np.random.default_rng(0).standard_normal(spec.shape({"images": len(pixels)}))
        return random.astype(spec.dtype)

    def _language(self, contract: GraphContract, steps: Sequence[Feeds], lengths: Array) -> None:
        results = self._run_all(contract, steps, self._torch_language(contract) if self.weights else None)
        for judge, got, expected in self._pairs(contract, results):
            for i, (a, b) in enumerate(zip(got, expected, strict=True)):
                name = f"logits, decode {i}" if i else "logits, prefill"
                self.rows.append(judge.values(name, a["logits"], b["logits"]))
            used = lengths + len(steps) - 1
            self.rows.append(judge.values_worst("cache", _used(got[-1], used), _used(expected[-1], used)))

    def _torch_vision(self, contract: GraphContract) -> TorchVision:
        from engines.reference import ExportedWeights, TorchVision

        assert self.weights is not None
        weights = ExportedWeights(self.weights, self.manifest.precision)
        return TorchVision(weights, contract, Schedule.from_dict(self.manifest.schedule))

    def _torch_language(self, contract: GraphContract) -> Any:
        from engines.reference import ExportedWeights, TorchLanguage

        assert self.weights is not None
        return TorchLanguage(ExportedWeights(self.weights, self.manifest.precision), contract)

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
        makers: dict[str, Any] = {"onnxruntime": lambda: onnx_runner(self.directory / f"{graph}.onnx")}
        backend = self.manifest.backend
        if backend != "ort" and gpu_present():
            makers[MODULES[backend]] = lambda: engine_runner(self.directory / f"{graph}.engine", backend)
        elif backend != "ort":
            row = Row(graph, "onnxruntime", MODULES[backend], "all", NOT_RUN, detail="no CUDA GPU")
            self.rows.append(row)
        return makers

    def _pairs(
        self, contract: GraphContract, results: Mapping[str, list[Feeds]]
    ) -> Iterator[tuple[Judge, list[Feeds], list[Feeds]]]:
        """Each runner with the one before it."""
        names = list(results)
        for reference, runner in pairwise(names):
            judge = Judge(contract.name, reference, runner, TOLERANCES[self.manifest.precision])
            yield judge, results[runner], results[reference]

    def _check_metadata(self, graph: str, runner: Any) -> None:
        """What the ONNX file says of itself against the manifest."""
        expected = expected_metadata(self.manifest)
        got = runner.sess.get_modelmeta().custom_metadata_map
        problems = [f"{k} must be {v!r}, got {got.get(k)!r}" for k, v in expected.items() if got.get(k) != v]
        verdict = FAILED if problems else OK
        self.rows.append(Row(graph, "manifest", "onnxruntime", "metadata", verdict, detail="; ".join(problems)))


def expected_metadata(manifest: Manifest) -> dict[str, str]:
    """What the exporter writes into each ONNX file."""
    return {
        "flowcut.model": manifest.model,
        "flowcut.note": manifest.note,
        "flowcut.source_sha256": manifest.source_sha256,
        "flowcut.tokens": str(manifest.tokens),
        "flowcut.schedule": json.dumps(dict(manifest.schedule), sort_keys=True),
        "flowcut.precision": manifest.precision,
    }


def onnx_runner(path: Path) -> Any:
    """Polygraphy's runner of ONNX Runtime, on the CPU: the provider that computes most exactly, and is always there."""
    from polygraphy.backend.onnxrt import OnnxrtRunner

    ort = require("onnxruntime", extra="cpu")
    options = ort.SessionOptions()
    # Warns of every cache it copies, which it does here since the runner hands it over as arrays. Polygraphy's own
    # loader, SessionFromOnnx, has no way to say so.
    options.log_severity_level = 3
    return OnnxrtRunner(lambda: ort.InferenceSession(path, options, ["CPUExecutionProvider"]), name="onnxruntime")


def engine_runner(path: Path, backend: str) -> Any:
    """Polygraphy's runner of TensorRT or TensorRT-RTX. It needs libcudart.so where the loader finds it."""
    from polygraphy.backend.trt import EngineFromBytes, TrtRunner

    return TrtRunner(EngineFromBytes(lambda: np.memmap(path, np.uint8, mode="r")), name=MODULES[backend])


def run_steps(runner: Any, contract: GraphContract, steps: Sequence[Feeds]) -> list[Feeds]:
    """Outputs of every step, the cache handed from each to the next; only the last step's outputs hold the cache.

    Raises:
        EngineError: outputs whose names, shapes or types are not the contract's.
    """
    pairs, results = state_pairs(contract), []
    sizes = _sizes(contract, steps[0])
    cache = {spec.name: np.zeros(spec.shape(sizes), spec.dtype) for spec, _ in pairs}
    for step in steps:
        outputs = runner.infer({**step, **cache})
        outputs = {name: np.array(array) for name, array in outputs.items()}  # runners reuse their buffers
        _check_outputs(contract, outputs, sizes)
        cache = {spec.name: outputs[present] for spec, present in pairs}
        results.append({s.name: outputs[s.name] for s in results_of(contract)})
    return [*results[:-1], results[-1] | {present: cache[spec.name] for spec, present in pairs}]


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


def _sizes(contract: GraphContract, feeds: Feeds) -> dict[str, int]:
    """Named dimensions of one step."""
    named = (
        (d, n) for s in contract.inputs if s.name in feeds for d, n in zip(s.dims, feeds[s.name].shape, strict=True)
    )
    return {d: n for d, n in named if isinstance(d, str)}


def _check_outputs(contract: GraphContract, outputs: Feeds, sizes: Mapping[str, int]) -> None:
    wanted = [TensorSpec(s.name, s.dtype, s.shape(sizes)) for s in contract.outputs]
    got = [TensorSpec(name, array.dtype.name, array.shape) for name, array in outputs.items()]
    check_tensors(f"{contract.name} outputs", wanted, got)


def _used(outputs: Feeds, lengths: Array) -> Feeds:
    """The cache, with zeros in the rows that no token of a sequence has written: padding may leave anything there."""
    used = {}
    for name, array in outputs.items():
        if name.startswith("present."):
            rows = np.arange(array.shape[2]) < lengths[:, None]  # [B, C]
            used[name] = np.where(rows[:, None, :, None], array, 0)
    return used


@contextmanager
def _polygraphy(backend: str) -> Iterator[None]:
    """Polygraphy, set to the backend's TensorRT, and quiet: what matters is in the rows. --verbose twice shows all."""
    # What POLYGRAPHY_USE_TENSORRT_RTX sets. Its modules read it when they are imported, so a process that verifies
    # directories of both backends has the first one's library for both.
    config: Any = require("polygraphy.config", extra="verify")
    config.USE_TENSORRT_RTX = backend == "rtx"
    logger = require("polygraphy.logger", extra="verify").G_LOGGER
    with logger.verbosity(logger.VERBOSE if LOG.isEnabledFor(logging.DEBUG) else sys.maxsize):
        yield
