"""`flowcut bench` from engine directories to files, on ONNX Runtime and on a stand-in for a GPU."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_gpu
import numpy as np
import pytest
from PIL import Image
from rich.progress import Progress
from tiny_engine import write_engine

from engines.bench import run as bench_run
from engines.bench.files import write_results
from engines.bench.records import Benchmark
from engines.bench.run import bench, command
from engines.bench.settings import BenchSettings
from engines.flops import count
from engines.pipeline import BuildSettings, build_directory
from engines.runtime.engine import load_engine
from flowcut.arguments_run import SCENE
from flowcut.cli import main
from flowcut.contract import Limits
from flowcut.errors import FlowCutError

LIMITS = Limits(max_batch=2, max_images=2, max_prompt=260, max_new_tokens=6)
WHOLE = replace(LIMITS, max_prompt=LIMITS.max_prompt + 144 - 16)
"""As much room for text."""
QUICK: dict[str, Any] = {"repeats": 4, "warmup": 1, "new_tokens": 3, "threads": 1, "compare": 1}
PAGE = Path(__file__).parents[3] / "docs" / "bench.md"


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Pruned and unpruned."""
    folder = tmp_path_factory.mktemp("bench")
    for tokens, limits in ((16, vars(LIMITS)), ("all", vars(WHOLE))):
        build = BuildSettings("llava-tiny", tokens=tokens, precision="fp32", backend="ort", out=folder / str(tokens))
        build_directory(replace(build, **limits), Progress(disable=True))
    return folder / "16", folder / "all"


@pytest.fixture(scope="module")
def settings(directories: tuple[Path, Path]) -> BenchSettings:
    return BenchSettings(*directories, batches=(1, 2), prompt_tokens=40, **QUICK)


@pytest.fixture(scope="module")
def found(settings: BenchSettings) -> Benchmark:
    return bench(settings, Progress(disable=True))


def test_both_are_measured_stage_by_stage_at_every_batch(found: Benchmark) -> None:
    for subject, visual in ((found.pruned, 16), (found.baseline, 144)):
        assert subject is not None
        assert [batch.batch for batch in subject.batches] == [1, 2]
        for batch in subject.batches:
            assert (batch.visual_tokens, batch.text_tokens, batch.prompt_tokens) == (visual, 40, visual + 40)
            stages = batch.stages
            assert set(stages) == {"preprocess", "vision", "prefill", "total", "decode_per_token"}
            assert all(summary.n == 4 and summary.median > 0 for summary in stages.values())
            sums = np.sum([batch.runs[stage] for stage in ("preprocess", "vision", "prefill")], axis=0)
            assert sums == pytest.approx(batch.runs["total"])


def test_the_library_alone_takes_less_than_the_stage_around_it(found: Benchmark) -> None:
    batch = found.pruned.batches[0]
    for stage in ("vision", "prefill"):
        assert all(inside < whole for inside, whole in zip(batch.device_ms[stage], batch.runs[stage], strict=True))


def test_the_speed_up_is_the_median_of_the_pairs(found: Benchmark) -> None:
    assert found.baseline is not None
    assert found.speedup is not None
    for stage in ("vision", "prefill", "total"):
        ours, theirs = (subject.batches[0].runs[stage] for subject in (found.pruned, found.baseline))
        assert found.speedup[stage] == pytest.approx(np.median(np.divide(theirs, ours)), abs=1e-4)


def test_operations_are_those_of_the_files(found: Benchmark, directories: tuple[Path, Path]) -> None:
    """The limit of vision, which has no cache to argue about, counted a second time."""
    pruned, whole = (count(directory / "vision.onnx", {"images": 2}).total for directory in directories)
    at_two = next(each for each in found.comparisons if each.batch == 2)
    assert at_two.ratios["vision"].flop_ratio == pytest.approx(whole / pruned)
    assert found.pruned.batches[1].counted["vision"].flops == pruned


def test_no_stage_beats_the_roof(found: Benchmark) -> None:
    for subject in found.subjects:
        for batch in subject.batches:
            for stage in ("vision", "prefill", "decode_per_token"):
                share = batch.share_of_roofline(stage)
                assert share is not None
                assert 0 < share < 1.5  # of a roof that is measured while other tests run


def test_agreement_stands_beside_the_speed_up(found: Benchmark) -> None:
    assert 0.3 < found.agreement["kept"]["jaccard"] <= 1
    assert found.agreement["kept"]["pictures"] == 2  # the user's and a drawn one
    assert -1 <= found.agreement["baseline"]["logits_cosine"] <= 1
    assert found.agreement["baseline"]["prompts"] == 2
    assert found.accuracy is None


def test_what_was_kept_is_what_the_engine_keeps(found: Benchmark, directories: tuple[Path, Path]) -> None:
    with load_engine(directories[0], threads=1) as engine:
        expected = engine.prefill(SCENE, found.settings["prompt"]).kept[0][0]
    assert found.pruned.kept == expected.tolist()


def test_peak_memory_is_that_of_a_process_of_its_own(found: Benchmark) -> None:
    for subject in found.subjects:
        assert 40e6 < subject.about["peak_memory_bytes"] < 2e9
        assert subject.about["device_memory_bytes"] is None


def test_machine_and_settings_are_recorded(found: Benchmark) -> None:
    machine, told = found.machine, found.settings
    assert machine["threads"] == 1
    assert {"python", "numpy", "onnxruntime"} <= set(machine["versions"])
    assert machine["roof"]["source"].startswith("measured here")
    assert machine["load_before"] >= 0
    assert (told["repeats"], told["warmup"], told["text_tokens"], told["batches"]) == (4, 1, 40, [1, 2])


def test_everything_is_json_and_documented(found: Benchmark) -> None:
    page, told = PAGE.read_text(encoding="utf-8"), json.loads(found.to_json())

    def keys(value: Any) -> set[str]:
        if isinstance(value, dict):
            return set(value) | {key for each in value.values() for key in keys(each)}
        return {key for each in value for key in keys(each)} if isinstance(value, list) else set()

    data = {name: value for name, value in told.items() if name != "settings"}
    data["machine"] = {**told["machine"], "versions": {}}
    undocumented = {key for key in keys(data) if f"`{key}`" not in page}
    assert undocumented == set()


def test_files_are_written_whole_and_replaced(found: Benchmark, settings: BenchSettings, tmp_path: Path) -> None:
    here = BenchSettings(**{**vars(settings), "out": tmp_path / "results"})
    written = write_results(here, found)
    assert write_results(here, found) == written
    names = {"bench.json", "bench.md", "bench.svg", "bench.png", "kept.png"}
    assert {path.name for path in (tmp_path / "results").iterdir()} == names
    (tmp_path / "results" / "report.html").write_text("the user's")
    write_results(here, found)
    assert (tmp_path / "results" / "report.html").read_text() == "the user's"
    (tmp_path / "results" / "report.html").unlink()
    assert json.loads((tmp_path / "results" / "bench.json").read_text())["schema"] == 1
    with Image.open(tmp_path / "results" / "bench.png") as image:
        assert image.width > 800
    assert (tmp_path / "results" / "bench.svg").read_text().lstrip().startswith("<?xml")
    assert not [path for path in tmp_path.iterdir() if path.name != "results"]


def test_the_page_has_every_number_of_the_tables(found: Benchmark, settings: BenchSettings, tmp_path: Path) -> None:
    write_results(BenchSettings(**{**vars(settings), "out": tmp_path / "out"}), found)
    page = (tmp_path / "out" / "bench.md").read_text()
    assert found.head["command"] in page
    for subject in found.subjects:
        for batch in subject.batches:
            assert f"{batch.stages['prefill'].median:.2f}" in page
            assert f"{batch.stages['prefill'].p99:.2f}" in page
    assert "Jaccard" in page


def test_the_command_measures_the_same_again(settings: BenchSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[BenchSettings] = []

    def stop(given: BenchSettings, _: Progress) -> None:
        asked.append(given)
        raise FlowCutError("stop")

    monkeypatch.setattr(bench_run, "bench", stop)
    words = command(BenchSettings(**{**vars(settings), "memory": False, "peers": True, "question": "It's?"}))
    with pytest.raises(SystemExit):
        main(shlex.split(words)[1:])
    assert command(asked[0]) == words
    assert (asked[0].memory, asked[0].peers, asked[0].batches, asked[0].question) == (False, True, (1, 2), "It's?")


def test_without_a_baseline_there_is_no_speed_up(directories: tuple[Path, Path]) -> None:
    found = bench(BenchSettings(directories[0], **{**QUICK, "memory": False, "compare": 0}), Progress(disable=True))
    told = found.to_dict()
    assert (told["baseline"], told["speedup"], told["agreement"]["baseline"]) == (None, None, None)


def test_an_engine_beside_itself_is_as_fast(directories: tuple[Path, Path]) -> None:
    """What is wrong with turns, warm-up or pairs shows here. Two sessions of one file are one session."""
    given = {**QUICK, "repeats": 30, "memory": False, "compare": 0}
    found = bench(BenchSettings(directories[1], directories[1], **given, allow_mismatch=True), Progress(disable=True))
    (comparison,) = found.comparisons
    assert found.mismatch == ["engine is this very one, not another"]
    assert comparison.ratios["prefill"].flop_ratio == 1
    assert 0.67 < comparison.ratios["prefill"].ratio < 1.5  # other tests run meanwhile
    assert found.agreement["baseline"] == {"same_first_token": 1.0, "logits_cosine": 1.0, "prompts": 1}


def test_right_answers_are_counted(directories: tuple[Path, Path]) -> None:
    given = {**QUICK, "repeats": 1, "memory": False, "compare": 0, "scenes": 2, "new_tokens": 4}
    accuracy = bench(BenchSettings(*directories, **given), Progress(disable=True)).to_dict()["accuracy"]
    assert accuracy["scenes"] == 2
    assert accuracy["baseline"]["n"] == accuracy["pruned"]["n"] > 4
    assert accuracy["baseline"]["accuracy"] > 0.9


def test_peers_run_beside_it(directories: tuple[Path, Path]) -> None:
    given = {**QUICK, "repeats": 2, "memory": False, "compare": 0}
    found = bench(BenchSettings(*directories, **given, peers=True, checkpoint="llava-tiny"), Progress(disable=True))
    assert [peer.name for peer in found.peers] == ["transformers-sdpa", "eager-adaptive", "eager-static"]
    assert {each.against for each in found.comparisons} == {"baseline", *(peer.name for peer in found.peers)}
    assert found.peers[0].batches[0].visual_tokens == 144
    assert found.peers[2].batches[0].prompt_tokens == found.pruned.batches[0].prompt_tokens


def test_a_profile_says_which_kinds_of_nodes_take_the_time(directories: tuple[Path, Path]) -> None:
    given = {**QUICK, "repeats": 1, "memory": False, "compare": 0, "profile": True}
    profile = bench(BenchSettings(*directories, **given), Progress(disable=True)).to_dict()["profile"]
    for name in ("pruned", "baseline"):
        for graph in ("vision", "language"):
            entry = profile[name][graph]
            assert sum(ms for _, ms in entry["ops"]) == pytest.approx(entry["total_ms"], rel=0.01)
            assert {"MatMul", "Attention"} <= {op for op, _ in entry["ops"]}


@pytest.mark.parametrize("backend", ["rtx", "trt"])
def test_on_a_gpu_decode_steps_run_with_and_without_cuda_graphs(
    backend: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stand-in for GPU and library: what is tested is that the device is waited for, and who is measured."""
    fake_gpu.install(monkeypatch)
    waits: list[int] = []
    monkeypatch.setattr(bench_run, "waiter", lambda on_gpu: lambda: waits.append(on_gpu))
    pruned, whole = (
        write_engine(tmp_path / str(tokens), tokens=tokens, limits=limits, backend=backend, precision="fp16").directory
        for tokens, limits in ((16, LIMITS), ("all", WHOLE))
    )
    given = {**QUICK, "repeats": 2, "memory": False, "compare": 0}
    found = bench(BenchSettings(pruned, whole, **given, cuda_graphs="both"), Progress(disable=True))
    graphs = {subject.name: subject.about["cuda_graphs"] for subject in found.subjects}
    without = {"pruned-no-cuda-graphs": False, "baseline-no-cuda-graphs": False}
    assert graphs == {"pruned": True, "baseline": True, **without}
    assert waits == [True] * (4 * 3 * 7)
    pairs = [(each.subject, each.against) for each in found.comparisons]
    assert pairs == [("pruned", "baseline"), ("pruned-no-cuda-graphs", "baseline-no-cuda-graphs")]
    assert found.machine["kind"] == "gpu"
    assert all(ms > 0 for ms in found.pruned.batches[0].device_ms["vision"])


Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Cli:
    def call(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as ended:
            main(["bench", *map(str, words)])
        out, err = capfd.readouterr()
        return int(ended.value.code or 0), out, err

    return call


FAST = ("--repeats", 2, "--warmup", 1, "--new-tokens", 2, "--threads", 1, "--compare", 0, "--no-memory")


def test_the_last_line_is_what_bench_json_holds(cli: Cli, directories: tuple[Path, Path], tmp_path: Path) -> None:
    code, out, err = cli(directories[0], "--baseline", directories[1], *FAST, "--out", tmp_path / "out")
    told = json.loads(out.splitlines()[-1])
    assert (code, err) == (0, "")
    assert told == json.loads((tmp_path / "out" / "bench.json").read_text())
    needed = {"pruned", "baseline", "speedup", "agreement", "accuracy", "backend", "weights"}
    assert needed <= set(told)
    assert set(told["speedup"]) == {"vision", "prefill", "total"}
    assert re.search(r"time to first token +\d", out)
    assert "FLOP limit" in out


def test_a_mismatch_marks_every_output(cli: Cli, directories: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_engine(tmp_path / "other", tokens="all", precision="fp16", limits=LIMITS).directory
    out = tmp_path / "out"
    code, _, err = cli(directories[0], "--baseline", other, *FAST, "--out", out)
    assert code == 1
    assert not out.exists()
    assert err.count("\n") == 1
    code, said, _ = cli(directories[0], "--baseline", other, *FAST, "--out", out, "--allow-mismatch")
    assert code == 0
    assert "MISMATCH" in said
    assert json.loads(said.splitlines()[-1])["mismatch"]
    assert "MISMATCH" in (out / "bench.md").read_text()
    assert "MISMATCH" in (out / "bench.svg").read_text()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--repeats", 0), "repeats must be a whole number, at least 1, got 0"),
        (("--batch", "1,9"), "batch must be at most 2"),
        (("--prompt-tokens", 5), "prompt_tokens must be at least"),
        (("--prompt-tokens", 9000), "prompt_tokens must be at most 244"),
        (("--image", "missing.png"), "missing.png"),
        (("--backend", "rtx"), "backend must be one of auto, ort for this directory"),
        (("--threads", 1000), "threads must be at most"),
        (("--checkpoint", "nowhere", "--peers"), "model must be one of"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_a_line(
    cli: Cli, directories: tuple[Path, Path], tmp_path: Path, options: tuple[object, ...], said: str
) -> None:
    code, out, err = cli(directories[0], *FAST, "--out", tmp_path / "out", *options)
    assert (code, out) == (1, "")
    assert said in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []
