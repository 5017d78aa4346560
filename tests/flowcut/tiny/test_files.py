"""The bundled files: written anew byte for byte, and a tokenizer that fits the world."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from math import prod
from pathlib import Path
from typing import get_args

import pytest
from tokenizers import Tokenizer

from flowcut.aliases import ALIASES, ASSETS
from flowcut.config import LlavaConfig
from flowcut.preprocess import ImageSettings
from flowcut.prompt import question_prompt
from flowcut.tensors import expected_tensors
from flowcut.tiny.drawing import PATCH, PATCHES
from flowcut.tiny.files import VOCABULARY, write_stand_ins
from flowcut.tiny.questions import all_questions
from flowcut.tiny.scenes import SIZE, Split, make_scene

LIMIT_BYTES = 20e6
WRITE = """
import sys
from math import prod
from pathlib import Path
from flowcut.tiny.files import write_tiny
write_tiny(Path(sys.argv[1]))
"""


@pytest.fixture(scope="module")
def tokenizer(tiny_files: Path) -> Tokenizer:
    return Tokenizer.from_file(str(tiny_files / "tokenizer.json"))


def contents(directory: Path) -> dict[str, bytes]:
    """Every file's bytes; a tokenizer's as this release of tokenizers writes it."""
    files = (p for p in directory.rglob("*") if p.is_file())
    return {str(p.relative_to(directory)): _bytes(p) for p in files}


def _bytes(path: Path) -> bytes:
    return Tokenizer.from_file(str(path)).to_str().encode() if path.name == "tokenizer.json" else path.read_bytes()


def differing(written: dict[str, bytes], bundled: dict[str, bytes]) -> list[str]:
    return sorted(n for n in written.keys() | bundled.keys() if written.get(n) != bundled.get(n))


def test_bundled_llava_tiny_has_the_files_that_are_written(tiny_files: Path) -> None:
    bundled = contents(ASSETS / "llava-tiny")
    for name in ("model.safetensors", "calibration.safetensors"):  # what training and calibrating make
        del bundled[name]
    assert differing(contents(tiny_files), bundled) == []


def test_bundled_stand_ins_have_the_files_that_are_written(tmp_path: Path) -> None:
    write_stand_ins(tmp_path)
    folders = [*(name for name, alias in ALIASES.items() if alias.repo), "stand-in"]
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(folders)
    bundled = {f"{folder}/{n}": content for folder in folders for n, content in contents(ASSETS / folder).items()}
    assert differing(contents(tmp_path), bundled) == []


def test_another_process_writes_the_same_bytes(tiny_files: Path, tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONHASHSEED": "5"}
    command = [sys.executable, "-c", WRITE, str(tmp_path)]
    subprocess.run(command, env=environment, check=True, timeout=60)
    assert differing(contents(tmp_path), contents(tiny_files)) == []


def test_config_is_of_this_world_and_fits_the_repository(tiny_files: Path) -> None:
    config = LlavaConfig.from_file(tiny_files / "config.json")
    assert (config.vision.image_size, config.vision.patch_size, config.vision.patches) == (SIZE, PATCH, PATCHES)
    assert config.vision.num_hidden_layers - 2 >= 5, "too few pruning points"
    assert config.text.vocab_size == VOCABULARY
    settings = ImageSettings.from_directory(tiny_files, SIZE)
    assert (settings.image_size, settings.shortest_edge) == (SIZE, SIZE)  # pictures of this world are not resized
    values = sum(prod(shape) for shape in expected_tensors(config).values())
    assert 2 * values + sum(map(len, contents(tiny_files).values())) < LIMIT_BYTES


def test_every_id_is_taken_once(tokenizer: Tokenizer) -> None:
    assert sorted(tokenizer.get_vocab().values()) == list(range(VOCABULARY))


@pytest.mark.parametrize("split", get_args(Split))
def test_every_answer_is_one_token_that_reads_as_the_answer(split: Split, tokenizer: Tokenizer) -> None:
    asked = {(q.text, q.answer) for number in range(60) for q in all_questions(make_scene(split, number))}
    for text in sorted({text for text, _ in asked})[:50]:
        prompt = question_prompt(text)
        before = tokenizer.encode(prompt).ids
        for answer in sorted({answer for _, answer in asked}):
            ids = tokenizer.encode(f"{prompt} {answer}").ids
            assert ids[: len(before)] == before
            assert [tokenizer.decode([i]).strip() for i in ids[len(before) :]] == [answer]


def test_words_of_questions_are_one_token_each(tokenizer: Tokenizer) -> None:
    questions = [q for number in range(100) for q in all_questions(make_scene("test", number))]
    words = {w for q in questions for w in q.text.replace("?", " ").replace(",", " ").split()}
    split = {word for word in words if len(tokenizer.encode(word, add_special_tokens=False).ids) > 1}
    assert split == set()


def test_text_of_any_kind_survives(tokenizer: Tokenizer) -> None:
    for text in ("What is on the zebra's desk, 17 or é?", "naïve 漢字 🦓 ok", "a  b"):
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=True) == text


def test_transformers_reads_the_tokenizer_alike(tiny_files: Path, tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(tiny_files)
    config = json.loads((tiny_files / "config.json").read_text(encoding="utf-8"))
    for question in all_questions(make_scene("test", 0)):
        text = f"{question_prompt(question.text)} {question.answer}"
        assert theirs(text)["input_ids"] == tokenizer.encode(text).ids
    assert theirs.convert_tokens_to_ids("<image>") == config["image_token_index"]
    assert theirs.pad_token_id == config["pad_token_id"]
    assert theirs.eos_token_id == config["text_config"]["eos_token_id"]
