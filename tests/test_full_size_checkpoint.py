"""docs/results/full_size, from a checkpoint: what is written is one, is read as its values are, and goes again."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from flowcut.aliases import resolve
from flowcut.checkpoint import random_weights
from flowcut.deps import available

RESULTS = Path(__file__).parent.parent / "docs" / "results"
SCRIPT = "full_size"
RTX = pytest.mark.skipif(not available("tensorrt_rtx"), reason="needs the rtx extra (tensorrt-rtx-cu13)")
MB = 10**6


@pytest.fixture(scope="module")
def checkpoint() -> ModuleType:
    return importlib.import_module("full_size_checkpoint")


def arguments(folder: Path, *more: str) -> list[str]:
    return ["--model", "llava-tiny", "--results", str(folder / "r.json"), "--out", str(folder / "out"), *more]


def test_the_checkpoint_is_one_that_transformers_reads(checkpoint: ModuleType, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = resolve("llava-tiny", random=True)
    facts = checkpoint.write_checkpoint(tmp_path, model)
    theirs, report = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "mismatched_keys"))
    layers = model.config.text.num_hidden_layers
    expected = random_weights(model.config)
    for i, layer in enumerate(theirs.model.language_model.layers):
        found = layer.mlp.down_proj.weight.detach().float().numpy()
        wanted = expected.load(f"language_model.model.layers.{i}.mlp.down_proj.weight").astype("float32")
        assert (found == wanted).all()
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert [path.name for path in shards] == [
        f"model-{i + 1:05d}-of-{layers + 2:05d}.safetensors" for i in range(layers + 2)
    ]
    assert facts == {"dtype": "float16", "shards": layers + 2, "tensor_bytes": checkpoint.checkpoint_bytes(model)}
    headers = sum(8 + int.from_bytes(path.read_bytes()[:8], "little") for path in shards)
    assert sum(path.stat().st_size for path in shards) == facts["tensor_bytes"] + headers
    assert not (tmp_path / "tokenizer.json").exists()


def test_the_checkpoint_needs_disk_as_well(script: ModuleType, checkpoint: ModuleType) -> None:
    needed = {name: script.needed_bytes(script.SETTINGS[name], "llava-tiny") for name in ("int4", "int4-checkpoint")}
    stored = checkpoint.checkpoint_bytes(resolve("llava-tiny", random=True))
    assert needed["int4-checkpoint"] - needed["int4"] == stored > MB


def test_a_build_that_fails_leaves_no_checkpoint(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("safetensors")
    seen: list[list[str]] = []

    def measured(arguments: list[str], folder: Path) -> Any:
        beside = next(folder.parent.glob("llava-tiny-checkpoint"))
        assert str(beside) == arguments[1]
        seen.append(sorted(path.name for path in beside.iterdir() if path.suffix == ".json"))
        return {"wall_s": 1.0, "error": "exit code 1: no", "result": {}}

    def store(results: Path, name: str, row: Any) -> None:
        assert not (tmp_path / "out" / "llava-tiny-checkpoint").exists(), "it goes as soon as the command is done"
        assert row["checkpoint"]["shards"] > 2

    monkeypatch.setattr(script, "measured", measured)
    monkeypatch.setattr(script, "files", lambda directory, result: {})
    monkeypatch.setattr(script, "store", store)
    script.main(arguments(tmp_path, "--only", "int4-checkpoint", "--keep"))
    assert seen == [["config.json", "model.safetensors.index.json", "preprocessor_config.json"]]
    assert list(tmp_path.iterdir()) == []


@RTX
@pytest.mark.long
def test_llava_tiny_is_built_from_a_checkpoint_as_from_its_values(script: ModuleType, tmp_path: Path) -> None:
    script.main(arguments(tmp_path, "--only", "int4", "int4-checkpoint", "--keep"))
    data = json.loads((tmp_path / "r.json").read_text(encoding="utf-8"))
    drawn, read = data["int4"], data["int4-checkpoint"]
    assert drawn["error"] == read["error"] == ""
    assert "--weights random" in drawn["command"]
    assert f"engine {tmp_path / 'out' / 'llava-tiny-checkpoint'} --precision int4" in read["command"]
    out = tmp_path / "out"
    assert sorted(path.name for path in out.iterdir()) == ["int4", "int4-checkpoint"], "the checkpoint is not kept"
    for name in ("vision.onnx.data", "language.onnx.data"):
        theirs, ours = ((out / setting / "engine" / name).read_bytes() for setting in ("int4", "int4-checkpoint"))
        assert len(ours) > MB
        assert ours == theirs
    # what is watched holds the directory and nothing of the checkpoint
    assert read["peaks"]["disk_bytes"] < drawn["peaks"]["disk_bytes"] + read["checkpoint"]["tensor_bytes"] / 2
    assert "| int4-checkpoint | wall time | < 12.0 min |" in (tmp_path / "r.md").read_text(encoding="utf-8")
