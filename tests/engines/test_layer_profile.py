"""What `flowcut run --profile` tells: sums over nodes, of the timed runs alone, as tables and as JSON."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console
from tiny_engine import TinyEngine, write_engine

from engines.ask import Question, ask
from engines.layer_profile import collect, layer_profile
from engines.profile_report import OPS, profiled
from engines.runtime.engine import load_engine
from engines.sessions.session import LayerTime
from flowcut.cli import SCENE, main

TIMES = [
    LayerTime("language", "a", "MatMul", 4, 6.0),
    LayerTime("language", "b", "Add", 4, 1.0),
    LayerTime("language.1", "c", "MatMul", 2, 2.0),
    LayerTime("language", "d", "", 4, 1.5),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyEngine:
    return write_engine(tmp_path_factory.mktemp("profile") / "engine", random=True)


def test_kinds_are_summed_and_the_dearest_comes_first() -> None:
    found = layer_profile(TIMES, slowest=2)
    assert (found.nodes, found.total_ms) == (4, 10.5)
    assert [(op.op, op.calls, op.total_ms) for op in found.ops] == [("MatMul", 6, 8.0), ("", 4, 1.5), ("Add", 4, 1.0)]
    assert sum(op.share for op in found.ops) == pytest.approx(1)
    assert found.ops[0].share == pytest.approx(8 / 10.5)
    assert [node.name for node in found.slowest] == ["a", "c"]


def test_nothing_measured_is_nothing() -> None:
    assert json.loads(json.dumps(layer_profile([]).to_dict())) == {
        "nodes": 0,
        "total_ms": 0,
        "ops": [],
        "slowest": [],
    }


def shown(profile: list[LayerTime]) -> str:
    console = Console(file=io.StringIO(), width=80, markup=False, highlight=False)
    profiled(console, {"language": layer_profile(profile)})
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_tables_show_kinds_and_nodes() -> None:
    text = shown(TIMES)
    rows = [line.split() for line in text.splitlines()]
    assert ["MatMul", "6", "8.00", "76.2%"] in rows
    assert ["(not", "told)", "4", "1.50", "14.3%"] in rows
    assert ["c", "MatMul", "2", "2.00"] in rows
    assert "language: 4 nodes, 10.5 ms" in text


def test_kinds_beyond_the_first_are_one_row() -> None:
    rows = [
        line.split() for line in shown([LayerTime("g", f"n{i}", f"Op{i}", 1, 10.0 - i) for i in range(10)]).splitlines()
    ]
    assert ["2", "other", "kinds", "2", "3.00", "5.5%"] in rows
    assert sum(row[:1] == [f"Op{i}"] for row in rows for i in range(10)) == OPS


def test_names_of_any_length_fit_the_terminal() -> None:
    """TensorRT's are those of all nodes that it fused."""
    text = shown([LayerTime("vision", "fused_" * 15, "MatMul", 1, 1.0), LayerTime("vision", "_" * 3000, "Add", 1, 1.0)])
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("_") < 15 + 130
    assert text.count("f") - text.count("of") == 15


def test_the_profile_is_of_the_timed_runs(tiny: TinyEngine) -> None:
    engine = load_engine(tiny.directory, "ort", threads=1, picture_cache_mb=0, profile=True)
    answer = ask(engine, Question((SCENE,), "What is it?", answer_tokens=4, repeats=2, template=True))
    assert {node.calls for node in answer.profile["vision"].slowest} == {2}
    # Each run prefills, and then takes one step less than it has tokens.
    assert {node.calls for node in answer.profile["language"].slowest} == {2 * len(answer.generation.token_ids[0])}
    assert collect(engine.model)["vision"].nodes == 0  # it was told


def test_without_the_option_an_answer_has_neither(tiny: TinyEngine) -> None:
    engine = load_engine(tiny.directory, "ort", threads=1)
    question = Question((SCENE,), "What is it?", answer_tokens=2, repeats=1, template=True)
    answer = ask(engine, question)
    assert (answer.profile, answer.memory) == ({}, None)
    assert not answer.to_dict(engine, question).keys() & {"profile", "memory"}


def run(directory: Path, *options: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["run", str(directory), "--threads", "1", "--answer-tokens", "3", "--repeats", "2", *options])
    assert ended.value.code == 0


def test_the_command_shows_it_and_says_that_it_slows(tiny: TinyEngine, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny.directory, "--profile")
    *text, last = capsys.readouterr().out.splitlines()
    result = json.loads(last)
    assert {graph: each["nodes"] > 100 for graph, each in result["profile"].items()} == {
        "vision": True,
        "language": True,
    }
    assert result["memory"]["cache_per_prompt"] > 0
    table = text.index(next(line for line in text if line.startswith("latency on ONNX Runtime")))
    assert text[table].endswith("slowed by --profile")
    after = [line.split(":")[0] for line in text[table:] if line]
    assert after.index("vision") < after.index("language") < after.index("memory")


def test_the_command_says_nothing_of_it_otherwise(tiny: TinyEngine, capsys: pytest.CaptureFixture[str]) -> None:
    run(tiny.directory)
    *text, last = capsys.readouterr().out.splitlines()
    assert not json.loads(last).keys() & {"profile", "memory"}
    assert "slowed" not in "\n".join(text)
