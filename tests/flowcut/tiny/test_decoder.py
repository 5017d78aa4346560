"""Questions that share a picture's prefix against each whole sequence on its own; what of a picture is shown."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from references import relative_error
from rich.progress import Progress
from tokenizers import Tokenizer

from flowcut.config import LlavaConfig
from flowcut.language import KVCache
from flowcut.tensors import expected_tensors
from flowcut.tiny import decoder
from flowcut.tiny.asking import Asking, ask
from flowcut.tiny.decoder import LENGTHS, Student, shown_patches
from flowcut.tiny.drawing import PATCHES, Labels
from flowcut.tiny.scenes import Scene, make_scene

SCENES, QUESTIONS = 2, 5

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def student(config: LlavaConfig) -> Student:
    """With norms other than 1, so that forgetting one shows."""
    torch.manual_seed(1)
    built = Student(config).eval()
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.add_(0.2 * torch.randn_like(parameter))
    return built


@pytest.fixture(scope="module")
def asking(tiny_files: Path) -> Asking:
    tokenizer = Tokenizer.from_file(str(tiny_files / "tokenizer.json"))
    return ask(tokenizer, "train", SCENES, True, Progress(disable=True))


@pytest.fixture(scope="module")
def many(stack_labels: Callable[[Iterable[Scene]], Labels]) -> Labels:
    return stack_labels(make_scene("train", number) for number in range(200))


def alone(student: Student, features: torch.Tensor, before: np.ndarray, own: list[int]) -> torch.Tensor:
    """Logits [S, vocab] after each token of `own`, by the runtime's decoder on one whole sequence."""
    visual = len(features)
    ids = torch.tensor([[*before.tolist(), *[0] * visual, *own]])
    rows = torch.full_like(ids, -1)
    rows[0, len(before) : len(before) + visual] = torch.arange(visual)
    with torch.inference_mode():
        embeds = student.multi_modal_projector(features)[None]
        cache = KVCache.allocate(student.config, 1, ids.shape[1])
        hidden = student.language_model(ids, torch.arange(ids.shape[1])[None], rows, embeds, cache)
        return student.language_model.logits(hidden)[0, len(before) + visual :]


@pytest.mark.parametrize("length", [*LENGTHS, 1, 33])
def test_shared_prefix_gives_the_logits_of_each_sequence_alone(length: int, student: Student, asking: Asking) -> None:
    rng = np.random.default_rng(length)
    questions = asking.draw(rng, np.arange(SCENES), QUESTIONS)
    features = torch.from_numpy(rng.normal(0, 1, (SCENES, length, 128)).astype(np.float32))
    ids, places, _ = asking.batch(questions, 2)
    with torch.no_grad():
        together = student(features, *(torch.from_numpy(x) for x in (asking.before, ids, places)))
    assert together.shape == (SCENES, QUESTIONS, 2, student.config.vocab_size)
    assert len({int(end) for end in places[..., 1].flat}) > 1, "questions of one length do not test padding"
    for scene, question in np.ndindex(SCENES, QUESTIONS):
        own = ids[scene, question][: places[scene, question, 1] + 1].tolist()
        expected = alone(student, features[scene], asking.before, own)
        assert relative_error(together[scene, question], expected[places[scene, question]]) < 3e-6


def test_other_questions_and_padding_do_not_show(student: Student, asking: Asking) -> None:
    rng = np.random.default_rng(0)
    questions = asking.draw(rng, np.arange(1), QUESTIONS)
    features = torch.from_numpy(rng.normal(0, 1, (1, 12, 128)).astype(np.float32))
    ids, places, _ = asking.batch(questions, 2)
    changed = ids.copy()
    changed[0, 1:] = 9  # all other questions
    changed[0, 0, places[0, 0, 1] + 1 :] = 9  # what follows the answer
    before, at = torch.from_numpy(asking.before), torch.from_numpy(places)
    with torch.no_grad():
        one, other = (student(features, before, torch.from_numpy(x), at)[0, 0] for x in (ids, changed))
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_names_and_shapes_are_the_checkpoints(config: LlavaConfig, student: Student) -> None:
    expected = {n: shape for n, shape in expected_tensors(config).items() if not n.startswith("vision_tower.")}
    assert {n: tuple(x.shape) for n, x in student.state_dict().items()} == expected


def test_every_parameter_learns(student: Student, asking: Asking) -> None:
    questions = asking.draw(np.random.default_rng(1), np.arange(SCENES), QUESTIONS)
    ids, places, wanted = (torch.from_numpy(x) for x in asking.batch(questions, 2))
    features = torch.randn(SCENES, 12, 128)
    logits = student(features, torch.from_numpy(asking.before), ids, places)
    decoder.loss(logits, wanted).backward()  # type: ignore[no-untyped-call]
    assert [n for n, p in student.named_parameters() if p.grad is None or not p.grad.any()] == []
    student.zero_grad()


def test_loss_is_the_mean_surprise_at_the_wanted_tokens() -> None:
    logits = torch.randn(2, 3, 2, 50)
    wanted = torch.randint(0, 50, (2, 3, 2))
    wanted[1, 2, 1] = -100
    surprise = [-float(logits[i].log_softmax(-1)[w]) for i, w in np.ndenumerate(wanted.numpy()) if w >= 0]
    assert decoder.loss(logits, wanted).item() == pytest.approx(np.mean(surprise), rel=1e-5)


@pytest.mark.parametrize("length", LENGTHS)
def test_every_middle_is_shown_in_ascending_order(length: int, many: Labels) -> None:
    rows = np.arange(len(many))
    for seed in range(3):
        shown = shown_patches(np.random.default_rng(seed), many, rows, length)
        assert shown.shape == (len(many), length)
        assert np.all(np.diff(shown, axis=1) > 0)
        assert shown.min() >= 0
        assert shown.max() < PATCHES
        for row, patches in zip(rows, shown, strict=True):
            assert set(many.centre[row][many.centre[row] >= 0]) <= set(patches)


def test_half_of_the_pictures_show_their_things_before_the_ground(many: Labels) -> None:
    shown = shown_patches(np.random.default_rng(0), many, np.arange(len(many)), 28)
    of_things = np.take_along_axis(many.owner >= 0, shown, 1).sum(1)
    all_of_them = of_things == np.minimum((many.owner >= 0).sum(1), 28)
    assert 0.35 < all_of_them.mean() < 0.65


def test_lengths_are_shares_and_the_whole_picture_is_one() -> None:
    assert sum(LENGTHS.values()) == pytest.approx(1)
    assert max(LENGTHS) == PATCHES
    assert min(LENGTHS) >= 6, "every thing's middle must fit"
