"""From a checkpoint to answers: transformers, the torch modules and engine directories on ONNX Runtime agree.

Directories are made as `flowcut engine` makes them. Errors are max|a-b| / max|b|.
"""

from __future__ import annotations

import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import skimage.data
import torch
from conftest import WriteCheckpoint
from next_checkpoint import write_next
from PIL import Image
from references import relative_error
from rich.progress import Progress

from engines import load_engine
from engines.ask import Question, ask
from engines.backends import gpu_present
from engines.pipeline import BuildSettings, Built, build_directory
from engines.runtime.engine import LlavaEngine, Sampling
from flowcut.aliases import ASSETS, Model, resolve
from flowcut.artifacts import check_files, read_manifest
from flowcut.deps import available
from flowcut.errors import EngineError
from flowcut.language import KVCache, LanguageModel
from flowcut.preprocess import ImageSettings, open_image, pixel_values
from flowcut.prompt import Encoded, Tokenizer, question_prompt
from flowcut.schedule import Schedule, make_schedule
from flowcut.vision import VisionModel

transformers = pytest.importorskip("transformers")

MODELS = ("seeded", "llava-tiny")
PATCHES = {"seeded": 64, "llava-tiny": 144}
TOKENS = {"seeded": 9, "llava-tiny": 16}
STEPS = 32
QUESTION = question_prompt("What is on the table, and who sits beside it?")
NEVER_ENDS = (511,)
"""In place of the end token, so that answers of random weights are as long as asked for."""

Engines = Callable[..., LlavaEngine]
Build = Callable[..., Built]


@pytest.fixture(scope="module")
def directories(checkpoint: WriteCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoint directories by name: one of the seeded recipe, with a tokenizer, and the bundled one."""
    seeded = tmp_path_factory.mktemp("checkpoint") / "seeded"
    shutil.copytree(checkpoint("tiny", seed=3), seeded)
    shutil.copy(ASSETS / "stand-in" / "tokenizer.json", seeded)
    return {"seeded": seeded, "llava-tiny": ASSETS / "llava-tiny"}


@pytest.fixture(scope="module")
def build(directories: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Build:
    """build(model, tokens, schedule, precision, backend) -> what `flowcut engine` makes, once for all tests."""
    root, made = tmp_path_factory.mktemp("engines"), dict[tuple[Any, ...], Built]()

    def make(
        model: str,
        tokens: int | str = "all",
        schedule: str = "static",
        precision: Any = "fp32",
        backend: str = "ort",
    ) -> Built:
        key = (model, tokens, schedule, precision, backend)
        if key not in made:
            settings = BuildSettings(
                str(directories[model]),
                tokens=tokens,
                schedule=schedule,
                precision=precision,
                backend=backend,
                max_new_tokens=40,
                out=root / "-".join(map(str, key)),
            )
            made[key] = build_directory(settings, Progress(disable=True))
        return made[key]

    return make


@pytest.fixture(scope="module")
def engine(build: Build) -> Engines:
    """As `build`, loaded on ONNX Runtime, and never ending an answer by itself."""

    def load(*key: Any) -> LlavaEngine:
        loaded = load_engine(build(*key).directory, "ort", threads=1)
        loaded.manifest = replace(loaded.manifest, geometry=replace(loaded.manifest.geometry, eos_token_ids=NEVER_ENDS))
        return loaded

    return load


class Eager:
    """The torch modules, which keep a cache, and what they are fed."""

    def __init__(self, directory: Path) -> None:
        self.model: Model = resolve(str(directory))
        config, weights = self.model.config, self.model.weights
        self.vision, self.language = VisionModel.from_weights(weights), LanguageModel.from_weights(weights)
        path = self.model.files / "tokenizer.json"
        self.tokenizer = Tokenizer.from_file(path, config.image_token_id, config.text.vocab_size)
        self.settings = ImageSettings.from_directory(self.model.files, config.vision.image_size)

    def schedule(self, spec: str, tokens: int) -> Schedule:
        return make_schedule(spec, self.model.config.vision, tokens)

    def pixels(self, pictures: Sequence[Any]) -> torch.Tensor:
        return torch.from_numpy(pixel_values([open_image(picture) for picture in pictures], self.settings))

    @torch.inference_mode()
    def answer(self, picture: Any, schedule: Schedule, steps: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Logits after the prompt [V], kept [T] and the likeliest tokens, decoded with the cache."""
        embeds, kept = self.vision(self.pixels([picture]), schedule)
        encoded = self.tokenizer.encode(QUESTION, [schedule.tokens], schedule.tokens)
        length = len(encoded.input_ids)
        cache = KVCache.allocate(self.language.config, 1, length + steps)
        ids, rows = (torch.from_numpy(a)[None] for a in (encoded.input_ids, encoded.image_rows))
        hidden = self.language(ids, torch.arange(length)[None], rows, embeds, cache)
        logits = [self.language.logits(hidden)[0, -1]]
        for step in range(steps - 1):
            token, position = logits[-1].argmax().reshape(1, 1), torch.tensor([[length + step]])
            hidden = self.language(token, position, torch.tensor([[-1]]), embeds, cache)
            logits.append(self.language.logits(hidden)[0, -1])
        return logits[0].numpy(), kept[0].numpy(), [int(row.argmax()) for row in logits]


@pytest.fixture(scope="module")
def eager(directories: dict[str, Path]) -> Callable[[str], Eager]:
    made: dict[str, Eager] = {}
    return lambda model: made.setdefault(model, made.get(model) or Eager(directories[model]))


@dataclass(frozen=True)
class Theirs:
    """What transformers' model makes of the photograph and the question."""

    encoded: Encoded
    logits: np.ndarray
    """Of every position, [S, V]."""
    tokens: list[int]


@pytest.fixture(scope="module")
def theirs(directories: dict[str, Path], eager: Callable[[str], Eager]) -> Callable[[str], Theirs]:
    made: dict[str, Theirs] = {}
    return lambda model: made.setdefault(model, made.get(model) or _ask_transformers(directories[model], eager(model)))


@torch.inference_mode()
def _ask_transformers(directory: Path, eager: Eager) -> Theirs:
    model = transformers.LlavaForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    encoded = eager.tokenizer.encode(QUESTION, [patches := eager.model.config.vision.patches], patches)
    ids = torch.from_numpy(encoded.input_ids)[None]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": eager.pixels([photograph()])}
    logits = model(**inputs).logits[0].numpy()
    model.generation_config.eos_token_id = None
    tokens = model.generate(**inputs, do_sample=False, max_new_tokens=STEPS)[0, ids.shape[1] :].tolist()
    return Theirs(encoded, logits, tokens)


def photograph() -> Image.Image:
    return Image.fromarray(skimage.data.coffee())


def another(seed: int) -> Image.Image:
    """Part of another photograph, of another shape."""
    left = 40 * seed
    return Image.fromarray(skimage.data.astronaut()[: 400 - left, left : left + 300])


@pytest.mark.parametrize("model", MODELS)
def test_torch_modules_equal_transformers_with_pruning_off(
    model: str, eager: Callable[[str], Eager], theirs: Callable[[str], Theirs]
) -> None:
    ours, reference = eager(model), theirs(model)
    embeds, _ = ours.vision(ours.pixels([photograph()]), ours.schedule("static", PATCHES[model]))
    ids, rows = (torch.from_numpy(a)[None] for a in (reference.encoded.input_ids, reference.encoded.image_rows))
    cache = KVCache.allocate(ours.language.config, 1, ids.shape[1])
    hidden = ours.language(ids, torch.arange(ids.shape[1])[None], rows, embeds, cache)
    assert relative_error(ours.language.logits(hidden)[0].numpy(), reference.logits) < 1e-5
    _, kept, tokens = ours.answer(photograph(), ours.schedule("static", PATCHES[model]), STEPS)
    assert tokens == reference.tokens
    least = {"seeded": 5, "llava-tiny": 2}[model]  # a trained model says a word, and then that it has ended
    assert len(set(tokens)) >= least, "an answer of one token repeated would prove little"
    assert kept.tolist() == list(range(PATCHES[model]))


@pytest.mark.parametrize("model", MODELS)
def test_engine_equals_transformers_with_pruning_off(
    model: str, engine: Engines, theirs: Callable[[str], Theirs]
) -> None:
    reference, ours = theirs(model), engine(model)
    prefill = ours.prefill(photograph(), QUESTION)
    assert prefill.lengths.tolist() == [len(reference.encoded.input_ids)]
    assert relative_error(prefill.logits[0], reference.logits[-1]) < 1e-5
    assert ours.generate(photograph(), QUESTION, Sampling(STEPS)).token_ids == [reference.tokens]


@pytest.mark.parametrize("schedule", ["static", "masked"])
@pytest.mark.parametrize("model", MODELS)
def test_pruned_engine_equals_the_torch_modules(
    model: str, schedule: str, engine: Engines, eager: Callable[[str], Eager]
) -> None:
    ours, reference = engine(model, TOKENS[model], schedule), eager(model)
    picture = photograph()
    prefill = ours.prefill(picture, QUESTION)
    logits, kept, tokens = reference.answer(picture, reference.schedule(schedule, TOKENS[model]), 16)
    np.testing.assert_array_equal(prefill.kept[0][0], kept)
    assert relative_error(prefill.logits[0], logits) < 1e-4
    assert ours.generate(picture, QUESTION, Sampling(16)).token_ids == [tokens]


def test_masked_engine_keeps_what_the_adaptive_schedule_keeps(engine: Engines, eager: Callable[[str], Eager]) -> None:
    reference = eager("llava-tiny")
    logits, kept, _ = reference.answer(photograph(), reference.schedule("adaptive", 16), 1)
    prefill = engine("llava-tiny", 16, "masked").prefill(photograph(), QUESTION)
    np.testing.assert_array_equal(prefill.kept[0][0], kept)
    assert relative_error(prefill.logits[0], logits) < 1e-4


@pytest.mark.parametrize("model", MODELS)
def test_decoding_with_the_cache_equals_prefilling_the_longer_prompt(
    model: str, engine: Engines, eager: Callable[[str], Eager]
) -> None:
    """The engine's own prefill of prompt and answer, so no other implementation is involved."""
    ours, encode = engine(model, TOKENS[model]), eager(model).tokenizer.encode
    session, tokens = ours.model.language, ours.manifest.tokens
    answer = ours.generate(photograph(), QUESTION, Sampling(12)).token_ids[0]
    seen = ours.model.pictures.get(ours.reader.open(photograph()).key)
    assert seen is not None
    prompt = encode(QUESTION, [tokens], tokens)
    for n in range(1, len(answer)):
        ids = np.concatenate([prompt.input_ids, answer[:n]])[None]
        rows = np.concatenate([prompt.image_rows, np.full(n, -1)])[None]
        feeds: dict[str, Any] = {
            "input_ids": ids,
            "position_ids": np.arange(ids.shape[1])[None],
            "image_rows": rows,
            "last_token": np.array([ids.shape[1] - 1]),
            "image_embeds": seen.rows["image_embeds"],
        }
        logits = session.run(feeds, session.allocate_state(1)).arrays["logits"]
        assert int(logits[0].argmax()) == answer[n], f"token {n}"


@pytest.mark.parametrize("schedule", ["static", "masked"])
def test_an_image_alone_and_in_a_batch_gives_the_same(schedule: str, engine: Engines) -> None:
    ours = engine("llava-tiny", 16, schedule)
    pictures: list[Any] = [photograph(), another(1), another(2), another(3)]
    prompts = [QUESTION, question_prompt("Why?"), QUESTION, question_prompt("Who is this, and where?")]
    together, answers = ours.prefill(pictures, prompts), ours.generate(pictures, prompts, Sampling(16))
    assert len({tuple(kept[0].tolist()) for kept in together.kept}) == 4
    for b, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        alone = ours.prefill(picture, prompt)
        np.testing.assert_array_equal(together.kept[b][0], alone.kept[0][0])
        assert relative_error(together.logits[b], alone.logits[0]) < 1e-5
        assert answers.token_ids[b] == ours.generate(picture, prompt, Sampling(16)).token_ids[0]


@pytest.mark.parametrize("model", MODELS)
def test_fp16_engine_agrees_with_fp32(model: str, engine: Engines) -> None:
    """Near-equal scores may rank differently, by processor: logits are compared where the same patches are kept. They
    were within 0.3% on an Intel Xeon, within 2.8% on an AMD EPYC."""
    half, full = (engine(model, TOKENS[model], "static", precision) for precision in ("fp16", "fp32"))
    for picture in (photograph(), *map(another, range(4))):
        got, expected = half.prefill(picture, QUESTION), full.prefill(picture, QUESTION)
        a, b = set(got.kept[0][0].tolist()), set(expected.kept[0][0].tolist())
        assert len(a & b) / len(a | b) >= 0.8
        if a == b:
            assert relative_error(got.logits, expected.logits) < 5e-2


@pytest.mark.skipif(not available("tensorrt_rtx"), reason="needs the rtx extra (tensorrt-rtx-cu13)")
def test_onnx_runtime_runs_the_very_files_that_were_compiled(build: Build) -> None:
    built = build("llava-tiny", 16, "static", "fp16", "rtx")
    directory = built.directory
    names = {f"{graph}.{suffix}" for graph in ("vision", "language") for suffix in ("onnx", "onnx.data", "engine")}
    assert {path.name for path in directory.iterdir()} == names | {
        *("manifest.json", "tokenizer.json", "preprocessor.json", "chat_template.jinja")
    }
    assert check_files(directory, read_manifest(directory)) == []
    before = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}
    assert all(before[name] == record.sha256 for name, record in built.manifest.files.items())
    answer = load_engine(directory, "ort").generate(photograph(), QUESTION, Sampling(8))
    assert answer.texts[0]
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()} == before
    for graph, report in built.reports.items():
        model = onnx.load(directory / f"{graph}.onnx", load_external_data=False)
        bytes_of = Counter[int]()
        for tensor in model.graph.initializer:
            bytes_of[tensor.data_type] += int(np.prod(tensor.dims))
        assert bytes_of[onnx.TensorProto.FLOAT16] > 0.9 * bytes_of.total()
        assert report.engine_bytes == (directory / f"{graph}.engine").stat().st_size > report.weight_bytes


@pytest.mark.skipif(not available("tensorrt_rtx"), reason="needs the rtx extra (tensorrt-rtx-cu13)")
@pytest.mark.parametrize("which", ["LLaVA-NeXT", "LLaVA-1.5"])
def test_engines_that_drop_tokens_inside_the_decoder_compile(
    which: str, directories: dict[str, Path], tmp_path: Path
) -> None:
    if which == "LLaVA-NeXT":
        settings: dict[str, Any] = {"model": str(write_next(directories["seeded"], tmp_path / "next")), "tokens": 24}
    else:
        settings = {"model": "llava-tiny", "tokens": 48, "llm_tokens": 16}
    built = build_directory(BuildSettings(backend="rtx", out_root=tmp_path, **settings), Progress(disable=True))
    assert built.reports.keys() == {"vision", "language"}
    assert check_files(built.directory, read_manifest(built.directory)) == []
    engine = load_engine(built.directory, "ort")
    prefill = engine.prefill(photograph(), QUESTION)
    assert len(prefill.kept[0][0]) == built.manifest.llm_tokens
    assert prefill.pruned_lengths[0] < prefill.lengths[0]
    Image.fromarray(np.zeros((56, 112, 3), np.uint8)).save(tmp_path / "wide.png")
    question = Question((tmp_path / "wide.png",), "What is this?", answer_tokens=1, repeats=1, template=True)
    said = ask(engine, question).to_dict(engine, question)
    assert said["pruned_prompt_tokens"] <= said["prompt_tokens"]
    assert said.get("grids") == ([[1, 2]] if which == "LLaVA-NeXT" else None)


@pytest.mark.skipif(gpu_present(), reason="there is a GPU here")
@pytest.mark.skipif(not available("tensorrt_rtx"), reason="needs the rtx extra (tensorrt-rtx-cu13)")
def test_compiled_engine_without_a_gpu_names_the_backend_that_works(build: Build) -> None:
    directory = build("llava-tiny", 16, "static", "fp16", "rtx").directory
    with pytest.raises(EngineError, match=r"no CUDA GPU is present\. .*--backend ort"):
        load_engine(directory, "rtx")
    assert load_engine(directory).backend == "ort"


@pytest.mark.long
@pytest.mark.parametrize("schedule", ["static", "masked"])
def test_photograph_through_llava_7b_geometry(schedule: str, tmp_path: Path) -> None:
    """The whole tower and projector at 336 px, one of 32 decoder layers, seeded weights; kept patches as in torch."""
    settings = BuildSettings(
        "llava-1.5-7b", random=True, decoder_layers=1, schedule=schedule, backend="ort", out=tmp_path / "engine"
    )
    built = build_directory(settings, Progress(disable=True))
    try:
        assert built.manifest.note == "random weights, 1 of 32 decoder layers"
        assert built.manifest.geometry.vision.num_hidden_layers == 24
        prefill = load_engine(built.directory).prefill(photograph(), QUESTION)
        assert prefill.logits.shape == (1, 32064)
        assert np.isfinite(prefill.logits).all()
        (kept,) = prefill.kept[0]
        assert len(set(kept.tolist())) == 64
        assert all(0 <= number < 576 for number in kept)
    finally:
        shutil.rmtree(built.directory)
    model = resolve("llava-1.5-7b", random=True, decoder_layers=1)
    pixels = pixel_values([photograph()], ImageSettings.from_directory(model.files, 336))
    with torch.inference_mode():
        output = VisionModel.from_weights(model.weights).features(
            torch.from_numpy(pixels), make_schedule(schedule, model.config.vision, 64)
        )
    expected = set(output.kept[0].tolist())
    assert len(expected & set(kept.tolist())) / len(expected | set(kept.tolist())) > 0.9
