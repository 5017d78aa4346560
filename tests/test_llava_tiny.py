"""The bundled checkpoint means what it says: right answers, the same ones in transformers, PyTorch and ONNX Runtime."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.progress import Progress

from engines.evaluate import ask, evaluate, make_pages
from engines.evaluate_score import by_kind, overall
from engines.evaluate_target import EngineAnswerer, EvalSettings
from engines.evaluate_torch import Eager, TorchAnswerer
from engines.pipeline import BuildSettings, build_directory
from engines.runtime import load_engine
from flowcut.aliases import ASSETS, resolve
from flowcut.prompt import question_prompt
from flowcut.schedule import make_schedule
from flowcut.tiny.questions import KINDS, all_questions
from flowcut.tiny.scenes import make_scene, render

TINY = ASSETS / "llava-tiny"
EXAMPLE = 2108  # scene of the test split that the bundled picture shows
QUIET = Progress(disable=True)


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
    """transformers' own LLaVA, unpruned, as an engines.evaluate_target.Answerer."""

    at_once = 1

    def __init__(self) -> None:
        transformers = pytest.importorskip("transformers")
        self._processor = transformers.AutoProcessor.from_pretrained(TINY)
        self._model = transformers.LlavaForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32).eval()

    @torch.inference_mode()
    def answer(self, pictures: Sequence[Image.Image], questions: Sequence[Sequence[str]]) -> list[list[str]]:
        (picture,), (texts,) = pictures, questions
        prompts = [question_prompt(text) for text in texts]
        inputs = self._processor(images=[picture] * len(prompts), text=prompts, padding=True, return_tensors="pt")
        ids = self._model.generate(**inputs, max_new_tokens=4, do_sample=False)
        return [self._processor.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)]


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
