"""Profiles of ONNX Runtime: of the runs that count, told once, and nothing left behind."""

from __future__ import annotations

import gc
import json
import logging
import tempfile
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import recipe
from tiny_engine import LIMITS, TinyEngine, write_engine

from engines.options import Options
from engines.sessions.ort_profile import layer_times, runs_of
from engines.sessions.ort_session import OrtSession
from engines.sessions.session import LayerTime
from engines.sessions.stages import Chain
from flowcut.contract import language_contract, vision_contract
from flowcut.errors import EngineError


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyEngine:
    return write_engine(tmp_path_factory.mktemp("profile") / "engine")


@pytest.fixture
def scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Where temporary files go."""
    folder = tmp_path / "scratch"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    gc.collect()
    assert list(folder.iterdir()) == []


def profiled(tiny: TinyEngine) -> OrtSession:
    contract = vision_contract(tiny.model.config, tiny.schedule.tokens, "fp32", LIMITS)
    return OrtSession(tiny.directory / "vision.onnx", contract, Options(threads=1, profile=True))


def pixels(tiny: TinyEngine) -> dict[str, np.ndarray]:
    return {"pixel_values": recipe.pixels(tiny.model.config.vision.image_size, 1)}


def kinds(times: list[LayerTime]) -> Counter[str]:
    return Counter({op: sum(t.calls for t in times if t.op == op) for op in {t.op for t in times}})


def test_every_node_of_every_run_is_counted(tiny: TinyEngine, scratch: Path) -> None:
    session = profiled(tiny)
    for _ in range(3):
        session.run(pixels(tiny))
    times = session.layer_times()
    assert {time.graph for time in times} == {"vision"}
    assert {time.calls for time in times} == {3}
    assert [time.total_ms for time in times] == sorted((time.total_ms for time in times), reverse=True)
    assert kinds(times) == Counter({op: 3 * count for op, count in nodes_that_run(tiny, scratch).items()})


def nodes_that_run(tiny: TinyEngine, scratch: Path) -> Counter[str]:
    """By kind, as the library says which nodes it has left once it has optimized the graph."""
    import onnx

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    options.optimized_model_filepath = str(scratch / "optimized.onnx")
    ort.InferenceSession(tiny.directory / "vision.onnx", options, providers=["CPUExecutionProvider"])
    model = onnx.load(scratch / "optimized.onnx", load_external_data=False)
    (scratch / "optimized.onnx").unlink()
    return Counter(node.op_type for node in model.graph.node)


def test_a_warm_up_is_left_out(tiny: TinyEngine, scratch: Path) -> None:
    session = profiled(tiny)
    for _ in range(2):
        session.run(pixels(tiny))
    session.forget_times()
    session.run(pixels(tiny))
    assert {time.calls for time in session.layer_times()} == {1}


def test_it_is_told_once_and_the_session_goes_on(tiny: TinyEngine, scratch: Path) -> None:
    session = profiled(tiny)
    first = session.run(pixels(tiny)).arrays["kept"]
    assert session.layer_times()
    assert list(scratch.iterdir()) == []
    np.testing.assert_array_equal(session.run(pixels(tiny)).arrays["kept"], first)
    assert session.layer_times() == []


def test_an_engine_that_is_not_asked_leaves_nothing(tiny: TinyEngine, scratch: Path) -> None:
    session = profiled(tiny)
    session.run(pixels(tiny))
    assert list(scratch.iterdir()) != []
    del session


def test_without_the_option_nothing_is_measured(tiny: TinyEngine, scratch: Path) -> None:
    contract = vision_contract(tiny.model.config, tiny.schedule.tokens, "fp32", LIMITS)
    session = OrtSession(tiny.directory / "vision.onnx", contract, Options(threads=1))
    session.run(pixels(tiny))
    session.forget_times()
    assert session.layer_times() == []
    assert list(scratch.iterdir()) == []


def test_runs_of_several_threads_are_told_apart(tiny: TinyEngine, scratch: Path) -> None:
    session, start = profiled(tiny), threading.Barrier(3)

    def work() -> None:
        start.wait()
        for _ in range(4):
            session.run(pixels(tiny))

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {time.calls for time in session.layer_times()} == {12}


def test_stages_of_a_decoder_are_profiled_as_one(tmp_path: Path) -> None:
    class Stage:
        def __init__(self, *ms: float) -> None:
            self.times = [LayerTime("language", str(each), "MatMul", 1, each) for each in ms]

        def forget_times(self) -> None:
            self.times = self.times[:1]

        def layer_times(self) -> list[LayerTime]:
            return self.times

    chain = Chain(None, [Stage(1.0, 3.0), Stage(2.0)])  # type: ignore[arg-type, list-item]
    assert [time.total_ms for time in chain.layer_times()] == [3.0, 2.0, 1.0]
    chain.forget_times()
    assert [time.total_ms for time in chain.layer_times()] == [2.0, 1.0]


def node(name: str, op: str, dur: int, tid: int = 1, index: str = "0") -> dict[str, Any]:
    args = {"op_name": op, "node_index": index}
    return {"cat": "Node", "name": f"{name}_kernel_time", "tid": tid, "dur": dur, "args": args}


def end(tid: int = 1) -> dict[str, Any]:
    return {"cat": "Session", "name": "model_run", "tid": tid, "dur": 9}


def test_a_run_is_what_its_thread_did_until_it_ended() -> None:
    fence = {"cat": "Node", "name": "a_fence_before", "tid": 1, "dur": 1, "args": {"op_name": "Add"}}
    events = [
        {"cat": "Session", "name": "session_initialization", "tid": 1, "dur": 5},
        *(node("a", "Add", 1), node("a", "Add", 2, tid=2), fence, node("b", "Mul", 3), end()),
        *(node("b", "Mul", 4, tid=2), node("a", "Add", 5), end(tid=2), node("b", "Mul", 6)),
    ]
    assert [[event["dur"] for event in run] for run in runs_of(events)] == [[1, 3], [2, 4]]


def test_nodes_without_a_name_are_told_apart() -> None:
    runs = [[node("Add", "Add", 2000, index="1"), node("Add", "Add", 500, index="2")]] * 2
    times = layer_times("vision", runs)
    assert [(time.name, time.calls, time.total_ms) for time in times] == [("Add", 2, 4.0), ("Add", 2, 1.0)]


def test_runs_that_were_not_measured_are_mentioned(
    tiny: TinyEngine, scratch: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when the library's million of events is full."""
    session = profiled(tiny)
    for _ in range(3):
        session.run(pixels(tiny))
    write = session._session.end_profiling

    def cut() -> str:
        path = Path(write())
        events = json.loads(path.read_text(encoding="utf-8"))
        ends = [i for i, event in enumerate(events) if event["name"] == "model_run"]
        path.write_text(json.dumps(events[: ends[1] + 5]), encoding="utf-8")
        return str(path)

    monkeypatch.setattr(session._session, "end_profiling", cut)
    with caplog.at_level(logging.WARNING):
        assert {time.calls for time in session.layer_times()} == {2}
    assert "ONNX Runtime measured 2 of 3 runs" in caplog.text


def test_a_run_that_fails_is_a_run(tiny: TinyEngine, scratch: Path) -> None:
    config, kept = tiny.model.config, tiny.schedule.tokens
    contract = language_contract(config, kept, "fp32", LIMITS)
    session = OrtSession(tiny.directory / "language.onnx", contract, Options(threads=1, profile=True))
    feeds = {
        "input_ids": np.full((1, 1), 5),
        "position_ids": np.zeros((1, 1), np.int64),
        "image_rows": np.full((1, 1), -1),
        "last_token": np.zeros(1, np.int64),
        "image_embeds": np.zeros((1, kept, config.text.hidden_size), np.float32),
    }
    with pytest.raises(EngineError, match="language failed in ONNX Runtime"):
        session.run(feeds | {"input_ids": np.full((1, 1), 10_000)}, session.allocate_state(1))
    session.forget_times()
    session.run(feeds, session.allocate_state(1))
    assert {time.calls for time in session.layer_times()} == {1}


def test_a_profile_that_cannot_be_read_is_an_engine_error(
    tiny: TinyEngine, scratch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = profiled(tiny)
    write = session._session.end_profiling

    def full() -> str:
        path = Path(write())
        path.write_text('[{"cat": "No', encoding="utf-8")
        return str(path)

    monkeypatch.setattr(session._session, "end_profiling", full)
    with pytest.raises(EngineError, match=r"must hold ONNX Runtime's profile, got: .*TMPDIR") as caught:
        session.layer_times()
    assert "\n" not in str(caught.value)
