"""load_engine and LlavaEngine against the torch modules, which recompute every step from scratch."""

from __future__ import annotations

import logging
import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import fake_gpu
import numpy as np
import pytest
import torch
from PIL import Image
from tiny_engine import LIMITS, TinyEngine, write_engine

from engines import load_engine
from engines.backends import gpu_present
from engines.runtime.clock import Clock
from engines.runtime.control import Control
from engines.runtime.engine import LlavaEngine, Sampling
from flowcut.artifacts import read_manifest, write_manifest
from flowcut.config import Precision
from flowcut.errors import ConfigError, EngineError, InputError
from flowcut.language import KVCache, LanguageModel
from flowcut.preprocess import ImageSettings, open_image, pixel_values
from flowcut.prompt import Tokenizer, question_prompt
from flowcut.vision import VisionModel

Write = Callable[..., TinyEngine]

FORCED = np.random.default_rng(0).integers(3, 448, (9, 2))
"""Tokens, [steps, B], that an answer is made to go on with."""
NO_GPU = pytest.mark.skipif(gpu_present(), reason="there is a GPU here")
QUESTIONS = [
    question_prompt("What is this?"),
    question_prompt("How many apples are on the table, and which of them are red?"),
    question_prompt("Name both.", images=2),
]


@pytest.fixture(scope="module")
def write(tmp_path_factory: pytest.TempPathFactory) -> Write:
    """An engine directory, written once for all tests: copy it before changing it."""
    written: dict[tuple[Precision, str], TinyEngine] = {}

    def make(precision: Precision = "fp32", backend: str = "ort") -> TinyEngine:
        key = (precision, backend)
        if key not in written:
            directory = tmp_path_factory.mktemp("runtime") / "-".join(key)
            written[key] = write_engine(directory, precision=precision, backend=backend, random=True)
        return written[key]

    return make


@pytest.fixture(scope="module")
def engine(write: Write) -> LlavaEngine:
    return load_engine(write().directory, "ort", threads=1)


def picture(seed: int, width: int = 210, height: int = 190) -> Image.Image:
    """Smooth, so that patches differ."""
    noise = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


class Reference:
    """The torch modules, fed one prompt at a time and the whole of it for every token."""

    def __init__(self, tiny: TinyEngine) -> None:
        config, weights = tiny.model.config, tiny.model.weights
        self.tiny = tiny
        self.vision, self.language = VisionModel.from_weights(weights), LanguageModel.from_weights(weights)
        path = tiny.model.files / "tokenizer.json"
        self.tokenizer = Tokenizer.from_file(path, config.image_token_id, config.text.vocab_size)
        self.settings = ImageSettings.from_directory(tiny.model.files, config.vision.image_size)

    @torch.inference_mode()
    def answer(self, images: list[Any], prompt: str, steps: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Logits [steps, V], kept [images, T] and the likeliest tokens."""
        pixels = pixel_values([open_image(image) for image in images], self.settings)
        embeds, kept = self.vision(torch.from_numpy(pixels), self.tiny.schedule)
        encoded = self.tokenizer.encode(prompt, [self.tiny.schedule.tokens] * len(images), self.tiny.schedule.tokens)
        ids, rows = encoded.input_ids.tolist(), encoded.image_rows.tolist()
        logits, tokens = [], []
        for _ in range(steps):
            cache = KVCache.allocate(self.language.config, 1, len(ids))
            arguments = torch.tensor([ids]), torch.arange(len(ids))[None], torch.tensor([rows])
            hidden = self.language(*arguments, embeds, cache)
            logits.append(self.language.logits(hidden)[0, -1].numpy())
            tokens.append(int(logits[-1].argmax()))
            ids, rows = [*ids, tokens[-1]], [*rows, -1]
        return np.stack(logits), kept.numpy(), tokens


@pytest.fixture(scope="module")
def torch_reference(write: Write) -> Reference:
    return Reference(write())


def error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def test_prefill_equals_torch(engine: LlavaEngine, torch_reference: Reference) -> None:
    prefill = engine.prefill(picture(0), QUESTIONS[0])
    logits, kept, _ = torch_reference.answer([picture(0)], QUESTIONS[0], 1)
    assert prefill.logits.shape == (1, 1024)
    assert prefill.logits.dtype == np.float32
    assert error(prefill.logits, logits) < 1e-4
    np.testing.assert_array_equal(prefill.kept[0][0], kept[0])


def follow(
    engine: LlavaEngine, images: list[Any], prompts: list[str], forced: np.ndarray
) -> tuple[np.ndarray, list[set[int]]]:
    """Logits [1 + steps, B, V] of a prefill and behind each row of `forced`, and what was kept of first pictures."""
    model, requests = engine.model, engine.reader.read_all(images, prompts, Sampling(1), Control())
    prefill = model.prefill(requests, Clock())
    steps = [model.step(prefill, tokens, step) for step, tokens in enumerate(forced)]
    return np.stack([prefill.logits, *steps]), [set(each[0].tolist()) for each in prefill.kept]


@pytest.mark.parametrize("images", [[0], [1], [2, 3]])
def test_decoding_equals_recomputing_from_scratch(
    engine: LlavaEngine, torch_reference: Reference, images: list[int]
) -> None:
    pictures, prompt = [picture(seed) for seed in images], QUESTIONS[2 if len(images) > 1 else 0]
    answer = engine.generate(pictures, prompt, Sampling(16))
    _, kept, tokens = torch_reference.answer(pictures, prompt, 16)
    assert answer.token_ids == [tokens]
    assert answer.ended == [False]
    assert answer.texts == [torch_reference.tokenizer.decode(tokens)]
    np.testing.assert_array_equal(np.stack(answer.kept[0]), kept)


def test_a_batch_of_different_lengths_equals_each_alone(engine: LlavaEngine) -> None:
    images = [picture(0), [picture(1)], [picture(2), picture(3, 80, 300)]]
    together, generated = engine.prefill(images, QUESTIONS), engine.generate(images, QUESTIONS, Sampling(16))
    assert len(set(together.lengths.tolist())) == 3
    for b, (entry, question) in enumerate(zip(images, QUESTIONS, strict=True)):
        alone = engine.prefill(entry, question)
        assert error(together.logits[b], alone.logits[0]) < 1e-5
        assert [k.tolist() for k in together.kept[b]] == [k.tolist() for k in alone.kept[0]]
        assert together.lengths[b] == alone.lengths[0]
        assert generated.token_ids[b] == engine.generate(entry, question, Sampling(16)).token_ids[0]


def test_the_order_of_two_images_matters(engine: LlavaEngine) -> None:
    first, second = picture(2), picture(3)
    forward, backward = (engine.prefill(pair, QUESTIONS[2]) for pair in ([first, second], [second, first]))
    assert [k.tolist() for k in forward.kept[0]] == [k.tolist() for k in backward.kept[0]][::-1]
    assert error(forward.logits, backward.logits) > 1e-3


def test_a_picture_may_come_in_any_form(engine: LlavaEngine, tmp_path: Path) -> None:
    path, image = tmp_path / "a.png", picture(0)
    image.save(path)
    expected = engine.prefill(image, QUESTIONS[0]).logits
    for form in (path, str(path), path.read_bytes(), np.asarray(image), [image], (image,)):
        np.testing.assert_array_equal(engine.prefill(form, QUESTIONS[0]).logits, expected)
    for many in ([path], [[path]], (str(path),), [np.asarray(image)]):
        np.testing.assert_array_equal(engine.prefill(many, QUESTIONS[:1]).logits, expected)


def test_a_prompt_without_pictures_is_answered(engine: LlavaEngine, torch_reference: Reference) -> None:
    prefill = engine.prefill([], "USER: Hello. ASSISTANT:")
    language, tokenizer = torch_reference.language, torch_reference.tokenizer
    ids = torch.from_numpy(tokenizer.encode("USER: Hello. ASSISTANT:", [], 16).input_ids)[None]
    cache = KVCache.allocate(language.config, 1, ids.shape[1])
    hidden = language(ids, torch.arange(ids.shape[1])[None], torch.full_like(ids, -1), None, cache)
    assert error(prefill.logits, language.logits(hidden)[:, -1].numpy()) < 1e-4
    assert prefill.kept == [[]]
    assert prefill.latency_ms["vision"] < prefill.latency_ms["prefill"]


def test_the_same_request_gives_the_same_answer_after_others(engine: LlavaEngine) -> None:
    first = engine.generate(picture(0), QUESTIONS[0], Sampling(8))
    engine.generate([picture(1)] * 3, [QUESTIONS[0]] * 3, Sampling(20))
    again = engine.generate(picture(0), QUESTIONS[0], Sampling(8))
    assert first.token_ids == again.token_ids


def test_threads_get_the_answers_that_one_caller_gets(engine: LlavaEngine) -> None:
    def ask(seed: int) -> list[list[int]]:
        count = 1 + seed % 2
        return engine.generate([picture(seed)] * count, QUESTIONS[:count], Sampling(6)).token_ids

    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(ask, range(12)))
    assert together == [ask(seed) for seed in range(12)]


def test_fp16_engine_is_close_to_fp32(write: Write, engine: LlavaEngine) -> None:
    half = load_engine(write("fp16").directory)
    images, prompts = [picture(seed) for seed in range(3)], QUESTIONS[:2] + QUESTIONS[:1]
    got, expected = half.prefill(images, prompts), engine.prefill(images, prompts)
    assert got.logits.dtype == np.float32
    assert error(got.logits, expected.logits) < 5e-2
    for a, b in zip(got.kept, expected.kept, strict=True):
        assert len(set(a[0]) & set(b[0])) >= 14  # of 16
    assert len(half.generate(images, prompts, Sampling(4)).token_ids[2]) == 4


def test_members_of_a_batch_end_at_their_own_end_tokens(write: Write, engine: LlavaEngine, tmp_path: Path) -> None:
    images, prompts = [picture(0), picture(1)], QUESTIONS[:2]
    free = engine.generate(images, prompts, Sampling(16)).token_ids
    ends = (free[0][3], free[1][9])
    lengths = [next(i for i, t in enumerate(ids) if t in ends) for ids in free]
    assert lengths[0] != lengths[1]
    directory = tmp_path / "copy"
    shutil.copytree(write().directory, directory)
    manifest = read_manifest(directory)
    write_manifest(directory, replace(manifest, geometry=replace(manifest.geometry, eos_token_ids=ends)))
    answer = load_engine(directory).generate(images, prompts, Sampling(16))
    assert answer.token_ids == [ids[:n] for ids, n in zip(free, lengths, strict=True)]
    assert answer.ended == [True, True]
    longer = load_engine(directory).generate(images, prompts, Sampling(max(lengths)))
    assert longer.ended == [n < max(lengths) for n in lengths]  # the end token itself needs one more


def test_answers_can_fill_the_cache(engine: LlavaEngine, torch_reference: Reference) -> None:
    words = "word " * LIMITS.max_prompt
    prompt, encode = QUESTIONS[0], torch_reference.tokenizer.encode
    fits = [
        p for n in range(len(words)) if len(encode(p := words[:n] + prompt, [16], 16).input_ids) == LIMITS.max_prompt
    ]
    answer = engine.generate(picture(0), fits[0], Sampling(LIMITS.max_new_tokens))
    _, _, tokens = torch_reference.answer([picture(0)], fits[0], LIMITS.max_new_tokens)
    assert answer.token_ids == [tokens]


def test_latencies_are_stages_that_add_up(engine: LlavaEngine) -> None:
    prefill = engine.prefill(picture(91), QUESTIONS[0])  # which it has not seen, so that vision runs
    stages = dict(prefill.latency_ms)
    total = stages.pop("total")
    assert stages.keys() == {"preprocess", "queue", "vision", "prefill"}
    assert all(0 < value < total for value in stages.values())
    assert 0.9 * total < sum(stages.values()) <= total
    assert all(0 < prefill.device_ms[stage] < stages[stage] for stage in ("vision", "prefill"))
    latency = engine.generate(picture(0), QUESTIONS[0], Sampling(8)).latency_ms
    assert latency["time_to_first_token"] > latency["preprocess"] + latency["vision"] + latency["prefill"]
    assert latency["decode"] == pytest.approx(7 * latency["decode_per_token"])
    assert latency["time_to_first_token"] + latency["decode"] < latency["total"]
    one = engine.generate(picture(0), QUESTIONS[0], Sampling(1)).latency_ms
    assert one.keys() == latency.keys() - {"decode_per_token"}  # no step was run


BAD_INPUT: dict[str, tuple[Any, Any, int, str]] = {
    "too many prompts": ([[]] * 4, ["a"] * 4, 4, r"prompts must be at most 3 .*max_batch\), got 4\..*--max-batch 4"),
    "too many images": ([["a.png"] * 5], ["a"], 4, r"images must be at most 4 .*, got 5\..*--max-images 5"),
    "prompt too long": ([[]], ["word " * 70], 4, r"prompt 0 must have 1\.\.64 tokens, got \d+ .*--max-prompt"),
    "no prompt": ([], [], 4, "prompts must be at least one, got 0"),
    "fewer images": (
        ["a.png"],
        ["a", "b"],
        4,
        "one entry for each of 2 prompts, got 1 entries",
    ),
    "one image": ("a.png", ["a", "b"], 4, "for each of 2 prompts, got str"),
    "one array": (np.zeros((2, 9, 3), np.uint8), ["a", "b"], 4, "for each of 2 prompts, got ndarray"),
    "no place": (picture(0), "What is this?", 4, r"prompt must have one <image> for each image \(1\), got 0"),
    "two places": (picture(0), QUESTIONS[2], 4, r"one <image> for each image \(1\), got 2"),
    "empty prompt": ([], " ", 4, "prompt must not be empty"),
    "not text": ([[]], [7], 4, "prompt must be text, got int"),
    "no file": ("nowhere.png", QUESTIONS[0], 4, "image must be an existing file, got 'nowhere.png'"),
    "no picture": (b"not a picture", QUESTIONS[0], 4, "image must be a picture that Pillow reads"),
    "of what": (7, QUESTIONS[0], 4, "image must be a file, bytes, a Pillow image or an array, got int"),
    "many tokens": (picture(0), QUESTIONS[0], 33, r"in 1\.\.32 .*got 33\. .*--max-new-tokens"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_refused_in_one_line(engine: LlavaEngine, case: str) -> None:
    images, prompts, count, message = BAD_INPUT[case]
    with pytest.raises(InputError, match=message) as caught:
        engine.generate(images, prompts, Sampling(count))
    assert "\n" not in str(caught.value)
    assert engine.generate(picture(0), QUESTIONS[0], Sampling(2)).token_ids  # and does no harm


def test_an_engine_of_another_backend_is_refused(write: Write) -> None:
    with pytest.raises(EngineError, match=r"auto, ort for this directory, which .* ort, got 'rtx'\. .*BACKEND=rtx"):
        load_engine(write().directory, "rtx")
    with pytest.raises(EngineError, match="auto, rtx, ort for this directory, which was built for rtx, got 'trt'"):
        load_engine(write("fp16", "rtx").directory, "trt")
    with pytest.raises(EngineError, match="backend must be one of auto, rtx, trt, ort, got 'cpu'"):
        load_engine(write().directory, "cpu")


@NO_GPU
@pytest.mark.parametrize("backend", ["rtx", "trt"])
def test_without_a_gpu_a_compiled_engine_says_what_works(write: Write, backend: str) -> None:
    with pytest.raises(EngineError) as caught:
        load_engine(write("fp16", backend).directory, backend)
    assert str(caught.value) == (
        f"backend {backend} runs on a GPU, and no CUDA GPU is present. "
        "The same directory runs on ONNX Runtime: --backend ort (load_engine(dir, backend='ort'))."
    )


@NO_GPU
def test_auto_without_a_gpu_is_onnx_runtime(write: Write, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "flowcut")
    engine = load_engine(write("fp16", "rtx").directory)
    assert engine.backend == "ort"
    assert engine.manifest.backend == "rtx"
    assert "backend rtx cannot run here (no CUDA GPU is present); using ONNX Runtime." in caplog.messages
    assert engine.generate(picture(0), QUESTIONS[0], Sampling(2)).token_ids[0]


@pytest.mark.parametrize("backend", ["rtx", "trt"])
def test_on_a_gpu_the_answers_are_those_of_onnx_runtime(
    write: Write, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = fake_gpu.install(monkeypatch)
    directory = write("fp16", backend).directory
    images, prompts = [picture(0), [picture(1), picture(2)]], [QUESTIONS[0], QUESTIONS[2]]
    engine = load_engine(directory)
    assert engine.backend == backend
    other = load_engine(directory, "ort")
    got, expected = (e.generate(images, prompts, Sampling(12)) for e in (engine, other))
    assert got.token_ids == expected.token_ids
    assert [[k.tolist() for k in each] for each in got.kept] == [[k.tolist() for k in each] for each in expected.kept]
    before = gpu.allocations, gpu.device_bytes
    for _ in range(3):
        engine.generate(images, prompts, Sampling(3))
    assert (gpu.allocations, gpu.device_bytes) == before
    (logits, _), (same, _) = (follow(each, images, prompts, FORCED) for each in (engine, other))
    np.testing.assert_array_equal(logits, same)


def test_on_a_gpu_without_the_library_auto_is_onnx_runtime(
    write: Write, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_gpu.install(monkeypatch)
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    caplog.set_level(logging.INFO, "flowcut")
    assert load_engine(write("fp16", "rtx").directory).backend == "ort"
    assert any("cuda.core cannot be imported" in message for message in caplog.messages)


CHANGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "missing weights": (lambda d: (d / "language.onnx.data").unlink(), r"language\.onnx\.data: missing"),
    "short weights": (lambda d: _cut(d / "vision.onnx.data"), r"vision\.onnx\.data: expected \d+ bytes, got \d+"),
    "other weights": (lambda d: _flip(d / "language.onnx.data"), r"language\.onnx\.data: expected sha256 \w+, got \w+"),
    "unrecorded weights": (lambda d: _forget(d, "vision.onnx.data"), r"vision\.onnx\.data: not in the manifest"),
    "other graph": (lambda d: _flip(d / "vision.onnx"), r"vision\.onnx: expected sha256 \w+, got \w+"),
    "other tokenizer": (lambda d: _flip(d / "tokenizer.json"), r"tokenizer\.json: expected sha256"),
    "unrecorded": (lambda d: _forget(d, "preprocessor.json"), r"preprocessor\.json: not in the manifest"),
    "several": (
        lambda d: (_cut(d / "vision.onnx"), _flip(d / "tokenizer.json")),
        r"tokenizer.*; vision\.onnx: exp",
    ),
    "no manifest": (lambda d: (d / "manifest.json").unlink(), r"without manifest\.json"),
    "bf16": (lambda d: _write_as(d, precision="bf16"), r"language\.onnx must be a bf16 graph, got one without"),
    "other limits": (lambda d: _write_as(d, limits=replace(LIMITS, max_prompt=65)), r"changed past\.0\.key"),
}


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def _forget(directory: Path, name: str) -> None:
    manifest = read_manifest(directory)
    files = {n: r for n, r in manifest.files.items() if n != name}
    (directory / "manifest.json").write_text(replace(manifest, files=files).sealed().to_json(), encoding="utf-8")


def _write_as(directory: Path, **changes: Any) -> None:
    write_manifest(directory, replace(read_manifest(directory), **changes))


@pytest.mark.parametrize("case", CHANGES)
def test_a_changed_directory_is_refused(write: Write, tmp_path: Path, case: str) -> None:
    change, message = CHANGES[case]
    directory = tmp_path / "copy"
    shutil.copytree(write().directory, directory)
    change(directory)
    with pytest.raises(EngineError, match=message) as caught:
        load_engine(directory)
    assert "\n" not in str(caught.value)


def test_a_changed_plan_is_refused_before_it_is_deserialized(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_gpu.install(monkeypatch)
    directory = tmp_path / "copy"
    shutil.copytree(write("fp16", "rtx").directory, directory)
    _flip(directory / "language.engine")
    with pytest.raises(EngineError, match=r"language\.engine: expected sha256"):
        load_engine(directory)
    with pytest.raises(EngineError, match=r"language\.engine: expected sha256"):
        load_engine(directory, "ort")  # which does not use it


def test_threads_must_be_a_positive_number(write: Write) -> None:
    with pytest.raises(ConfigError, match="threads must be at least 1, got 0"):
        load_engine(write().directory, threads=0)


# float16 rounding grows to 0.15 in this model's logits; those of another step or token differ by more than 1.
@pytest.mark.gpu
@pytest.mark.parametrize(("precision", "same", "tolerance"), [("fp32", 16, 1e-2), ("fp16", 14, 0.3)])
def test_a_compiled_engine_agrees_with_onnx_runtime_on_the_gpu(
    write: Write, tmp_path: Path, precision: Precision, same: int, tolerance: float
) -> None:
    trt = pytest.importorskip("tensorrt_rtx")
    pytest.importorskip("cuda.core")
    from engines.build import build_engine
    from flowcut.contract import language_contract, vision_contract

    directory = tmp_path / "copy"
    tiny = write(precision, "rtx")
    shutil.copytree(tiny.directory, directory)
    for graph, make in (("vision", vision_contract), ("language", language_contract)):
        contract = make(tiny.model.config, tiny.schedule.tokens, precision, LIMITS)
        build_engine(directory / f"{graph}.onnx", directory / f"{graph}.engine", contract, "rtx")
    _write_as(directory, versions={"tensorrt_rtx": trt.__version__})
    images, prompts = [picture(0), picture(1)], QUESTIONS[:2]
    engines = (load_engine(directory, backend) for backend in ("rtx", "ort"))
    (got, kept), (expected, others) = (follow(engine, images, prompts, FORCED) for engine in engines)
    assert all(len(a & b) >= same for a, b in zip(kept, others, strict=True))  # of 16
    assert max(error(a, b) for a, b in zip(got, expected, strict=True)) < tolerance
