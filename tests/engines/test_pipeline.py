"""From settings to a published directory: what is in it, what it says of itself, and when none appears.

The compiler is replaced here by one that writes a few bytes; tests/test_end_to_end.py uses the real one.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from conftest import WriteCheckpoint
from next_checkpoint import write_next
from rich.progress import Progress

from engines import pipeline
from engines.build import BuildReport
from engines.pipeline import BuildSettings, Built, build_directory
from engines.runtime.engine import Sampling, load_engine
from flowcut.aliases import ASSETS, resolve
from flowcut.artifacts import check_files, read_manifest
from flowcut.chat import default_template
from flowcut.contract import GraphContract, Limits, language_contract, vision_contract
from flowcut.errors import CheckpointError, ConfigError, EngineError, FlowCutError

TINY = BuildSettings("llava-tiny", backend="ort")
Compiled = list[tuple[Path, GraphContract, str, tuple[str, ...]]]


def build(out: Path, settings: BuildSettings = TINY, **changes: Any) -> Built:
    return build_directory(replace(settings, out=out, **changes), Progress(disable=True))


@pytest.fixture(scope="module")
def next_checkpoint(checkpoint: WriteCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA-NeXT."""
    return write_next(checkpoint("tiny"), tmp_path_factory.mktemp("next") / "checkpoint")


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> Compiled:
    """Calls of a compiler that needs no library."""
    calls: Compiled = []

    def fake(
        onnx_path: Path, engine_path: Path, contract: GraphContract, backend: str, targets: tuple[str, ...], _: object
    ) -> BuildReport:
        assert onnx_path.is_file()
        calls.append((onnx_path, contract, backend, targets))
        engine_path.write_bytes(b"engine")
        return BuildReport(10, 0.1, 6, 4, 0)

    monkeypatch.setattr(pipeline, "build_engine", fake)
    monkeypatch.setattr(pipeline, "check_build", lambda *_: None)
    return calls


def test_directory_is_named_after_what_is_in_it(tmp_path: Path) -> None:
    settings = replace(TINY, out_root=tmp_path, precision="fp32", tokens=20)
    assert build_directory(settings, Progress(disable=True)).directory == tmp_path / "llava-tiny-20-fp32-ort"


@pytest.mark.parametrize("name", ["cls", "random-3"])
def test_directory_is_named_after_a_selector_that_is_not_flowcut(tmp_path: Path, name: str) -> None:
    built = build_directory(replace(TINY, out_root=tmp_path, tokens=20, selector=name), Progress(disable=True))
    assert built.directory == tmp_path / f"llava-tiny-20-{name}-fp16-ort"
    assert built.manifest.schedule["selector"] == name
    kept = load_engine(built.directory).generate(np.zeros((9, 9, 3), np.uint8), "<image>", Sampling(1)).kept[0][0]
    assert len(kept) == 20


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"model": "NEXT", "tokens": 24}, "checkpoint-24-fp16-ort"),
        ({"model": "NEXT", "tokens": "all"}, "checkpoint-320-fp16-ort"),
        ({"model": "NEXT"}, "checkpoint-18-fp16-ort"),  # 5.6% of 5 * 64
        ({"tokens": 48, "llm_tokens": 16}, "llava-tiny-48to16-fp16-ort"),
    ],
)
def test_directory_is_named_after_the_picture_s_tokens(
    tmp_path: Path, next_checkpoint: Path, settings: dict[str, Any], name: str
) -> None:
    settings = settings | ({"model": str(next_checkpoint)} if settings.get("model") == "NEXT" else {})
    built = build_directory(replace(TINY, out_root=tmp_path, **settings), Progress(disable=True))
    assert built.directory.name == name
    prefill = load_engine(built.directory).prefill(np.zeros((9, 9, 3), np.uint8), "<image> ?")
    assert len(prefill.kept[0]) == 1


def test_a_directory_says_what_is_dropped_inside_the_decoder(tmp_path: Path, next_checkpoint: Path) -> None:
    built = build(tmp_path / "e", model=str(next_checkpoint), tokens=24, stages=2)
    manifest = built.manifest
    assert (manifest.tokens, manifest.llm_tokens, manifest.schedule["tokens"]) == (12, 24, 12)
    assert manifest.geometry.grid_pinpoints == resolve(str(next_checkpoint)).config.grid_pinpoints
    assert manifest.limits.max_prompt == 5 * 12 + 1 + 192
    assert read_manifest(tmp_path / "e") == manifest
    for graph in manifest.graphs:
        model = onnx.load(tmp_path / "e" / f"{graph}.onnx", load_external_data=False)
        assert {p.key: p.value for p in model.metadata_props}["flowcut.llm_tokens"] == "24"
    other = build(tmp_path / "f", tokens=24).manifest
    assert other.llm_tokens is None
    model = onnx.load(tmp_path / "f" / "language.onnx", load_external_data=False)
    assert "flowcut.llm_tokens" not in {p.key for p in model.metadata_props}


@pytest.mark.parametrize(
    ("alias", "tokens", "prompt"),
    [
        ("llava-v1.6-vicuna-7b", None, 401 + 192),
        ("llava-v1.6-vicuna-7b", 160, 401 + 192),
        ("llava-v1.6-vicuna-7b", "all", 2952 + 192),
        ("llava-1.5-7b", None, 64 + 192),
    ],
)
def test_a_prompt_has_room_for_all_rows_of_a_picture(
    tmp_path: Path, alias: str, tokens: Any, prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Enough(Exception):
        pass

    def stop(target: Path) -> None:
        raise Enough

    seen: list[Limits] = []
    monkeypatch.setattr(pipeline, "check_replaceable", stop)
    settings = BuildSettings(alias, random=True, tokens=tokens, backend="ort", out_root=tmp_path)
    with pytest.raises(Enough):
        build_directory(settings, Progress(disable=True), lambda *given: seen.append(given[-1]))
    assert [limits.max_prompt for limits in seen] == [prompt]


def test_manifest_and_graphs_say_what_they_were_made_from(tmp_path: Path) -> None:
    built = build(tmp_path / "e", tokens=20, schedule="masked", max_batch=2, max_images=3, max_new_tokens=9)
    model, manifest = resolve("llava-tiny"), read_manifest(tmp_path / "e")
    assert manifest == built.manifest
    assert check_files(tmp_path / "e", manifest) == []
    assert manifest.geometry == model.config
    assert manifest.source_sha256 == model.weights.sha256
    assert (manifest.model, manifest.weights, manifest.note) == ("llava-tiny", "checkpoint", "")
    assert manifest.limits == Limits(max_batch=2, max_images=3, max_prompt=20 + 192, max_new_tokens=9)
    assert manifest.schedule == {
        "kind": "masked",
        "patches": 144,
        "tokens": 20,
        "counts": [144, 144, 144, 144, 20],
        "selector": "flowcut",
    }
    assert manifest.build_seconds.keys() == {"export"}
    for graph in ("vision", "language"):
        said = {
            p.key: p.value for p in onnx.load(tmp_path / "e" / f"{graph}.onnx", load_external_data=False).metadata_props
        }
        assert said["flowcut.model"] == "llava-tiny"
        assert said["flowcut.note"] == ""
        assert said["flowcut.source_sha256"] == model.weights.sha256
        assert (said["flowcut.tokens"], said["flowcut.precision"]) == ("20", "fp16")
        assert json.loads(said["flowcut.schedule"]) == manifest.schedule


def test_graphs_pass_the_full_check_with_their_weights(tmp_path: Path) -> None:
    for precision in ("fp16", "fp32"):
        directory = build(tmp_path / precision, precision=precision).directory
        for graph in ("vision", "language"):
            onnx.checker.check_model(str(directory / f"{graph}.onnx"), full_check=True)


def test_two_builds_of_one_model_hold_the_same_bytes(tmp_path: Path) -> None:
    first, second = (build(tmp_path / name).manifest.files for name in "ab")
    assert first == second
    assert build(tmp_path / "c", random=True, seed=1).manifest.files != first


def test_seed_of_random_weights_is_recorded(tmp_path: Path) -> None:
    manifest = build(tmp_path / "e", random=True, seed=5).manifest
    assert (manifest.weights, manifest.seed) == ("random", 5)
    assert build(tmp_path / "f", seed=5).manifest.seed == 0


def test_both_graphs_are_compiled_for_the_targets(tmp_path: Path, compiled: Compiled) -> None:
    built = build(tmp_path / "e", backend="rtx", compute_capabilities=("sm80", "SM86"))
    manifest = built.manifest
    made_for = (manifest.geometry, manifest.tokens, manifest.precision, manifest.limits)
    assert [contract for _, contract, _, _ in compiled] == [vision_contract(*made_for), language_contract(*made_for)]
    assert {(backend, targets) for _, _, backend, targets in compiled} == {("rtx", ("sm80", "SM86"))}
    assert manifest.compute_capabilities == ("sm80", "sm86")
    assert {"vision.engine", "language.engine"} <= manifest.files.keys()
    assert manifest.build_seconds.keys() == {"export", "compile vision", "compile language"}
    assert built.reports.keys() == {"vision", "language"}


def test_a_new_build_replaces_an_old_one(tmp_path: Path) -> None:
    build(tmp_path / "e", precision="fp32")
    assert build(tmp_path / "e").manifest.precision == "fp16"
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


@pytest.mark.parametrize("failure", [EngineError("no"), KeyboardInterrupt(), RuntimeError("a bug")])
def test_a_failed_build_leaves_the_old_one(
    tmp_path: Path, compiled: Compiled, failure: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = build(tmp_path / "e", precision="fp32").manifest

    def fail(*_: object) -> BuildReport:
        raise failure

    monkeypatch.setattr(pipeline, "build_engine", fail)
    with pytest.raises(type(failure)):
        build(tmp_path / "e", backend="rtx")
    assert read_manifest(tmp_path / "e") == old
    assert check_files(tmp_path / "e", old) == []
    assert [path.name for path in tmp_path.iterdir()] == ["e"]


@pytest.mark.parametrize(("precision", "backend"), [("fp16", "ort"), ("fp32", "ort"), ("fp16", "rtx")])
def test_space_asked_for_covers_what_is_written(
    tmp_path: Path, compiled: Compiled, precision: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(pipeline, "check_space", lambda _, needed: asked.append(needed))
    files = build(tmp_path / "e", precision=precision, backend=backend).manifest.files
    weights = sum(record.bytes for name, record in files.items() if name.endswith(".data"))
    written = sum(record.bytes for record in files.values()) + (weights if backend == "rtx" else 0)
    assert written <= asked[0] < written + (200 << 20)


def test_nothing_is_read_before_the_settings_are_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "export_graphs", lambda *_: pytest.fail("exported"))
    for changes in (
        {"schedule": "adaptive"},
        {"selector": "no"},
        {"compute_capabilities": ("sm80",)},
        {"max_prompt": 3},
        {"tokens": 0},
    ):
        with pytest.raises(FlowCutError):
            build(tmp_path / "e", **changes)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "prompt"),
    [({}, 16 + 192), ({"max_new_tokens": 4000}, 96), ({"max_new_tokens": 4079}, 17), ({"max_prompt": 3968}, 3968)],
)
def test_prompt_fits_the_positions_that_the_answer_leaves(changes: dict[str, Any], prompt: int) -> None:
    assert pipeline._limits(replace(TINY, **changes), 4096, 16).max_prompt == prompt


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 4080}, r"max_new_tokens must be in 1\.\.4079 .*got 4080"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 4000, "max_prompt": 97}, r"max_prompt must be in 17\.\.96 .*got 97"),
        ({"max_prompt": 16}, r"max_prompt must be in 17\.\.3968 .*got 16"),
    ],
)
def test_lengths_beyond_the_positions_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        pipeline._limits(replace(TINY, **changes), 4096, 16)


def test_progress_names_the_graph_being_written(tmp_path: Path) -> None:
    shown: list[str] = []

    class Watched(Progress):
        def add_task(self, description: str, *args: Any, **kwargs: Any) -> Any:
            shown.append(description)
            return super().add_task(description, *args, **kwargs)

    progress = Watched(disable=True)
    build_directory(replace(TINY, out=tmp_path / "e"), progress)
    assert shown == ["vision: export", "language: export"]
    assert progress.tasks == []


def test_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in (ASSETS / "llava-tiny").iterdir():
        (model / path.name).write_bytes(path.read_bytes())
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][-1], "id": 1100, "content": "<odd>"})
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(CheckpointError, match=r"tokenizer ids must be below 1024 .*got 1024 for '<odd>'"):
        build(tmp_path / "e", model=str(model))
    assert not (tmp_path / "e").exists()


def test_says_what_a_build_of_something_else_replaces(tmp_path: Path) -> None:
    assert build(tmp_path / "e").replaced == ""
    assert build(tmp_path / "e").replaced == ""  # the same again
    replaced = build(tmp_path / "e", schedule="masked").replaced
    own = resolve("llava-tiny").weights.sha256[:8]
    assert replaced == f"checkpoint {own}, schedule static, 4 decoder layers"
    build(tmp_path / "e", selector="random")
    replaced = build(tmp_path / "e").replaced
    assert replaced == f"checkpoint {own}, schedule static, selector random-0, 4 decoder layers"


def test_a_schedule_file_says_how_many_tokens_where_the_user_does_not(tmp_path: Path) -> None:
    file = tmp_path / "s.json"
    counts = [100, 80, 60, 40, 20]
    file.write_text(json.dumps({"kind": "static", "patches": 144, "tokens": 20, "counts": counts}), encoding="utf-8")
    assert build(tmp_path / "e", schedule=str(file)).manifest.tokens == 20
    with pytest.raises(ConfigError, match=r"'tokens': 16.*'tokens': 20"):
        build(tmp_path / "f", schedule=str(file), tokens=16)


def test_a_checkpoint_without_a_tokenizer_gets_a_stand_in_and_says_so(tmp_path: Path) -> None:
    source = shutil.copytree(ASSETS / "llava-tiny", tmp_path / "mine")
    (source / "tokenizer.json").unlink()
    built = build(tmp_path / "e", model=str(source))
    assert built.manifest.note == "stand-in tokenizer (no tokenizer.json in the checkpoint)"
    assert load_engine(built.directory).generate(np.zeros((9, 9, 3), np.uint8), "<image>", Sampling(1)).kept


def test_the_checkpoints_chat_template_comes_along(tmp_path: Path) -> None:
    source = shutil.copytree(ASSETS / "llava-tiny", tmp_path / "mine")
    own = "{% for m in messages %}[{{ m['content'] }}]{% endfor %}"
    (source / "chat_template.jinja").write_text(own, encoding="utf-8")
    built = build(tmp_path / "own", model=str(source))
    assert "chat_template.jinja" in built.manifest.files
    assert (built.directory / "chat_template.jinja").read_text(encoding="utf-8") == own
    (source / "chat_template.jinja").unlink()
    built = build(tmp_path / "none", model=str(source))
    assert "chat_template.jinja" not in built.manifest.files
    assert load_engine(built.directory).template == default_template(anyres=False)
