"""Every question about a number of scenes as token ids, ready to be drawn into batches."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.progress import Progress
from tokenizers import Tokenizer

from flowcut.errors import CheckpointError
from flowcut.prompt import IMAGE, question_prompt
from flowcut.tiny.questions import KINDS, all_questions, test_questions
from flowcut.tiny.scenes import Split, make_scene

Asked = tuple[str, str, int]
"""Question, answer, number of its kind."""


@dataclass(frozen=True)
class Asking:
    """Questions of N scenes, scene after scene.

    Attributes:
        before: [P] ids ahead of the picture.
        texts: [T, S] ids of each different question after the picture, padded with 0; lengths: [T].
        start: [N + 1], where each scene's questions begin; text, answer, kind: [Q] of each question, as its row of
            `texts`, its answer's id, and its place in KINDS.
        weight: [Q], summing to 1 in each scene: kinds alike, within a kind answers, within an answer questions.
    """

    before: NDArray[np.int64]
    texts: NDArray[np.int64]
    lengths: NDArray[np.int64]
    start: NDArray[np.int64]
    text: NDArray[np.int64]
    answer: NDArray[np.int64]
    kind: NDArray[np.int64]
    weight: NDArray[np.float64]

    def draw(self, rng: np.random.Generator, scenes: NDArray[np.int64], count: int) -> NDArray[np.int64]:
        """[B, count] questions of each scene by their weights."""
        picks = [
            rng.choice(
                np.arange(self.start[s], self.start[s + 1]), count, p=self.weight[self.start[s] : self.start[s + 1]]
            )
            for s in scenes
        ]
        return np.stack(picks)

    def batch(self, questions: NDArray[np.int64], eos: int) -> tuple[NDArray[np.int64], ...]:
        """ids [..., S + 1] with the answer put behind, places [..., 2] whose next token is wanted, and those tokens."""
        rows, answers = self.text[questions], self.answer[questions]
        ids = np.pad(self.texts[rows], [(0, 0)] * rows.ndim + [(0, 1)])
        end = self.lengths[rows]
        np.put_along_axis(ids, end[..., None], answers[..., None], -1)
        return ids, np.stack([end - 1, end], -1), np.stack([answers, np.full_like(answers, eos)], -1)


def ask(tokenizer: Tokenizer, split: Split, count: int, every: bool, progress: Progress) -> Asking:
    """Tokenize the questions about the first scenes of a split: every one, or one of each kind."""
    scenes = _ask_all(split, count, every, progress)
    texts: dict[str, int] = {}
    answers: dict[str, int] = {}
    for scene in scenes:
        for text, answer, _ in scene:
            texts.setdefault(text, len(texts))
            answers.setdefault(answer, len(answers))
    before, behind = _encode(tokenizer, list(texts))
    flat = [(texts[text], answers[answer], kind) for scene in scenes for text, answer, kind in scene]
    text_row, answer_row, kind = np.array(flat, np.int64).T
    lengths = np.array([len(b) for b in behind])
    padded = np.zeros((len(behind), lengths.max()), np.int64)
    for row, ids in zip(padded, behind, strict=True):
        row[: len(ids)] = ids
    return Asking(
        before=np.array(before, np.int64),
        texts=padded,
        lengths=lengths,
        start=np.cumsum([0, *(len(scene) for scene in scenes)]),
        text=text_row,
        answer=np.array(_answer_ids(tokenizer, list(answers)), np.int64)[answer_row],
        kind=kind,
        weight=np.concatenate([_weights(scene) for scene in scenes]),
    )


def _ask_all(split: Split, count: int, every: bool, progress: Progress) -> list[list[Asked]]:
    task = progress.add_task(f"ask about {count} {split} scenes", total=count)
    jobs = [range(start, min(start + 200, count)) for start in range(0, count, 200)]
    scenes: list[list[Asked]] = []
    with ProcessPoolExecutor(max_workers=len(os.sched_getaffinity(0))) as pool:
        for part in pool.map(_some, [split] * len(jobs), jobs, [every] * len(jobs)):
            scenes += part
            progress.advance(task, len(part))
    return scenes


def _some(split: Split, numbers: range, every: bool) -> list[list[Asked]]:
    questions = all_questions if every else test_questions
    return [[(q.text, q.answer, KINDS.index(q.kind)) for q in questions(make_scene(split, n))] for n in numbers]


def _weights(scene: Sequence[Asked]) -> NDArray[np.float64]:
    kinds, answers = np.array([k for _, _, k in scene]), np.array([f"{k} {a}" for _, a, k in scene])
    of_kind = np.unique(kinds)
    _, answer, of_answer = np.unique(answers, return_inverse=True, return_counts=True)
    different = np.array([len(set(answers[kinds == k])) for k in kinds])
    return 1.0 / (len(of_kind) * different * of_answer[answer])


def _encode(tokenizer: Tokenizer, texts: list[str]) -> tuple[list[int], list[list[int]]]:
    encoded = [e.ids for e in tokenizer.encode_batch([question_prompt(t) for t in texts])]
    place = encoded[0].index(int(tokenizer.token_to_id(IMAGE) or 0))
    return encoded[0][:place], [ids[place + 1 :] for ids in encoded]


def _answer_ids(tokenizer: Tokenizer, answers: list[str]) -> list[int]:
    """The one token that each answer is after "ASSISTANT:".

    Raises:
        CheckpointError: an answer takes several tokens; the tokenizer was not made for this world.
    """
    prompt = question_prompt("?")
    length = len(tokenizer.encode(prompt).ids)
    result = []
    for answer in answers:
        ids = tokenizer.encode(f"{prompt} {answer}").ids[length:]
        if len(ids) != 1:
            raise CheckpointError(f"tokenizer must have {answer!r} as one token, got {len(ids)}. Make it anew.")
        result += ids
    return result
