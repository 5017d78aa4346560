"""`flowcut prune --question`: what the language model leaves, equal on both backends to what a built engine keeps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import WriteCheckpoint
from next_checkpoint import PINPOINTS, write_next
from PIL import Image
from rich.progress import Progress
from tiny_engine import TinyEngine, write_engine

from engines import load_engine
from engines.prune import PruneSettings, prune
from engines.prune_result import Outcome
from engines.prune_torch import EMBEDDINGS, _first_layers
from flowcut.aliases import resolve
from flowcut.cli import main
from flowcut.contract import Limits
from flowcut.errors import CheckpointError, InputError
from flowcut.prompt import question_prompt

pytestmark = pytest.mark.usefixtures("one_thread")
QUESTION = "What color is the circle?"
LIMITS = Limits(max_batch=1, max_images=1, max_prompt=480, max_new_tokens=1)
SIZES = {"wide": (200, 60), "tall": (70, 160), "square": (130, 130), "line": (400, 1)}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Smooth, so that patches differ."""
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(5)
    for name, size in SIZES.items():
        noise = Image.fromarray(rng.integers(0, 256, (7, 7, 3), dtype=np.uint8))
        noise.resize(size, Image.Resampling.BICUBIC).save(root / f"{name}.png")
    return {name: root / f"{name}.png" for name in SIZES}


@pytest.fixture(scope="module")
def plain(checkpoint: WriteCheckpoint) -> Path:
    """LLaVA-1.5 of random weights: 64 patches, 3 decoder layers or more."""
    return checkpoint("tiny", seed=2)


@pytest.fixture(scope="module")
def following(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA-NeXT of the same."""
    return write_next(plain, tmp_path_factory.mktemp("next") / "checkpoint")


def run(model: str | Path, images: tuple[Path, ...] = (), **options: Any) -> Outcome:
    settings = {"question": QUESTION, "schedule": "static", **options}
    return prune(PruneSettings(str(model), images=images, **settings), Progress(disable=True))


def engines_choice(tiny: TinyEngine, images: tuple[Path, ...], question: str = QUESTION) -> list[list[int]]:
    """What the runtime says was kept of each picture, asked alone."""
    engine, prompt = load_engine(tiny.directory, threads=1), question_prompt(question, 1, tiny.model.config.anyres)
    return [engine.prefill([image], prompt).kept[0][0].tolist() for image in images]


@pytest.mark.parametrize("schedule", ["static", "masked"])
def test_llava_keeps_what_an_engine_keeps(schedule: str, pictures: dict[str, Path], tmp_path: Path) -> None:
    images = tuple(pictures.values())
    tiny = write_engine(tmp_path / "e", tokens=48, llm_tokens=16, limits=LIMITS, schedule=schedule)
    expected = engines_choice(tiny, images)
    encoder = [
        set(row)
        for row in run("llava-tiny", images, tokens=48, llm_tokens=16, schedule=schedule).to_dict()["kept_encoder"]
    ]
    for backend in ("torch", "ort"):
        outcome = run("llava-tiny", images, tokens=48, llm_tokens=16, schedule=schedule, backend=backend)
        result = outcome.to_dict()
        assert result["kept"] == expected
        assert [set(row) for row in result["kept_encoder"]] == encoder
        assert (result["llm_tokens"], result["question"]) == (16, QUESTION)
    assert all(len(row) == 16 and set(row) < kept for row, kept in zip(expected, encoder, strict=True))


@pytest.mark.parametrize("backend", ["torch", "ort"])
def test_llava_next_keeps_what_an_engine_keeps(
    backend: str, following: Path, pictures: dict[str, Path], tmp_path: Path
) -> None:
    """Pictures of 3, 4 and 5 tiles together, and one that has fewer patches outside the padding than the budget."""
    images = tuple(pictures.values())
    expected = engines_choice(write_engine(tmp_path / "e", str(following), tokens=24, limits=LIMITS), images)
    outcome = run(following, images, tokens=24, backend=backend, out=tmp_path / "a.npz", overlay=tmp_path / "a.png")
    result = outcome.to_dict()
    assert result["kept"] == expected
    assert [len(row) for row in expected[:3]] == [24, 24, 24]
    assert result["kept"][3] == result["kept_encoder"][3] == result["tile_kept"][-3]
    assert result["kept_encoder"] == run(following, images, tokens=24, backend=backend, question=None).to_dict()["kept"]
    assert json.loads(json.dumps(result)) == result
    with np.load(tmp_path / "a.npz") as data:
        assert sorted(data.files) == ["counts", "features", "grids", "kept", "kept_encoder", "tile_kept"]
        for name in ("kept", "kept_encoder"):
            for row, kept in zip(data[name], result[name], strict=True):
                assert [number for number in row.tolist() if number >= 0] == kept
                assert (row[len(kept) :] == -1).all()


def test_lone_tiles_newline_is_of_the_budget_but_no_patch(
    plain: Path, pictures: dict[str, Path], tmp_path: Path
) -> None:
    lone, images = write_next(plain, tmp_path / "lone", pinpoints=()), (pictures["wide"], pictures["tall"])
    expected = engines_choice(write_engine(tmp_path / "e", str(lone), tokens=24, limits=LIMITS), images)
    for backend in ("torch", "ort"):
        assert run(lone, images, tokens=24, backend=backend).to_dict()["kept"] == expected


def test_other_questions_leave_other_patches(pictures: dict[str, Path]) -> None:
    options = {"tokens": 48, "llm_tokens": 16}
    one, two = (
        run("llava-tiny", (pictures["wide"],), question=text, **options) for text in (QUESTION, "Which letter?")
    )
    assert one.to_dict()["kept_encoder"] == two.to_dict()["kept_encoder"]
    assert one.to_dict()["kept"] != two.to_dict()["kept"]


def test_pictures_do_not_depend_on_those_beside_them(following: Path, pictures: dict[str, Path]) -> None:
    together = run(following, tuple(pictures.values()), tokens=24, schedule="adaptive").to_dict()["kept"]
    alone = [
        run(following, (image,), tokens=24, schedule="adaptive").to_dict()["kept"][0] for image in pictures.values()
    ]
    assert together == alone


@pytest.mark.parametrize("backend", ["torch", "ort"])
def test_language_model_may_be_the_only_one_that_drops(backend: str, pictures: dict[str, Path], tmp_path: Path) -> None:
    images = (pictures["wide"], pictures["tall"])
    tiny = write_engine(tmp_path / "e", tokens="all", llm_tokens=20, limits=LIMITS)
    outcome = run("llava-tiny", images, tokens="all", llm_tokens=20, backend=backend, overlay=tmp_path / "a.png")
    assert outcome.to_dict()["kept"] == engines_choice(tiny, images)
    assert outcome.to_dict()["kept_encoder"] == [list(range(144))] * 2


def test_page_shows_the_language_model_last(following: Path, pictures: dict[str, Path], tmp_path: Path) -> None:
    pages = {}
    for question in (None, QUESTION):
        tokens = {"tokens": 48, "llm_tokens": None if question is None else 16}
        run("llava-tiny", (pictures["wide"],), question=question, overlay=tmp_path / "a.png", **tokens)
        run(following, (pictures["wide"],), question=question, tokens=24, overlay=tmp_path / "b.png")
        pages[question] = [np.asarray(Image.open(tmp_path / name).convert("RGB")) for name in ("a.png", "b.png")]
    (six, four), (seven, also_four) = pages[None], pages[QUESTION]
    assert seven.shape[1] > six.shape[1]
    assert four.shape == also_four.shape
    last = four.shape[1] * 4 // 5
    assert (four[:, last:] != also_four[:, last:]).any()


def test_of_the_language_model_only_what_the_scores_need_is_read(following: Path) -> None:
    read: list[str] = []

    class Watched:
        def __init__(self, weights: Any) -> None:
            self.config, self._weights = weights.config, weights

        def load(self, name: str) -> Any:
            read.append(name)
            return self._weights.load(name)

    _first_layers(Watched(resolve(str(following)).weights))  # type: ignore[arg-type]
    second = {name.split("layers.1.")[1] for name in read if ".layers.1." in name}
    assert second == {"input_layernorm.weight", *(f"self_attn.{part}_proj.weight" for part in "qkvo")}
    assert {name.split(".")[3] for name in read} == {"0", "1"}
    assert EMBEDDINGS not in read


@pytest.mark.parametrize("backend", ["torch", "ort"])
@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"llm_tokens": 16, "question": None},
            r"question must be given with llm_tokens, got none with 16: .* last token",
        ),
        ({}, r"llm_tokens must be given with question for LLaVA-1\.5, got none with 'What color"),
        ({"llm_tokens": 16, "question": "  "}, r"question must not be empty, got '  '"),
        ({"llm_tokens": 16, "question": "<image>?"}, r"prompt must have one <image> for each image \(1\), got 2"),
        (
            {"llm_tokens": 16, "question": "a " * 5000},
            r"question must make a prompt of at most \d+ tokens .*, got \d+ \(48",
        ),
    ],
)
def test_question_that_cannot_choose_is_refused(
    backend: str, options: dict[str, Any], match: str, pictures: dict[str, Path]
) -> None:
    with pytest.raises(InputError, match=match):
        run("llava-tiny", (pictures["wide"],), tokens=48, backend=backend, **options)


def test_question_is_refused_where_llava_next_drops_nothing(following: Path, pictures: dict[str, Path]) -> None:
    with pytest.raises(InputError, match=r"question must not be given with tokens 'all', got 'What color"):
        run(following, (pictures["wide"],), tokens="all")


def test_token_embedding_that_is_not_finite_is_named(
    checkpoint: WriteCheckpoint, pictures: dict[str, Path], tmp_path: Path
) -> None:
    from safetensors.numpy import load_file, save_file

    out = write_next(checkpoint("tiny", seed=2), tmp_path / "bad", PINPOINTS)
    tensors = load_file(out / "model.safetensors")
    tensors[EMBEDDINGS][:] = np.nan
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight must be finite"):
        run(out, (pictures["wide"],), tokens=24)


def test_command_takes_the_question(pictures: dict[str, Path], capfd: pytest.CaptureFixture[str]) -> None:
    options = ["--tokens", "48", "--llm-tokens", "16", "--question", QUESTION, "--image", str(pictures["wide"])]
    with pytest.raises(SystemExit) as ended:
        main(["prune", "llava-tiny", *options])
    *text, line = capfd.readouterr().out.splitlines()
    assert ended.value.code == 0
    result = run("llava-tiny", (pictures["wide"],), tokens=48, llm_tokens=16, schedule="adaptive").to_dict()
    assert json.loads(line) == result
    assert text[-2:] == [f"question {QUESTION}", "0        16 of 48 patches"]
