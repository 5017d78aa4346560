"""`python -m flowcut.tiny --scale smoke`: the whole path of training, what it leaves, and running it again."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch

from flowcut.aliases import resolve
from flowcut.tensors import expected_tensors
from flowcut.tiny.__main__ import main

LIMIT_SECONDS = 1800  # it takes a minute or two where nothing else runs
STAGES = ("tower", "decoder")


class Run(NamedTuple):
    """What ended."""

    code: int
    out: str
    err: str


class Trained(NamedTuple):
    """What a run left."""

    work: Path
    checkpoint: Path
    history: dict[str, Any]


def arguments(work: Path, checkpoint: Path) -> list[str]:
    return ["--scale", "smoke", "--work", str(work), "--out", str(checkpoint)]


def run(work: Path, checkpoint: Path) -> Run:
    command = [sys.executable, "-m", "flowcut.tiny", *arguments(work, checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    return Run(done.returncode, done.stdout, done.stderr)


def run_here(work: Path, checkpoint: Path) -> Run:
    """The same in this process, which coverage sees, and the workers that it starts."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(out), redirect_stderr(err):
        patch.setattr(sys, "argv", ["flowcut.tiny", *arguments(work, checkpoint)])
        code = main()
    return Run(code, out.getvalue(), err.getvalue())


def history(done: Run) -> dict[str, Any]:
    """The last line on stdout, as any reader of JSON takes it."""
    read: dict[str, Any] = json.loads(done.out.splitlines()[-1], parse_constant=pytest.fail)  # NaN is not JSON
    return read


def digests(*directories: Path) -> dict[Path, str]:
    files = sorted(p for directory in directories for p in directory.rglob("*") if p.is_file())
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Trained:
    directory = tmp_path_factory.mktemp("smoke")
    done = run_here(directory / "work", directory / "llava-smoke")
    assert done.code == 0, done.err
    return Trained(directory / "work", directory / "llava-smoke", history(done))


def test_losses_fall_in_both_stages(trained: Trained) -> None:
    assert trained.history["checkpoint"] == str(trained.checkpoint)
    for stage in STAGES:
        curve = trained.history[stage]
        assert curve[-1]["step"] == trained.history["recipe"][stage]["steps"]
        losses = [line["loss"] for line in curve]
        assert all(np.isfinite(losses))
        assert losses[-1] < 0.95 * losses[0], losses
    assert {"shape", "colour", "glyph", "cls_pairs"} <= trained.history["tower"][-1].keys()
    assert {"accuracy", "color", "count", "text"} <= trained.history["decoder"][-1].keys()


def test_muon_trains_every_matrix_inside_a_layer(trained: Trained) -> None:
    """Six of each of the tower's 12 layers, seven of each of the decoder's 4."""
    for stage, matrices in (("tower", 12 * 6), ("decoder", 4 * 7)):
        muon = torch.load(trained.work / f"{stage}.pt", weights_only=True)["optimizers"][0]
        assert len(muon["state"]) == matrices


def test_checkpoint_is_found_and_complete(trained: Trained) -> None:
    model = resolve(str(trained.checkpoint))
    assert (model.note, model.weights.random, model.tokenizer.parent) == ("", False, trained.checkpoint)
    for name, shape in expected_tensors(model.config).items():
        tensor = model.weights.load(name)
        assert (tensor.shape, tensor.dtype) == (shape, np.float16)
        assert np.isfinite(tensor).all()


def test_transformers_loads_the_checkpoint_as_it_is(trained: Trained) -> None:
    transformers = pytest.importorskip("transformers")
    kind = transformers.LlavaForConditionalGeneration
    theirs, report = kind.from_pretrained(trained.checkpoint, output_loading_info=True)
    assert not any(report.values())
    weights = resolve(str(trained.checkpoint)).weights
    ours = weights.load("language_model.model.layers.3.self_attn.q_proj.weight")
    np.testing.assert_array_equal(theirs.model.language_model.layers[3].self_attn.q_proj.weight.numpy(force=True), ours)
    processor = transformers.AutoProcessor.from_pretrained(trained.checkpoint)
    inputs = processor(
        images=np.zeros((50, 90, 3), np.uint8), text="USER: <image>\nWhat? ASSISTANT:", return_tensors="pt"
    )
    assert theirs.generate(**inputs, max_new_tokens=2, do_sample=False).shape[0] == 1


def test_running_it_again_changes_nothing(trained: Trained) -> None:
    before = digests(trained.work, trained.checkpoint)
    kept = [p for p in before if p.suffix in {".pt", ".npy", ".npz"}]
    times = [p.stat().st_mtime_ns for p in kept]
    again = run(trained.work, trained.checkpoint)
    assert again.code == 0, again.err
    assert "Traceback" not in again.err
    assert digests(trained.work, trained.checkpoint) == before
    assert [p.stat().st_mtime_ns for p in kept] == times
    assert {**history(again), "seconds": 0} == {**trained.history, "seconds": 0}


def test_work_of_another_recipe_is_refused_and_left_alone(trained: Trained, tmp_path: Path) -> None:
    recipe = json.loads((trained.work / "recipe.json").read_text(encoding="utf-8"))
    other = json.dumps({**recipe, "scenes": 7}, indent=1) + "\n"
    (tmp_path / "recipe.json").write_text(other, encoding="utf-8")
    done = run_here(tmp_path, tmp_path / "out")
    assert (done.code, done.out) == (1, "")
    lines = done.err.strip().splitlines()
    assert lines == [
        f"flowcut.tiny: {tmp_path} must hold this recipe's work, got another's. Remove it or name another."
    ]
    assert [p.name for p in tmp_path.iterdir()] == ["recipe.json"]
    assert (tmp_path / "recipe.json").read_text(encoding="utf-8") == other


def test_work_that_cannot_be_a_folder_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file", encoding="utf-8")
    done = run_here(tmp_path / "taken", tmp_path / "out")
    assert (done.code, done.out) == (1, "")
    assert len(done.err.strip().splitlines()) == 1
    assert str(tmp_path / "taken") in done.err


@pytest.mark.parametrize("library", ["torch", "safetensors"])
def test_without_a_library_it_says_what_to_install(
    library: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    done = run_here(tmp_path / "work", tmp_path / "out")
    assert (done.code, done.out) == (1, "")
    assert done.err.startswith(f"flowcut.tiny: {library} is not installed.")
    assert done.err.count("\n") == 1
    assert ".[torch]" in done.err


def test_an_interruption_is_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("flowcut.tiny.stages.train", interrupted)
    done = run_here(tmp_path / "work", tmp_path / "out")
    assert (done.code, done.out) == (1, "")
    assert done.err.strip() == "flowcut.tiny: interrupted. The same command goes on from here."
