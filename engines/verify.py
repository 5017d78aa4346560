"""Compare torch, ONNX Runtime and TensorRT on the graphs of an engine directory, through Polygraphy's runners.

The files are run as they lie there. Torch is the reference for ONNX Runtime, which is the reference for TensorRT: what
was compiled is the ONNX file, and where both disagree with the checkpoint the first comparison says so.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.backends import MODULES, gpu_present
from engines.comparison import (
    FAILED,
    KEPT,
    NOT_RUN,
    OK,
    WEIGHTS,
    Judge,
    Lead,
    Report,
    Row,
    Tolerance,
    jaccard,
    print_report,
    tolerance,
    vision_tolerance,
)
from engines.loading import graph_contracts, graph_precisions
from engines.numerics import CALIBRATION, Numerics
from engines.runners import Feeds, engine_runner, onnx_runner, polygraphy, run_steps, sizes_of_feeds
from engines.sessions.session import Array, feeds_of, results_of
from engines.source import source_weights
from engines.stored import stored_weights, worst
from engines.trust import checks_here
from engines.verify_inputs import Prompts, pictures, prompts, tilings, vision_inputs
from engines.verify_rows import decoder_values, first_finite, kept_problem, same_tokens
from engines.widen import NOTE, widened_contract
from flowcut.anyres import Tiling
from flowcut.artifacts import Manifest, check_files, read_manifest
from flowcut.checkpoint import Weights
from flowcut.contract import GraphContract
from flowcut.deps import require
from flowcut.errors import ConfigError, EngineError, FlowCutError
from flowcut.schedule import Schedule

if TYPE_CHECKING:
    from engines.reference import ExportedWeights, TorchVision

__all__ = ["Report", "print_report", "verify"]

LOG = logging.getLogger("flowcut.verify")
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
        weights, why_not = source_weights(manifest, checkpoint)
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
    changed: bool = False

    def run(self, seed: int, samples: int) -> None:
        manifest, limits = self.manifest, self.manifest.limits
        # What comes and goes are numpy's arrays: where a cache is bf16, it is float32 here.
        vision, *stages = map(widened_contract, graph_contracts(manifest))
        if wide := [graph for graph, own in graph_precisions(manifest).items() if own == "bf16"]:
            LOG.warning("%s: %s.", ", ".join(wide), NOTE)
        self._check_files()
        count, side = min(samples, limits.max_images), manifest.geometry.vision.image_size
        cuts = tilings(manifest.geometry, count)
        pixels = pictures(sum(each.tiles for each in cuts) or count, side, seed)
        seen = self._vision(vision, pixels.astype(vision.inputs[0].dtype), cuts)
        bare = self.weights is None and manifest.llm_tokens is not None
        asked = prompts(manifest, seen, cuts, min(samples, limits.max_batch), seed, bare)
        for stage in stages:
            asked = self._language(stage, asked)
        texts = ", ".join(str(each + 1) for each in asked.steps[0]["last_token"])
        tiles = f" of {', '.join(str(each.tiles) for each in cuts)} tiles" if cuts else ""
        steps = len(asked.steps) - 1
        self.inputs = f"{count} pictures{tiles}; prompts of {texts} tokens and {steps} decode steps; seed {seed}"

    def _check_files(self) -> None:
        problems = check_files(self.directory, self.manifest)
        self.changed = bool(problems)
        verdict, detail = (FAILED, "; ".join(problems)) if problems else (OK, f"{len(self.manifest.files)} files")
        self.rows.append(Row("directory", "manifest", "files", "size, sha256", verdict, detail=detail))

    def _vision(self, contract: GraphContract, pixels: Array, cuts: Sequence[Tiling]) -> Feeds:
        """What the language graph takes of vision's outputs: the reference's, else the first that there are."""
        steps, geometry = [vision_inputs(self.manifest, pixels, cuts)], self.manifest.geometry
        with ExitStack() as stack:
            torch = stack.enter_context(self._torch_vision(contract, cuts)) if self.weights else None
            results = self._run_all(contract, steps, nullcontext(torch) if torch else None)
            lead: Lead | None = partial(torch.lead, pixels) if torch else None
            numbers = geometry.vision.patches
            if geometry.anyres:  # places of the reading order, in which no tile has more than twice its patches
                numbers *= 2 * geometry.max_tiles
            allowed = partial(vision_tolerance, self.manifest.vision_precision, self.manifest.precision)
            for judge, got, expected in _pairs(contract, results, allowed):
                self.rows += judge.vision(got[0], expected[0], numbers, lead)
        wanted = [spec for spec in contract.outputs if spec.name != "kept"]
        return first_finite(results, wanted, [sizes_of_feeds(contract, steps[0])])[0]

    def _language(self, contract: GraphContract, asked: Prompts) -> Prompts:
        """Check one stage of the decoder; the prompts with its results, for the next one."""
        wanted = [s.name for s in feeds_of(contract)]
        feeds = [{name: step[name] for name in wanted} for step in asked.steps]
        results = self._run_all(contract, feeds, self._torch_language(contract) if self.weights else None)
        for judge, got, expected in _pairs(contract, results, partial(tolerance, self.manifest.precision)):
            self._decoder(judge, contract, feeds, (got, expected), asked)
        passed = first_finite(results, results_of(contract), [sizes_of_feeds(contract, step) for step in feeds])
        return replace(asked, steps=[step | arrays for step, arrays in zip(asked.steps, passed, strict=True)])

    def _decoder(
        self,
        judge: Judge,
        contract: GraphContract,
        feeds: Sequence[Feeds],
        pair: tuple[list[Feeds], list[Feeds]],
        asked: Prompts,
    ) -> None:
        """Compare a decoder's results with its reference's; where it keeps other visual tokens, with torch's that keeps
        the same, or, without the checkpoint, as far as they do not depend on that."""
        got, expected = pair
        same = np.ones(len(asked.lengths), bool)
        if KEPT in got[0]:
            ours, theirs = ([row[:n] for row, n in zip(o[0][KEPT], asked.kept, strict=True)] for o in pair)
            same, agreement = same_tokens(ours, theirs, asked), jaccard(ours, theirs)
            if problem := kept_problem(got[0][KEPT], asked):
                self.rows.append(judge.unmeasured(KEPT, FAILED, problem))
            elif same.all() or self.weights is None:
                self.rows.append(judge.tokens(agreement, None))
            else:
                expected, gap = self._led(contract, feeds, got[0][KEPT])
                judge, same = replace(judge, reference="torch"), np.ones_like(same)
                self.rows.append(judge.tokens(agreement, gap))
        self.rows += decoder_values(judge, contract, (got, expected), asked, same)

    def _led(self, contract: GraphContract, feeds: Sequence[Feeds], kept: Array) -> tuple[list[Feeds], float]:
        """What torch computes when it keeps these tokens, and the widest gap between scores of those swapped."""
        torch = self._torch_language(contract)
        torch.follow = kept
        with torch:
            return run_steps(torch, contract, feeds), torch.gap

    def _torch_vision(self, contract: GraphContract, cuts: Sequence[Tiling]) -> TorchVision:
        from engines.reference import TorchVision
        from engines.reference_next import TorchTiles

        assert self.weights is not None
        made = self.weights[contract.name], contract, Schedule.from_dict(self.manifest.schedule)
        return TorchTiles(*made, cuts) if cuts else TorchVision(*made)

    def _torch_language(self, contract: GraphContract) -> Any:
        from engines.reference import TorchLanguage
        from engines.reference_next import TorchPruning

        assert self.weights is not None
        prunes = any(spec.name == KEPT for spec in contract.outputs)
        return (TorchPruning if prunes else TorchLanguage)(self.weights[contract.name], contract)

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
        if self.changed:
            why_not = why_not or "the directory was changed, and an engine is executable code"
        if bf16 and graph != "vision":
            why_not = why_not or "its cache is bf16, which numpy has not"
        why_not = why_not or _unfit(self.manifest)
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


def _unfit(manifest: Manifest) -> str:
    """Why the plans may not be opened here: another version or GPU, or no library; empty where they may."""
    try:
        checks = checks_here(manifest, manifest.backend)
    except FlowCutError as error:
        return str(error)
    return next((str(check) for check in checks if check.verdict == "differs"), "")


def _pairs(
    contract: GraphContract, results: Mapping[str, list[Feeds]], allowed: Callable[[str], Tolerance]
) -> Iterator[tuple[Judge, list[Feeds], list[Feeds]]]:
    """Each runner with the one before it."""
    for reference, runner in pairwise(results):
        yield Judge(contract.name, reference, runner, allowed(runner)), results[runner], results[reference]


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
    } | ({} if manifest.llm_tokens is None else {"flowcut.llm_tokens": str(manifest.llm_tokens)})
