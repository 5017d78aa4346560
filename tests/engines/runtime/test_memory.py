"""The memory report: what an engine takes by its contract, and the process by the system."""

from __future__ import annotations

import io
import json
import resource
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console
from tiny_engine import LIMITS, TinyEngine, write_engine

from engines.profile_report import remembered
from engines.runtime import memory
from engines.runtime.engine import LlavaEngine, load_engine
from engines.runtime.memory import cache_bytes, process_bytes
from flowcut.cli import SCENE
from flowcut.contract import language_contract
from flowcut.prompt import question_prompt


@pytest.fixture(scope="module", params=[1, 2], ids=["one graph", "two stages"])
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TinyEngine:
    return write_engine(tmp_path_factory.mktemp("memory") / "engine", stages=request.param)


def load(tiny: TinyEngine, **options: object) -> LlavaEngine:
    return load_engine(tiny.directory, "ort", threads=1, **options)


def test_the_cache_is_as_large_as_what_is_allocated(tiny: TinyEngine) -> None:
    engine = load(tiny, concurrency=3)
    report = engine.memory()
    state = engine.model.language.allocate_state(1)
    stages = getattr(state, "stages", [state])
    assert report.cache_per_prompt == sum(value.tensor_size_in_bytes() for stage in stages for value in stage.caches)
    assert report.cache_at_most == 3 * LIMITS.max_batch * report.cache_per_prompt


@pytest.mark.parametrize(("precision", "width"), [("fp32", 4), ("fp16", 2), ("bf16", 2)])
def test_the_cache_is_counted_in_its_own_type(tiny: TinyEngine, precision: str, width: int) -> None:
    text = tiny.model.config.text
    rows = LIMITS.max_prompt + LIMITS.max_new_tokens
    by_hand = 2 * text.num_hidden_layers * text.num_key_value_heads * rows * (text.hidden_size // 6) * width
    assert text.num_attention_heads == 6
    assert cache_bytes(language_contract(tiny.model.config, 16, precision, LIMITS)) == by_hand


def test_files_are_those_that_are_loaded(tiny: TinyEngine) -> None:
    report = load(tiny).memory()
    there = {path.name.removesuffix(".onnx.data"): path for path in tiny.directory.glob("*.onnx.data")}
    assert report.files == {name: path.stat().st_size for name, path in there.items()}
    assert report.sessions["vision"]["weights"] >= report.files["vision"]
    language = sum(size for name, size in report.files.items() if name != "vision")
    assert report.sessions["language"]["weights"] >= language


def test_pictures_count_once_they_are_seen(tiny: TinyEngine) -> None:
    engine = load(tiny, picture_cache_mb=3)
    assert (engine.memory().pictures, engine.memory().pictures_at_most) == (0, 3_000_000)
    for _ in range(2):
        engine.prefill(SCENE, question_prompt("What is it?"))
    embeds = np.empty((1, tiny.schedule.tokens, tiny.model.config.text.hidden_size), np.float32)
    assert engine.memory().pictures == embeds.nbytes


def test_the_process_has_what_the_system_says(tiny: TinyEngine) -> None:
    resident, peak = process_bytes()
    assert resident is not None
    assert peak is not None
    assert 0 < resident <= peak
    # Another counter of the kernel's, which a block that reset the peak (test_ort_session.py) leaves as it was.
    assert peak <= resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 * 1.05
    ballast = np.ones(50_000_000, np.uint8)
    assert process_bytes()[0] > resident + 0.9 * ballast.nbytes


def test_where_the_system_does_not_tell_there_is_nothing(
    tiny: TinyEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = load(tiny)
    for text in (None, "Name:\tpython\n"):
        monkeypatch.setattr(memory, "_STATUS", tmp_path / "status")
        if text is not None:
            (tmp_path / "status").write_text(text, encoding="ascii")
        report = engine.memory()
        assert (report.resident, report.peak) == (None, None)


def test_the_report_is_json_and_a_table(tiny: TinyEngine) -> None:
    report = replace(load(tiny).memory(), resident=123_450_000, peak=None)
    assert json.loads(json.dumps(report.to_dict())) == report.to_dict()
    console = Console(file=io.StringIO(), width=80, markup=False)
    remembered(console, report)
    rows = [line.rsplit(maxsplit=1) for line in console.file.getvalue().splitlines()]  # type: ignore[attr-defined]
    assert ["this process now", "123.5"] in [[cell.strip() for cell in row] for row in rows]
    assert ["this process at its peak", "-"] in [[cell.strip() for cell in row] for row in rows]
