"""docs/results/full_size: what the watcher sees of processes and files, what the page says, what is left behind."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flowcut.deps import available

RESULTS = Path(__file__).parent.parent / "docs" / "results"
SCRIPT = "full_size"
RTX = pytest.mark.skipif(not available("tensorrt_rtx"), reason="needs the rtx extra (tensorrt-rtx-cu13)")
MB = 10**6
SLACK = 4 * MB


@pytest.fixture(scope="module")
def watch() -> ModuleType:
    return importlib.import_module("full_size_watch")


@pytest.fixture(scope="module")
def written() -> ModuleType:
    return importlib.import_module("full_size_page")


# --- the watcher ---


def held(own: int, then: str = "") -> str:
    """Python that holds `own` bytes, does something, and holds them on until the watcher has looked: `peaks`."""
    return f"{BEGIN}held = bytearray(b'x') * {own}\n{then}\n{SEEN}"


def child(code: str, how: str = "run") -> str:
    """Python that runs Python, to its end or ("Popen") beside it."""
    return f"subprocess.{how}([sys.executable, '-c', {code!r}])"


# A process says that it stands where it should be looked at, by a file, and goes on when another file says so: how
# long things take has no part in it.
BEGIN = "import os, pathlib, subprocess, sys, time\n"
SEEN = """
state = pathlib.Path(os.environ["STATE"], f"{os.getpid()}-{time.monotonic_ns()}")
state.touch()
while not state.with_suffix(".seen").exists():
    time.sleep(0.01)
"""


def peaks(watch: ModuleType, code: str, folder: Path, session: bool = True) -> Any:
    with (
        tempfile.TemporaryDirectory() as state,
        subprocess.Popen(
            [sys.executable, "-c", code], start_new_session=session, env=os.environ | {"STATE": state}
        ) as process,
        watch.Watch(process.pid, folder) as found,
    ):
        while process.poll() is None or (session and any(alive(pid) for pid in watch.tree(process.pid))):
            let_go_of_what_was_seen(found, Path(state))
            time.sleep(0.01)
    return found


def let_go_of_what_was_seen(found: Any, state: Path) -> None:
    """A whole sample began and ended after the process said that it waits: it may go on."""
    waiting = {path for path in state.iterdir() if not path.suffix and not path.with_suffix(".seen").exists()}
    samples = found.samples
    while waiting and found.samples < samples + 2:
        time.sleep(0.01)
    for path in waiting:
        path.with_suffix(".seen").touch()


def alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("session", [True, False])
def test_memory_of_a_childs_child_counts(watch: ModuleType, tmp_path: Path, session: bool) -> None:
    def family(a: int, b: int, c: int) -> Any:
        return peaks(watch, held(a, child(held(b, child(held(c))))), tmp_path, session)

    small, large = family(1, 1, 1), family(40 * MB, 30 * MB, 70 * MB)
    assert large.anonymous_bytes - small.anonymous_bytes == pytest.approx(140 * MB, abs=SLACK)
    assert large.largest_process_bytes - small.largest_process_bytes == pytest.approx(70 * MB, abs=SLACK)
    assert large.with_shared_memory_bytes == large.anonymous_bytes


def test_memory_of_a_child_whose_parent_ended_counts(watch: ModuleType, tmp_path: Path) -> None:
    alone = peaks(watch, held(1), tmp_path)
    orphan = peaks(watch, BEGIN + child(held(60 * MB), "Popen"), tmp_path)
    assert orphan.anonymous_bytes - alone.anonymous_bytes == pytest.approx(60 * MB, abs=2 * SLACK)


def test_pages_of_a_mapped_file_are_not_anonymous(watch: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"x" * 80 * MB)
    path = str(tmp_path / "weights")
    read = f"import numpy; m = numpy.memmap({path!r}, mode='r'); m.sum()"
    without, mapped = peaks(watch, held(1, "import numpy"), tmp_path), peaks(watch, held(1, read), tmp_path)
    assert mapped.anonymous_bytes - without.anonymous_bytes < SLACK
    assert mapped.resident_bytes - without.resident_bytes == pytest.approx(80 * MB, abs=SLACK)


def test_shared_memory_is_counted_apart(watch: ModuleType, tmp_path: Path) -> None:
    write = f"import mmap; m = mmap.mmap(-1, {50 * MB}); [m.write(bytes(1000)) for _ in range({50 * MB // 1000})]"
    without, found = peaks(watch, held(1), tmp_path), peaks(watch, held(1, write), tmp_path)
    assert found.anonymous_bytes - without.anonymous_bytes < SLACK
    assert found.with_shared_memory_bytes - without.with_shared_memory_bytes == pytest.approx(50 * MB, abs=SLACK)


def test_memory_that_is_given_back_is_seen(watch: ModuleType, tmp_path: Path) -> None:
    code = held(150 * MB) + "\ndel held\n" + SEEN
    found, without = peaks(watch, code, tmp_path), peaks(watch, held(1), tmp_path)
    assert found.anonymous_bytes - without.anonymous_bytes == pytest.approx(150 * MB, abs=SLACK)
    assert found.anonymous_at_s > 0
    assert found.samples >= 6
    assert found.longest_gap_s >= 0.09


def test_files_that_come_and_go_are_seen_and_holes_are_not(watch: ModuleType, tmp_path: Path) -> None:
    hidden = tmp_path / ".engine.partial"
    code = f"""{BEGIN}
folder = pathlib.Path({str(hidden)!r})
folder.mkdir()
(folder / "language.onnx.data").write_bytes(os.urandom({3 * MB}))
with open(folder / "hole", "wb") as file:
    file.truncate({90 * MB})
{SEEN}
(folder / "language.onnx.data").unlink()
"""
    assert peaks(watch, code, tmp_path).disk_bytes == pytest.approx(3 * MB, abs=MB // 10)
    assert watch.disk_bytes(tmp_path) < MB // 10


def test_a_watcher_that_fails_says_so(watch: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(folder: Path) -> int:
        raise PermissionError(str(folder))

    monkeypatch.setattr(watch, "disk_bytes", broken)
    with pytest.raises(PermissionError):
        peaks(watch, "pass", tmp_path)


# --- the page ---


def a_row(layers: int, anonymous: float, wall: float = 60.0, disk: float = 1e9, error: str = "", **more: Any) -> Any:
    versions = {"python": "3.11.0"}
    machine = {"created": "2026-01-01", "processor": "P|Q", "cores": 2, "memory_bytes": 24e9, "load": 0.5}
    found = {
        "model": "m",
        "decoder_layers": layers,
        "command": f"flowcut engine m --decoder-layers {layers}",
        "machine": machine | {"omp_num_threads": "", "versions": versions},
        "wall_s": wall,
        "error": error,
        "directory_bytes": disk,
        "graphs": {},
        "result": {} if error else {"build_seconds": {"export": 12.0}},
        "peaks": {
            "anonymous_bytes": anonymous,
            "anonymous_at_s": 30.0,
            "largest_process_bytes": anonymous,
            "with_shared_memory_bytes": anonymous,
            "resident_bytes": anonymous,
            "disk_bytes": disk * 2,
            "longest_gap_s": 0.25,
        },
    }
    return found | more


def verdicts(written: ModuleType, data: Any) -> dict[tuple[str, str], tuple[str, bool | None]]:
    return {(check.setting, check.what): (check.measured, check.ok) for check in written.checks(data)}


def test_nothing_measured_is_not_yet_run(written: ModuleType) -> None:
    assert {value for value in verdicts(written, {}).values()} == {("not yet run", None)}
    assert written.page({}).count("not yet run") >= 10
    assert "| yes |" not in written.page({})


@pytest.mark.parametrize("int4", ["int4", "int4-checkpoint"])
def test_every_limit_is_held_below_it_and_broken_above(written: ModuleType, int4: str) -> None:
    memory = "peak anonymous memory"
    good = verdicts(written, {int4: a_row(32, 11.9e9, 719.0, 4.4e9), "fp16": a_row(32, 19.9e9)})
    bad = verdicts(written, {int4: a_row(32, 12.1e9, 721.0, 9.1e9), "fp16": a_row(32, 20.1e9)})
    expected = {
        (int4, "wall time"): ("12.0 min", "12.0 min"),
        (int4, memory): ("11.90 GB (11.08 GiB)", "12.10 GB (11.27 GiB)"),
        (int4, "new disk, the directory"): ("4.40 GB (4.10 GiB)", "9.10 GB (8.48 GiB)"),
        (int4, "new disk, most at any time"): ("8.80 GB (8.20 GiB)", "18.20 GB (16.95 GiB)"),
        ("fp16", memory): ("19.90 GB (18.53 GiB)", "20.10 GB (18.72 GiB)"),
    }
    assert {key: (good[key], bad[key]) for key in expected} == {
        key: ((measured, True), (other, False)) for key, (measured, other) in expected.items()
    }
    assert good["fp16-2-stages", memory] == ("not yet run", None)


def test_growth_is_the_difference_over_the_layers_between(written: ModuleType) -> None:
    what = "peak anonymous memory per added layer"
    data = {"int4-4-layers": a_row(4, 3.0e9), "int4-8-layers": a_row(8, 4.4e9), "int4": a_row(32, 9.2e9)}
    found = verdicts(written, data)
    assert found["int4-4-layers to int4-8-layers", what] == ("0.35 GB (0.33 GiB) (4 layers)", False)
    assert found["int4-8-layers to int4", what] == ("0.20 GB (0.19 GiB) (24 layers)", True)


def test_a_row_that_failed_breaks_its_limits_and_says_why(written: ModuleType) -> None:
    data = {"int4-4-layers": a_row(4, 3e9), "int4-8-layers": a_row(8, 1e9, error="SIGKILL: it said nothing")}
    found = verdicts(written, data)
    why = ("failed: SIGKILL: it said nothing", False)
    assert found["int4-4-layers to int4-8-layers", "peak anonymous memory per added layer"] == why
    assert verdicts(written, {"fp16": a_row(32, 1e9, error="x")})["fp16", "peak anonymous memory"] == (
        "failed: x",
        False,
    )
    assert "| int4-8-layers | 8 | 60 | SIGKILL: it said nothing |" in written.page(data)


def test_an_engine_may_be_a_twentieth_larger_than_its_weights_and_have_code(written: ModuleType) -> None:
    def with_engine(engine_bytes: float) -> Any:
        sizes = {"weight_bytes": 1e9, "onnx_bytes": 1.001e9, "engine_bytes": engine_bytes}
        return {"fp16": a_row(32, 1e9, graphs={"vision": sizes | {"engine_bytes": 1e9}, "language": sizes})}

    what = ("all", "engine, of 1.05 x its graph's weights + 60 MB")
    assert verdicts(written, with_engine(1.109e9))[what] == ("at most 99.9% (fp16, language)", True)
    assert verdicts(written, with_engine(1.111e9))[what] == ("at most 100.1% (fp16, language)", False)
    text = written.page(with_engine(1.111e9))
    assert "| fp16 | language | 1000.0 MB | 1001.0 MB | 1111.0 MB | 1.111 | 1110.0 MB | **no** |" in text
    assert "| fp16 | vision | 1000.0 MB | 1001.0 MB | 1000.0 MB | 1.000 | 1110.0 MB | yes |" in text


def test_the_page_has_the_conditions_beside_the_figures(written: ModuleType) -> None:
    text = written.page({"int4": a_row(32, 9e9)})
    for words in ("seeded-random", "flowcut engine m --decoder-layers 32", "Versions: python 3.11.0.", "0.25 s"):
        assert words in text
    assert "| int4 | 2026-01-01 | P/Q | 2 | 24.00 GB (22.35 GiB) | 0.50 | - |" in text


def test_the_page_says_what_the_checkpoint_was(written: ModuleType) -> None:
    facts = {"dtype": "float16", "shards": 34, "tensor_bytes": 14.1e9}
    text = written.page({"int4-checkpoint": a_row(32, 9e9, checkpoint=facts)})
    assert "Hugging Face format (34 safetensors shards of float16, 14.10 GB (13.13 GiB)), memory-mapped" in text
    assert "Hugging Face format, memory-mapped" in written.page({})


@pytest.mark.parametrize(("name", "model"), [("", "llava-1.5-7b"), ("_llava_next", "llava-v1.6-vicuna-7b")])
def test_the_page_is_made_of_the_json(written: ModuleType, script: ModuleType, name: str, model: str) -> None:
    data = json.loads((RESULTS / f"full_size{name}.json").read_text(encoding="utf-8"))
    assert set(data) <= set(script.NAMES)
    assert {row["model"] for row in data.values()} == {model}
    assert (RESULTS / f"full_size{name}.md").read_text(encoding="utf-8") == written.page(data)


# --- the script ---


def test_commands_are_those_of_the_issue(script: ModuleType) -> None:
    base = ["engine", "m", "--weights", "random", "--precision"]
    wanted = {
        "int4-4-layers": [*base, "int4", "--backend", "rtx", "--decoder-layers", "4"],
        "int4-8-layers": [*base, "int4", "--backend", "rtx", "--decoder-layers", "8"],
        "int4": [*base, "int4", "--backend", "rtx"],
        "int4-checkpoint": ["engine", "m", "--precision", "int4", "--backend", "rtx"],
        "fp16": [*base, "fp16", "--backend", "rtx"],
        "fp16-2-stages": [*base, "fp16", "--backend", "rtx", "--stages", "2"],
    }
    assert {name: setting.arguments("m") for name, setting in script.SETTINGS.items()} == wanted
    assert {*script.NAMES} == {*wanted, script.RUN}
    assert script.NAMES.index(script.RUN) == script.NAMES.index("int4") + 1, "its directory is there only then"


def test_a_command_that_fails_is_a_row_with_its_last_word(script: ModuleType, tmp_path: Path) -> None:
    row = script.measured(["inspect", "nowhere"], tmp_path)
    assert row["error"].startswith("exit code 1: flowcut: nowhere must be an engine directory")
    assert row["result"] == {}
    assert row["peaks"]["anonymous_bytes"] > MB
    assert list(tmp_path.iterdir()) == []


def test_rerunning_replaces_its_own_row(script: ModuleType, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    for name, memory in (("fp16", 1e9), ("int4", 2e9), ("fp16", 3e9)):
        script.store(path, name, a_row(32, memory))
    data = json.loads(path.read_text(encoding="utf-8"))
    assert {name: row["peaks"]["anonymous_bytes"] for name, row in data.items()} == {"int4": 2e9, "fp16": 3e9}
    assert list(data) == ["int4", "fp16"]
    assert "3.00 GB" in (tmp_path / "r.md").read_text(encoding="utf-8")


def arguments(folder: Path, *more: str) -> list[str]:
    return ["--model", "llava-tiny", "--results", str(folder / "r.json"), "--out", str(folder / "out"), *more]


def test_another_model_does_not_touch_the_committed_results(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        script.main(["--model", "llava-tiny"])
    assert "--results must be given" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("present", "only", "words"),
    [("fp16", "fp16", "must not exist"), ("", "int4-run", "to ask, got none"), ("", "int4", "free space")],
)
def test_what_cannot_be_measured_is_refused_before_the_start(
    script: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    present: str,
    only: str,
    words: str,
) -> None:
    if present:
        (tmp_path / "out" / present / "mine").mkdir(parents=True)
    if words == "free space":
        monkeypatch.setattr(script, "ROOM_BYTES", 1 << 60)
    with pytest.raises(SystemExit):
        script.main(arguments(tmp_path, "--only", only))
    assert words in capsys.readouterr().err
    assert not (tmp_path / "r.json").exists()
    assert (tmp_path / "out").exists() == bool(present)
    assert not present or (tmp_path / "out" / present / "mine").is_dir()


@RTX
@pytest.mark.long
def test_llava_tiny_is_built_and_asked(script: ModuleType, tmp_path: Path) -> None:
    script.main(arguments(tmp_path, "--only", "int4-run", "int4"))
    data = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    built, asked = data["int4"], data["int4-run"]
    assert built["error"] == asked["error"] == ""
    assert set(built["graphs"]) == {"vision", "language"}
    for graph, sizes in built["graphs"].items():
        assert sizes["engine_bytes"] == built["files"][f"{graph}.engine"] > sizes["weight_bytes"] > MB
        parts = [built["files"][f"{graph}.onnx"], built["files"][f"{graph}.onnx.data"]]
        assert sizes["onnx_bytes"] == sum(parts) > sizes["weight_bytes"]
    assert sum(built["files"].values()) <= built["directory_bytes"] <= built["peaks"]["disk_bytes"]
    compiling = sum(s for stage, s in built["result"]["build_seconds"].items())
    assert 0 < compiling < built["wall_s"]
    assert built["peaks"]["anonymous_bytes"] > built["peaks"]["largest_process_bytes"] > 100 * MB, "a child compiles"
    assert 1 <= len(asked["result"]["token_ids"]) <= script.ANSWER_TOKENS
    assert asked["result"]["backend"] == "ort"
    assert "| int4-run | ONNX Runtime answers a question | >= 1 token |" in (tmp_path / "r.md").read_text(
        encoding="utf-8"
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.md"]


@RTX
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_only_finished_rows(
    script: ModuleType, watch: ModuleType, tmp_path: Path, number: signal.Signals
) -> None:
    script.store(tmp_path / "r.json", "int4", a_row(32, 1e9))
    before = (tmp_path / "r.json").read_bytes()
    command = [sys.executable, str(RESULTS / "full_size.py"), *arguments(tmp_path, "--only", "fp16", "--keep")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        while not list((tmp_path / "out").rglob("*.engine")):  # the compiler, a child's child, has begun
            assert process.poll() is None
            time.sleep(0.05)
        family = watch.tree(process.pid)
        process.send_signal(number)
        _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert said == "interrupted; the rows that were finished are stored.\n"
    assert len(family) >= 3
    assert not [pid for pid in family if alive(pid)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.json", "r.md"]
    assert (tmp_path / "r.json").read_bytes() == before
