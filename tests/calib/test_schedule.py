"""Calibrated schedules, recomputed from the tower with sets; interrupted runs; what is refused."""

from __future__ import annotations

import hashlib
import json
import math
import re
import shutil
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import WriteCheckpoint
from rich.progress import Progress
from safetensors.numpy import load_file, save_file
from torch.nn.functional import cosine_similarity

from calib.flops import flops
from calib.schedule import Calibrated, ScheduleSettings, calibrate_schedule
from calib.tower import Run, Tower
from flowcut.aliases import resolve
from flowcut.errors import CheckpointError, ConfigError, EngineError, InputError
from flowcut.fingerprint import vision_sha256
from flowcut.preprocess import ImageSettings, open_image, pixel_values
from flowcut.schedule import Schedule, make_schedule
from flowcut.tiny.scenes import make_scene, render
from flowcut.vision import VisionModel, VisionOutput

pytestmark = pytest.mark.usefixtures("one_thread")
TOKENS, POINTS = 16, [1, 3, 5, 7, 9]


def draw(directory: Path, numbers: range) -> Path:
    directory.mkdir()
    for number in numbers:
        render(make_scene("val", number)).save(directory / f"{number}.png")
    return directory


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine scenes, a copy of one of them and a broken file."""
    directory = draw(tmp_path_factory.mktemp("calibrate") / "images", range(9))
    shutil.copy(directory / "3.png", directory / "copy.png")
    (directory / "broken.png").write_bytes((directory / "4.png").read_bytes()[:5000])
    return directory


def calibrate(images: Path, out: Path, **more: Any) -> Calibrated:
    settings = ScheduleSettings("llava-tiny", images, out, **{"tokens": TOKENS, **more})
    return calibrate_schedule(settings, Progress(disable=True))


Loaded = dict[str, Any]


@pytest.fixture(scope="module")
def outcome(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Calibrated:
    return calibrate(images, tmp_path_factory.mktemp("outcome") / "schedule.json")


@pytest.fixture(scope="module")
def static(outcome: Calibrated) -> Loaded:
    return dict(json.loads(outcome.out.read_text()))


@pytest.fixture(scope="module")
def masked(outcome: Calibrated) -> Loaded:
    return dict(json.loads(outcome.masked_out.read_text()))


class Reference:
    """The tower, asked directly."""

    def __init__(self, images: Path) -> None:
        model = resolve("llava-tiny")
        self.vision = model.config.vision
        self.model = VisionModel.from_weights(model.weights)
        self.settings = ImageSettings.from_directory(model.files, self.vision.image_size)
        self.images = images

    def run(self, name: str, schedule: Schedule) -> VisionOutput:
        pixels = pixel_values([open_image(self.images / name)], self.settings)
        with torch.inference_mode():
            return self.model.features(torch.from_numpy(pixels), schedule)

    def sets(self, output: VisionOutput) -> list[set[int]]:
        traced = {layer: set(numbers[0].tolist()) for layer, numbers in output.trace}
        assert list(traced) == POINTS, "with 16 of 144 patches every point drops some"
        return list(traced.values())


@pytest.fixture(scope="module")
def reference(images: Path) -> Reference:
    return Reference(images)


@pytest.fixture(scope="module")
def adaptive(reference: Reference) -> dict[str, VisionOutput]:
    """By picture."""
    schedule = make_schedule("adaptive", reference.vision, TOKENS)
    return {f"{i}.png": reference.run(f"{i}.png", schedule) for i in range(9)}


def half(document: Loaded, which: str) -> list[str]:
    return [p["name"] for p in document["calibration"]["pictures"] if p["half"] == which]


def column(adaptive: dict[str, VisionOutput], names: list[str], layer: int) -> list[int]:
    return [int(adaptive[name].counts[0, layer + 1]) for name in names]


def jaccard(a: set[int], b: set[int]) -> float:
    return len(a & b) / len(a | b)


def test_pictures_are_halved_by_content_and_listed_with_their_hashes(static: Loaded, images: Path) -> None:
    listed = {p["name"]: p for p in static["calibration"]["pictures"]}
    assert list(listed) == [f"{i}.png" for i in range(9)]
    for name, picture in listed.items():
        assert picture["sha256"] == hashlib.sha256((images / name).read_bytes()).hexdigest()
    assert (len(half(static, "calibration")), len(half(static, "held_out"))) == (5, 4)
    skipped = {item["name"]: item["reason"] for item in static["calibration"]["skipped"]}
    assert skipped.keys() == {"broken.png", "copy.png"}
    assert skipped["copy.png"] == "same content as 3.png"


def test_constants_are_medians_and_capacities_the_most_seen(
    static: Loaded, masked: Loaded, adaptive: dict[str, VisionOutput]
) -> None:
    names = half(static, "calibration")
    columns = [column(adaptive, names, layer) for layer in POINTS]
    assert static["counts"] == [math.floor(statistics.median(c) + 0.5) for c in columns]
    assert masked["counts"] == [max(c) for c in columns]
    assert len({tuple(c) for c in columns[:-1]}) > 1
    assert (static["kind"], masked["kind"]) == ("static", "masked")
    for which in ("calibration", "held_out"):
        seen = [column(adaptive, half(static, which), layer) for layer in POINTS]
        assert static["calibration"]["adaptive"][which] == [
            {"layer": layer, "mean": round(statistics.mean(c), 6), "min": min(c), "max": max(c)}
            for layer, c in zip(POINTS, seen, strict=True)
        ]


@pytest.mark.parametrize("choose", ["p90", "max"])
def test_of_five_pictures_p90_and_max_are_the_most_seen(
    choose: str, images: Path, tmp_path: Path, adaptive: dict[str, VisionOutput]
) -> None:
    result = calibrate(images, tmp_path / "s.json", choose=choose)
    names = half(result.static, "calibration")
    assert result.static["counts"] == [max(column(adaptive, names, layer)) for layer in POINTS]
    assert result.static["calibration"]["choose"] == choose


@pytest.mark.parametrize("which", ["static", "masked", "closed_form"])
def test_agreement_on_the_held_out_half(
    which: str, static: Loaded, masked: Loaded, reference: Reference, adaptive: dict[str, VisionOutput]
) -> None:
    document = masked if which == "masked" else static
    told, schedule = document["calibration"], Schedule.from_dict(document)
    if which == "closed_form":
        told, schedule = told["closed_form"], make_schedule("static", reference.vision, TOKENS)
        assert tuple(told["counts"]) == schedule.counts
    shares, cosines = [], []
    for name in half(static, "held_out"):
        one, other = reference.run(name, schedule), adaptive[name]
        pairs = zip(reference.sets(one), reference.sets(other), strict=True)
        shares.append([jaccard(a, b) for a, b in pairs])
        rows = {int(n): i for i, n in enumerate(other.kept[0])}
        both = [(i, rows[int(n)]) for i, n in enumerate(one.kept[0]) if int(n) in rows]
        mine, theirs = (list(index) for index in zip(*both, strict=True))
        x, y = one.features[0].double()[mine], other.features[0].double()[theirs]
        cosines.append(float(cosine_similarity(x, y).mean()))
    figures = told["agreement"]
    for point, values, layer in zip(figures["kept_jaccard"], zip(*shares, strict=True), POINTS, strict=True):
        assert point["layer"] == layer
        assert point["mean"] == pytest.approx(statistics.mean(values), abs=1e-6)
        assert point["min"] == pytest.approx(min(values), abs=1e-6)
    assert figures["final_jaccard"] == {k: figures["kept_jaccard"][-1][k] for k in ("mean", "min")}
    assert figures["feature_cosine"]["mean"] == pytest.approx(statistics.mean(cosines), abs=2e-6)
    assert figures["feature_cosine"]["min"] == pytest.approx(min(cosines), abs=2e-6)
    assert figures["feature_cosine"]["min"] < 1
    share = flops(reference.vision, schedule.counts) / flops(reference.vision)
    assert told["flops_share"] == pytest.approx(share, abs=1e-6)


def test_clamp_rate_is_that_of_held_out_pictures(masked: Loaded, adaptive: dict[str, VisionOutput]) -> None:
    names = half(masked, "held_out")
    over = [[n > c for n in column(adaptive, names, i)] for i, c in zip(POINTS, masked["counts"], strict=True)]
    told = masked["calibration"]["clamp_rate"]
    assert told["points"] == [
        {"layer": layer, "share": round(statistics.mean(row), 6)} for layer, row in zip(POINTS, over, strict=True)
    ]
    assert told["any"] == round(statistics.mean(any(picture) for picture in zip(*over, strict=True)), 6)


def test_masked_equals_adaptive_on_the_calibration_half(
    masked: Loaded, reference: Reference, adaptive: dict[str, VisionOutput]
) -> None:
    schedule = Schedule.from_dict(masked)
    for name in half(masked, "calibration"):
        output = reference.run(name, schedule)
        assert reference.sets(output) == reference.sets(adaptive[name])
        torch.testing.assert_close(output.features, adaptive[name].features, rtol=1e-4, atol=1e-4)


def test_files_say_where_they_come_from(static: Loaded, masked: Loaded, reference: Reference) -> None:
    for document in (static, masked):
        origin = document["calibration"]
        assert origin["vision_sha256"] == vision_sha256(resolve("llava-tiny").weights)
        assert (origin["model"], origin["weights"], origin["choose"]) == ("llava-tiny", "checkpoint", "median")
        assert origin["geometry"]["image_size"] == reference.vision.image_size
        assert origin["versions"].keys() == {"python", "flowcut-trt", "torch", "numpy", "pillow"}
        assert origin["versions"]["torch"] == torch.__version__
    assert str(Path.cwd()) not in json.dumps(static)


def test_the_same_pictures_elsewhere_give_the_same_bytes(outcome: Calibrated, images: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "moved"
    shutil.copytree(images, elsewhere)
    again = calibrate(elsewhere, tmp_path / "other.json")
    assert again.out.read_bytes() == outcome.out.read_bytes()
    assert again.masked_out.read_bytes() == outcome.masked_out.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["moved", "other.json", "other.masked.json"]


def test_the_number_of_threads_is_recorded_and_changes_nothing_else(
    outcome: Calibrated, images: Path, tmp_path: Path
) -> None:
    again = calibrate(images, tmp_path / "other.json", threads=2)
    assert torch.get_num_threads() == 1
    assert again.static["calibration"].pop("threads") == 2
    assert again.static == outcome.static | {
        "calibration": {name: v for name, v in outcome.static["calibration"].items() if name != "threads"}
    }


def test_limit_takes_the_first_by_name(images: Path, tmp_path: Path) -> None:
    result = calibrate(images, tmp_path / "s.json", limit=3)
    assert [p["name"] for p in result.static["calibration"]["pictures"]] == ["0.png", "1.png", "2.png"]


def test_another_selector_is_calibrated_with_its_own_counts(images: Path, tmp_path: Path) -> None:
    result = calibrate(images, tmp_path / "s.json", selector="no-history", limit=4)
    assert result.static["selector"] == result.masked["selector"] == "no-history"
    schedule = make_schedule(str(tmp_path / "s.json"), resolve("llava-tiny").config.vision, TOKENS)
    assert schedule.selector == "no-history"


def test_random_weights_are_said_to_be(images: Path, tmp_path: Path) -> None:
    result = calibrate(images, tmp_path / "s.json", random=True, seed=3, limit=2)
    assert result.static["calibration"]["weights"] == "random, seed 3"
    assert result.note == "random weights"


class Interrupting:
    """Tower.run, which counts its runs and is interrupted at one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int | None = None) -> None:
        self.runs, self.at, self._run = 0, at, Tower.run
        monkeypatch.setattr(Tower, "run", lambda *arguments: self(*arguments))

    def __call__(self, tower: Tower, pixels: np.ndarray, schedule: Schedule) -> Run:
        self.runs += 1
        if self.runs == self.at:
            raise KeyboardInterrupt
        return self._run(tower, pixels, schedule)


@pytest.mark.parametrize("choose", ["median", "flops=0.5"])
def test_an_interrupted_run_continues_to_the_same_bytes(
    choose: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "s.json"
    tower = Interrupting(monkeypatch)
    whole = calibrate(images, tmp_path / "whole.json", choose=choose, limit=4)
    total, places = tower.runs, []
    for at in (4, 5, total - 1):
        tower.runs, tower.at = 0, at
        with pytest.raises(KeyboardInterrupt):
            calibrate(images, out, choose=choose, limit=4)
        places.append([p.name for p in tmp_path.iterdir() if "whole" not in p.name])
        tower.runs, tower.at = 0, None
        again = calibrate(images, out, choose=choose, limit=4)
        assert again.out.read_bytes() == whole.out.read_bytes()
        assert again.masked_out.read_bytes() == whole.masked_out.read_bytes()
        assert tower.runs <= total - (at - 1) + 3, "only the picture that was interrupted is run again"
        out.unlink()
        again.masked_out.unlink()
    assert places == [[".s.json.partial"]] * 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["whole.json", "whole.masked.json"]


def test_what_other_settings_left_is_not_used(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = calibrate(images, tmp_path / "whole.json", tokens=24, limit=4)
    tower = Interrupting(monkeypatch, at=4)
    with pytest.raises(KeyboardInterrupt):
        calibrate(images, tmp_path / "s.json", limit=4)
    tower.at = None
    again = calibrate(images, tmp_path / "s.json", tokens=24, limit=4)
    assert again.out.read_bytes() == whole.out.read_bytes()


def test_what_a_version_with_another_format_left_is_not_used(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is begun anew, also where only the entries differ: formerly they held one sample's masks, not a list."""
    whole = calibrate(images, tmp_path / "whole.json", limit=4)
    tower = Interrupting(monkeypatch, at=4)
    monkeypatch.setattr("calib.schedule.JOURNAL_FORMAT", 1)
    with pytest.raises(KeyboardInterrupt):
        calibrate(images, tmp_path / "s.json", limit=4)
    journal = tmp_path / ".s.json.partial"
    begin, *entries = map(json.loads, journal.read_text().splitlines())
    former = [begin, *(entry | {"kept": entry["kept"][0]} for entry in entries)]
    journal.write_text("".join(json.dumps(line) + "\n" for line in former))
    monkeypatch.undo()
    assert len(entries) == 3
    again = calibrate(images, tmp_path / "s.json", limit=4)
    assert again.out.read_bytes() == whole.out.read_bytes()
    assert tower.runs == 4


def test_a_picture_that_changes_meanwhile_is_refused(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = shutil.copytree(images, tmp_path / "images")
    run = Tower.run

    def changing(*arguments: Any) -> Run:
        for picture in own.glob("?.png"):
            render(make_scene("test", int(picture.stem))).save(picture)
        return run(*arguments)

    monkeypatch.setattr(Tower, "run", changing)
    with pytest.raises(InputError, match=r"\d\.png must stay as it was found"):
        calibrate(own, tmp_path / "s.json")
    assert not (tmp_path / "s.json").exists()


@pytest.mark.parametrize("share", [0.4, 0.7])
def test_a_budget_is_met_with_more_agreement_than_quantiles_have(
    share: float, images: Path, tmp_path: Path, reference: Reference, adaptive: dict[str, VisionOutput]
) -> None:
    result = calibrate(images, tmp_path / "s.json", choose=f"flops={share}")
    vision, names = reference.vision, half(result.static, "calibration")
    assert flops(vision, result.static["counts"]) <= share * flops(vision)

    def agreement(counts: tuple[int, ...]) -> float:
        schedule = Schedule("static", vision.patches, TOKENS, counts)
        kept = {name: reference.sets(reference.run(name, schedule))[-1] for name in names}
        return statistics.mean(jaccard(kept[name], reference.sets(adaptive[name])[-1]) for name in names)

    least = (*[min(column(adaptive, names, layer)) for layer in POINTS],)
    flat = next(
        c for c in ((n,) * 4 + (TOKENS,) for n in range(144, 0, -1)) if flops(vision, c) <= share * flops(vision)
    )
    others = [c for c in (least, flat) if flops(vision, c) <= share * flops(vision)]
    assert agreement(tuple(result.static["counts"])) >= max(map(agreement, others))


REFUSED = {
    "all tokens": ({"tokens": "all"}, r"tokens must be less than the 144 patches .* got 'all': nothing is pruned"),
    "as many tokens": ({"tokens": 144}, r"tokens must be less than the 144 patches .* got 144"),
    "too many tokens": ({"tokens": 145}, r"tokens must be in 1\.\.144"),
    "no tokens": ({"tokens": 0}, r"tokens must be in 1\.\.144"),
    "one shot": ({"selector": "cls"}, r"selector must be flowcut, no-history, .*got 'cls', which chooses once"),
    "unknown selector": ({"selector": "clever"}, r"selector must be one of"),
    "unknown rule": ({"choose": "mean"}, r"choose must be median, p90, max or flops=X, got 'mean'"),
    "too large a share": ({"choose": "flops=1.5"}, r"in \(0, 1\], got 'flops=1\.5'"),
    "too small a share": ({"choose": "flops=0.1"}, r"choose must be flops=X with X at least 0\.2622 for 16 of 144"),
    "one picture": ({"limit": 1}, r"images must hold at least 2 usable pictures.*got 1"),
    "no picture": ({"limit": 0}, r"limit must be at least 1, got 0"),
    "no thread": ({"threads": 0}, r"threads must be at least 1, got 0"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_do_not_fit_are_refused(case: str, images: Path, tmp_path: Path) -> None:
    settings, message = REFUSED[case]
    with pytest.raises(ConfigError, match=message):
        calibrate(images, tmp_path / "s.json", **settings)
    assert not (tmp_path / "s.json").exists()


@pytest.mark.parametrize("name", ["nowhere/s.json", "schedule.txt", "folder.json"])
def test_an_output_that_cannot_be_written_is_refused_before_the_run(
    name: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "folder.json").mkdir()
    tower = Interrupting(monkeypatch)
    with pytest.raises(ConfigError, match=r"out must be a \.json file in an existing directory, got"):
        calibrate(images, tmp_path / name)
    assert tower.runs == 0


def test_nan_in_a_checkpoint_is_refused_naming_the_tensor(
    images: Path, checkpoint: WriteCheckpoint, tmp_path: Path
) -> None:
    model = shutil.copytree(checkpoint(), tmp_path / "model")
    name = "vision_tower.vision_model.encoder.layers.1.self_attn.q_proj.weight"
    tensors = load_file(model / "model.safetensors")
    tensors[name] = tensors[name].copy()
    tensors[name][0, 1] = np.nan
    save_file(tensors, model / "model.safetensors")
    settings = ScheduleSettings(str(model), images, tmp_path / "s.json", tokens=2)
    with pytest.raises(CheckpointError, match=re.escape(f"{name} must be finite")):
        calibrate_schedule(settings, Progress(disable=True))


def test_finite_weights_that_overflow_are_refused_naming_picture_and_layer(
    images: Path, checkpoint: WriteCheckpoint, tmp_path: Path
) -> None:
    model = shutil.copytree(checkpoint(), tmp_path / "model")
    tensors = dict(load_file(model / "model.safetensors"))
    for name, value in {"fc1.bias": 5.0, "fc2.weight": 3e38}.items():
        name = f"vision_tower.vision_model.encoder.layers.2.mlp.{name}"
        tensors[name] = np.full_like(tensors[name], value)
    save_file(tensors, model / "model.safetensors")
    settings = ScheduleSettings(str(model), images, tmp_path / "s.json", tokens=2)
    with pytest.raises(CheckpointError, match=r"images/\d\.png: output of encoder layer 2 must be finite, got NaN or"):
        calibrate_schedule(settings, Progress(disable=True))
    assert not (tmp_path / "s.json").exists()


def test_a_full_disk_is_told_before_the_run(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    tower = Interrupting(monkeypatch)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(EngineError, match=r"No space left on device"):
        calibrate(images, tmp_path / "s.json")
    assert tower.runs == 0


def test_files_are_accepted_and_refused_as_schedules(
    outcome: Calibrated, static: Loaded, checkpoint: WriteCheckpoint, tmp_path: Path
) -> None:
    tiny, path = resolve("llava-tiny"), str(outcome.out)
    vision = tiny.config.vision
    assert list(make_schedule(path, vision, TOKENS, weights=tiny.weights).counts) == static["counts"]
    assert make_schedule(str(outcome.masked_out), vision, TOKENS, weights=tiny.weights).kind == "masked"
    other = resolve("llava-tiny", random=True).weights
    with pytest.raises(ConfigError, match=vision_sha256(other)[:12]) as error:
        make_schedule(path, vision, TOKENS, weights=other)
    assert static["calibration"]["vision_sha256"][:12] in str(error.value)
    with pytest.raises(ConfigError, match=r"'hidden_size': 256}, got {'hidden_size': 128}"):
        make_schedule(path, replace(vision, hidden_size=256), TOKENS)
    with pytest.raises(ConfigError, match=r"'tokens': 20.*'tokens': 16"):
        make_schedule(path, vision, 20)
