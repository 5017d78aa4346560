"""Triton's interpreter as a Launch (run.py): the kernels on any machine, in a process of their own.

Triton chooses between compiling and interpreting when it is imported, since its own library is jitted too, so one
process cannot do both.
"""

from __future__ import annotations

import functools
import importlib
import math
import subprocess
import threading
import weakref
from collections.abc import Sequence
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.child import start_child
from engines.flow_score.launch import Variant
from flowcut.deps import require
from flowcut.errors import EngineError

if TYPE_CHECKING:
    from torch import Tensor


class Interpreter:
    """A Launch on torch tensors. Its process starts at once and ends with it; calls from several threads take turns.

    Raises:
        EngineError: on a call: torch or triton is not installed, the kernel failed, or the process ended.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connection, theirs = Pipe()
        with theirs:
            child = start_child("engines.flow_score.interpreter", theirs, {"TRITON_INTERPRET": "1"})
        weakref.finalize(self, _end, child, self._connection)

    def __call__(
        self,
        variant: Variant,
        grid: tuple[int, int],
        inputs: Sequence[Any],
        integers: Sequence[int],
        outputs: Sequence[Any],
    ) -> None:
        request = variant, grid, [_pack(x) for x in inputs], list(integers), [tuple(x.shape) for x in outputs]
        try:
            with self._lock:
                self._connection.send(request)
                status, content = self._connection.recv()
        except (EOFError, OSError):
            raise EngineError("Triton's interpreter must run in a process of its own, which ended.") from None
        if status == "failed":
            raise content
        for output, packed in zip(outputs, content, strict=True):
            output.copy_(_unpack(*packed))


def _end(child: subprocess.Popen[bytes], connection: Connection) -> None:
    connection.close()
    child.kill()
    child.wait()


def serve(fileno: int) -> None:
    """The child: run what is asked until the parent closes its end."""
    connection = Connection(fileno)
    while True:
        try:
            variant, grid, inputs, integers, shapes = connection.recv()
        except EOFError:
            return
        try:
            _patch_once()
            torch = require("torch", "torch")
            outputs = [torch.full(shape, math.nan) for shape in shapes]  # whatever a kernel leaves out shows
            interpret(variant, grid, [_unpack(*x) for x in inputs], integers, outputs)
            connection.send(("done", [_pack(x) for x in outputs]))
        except Exception as error:  # the parent raises it
            connection.send(("failed", EngineError(f"{variant.label} failed in Triton's interpreter: {error}")))


@functools.cache
def _patch_once() -> None:
    """Have Triton patch its language once a process, not for each call of a function: 40% of the time otherwise."""
    interpreter: Any = require("triton.runtime.interpreter", "kernels")
    patch, patched = interpreter._patch_lang, set[int]()

    def patch_once(function: Any) -> Any:
        scope = id(function.__globals__)
        if scope not in patched:
            patched.add(scope)
            patch(function)
        return SimpleNamespace(restore=lambda: None)

    interpreter._patch_lang = patch_once


def interpret(
    variant: Variant, grid: tuple[int, int], inputs: Sequence[Any], integers: Sequence[int], outputs: Sequence[Any]
) -> None:
    """A Launch for a process that was started with TRITON_INTERPRET=1."""
    require("triton", "kernels")
    kernel = getattr(importlib.import_module("engines.flow_score.kernel"), variant.kernel)
    with np.errstate(all="ignore"):  # rows that do not exist may hold anything
        kernel[grid](*inputs, *integers, *outputs, **variant.constants)


def _pack(tensor: Tensor) -> tuple[str, tuple[int, ...], bytes]:
    raw = tensor.cpu().contiguous().view(require("torch", "torch").uint8)
    return str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), raw.numpy().tobytes()


def _unpack(kind: str, shape: tuple[int, ...], content: bytes) -> Tensor:
    torch = require("torch", "torch")
    tensor: Tensor = torch.frombuffer(bytearray(content), dtype=getattr(torch, kind)).reshape(shape)
    return tensor
