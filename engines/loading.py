"""From an engine directory to open sessions: which backend, may it be trusted, and what it holds."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from engines.backends import CHOICES, Backend, gpu_present, trt_module
from engines.options import Options
from engines.sessions.cuda_device import CudaDevice, cuda_core, no_gpu
from engines.sessions.ort_loading import on_cuda
from engines.sessions.ort_session import OrtSession
from engines.sessions.session import Session
from engines.sessions.stages import Chain
from engines.sessions.trt_session import TrtSession
from engines.trust import PREPROCESSOR, TOKENIZER, require_trust
from engines.widen import NOTE, widened, widened_contract
from flowcut.artifacts import Manifest, read_manifest
from flowcut.chat import FILE as TEMPLATE
from flowcut.chat import ChatTemplate, make_template
from flowcut.config import Precision
from flowcut.contract import GraphContract, language_contract, language_contracts, vision_contract
from flowcut.errors import EngineError, FlowCutError
from flowcut.preprocess import ImageSettings
from flowcut.prompt import Tokenizer

LOG = logging.getLogger("flowcut.engines")


@dataclass(frozen=True)
class Parts:
    """What an engine is made of, ready to use."""

    manifest: Manifest
    backend: Backend
    vision: Session
    language: Session
    tokenizer: Tokenizer
    settings: ImageSettings
    template: ChatTemplate


def open_directory(directory: Path, backend: str, options: Options) -> Parts:
    """Check a directory, then open what is in it. See engines.runtime.engine.load_engine.

    Raises:
        EngineError: it differs from what was built, does not fit this machine, or another took its place meanwhile.
    """
    before = _which(directory)
    parts = _open(directory, backend, options)
    if _which(directory) != before:  # files were checked in one directory and opened in another
        raise EngineError(f"{directory} was replaced while it was being loaded. Load it again.")
    return parts


def _which(directory: Path) -> tuple[int, int] | None:
    """What tells a directory from one in its place; None where there is none."""
    try:
        status = directory.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _open(directory: Path, backend: str, options: Options) -> Parts:
    manifest = read_manifest(directory)
    chosen = choose_backend(manifest, backend)
    require_trust(directory, manifest, chosen)
    vision, language = _sessions(directory, manifest, chosen, options)
    geometry = manifest.geometry
    tokenizer = Tokenizer.from_file(directory / TOKENIZER, geometry.image_token_id, geometry.text.vocab_size)
    settings = ImageSettings.from_dict(json.loads((directory / PREPROCESSOR).read_text(encoding="utf-8")))
    source = (directory / TEMPLATE).read_text(encoding="utf-8") if TEMPLATE in manifest.files else None
    template = make_template(source, tokenizer, geometry)
    return Parts(manifest, chosen, vision, language, tokenizer, settings, template)


def choose_backend(manifest: Manifest, name: str) -> Backend:
    """The backend that `name` means for this directory on this machine.

    Raises:
        EngineError: unknown, not what the directory was built for, or in need of a GPU where there is none.
    """
    if name not in CHOICES:
        raise EngineError(f"backend must be one of {', '.join(CHOICES)}, got {name!r}.")
    own = manifest.backend
    if name == "ort":
        return "ort"
    if name == "auto":
        if own != "ort" and (reason := why_not(own)):
            LOG.info("backend %s cannot run here (%s); using ONNX Runtime.", own, reason)
            return "ort"
        return own
    if name != own:
        raise EngineError(
            f"backend must be one of {', '.join(dict.fromkeys(('auto', own, 'ort')))} for this directory, which was "
            f"built for {own}, got {name!r}. Build another with BACKEND={name} (--backend {name})."
        )
    if not gpu_present():
        raise no_gpu(name)
    return own


def _sessions(directory: Path, manifest: Manifest, backend: Backend, options: Options) -> tuple[Session, Session]:
    """Vision and the decoder, whose stages are one session."""
    contracts = graph_contracts(manifest)
    if backend == "ort":
        sessions = _ort_sessions(directory, manifest, contracts, options)
    else:
        device = CudaDevice(backend)  # one for all: a stage of the decoder could have one of its own
        plans = [(c, f"{c.name}.engine") for c in contracts]
        sessions = [
            TrtSession(directory / plan, c, backend, device, options, manifest.files[plan].sha256) for c, plan in plans
        ]
    vision, *stages = sessions
    return vision, stages[0] if len(stages) == 1 else Chain(whole_decoder(manifest), stages)


def whole_decoder(manifest: Manifest) -> GraphContract:
    """The decoder's contract were it one graph."""
    geometry, budget = manifest.geometry, manifest.budget
    return language_contract(geometry, budget.tokens, manifest.precision, manifest.limits, budget.llm_tokens)


def graph_contracts(manifest: Manifest) -> tuple[GraphContract, ...]:
    """Of the directory's graphs, in the order of `manifest.graphs`."""
    geometry, (tokens, kept), limits = manifest.geometry, (manifest.tokens, manifest.llm_tokens), manifest.limits
    vision = vision_contract(geometry, tokens, manifest.vision_precision, limits, manifest.precision)
    return vision, *language_contracts(geometry, tokens, manifest.precision, limits, manifest.stages, kept)


def graph_precisions(manifest: Manifest) -> dict[str, Precision]:
    """What each graph of the directory computes in, by its name."""
    return dict.fromkeys(manifest.graphs, manifest.precision) | {"vision": manifest.vision_precision}


def _ort_sessions(
    directory: Path, manifest: Manifest, contracts: Sequence[GraphContract], options: Options
) -> list[Session]:
    """bf16 graphs as they are on a GPU whose provider takes them, else widened to float32."""
    precisions, sessions, wide = graph_precisions(manifest), list[Session](), list[str]()
    for contract in contracts:
        path = directory / f"{contract.name}.onnx"
        session = None
        if precisions[contract.name] != "bf16":
            session = OrtSession(path, contract, options)
        elif on_cuda():
            session = _unless_refused(path, contract, options)
        if session is None:
            wide.append(contract.name)
            with widened(path) as copy:
                session = OrtSession(copy, widened_contract(contract), options)
        sessions.append(session)
    if wide:
        LOG.warning("%s: %s.", ", ".join(wide), NOTE)
    return sessions


def _unless_refused(path: Path, contract: GraphContract, options: Options) -> OrtSession | None:
    try:
        return OrtSession(path, contract, options)
    except EngineError as error:
        LOG.info("%s: not as it is: %s", contract.name, error)
        return None


def why_not(backend: Backend) -> str:
    """Why TensorRT cannot run here, whatever is to be run; empty where it can."""
    if not gpu_present():
        return "no CUDA GPU is present"
    try:
        trt_module(backend)
        cuda_core(backend)
    except FlowCutError as error:
        return str(error)
    return ""
