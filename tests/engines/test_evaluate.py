"""Pages, answerers and what an evaluation says; on scenes few enough for seconds."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress
from tiny_engine import write_engine

from engines.evaluate import Page, ask, evaluate, make_pages
from engines.evaluate_report import evaluated
from engines.evaluate_target import NEW_TOKENS, EngineAnswerer, EvalSettings
from engines.evaluate_torch import Eager, TorchAnswerer, pictures_at_once, shared
from engines.runtime.engine import load_engine
from flowcut.aliases import Model, resolve
from flowcut.config import LlavaConfig
from flowcut.contract import Limits
from flowcut.errors import ConfigError, EngineError, FlowCutError, InputError
from flowcut.language import KVCache
from flowcut.preprocess import pixel_values
from flowcut.prompt import Tokenizer, batch, question_prompt
from flowcut.schedule import default_schedule, make_schedule
from flowcut.tiny import questions as world
from flowcut.tiny.scenes import Scene, render

QUIET = Progress(disable=True)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def model() -> Model:
    return resolve("llava-tiny")


@pytest.fixture(scope="module")
def eager(model: Model) -> Eager:
    return Eager.load(model)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Static, 16 tokens, fp32, three prompts at once."""
    limits = Limits(max_batch=3, max_images=4, max_prompt=128, max_new_tokens=8)
    return write_engine(tmp_path_factory.mktemp("evaluate") / "engine", limits=limits).directory


class Parrot:
    """Says its words one after the other, whatever the questions."""

    at_once = 3

    def __init__(self, words: Sequence[str]) -> None:
        self.words, self.calls, self.asked = iter(words), list[int](), list[str]()

    def answer(self, pictures: Sequence[Image.Image], questions: Sequence[Sequence[str]]) -> list[list[str]]:
        self.calls.append(len(pictures))
        assert len(pictures) == len(questions)
        self.asked += [text for texts in questions for text in texts]
        return [[next(self.words) for _ in texts] for texts in questions]


def test_pages_hold_the_split_s_questions_in_order() -> None:
    pages = make_pages("test", 7)
    assert [page.scene.number for page in pages] == list(range(7))
    assert all(page.scene.split == "test" for page in pages)
    assert [page.questions for page in pages] == [world.test_questions(page.scene) for page in pages]
    assert make_pages("val", 7) != pages


def test_scenes_without_a_kind_of_question_are_asked_the_others() -> None:
    counts = [len(page.questions) for page in make_pages("test")]
    assert len(counts) == 400
    assert set(counts) == {5, 6}
    assert sum(counts) >= 2000


@pytest.mark.parametrize("questions", [1, 6, 7, 50])
def test_exactly_as_many_questions_as_asked_for(questions: int) -> None:
    pages = make_pages("test", questions=questions)
    assert sum(len(page.questions) for page in pages) == questions
    assert all(page.questions for page in pages)
    assert make_pages("test", 20, questions) == pages


def test_more_questions_than_there_are_is_an_error() -> None:
    with pytest.raises(ConfigError, match=r"questions must be at most 12 \(all about 2 scenes\), got 13\. Ask"):
        make_pages("test", 2, 13)


def test_answers_are_compared_word_for_word() -> None:
    pages = make_pages("test", 7)
    asked = [question for page in pages for question in page.questions]
    parrot, drawn = (
        Parrot([f" {q.answer}\n" if i % 3 == 2 else f"{q.answer}." for i, q in enumerate(asked)]),
        list[int](),
    )

    def draw(scene: Scene) -> Image.Image:
        drawn.append(scene.number)
        return Image.new("RGB", (1, 1))

    answers = ask(parrot, pages, "grid", QUIET, draw)
    assert parrot.calls == [3, 3, 1]
    assert parrot.asked == [question.text for question in asked]
    assert drawn == list(range(7))
    assert [(a.scene, a.question) for a in answers] == [(p.scene.number, q.text) for p in pages for q in p.questions]
    assert [a.right for a in answers] == [i % 3 == 2 for i in range(len(answers))]
    assert answers[2].got == answers[2].answer
    assert {a.selector for a in answers} == {"grid"}


def reference(eager: Eager, page: Page, tokens: int, schedule: str, selector: str | None) -> list[str]:
    """Each prompt alone and from its start, four tokens."""
    vision = eager.vision.config.vision
    pixels = torch.from_numpy(pixel_values([render(page.scene)], eager.settings))
    embeds, _ = eager.vision(pixels, make_schedule(schedule, vision, tokens, selector))
    answers = []
    for question in page.questions:
        prompt = eager.tokenizer.encode(question_prompt(question.text), [tokens], tokens)
        ids, rows = torch.from_numpy(prompt.input_ids)[None], torch.from_numpy(prompt.image_rows)[None]
        told: list[int] = []
        for _ in range(NEW_TOKENS):
            cache = KVCache.allocate(eager.language.config, 1, ids.shape[1])
            positions = torch.arange(ids.shape[1])[None]
            token = int(eager.language.logits(eager.language(ids, positions, rows, embeds, cache))[0, -1].argmax())
            told.append(token)
            ids, rows = torch.cat([ids, torch.tensor([[token]])], 1), torch.cat([rows, torch.tensor([[-1]])], 1)
        end = next((i for i, token in enumerate(told) if token in eager.eos_token_ids), NEW_TOKENS)
        answers.append(eager.tokenizer.decode(told[:end]).strip())
    return answers


@pytest.mark.parametrize(
    ("tokens", "schedule", "selector"),
    [(16, "adaptive", None), (20, "static", "cls"), (144, "static", None)],
)
def test_shared_beginnings_change_no_answer(eager: Eager, tokens: int, schedule: str, selector: str | None) -> None:
    pages = make_pages("test", questions=15)  # the last page is shorter
    answerer = TorchAnswerer(eager, make_schedule(schedule, eager.vision.config.vision, tokens, selector))
    got = [answer.got for answer in ask(answerer, pages, "", QUIET)]
    assert got == [word for page in pages for word in reference(eager, page, tokens, schedule, selector)]


def test_answers_end_at_the_end_token(eager: Eager) -> None:
    pages = make_pages("test", 2)
    schedule = make_schedule("adaptive", eager.vision.config.vision, 16)
    answerer = TorchAnswerer(eager, schedule)
    prompts = [question_prompt(q.text) for page in pages for q in page.questions]
    encoded = batch([eager.tokenizer.encode(prompt, [16], 16) for prompt in prompts], 999)
    embeds, _ = eager.vision(torch.from_numpy(pixel_values([render(p.scene) for p in pages], eager.settings)), schedule)
    ids = answerer._generate(embeds, encoded, torch.tensor([6, 6]))
    ends = Eager(eager.vision, eager.language, eager.tokenizer, eager.settings, (ids[3][1],))
    got = [answer.got for answer in ask(TorchAnswerer(ends, schedule), pages, "", QUIET)]
    cut = [row[: row.index(ids[3][1])] if ids[3][1] in row else row for row in ids]
    assert len(cut[3]) <= 1
    assert got == [eager.tokenizer.decode(row).strip() for row in cut]


def test_prompts_share_what_stands_before_the_question(model: Model) -> None:
    tokenizer = Tokenizer.from_file(model.tokenizer, model.config.image_token_id, model.config.text.vocab_size)
    texts = ["What color is the star?", "How many objects are there?"]
    prompts = [tokenizer.encode(question_prompt(text), [9], 9) for text in texts]
    same = [a == b for a, b in zip(*(p.input_ids.tolist() for p in prompts), strict=False)].index(False)
    assert shared(batch(prompts, 999)) == same >= 10
    assert shared(batch(prompts[:1] * 2, 999)) == len(prompts[0].input_ids) - 1  # one is left to ask the logits of


def test_large_models_see_fewer_pictures_at_once(model: Model) -> None:
    seven = LlavaConfig.from_file(Path(resolve("llava-1.5-7b", random=True).files) / "config.json")
    assert pictures_at_once(model.config.text, 144) == 16
    assert pictures_at_once(seven.text, 576) == 1


def test_engine_answers_what_its_checkpoint_does(eager: Eager, directory: Path) -> None:
    pages = make_pages("test", questions=20)
    engine = EngineAnswerer(load_engine(directory, threads=1))
    torch_answerer = TorchAnswerer(eager, make_schedule("static", eager.vision.config.vision, 16))
    assert ask(engine, pages, "", QUIET) == ask(torch_answerer, pages, "", QUIET)


@pytest.mark.parametrize("selector", [None, "cls"])
def test_export_for_the_occasion_answers_what_torch_does(selector: str | None) -> None:
    results = {}
    for backend in ("torch", "ort"):
        settings = EvalSettings("llava-tiny", backend=backend, selector=selector, questions=20, threads=1)
        results[backend] = evaluate(settings, QUIET)
    assert results["ort"].answers == results["torch"].answers
    kinds = {backend: result.subject.schedule for backend, result in results.items()}
    assert kinds == ({"torch": "static", "ort": "static"} if selector else {"torch": "adaptive", "ort": "masked"})


def test_threads_are_given_back() -> None:
    torch.set_num_threads(2)
    evaluate(EvalSettings("llava-tiny", questions=1, threads=1), QUIET)
    assert torch.get_num_threads() == 2
    torch.set_num_threads(1)


def test_result_says_all_and_answers_are_written(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text("old")
    result = evaluate(EvalSettings("llava-tiny", scenes=3, answers=path, threads=1), QUIET)
    told = json.loads(json.dumps(result.to_dict()))
    assert set(told) == {
        *("accuracy", "n", "interval", "by_type", "model", "note", "tokens", "patches", "selector", "schedule"),
        *("llm_tokens", "backend", "precision", "seeds", "split", "scenes", "seconds"),
    }
    assert (told["n"], told["scenes"], told["split"], told["tokens"], told["patches"]) == (18, 3, "test", 16, 144)
    assert (told["model"], told["selector"], told["schedule"]) == ("llava-tiny", "flowcut", "adaptive")
    assert (told["backend"], told["precision"], told["seeds"]) == ("torch", "fp32", {})
    assert list(told["by_type"]) == list(world.KINDS)
    assert all(set(score) == {"accuracy", "n", "interval"} and score["n"] == 3 for score in told["by_type"].values())
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [set(line) for line in lines] == [{"scene", "kind", "question", "answer", "got", "selector", "right"}] * 18
    assert told["accuracy"] == pytest.approx(np.mean([line["right"] for line in lines]), abs=1e-6)
    assert [path.name for path in tmp_path.iterdir()] == ["answers.jsonl"]


def test_random_is_three_seeds() -> None:
    result = evaluate(EvalSettings("llava-tiny", selector="random", tokens=9, questions=8, threads=1), QUIET)
    told = result.to_dict()
    assert (told["selector"], told["schedule"], told["n"], told["tokens"]) == ("random", "static", 8, 9)
    assert list(told["seeds"]) == ["random-0", "random-1", "random-2"]
    assert told["accuracy"] == pytest.approx(np.mean(list(told["seeds"].values())), abs=1e-6)
    for seed in range(3):
        one = evaluate(EvalSettings("llava-tiny", selector=f"random-{seed}", tokens=9, questions=8, threads=1), QUIET)
        assert one.answers == result.answers[8 * seed : 8 * seed + 8]
        assert one.to_dict()["seeds"] == {}


def test_all_tokens_are_unpruned_whatever_the_selector() -> None:
    results = [evaluate(EvalSettings("llava-tiny", "all", selector=s, questions=7), QUIET) for s in (None, "grid")]
    assert [r.subject.schedule for r in results] == ["off", "off"]
    assert [a.got for a in results[0].answers] == [a.got for a in results[1].answers]


def test_directory_is_asked_as_it_was_built(directory: Path) -> None:
    told = evaluate(EvalSettings(str(directory), 16, "static", "flowcut", precision="fp32", questions=5), QUIET)
    assert told.to_dict()["n"] == 5
    assert (told.subject.backend, told.subject.schedule, told.subject.tokens) == ("ort", "static", 16)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tokens": 32}, r"tokens must be 16, which .*engine was built with, got 32\. Leave it out, or name the check"),
        ({"tokens": "all"}, r"tokens must be 16, .*got 144\."),
        ({"schedule": "masked"}, r"schedule must be 'static', .*got 'masked'\."),
        ({"selector": "cls"}, r"selector must be 'flowcut', .*got 'cls'\."),
        ({"selector": "random"}, r"selector must be 'flowcut', .*got 'random'\."),
        ({"precision": "fp16"}, r"precision must be 'fp32', .*got 'fp16'\."),
        ({"backend": "torch"}, r"backend must be auto, rtx, trt or ort for an engine directory, got 'torch'\. To"),
    ],
)
def test_directory_s_settings_are_fixed(directory: Path, given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(EvalSettings(str(directory), questions=1, **given), QUIET)  # type: ignore[arg-type]


def test_directory_and_a_schedule_file(directory: Path, tmp_path: Path) -> None:
    own = json.loads((directory / "manifest.json").read_text())["schedule"]
    for name, counts in {"same": own["counts"], "other": [100, 80, 60, 40, 16]}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps({**own, "counts": counts}))
    settings = EvalSettings(str(directory), schedule=str(tmp_path / "same.json"), questions=1)
    assert len(evaluate(settings, QUIET).answers) == 1
    with pytest.raises(ConfigError, match=r"schedule must be \{.*\}, which .* was built with, got \{.*100, 80"):
        evaluate(EvalSettings(str(directory), schedule=str(tmp_path / "other.json"), questions=1), QUIET)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"target": "nowhere"}, ConfigError, r"model must be one of llava-tiny, .* or a directory, got 'nowhere'"),
        ({"target": ""}, ConfigError, r"model must be one of llava-tiny, .* or a directory, got ''"),
        ({"tokens": 0}, ConfigError, r"tokens must be in 1\.\.144 .*, got 0\."),
        ({"tokens": 145}, ConfigError, r"tokens must be in 1\.\.144 .*, got 145\."),
        ({"schedule": "slow"}, ConfigError, r"schedule must be adaptive, static, masked or a \.json file, got 'slow'"),
        ({"selector": "best"}, ConfigError, r"selector must be one of flowcut, .* or random-SEED, got 'best'\."),
        ({"selector": "cls", "schedule": "adaptive"}, ConfigError, r"schedule must be static with the selector cls"),
        (
            {"selector": "random", "schedule": "masked"},
            ConfigError,
            r"schedule must be static with the selector random",
        ),
        ({"backend": "ort", "schedule": "adaptive"}, ConfigError, r"schedule must be static, masked or a \.json file"),
        (
            {"backend": "rtx"},
            ConfigError,
            r"backend must be torch or ort for a checkpoint, got 'rtx'\. `flowcut engine",
        ),
        ({"precision": "fp16"}, ConfigError, r"precision must be fp32 with torch, got 'fp16'\. --backend ort"),
        ({"split": "training"}, InputError, r"split must be one of train, val, test, got 'training'\."),
        ({"answers": Path("nowhere/a.jsonl")}, InputError, r"answers must be a file in an existing directory, got"),
        ({"answers": Path()}, InputError, r"answers must be a file in an existing directory, got '\.'\."),
        *(
            ({name: n}, ConfigError, rf"{name} must be at least 1, got {n}\.")
            for name in ("scenes", "questions", "threads")
            for n in (0, -3)
        ),
    ],
)
def test_bad_settings_are_refused(given: dict[str, object], error: type[FlowCutError], message: str) -> None:
    with pytest.raises(error, match=message):
        evaluate(EvalSettings(**{"target": "llava-tiny", "scenes": 1, **given}), QUIET)  # type: ignore[arg-type]


def test_broken_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(EngineError, match=r"manifest\.json: "):
        evaluate(EvalSettings(str(tmp_path), questions=1), QUIET)


def test_default_schedules() -> None:
    chosen = {(s, b): default_schedule(s, b) for s in (None, "no-history", "grid", "random") for b in ("torch", "ort")}
    assert {schedule for (name, _), schedule in chosen.items() if name in ("grid", "random")} == {"static"}
    assert {(s, b): k for (s, b), k in chosen.items() if s not in ("grid", "random")} == {
        (None, "torch"): "adaptive",
        (None, "ort"): "masked",
        ("no-history", "torch"): "adaptive",
        ("no-history", "ort"): "masked",
    }


def test_table_has_a_row_for_each_kind(capsys: pytest.CaptureFixture[str]) -> None:
    result = evaluate(EvalSettings("llava-tiny", selector="random", questions=12, threads=1), QUIET)
    evaluated(Console(width=80), result)
    text = capsys.readouterr().out
    assert "llava-tiny: 16 of 144 patches" in text
    assert "selector random, schedule static, torch fp32; 2 scenes of the test split" in text
    for kind in world.KINDS:
        assert re.search(rf"^{kind} +2 +\d+\.\d% +\d+\.\d% - \d+\.\d%$", text, re.MULTILINE)
    assert re.search(r"^all +12 ", text, re.MULTILINE)
    assert "the mean of random-0 " in text
    assert max(map(len, text.splitlines())) <= 80
