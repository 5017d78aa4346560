"""The bundled checkpoint means what it says: right answers, the same ones in transformers, PyTorch and ONNX Runtime."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from rich.progress import Progress

from engines.evaluate import ask, evaluate, make_pages
from engines.evaluate_score import by_kind, overall
from engines.evaluate_target import EngineAnswerer, EvalSettings
from engines.evaluate_torch import Eager, TorchAnswerer
from engines.pipeline import BuildSettings, build_directory
from engines.runtime.engine import load_engine
from flowcut.aliases import ASSETS, resolve
from flowcut.prompt import question_prompt
from flowcut.schedule import make_schedule
from flowcut.tiny.questions import KINDS, all_questions
from flowcut.tiny.scenes import make_scene, render

TINY = ASSETS / "llava-tiny"
EXAMPLE = 2108  # scene of the test split that the bundled picture shows
QUIET = Progress(disable=True)

pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_answers_500_questions_of_the_test_split() -> None:
    found = evaluate(EvalSettings("llava-tiny", tokens="all", questions=500), QUIET)
    assert overall(found.answers).n == 500
    assert overall(found.answers).accuracy >= 0.95
    assert {kind: score for kind, score in by_kind(found.answers).items() if score.accuracy < 0.9} == {}


def test_pruning_to_the_default_budget_costs_something_but_not_everything() -> None:
    settings = EvalSettings("llava-tiny", questions=500)
    pruned = overall(evaluate(settings, QUIET).answers).accuracy
    assert 0.4 < pruned < 0.95


def test_the_bundled_picture_is_a_test_scene_with_one_circle() -> None:
    picture = Image.open(ASSETS / "example" / "scene.png").convert("RGB")
    scene = make_scene("test", EXAMPLE)
    assert picture.tobytes() == render(scene).tobytes()
    assert [q.answer for q in all_questions(scene) if q.text == "What color is the circle?"] == ["red"]


def test_the_default_engine_answers_the_default_question_rightly(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flowcut", "engine", "llava-tiny", "--ask", "--repeats", "1"]
    done = subprocess.run([*command, "--out-root", str(tmp_path)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout.splitlines()[-1])
    assert (answer["answer"], answer["note"], answer["tokens"]) == ("red", "", 16)


class Theirs:
    """transformers' own LLaVA, unpruned, as an engines.evaluate_target.Answerer.

    Its `generate` goes on from a cache: each picture is read once for all its questions. Only prompts of one length
    run together, so that none is padded.
    """

    at_once = 16

    def __init__(self) -> None:
        transformers = pytest.importorskip("transformers")
        self._processor = transformers.AutoProcessor.from_pretrained(TINY)
        self._model = transformers.LlavaForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()

    @torch.inference_mode()
    def answer(self, pictures: Sequence[Image.Image], questions: Sequence[Sequence[str]]) -> list[list[str]]:
        owner = torch.tensor([i for i, texts in enumerate(questions) for _ in texts])  # [Q], each question's picture
        prompts = [question_prompt(text) for texts in questions for text in texts]
        inputs = self._processor(images=[pictures[i] for i in owner], text=prompts)
        ids = [torch.tensor(row) for row in inputs["input_ids"]]
        first = torch.searchsorted(owner, torch.arange(len(pictures)))  # a question of each picture
        read = self._read(ids, torch.stack([torch.as_tensor(inputs["pixel_values"][i]) for i in first]))
        lengths = torch.tensor([len(row) for row in ids])
        words: dict[int, str] = {}
        for length in lengths.unique():
            rows = (lengths == length).nonzero().flatten()
            cache = copy.deepcopy(read)
            cache.batch_select_indices(owner[rows])
            words |= zip(rows.tolist(), self._go_on(torch.stack([ids[row] for row in rows]), cache), strict=True)
        return [[words[i] for i in (owner == picture).nonzero().flatten().tolist()] for picture in range(len(pictures))]

    def _read(self, ids: Sequence[torch.Tensor], pixels: torch.Tensor) -> Any:
        """The cache of each picture and what comes before it, which is the same for all."""
        head = int((ids[0] == self._model.config.image_token_id).nonzero().max()) + 1
        assert all(torch.equal(row[:head], ids[0][:head]) for row in ids)
        heads = ids[0][:head].expand(len(pixels), -1)
        return self._model(input_ids=heads, pixel_values=pixels, use_cache=True).past_key_values

    def _go_on(self, ids: torch.Tensor, cache: Any) -> list[str]:
        """What follows prompts of one length [B, S]."""
        mask = torch.ones_like(ids)
        out = self._model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=4, do_sample=False)
        answers: list[str] = self._processor.batch_decode(out[:, ids.shape[1] :], skip_special_tokens=True)
        return answers


@pytest.fixture(scope="module")
def eager() -> Eager:
    return Eager.load(resolve("llava-tiny"))


def engine(directory: Path, tokens: int | str, schedule: str, selector: str = "flowcut") -> EngineAnswerer:
    """Exported in float32, for ONNX Runtime."""
    settings = BuildSettings(
        "llava-tiny", tokens=tokens, schedule=schedule, selector=selector, precision="fp32", backend="ort",
        max_batch=6, max_images=6, out=directory / "engine",
    )  # fmt: skip
    return EngineAnswerer(load_engine(build_directory(settings, QUIET).directory, "ort"))


@pytest.mark.long
def test_unpruned_the_engine_answers_as_transformers_does_on_the_whole_test_split(tmp_path: Path) -> None:
    pages = make_pages("test")
    theirs = ask(Theirs(), pages, "none", QUIET)
    ours = ask(engine(tmp_path, "all", "static"), pages, "none", QUIET)
    assert len(ours) >= 2000
    assert overall(ours).accuracy >= 0.95
    assert {kind: score.accuracy for kind, score in by_kind(ours).items() if score.accuracy < 0.9} == {}
    assert set(by_kind(ours)) == set(KINDS)
    assert ours == theirs


@pytest.mark.long
@pytest.mark.parametrize(("exported", "in_torch"), [("masked", "adaptive"), ("static", "static")])
def test_pruned_the_engine_answers_as_eager_pytorch_does_on_the_whole_test_split(
    exported: str, in_torch: str, eager: Eager, tmp_path: Path
) -> None:
    pages = make_pages("test")
    schedule = make_schedule(in_torch, resolve("llava-tiny").config.vision, 16)
    reference = ask(TorchAnswerer(eager, schedule), pages, "flowcut", QUIET)
    assert ask(engine(tmp_path, 16, exported), pages, "flowcut", QUIET) == reference


@pytest.mark.parametrize("selector", ["no-history", "no-semantic", "no-strength", "cls", "grid", "random-1"])
def test_every_selector_answers_in_an_engine_as_in_eager_pytorch(selector: str, eager: Eager, tmp_path: Path) -> None:
    pages = make_pages("test", questions=48)
    schedule = make_schedule("static", resolve("llava-tiny").config.vision, 16, selector)
    reference = ask(TorchAnswerer(eager, schedule), pages, selector, QUIET)
    assert ask(engine(tmp_path, 16, "static", selector), pages, selector, QUIET) == reference
