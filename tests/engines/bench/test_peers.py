"""Peers compute what they claim to: transformers' own model, and the engine's own shapes, in PyTorch."""

from __future__ import annotations

import json
import logging
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from conftest import WriteCheckpoint
from next_checkpoint import write_next
from PIL import Image
from references import relative_error
from rich.progress import Progress
from torch import Tensor
from verify_engines import builder

from engines import load_engine
from engines.bench import peers as module
from engines.bench.peers import check_peers, torch_peers
from engines.bench.peers_eager import EagerModel, Modules
from engines.bench.peers_run import CompiledPeer, Seen, TorchPeer
from engines.bench.subjects import EngineSubject, Output, Work
from engines.prune import PruneSettings, prune
from engines.runtime.clock import Clock
from engines.runtime.control import Control
from engines.runtime.engine import LlavaEngine, Sampling
from flowcut.aliases import ASSETS
from flowcut.checkpoint import expected_tensors
from flowcut.errors import CheckpointError, EngineError, FlowCutError
from flowcut.prompt import Encoded, question_prompt
from flowcut.schedule import Schedule
from flowcut.tensors import canonical_name

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")

QUIET = Progress(disable=True)
SIZES = {"square": (150, 150), "wide": (300, 100), "tall": (100, 310)}
QUESTIONS = ("What is this?", "Who is it, and what is there beside the head?", "Why? Tell me all about it.")
STEPS = 8


@dataclass(frozen=True)
class Bench:
    """An engine directory, loaded, with its peers. `checkpoint` is what transformers can read, if anything."""

    engine: LlavaEngine
    checkpoint: Path | None

    @cached_property
    def peers(self) -> dict[str, TorchPeer]:
        return {each.name: each for each in torch_peers(self.engine.manifest, None, self.engine.reader, 1, QUIET)}  # type: ignore[misc]

    @property
    def ours(self) -> EngineSubject:
        return EngineSubject("pruned", "the engine", self.engine)

    def work(self, *numbers: int) -> Work:
        anyres = self.engine.manifest.geometry.anyres
        prompts = tuple(question_prompt(QUESTIONS[n], anyres=anyres) for n in numbers)
        return Work(tuple(picture(n) for n in numbers), prompts)


def picture(number: int) -> Image.Image:
    """Part of a photograph; each of another shape, and of LLaVA-NeXT of another number of tiles."""
    photographs = skimage.data.coffee(), skimage.data.astronaut(), skimage.data.chelsea()
    size = tuple(SIZES.values())[number]
    return Image.fromarray(photographs[number][:290, :290]).resize(size, Image.Resampling.BICUBIC)


def run(subject: Any, work: Work, steps: int = STEPS) -> Output:
    output: Output = subject.run(work, Clock(), steps)
    return output


class Overheard:
    """A TorchModel that remembers the tokens which its answers were made of."""

    def __init__(self, model: Any) -> None:
        self._model, self.tokens = model, list[list[int]]()

    def see(self, pictures: Any) -> list[Seen]:
        seen: list[Seen] = self._model.see(pictures)
        return seen

    def read(self, prompts: Sequence[Encoded], seen: Sequence[Seen], room: int) -> Any:
        self.tokens.clear()
        self._answering = self._model.read(prompts, seen, room)
        for name in ("logits", "lengths", "pruned_lengths", "chosen"):
            setattr(self, name, getattr(self._answering, name))
        return self

    def step(self, tokens: Tensor) -> Tensor:
        self.tokens.append(tokens.tolist())
        logits: Tensor = self._answering.step(tokens)
        return logits


def answers(peer: TorchPeer, work: Work) -> list[list[int]]:
    """Per prompt the tokens that the peer chose."""
    heard = Overheard(peer.model)
    heard_peer = TorchPeer(
        peer.name, peer.title, heard, peer._reader, peer._config, peer._geometry.tokens, peer._threads
    )
    run(heard_peer, work)
    return [list(row) for row in zip(*heard.tokens, strict=True)]


Make = Callable[..., Bench]


@pytest.fixture(scope="module")
def bench(checkpoint: WriteCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """bench(model, tokens, ..) -> Bench; models are "llava-tiny", "seeded", "next" and "grouped", which is random."""
    root, build = tmp_path_factory.mktemp("models"), builder(tmp_path_factory)
    places: dict[str, Path] = {"llava-tiny": ASSETS / "llava-tiny", "seeded": checkpoint("tiny", seed=3)}
    places["next"] = write_next(checkpoint("tiny", seed=2), root / "next")
    places["lone"] = write_next(checkpoint("tiny", seed=2), root / "lone", ())
    places["grouped"] = grouped(root / "grouped")
    made: dict[str, Bench] = {}

    def make(model: str, tokens: int | str = "all", precision: str = "fp32", **settings: Any) -> Bench:
        key = repr((model, tokens, precision, sorted(settings.items())))
        if key not in made:
            random = {"random": True, "seed": 5} if model == "grouped" else {}
            directory = build(precision, model=str(places[model]), tokens=tokens, **random, **settings)
            engine = load_engine(directory, "ort", threads=1, picture_cache_mb=0)
            made[key] = Bench(engine, None if random else places[model])
        return made[key]

    return make


def grouped(directory: Path) -> Path:
    """A geometry without weights: grouped-query attention, tied embeddings, other rotary angles and norms."""
    shutil.copytree(ASSETS / "llava-tiny", directory, ignore=shutil.ignore_patterns("*.safetensors"))
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    heads = config["text_config"]["num_attention_heads"]
    config["text_config"] |= {"num_key_value_heads": heads // 2, "rope_theta": 3000.0, "rms_norm_eps": 1e-3}
    config["text_config"]["tie_word_embeddings"] = config["tie_word_embeddings"] = True
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


# transformers


def reference(place: Path, bench: Bench, number: int) -> tuple[np.ndarray, list[int]]:
    """Logits behind the prompt, and an answer, of transformers' own loading, forward and generate."""
    config, reader = bench.engine.manifest.geometry, bench.engine.reader
    kind = (
        transformers.LlavaNextForConditionalGeneration if config.anyres else transformers.LlavaForConditionalGeneration
    )
    model = kind.from_pretrained(place, dtype=torch.float32, attn_implementation="eager").eval()
    opened, prompt = reader.open(picture(number)), bench.work(number).prompts[0]
    counts = bench.engine.reader.geometry.rows([opened])
    ids = torch.from_numpy(reader.tokenizer.encode(prompt, counts, max(counts)).input_ids)[None]
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    pixels = torch.from_numpy(opened.pixels)
    if config.anyres:
        width, height = SIZES[list(SIZES)[number]]
        inputs |= {"pixel_values": pixels[None], "image_sizes": torch.tensor([[height, width]])}
    else:
        inputs["pixel_values"] = pixels
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        logits = model(**inputs).logits[0, -1].numpy()
        told = model.generate(**inputs, do_sample=False, max_new_tokens=STEPS)[0, ids.shape[1] :].tolist()
    return logits, told


@pytest.mark.parametrize("model", ["llava-tiny", "seeded", "next"])
def test_transformers_split_in_stages_equals_its_own_forward_and_generate(model: str, bench: Make) -> None:
    ours = bench(model)
    peer, distinct = ours.peers["transformers-sdpa"], set[int]()
    for number in range(3):
        assert ours.checkpoint is not None
        logits, told = reference(ours.checkpoint, ours, number)
        output = run(peer, ours.work(number))
        assert relative_error(output.logits[0], logits) < 1e-4
        assert answers(peer, ours.work(number)) == [told]
        distinct |= set(told)
    least = 2 if model == "llava-tiny" else 5  # a trained model says a word, and then that it has ended
    assert len(distinct) >= least, "answers of one token repeated would prove little"


@pytest.mark.parametrize("model", ["llava-tiny", "seeded", "grouped", "next"])
def test_unpruned_transformers_eager_and_the_engine_agree(model: str, bench: Make) -> None:
    ours = bench(model)
    assert list(ours.peers) == ["transformers-sdpa", "eager-static"]
    work = ours.work(0, 1, 2)
    engine, theirs, eager = (run(each, work) for each in (ours.ours, *ours.peers.values()))
    for output in (theirs, eager):
        assert relative_error(output.logits, engine.logits) < 1e-4
        assert output.prompt_tokens == engine.prompt_tokens == engine.pruned_prompt_tokens
        assert output.visual_tokens == engine.visual_tokens
        for kept, expected in zip(output.kept, engine.kept, strict=True):
            np.testing.assert_array_equal(kept, expected)
    assert len(set(engine.prompt_tokens)) == 3, "padding is not tested"
    both = [answers(each, work) for each in ours.peers.values()]
    assert both[0] == both[1]


def test_transformers_computes_with_sdpa_and_what_a_checkpoint_does_not_hold(bench: Make) -> None:
    model = bench("grouped").peers["transformers-sdpa"].model.model  # type: ignore[attr-defined]
    configs = model.config, model.config.text_config, model.config.vision_config
    assert {config._attn_implementation for config in configs} == {"sdpa"}
    rotary = model.model.language_model.rotary_emb
    size = model.config.text_config.head_dim
    np.testing.assert_allclose(rotary.inv_freq, 3000.0 ** -(np.arange(0, size, 2) / size), rtol=1e-6)
    positions = model.model.vision_tower.embeddings.position_ids
    assert positions.tolist() == [list(range(145))]
    assert not model.training
    assert not any(each.requires_grad for each in model.parameters())


def test_a_cache_is_new_for_every_run_and_in_use(bench: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = bench("seeded")
    model, widths = ours.peers["transformers-sdpa"].model.model, list[int]()  # type: ignore[attr-defined]
    first = model.model.language_model.layers[0]
    hook = first.register_forward_pre_hook(lambda _, args: widths.append(args[0].shape[1]))
    outputs = [run(ours.peers["transformers-sdpa"], ours.work(0), 3) for _ in range(2)]
    hook.remove()
    np.testing.assert_array_equal(*(output.logits for output in outputs))
    assert widths == [outputs[0].prompt_tokens[0], 1, 1, 1] * 2


def test_another_release_of_transformers_is_named(bench: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    from engines.bench import peers_transformers

    monkeypatch.setattr(peers_transformers, "canonical_name", lambda name: canonical_name(name).replace("r_1", "r_one"))
    got = (
        r"got \S+ without \['\S+r_1.bias', '\S+r_1.weight'\] and with \['\S+r_one.bias', '\S+r_one.weight'\]\. Install"
    )
    with pytest.raises(FlowCutError, match=rf"^transformers must have LLaVA's tensors as .* {got}"):
        torch_peers(bench("seeded").engine.manifest, None, bench("seeded").engine.reader, 1, QUIET)


def test_without_grid_pinpoints_transformers_is_left_out(bench: Make, caplog: pytest.LogCaptureFixture) -> None:
    ours = bench("lone", 24)
    with caplog.at_level(logging.WARNING, "flowcut.bench"):
        assert list(ours.peers) == ["eager-adaptive", "eager-static"]
    assert "transformers-sdpa is left out" in caplog.text
    engine, eager = (run(each, ours.work(0)) for each in (ours.ours, ours.peers["eager-static"]))
    assert relative_error(eager.logits, engine.logits) < 1e-4


# Eager PyTorch

PRUNED: list[tuple[str, dict[str, Any]]] = [
    ("llava-tiny", {"tokens": 16}),
    ("llava-tiny", {"tokens": 16, "schedule": "masked"}),
    ("llava-tiny", {"tokens": 16, "selector": "cls"}),
    ("seeded", {"tokens": 9}),
    ("seeded", {"tokens": 40, "llm_tokens": 12}),
    ("grouped", {"tokens": 20}),
    ("next", {"tokens": 24}),
]


@pytest.mark.parametrize(("model", "settings"), PRUNED, ids=str)
def test_eager_static_is_the_engine(model: str, settings: dict[str, Any], bench: Make) -> None:
    ours = bench(model, **settings)
    work = ours.work(0, 1, 2)
    engine, eager = run(ours.ours, work), run(ours.peers["eager-static"], work)
    assert relative_error(eager.logits, engine.logits) < 1e-4
    assert eager.prompt_tokens == engine.prompt_tokens
    assert eager.pruned_prompt_tokens == engine.pruned_prompt_tokens
    kept = settings.get("llm_tokens", settings["tokens"])
    for got, expected in zip(eager.kept, engine.kept, strict=True):
        np.testing.assert_array_equal(got, expected)
        assert len(got) == kept
    assert len({tuple(each.tolist()) for each in eager.kept}) == 3


@pytest.mark.parametrize(("model", "settings"), [PRUNED[0], PRUNED[4], PRUNED[6]], ids=str)
def test_eager_adaptive_keeps_what_flowcut_prune_does(
    model: str, settings: dict[str, Any], bench: Make, tmp_path: Path
) -> None:
    ours = bench(model, **settings)
    for number in range(3):
        picture(number).save(tmp_path / "picture.png")
        asked = {"question": QUESTIONS[number]} if model == "next" or "llm_tokens" in settings else {}
        given = {**settings, **asked, "schedule": "adaptive"}
        pruned = prune(PruneSettings(str(ours.checkpoint), images=(tmp_path / "picture.png",), **given), QUIET).pruned
        (expected,) = pruned.encoder if pruned.left is None else pruned.left
        output = run(ours.peers["eager-adaptive"], ours.work(number))
        np.testing.assert_array_equal(output.kept[0], expected)


def test_eager_adaptive_is_not_eager_static(bench: Make) -> None:
    ours = bench("seeded", 9)
    adaptive, static = (run(ours.peers[f"eager-{name}"], ours.work(0, 1, 2)) for name in ("adaptive", "static"))
    assert relative_error(adaptive.logits, static.logits) > 1e-3


def test_a_selector_without_an_adaptive_schedule_has_no_such_peer(bench: Make) -> None:
    assert list(bench("llava-tiny", 16, selector="cls").peers) == ["transformers-sdpa", "eager-static"]


@pytest.mark.parametrize(("model", "settings"), [PRUNED[0], PRUNED[4], PRUNED[6]], ids=str)
def test_a_prompt_in_a_batch_and_alone_gives_the_same(model: str, settings: dict[str, Any], bench: Make) -> None:
    ours = bench(model, **settings)
    for peer in ours.peers.values():
        together, told = run(peer, ours.work(2, 0, 1)), answers(peer, ours.work(2, 0, 1))
        for row, number in enumerate((2, 0, 1)):
            alone = run(peer, ours.work(number))
            assert relative_error(together.logits[row], alone.logits[0]) < 1e-4
            np.testing.assert_array_equal(together.kept[row], alone.kept[0])
            for name in ("visual_tokens", "prompt_tokens", "pruned_prompt_tokens"):
                assert getattr(together, name)[row] == getattr(alone, name)[0]
            assert [told[row]] == answers(peer, ours.work(number))


@pytest.mark.parametrize(("model", "settings"), [PRUNED[0], PRUNED[4], PRUNED[6]], ids=str)
def test_eager_decoding_with_a_cache_says_what_the_engine_says(
    model: str, settings: dict[str, Any], bench: Make
) -> None:
    ours, told = bench(model, **settings), list[list[int]]()
    work, engine = ours.work(0, 1, 2), ours.engine
    requests = ours.engine.reader.read_all(
        [[each] for each in work.pictures], list(work.prompts), Sampling(1), Control()
    )
    prefill = engine.model.prefill(requests, Clock())
    logits = prefill.logits
    for number in range(STEPS):
        told.append(logits.argmax(-1).tolist())
        logits = engine.model.step(prefill, logits.argmax(-1).astype(np.int64), number)
    assert answers(ours.peers["eager-static"], work) == [list(row) for row in zip(*told, strict=True)]


# How they are run


class Recording(Clock):
    """A clock that tells in which order it was stopped, and with how many threads of PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self.stops: list[tuple[str, int]] = []

    def stop(self, stage: str) -> None:
        self.stops.append((stage, torch.get_num_threads()))


@pytest.mark.parametrize(("model", "settings"), [PRUNED[0], PRUNED[6]], ids=str)
def test_the_clock_is_stopped_once_behind_each_stage(model: str, settings: dict[str, Any], bench: Make) -> None:
    ours = bench(model, **settings)
    for peer in ours.peers.values():
        for steps, stages in (
            (2, ["preprocess", "vision", "prefill", "decode"]),
            (0, ["preprocess", "vision", "prefill"]),
        ):
            clock = Recording()
            peer.run(ours.work(0, 1), clock, steps)
            assert [stage for stage, _ in clock.stops] == stages


def test_stages_hold_the_work_that_they_are_named_for(bench: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was computed when the clock was stopped: pixels, then towers, then decoders."""
    ours = bench("llava-tiny", 16)
    for peer in ours.peers.values():
        clock, events = Recording(), list[str]()
        monkeypatch.setattr(clock, "stop", lambda stage, told=events: told.append(stage))
        model = peer.model.model if peer.name.startswith("transformers") else None  # type: ignore[attr-defined]
        modules = (
            {"tower": model.model.multi_modal_projector, "layer": model.model.language_model.layers[-1]}
            if model is not None
            else parts_of(peer)
        )
        hooks = [
            part.register_forward_hook(lambda *_, told=events, name=name: told.append(name))
            for name, part in modules.items()
        ]
        peer.run(ours.work(0), clock, 2)
        for hook in hooks:
            hook.remove()
        assert events == ["preprocess", "tower", "vision", "layer", "prefill", "layer", "layer", "decode"]


def modules_of(peer: TorchPeer) -> Modules:
    model = peer.model
    assert isinstance(model, EagerModel)
    return model._modules


def parts_of(peer: TorchPeer) -> dict[str, torch.nn.Module]:
    modules = modules_of(peer)
    return {"tower": modules.vision.multi_modal_projector, "layer": modules.language.model.layers[-1]}


def test_threads_are_given_back(bench: Make) -> None:
    ours = bench("seeded", 9)
    peers = torch_peers(ours.engine.manifest, None, ours.engine.reader, 2, QUIET)
    for peer in peers:
        clock = Recording()
        peer.run(ours.work(0), clock, 1)
        assert {threads for _, threads in clock.stops} == {2}
        assert torch.get_num_threads() == 1


def test_weights_are_held_once(bench: Make) -> None:
    ours = bench("grouped", 20)
    theirs = ours.peers["transformers-sdpa"].model.model  # type: ignore[attr-defined]
    eager = [modules_of(ours.peers[f"eager-{name}"]) for name in ("adaptive", "static")]
    assert eager[0].vision is eager[1].vision
    assert eager[0].language is eager[1].language
    own = {
        **{each.data_ptr(): each.nbytes for each in eager[0].vision.parameters()},
        **{each.data_ptr(): each.nbytes for each in eager[0].language.parameters()},
    }
    theirs_too = {each.data_ptr(): each.nbytes for each in theirs.parameters()}
    assert own.keys() < theirs_too.keys()
    shapes = expected_tensors(ours.engine.manifest.geometry)
    assert sum(theirs_too.values()) == 4 * sum(int(np.prod(shape)) for shape in shapes.values())
    unseen = sum(n for pointer, n in theirs_too.items() if pointer not in own)
    last = ours.engine.manifest.geometry.vision.num_hidden_layers - 1
    behind = [s for n, s in shapes.items() if f"encoder.layers.{last}." in n or ".post_layernorm." in n]
    assert unseen == 4 * sum(int(np.prod(shape)) for shape in behind)


def test_titles_say_what_is_compared(bench: Make) -> None:
    titles = [peer.title for peer in bench("llava-tiny", 16).peers.values()]
    assert titles == [
        f"transformers {transformers.__version__}, sdpa, unpruned, float32 on the CPU",
        "eager PyTorch, adaptive, float32 on the CPU",
        "eager PyTorch, the engine's schedule (static), float32 on the CPU",
    ]
    assert bench("seeded", 40, llm_tokens=12).peers["eager-static"].title.endswith("on the CPU, prompts one by one")
    assert "(static, selector cls)" in bench("llava-tiny", 16, selector="cls").peers["eager-static"].title


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_elsewhere_than_on_the_cpu_they_compute_in_the_engine_s_types(precision: str, bench: Make) -> None:
    """No GPU here: another name of the CPU stands for one."""
    full, manifest = bench("seeded", 9), bench("seeded", 9).engine.manifest
    typed = replace(manifest, precision=precision, vision_precision="fp16")
    named = {each.name: each for each in torch_peers(typed, None, full.engine.reader, 1, QUIET, device="cpu:0")}
    types = "float16" if precision == "fp16" else "float16 vision, bfloat16 decoder"
    assert named["eager-static"].title == f"eager PyTorch, the engine's schedule (static), {types} on cpu:0"
    for name, peer in named.items():
        wide, narrow = run(full.peers[name], full.work(0, 1)), run(peer, full.work(0, 1))
        assert narrow.logits.dtype == np.float32
        # In float16 other patches are kept of a pruned picture, where scores are nearly equal.
        assert 1e-5 < relative_error(narrow.logits, wide.logits) < (0.05 if name == "transformers-sdpa" else 0.3)
    modules = modules_of(named["eager-static"])
    own = {each.dtype for each in modules.vision.parameters()}, {each.dtype for each in modules.language.parameters()}
    assert own == ({torch.float16}, {torch.float16 if precision == "fp16" else torch.bfloat16})


@pytest.mark.parametrize(("model", "settings"), [PRUNED[3], PRUNED[6]], ids=str)
def test_compiled_modules_compute_the_same_and_leave_the_others_alone(
    model: str, settings: dict[str, Any], bench: Make
) -> None:
    """Traced, with a compiler that only counts."""
    ours, graphs = bench(model, **settings), list[int]()

    def counting(graph: torch.fx.GraphModule, _: Sequence[Tensor]) -> Callable[..., Any]:
        graphs.append(len(graph.graph.nodes))
        return graph.forward

    peer, work = ours.peers["eager-static"], ours.work(0, 1)
    schedule = Schedule.from_dict(ours.engine.manifest.schedule)
    torch._dynamo.reset()
    compiled = modules_of(peer).compiled(counting)
    other = EagerModel(compiled, schedule, ours.engine.manifest.llm_tokens)
    config = ours.engine.manifest.geometry
    twin = CompiledPeer("torch-compile", "", other, ours.engine.reader, config, schedule.tokens, 1)
    twin.prepare(work)
    before = list(graphs)
    assert max(before) > 500, "the tower with its scores is one graph"
    assert len(before) >= 2
    got, expected = run(twin, work), run(peer, work)
    assert graphs == before, "nothing is compiled while the clock runs"
    assert relative_error(got.logits, expected.logits) < 1e-5
    assert answers(twin, work) == answers(peer, work)
    pointers = [{each.data_ptr() for each in one.language.parameters()} for one in (compiled, modules_of(peer))]
    assert pointers[0] == pointers[1]


# What is refused


def test_another_checkpoint_is_refused_in_one_line(bench: Make, checkpoint: WriteCheckpoint) -> None:
    ours = bench("seeded", 9)
    other = str(checkpoint("tiny", seed=4))
    with pytest.raises(
        CheckpointError, match=r"checkpoint must be the one that was exported \(sha256 .*got"
    ) as refused:
        torch_peers(ours.engine.manifest, other, ours.engine.reader, 1, QUIET)
    assert "\n" not in str(refused.value)
    assert len(torch_peers(ours.engine.manifest, str(ours.checkpoint), ours.engine.reader, 1, QUIET)) == 3


def test_a_checkpoint_that_is_not_found_has_to_be_named(bench: Make) -> None:
    ours = bench("seeded", 9)
    lost = replace(ours.engine.manifest, source="nowhere")
    with pytest.raises(
        CheckpointError, match=r"checkpoint must be .*got none: checkpoint not found; pass --checkpoint"
    ):
        torch_peers(lost, None, ours.engine.reader, 1, QUIET)


@pytest.mark.parametrize("library", ["torch", "transformers"])
def test_a_library_that_is_not_installed_is_named(library: str, bench: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = bench("seeded", 9)
    monkeypatch.setitem(sys.modules, library, None)
    extra = {"torch": "torch", "transformers": "peers"}[library]
    with pytest.raises(FlowCutError, match=rf"^{library} is not installed\. .*'\.\[{extra}\]'"):
        torch_peers(ours.engine.manifest, None, ours.engine.reader, 1, QUIET)


def test_too_little_memory_is_said_before_weights_are_read(bench: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    ours = bench("seeded", 9)
    monkeypatch.setattr(module, "free_memory", lambda: 10**6)
    with pytest.raises(EngineError, match=r"free memory must be at least 0\.\d+ GB for peers in float32, got 0\.0 GB"):
        check_peers(ours.engine.manifest, None, "cpu")


def test_peers_of_an_engine_on_a_gpu_need_a_torch_that_sees_it(bench: Make) -> None:
    """Else they would be timed on the CPU, beside a GPU."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(EngineError, match="torch must see the GPU that the engines run on"):
        check_peers(bench("seeded", 9).engine.manifest, None, "cuda")


def test_what_peers_need_is_known_before_anything_is_measured(bench: Make) -> None:
    ours = bench("seeded", 9)
    check_peers(ours.engine.manifest, None, "cpu")
    with pytest.raises(CheckpointError, match="got none"):
        check_peers(replace(ours.engine.manifest, source="nowhere"), None, "cpu")
