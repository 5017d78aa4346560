"""Agreement of kept sets and of logits, against what is computed another way here."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from conftest import WriteCheckpoint
from next_checkpoint import write_next
from PIL import Image
from rich.progress import Progress
from verify_engines import builder

import calib.tower
from engines import load_engine
from engines.bench.agreement import encoder_kept, kept_agreement, logits_agreement
from engines.prune import PruneSettings, prune
from engines.runtime.engine import LlavaEngine
from flowcut.aliases import ASSETS
from flowcut.checkpoint import FileWeights
from flowcut.errors import CheckpointError
from flowcut.prompt import question_prompt

pytestmark = pytest.mark.usefixtures("one_thread")

PICTURES = [Image.fromarray(photograph[:290, :240]) for photograph in (skimage.data.coffee(), skimage.data.chelsea())]
PICTURES.append(Image.fromarray(skimage.data.astronaut()[:100, 100:400]))


@dataclass(frozen=True)
class Made:
    engine: LlavaEngine
    checkpoint: Path

    def agreement(self, **changes: Any) -> dict[str, Any]:
        """Of the three pictures."""
        model, reader = self.engine.model, self.engine.reader
        given: dict[str, Any] = {"kept": encoder_kept(model, reader, PICTURES), "checkpoint": None} | changes
        return kept_agreement(self.engine.manifest, reader=reader, pictures=PICTURES, **given)


Make = Callable[..., Made]


@pytest.fixture(scope="module")
def made(checkpoint: WriteCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """made(model, tokens, ..) -> a float32 engine of "llava-tiny", "seeded" or "next" on ONNX Runtime."""
    build, places = builder(tmp_path_factory), {"llava-tiny": ASSETS / "llava-tiny"}
    places["seeded"] = checkpoint("tiny", seed=3)
    places["next"] = write_next(checkpoint("tiny", seed=2), tmp_path_factory.mktemp("next") / "next")

    def make(model: str, **settings: Any) -> Made:
        directory = build(model=str(places[model]), **settings)
        return Made(load_engine(directory, "ort", threads=1, picture_cache_mb=0), places[model])

    return make


def adaptive(made: Made, tmp_path: Path, **settings: Any) -> list[set[int]]:
    """What `flowcut prune` keeps of the three pictures in the encoder."""
    paths = tuple(tmp_path / f"{number}.png" for number in range(3))
    for image, path in zip(PICTURES, paths, strict=True):
        image.save(path)
    pruned = prune(PruneSettings(str(made.checkpoint), images=paths, **settings), Progress(disable=True)).pruned
    return [set(numbers.tolist()) for numbers in pruned.encoder]


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("llava-tiny", {"tokens": 16}),
        ("seeded", {"tokens": 9}),
        ("seeded", {"tokens": 20, "selector": "no-history"}),
        ("next", {"tokens": 24}),
    ],
    ids=str,
)
def test_kept_sets_are_compared_with_flowcut_prune_s(
    model: str, settings: dict[str, Any], made: Make, tmp_path: Path
) -> None:
    ours = made(model, **settings)
    question = {"question": "What is this?"} if model == "next" else {}
    reference = adaptive(ours, tmp_path, schedule="adaptive", **settings, **question)
    kept = encoder_kept(ours.engine.model, ours.engine.reader, PICTURES)
    each = [len(a & b) / len(a | b) for a, b in zip((set(k.tolist()) for k in kept), reference, strict=True)]
    found = ours.agreement()
    by = " with the selector no-history" if "selector" in settings else ""
    assert found == {
        "reference": f"adaptive{by}, fp32, PyTorch",
        "jaccard": pytest.approx(np.mean(each), abs=1e-6),
        "least": pytest.approx(min(each), abs=1e-6),
        "pictures": 3,
    }
    assert 0 < found["least"] <= found["jaccard"] <= 1
    if model != "llava-tiny":
        assert found["least"] < 1


def test_masked_keeps_what_adaptive_does(made: Make) -> None:
    assert made("llava-tiny", tokens=16, schedule="masked").agreement()["least"] == 1


def test_a_selector_without_an_adaptive_schedule_is_compared_with_flowcut(made: Make, tmp_path: Path) -> None:
    ours = made("llava-tiny", tokens=16, selector="cls")
    reference = adaptive(ours, tmp_path, tokens=16, schedule="adaptive")
    kept = encoder_kept(ours.engine.model, ours.engine.reader, PICTURES)
    each = [len(a & b) / len(a | b) for a, b in zip((set(k.tolist()) for k in kept), reference, strict=True)]
    found = ours.agreement()
    assert found["reference"] == "adaptive with the selector flowcut, fp32, PyTorch"
    assert found["jaccard"] == pytest.approx(np.mean(each), abs=1e-6)
    assert found["jaccard"] < 1


@pytest.mark.parametrize(("model", "settings"), [("seeded", {"tokens": 30, "llm_tokens": 8}), ("next", {"tokens": 24})])
def test_what_the_encoder_kept_is_more_than_what_the_decoder_leaves(
    model: str, settings: dict[str, Any], made: Make
) -> None:
    ours = made(model, **settings)
    prompt = question_prompt("What is this?", anyres=model == "next")
    for image, kept in zip(PICTURES, encoder_kept(ours.engine.model, ours.engine.reader, PICTURES), strict=True):
        (left,) = ours.engine.prefill(image, prompt).kept[0]
        assert set(left.tolist()) < set(kept.tolist())


def test_only_the_tower_is_read_and_it_is_let_go(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, names, towers = made("seeded", tokens=9), list[str](), list[weakref.ref[Any]]()
    load, build = FileWeights.load, calib.tower.Tower.__init__

    def named(self: FileWeights, name: str) -> Any:
        names.append(name)
        return load(self, name)

    def built(self: Any, weights: Any) -> None:
        towers.append(weakref.ref(self))
        build(self, weights)

    monkeypatch.setattr(FileWeights, "load", named)
    monkeypatch.setattr(calib.tower.Tower, "__init__", built)
    ours.agreement()
    assert names
    assert not [name for name in names if name.startswith("language_model.")]
    gc.collect()
    assert [tower() for tower in towers] == [None]


def test_threads_are_given_back(made: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, threads = made("seeded", tokens=9), list[int]()
    run = calib.tower.Tower.run
    monkeypatch.setattr(calib.tower.Tower, "run", lambda *given: threads.append(torch.get_num_threads()) or run(*given))
    ours.agreement(threads=2)
    assert threads == [2, 2, 2]
    assert torch.get_num_threads() == 1


def test_as_many_kept_sets_as_pictures(made: Make) -> None:
    ours = made("seeded", tokens=9)
    with pytest.raises(ValueError, match="argument 2 is longer"):
        ours.agreement(kept=encoder_kept(ours.engine.model, ours.engine.reader, PICTURES[:2]))


def test_another_checkpoint_or_none_is_refused(made: Make, checkpoint: WriteCheckpoint) -> None:
    ours = made("seeded", tokens=9)
    with pytest.raises(CheckpointError, match=r"checkpoint must be the one that was exported"):
        ours.agreement(checkpoint=str(checkpoint("tiny", seed=4)))
    ours.engine.manifest = replace(ours.engine.manifest, source="nowhere")
    with pytest.raises(CheckpointError, match=r"got none: checkpoint not found; pass --checkpoint DIR\.$"):
        ours.agreement()
    assert ours.agreement(checkpoint=str(ours.checkpoint))["pictures"] == 3


# Logits


def test_logits_agree_as_plain_arithmetic_has_it() -> None:
    rng = np.random.default_rng(0)
    pruned, baseline = rng.standard_normal((2, 5, 40)).astype(np.float32)
    baseline[:2] = pruned[:2] + 0.01 * baseline[:2]
    found, cosines = logits_agreement(pruned, baseline), []
    for a, b in zip(pruned.tolist(), baseline.tolist(), strict=True):
        product, own, others = (sum(x * y for x, y in zip(*p, strict=True)) for p in ((a, b), (a, a), (b, b)))
        cosines.append(product / (own * others) ** 0.5)
    same = [
        max(range(40), key=a.__getitem__) == max(range(40), key=b.__getitem__)
        for a, b in zip(pruned, baseline, strict=True)
    ]
    assert found["logits_cosine"] == pytest.approx(sum(cosines) / 5, abs=1e-6)
    assert found["same_first_token"] == pytest.approx(sum(same) / 5)
    assert 0.4 <= found["same_first_token"] < 1
    assert found["prompts"] == 5


def test_equal_logits_agree_and_float16_is_no_limit() -> None:
    big = np.full((2, 40000), 200.0, np.float16)  # whose squares float16 has not
    big[:, 7] = 300
    assert logits_agreement(big, big) == {"same_first_token": 1.0, "logits_cosine": 1.0, "prompts": 2}
    assert logits_agreement(big, -big.astype(np.float32))["logits_cosine"] == -1.0
    assert logits_agreement(big, np.zeros_like(big))["logits_cosine"] == 0.0
