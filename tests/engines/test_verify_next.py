"""flowcut verify where visual tokens are dropped inside the decoder, and where pictures are tiles."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from conftest import WriteCheckpoint
from next_checkpoint import write_next
from polygraphy.backend.onnxrt import OnnxrtRunner
from verify_engines import Build, builder, failed, rehash, row

from engines import verify as module
from engines import verify_inputs
from engines.comparison import TOLERANCES
from engines.loading import graph_contracts
from engines.reference import ExportedWeights
from engines.reference_next import TorchPruning, TorchTiles
from engines.runners import onnx_runner
from engines.verify import Report, verify
from flowcut.aliases import resolve
from flowcut.anyres import NO_TOKEN, image_slots, vision_feeds
from flowcut.artifacts import Manifest, read_manifest
from flowcut.contract import Limits, vision_contract
from flowcut.schedule import make_schedule

pytestmark = pytest.mark.usefixtures("one_thread")

Outputs = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def source(checkpoint: WriteCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_next(checkpoint("tiny", seed=2), tmp_path_factory.mktemp("next") / "checkpoint")


@pytest.fixture(scope="module")
def build(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """build(precision, ..) -> engine directory, built once; copy it before changing it. Of LLaVA-NeXT, if not said."""
    return builder(tmp_path_factory, model=str(source), tokens=24)


@pytest.fixture
def engine(build: Build, tmp_path: Path) -> Path:
    """A copy of the fp32 engine, to be spoiled."""
    return shutil.copytree(build("fp32"), tmp_path / "engine")


SETTINGS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"precision": "fp16"},
    "int8": {"precision": "int8"},
    "bf16": {"precision": "bf16"},
    "masked": {"schedule": "masked"},
    "two stages": {"stages": 2},
    "three stages": {"stages": 3, "precision": "fp16"},
    "nothing pruned": {"tokens": "all"},
    "two tokens": {"tokens": 2},
    "one short prompt": {"max_batch": 1, "max_images": 1, "max_prompt": 62, "max_new_tokens": 1},
    "llava-tiny": {"model": "llava-tiny", "tokens": 48, "llm_tokens": 16},
    "llava-tiny in fp16": {"model": "llava-tiny", "tokens": 48, "llm_tokens": 16, "precision": "fp16", "stages": 2},
    "llava-tiny, all from the tower": {"model": "llava-tiny", "tokens": "all", "llm_tokens": 9},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_accepts_what_was_built(build: Build, case: str) -> None:
    report = verify(build(**SETTINGS[case]))
    assert report.ok, report.rows
    worst = max(r.error for r in report.rows if r.error is not None and not r.output.startswith("kept"))
    assert worst < (1e-5 if SETTINGS[case].get("precision", "fp32") == "fp32" else 5e-3)


def test_compares_what_the_decoder_drops(build: Build) -> None:
    report = verify(build("fp32"), samples=3)
    assert report.inputs.startswith("3 pictures of 3, 4, 5 tiles; prompts of ")
    compared = [r.output for r in report.rows if r.graph == "language" and r.reference == "torch"]
    assert compared == [
        *("kept_tokens", "lengths", "pruned_lengths", "logits, prefill"),
        *(f"logits, decode {i}" for i in (1, 2, 3)),
        "cache",
    ]
    assert all(r.error for r in report.rows if r.output.startswith("logits"))


def test_the_pictures_have_padding_and_fewer_tokens_than_rows(build: Build) -> None:
    """Also those two that a prompt has at the default number of samples: or no gap would ever be closed."""
    manifest = read_manifest(build("fp32"))
    each = verify_inputs.tilings(manifest.geometry, 2)
    assert len({cut.tiles for cut in each}) > 1
    assert all(len(cut.seen[0]) * len(cut.seen[1]) < cut.grid[0] * cut.grid[1] for cut in each)
    pixels = verify_inputs.pictures(sum(cut.tiles for cut in each), manifest.geometry.vision.image_size, 0)
    feeds = verify_inputs.vision_inputs(manifest, pixels, each)
    with onnx_runner(build("fp32") / "vision.onnx") as runner:
        lengths = runner.infer(feeds)["image_lengths"]
    assert (lengths < vision_feeds(manifest.geometry, manifest.tokens, each).rows).all()
    assert manifest.llm_tokens is not None
    assert (lengths > manifest.llm_tokens).all()  # and something is dropped from both


# Pictures that share a prompt


def asked(manifest: Manifest, images: int, batch: int, bare: bool = False) -> verify_inputs.Prompts:
    cuts = verify_inputs.tilings(manifest.geometry, images)
    slots = image_slots(manifest.geometry, manifest.tokens)
    seen = {"image_embeds": np.zeros((images, slots, 1)), "image_lengths": np.full(images, 30)}
    return verify_inputs.prompts(manifest, seen, cuts, batch, 0, bare)


PROMPTS = [
    ((1, 1), [0]),
    ((2, 1), [0, 0]),
    ((2, 2), [1, 1]),
    ((2, 3), [2, 2]),
    ((3, 3), [1, 1, 2]),
    ((3, 2), [0, 0, 1]),
    ((4, 1), [0, 0, None, None]),
]


@pytest.mark.parametrize(("counts", "owners"), PROMPTS)
def test_two_pictures_share_a_prompt(build: Build, counts: tuple[int, int], owners: list[int | None]) -> None:
    found = asked(read_manifest(build("fp32")), *counts)
    spans, rows = found.steps[0]["image_spans"], found.steps[0]["image_rows"]
    assert [int(b) if n else None for b, _, n in spans] == owners
    ends = np.zeros(counts[1], np.int64)
    for i, (b, first, count) in enumerate(spans):
        if count:
            assert first > ends[b]  # apart from what is before
            assert rows[b, first : first + count].tolist() == list(range(i * 61, i * 61 + count))
            ends[b] = first + count
    assert (ends <= found.steps[0]["last_token"]).all()
    assert (rows >= 0).sum() == spans[:, 2].sum()


def test_without_room_every_prompt_has_its_own_picture(build: Build) -> None:
    manifest = read_manifest(build("fp32"))
    for most, owners in (
        (86, [1, 1]),
        (85, [0, 1]),
    ):  # of which one picture may lose 37 tokens, and these two lose 12 and 24
        limits = replace(manifest.limits, max_prompt=most)
        found = asked(replace(manifest, limits=limits), 2, 2)
        assert found.steps[0]["image_spans"][:, 0].tolist() == owners
        assert found.steps[0]["input_ids"].shape[1] <= most
    found = asked(replace(manifest, limits=limits), 3, 3, bare=True)
    assert found.steps[0]["image_spans"].tolist() == [[1, 4, 36], [2, 4, 48], [0, 0, 0]]


def test_rejects_a_graph_that_counts_every_picture_for_itself(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One picture to a prompt would not show it."""
    model = onnx.load(engine / "language.onnx", load_external_data=False)
    producers = {node.output[0]: node for node in model.graph.node}
    (reached,) = (n for n in model.graph.node if n.op_type == "And" and "pictures" in n.name)
    less = next(producers[name] for name in reached.input if producers[name].op_type == "Less")
    less.op_type = "Equal"  # as if a picture were the only one that is not behind itself
    less.input[1] = producers[less.input[1]].input[0]
    onnx.save(model, engine / "language.onnx")
    assert {("language", "logits, prefill"), ("language", "cache")} <= failed(verify(rehash(engine)))
    monkeypatch.setattr(verify_inputs, "_owners", lambda *_: [0, 1])
    assert verify(engine).ok


def test_rejects_another_newline(build: Build, tmp_path: Path) -> None:
    directory = shutil.copytree(build("fp32", tokens="all"), tmp_path / "engine")
    spoil(directory / "vision.onnx", "image_newline")
    assert {("vision", "weights"), ("vision", "image_embeds")} <= failed(verify(rehash(directory)))


def spoil(path: Path, name: str) -> None:
    """Negate a small tensor, which is in the file itself."""
    model = onnx.load(path, load_external_data=False)
    (tensor,) = (t for t in model.graph.initializer if t.name == name)
    tensor.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(tensor), name))
    onnx.save(model, path)


def test_rejects_another_number_of_tokens_in_the_manifest(engine: Path) -> None:
    model = onnx.load(engine / "language.onnx", load_external_data=False)
    properties = {p.key: p.value for p in model.metadata_props}
    assert properties["flowcut.llm_tokens"] == "24"
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, properties | {"flowcut.llm_tokens": "23"})
    onnx.save(model, engine / "language.onnx")
    report = verify(rehash(engine))
    assert failed(report) == {("language", "metadata")}


# An engine with other results, played by ONNX Runtime


class Tampered(OnnxrtRunner):
    """ONNX Runtime in TensorRT's place, with its inputs or outputs changed."""

    change: Callable[[Outputs], None]

    def infer_impl(self, feed_dict: Any) -> Outputs:
        outputs = {name: array.copy() for name, array in super().infer_impl(feed_dict).items()}
        self.change(outputs)
        return outputs


def pretend_gpu(monkeypatch: pytest.MonkeyPatch, directory: Path, change: Callable[[Outputs], None]) -> Path:
    def runner(path: Path, backend: str) -> Tampered:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        session = onnxruntime.InferenceSession(path.with_suffix(".onnx"), options, ["CPUExecutionProvider"])
        tampered = Tampered(session, name="fake")
        tampered.change = change
        return tampered

    monkeypatch.setattr(module, "gpu_present", lambda: True)
    monkeypatch.setattr(module, "checks_here", lambda manifest, backend: [])
    monkeypatch.setattr(module, "engine_runner", runner)
    return rehash(directory, backend="rtx")


def other_tokens(outputs: Outputs) -> None:
    if "kept_tokens" in outputs:
        outputs["kept_tokens"][:] = np.arange(outputs["kept_tokens"].shape[1])


def one_token_more(outputs: Outputs) -> None:
    if "kept_tokens" in outputs:
        outputs["pruned_lengths"] += 1


def a_gap(outputs: Outputs) -> None:
    if "kept" in outputs:
        outputs["image_lengths"] -= 1


def no_order(outputs: Outputs) -> None:
    for name in outputs.keys() & {"kept", "kept_tokens"}:
        outputs[name][:, :2] = outputs[name][:, 1::-1]


def the_padding(outputs: Outputs) -> None:
    """Patches in the padding: what a wrong order would pack."""
    if "kept" in outputs:
        outputs["kept"][outputs["kept"] == NO_TOKEN] = 2 * 300
        outputs["image_lengths"][:] = outputs["kept"].shape[1]


def tokens_beyond(number: int) -> Callable[[Outputs], None]:
    """Numbers of tokens that the pictures have not: each has 36 or 48 at most, and fewer that are no padding."""

    def change(outputs: Outputs) -> None:
        if "kept_tokens" in outputs:
            outputs["kept_tokens"][:, -1] = number

    return change


def cache_of_a_late_layer(outputs: Outputs) -> None:
    if "present.3.key" in outputs:
        outputs["present.3.key"][:, :, 8] += 1


@pytest.mark.parametrize(
    ("change", "wrong"),
    [
        (other_tokens, ("language", "kept_tokens")),
        (one_token_more, ("language", "pruned_lengths")),
        (a_gap, ("vision", "kept")),
        (no_order, ("vision", "kept")),
        (no_order, ("language", "kept_tokens")),
        (tokens_beyond(5000), ("language", "kept_tokens")),
        (tokens_beyond(63), ("language", "kept_tokens")),
        (tokens_beyond(-1), ("language", "kept_tokens")),
        (the_padding, ("vision", "kept")),
        (cache_of_a_late_layer, ("language", "cache")),
    ],
)
def test_rejects_an_engine_with_other_results(
    engine: Path, change: Callable[[Outputs], None], wrong: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    report = verify(pretend_gpu(monkeypatch, engine, change))
    assert wrong in failed(report)
    assert {r.runner for r in report.rows if r.verdict == "FAILED"} == {"tensorrt_rtx"}


@pytest.mark.parametrize("number", [5000, 63])
def test_names_tokens_that_a_picture_has_not(engine: Path, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    report = verify(pretend_gpu(monkeypatch, engine, tokens_beyond(number)))
    wrong = row(report, "language", "tensorrt_rtx", "kept_tokens")
    assert (wrong.verdict, wrong.error) == ("FAILED", None)
    assert re.fullmatch(rf"must be in 0\.\.\d\d, got \d+\.\.{number}", wrong.detail)


# A tie or an error? Without the checkpoint nobody knows


def another_token(outputs: Outputs) -> None:
    """The first absent token of each picture for its neighbour: a disagreement that is allowed."""
    for kept in outputs.get("kept_tokens", ()):
        absent = np.flatnonzero(kept != np.arange(len(kept)))
        kept[absent[:1]] -= 1


def other_logits(outputs: Outputs) -> None:
    another_token(outputs)
    if "logits" in outputs:
        outputs["logits"] *= -3


def other_counts(outputs: Outputs) -> None:
    another_token(outputs)
    if "lengths" in outputs:
        outputs["lengths"] += 7
        outputs["pruned_lengths"] -= 3


def no_early_cache(outputs: Outputs) -> None:
    another_token(outputs)
    if "present.1.value" in outputs:
        outputs["present.1.value"][:] = 0


def no_late_cache(outputs: Outputs) -> None:
    another_token(outputs)
    if "present.3.key" in outputs:
        outputs["present.3.key"][:] = 0


WRONG = [
    (other_logits, {"logits, prefill", "logits, decode 1", "logits, decode 2", "logits, decode 3"}),
    (other_counts, {"lengths", "pruned_lengths"}),
    (no_early_cache, {"cache"}),
    (no_late_cache, {"cache"}),
]


@pytest.fixture
def untold(build: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Report]:
    """untold(change, settings) -> the report on a fp16 engine whose checkpoint is not there."""

    def report(change: Callable[[Outputs], None], **settings: Any) -> Report:
        directory = shutil.copytree(build("fp16", **settings), tmp_path / "engine")
        return verify(rehash(pretend_gpu(monkeypatch, directory, change), source=""))

    return report


@pytest.mark.parametrize("room", [None, 62])
def test_without_the_checkpoint_a_swapped_token_leaves_prompts_to_compare(
    untold: Callable[..., Report], room: int | None
) -> None:
    report = untold(another_token, max_prompt=room)
    assert report.ok, report.rows
    swapped = row(report, "language", "tensorrt_rtx", "kept_tokens")
    assert swapped.error == pytest.approx(2 / 25)
    found = row(report, "language", "tensorrt_rtx", "other values")
    assert (found.verdict, found.error) == ("not run", None)
    assert found.detail.startswith("of prompt 2 (of 2): other visual tokens stay there")


@pytest.mark.parametrize(("change", "wrong"), WRONG)
def test_without_the_checkpoint_a_swapped_token_hides_no_other_results(
    untold: Callable[..., Report], change: Callable[[Outputs], None], wrong: set[str]
) -> None:
    assert {("language", name) for name in wrong} <= failed(untold(change))  # a cache is wrong for what follows too


@pytest.mark.parametrize(("change", "wrong"), [*WRONG[1:2], (no_early_cache, {"early cache"})])
def test_a_lone_prompt_of_other_tokens_is_compared_before_the_pruning(
    untold: Callable[..., Report], change: Callable[[Outputs], None], wrong: set[str]
) -> None:
    assert failed(untold(change, max_batch=1)) == {("language", name) for name in wrong}


def test_a_lone_prompt_of_other_tokens_does_not_make_a_decoder_right(untold: Callable[..., Report]) -> None:
    report = untold(other_logits, max_batch=1)
    assert not failed(report)
    assert not report.ok
    assert report.compared == {"vision"}
    found = row(report, "language", "tensorrt_rtx", "other values")
    assert found.detail.startswith("of prompt 1 (of 1)")
    assert found.detail.endswith("pass --checkpoint DIR")


def test_without_the_checkpoint_engines_are_compared_as_far_as_can_be(
    engine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = rehash(pretend_gpu(monkeypatch, engine, lambda _: None), source="")
    assert verify(directory).ok
    report = verify(pretend_gpu(monkeypatch, directory, other_tokens))
    assert ("language", "kept_tokens") in failed(report)
    assert "ties cannot be told" in row(report, "language", "tensorrt_rtx", "kept_tokens").detail


def test_values_are_compared_with_torch_keeping_the_same_tokens(
    engine: Path, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that keeps others, and computes rightly with them: wrong, unless their scores are equal."""
    weights = ExportedWeights(resolve(str(source)).weights, "fp32")
    manifest = read_manifest(engine)
    other = np.tile(np.arange(24), (2, 1))

    def runner(path: Path, _: str) -> Any:
        if path.stem == "vision":
            return onnx_runner(path.with_suffix(".onnx"))
        torch = TorchPruning(weights, graph_contracts(manifest)[1])
        torch.follow = other
        return torch

    monkeypatch.setattr(module, "gpu_present", lambda: True)
    monkeypatch.setattr(module, "checks_here", lambda manifest, backend: [])
    monkeypatch.setattr(module, "engine_runner", runner)
    rehash(engine, backend="rtx")
    report = verify(engine)
    assert failed(report) == {("language", "kept_tokens")}
    wrong = row(report, "language", "tensorrt_rtx", "kept_tokens")
    assert (wrong.reference, wrong.error is not None and wrong.error > 1e-2) == ("torch", True)
    for name in ("logits, prefill", "logits, decode 3", "cache"):
        compared = row(report, "language", "tensorrt_rtx", name)
        assert (compared.verdict, compared.reference) == ("ok", "torch")
    monkeypatch.setitem(TOLERANCES, "fp32", replace(TOLERANCES["fp32"], score_gap=1e9))
    report = verify(engine)
    assert report.ok, report.rows
    assert row(report, "language", "tensorrt_rtx", "kept_tokens").verdict == "tie"


@pytest.mark.parametrize("kind", ["static", "masked"])
def test_torch_led_by_its_own_choice_is_torch(source: Path, kind: str) -> None:
    """Though which patches of the padding its tiles kept cannot be seen in what it is told."""
    weights = resolve(str(source)).weights
    schedule = make_schedule(kind, weights.config.vision, 12)
    cuts = verify_inputs.tilings(weights.config, 3)
    pixels = verify_inputs.pictures(sum(each.tiles for each in cuts), weights.config.vision.image_size, 0)
    contract = vision_contract(weights.config, 12, "fp32", Limits())
    with TorchTiles(ExportedWeights(weights, "fp32"), contract, schedule, cuts) as runner:
        outputs = runner.infer({"pixel_values": pixels, **others(contract, cuts, pixels)})
        kept = [row[:n] for row, n in zip(outputs["kept"], outputs["image_lengths"], strict=True)]
        led = runner.lead(pixels, kept, 1e-9)
        # The least number of the first picture's base tile for the greatest that it has not: others than the best.
        absent = np.setdiff1d(2 * np.arange(weights.config.vision.patches), kept[0])[-1]
        wrong = [np.sort(np.append(kept[0][1:], absent)), *kept[1:]]
        assert runner.lead(pixels, wrong, 1e-9).widest_gap > 1e-2
    assert led.widest_gap == 0
    for i, tokens in enumerate(led.image_embeds):
        np.testing.assert_allclose(tokens, outputs["image_embeds"][i, : len(tokens)], rtol=1e-4, atol=1e-5)


def others(contract: Any, cuts: Any, pixels: np.ndarray) -> Outputs:
    """Inputs that the reference does not read: zeros."""
    sizes = {"images": len(cuts), "tiles": len(pixels)}
    return {s.name: np.zeros(s.shape(sizes), s.dtype) for s in contract.inputs[1:]}
