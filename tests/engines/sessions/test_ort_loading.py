"""ONNX Runtime's sessions of graphs: shared where the file and the settings are the same, and set up as asked."""

from __future__ import annotations

import gc
import json
import os
import shutil
import subprocess
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import onnxruntime as ort
import pytest
from tiny_engine import LIMITS, TinyEngine, write_engine

from engines.options import Options
from engines.runtime.engine import Sampling, load_engine
from engines.sessions.ort_loading import open_shared, session_options
from engines.sessions.ort_session import OrtSession
from flowcut.contract import GraphContract, language_contract
from flowcut.errors import ConfigError, EngineError

TWICE = """
import gc, json, sys
import onnxruntime, tokenizers  # their own memory is not the engine's
from engines.runtime.memory import process_bytes
from engines.runtime.engine import load_engine

loaded, resident = [], [process_bytes()[0]]
for options in json.loads(sys.argv[2]):
    loaded.append(load_engine(sys.argv[1], "ort", **options))
    gc.collect()
    resident.append(process_bytes()[0])
print(json.dumps([b - a for a, b in zip(resident, resident[1:])]))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyEngine:
    return write_engine(tmp_path_factory.mktemp("loading") / "engine")


def contract_of(tiny: TinyEngine) -> GraphContract:
    return language_contract(tiny.model.config, tiny.schedule.tokens, "fp32", LIMITS)


def graph(tiny: TinyEngine) -> Path:
    return tiny.directory / "language.onnx"


def growth(tiny: TinyEngine, *options: dict[str, object]) -> list[int]:
    """Bytes that each of several loads of a directory adds to what a fresh process has in memory."""
    command = [
        sys.executable,
        "-c",
        TWICE,
        str(tiny.directory),
        json.dumps([{"threads": 1, **each} for each in options]),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: list[int] = json.loads(done.stdout)
    return found


def test_a_second_engine_of_a_directory_holds_no_weights_of_its_own(tiny: TinyEngine) -> None:
    first, second, third = growth(tiny, {}, {}, {"spin": False})
    assert second < first / 10
    assert third > first / 3  # another setting is another session, so the bound above means something


def test_the_same_file_and_settings_are_one_session(tiny: TinyEngine) -> None:
    first, second = (open_shared(graph(tiny), Options(threads=1), cuda=False) for _ in range(2))
    assert first is second
    by_another_name = open_shared(tiny.directory / ".." / "engine" / "language.onnx", Options(threads=1), cuda=False)
    assert by_another_name is first
    # What has nothing to do with the library's own session does not divide it.
    assert open_shared(graph(tiny), Options(threads=1, concurrency=7, picture_cache_mb=0), cuda=False) is first


@pytest.mark.parametrize(
    "options", [{"threads": 2}, {"threads": 1, "exact": True}, {"threads": 1, "spin": False}], ids=str
)
def test_other_settings_are_another_session(tiny: TinyEngine, options: dict[str, object]) -> None:
    first = open_shared(graph(tiny), Options(threads=1), cuda=False)
    assert open_shared(graph(tiny), Options.make(options), cuda=False) is not first


def test_a_profile_is_of_one_engine_alone(tiny: TinyEngine) -> None:
    options = Options(threads=1, profile=True)
    sessions = [OrtSession(graph(tiny), contract_of(tiny), options)._session for _ in range(2)]
    assert sessions[0] is not sessions[1]


@pytest.mark.parametrize("change", ["replaced", "weights", "touched"])
def test_files_that_changed_are_read_again(tiny: TinyEngine, tmp_path: Path, change: str) -> None:
    copy = tmp_path / "engine"
    shutil.copytree(tiny.directory, copy)
    first = open_shared(copy / "language.onnx", Options(threads=1), cuda=False)
    if change == "replaced":
        shutil.copy2(copy / "language.onnx", tmp_path / "new")
        (tmp_path / "new").replace(copy / "language.onnx")
    elif change == "weights":
        (copy / "language.onnx.data").write_bytes((copy / "language.onnx.data").read_bytes()[::-1])
    else:
        os.utime(copy / "language.onnx", ns=(1, 1))
    assert open_shared(copy / "language.onnx", Options(threads=1), cuda=False) is not first


def test_a_session_goes_with_the_last_engine_that_uses_it(tiny: TinyEngine) -> None:
    options = Options(threads=3)  # of no other test
    first, second = (OrtSession(graph(tiny), contract_of(tiny), options) for _ in range(2))
    shared = weakref.ref(first._session)
    del first
    gc.collect()
    assert shared() is second._session
    del second
    gc.collect()
    assert shared() is None


def test_an_engine_that_is_closed_leaves_the_other_its_session(tiny: TinyEngine) -> None:
    closed, other = (load_engine(tiny.directory, "ort", threads=1) for _ in range(2))
    before = other.generate([], "What is it?", Sampling(3))
    closed.close()
    del closed
    gc.collect()
    assert other.generate([], "What is it?", Sampling(3)).token_ids == before.token_ids


def test_threads_that_load_at_once_load_once(tiny: TinyEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    made, make = [], ort.InferenceSession

    def counted(*args: object, **kwargs: object) -> ort.InferenceSession:
        made.append(args)
        return make(*args, **kwargs)

    monkeypatch.setattr(ort, "InferenceSession", counted)
    options = Options(threads=5)  # of no other test
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: open_shared(graph(tiny), options, cuda=False), range(16)))
    assert len(made) == 1
    assert {id(session) for session in found} == {id(found[0])}


def test_a_file_that_is_not_there_is_an_engine_error(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"none\.onnx could not be loaded by ONNX Runtime: "):
        open_shared(tmp_path / "none.onnx", Options(), cuda=False)


def entry(options: ort.SessionOptions, name: str) -> str | None:
    try:
        return str(options.get_session_config_entry(name))
    except RuntimeError:  # as it says that there is none
        return None


def test_settings_reach_the_library() -> None:
    usual, chosen = session_options(Options()), session_options(Options(threads=3, spin=False, exact=True))
    assert (usual.intra_op_num_threads, chosen.intra_op_num_threads) == (0, 3)
    for name, values in {
        "session.force_spinning_stop": ("1", None),
        "session.intra_op.allow_spinning": (None, "0"),
        "session.qdq_matmulnbits_accuracy_level": (None, "1"),
    }.items():
        assert tuple(entry(options, name) for options in (usual, chosen)) == values
    assert chosen.execution_mode == ort.ExecutionMode.ORT_SEQUENTIAL


@pytest.mark.parametrize("value", [1, "no", None])
def test_spin_is_true_or_false(value: object) -> None:
    with pytest.raises(ConfigError, match="spin must be True or False, got"):
        Options.make({"spin": value})
