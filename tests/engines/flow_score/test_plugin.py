"""The plugins as NVIDIA's own code asks them: shapes, types, and what an engine would embed."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import nvidia_plugin
import pytest
import references
from nvidia_plugin import Embedded, Size, Step, created, description

from engines.flow_score import cache, launch, plugin, run
from engines.flow_score.launch import COMBINE, COMBINE_MASKED, LOGITS, Call, Variant
from engines.flow_score.plugin import NAMES
from flowcut.errors import EngineError

SIZES = {"images": 3, "keys": 2879}
SCALES = {"logit_scale": 0.125, "semantic_scale": 1.0}
COMBINES = {"history": 0.5, "group": 1, "source_in_keys": 1, "semantic": 1, "strengthened": 1}


pytestmark = pytest.mark.usefixtures("on_sm_86")


def logits(
    batch: Size = "images",
    heads: int = 16,
    keys: Size = 577,
    size: int = 64,
    rows: tuple[Size, Size] = (1, 1),
    group: int = 1,
    token_major: int = 0,
    types: tuple[str, ...] = ("HALF",) * 4,
    **more: Any,
) -> Step:
    """`rows`: of q and of v_source, which may be whole projections."""

    def shape(count: Size) -> tuple[Size, ...]:
        return (batch, count, heads, size) if token_major else (batch, heads, count, size)

    q = (batch, heads, group, size) if group > 1 else shape(rows[0])
    attributes = SCALES | {"group": group, "token_major": token_major}
    return Step(NAMES[LOGITS], attributes, types, (q, shape(rows[1]), shape(keys), shape(keys)), **more)


def combine(
    batch: Size = "images", heads: int = 16, keys: Size = 577, masked: bool = False, running: bool = True, **more: Any
) -> Step:
    attributes = COMBINES | more
    scored = 576 if keys == 577 else "scored"
    last = (batch, scored) if running else (1, 1)
    shapes = ((batch, heads * (attributes["group"] + 1), keys), (batch, keys), last)
    if masked:
        return Step(NAMES[COMBINE_MASKED], attributes, ("FLOAT",) * 3 + ("BOOL",), (*shapes, (batch, 1, 1, keys)))
    return Step(NAMES[COMBINE], attributes, ("FLOAT",) * 3, shapes)


def embedded(trt: Any, step: Step) -> Embedded:
    """At SIZES."""
    sizes = SIZES | {"scored": SIZES["keys"] - step.attributes.get("source_in_keys", 0)}
    return nvidia_plugin.embedded(trt, step, sizes)


# Shapes and types


@pytest.mark.parametrize(
    ("group", "keys", "token_major"), [(1, 577, 0), (1, 577, 1), (1, "keys", 1), (4, "keys", 0), (4, 577, 0)]
)
def test_logits_have_a_row_per_query_head_and_per_key_head(trt: Any, group: int, keys: Size, token_major: int) -> None:
    got = embedded(trt, logits(heads=8, keys=keys, group=group, token_major=token_major))
    s = SIZES["keys"] if keys == "keys" else 577
    assert got.shapes == [[3, 8 * (group + 1), s], [3, s]]
    assert got.types == ["FLOAT", "FLOAT"]


@pytest.mark.parametrize(("source_in_keys", "scored"), [(1, 2878), (0, 2879)])
def test_combine_returns_a_score_per_key_but_the_source(trt: Any, source_in_keys: int, scored: int) -> None:
    plain = embedded(trt, combine(keys="keys", source_in_keys=source_in_keys))
    masked = embedded(trt, combine(keys="keys", source_in_keys=source_in_keys, masked=True))
    assert plain.shapes == [[3, scored]]
    assert masked.shapes == [[3, scored], [3, 45]]  # 45 programs of 64 scores
    assert masked.types == ["FLOAT", "FLOAT"]


def test_tensors_of_the_encoder_have_one_type_out_of_three(trt: Any) -> None:
    got = embedded(trt, logits())
    kinds = ["FLOAT", "HALF", "BF16"]
    assert got.combinations == [[(kind, "LINEAR")] * 4 + [("FLOAT", "LINEAR")] * 2 for kind in kinds]
    assert embedded(trt, combine()).combinations == [[("FLOAT", "LINEAR")] * 4]
    masked = [(kind, "LINEAR") for kind in ("FLOAT", "FLOAT", "FLOAT", "BOOL", "FLOAT", "FLOAT")]
    assert embedded(trt, combine(masked=True)).combinations == [masked]


# What goes into the engine


@pytest.mark.parametrize("batch", [3, "images"])
@pytest.mark.parametrize(
    ("step", "call"),
    [
        (logits, Call(3, 16, 577)),
        (lambda batch: logits(batch, rows=(577, 577), token_major=1), Call(3, 16, 577, 1, 577, 577, True)),
        (lambda batch: logits(batch, rows=("keys", 1), keys="keys"), Call(3, 16, 2879, 1, 2879, 1)),
        (lambda batch: logits(batch, heads=8, group=4, size=128, keys="keys"), Call(3, 8, 2879, 4)),
    ],
    ids=["rows", "projections", "dynamic", "grouped"],
)
def test_logits_are_launched_as_the_kernel_expects(
    trt: Any, batch: Size, step: Callable[[Size], Step], call: Call
) -> None:
    got, size = embedded(trt, step(batch)), step(batch).shapes[2][3]
    kernel = cache.kernel(Variant(LOGITS, "fp16", int(size)), 86)
    assert got.integers == call.logits_integers(0.125, 1.0)
    assert got.grid == (ceil(call.keys / 4), 3, 1)
    assert (got.block, got.shared_bytes) == ((kernel.threads, 1, 1), kernel.shared_bytes)
    assert (got.entry, got.ptx) == (kernel.entry, kernel.ptx)


@pytest.mark.parametrize("batch", [3, "images"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("changes", "call"),
    [
        ({}, Call(3, 16, 577)),
        ({"history": 0.0, "running": False}, Call(3, 16, 577)),
        ({"keys": "keys", "source_in_keys": 0, "semantic": 0, "heads": 8, "group": 4}, Call(3, 8, 2879, 4)),
    ],
    ids=["history", "first", "grouped"],
)
def test_combine_is_launched_as_the_kernel_expects(
    trt: Any, batch: Size, masked: bool, changes: dict[str, Any], call: Call
) -> None:
    step = combine(batch, masked=masked, **changes)
    got, a = embedded(trt, step), step.attributes
    kernel = cache.kernel(Variant(COMBINE_MASKED if masked else COMBINE), 86)
    assert got.integers == call.combine_integers(a["history"], a["source_in_keys"], a["semantic"], 1)
    assert got.grid == (ceil((call.keys - a["source_in_keys"]) / 64), 3, 1)
    assert (got.block, got.shared_bytes) == ((kernel.threads, 1, 1), kernel.shared_bytes)
    assert (got.entry, got.ptx) == (kernel.entry, kernel.ptx)


@pytest.mark.parametrize("kind", ["HALF", "BF16", "FLOAT"])
def test_the_ptx_takes_what_tensorrt_passes(trt: Any, kind: str) -> None:
    """Pointers of inputs, 32-bit integers, pointers of outputs: TensorRT passes nothing else."""
    for step in (logits(types=(kind,) * 4), combine(), combine(masked=True)):
        got = embedded(trt, step)
        entry = re.search(rf"\.entry {got.entry}\((.*?)\)", got.ptx, re.DOTALL)
        assert entry is not None
        parameters = re.findall(r"\.param \.(\w+)", entry[1])
        assert parameters == ["u64"] * len(step.shapes) + ["u32"] * len(got.integers) + ["u64"] * len(got.shapes)
        assert ".target sm_86" in got.ptx


def test_arguments_are_the_kernels() -> None:
    source = Path(cache.__file__).with_name("kernel.py").read_text(encoding="utf-8")
    kernels = {node.name: node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)}
    for name in NAMES:
        variant = Variant(name, "fp16", 64) if name == LOGITS else Variant(name)
        declared = [argument.arg for argument in kernels[name].args.args]
        passed = [*launch.INPUTS[name], *launch.INTEGERS[name], *launch.OUTPUTS[name]]
        assert declared == [*passed, *variant.constants]


def test_what_is_embedded_computes_the_score(trt: Any) -> None:
    """Grid and integers of both plugins, run in Triton's interpreter: the score of an independent reference."""
    torch = pytest.importorskip("torch")
    pytest.importorskip("triton")
    b, h, s, d = SIZES["images"], 3, 70, 32
    draw = np.random.default_rng(0).standard_normal
    q, k, v = (torch.from_numpy(draw((b, s, h, d))).half() for _ in range(3))
    first = embedded(trt, logits("images", h, s, d, (s, s), token_major=1))
    attributes = COMBINES | {"history": 0.0}
    shapes = (("images", 2 * h, s), ("images", s), (1, 1))
    second = embedded(trt, Step(NAMES[COMBINE], attributes, ("FLOAT",) * 3, shapes))
    start = run.interpreter()
    joined, strength, scores = (torch.empty(x) for x in (*first.shapes, *second.shapes))
    start(Variant(LOGITS, "fp16", d), first.grid[:2], [q, v, k, v], first.integers, [joined, strength])
    start(Variant(COMBINE), second.grid[:2], [joined, strength, torch.zeros(1, 1)], second.integers, [scores])
    for image in range(b):
        by_head = (x[image].permute(1, 0, 2).float().numpy() for x in (q, k, v))
        query, key, value = by_head
        expected = references.flow_score(query * (0.125 * d**0.5), key, value)
        tolerance = references.score_tolerance(expected.largest_logit)
        assert references.relative_error(scores[image].numpy(), expected.score) < tolerance


# While the engine runs, for nodes that say aot=0


def pointers(start: int, count: int) -> list[int]:
    return [4096 * start + 256 * i for i in range(count)]


def enqueue(trt: Any, step: Step, outputs: list[tuple[int, ...]], strides: dict[int, tuple[int, ...]]) -> None:
    """TensorRT's call with dense tensors, save inputs whose strides are given."""

    def dense(shape: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(int(np.prod(shape[axis + 1 :])) for axis in range(len(shape)))

    shapes = [tuple(SIZES[d] if isinstance(d, str) else d for d in shape) for shape in step.shapes]
    kinds = [getattr(trt.DataType, name) for name in step.types]
    made = created(trt, step, "STRICT_JIT")
    made.enqueue(
        [description(trt, shape, kind, "LINEAR").desc for shape, kind in zip(shapes, kinds, strict=True)],
        [description(trt, shape, trt.DataType.FLOAT, "LINEAR").desc for shape in outputs],
        pointers(1, len(shapes)),
        pointers(2, len(outputs)),
        [strides.get(i, dense(shape)) for i, shape in enumerate(shapes)],
        [dense(shape) for shape in outputs],
        7,
    )


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Launches in place of the GPU's: stream, variant, grid, inputs, integers, outputs."""
    calls: list[Any] = []
    monkeypatch.setattr(run, "ptx_launch", lambda stream: lambda *arguments: calls.append((stream, *arguments)))
    return calls


def test_just_in_time_launches_the_same(trt: Any, launched: list[Any]) -> None:
    step = logits(rows=(577, 577), token_major=1)
    enqueue(trt, step, [(3, 32, 577), (3, 577)], {})
    ahead = embedded(trt, step)
    variant = Variant(LOGITS, "fp16", 64)
    assert launched == [(7, variant, ahead.grid[:2], pointers(1, 4), ahead.integers, pointers(2, 2))]
    step = combine(masked=True)
    enqueue(trt, step, [(3, 576), (3, 9)], {})
    ahead = embedded(trt, step)
    variant = Variant(COMBINE_MASKED)
    assert launched[1] == (7, variant, ahead.grid[:2], pointers(1, 4), ahead.integers, pointers(2, 2))


def test_tensors_with_gaps_are_refused(trt: Any, launched: list[Any]) -> None:
    gap = {2: (16 * 577 * 64 * 2, 577 * 64, 64, 1)}  # every other image of k
    with pytest.raises(EngineError, match=r"k must be contiguous, got shape \[3, 16, 577, 64\] with strides \[1181696"):
        enqueue(trt, logits(), [(3, 32, 577), (3, 577)], gap)
    assert launched == []
    assert plugin.plugin_errors()[0].startswith("FlowScoreLogits: k must be contiguous")


def test_tensors_at_odd_addresses_are_refused(trt: Any, launched: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "pointers", lambda start, count: [4098] * count)
    with pytest.raises(EngineError, match="q must start at a multiple of 16 bytes, got address 0x1002"):
        enqueue(trt, logits(), [(3, 32, 577), (3, 577)], {})
    assert launched == []
    plugin.plugin_errors()


# What cannot be built


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (logits(size=200), "head_size must be a multiple of 8 from 32 to 128 .* got 200"),
        (logits(types=("INT8",) * 4), "dtype must be one of fp16, bf16, fp32 for FlowScore, got .*INT8"),
        (logits(types=("HALF", "HALF", "HALF", "FLOAT")), "must be of one type, got fp16, fp16, fp16, fp32"),
        (logits(format="CHW2"), "q must have the format LINEAR, got .*CHW2"),
        (
            Step(
                NAMES[LOGITS], SCALES | {"group": 1, "token_major": 0}, ("HALF",) * 4, (("images", "heads", 9, 64),) * 4
            ),
            r"number of heads must be fixed when the engine is built, got shape \[-1, -1, 9, 64\]",
        ),
    ],
    ids=["head size", "type", "types", "format", "heads"],
)
def test_what_has_no_kernel_is_refused_and_remembered(trt: Any, step: Step, message: str) -> None:
    with pytest.raises(EngineError, match=message):
        embedded(trt, step)
    (error,) = plugin.plugin_errors()  # TensorRT would not tell
    assert re.search(message, error)
    assert error.startswith("FlowScoreLogits: ")
    assert "\n" not in error
    assert plugin.plugin_errors() == []
