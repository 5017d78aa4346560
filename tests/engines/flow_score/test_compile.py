"""Kernels compiled for every target on this machine: figures as recorded, PTX as shipped and fit for TensorRT."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from engines.flow_score import compile as compiling
from engines.flow_score.cache import ARCHIVE, SHIPPED, archive, look_up
from engines.flow_score.compile import TARGETS, CompiledKernel, check_target, compile_kernel, compile_kernels, tidy
from engines.flow_score.launch import DTYPES, HEAD_SIZES, INPUTS, INTEGERS, LOGITS, OUTPUTS, Variant
from flowcut.errors import EngineError, FlowCutError

ROOT = Path(__file__).parents[3]
RECORD = ROOT / "docs" / "results" / "flow_score_kernels.json"
REGENERATE = (
    "kernels or their settings changed: run `python docs/results/flow_score_kernels.py` and commit what it writes"
)
COMPARED = ("kernel", "dtype", "head_size", "sm", "threads", "registers", "shared_bytes", "spills")


@pytest.fixture(scope="session")
def compiled() -> list[CompiledKernel]:
    """Everything that is shipped, compiled once for all tests: under a minute on two processors."""
    return list(compile_kernels([(variant, sm) for variant in SHIPPED for sm in TARGETS]))


def as_recorded(kernel: CompiledKernel) -> dict[str, Any]:
    known = {"kernel": kernel.variant.kernel, "dtype": kernel.variant.dtype, "head_size": kernel.variant.head_size}
    return {name: known[name] if name in known else getattr(kernel, name) for name in COMPARED}


def parameters(ptx: str) -> list[str]:
    """Types of the entry's parameters."""
    return re.findall(r"^\t\.param \.(\w+)", ptx, re.MULTILINE)


def test_every_target_compiles_without_spills_in_seconds(compiled: list[CompiledKernel]) -> None:
    assert len(compiled) == 66
    assert {kernel.sm for kernel in compiled} == {80, 86, 89, 90, 100, 120}
    assert {kernel.variant.dtype for kernel in compiled} == {"fp16", "bf16", "fp32"}
    assert [kernel for kernel in compiled if kernel.spills] == []
    assert [kernel for kernel in compiled if not 0 < kernel.seconds < 20] == []


def test_figures_are_those_of_the_table(compiled: list[CompiledKernel]) -> None:
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    assert [as_recorded(kernel) for kernel in compiled] == record["kernels"], REGENERATE
    text = RECORD.with_suffix(".md").read_text(encoding="utf-8")
    for kernel in compiled:
        (line,) = re.findall(
            rf"^\| {kernel.variant.kernel} \| {kernel.variant.dtype} \| {kernel.variant.head_size or 'any'} \|.*$",
            text,
            re.MULTILINE,
        )
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[4 + TARGETS.index(kernel.sm)] == f"{kernel.registers} / {kernel.shared_bytes}", REGENERATE
        assert (cells[3], cells[-1]) == (str(kernel.threads), "0"), REGENERATE


def test_shipped_ptx_is_what_the_kernels_compile_to(compiled: list[CompiledKernel]) -> None:
    assert ARCHIVE.read_bytes() == archive(compiled), REGENERATE


def test_ptx_takes_the_arguments_that_tensorrt_passes_and_no_other(compiled: list[CompiledKernel]) -> None:
    for kernel in compiled:
        names = INPUTS[kernel.variant.kernel], INTEGERS[kernel.variant.kernel], OUTPUTS[kernel.variant.kernel]
        inputs, integers, outputs = (len(x) for x in names)
        assert parameters(kernel.ptx) == ["u64"] * inputs + ["u32"] * integers + ["u64"] * outputs
        assert f".visible .entry {kernel.entry}(" in kernel.ptx
        assert kernel.ptx.count(".entry") == 1
        assert f"\n.reqntid {kernel.threads}\n" in kernel.ptx


def test_ptx_runs_on_later_gpus_and_names_nothing_of_this_machine(compiled: list[CompiledKernel]) -> None:
    for kernel in compiled:
        assert kernel.ptx.startswith(f".version 8.7\n.target sm_{kernel.sm}\n.address_size 64\n")  # no sm_90a
        assert not re.search(r"/|\.loc\b|\.file\b|\.section\b|^\s*$", kernel.ptx.rstrip("\n"), re.MULTILINE)


def test_nothing_depends_on_the_environment_or_is_left_on_the_disk(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiled: list[CompiledKernel]
) -> None:
    settings = {"TRITON_INTERPRET": "1", "PTXAS_OPTIONS": "-O0", "DISABLE_PTXAS_OPT": "1", "USE_IR_LOC": "ttgir"}
    for name, value in {**settings, "TRITON_DEFAULT_FP_FUSION": "0", "HOME": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(compiling.tempfile, "tempdir", str(temporary))
    (tmp_path / "triton.py").write_text("raise SystemExit('not this one')")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    ours = compiled[0]
    assert compile_kernel(ours.variant, ours.sm).ptx == ours.ptx
    assert sorted(tmp_path.rglob("*")) == before


def test_refuses_other_targets() -> None:
    with pytest.raises(EngineError, match=r"^target must be one of 80, 86, 89, 90, 100, 120, got 75\."):
        compile_kernel(SHIPPED[0], 75)
    assert check_target(120) == 120


def test_names_the_extra_where_triton_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "available", lambda module: False)
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(FlowCutError, match=r"triton is not installed.*\.\[kernels\]"):
        compile_kernel(SHIPPED[0], 80)


def test_says_in_one_line_what_the_compiler_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Variant, "__post_init__", lambda self: None)
    wrong = Variant(LOGITS, "fp17", 64)
    with pytest.raises(EngineError, match=r"^flow_score_logits-fp17-64 must compile for sm_80, got: .*fp17[^\n]*$"):
        compile_kernel(wrong, 80)


def test_abandoned_compilations_end(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Recorded(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            started.append(self)

    monkeypatch.setattr(compiling.subprocess, "Popen", Recorded)
    running = compile_kernels([(variant, 80) for variant in SHIPPED], processes=2)
    next(running)
    running.close()
    assert len(started) == 2
    assert all(child.poll() is not None for child in started)


PTX = """//
.version 8.7
.target sm_90a
.visible .entry flow_score_combine(
{parameters}
)
{{
\tld.param.b64 \t%rd1, [flow_score_combine_param_{read}]; // a comment

\tret;
}}
"""


def combine_ptx(count: int, read: int) -> str:
    lines = [f"\t.param .u64 flow_score_combine_param_{i}" for i in range(count)]
    return PTX.format(parameters=",\n".join(lines), read=read)


def test_hidden_parameters_go_unless_they_are_read() -> None:
    variant = Variant("flow_score_combine")  # 3 + 8 + 1 arguments
    text = tidy(combine_ptx(14, read=11), variant, 90)
    assert text == combine_ptx(12, read=11).replace("//\n", "").replace("_90a", "_90").replace(
        " // a comment\n\n", "\n"
    )
    for ptx in (combine_ptx(14, read=12), combine_ptx(11, read=1)):
        with pytest.raises(EngineError, match="flow_score_combine must read its 12 arguments only"):
            tidy(ptx, variant, 90)


@pytest.mark.long
def test_no_head_size_spills_anywhere() -> None:
    variants = [Variant(LOGITS, dtype, size) for size in HEAD_SIZES for dtype in DTYPES]
    jobs = [(variant, sm) for variant in variants for sm in TARGETS if not _is_shipped(variant)]
    assert len(jobs) == 180
    spilling = [(kernel.variant.label, kernel.sm) for kernel in compile_kernels(jobs) if kernel.spills]
    assert spilling == []


def _is_shipped(variant: Variant) -> bool:
    found = look_up(variant, 80)
    return found is not None and found.source == "shipped"
