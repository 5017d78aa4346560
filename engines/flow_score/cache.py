"""PTX by content: shipped in this package, else in the user's cache, else compiled and kept there.

A kernel's key is a hash of what its PTX depends on. Its file holds what a launch must know and the PTX, under the
file's own sha256:
    // 5f0c..
    // {"entry": "flow_score_logits", "registers": 128, ..}
    .version 8.7
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from engines.flow_score.compile import COMPILED_AS, FORMAT, OPTIONS, TARGETS, CompiledKernel, compile_kernel
from engines.flow_score.launch import COMBINE, COMBINE_MASKED, DTYPES, INTEGERS, LOGITS, Variant
from flowcut.atomic import write_file
from flowcut.deps import available
from flowcut.errors import EngineError, FlowCutError

LOG = logging.getLogger("flowcut.engines")
SHIPPED_HEAD_SIZES = (32, 64, 128)
SHIPPED = (
    *(Variant(LOGITS, dtype, size) for size in SHIPPED_HEAD_SIZES for dtype in DTYPES),
    *(Variant(COMBINE), Variant(COMBINE_MASKED)),
)
"""For each of TARGETS. In one archive: alone they take 1.6 MB."""
ARCHIVE = Path(__file__).parent / "ptx" / "shipped.zip"
_SOURCE = Path(__file__).with_name("kernel.py")


class Found(NamedTuple):
    """A kernel and where it was: "shipped", "cached" or "compiled"."""

    kernel: CompiledKernel
    source: str


def kernel(variant: Variant, sm: int) -> CompiledKernel:
    """The kernel for a GPU of compute capability `sm`, compiled if it must be: then seconds, else milliseconds.

    Raises:
        EngineError: the GPU is too old, the shipped PTX is damaged, or there is none and nothing to compile it with.
    """
    return fetch(variant, sm).kernel


def fetch(variant: Variant, sm: int) -> Found:
    """`kernel`, and where it came from."""
    if found := look_up(variant, sm):
        return found
    target = target_for(sm)
    if not available("triton"):
        sizes, types, targets = (", ".join(map(str, x)) for x in (SHIPPED_HEAD_SIZES, DTYPES, TARGETS))
        raise EngineError(
            f"PTX of {variant.label} for sm_{target} must be there, got none: shipped are head sizes {sizes} in "
            f"{types} for sm {targets}. pip install -e '.[kernels]' in the checkout installs triton, which compiles "
            "the others."
        )
    LOG.info("compiling %s for sm_%d", variant.label, target)
    compiled = compile_kernel(variant, target)
    try:
        keep(compiled)
    except EngineError as error:
        LOG.warning("%s is not kept: %s", compiled.variant.label, error)  # it would only have saved time
    return Found(compiled, "compiled")


def look_up(variant: Variant, sm: int) -> Found | None:
    """The kernel if it need not be compiled. Neither writes nor imports triton.

    Raises:
        EngineError: the GPU is too old, or the shipped PTX is damaged.
    """
    target = target_for(sm)
    if shipped := _shipped(variant, target):
        return Found(shipped, "shipped")
    path = user_cache() / file_name(variant, target)
    try:
        return Found(_decoded(path.read_bytes(), variant, target), "cached")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError) as error:
        LOG.warning("%s is not used: %s", path, error)
        return None


def target_for(sm: int) -> int:
    """The target whose PTX a GPU of compute capability `sm` runs: its own, else the nearest below.

    Raises:
        EngineError: all targets are newer.
    """
    older = [target for target in TARGETS if target <= sm]
    if not older:
        raise EngineError(
            f"GPU must be sm_{TARGETS[0]} or newer for FlowScore's kernels, got sm_{sm}. ONNX Runtime runs an engine "
            "directory anywhere (--backend ort)."
        )
    return max(older)


def keep(compiled: CompiledKernel) -> None:
    """Put a kernel into the user's cache.

    Raises:
        EngineError: that cannot be written.
    """
    path = user_cache() / file_name(compiled.variant, compiled.sm)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, encoded(compiled))
    except (OSError, FlowCutError) as error:
        raise EngineError(
            f"{path.parent} must be a directory to keep PTX in, got: {error}. XDG_CACHE_HOME names another."
        ) from None


def user_cache() -> Path:
    """$XDG_CACHE_HOME/flowcut-trt/ptx, by default in ~/.cache."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or "")  # a relative one must be ignored, says XDG
    return (root if root.is_absolute() else Path.home() / ".cache") / "flowcut-trt" / "ptx"


def file_name(variant: Variant, sm: int) -> str:
    """flow_score_logits-fp16-64-sm80-0123456789ab.ptx"""
    return f"{variant.label}-sm{sm}-{key(variant, sm)[:12]}.ptx"


def key(variant: Variant, sm: int) -> str:
    """Hash of kernel.py, the variant's types and tiles, the target, and how compile.py compiles.

    Not of Triton's version: PTX that is shipped serves whatever is installed.
    """
    settings = {
        **{"integers": INTEGERS[variant.kernel], "pointers": variant.pointers, "constants": variant.constants},
        **{"kernel": variant.kernel, "num_warps": variant.num_warps, "max_registers": variant.max_registers},
        **{"sm": sm, "compiled_as": COMPILED_AS.get(sm, sm), "options": OPTIONS, "format": FORMAT},
    }
    return hashlib.sha256(_SOURCE.read_bytes() + json.dumps(settings, sort_keys=True).encode()).hexdigest()


def encoded(compiled: CompiledKernel) -> bytes:
    """A kernel's file."""
    content = f"// {json.dumps(compiled.facts(), sort_keys=True)}\n{compiled.ptx}".encode()
    return f"// {hashlib.sha256(content).hexdigest()}\n".encode() + content


def archive(kernels: Iterable[CompiledKernel]) -> bytes:
    """ARCHIVE's content: the same for the same kernels."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for one in kernels:
            file.writestr(zipfile.ZipInfo(file_name(one.variant, one.sm)), encoded(one), zipfile.ZIP_DEFLATED, 9)
    return buffer.getvalue()


def _shipped(variant: Variant, sm: int) -> CompiledKernel | None:
    """From ARCHIVE, if it is there. EngineError if it is damaged."""
    name = file_name(variant, sm)
    try:
        with zipfile.ZipFile(ARCHIVE) as file:
            if name not in file.namelist():
                return None
            return _decoded(file.read(name), variant, sm)
    except (OSError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise EngineError(f"{ARCHIVE} must be as shipped, got: {error}. Install flowcut-trt again.") from error


def _decoded(content: bytes, variant: Variant, sm: int) -> CompiledKernel:
    """The kernel of a file. ValueError if the file is damaged or another kernel's."""
    said, _, rest = content.partition(b"\n")
    if said != f"// {hashlib.sha256(rest).hexdigest()}".encode():
        raise ValueError("its content does not match its hash")
    facts, _, ptx = rest.decode().partition("\n")
    try:
        found = CompiledKernel.of(json.loads(facts.removeprefix("// ")), ptx)
    except (TypeError, KeyError) as error:
        raise ValueError(f"its facts are another version's, {error}") from None
    if (found.variant, found.sm) != (variant, sm):
        raise ValueError(f"it holds {found.variant.label} for sm_{found.sm}")
    return found
