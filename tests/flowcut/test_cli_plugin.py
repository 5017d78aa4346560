"""`flowcut plugin`: its tables, its line of JSON, what it verifies with, and what it refuses."""

from __future__ import annotations

import argparse
import json
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from cli_refusals import Refused, one_line, refusals, run

from engines.flow_score import report
from engines.flow_score.check import KernelCheck
from engines.flow_score.compile import CompiledKernel
from engines.flow_score.launch import Variant
from flowcut.arguments import make_parser
from flowcut.cli import main
from flowcut.errors import FlowCutError

TARGETS = [80, 86, 89, 90, 100, 120]


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty directory, which also holds the user's cache; no GPU."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(report, "gpu_sm", lambda: None)
    return tmp_path


@pytest.fixture
def refused(place: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    return refusals(place, capfd)


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What checks the kernels is replaced; the launches it was given. Two cases, both right."""
    launches: list[Any] = []

    def check_kernels(launch: Any, device: str, variants: Any) -> list[KernelCheck]:
        launches.append((launch, device))
        return [case("flat rows"), case("one key")]

    monkeypatch.setattr(report, "check_kernels", check_kernels)
    monkeypatch.setattr(report, "interpreter", lambda: "interpreter")
    monkeypatch.setattr(report, "ptx_launch", lambda: "ptx")
    return launches


def case(name: str, ok: bool = True) -> KernelCheck:
    return KernelCheck(name, "fp16", (1, 2, 3, 64), 3e-7 if ok else math.nan, 1.2e-5, ok)


def documented() -> str:
    (commands,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    return " ".join(commands.choices["plugin"].format_help().split())


def told(capfd: pytest.CaptureFixture[str], *argv: object) -> tuple[list[str], dict[str, Any], int]:
    """Lines for people, the line of JSON, the exit code."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["plugin", *map(str, argv)])
    *lines, last = capfd.readouterr().out.splitlines()
    return lines, json.loads(last), int(str(ended.value.code))


@pytest.mark.usefixtures("checked")
def test_all_targets_and_kernels_with_their_figures(capfd: pytest.CaptureFixture[str]) -> None:
    lines, result, code = told(capfd)
    assert code == 0
    assert result.keys() == set(re.split(r", | and ", documented().partition("with the keys ")[2].rstrip(".")))
    assert (result["verified"], result["verified_by"]) == (True, "triton interpreter")
    assert result["checks"][0] == {
        **{"name": "flat rows", "dtype": "fp16", "shape": [1, 2, 3, 64]},
        **{"relative_error": 3e-7, "allowed_error": 1.2e-5, "ok": True},
    }
    rows = result["targets"]
    assert [sm for sm in TARGETS for _ in range(11)] == [row["sm"] for row in rows]
    assert {row["source"] for row in rows} == {"shipped"}
    assert {row["spills"] for row in rows} == {0}
    assert all(32 <= row["registers"] <= 255 and row["shared_bytes"] > 0 and row["threads"] >= 128 for row in rows)
    assert {(row["dtype"], row["head_size"]) for row in rows if row["kernel"] == "flow_score_logits"} == {
        (dtype, size) for dtype in ("fp16", "bf16", "fp32") for size in (32, 64, 128)
    }
    figures = {tuple(line.split()) for line in lines if line.startswith("sm_")}
    assert figures == {
        (
            f"sm_{row['sm']}",
            row["kernel"].removeprefix("flow_score_")
            + (f"-{row['dtype']}-{row['head_size']}" * bool(row["head_size"])),
            *(str(row[name]) for name in ("registers", "shared_bytes", "spills", "threads", "source")),
        )
        for row in rows
    }
    assert max(map(len, lines)) <= 80
    assert "Relative errors against float64, run by triton interpreter" in lines
    assert lines[-1].split() == ["one", "key", "fp16", "1", "x", "2", "x", "3", "x", "64", "3.0e-07", "1.2e-05", "ok"]


@pytest.mark.usefixtures("checked")
def test_bytes_of_three_models(capfd: pytest.CaptureFixture[str]) -> None:
    lines, result, _ = told(capfd, "--target", 80, "--precision", "fp16")
    moved = {step["model"]: step for step in result["bytes"]}
    shapes = {name: (step["keys"], step["heads"], step["head_size"]) for name, step in moved.items()}
    assert shapes == {
        "CLIP-L/14-336": (577, 16, 64),
        "llava-tiny": (145, 4, 32),
        "LLaVA-NeXT-7B in-LLM": (2880, 32, 128),
    }
    for step in moved.values():
        assert step["kv_bytes"] == 2 * 2 * step["keys"] * step["heads"] * step["head_size"]
        assert step["kv_bytes"] < step["device_bytes"] < step["total_bytes"]
    assert any(line.split()[:2] == ["CLIP-L/14-336", "fp16"] and "2,363" in line for line in lines)


@pytest.mark.usefixtures("checked")
def test_options_choose_targets_and_kernels(capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--target", "sm90", "80", "sm_90", "--head-size", 64, 64, "--precision", "bf16"]
    _, result, _ = told(capfd, *options)
    chosen = [(row["sm"], row["kernel"], row["dtype"], row["head_size"]) for row in result["targets"]]
    each = [("flow_score_logits", "bf16", 64), ("flow_score_combine", "fp32", 0)]
    each += [("flow_score_combine_masked", "fp32", 0)]
    assert chosen == [(sm, *kernel) for sm in (90, 80) for kernel in each]


@pytest.mark.usefixtures("checked")
def test_precompile_fills_the_cache(
    place: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[tuple[Variant, int]] = []

    def compile_kernels(jobs: Sequence[tuple[Variant, int]]) -> Iterator[CompiledKernel]:
        for variant, sm in jobs:
            compiled.append((variant, sm))
            yield CompiledKernel(variant, sm, variant.kernel, ".version 8.7\n", 128, 64, 77, 0, "3.9.0")

    monkeypatch.setattr(report, "compile_kernels", compile_kernels)
    options = ["--target", 80, 86, "--head-size", 64, 72, "--precision", "fp16"]

    lines, result, code = told(capfd, *options)
    lacking = [row for row in result["targets"] if row["source"] is None]
    assert code == 0
    assert [(row["sm"], row["head_size"], row["registers"]) for row in lacking] == [(80, 72, None), (86, 72, None)]
    assert (
        f"none: `flowcut plugin --precompile` with the same options compiles it into {place}/cache/flowcut-trt/ptx"
        in lines
    )
    assert (compiled, list(place.iterdir())) == ([], [])

    for source in ("compiled", "cached"):
        lines, result, code = told(capfd, *options, "--precompile")
        rows = {(row["sm"], row["head_size"]): row for row in result["targets"]}
        assert {rows[sm, 72]["source"] for sm in (80, 86)} == {source}
        assert {rows[sm, 64]["source"] for sm in (80, 86)} == {"shipped"}
        assert rows[86, 72]["registers"] == 77
        assert compiled == [(Variant("flow_score_logits", "fp16", 72), sm) for sm in (80, 86)]
        assert not [line for line in lines if line.startswith("none")]


def test_a_kernel_that_differs_is_named_in_one_line(
    capfd: pytest.CaptureFixture[str], checked: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = [case(f"case {i}", ok=i > 6) for i in range(9)]
    monkeypatch.setattr(report, "check_kernels", lambda launch, device, variants: wrong)
    said = run(capfd, "plugin", "--target", 80)
    assert said.code == 1
    assert one_line(said.message) == (
        "kernels must agree with the reference, got 7 cases that do not: case 0; case 1; case 2; case 3; case 4."
    )
    lines, result, _ = told(capfd, "--target", 80)
    assert (result["verified"], result["ok"]) == (False, False)
    assert [check["relative_error"] for check in result["checks"]] == [None] * 7 + [3e-7] * 2
    assert [line.split()[-1] for line in lines[-9:]] == ["WRONG"] * 7 + ["ok"] * 2


@pytest.mark.parametrize(
    ("sm", "cuda", "verified_by", "launched"),
    [
        (90, True, "GPU sm_90", ("ptx", "cuda")),
        (90, False, "triton interpreter", ("interpreter", "cpu")),
        (75, True, "triton interpreter", ("interpreter", "cpu")),
    ],
)
def test_verifies_on_the_gpu_that_can_run_the_kernels(
    capfd: pytest.CaptureFixture[str],
    checked: list[Any],
    monkeypatch: pytest.MonkeyPatch,
    sm: int,
    cuda: bool,
    verified_by: str,
    launched: tuple[str, str],
) -> None:
    monkeypatch.setattr(report, "gpu_sm", lambda: sm)
    monkeypatch.setattr(report, "_cuda_works", lambda: cuda)
    assert told(capfd, "--target", 80)[1]["verified_by"] == verified_by
    assert checked == [launched]


@pytest.mark.parametrize("missing", ["triton", "torch"])
def test_without_what_runs_kernels_the_table_is_there_and_the_code_is_1(
    capfd: pytest.CaptureFixture[str], checked: list[Any], monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    monkeypatch.setattr(report, "available", lambda module: module != missing)
    said = run(capfd, "plugin", "--target", 80)
    assert said.code == 1
    assert one_line(said.message) == (
        "kernels are not verified: that takes triton and torch, which interpret them. In the checkout: "
        "pip install -e '.[kernels,torch]'"
    )
    lines, result, _ = told(capfd, "--target", 80)
    assert (result["verified"], result["verified_by"], result["checks"]) == (False, "", [])
    assert len([line for line in lines if line.startswith("sm_80") and line.endswith("shipped")]) == 11
    assert checked == []


def test_precompiling_without_triton_names_the_extra(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_kernels(jobs: object) -> Iterator[CompiledKernel]:
        raise FlowCutError("triton is not installed. pip install -e '.[kernels]'")

    monkeypatch.setattr(report, "compile_kernels", compile_kernels)
    assert "[kernels]" in refused("plugin", "--target", 80, "--head-size", 72, "--precompile")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "80", "75"), "GPU must be sm_80 or newer for FlowScore's kernels, got sm_75. "),
        (("--head-size", "33"), "head_size must be a multiple of 8 from 32 to 128 for FlowScore's kernel, got 33. "),
        (("--precision", "int8"), "dtype must be one of fp16, bf16, fp32 for FlowScore, got 'int8'."),
    ],
)
def test_refuses_what_there_is_no_kernel_for(refused: Refused, options: tuple[str, ...], message: str) -> None:
    assert refused("plugin", *options).startswith(message)


@pytest.mark.usefixtures("checked")
def test_a_gpu_between_the_targets_is_shown_as_what_it_runs(capfd: pytest.CaptureFixture[str]) -> None:
    _, result, _ = told(capfd, "--target", "8.7", "sm_121", "103", "86", "--head-size", 64, "--precision", "fp16")
    assert [row["sm"] for row in result["targets"]] == [sm for sm in (86, 120, 100) for _ in range(3)]


@pytest.mark.usefixtures("checked")
def test_precompiling_into_what_cannot_be_written_is_an_error(
    place: Path, refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compile_kernels(jobs: Sequence[tuple[Variant, int]]) -> Iterator[CompiledKernel]:
        yield from (CompiledKernel(variant, sm, "x", ".version 8.7\n", 128, 64, 77, 0, "3.9.0") for variant, sm in jobs)

    monkeypatch.setattr(report, "compile_kernels", compile_kernels)
    (place / "cache").write_text("a file")
    message = refused("plugin", "--target", 80, "--head-size", 72, "--precision", "fp16", "--precompile")
    assert message.startswith(f"{place}/cache/flowcut-trt/ptx must be a directory to keep PTX in, got: ")
    assert message.endswith("XDG_CACHE_HOME names another.")


def test_wrong_syntax_is_code_2(capfd: pytest.CaptureFixture[str]) -> None:
    for options in (["--target", "hopper"], ["--target"], ["--head-size", "wide"]):
        said = run(capfd, "plugin", *options)
        assert (said.code, said.message.count("\n")) == (2, 1)


def test_help_says_what_the_figures_and_the_targets_are() -> None:
    text = documented()
    for said in ("registers", "spills", "bytes", "80, 86, 89, 90, 100, 120", "fp16, bf16, fp32", "interpreter", "PTX"):
        assert said.lower() in text.lower()


def test_the_kernels_are_right_in_the_interpreter(capfd: pytest.CaptureFixture[str]) -> None:
    lines, result, code = told(capfd, "--target", 80, "--head-size", 96, "--precision", "fp16")
    assert (code, result["verified"], result["verified_by"]) == (0, True, "triton interpreter")
    assert {check["dtype"] for check in result["checks"]} == {"fp16", "bf16", "fp32"}
    assert result["checks"][-1]["shape"][3] == 96, "what was asked for is checked too"
    assert any(line.split()[-2:] == ["finite", "ok"] for line in lines)
