"""FlowScore's three plugins, in Python, through TensorRT's `tensorrt.plugin`. docs/plugin.md tells the whole of it.

    FlowScoreLogits(q, v_source, k, v)                               -> logits, strength
    FlowScoreCombine(logits, strength, running)                      -> running_out
    FlowScoreCombineMasked(logits, strength, running, key_valid)     -> running_out, entropy_parts

    q, v_source    [B, H, rows, d], their first row is the source's; token_major: [B, rows, H, d]; group > 1: q is
                   [B, H, group, d], the source's row alone
    k, v           [B, H, S, d], token_major: [B, S, H, d]; fp16, bf16 or fp32, as q and v_source
    logits         [B, H * group + H, S] float32: attention of each query head, then similarity of each key head
    strength       [B, S] float32
    running        [B, N] or, without history, [1, 1] float32; N = S - source_in_keys
    key_valid      [B, 1, 1, S] bool
    running_out    [B, N] float32
    entropy_parts  [B, ceil(N / 64)] float32, to be summed

TensorRT calls the methods of `_Plugin`: when it parses (`describe`), when it chooses types (`autotune`), when it
embeds the PTX in the engine (`embed`) and, only where a node says aot=0, when the engine runs (`enqueue`). What they
raise there, TensorRT replaces by a message of its own: `plugin_errors` has kept it.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from inspect import Parameter, Signature
from types import GenericAlias
from typing import Any

from engines.backends import gpu_sm
from engines.flow_score import cache, run
from engines.flow_score.launch import (
    COMBINE,
    COMBINE_MASKED,
    INPUTS,
    LOGITS,
    OUTPUTS,
    Call,
    Dim,
    Variant,
)
from flowcut.errors import EngineError

NAMESPACE, VERSION = "flowcut", "1"
OLDEST = (10, 9)
"""The TensorRT that brought ahead-of-time plugins."""
NAMES = {LOGITS: "FlowScoreLogits", COMBINE: "FlowScoreCombine", COMBINE_MASKED: "FlowScoreCombineMasked"}
_COMBINE_ATTRIBUTES = {"history": float, "group": int, "source_in_keys": int, "semantic": int, "strengthened": int}
ATTRIBUTES: dict[str, dict[str, type]] = {
    LOGITS: {"logit_scale": float, "semantic_scale": float, "group": int, "token_major": int},
    COMBINE: _COMBINE_ATTRIBUTES,
    COMBINE_MASKED: _COMBINE_ATTRIBUTES,
}
Arguments = dict[str, Any]
"""What TensorRT passes in one call, by name: tensors, attributes and, as it may be, outputs, stream and tactic."""
_errors: list[str] = []


def check_plugin(trt: Any, variants: Iterable[Variant] = ()) -> None:
    """Raise unless `trt` can build plugins, of those kernels, for the present GPU.

    Raises:
        EngineError: TensorRT is older than 10.9 or is TensorRT-RTX, there is no GPU, or there is no PTX for it.
    """
    known = getattr(trt, "__version__", "none")
    version = tuple(int(part) for part in re.findall(r"\d+", known)[:2])
    if version < OLDEST or not hasattr(trt, "QuickPluginCreationRequest"):
        raise EngineError(
            f"FlowScore's plugin must have tensorrt {OLDEST[0]}.{OLDEST[1]} or newer, got {trt.__name__} "
            f"{known}. Install that, or use BACKEND=rtx, which needs no plugin."
        )
    for variant in (*variants, Variant(COMBINE), Variant(COMBINE_MASKED)):
        cache.kernel(variant, _sm())


def register_plugin(trt: Any) -> None:
    """Put the plugins into TensorRT's registry, where its ONNX parser finds them. Once per process is enough.

    Raises:
        as check_plugin; or EngineError: `tensorrt.plugin` does not load, the registry refuses, or an earlier attempt
        in this process broke off in the middle.
    """
    check_plugin(trt)
    try:
        trtp = importlib.import_module(f"{trt.__name__}.plugin")
    except ImportError as error:
        raise EngineError(f"{trt.__name__}.plugin must load, it is a part of TensorRT, got: {error}.") from None
    for kernel in NAMES:
        _Plugin(trt, trtp, kernel).register()


def plugin_errors() -> list[str]:
    """What the plugins raised inside TensorRT since this was last asked."""
    errors = list(dict.fromkeys(_errors))
    _errors.clear()
    return errors


@dataclass(frozen=True)
class _Plugin:
    """What TensorRT asks about one plugin. `trt` and `trtp` are the modules tensorrt and tensorrt.plugin."""

    trt: Any
    trtp: Any
    kernel: str

    def register(self) -> None:
        """Define the plugin unless that is done.

        Raises:
            EngineError: an earlier attempt broke off in the middle, or the registry refuses.
        """
        op = f"{NAMESPACE}::{NAMES[self.kernel]}"
        known = getattr(getattr(self.trtp.op, NAMESPACE, None), NAMES[self.kernel], None)
        if known is None:
            self._define(op)
        elif known.aot_impl_func is None:  # what _define sets last; NVIDIA's code takes no name twice
            raise EngineError(f"{op} must be registered as a whole, got a part of it. Start a fresh process.")
        if self.trt.get_plugin_registry().get_creator(NAMES[self.kernel], VERSION, NAMESPACE) is None:
            raise EngineError(f"{op} must be taken into the registry of TensorRT {self.trt.__version__}, it was not.")

    def _define(self, op: str) -> None:
        trtp, desc = self.trtp, self.trtp.TensorDesc
        outputs, running = (GenericAlias(tuple, (kind,) * self._outputs) for kind in (desc, trtp.Tensor))
        combinations = GenericAlias(list, (trtp.AutoTuneCombination,))
        kernel = GenericAlias(tuple, (str, str, trtp.KernelLaunchParams, trtp.SymIntExprs))
        trtp.register(op)(self._callback(self.describe, desc, {}, outputs))
        trtp.autotune(op)(self._callback(self.autotune, desc, {"outputs": outputs}, combinations))
        trtp.impl(op)(self._callback(self.enqueue, trtp.Tensor, {"outputs": running, "stream": int}, None))
        trtp.aot_impl(op)(self._callback(self.embed, desc, {"outputs": outputs, "tactic": int}, kernel))

    def describe(self, given: Arguments) -> tuple[Any, ...]:
        """The outputs' shapes and types. Dimensions may be stand-ins that have no value."""
        call = self._call(given, _symbol, _symbol)
        if self.kernel == LOGITS:
            shapes = [(call.batch, call.heads * (call.group + 1), call.keys), (call.batch, call.keys)]
        else:
            parts = call.programs(self.kernel, given["source_in_keys"], self.trtp.cdiv)
            shapes = [(call.batch, call.keys - given["source_in_keys"]), (call.batch, parts)][: self._outputs]
        return tuple(self.trtp.from_shape_expr(shape, self.trt.float32) for shape in shapes)

    def autotune(self, given: Arguments) -> list[Any]:
        """q, v_source, k and v are of one type out of three; everything else has one type. Plain layout only."""
        types = dict.fromkeys(INPUTS[self.kernel], "FP32|FP16|BF16" if self.kernel == LOGITS else "FP32")
        if "key_valid" in types:
            types["key_valid"] = "BOOL"
        return [self.trtp.AutoTuneCombination(", ".join([*types.values(), *["FP32"] * self._outputs]), "LINEAR")]

    def embed(self, given: Arguments) -> tuple[str, str, Any, Any]:
        """PTX for the present GPU, and how TensorRT is to launch it."""
        trtp = self.trtp
        compiled = cache.kernel(self._variant(given), _sm())
        call = self._call(given, _symbol, _number)
        parameters = trtp.KernelLaunchParams()
        parameters.grid_x = call.programs(self.kernel, given.get("source_in_keys", 0), trtp.cdiv)
        parameters.grid_y = call.batch
        parameters.block_x, parameters.shared_mem = compiled.threads, compiled.shared_bytes
        integers = self._integers(call, given)
        extra = trtp.SymIntExprs(len(integers))
        for i, integer in enumerate(integers):
            extra[i] = trtp.SymInt32(integer)
        return compiled.entry, compiled.ptx, parameters, extra

    def enqueue(self, given: Arguments) -> None:
        """Launch the kernel on TensorRT's stream."""
        inputs = {name: given[name] for name in INPUTS[self.kernel]}
        outputs = dict(zip(OUTPUTS[self.kernel], given["outputs"], strict=True))
        for name, tensor in (inputs | outputs).items():
            _check_layout(name, tensor)
        call = self._call(given, _number, _number)
        grid = (call.programs(self.kernel, given.get("source_in_keys", 0)), call.batch)
        pointers = [[tensor.data_ptr for tensor in tensors.values()] for tensors in (inputs, outputs)]
        integers = self._integers(call, given)
        run.ptx_launch(given["stream"])(self._variant(given), grid, pointers[0], integers, pointers[1])

    @property
    def _outputs(self) -> int:
        return len(OUTPUTS[self.kernel])

    def _callback(self, function: Callable[[Arguments], Any], tensor: type, more: Arguments, returns: Any) -> Any:
        """`function` with the signature that TensorRT reads: it goes by names, order and classes as annotations."""
        annotations = {**dict.fromkeys(INPUTS[self.kernel], tensor), **ATTRIBUTES[self.kernel], **more}
        kind = Parameter.POSITIONAL_OR_KEYWORD
        parameters = [Parameter(name, kind, annotation=each) for name, each in annotations.items()]
        signature = Signature(parameters, return_annotation=returns)

        def call(*values: Any, **named: Any) -> Any:
            try:
                return function(signature.bind(*values, **named).arguments)
            except Exception as error:
                _errors.append(f"{NAMES[self.kernel]}: {' '.join(str(error).split())}")
                raise

        call.__signature__ = signature  # type: ignore[attr-defined]
        return call

    def _call(self, given: Arguments, dim: Callable[[Any, int], Dim], head_dim: Callable[[Any, int], Dim]) -> Call:
        """Dimensions of the step, read from its tensors by `dim`, and by `head_dim` the number of heads."""
        group = given["group"]
        if self.kernel != LOGITS:
            logits = given["logits"]
            return Call(dim(logits, 0), head_dim(logits, 1) // (group + 1), dim(logits, 2), group)
        heads, rows = (2, 1) if given["token_major"] else (1, 2)
        k = given["k"]
        q_rows = dim(given["q"], rows) if group == 1 else 1
        source_rows = dim(given["v_source"], rows)
        return Call(dim(k, 0), head_dim(k, heads), dim(k, rows), group, q_rows, source_rows, bool(given["token_major"]))

    def _integers(self, call: Call, given: Arguments) -> list[Dim]:
        if self.kernel == LOGITS:
            return call.logits_integers(given["logit_scale"], given["semantic_scale"])
        names = ("history", "source_in_keys", "semantic", "strengthened")
        return call.combine_integers(*(given[name] for name in names))

    def _variant(self, given: Arguments) -> Variant:
        """The kernel for these tensors.

        Raises:
            EngineError: a type, head size or format that there is no kernel for.
        """
        kinds = {self.trt.DataType.FLOAT: "fp32", self.trt.DataType.HALF: "fp16", self.trt.DataType.BF16: "bf16"}
        for name in INPUTS[self.kernel]:
            if given[name].format != self.trt.TensorFormat.LINEAR:
                raise EngineError(f"{name} must have the format LINEAR, got {given[name].format}.")
        if self.kernel != LOGITS:
            return Variant(self.kernel)
        found = [kinds.get(given[name].dtype, str(given[name].dtype)) for name in INPUTS[LOGITS]]
        if len(set(found)) > 1:
            raise EngineError(f"q, v_source, k and v must be of one type, got {', '.join(found)}.")
        return Variant(LOGITS, found[0], given["k"].shape[3])


def _sm() -> int:
    """The present GPU's compute capability without the dot."""
    if (sm := gpu_sm()) is None:
        raise EngineError(
            "FlowScore's plugin must have a GPU to be built for, got none. Use BACKEND=rtx or BACKEND=ort."
        )
    return sm


def _symbol(tensor: Any, axis: int) -> Dim:
    return tensor.shape_expr[axis]


def _number(tensor: Any, axis: int) -> int:
    if tensor.shape[axis] < 0:
        raise EngineError(
            f"the number of heads must be fixed when the engine is built, got shape {list(tensor.shape)}."
        )
    return int(tensor.shape[axis])


def _check_layout(name: str, tensor: Any) -> None:
    """What PTX relies on. That TensorRT sees to it where the engine holds the kernel is an assumption, not yet seen on
    a GPU.

    Raises:
        EngineError: gaps between elements, or an address that wide loads cannot take.
    """
    stride = 1
    for size, got in zip(reversed(list(tensor.shape)), reversed(list(tensor.strides)), strict=True):
        if size != 1 and got != stride:
            raise EngineError(
                f"{name} must be contiguous, got shape {list(tensor.shape)} with strides {list(tensor.strides)}."
            )
        stride *= size
    if tensor.data_ptr % 16:
        raise EngineError(f"{name} must start at a multiple of 16 bytes, got address {tensor.data_ptr:#x}.")
