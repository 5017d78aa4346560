"""May an engine directory be opened here: is its content what was built, and was it built for what is here?

Asked before any library sees a file of it: a plan is executable code.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from engines.backends import MODULES, Backend, gpu_sm, target_capabilities, trt_module
from engines.sessions.ort_loading import on_cuda
from flowcut.artifacts import Manifest, check_files, what_differs
from flowcut.deps import require
from flowcut.errors import EngineError, FlowCutError

Verdict = Literal["ok", "differs", "not applicable here"]
TOKENIZER, PREPROCESSOR = "tokenizer.json", "preprocessor.json"
OLDEST_ONNXRUNTIME = (1, 30)
"""Earlier ones have no kernel of the KV cache's operator, or lose a cache that is updated in place."""


@dataclass(frozen=True)
class Check:
    """Something that was checked. `detail` continues the name: "must be 1.7, got 1.8"; `remedy` is for what differs."""

    name: str
    verdict: Verdict
    detail: str
    remedy: str = ""

    def __str__(self) -> str:
        return " ".join(filter(None, [f"{self.name} {self.detail}.", self.remedy]))


def require_trust(directory: Path, manifest: Manifest, backend: Backend) -> None:
    """Raise EngineError, one line, unless `backend` may open the files of `directory`.

    Every file is hashed, whoever needs it; the library and the GPU, which take no time, come first.
    """
    for check in checks_here(manifest, backend):
        if check.verdict == "differs":
            raise EngineError(str(check))
    if lines := check_content(directory, manifest, backend):
        raise EngineError(what_differs(directory, manifest, lines))


def check_content(directory: Path, manifest: Manifest, backend: Backend) -> list[str]:
    """How the files differ from the manifest, and the manifest from what `backend` needs, one line each."""
    lines = check_files(directory, manifest)
    said = {line.partition(": ")[0] for line in lines}  # of a file that is there and not listed too
    unlisted = [name for name in _needed(manifest, backend) if name not in manifest.files.keys() | said]
    return sorted([*lines, *(f"{name}: neither in the manifest nor there" for name in unlisted)])


def checks_here(manifest: Manifest, backend: Backend, why_not: str = "") -> list[Check]:
    """What this machine is to be, if `backend` is to run the directory on it.

    Args:
        why_not: why the directory's own backend does not run here, where it is not `backend`.
    """
    if backend != "ort":
        return [_library(manifest, backend), _gpu(manifest, backend), _unused("onnxruntime", f"{backend} runs it")]
    own, runs = manifest.backend, _onnx_checks(manifest)
    if own == "ort":
        return [_unused("GPU", "nothing in it is compiled"), *runs]
    reason = why_not or "ONNX Runtime runs it"
    return [_unused(MODULES[own], reason), _unused("GPU", reason), *runs]


def _needed(manifest: Manifest, backend: Backend) -> Iterable[str]:
    suffixes = ("onnx", "onnx.data") if backend == "ort" else ("engine",)
    return TOKENIZER, PREPROCESSOR, *(f"{graph}.{suffix}" for graph in manifest.graphs for suffix in suffixes)


def _library(manifest: Manifest, backend: Backend) -> Check:
    """Plans are for the very version that compiled them."""
    name, here = MODULES[backend], str(getattr(trt_module(backend), "__version__", "unknown"))
    built = manifest.versions.get(name)
    if built == here:
        return Check(name, "ok", f"is {here}, which compiled the engines")
    wanted = f"{built}, which compiled the engines" if built else "what compiled the engines, which nobody recorded"
    return Check(name, "differs", f"must be {wanted}, got {here}", manifest.remedy)


def _gpu(manifest: Manifest, backend: Backend) -> Check:
    """The first GPU, which is the one that runs."""
    sm, targets = gpu_sm(), manifest.compute_capabilities
    if sm is None or "unknown" in targets:
        where = "the driver does not tell" if sm is None else "the driver did not tell when it was compiled"
        return _unused("GPU", where)
    if any(_runs_on(target, sm) for target in targets):
        return Check("GPU", "ok", f"is sm{sm}, of {', '.join(targets)}")
    detail = f"must be {' or '.join(targets)}, which the engines were compiled for, got sm{sm}"
    if backend == "rtx" and manifest.command:  # full TensorRT compiles for the GPU at hand
        manifest = replace(manifest, command=_command_for(manifest.command, f"sm{sm}"))
    return Check("GPU", "differs", detail, manifest.remedy)


def _command_for(command: str, target: str) -> str:
    """For this GPU too where it can be named, else for those of the default."""
    if target in target_capabilities(trt_module("rtx")):
        return f"{command} --compute-capability {target}"
    option = "--compute-capability"
    with suppress(ValueError):  # quotes that do not close: no build wrote it
        words = shlex.split(command)
        pairs = zip(["", *words], words, strict=False)
        return shlex.join(word for before, word in pairs if option not in (before, word))
    return command


def _runs_on(target: str, sm: int) -> bool:
    """target: "sm86", or "sm80 and later"."""
    number = re.match(r"sm(\d+)", target)
    least = int(number[1]) if number else -1
    return sm == least or (target.endswith(" and later") and sm > least >= 0)


def _onnx_checks(manifest: Manifest) -> list[Check]:
    """ONNX Runtime, and what it takes to give it a bf16 graph on a CPU."""
    checks = [_onnxruntime()]
    if checks[0].verdict == "ok" and "bf16" in (manifest.precision, manifest.vision_precision) and not on_cuda():
        checks.append(_onnx_ir())
    return checks


def _onnx_ir() -> Check:
    name = "onnx_ir"
    try:
        require(name, extra="export")
    except FlowCutError as error:
        return _absent(name, error)
    return Check(name, "ok", "is there, to widen bf16 to float32 for a CPU")


def _absent(name: str, error: FlowCutError) -> Check:
    return Check(name, "differs", str(error).removeprefix(f"{name} ").removesuffix("."))


def _onnxruntime() -> Check:
    name, least = "onnxruntime", ".".join(map(str, OLDEST_ONNXRUNTIME))
    try:
        here = str(require(name, extra="cpu").__version__)
    except FlowCutError as error:
        return _absent(name, error)
    if tuple(int(part) for part in re.findall(r"\d+", here)[:2]) < OLDEST_ONNXRUNTIME:
        return Check(name, "differs", f"must be at least {least}, got {here}", "Install a later one.")
    return Check(name, "ok", f"is {here}, at least {least}")


def _unused(name: str, why: str) -> Check:
    return Check(name, "not applicable here", why)
