"""Questions as ids: against tokenizing each whole prompt; weights and places against what they promise."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from rich.progress import Progress

from flowcut.errors import CheckpointError
from flowcut.prompt import Tokenizer, question_prompt
from flowcut.tiny import questions as world
from flowcut.tiny.asking import Asking, ask
from flowcut.tiny.questions import KINDS, Question, all_questions
from flowcut.tiny.scenes import make_scene

SCENES = 210  # more than one process asks about at once
IMAGE, VOCABULARY = 1022, 1024
VISUAL = 5  # tokens of a picture
EOS = 2


@pytest.fixture(scope="module")
def tokenizer(tiny_files: Path) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(tiny_files / "tokenizer.json"))


@pytest.fixture(scope="module")
def asking(tokenizer: tokenizers.Tokenizer) -> Asking:
    return ask(tokenizer, "train", SCENES, True, Progress(disable=True))


@pytest.fixture(scope="module")
def asked() -> list[list[Question]]:
    return [all_questions(make_scene("train", number)) for number in range(SCENES)]


def test_every_question_is_there_in_its_scene(asking: Asking, asked: list[list[Question]]) -> None:
    np.testing.assert_array_equal(np.diff(asking.start), [len(questions) for questions in asked])
    assert asking.start[0] == 0
    kinds = [KINDS.index(q.kind) for questions in asked for q in questions]
    np.testing.assert_array_equal(asking.kind, kinds)
    assert len(asking.texts) == len({q.text for questions in asked for q in questions})


def test_ids_are_those_of_the_whole_prompt(asking: Asking, asked: list[list[Question]], tiny_files: Path) -> None:
    runtime = Tokenizer.from_file(tiny_files / "tokenizer.json", IMAGE, VOCABULARY)
    for scene in (0, 1, 199, 200, SCENES - 1):
        for at, question in enumerate(asked[scene], asking.start[scene]):
            whole = runtime.encode(f"{question_prompt(question.text)} {question.answer}", [VISUAL], VISUAL)
            row = asking.text[at]
            own = asking.texts[row, : asking.lengths[row]]
            ids = [*asking.before, *[IMAGE] * VISUAL, *own, asking.answer[at]]
            np.testing.assert_array_equal(whole.input_ids, ids)
            assert np.all(asking.texts[row, asking.lengths[row] :] == 0)


def test_ids_are_those_of_transformers(asking: Asking, asked: list[list[Question]], tiny_files: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tiny_files)
    for at, question in enumerate(asked[0]):
        before, behind = question_prompt(question.text).split("<image>")
        row = asking.text[at]
        assert theirs(before)["input_ids"] == asking.before.tolist()
        whole = theirs(f"{before}<image>{behind} {question.answer}")["input_ids"]
        own = asking.texts[row, : asking.lengths[row]].tolist()
        assert whole == [*asking.before, theirs.convert_tokens_to_ids("<image>"), *own, asking.answer[at]]


def test_weights_are_even_over_kinds_then_answers_then_questions(asking: Asking, asked: list[list[Question]]) -> None:
    for scene, questions in enumerate(asked):
        weights = asking.weight[asking.start[scene] : asking.start[scene + 1]]
        assert weights.sum() == pytest.approx(1)
        shares: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
        for question, weight in zip(questions, weights, strict=True):
            shares[question.kind][question.answer].append(weight)
        for answers in shares.values():
            assert sum(sum(w) for w in answers.values()) == pytest.approx(1 / len(shares))
            for weight in answers.values():
                assert weight == pytest.approx([1 / len(shares) / len(answers) / len(weight)] * len(weight))


def test_questions_are_drawn_from_their_scenes_by_weight(asking: Asking) -> None:
    rng = np.random.default_rng(3)
    scenes = np.array([4, SCENES - 1, 0])
    drawn = asking.draw(rng, scenes, 6000)
    assert drawn.shape == (3, 6000)
    for scene, questions in zip(scenes, drawn, strict=True):
        start, stop = asking.start[scene], asking.start[scene + 1]
        assert np.all((questions >= start) & (questions < stop))
        frequency = np.bincount(questions - start, minlength=stop - start) / 6000
        np.testing.assert_allclose(frequency, asking.weight[start:stop], atol=0.02)


def test_a_batch_wants_the_answer_and_then_the_end(asking: Asking) -> None:
    questions = np.array([[0, 3, 40], [7, 11, 200]])
    ids, places, wanted = asking.batch(questions, EOS)
    assert ids.shape == (2, 3, asking.texts.shape[1] + 1)
    assert places.shape == wanted.shape == (2, 3, 2)
    for index, question in np.ndenumerate(questions):
        row = asking.text[question]
        text = asking.texts[row, : asking.lengths[row]]
        complete = [*text, asking.answer[question], EOS]
        np.testing.assert_array_equal(ids[index][: len(text) + 1], complete[:-1])
        assert [complete[place + 1] for place in places[index]] == wanted[index].tolist()
        assert wanted[index].tolist() == [asking.answer[question], EOS]


def test_one_question_of_each_kind_is_asked_for_measuring(tokenizer: tokenizers.Tokenizer) -> None:
    asking = ask(tokenizer, "val", 30, False, Progress(disable=True))
    expected = [world.test_questions(make_scene("val", number)) for number in range(30)]
    np.testing.assert_array_equal(np.diff(asking.start), [len(questions) for questions in expected])
    assert np.all(np.diff(asking.start) <= len(KINDS))
    np.testing.assert_array_equal(asking.kind, [KINDS.index(q.kind) for questions in expected for q in questions])


def test_a_tokenizer_of_another_world_is_refused(tokenizer: tokenizers.Tokenizer) -> None:
    letters = {f"<0x{i:02X}>": i for i in range(256)} | {"<image>": 256}
    other = tokenizers.Tokenizer(tokenizers.models.BPE(letters, [], byte_fallback=True))
    other.add_special_tokens(["<image>"])
    with pytest.raises(CheckpointError, match=r"^tokenizer must have '\w+' as one token, got \d+\. Make it anew\.$"):
        ask(other, "train", 2, True, Progress(disable=True))
