"""Run FlowScore's two kernels on torch tensors: in Triton's interpreter on any machine, or as PTX on a GPU."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from engines.flow_score.interpreter import Interpreter
from engines.flow_score.launch import (
    COMBINE,
    COMBINE_MASKED,
    LOGITS,
    Call,
    Variant,
)
from engines.sessions.cuda_device import cuda_core, no_gpu
from flowcut.deps import require
from flowcut.errors import EngineError, FlowCutError

if TYPE_CHECKING:
    from torch import Tensor

Launch = Callable[[Variant, tuple[int, int], Sequence[Any], Sequence[int], Sequence[Any]], None]
"""launch(variant, grid, inputs, integers, outputs): one kernel over `grid`, its outputs filled."""

DTYPES = {"torch.float16": "fp16", "torch.bfloat16": "bf16", "torch.float32": "fp32"}


def score(
    launch: Launch,
    q: Tensor,
    v_source: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    logit_scale: float,
    semantic_scale: float = 1.0,
    history: float = 0.0,
    running: Tensor | None = None,
    source_in_keys: int = 1,
    key_valid: Tensor | None = None,
    group: int = 1,
    token_major: bool = False,
    semantic: bool = True,
    strength: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """The running score [B, N] and, with `key_valid`, the entropy ratio [B, 1]; float32. N = S - source_in_keys.

    Args:
        q, v_source: [B, H, rows, d], of which the first row is the source; with group > 1, q is [B, H, group, d].
        k, v: [B, H, S, d]. With token_major all four are [B, rows, H, d].
        running: [B, N] float32, the score so far; without `history` it is not read.
        key_valid: [B, S] bool, keys that exist, the source among them.
        group: query heads per key head.
        semantic, strength: whether that part of the score takes part.

    Raises:
        EngineError: a type, shape, layout, device or number that the kernels are not made for.
    """
    call = _call(q, v_source, k, v, group, token_major)
    _check_numbers(call, q.shape[-1], history, source_in_keys)
    _check_optional(call, history, running, source_in_keys, key_valid, q.device)
    logits, norm = _empty(q, call.batch, call.query_heads + call.heads, call.keys), _empty(q, call.batch, call.keys)
    variant = Variant(LOGITS, DTYPES[str(q.dtype)], q.shape[-1])
    grid = (call.programs(LOGITS), call.batch)
    launch(variant, grid, [q, v_source, k, v], call.logits_integers(logit_scale, semantic_scale), [logits, norm])

    inputs = [logits, norm, norm if running is None else running]
    integers = call.combine_integers(history, source_in_keys, int(semantic), int(strength))
    running_out = _empty(q, call.batch, call.keys - source_in_keys)
    grid = (call.programs(COMBINE, source_in_keys), call.batch)
    if key_valid is None:
        launch(Variant(COMBINE), grid, inputs, integers, [running_out])
        return running_out, None
    parts = _empty(q, call.batch, grid[0])
    launch(Variant(COMBINE_MASKED), grid, [*inputs, key_valid], integers, [running_out, parts])
    return running_out, parts.sum(1, keepdim=True)


def _empty(like: Tensor, *shape: int) -> Tensor:
    """Float32 on the same device."""
    return like.new_empty(shape, dtype=require("torch", "torch").float32)


def _call(q: Tensor, v_source: Tensor, k: Tensor, v: Tensor, group: int, token_major: bool) -> Call:
    """The dimensions of four tensors that fit together."""
    if k.ndim != 4:
        raise EngineError(f"k must have 4 dimensions, got shape {_shape(k.shape)}.")
    if group < 1 or (token_major and group > 1):
        raise EngineError(f"group must be 1 where token_major is set, else 1 or more, got {group}.")
    if str(k.dtype) not in DTYPES:
        raise EngineError(f"k must be float16, bfloat16 or float32, got {_kind(k)}. Convert q, v_source, k and v.")
    batch, heads, keys, size = (k.shape[i] for i in ((0, 2, 1, 3) if token_major else (0, 1, 2, 3)))
    Variant(LOGITS, DTYPES[str(k.dtype)], size)
    rows = 1 if token_major else 2

    def like(tensor: Tensor) -> tuple[int, ...]:
        """k's shape with as many rows as the tensor has, at least one."""
        shape = list(k.shape)
        shape[rows] = max(1, tensor.shape[rows] if tensor.ndim == 4 else 1)
        return tuple(shape)

    query_shape = like(q) if group == 1 else (batch, heads, group, size)
    shapes = {"q": (q, query_shape), "v_source": (v_source, like(v_source)), "k": (k, tuple(k.shape))}
    for name, (tensor, shape) in (shapes | {"v": (v, tuple(k.shape))}).items():
        _check_tensor(name, tensor, str(k.dtype), shape, k.device)
    q_rows = q.shape[rows] if group == 1 else 1
    return Call(batch, heads, keys, group, q_rows, v_source.shape[rows], token_major)


def _check_tensor(name: str, tensor: Tensor, kind: str, shape: tuple[int, ...], device: Any) -> None:
    wanted = f"{name} must be {_shape(shape)} {kind.removeprefix('torch.')} on {device}"
    if str(tensor.dtype) != kind or tuple(tensor.shape) != shape or tensor.device != device:
        raise EngineError(f"{wanted}, got {_shape(tensor.shape)} {_kind(tensor)} on {tensor.device}.")
    if not tensor.is_contiguous():
        raise EngineError(f"{name} must be contiguous, got strides {tensor.stride()}. Pass {name}.contiguous().")


def _check_numbers(call: Call, size: int, history: float, source_in_keys: int) -> None:
    if not 0 <= history <= 1:
        raise EngineError(f"history must be from 0 to 1, got {history}.")
    if call.keys * call.heads * max(size, 1 + call.group) >= 2**31:  # offsets within an image are int32
        raise EngineError(
            f"k must have fewer than 2^31 elements an image, got {call.keys} keys of {call.heads} heads of {size}."
        )
    if source_in_keys not in (0, 1):
        raise EngineError(f"source_in_keys must be 0 or 1, got {source_in_keys}.")
    if call.batch < 1 or call.heads < 1 or call.keys <= source_in_keys:
        sizes = f"{call.batch}, {call.heads} and {call.keys}"
        raise EngineError(f"k must have images, heads and more than {source_in_keys} keys, got {sizes}.")


def _check_optional(
    call: Call, history: float, running: Tensor | None, source_in_keys: int, key_valid: Tensor | None, device: Any
) -> None:
    scores = (call.batch, call.keys - source_in_keys)
    if running is not None:
        _check_tensor("running", running, "torch.float32", scores, device)
    elif history:
        raise EngineError(f"running must be {_shape(scores)} float32 where history is {history}, got None.")
    if key_valid is not None:
        _check_tensor("key_valid", key_valid, "torch.bool", (call.batch, call.keys), device)


def _shape(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _kind(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def interpreter() -> Launch:
    """Triton's interpreter, in a process that ends with the Launch: any machine, milliseconds a program."""
    return Interpreter()


def ptx_launch(stream: int = 0, device: int | None = None) -> Launch:
    """Compiled PTX on a GPU, through cuda.core. Not yet run: tested against a stand-in for cuda.core.

    Inputs and outputs are tensors on that GPU or integers, their addresses. Nothing waits for the kernel.

    Args:
        stream: CUDA's handle; 0 is the default stream, torch's too. The TensorRT plugin passes the one it is given.
        device: CUDA's number of the GPU; without one, the GPU that is current in this thread.

    Raises, when launched:
        FlowCutError: cuda.core is not installed.
        EngineError: no GPU, no PTX for it, tensors elsewhere, or CUDA refuses to load or launch the kernel.
    """

    def launch(
        variant: Variant,
        grid: tuple[int, int],
        inputs: Sequence[Any],
        integers: Sequence[int],
        outputs: Sequence[Any],
    ) -> None:
        cuda = cuda_core("trt")
        gpu = _current(cuda, device)
        arguments = [*map(_address, inputs), *map(np.int32, integers), *map(_address, outputs)]
        with _cuda_errors(variant, gpu):
            kernel, block, shared_bytes = _load(variant, gpu.device_id)
            config = cuda.LaunchConfig(grid=grid, block=block, shmem_size=shared_bytes)
            cuda.launch(cuda.Stream.from_handle(stream), config, kernel, *arguments)

    return launch


def _current(cuda: Any, number: int | None) -> Any:
    """The GPU of that number, made current, or the one that is."""
    try:
        gpu = cuda.Device() if number is None else cuda.Device(number)
        gpu.set_current()
    except Exception as error:  # of the driver's loader or of CUDA, by what is missing
        raise no_gpu("trt") from error
    return gpu


@contextmanager
def _cuda_errors(variant: Variant, gpu: Any) -> Iterator[None]:
    """What CUDA refuses, as an EngineError. cuda.core has exceptions of its own, with no base but Exception."""
    try:
        yield
    except FlowCutError:
        raise
    except Exception as error:
        said = " ".join(str(error).split()).rstrip(".")
        raise EngineError(
            f"{variant.label} must load and launch on {gpu.name}, got: {said}. FlowScore's PTX needs NVIDIA's driver "
            "R570 or newer."
        ) from error


@functools.cache
def _load(variant: Variant, device: int) -> tuple[Any, int, int]:
    """Kernel, threads per block and bytes of shared memory, of the GPU that is current."""
    cuda = cuda_core("trt")
    major, minor = cuda.Device(device).compute_capability
    compiled = importlib.import_module("engines.flow_score.cache").kernel(variant, 10 * major + minor)
    # As text it would be the name of a file.
    code = cuda.ObjectCode.from_ptx(compiled.ptx.encode(), name=variant.label)
    return code.get_kernel(compiled.entry), compiled.threads, compiled.shared_bytes


def _address(tensor: Any) -> int:
    """Of a tensor on a GPU, or of memory whose address is known."""
    if isinstance(tensor, int):
        return tensor
    if not tensor.is_cuda:
        raise EngineError(f"tensors must be on a GPU to be scored there, got {tensor.device}. Use .cuda().")
    return int(tensor.data_ptr())
