"""How many questions about the scenes of a split a model answers rightly: `flowcut eval`.

To ask one checkpoint under many schedules, load it once and give `ask` an answerer for each:

    pages, eager = make_pages("test"), Eager.load(resolve("llava-tiny"))
    answers = ask(TorchAnswerer(eager, schedule), pages, schedule.selector, progress)
    overall(answers).accuracy

An answer is right if its text, without the spaces around it, is the one word expected.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image
from rich.progress import Progress

from engines.evaluate_score import Answered, by_kind, by_selector, overall
from engines.evaluate_target import Answerer, EvalSettings, Subject, open_target
from flowcut.atomic import write_file
from flowcut.errors import ConfigError, InputError
from flowcut.tiny import questions as world
from flowcut.tiny.scenes import Scene, Split, make_scene, render

SCENES = 400


@dataclass(frozen=True)
class Page:
    """A scene and what is asked about it."""

    scene: Scene
    questions: Sequence[world.Question]


@dataclass(frozen=True)
class Evaluation:
    """Who was asked what, and all answers. `seconds` counts the answering, without loading or exporting."""

    subject: Subject
    split: Split
    answers: list[Answered]
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """What the last line of `flowcut eval` holds."""
        seeds = by_selector(self.answers)
        return {
            **overall(self.answers).to_dict(),
            "by_type": {kind: score.to_dict() for kind, score in by_kind(self.answers).items()},
            **vars(self.subject),
            "seeds": {name: round(share, 6) for name, share in seeds.items()} if len(seeds) > 1 else {},
            "split": self.split,
            "scenes": len({answer.scene for answer in self.answers}),
            "seconds": round(self.seconds, 2),
        }


def evaluate(settings: EvalSettings, progress: Progress) -> Evaluation:
    """Ask an engine directory or a checkpoint the questions of a split.

    Raises:
        ConfigError, CheckpointError, EngineError: a setting or target that does not fit.
        FlowCutError: a library that is not installed, or a disk that refuses the file of answers.
    """
    _check_file(settings.answers)
    pages = make_pages(settings.split, settings.scenes, settings.questions)
    subject, answerers = open_target(settings, progress)
    answers: list[Answered] = []
    seconds = 0.0
    with closing(answerers):
        for name, answerer in answerers:
            start = time.perf_counter()
            answers += ask(answerer, pages, name, progress)
            seconds += time.perf_counter() - start
    if settings.answers is not None:
        lines = [json.dumps(answer.to_dict(), ensure_ascii=False) + "\n" for answer in answers]
        write_file(settings.answers, "".join(lines).encode())
    return Evaluation(subject, settings.split, answers, seconds)


def make_pages(split: Split, scenes: int | None = None, questions: int | None = None) -> list[Page]:
    """The first scenes of a split with their test questions.

    Args:
        scenes: None: 400, or as many as `questions` takes.
        questions: stop after exactly so many; None: all.

    Raises:
        ConfigError: more questions than there are about so many scenes.
    """
    if scenes is None and questions is None:
        scenes = SCENES
    pages: list[Page] = []
    asked = 0
    for number in count() if scenes is None else range(scenes):
        if asked == questions:
            break
        scene = make_scene(split, number)
        some = world.test_questions(scene)[: None if questions is None else questions - asked]
        pages.append(Page(scene, some))
        asked += len(some)
    if questions is not None and asked < questions:
        raise ConfigError(
            f"questions must be at most {asked} (all about {scenes} scenes), got {questions}. "
            "Ask for fewer, or about more --scenes."
        )
    return pages


def ask(
    answerer: Answerer,
    pages: Sequence[Page],
    name: str,
    progress: Progress,
    draw: Callable[[Scene], Image.Image] = render,
) -> list[Answered]:
    """Every question of the pages, answered; `name` is the selector's."""
    answers: list[Answered] = []
    task = progress.add_task(f"{name}: questions", total=sum(len(page.questions) for page in pages))
    try:
        for start in range(0, len(pages), answerer.at_once):
            some = pages[start : start + answerer.at_once]
            texts = [[question.text for question in page.questions] for page in some]
            got = answerer.answer([draw(page.scene) for page in some], texts)
            for page, words in zip(some, got, strict=True):
                answers += _answered(page, words, name)
            progress.update(task, completed=len(answers))
    finally:
        progress.remove_task(task)
    return answers


def _answered(page: Page, words: Sequence[str], name: str) -> Iterator[Answered]:
    for question, got in zip(page.questions, words, strict=True):
        yield Answered(page.scene.number, question.kind, question.text, question.answer, got.strip(), name)


def _check_file(path: Path | None) -> None:
    """Known before anything is computed."""
    if path is not None and (not path.parent.is_dir() or path.is_dir()):
        raise InputError(f"answers must be a file in an existing directory, got {str(path)!r}.")
