"""docs/results/runtime_overhead: the page is the .json, and each part measures what it says, on a small engine."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tiny_engine import write_engine

from flowcut.contract import Limits

RESULTS = Path(__file__).parent.parent / "docs" / "results"
SCRIPT = "runtime_overhead"
MACHINE = {
    "created": "2026-01-01",
    "processor": "P",
    "cores": 2,
    "memory_bytes": 24e9,
    "load": 0.5,
    "versions": {"python": "3.11", "onnxruntime": "1.32.0"},
}
HEAD = {"title": "llava-tiny", "threads": 1, "machine": MACHINE}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    limits = Limits(max_batch=1, max_images=1, max_prompt=128, max_new_tokens=300)
    return write_engine(tmp_path_factory.mktemp("overhead") / "engine", limits=limits, random=True).directory


def test_the_page_is_made_of_the_json(script: ModuleType, data: dict[str, Any]) -> None:
    assert data.keys() == script.PARTS.keys()
    assert (RESULTS / "runtime_overhead.md").read_text(encoding="utf-8") == script.page(data)


def test_what_was_measured_has_numbers_spread_and_versions(script: ModuleType, data: dict[str, Any]) -> None:
    for name, sections in data.items():
        assert len(sections) == len(script.PARTS[name].kinds)
        for section in sections:
            assert {"python", "numpy", "onnxruntime"} <= section["machine"]["versions"].keys()
            assert section["machine"]["load"] > 0
    for section in data["overhead"]:
        assert [row["share"]["n"] >= 10 for row in section["prefill"]] == [True] * 3
    for section in data["positions"]:
        assert [row["position"] for row in section["rows"]] == list(range(64, 1025, 64))
    for section in data["memory"]:
        assert section["steps"] >= 1999
    for section in data["start"]:
        assert section["help"]["n"] >= 10


def test_what_was_promised_is_kept(data: dict[str, Any]) -> None:
    for section in data["overhead"]:
        assert [row["share"]["median"] < 0.02 for row in section["prefill"] if row["size"][0] <= 640] == [True, True]
        assert section["decode"]["ms"]["outside"]["median"] < 1
    for section in data["positions"]:
        others = [row["others_ms"] for row in section["rows"]]
        assert max(others) / min(others) <= 1.1
    for section in data["memory"]:
        assert abs(section["bytes_per_step"]) < 512  # the logits alone are 4 kB
    for section in data["start"]:
        assert section["help"]["median"] < 0.3
        assert section["load"]["median"] < 1.5


def test_the_parts_of_a_prefill_add_up(script: ModuleType, tiny: Path) -> None:
    found = script.overhead(tiny, threads=1, repeats=3, new_tokens=6)
    assert [row["picture"] for row in found["prefill"]] == ["scene.png", "photograph.jpg", "telephone.jpg"]
    for row in found["prefill"]:
        ms = row["ms"]
        assert ms.keys() == {"total", "inside", "outside", "open", "hash", "tokenize", "resize", "bind", "rest"}
        assert all(ms[part]["median"] > 0 for part in ms)
        assert 0 < row["share"]["median"] < 1
        assert row["share"]["n"] == 3
    decode = found["decode"]
    assert decode["steps"] == 5
    assert decode["ms"].keys() == {"total", "inside", "bind", "outside", "rest"}
    text = script.page({"overhead": [{**HEAD, **found}]})
    assert "telephone.jpg, 4032 x 3024" in text
    assert f"{found['decode']['steps']} steps" in text
    assert "## positions\n\nNot run yet." in text


def test_positions_are_those_of_the_cache(script: ModuleType, tiny: Path) -> None:
    found = script.positions(tiny, threads=1, rounds=2, last=192)
    assert [row["position"] for row in found["rows"]] == [64, 128, 192]
    assert all(row["step_ms"] > 0 and row["attention_ms"] > 0 and row["others_ms"] > 0 for row in found["rows"])
    text = script.page({"positions": [{**HEAD, **found}]})
    assert "| 64 |" in text
    assert "| 192 |" in text


def test_each_position_has_its_own_median(script: ModuleType) -> None:
    values = [(None, 9.0), (63, 9.0), (64, 1.0), (64, 3.0), (64, 2.0), (128, 5.0), (128, 7.0), (129, 9.0)]
    assert script.by_position(values, 128) == [2.0, 6.0]


def test_memory_is_looked_at_as_steps_go_on(script: ModuleType, tiny: Path) -> None:
    found = script.memory(tiny, threads=1, steps=60, every=20)
    assert [number for number, _ in found["resident"]] == [0, 20, 40, 59]
    assert found["growth_bytes"] == found["resident"][-1][1] - found["resident"][1][1]
    assert "One answer of 59 steps" in script.page({"memory": [{**HEAD, **found}]})


def test_starting_is_timed_in_processes(script: ModuleType, tiny: Path) -> None:
    found = script.start(tiny, threads=1, processes=2)
    assert {found[name]["n"] for name in ("help", "process", "import", "load")} == {2}
    assert found["process"]["median"] > found["import"]["median"]
    assert script.page({"start": [{**HEAD, **found}]}).count("| 2 |") == 4


def test_verdicts_are_computed(script: ModuleType) -> None:
    flat = [{"position": 64, "step_ms": 2.0, "attention_ms": 0.5, "others_ms": 1.0}]
    for others, verdict in ((1.05, "within 10%: kept"), (1.2, "within 10%: **missed**")):
        rows = [*flat, {"position": 128, "step_ms": 2.4, "attention_ms": 0.9, "others_ms": others}]
        text = script.page({"positions": [{**HEAD, "rounds": 2, "rows": rows}]})
        assert verdict in " ".join(text.split())


def test_a_machine_with_a_directory_can_build_another(script: ModuleType, tmp_path: Path) -> None:
    """What the parts are measured on, at its smallest."""
    kind = script.Kind("llava-tiny", None, "llava-tiny")
    with script.built(kind, {"max_new_tokens": 8}) as directory:
        manifest = json.loads((directory / "manifest.json").read_text(encoding="utf-8"))
        assert (manifest["weights"], manifest["precision"]) == ("random", "fp32")
        assert manifest["limits"]["max_new_tokens"] == 8
    assert not directory.exists()


def test_a_part_is_measured_in_a_process_of_its_own(
    script: ModuleType, tiny: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(script.PARTS, "start", script.PARTS["start"]._replace(measure=lambda directory, threads: [3]))
    script.main(["--part", "start", "--inside", str(tiny), "--threads", "1"])
    assert json.loads(capsys.readouterr().out) == [3]
