"""The same model on other software, to time beside an engine: transformers, and this project's eager PyTorch.

    transformers-sdpa   transformers' own LLaVA, unpruned
    eager-adaptive      flowcut's modules with the adaptive schedule, which no engine can have
    eager-static        flowcut's modules with the engine's schedule: its very shapes
    torch-compile       the same, compiled; on a GPU only, where it has not run yet

All read pictures and prompts with the engine's own reader and hold the checkpoint's weights once between them. On a CPU
they compute in float32, on a GPU in the types that the engine's graphs compute in.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from rich.progress import Progress

from engines.bench.subjects import Subject
from engines.runtime.reading import Reader
from engines.source import need_source
from engines.widen import free_memory
from flowcut.artifacts import Manifest
from flowcut.checkpoint import Weights, expected_tensors
from flowcut.config import NUMPY_DTYPE, LlavaConfig
from flowcut.deps import require
from flowcut.errors import EngineError
from flowcut.schedule import Schedule, make_schedule
from flowcut.selector import selector, selector_note

if TYPE_CHECKING:
    from engines.bench.peers_eager import Modules

LOG = logging.getLogger("flowcut.bench")
_FLOAT32 = 4


def torch_peers(
    manifest: Manifest,
    checkpoint: str | None,
    reader: Reader,
    threads: int | None,
    progress: Progress,
    device: str = "cpu",
) -> list[Subject]:
    """The peers that there can be of an engine directory, loaded.

    Left out are eager-adaptive where nothing is pruned or the selector has no such schedule, torch-compile with the
    schedule masked, whose lengths the host waits for, and transformers where LLaVA-NeXT has no grid_pinpoints, among
    which transformers chooses in vain.

    Args:
        checkpoint: see engines.source.source_weights.
        threads: of PyTorch on the CPU; None leaves the choice to torch.
        device: "cpu" or "cuda": where the engines run.

    Raises:
        CheckpointError: no checkpoint, or not the one that the directory was built from.
        EngineError: a GPU that is full.
        FlowCutError: torch or transformers is not installed.
    """
    torch = require("torch", extra="torch")
    require("transformers", extra="peers")
    weights = need_source(manifest, checkpoint)
    try:
        return _Peers(manifest, reader, threads, device, torch).load(weights, progress)
    except torch.OutOfMemoryError as error:
        raise EngineError(
            f"the GPU must have room for peers beside the engines, got: {' '.join(str(error).split())[:200]}. Leave "
            "--peers out."
        ) from None


def check_peers(manifest: Manifest, checkpoint: str | None, device: str) -> None:
    """What `torch_peers` would refuse, before anything is loaded or measured. Errors are its own."""
    torch = require("torch", extra="torch")
    require("transformers", extra="peers")
    need_source(manifest, checkpoint)
    if device == "cpu":
        _check_room(manifest.geometry)
    elif not torch.cuda.is_available():
        raise EngineError(
            "torch must see the GPU that the engines run on, for peers are timed beside them, got a torch without "
            "CUDA. Install one that has it, or leave --peers out."
        )


class _Peers:
    """What all peers have in common."""

    def __init__(self, manifest: Manifest, reader: Reader, threads: int | None, device: str, torch: Any) -> None:
        self.manifest, self.reader, self.threads, self.device = manifest, reader, threads, device
        precisions = manifest.vision_precision, manifest.precision
        names = [NUMPY_DTYPE[each] if device != "cpu" else "float32" for each in precisions]
        self.vision_dtype, self.dtype = (getattr(torch, name) for name in names)
        types = names[0] if names[0] == names[1] else f"{names[0]} vision, {names[1]} decoder"
        self.where = f"{types} on {'the CPU' if device == 'cpu' else device}"

    def load(self, weights: Weights, progress: Progress) -> list[Subject]:
        from engines.bench.peers_eager import Modules

        task = progress.add_task("peers: weights", total=None)
        modules = Modules.load(weights, self.vision_dtype, self.dtype, self.device)
        peers = [*self._transformers(modules, weights), *self._eager(modules)]
        progress.remove_task(task)
        return peers

    def _transformers(self, modules: Modules, weights: Weights) -> list[Subject]:
        from engines.bench.peers_run import TorchPeer
        from engines.bench.peers_transformers import ATTENTION, TransformersModel

        if self.manifest.geometry.grid_pinpoints == ():
            LOG.warning("transformers-sdpa is left out: transformers has no LLaVA-NeXT without grid_pinpoints.")
            return []
        version = require("transformers", extra="peers").__version__
        title = f"transformers {version}, {ATTENTION}, unpruned, {self.where}"
        model, patches = TransformersModel(modules, weights), self.manifest.geometry.vision.patches
        return [
            TorchPeer("transformers-sdpa", title, model, self.reader, self.manifest.geometry, patches, self.threads)
        ]

    def _eager(self, modules: Modules) -> list[Subject]:
        """With the engine's tokens."""
        own = Schedule.from_dict(self.manifest.schedule)
        kind = f"the engine's schedule ({own.kind}{selector_note(self.manifest.schedule)})"
        peers = [self._peer("eager-static", f"eager PyTorch, {kind}", modules, own)]
        if own.kind != "off" and not selector(own.selector).one_shot:
            adaptive = make_schedule("adaptive", self.manifest.geometry.vision, own.tokens, own.selector)
            title = f"eager PyTorch, adaptive{selector_note(self.manifest.schedule)}"
            peers.insert(0, self._peer("eager-adaptive", title, modules, adaptive))
        if self.device.startswith("cuda") and own.kind != "masked":
            compiled = modules.compiled()
            peers.append(self._peer("torch-compile", f"torch.compile, {kind}", compiled, own, compiles=True))
        return peers

    def _peer(self, name: str, title: str, modules: Modules, schedule: Schedule, compiles: bool = False) -> Subject:
        from engines.bench.peers_eager import EagerModel
        from engines.bench.peers_run import CompiledPeer, TorchPeer

        model = EagerModel(modules, schedule, self.manifest.llm_tokens)
        whole = f"{title}, {self.where}{', prompts one by one' if model.alone else ''}"
        kind = CompiledPeer if compiles else TorchPeer
        return kind(name, whole, model, self.reader, self.manifest.geometry, schedule.tokens, self.threads)


def _check_room(config: LlavaConfig) -> None:
    """Raise EngineError where float32 weights would have to be swapped, or end the process."""
    needed = _FLOAT32 * sum(math.prod(shape) for shape in expected_tensors(config).values())
    if (free := free_memory()) is not None and free < needed:
        raise EngineError(
            f"free memory must be at least {needed / 1e9:.1f} GB for peers in float32, got {free / 1e9:.1f} GB. Leave "
            "--peers out, or build the engine with fewer --decoder-layers."
        )
