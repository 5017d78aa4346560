from __future__ import annotations

import functools
import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, processors, trainers

from flowcut.config import LlavaConfig
from flowcut.errors import CheckpointError, InputError
from flowcut.prompt import Encoded, Pruning, Tokenizer, batch, question_prompt

VOCAB = 640
ASSETS = Path(importlib.util.find_spec("flowcut").submodule_search_locations[0]) / "assets"  # type: ignore[union-attr,index]
CORPUS = ["USER: What is shown in this picture? ASSISTANT: A cat on a mat.", "the quick brown fox, the lazy dog"] * 3
PROMPTS = [
    "USER: <image>\nWhat is shown in this picture? ASSISTANT:",
    "<image>the cat",
    "  two  spaces <image>  \n\n ünïcödé 日本 🐈 ",
    "<image>",
    "a </s> b <image><s>",
]


def llama_like(image: bool = True) -> tokenizers.Tokenizer:
    """Byte-fallback BPE with Llama's normaliser, BOS and decoder, trained on a few sentences."""
    tokenizer = tokenizers.Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = ["<unk>", "<s>", "</s>", *(["<image>"] if image else []), *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=500, special_tokens=special))
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint")
    llama_like().save(str(path / "tokenizer.json"))
    (path / "config.json").write_text(json.dumps({"model_type": "llava"}))
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.fixture(scope="module")
def tokenizer(directory: Path) -> Tokenizer:
    return Tokenizer.from_file(directory / "tokenizer.json", image_token_id=3, vocab_size=VOCAB)


@functools.cache
def trained() -> Tokenizer:
    return Tokenizer(llama_like(), image_token_id=3, vocab_size=VOCAB)


def auto_tokenizer(directory: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_ids_equal_auto_tokenizer(prompt: str, tokenizer: Tokenizer, directory: Path) -> None:
    ids = auto_tokenizer(directory)(prompt)["input_ids"]
    assert ids[0] == 1
    np.testing.assert_array_equal(tokenizer.encode(prompt, [1], 1).input_ids, ids)


def test_ids_equal_llava_processor(tokenizer: Tokenizer, directory: Path) -> None:
    from PIL import Image
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size=28),
        auto_tokenizer(directory),
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    prompt = question_prompt("What is shown?", images=2)
    images = [Image.new("RGB", (30, 40)), Image.new("RGB", (50, 40))]
    got = tokenizer.encode(prompt, rows=[16, 16], slots=16)
    assert got.input_ids.tolist() == np.asarray(processor(images=images, text=prompt)["input_ids"])[0].tolist()


@pytest.mark.parametrize("alias", ["llava-tiny", "llava-1.5-7b", "llava-1.5-13b", "llava-v1.6-vicuna-7b"])
def test_bundled_tokenizer_equals_transformers(alias: str) -> None:
    config = LlavaConfig.from_file(ASSETS / alias / "config.json")
    tokenizer = Tokenizer.from_file(ASSETS / alias / "tokenizer.json", config.image_token_id, config.text.vocab_size)
    reference = auto_tokenizer(ASSETS / alias)
    for prompt in [question_prompt("What is shown in the picture?"), *PROMPTS]:
        ids = reference(prompt)["input_ids"]
        assert tokenizer.encode(prompt, [1], 1).input_ids.tolist() == ids
        assert tokenizer.decode(ids) == reference.decode(ids, skip_special_tokens=True)


def test_each_place_becomes_rows_of_its_image(tokenizer: Tokenizer) -> None:
    got = tokenizer.encode("a <image> b <image>", rows=[3, 3], slots=3)
    assert got.input_ids.dtype == got.image_rows.dtype == np.int64
    assert got.image_rows[got.image_rows >= 0].tolist() == [0, 1, 2, 3, 4, 5]
    np.testing.assert_array_equal(got.input_ids == 3, got.image_rows >= 0)
    single = tokenizer.encode("a <image> b <image>", rows=[1, 1], slots=1)
    np.testing.assert_array_equal(got.input_ids[got.input_ids != 3], single.input_ids[single.input_ids != 3])


def test_image_token_absent_from_the_file_is_added_and_mapped(tmp_path: Path) -> None:
    plain = llama_like(image=False)
    plain.save(str(tmp_path / "tokenizer.json"))
    size = plain.get_vocab_size()
    # The added id equals vocab_size, which the model lacks: it never leaves, as config's 300 stands for it
    got = Tokenizer.from_file(tmp_path / "tokenizer.json", 300, size).encode("<image>the cat", [2], 2)
    assert got.input_ids[:3].tolist() == [1, 300, 300]
    assert got.image_rows[:4].tolist() == [-1, 0, 1, -1]
    assert got.input_ids[3:].tolist() == plain.encode("the cat", add_special_tokens=False).ids


def test_padding_and_truncation_of_the_file_are_ignored(tmp_path: Path, tokenizer: Tokenizer) -> None:
    other = llama_like()
    other.enable_padding(length=64)
    other.enable_truncation(4)
    other.save(str(tmp_path / "tokenizer.json"))
    got = Tokenizer.from_file(tmp_path / "tokenizer.json", 3, VOCAB).encode(PROMPTS[0], [5], 5)
    np.testing.assert_array_equal(got.input_ids, tokenizer.encode(PROMPTS[0], [5], 5).input_ids)


@pytest.mark.parametrize(
    ("prompt", "images", "match"),
    [
        ("What?", 1, r"each image \(1\), got 0\. Put <image> where each picture belongs"),
        ("<image><image>", 1, r"each image \(1\), got 2"),
        ("<image>", 2, r"each image \(2\), got 1"),
        ("", 0, "must not be empty, got ''"),
        (" \n", 0, "must not be empty"),
        (None, 0, "must be text, got NoneType"),
        (b"<image>", 1, "must be text, got bytes"),
        ("<image>\udcff", 1, "valid Unicode"),
    ],
)
def test_refuses_a_prompt_in_one_line(prompt: Any, images: int, match: str, tokenizer: Tokenizer) -> None:
    with pytest.raises(InputError, match=match) as raised:
        tokenizer.encode(prompt, [4] * images, 4)
    assert "\n" not in str(raised.value)


def test_missing_and_malformed_files_are_checkpoint_errors(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(CheckpointError, match=r"tokenizer\.json does not exist"):
        Tokenizer.from_file(path, 3, VOCAB)
    for content in (b"", b"{}", b"{", b"\xff\xfe", b"[]"):
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"tokenizer\.json must be"):
            Tokenizer.from_file(path, 3, VOCAB)


def test_ids_beyond_the_models_vocabulary_are_refused(directory: Path) -> None:
    with pytest.raises(CheckpointError, match=r"below 100 \(text_config.vocab_size\), got \d+"):
        Tokenizer.from_file(directory / "tokenizer.json", 3, 100)


def test_decode_equals_transformers_and_skips_what_is_no_text(tokenizer: Tokenizer, directory: Path) -> None:
    ids = tokenizer.encode("<image>A cat on  the mat 日本 🐈", [4], 4).input_ids
    noisy = [*ids, 2, 10**6, 2**40, -1]
    assert tokenizer.decode(noisy) == auto_tokenizer(directory).decode(ids.tolist(), skip_special_tokens=True)
    assert tokenizer.decode(noisy).strip() == "A cat on  the mat 日本 🐈"
    assert tokenizer.decode([]) == ""


@settings(max_examples=50, deadline=None)
@given(text=st.text(min_size=1, max_size=30).filter(lambda t: t.strip() and "<" not in t))
def test_any_text_survives_encode_and_decode(text: str) -> None:
    tokenizer = trained()
    assert tokenizer.decode(tokenizer.encode(text, [], 4).input_ids.tolist()) == text.replace("▁", " ")


def encoded(length: int, spans: list[tuple[int, int]], slots: int = 2) -> Encoded:
    """A prompt of `length` tokens with pictures at these spans."""
    image_rows = np.full(length, -1, np.int64)
    for i, (first, count) in enumerate(spans):
        image_rows[first : first + count] = i * slots + np.arange(count)
    ids = np.arange(10, 10 + length, dtype=np.int64)
    return Encoded(ids, image_rows, np.array(spans, np.int64).reshape(-1, 2), slots)


def test_batch_pads_on_the_right_and_numbers_images_through() -> None:
    got = batch([encoded(4, [(1, 2)]), encoded(2, []), encoded(5, [(0, 2), (2, 2)])], limit=5)
    assert got.image_rows.tolist() == [[-1, 0, 1, -1, -1], [-1] * 5, [2, 3, 4, 5, -1]]
    assert got.input_ids.tolist() == [[10, 11, 12, 13, 0], [10, 11, 0, 0, 0], [10, 11, 12, 13, 14]]
    assert got.position_ids.tolist() == got.pruned_position_ids.tolist() == [[0, 1, 2, 3, 4]] * 3
    assert got.lengths.tolist() == [4, 2, 5]
    assert got.last_token.tolist() == [3, 1, 4]
    assert got.image_spans.tolist() == [[0, 1, 2], [2, 0, 2], [2, 2, 2]]
    assert {array.dtype for array in vars(got).values()} == {np.dtype(np.int64)}


def test_pictures_of_fewer_rows_than_slots_leave_gaps_between_their_numbers(tokenizer: Tokenizer) -> None:
    got = tokenizer.encode("a <image> b <image><image>", rows=[3, 1, 5], slots=5)
    assert got.image_rows[got.image_rows >= 0].tolist() == [0, 1, 2, 5, 10, 11, 12, 13, 14]
    assert got.spans[:, 1].tolist() == [3, 1, 5]
    for (first, count), picture in zip(got.spans.tolist(), range(3), strict=True):
        assert got.image_rows[first : first + count].tolist() == [picture * 5 + i for i in range(count)]
    single = tokenizer.encode("a <image> b <image><image>", rows=[1, 1, 1], slots=1).input_ids
    assert got.input_ids[got.input_ids != 3].tolist() == single[single != 3].tolist()
    together = batch([tokenizer.encode("<image>", [2], 5), got], 99)
    assert together.image_rows[1][: len(got.input_ids)].max() == 5 + 14
    assert together.image_spans.tolist() == [[0, 1, 2], *([1, *span] for span in got.spans.tolist())]


def test_positions_behind_the_pruning_are_those_of_the_longest_prompt_left() -> None:
    prompts = [encoded(9, [(1, 7)], 7), encoded(5, []), encoded(9, [(0, 3), (4, 4)], 7)]
    got = batch(prompts, 9, Pruning(llm_tokens=3, limit=9))
    assert got.pruned_position_ids.tolist() == [list(range(8))] * 3  # 9 - 4, 5 and 9 - 1
    assert got.position_ids.shape == (3, 9)


def test_batch_refuses_a_prompt_too_long_behind_the_pruning() -> None:
    """A text of max_prompt tokens: the limit there is for a prompt with a picture."""
    batch([encoded(6, [])], 10, Pruning(llm_tokens=3, limit=6))
    with pytest.raises(InputError, match=r"prompt 1 must have at most 6 .*cut to 3.*, got 8\. .*--max-prompt 12\."):
        batch([encoded(10, [(0, 7)], 7), encoded(8, [])], 10, Pruning(llm_tokens=3, limit=6))


def test_batch_refuses_a_prompt_beyond_the_limit() -> None:
    with pytest.raises(
        InputError, match=r"prompt 1 must have 1\.\.3 tokens, got 4 \(2 of them visual\).*--max-prompt 4"
    ):
        batch([encoded(1, []), encoded(4, [(1, 2)])], limit=3)


def test_a_picture_last_is_refused_where_the_last_token_scores_the_pictures() -> None:
    """It would be one of its own keys, and nearly all of the semantic softmax its own."""
    last = [encoded(4, [(0, 2)]), encoded(4, [(2, 2)])]
    message = r"^prompt 1 must end with text where its last token chooses the visual tokens, got <image> last\. "
    with pytest.raises(InputError, match=message) as raised:
        batch(last, 9, Pruning(llm_tokens=1, limit=9))
    assert "\n" not in str(raised.value)
    assert batch(last, 9).last_token.tolist() == [3, 3]
    batch([encoded(5, [(2, 2)]), encoded(3, [])], 9, Pruning(llm_tokens=1, limit=9))


@pytest.mark.parametrize("end", ["\n", " ", "?"])
def test_any_text_behind_the_pictures_is_an_end(end: str, tokenizer: Tokenizer) -> None:
    batch([tokenizer.encode(f"What? <image>{end}", [3], 3)], 99, Pruning(llm_tokens=1, limit=99))


def test_batch_refuses_no_prompt() -> None:
    with pytest.raises(InputError, match="at least one"):
        batch([], limit=3)


def test_question_prompt_is_llavas_template() -> None:
    assert question_prompt("Why?") == "USER: <image>\nWhy? ASSISTANT:"
    assert question_prompt("Why?", images=2) == "USER: <image>\n<image>\nWhy? ASSISTANT:"
    assert question_prompt("Why?", images=0) == "USER: Why? ASSISTANT:"


@pytest.mark.parametrize("alias", ["llava-tiny", "llava-1.5-7b", "llava-v1.6-vicuna-7b", "llava-v1.6-vicuna-13b"])
def test_question_prompt_is_the_bundled_chat_template(alias: str) -> None:
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Why?"}]
    text = auto_tokenizer(ASSETS / alias).apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    assert text == question_prompt("Why?", images=2, anyres="v1.6" in alias)


def test_question_prompt_of_llava_next_is_vicunas() -> None:
    assert question_prompt("Why?", anyres=True) == (
        "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the human's questions. USER: <image>\nWhy? ASSISTANT:"
    )


@pytest.mark.parametrize(
    ("question", "message"), [(5, "must be text, got int"), ("x" * 300_000, "got 300000. Shorten")]
)
def test_a_question_is_refused_before_it_is_put_into_a_template(question: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        question_prompt(question)
