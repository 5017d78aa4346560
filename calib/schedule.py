"""`flowcut calibrate schedule`: the constants of a static and of a masked schedule, from pictures.

Adaptive runs over all pictures, of LLaVA-NeXT over every tile of each. Those of one half, the calibration half, give
the constants; on the other half, held out, each schedule is compared with adaptive. Both files are written when both
are complete, and the same inputs give the same bytes: nothing in them depends on when, where or in how many attempts
they were made.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import Progress

from calib.agreement import DIGITS, Kept, agreement, clamp_rate, final_jaccard
from calib.choice import Choice, Counts, constants, spread
from calib.dataset import Dataset, Picture, find_pictures, split, tower_pixels
from calib.flops import flops_share
from calib.journal import Journal
from calib.origin import check_out, circumstances, digest, partial_path, pictures_of
from calib.runs import Compared, Runs
from calib.search import best_within, check_share
from flowcut.aliases import Model, resolve
from flowcut.atomic import write_file
from flowcut.budget import make_budget
from flowcut.deps import require
from flowcut.errors import ConfigError
from flowcut.fingerprint import vision_sha256
from flowcut.preprocess import ImageSettings
from flowcut.schedule import CALIBRATION, Schedule, closed_form, make_schedule
from flowcut.selector import selector

LOG = logging.getLogger("flowcut.calib")
HALVES = ("calibration", "held_out")
JOURNAL_FORMAT = 2
"""Of the entries that calib.runs writes; what another version left is not read. 2: a list for the samples of each."""


@dataclass(frozen=True)
class ScheduleSettings:
    """What to calibrate, on which pictures, and where to write it.

    Attributes:
        tokens: visual tokens kept per picture, see flowcut.budget.make_budget; the files say those of a tower image.
        choose: see calib.choice.Choice.
        selector: what chooses the patches; None: "flowcut".
        limit: use the first N pictures by name.
        threads: of PyTorch; None leaves it to choose.
        out: the static schedule's file, *.json; the masked one's is *.masked.json.
    """

    model: str
    images: Path
    out: Path
    random: bool = False
    seed: int = 0
    tokens: int | str | None = None
    choose: str = "median"
    selector: str | None = None
    limit: int | None = None
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.threads is not None and self.threads < 1:
            raise ConfigError(f"threads must be at least 1, got {self.threads}.")


@dataclass(frozen=True)
class Calibrated:
    """What was written: each file's path and content, the model's note, and the budget that was asked for."""

    tokens: int
    out: Path
    masked_out: Path
    static: dict[str, Any]
    masked: dict[str, Any]
    note: str

    def to_dict(self) -> dict[str, Any]:
        """What the last line of `flowcut calibrate schedule` holds."""
        static, masked = self.static[CALIBRATION], self.masked[CALIBRATION]
        sides = {"static": static, "masked": masked, "closed_form": static["closed_form"]}
        halves = [picture["half"] for picture in static["pictures"]]
        pictures = {half: halves.count(half) for half in HALVES}
        return {
            "schedule": str(self.out),
            "masked_schedule": str(self.masked_out),
            "model": static["model"],
            "note": self.note,
            "tokens": self.tokens,
            "tokens_per_tile": self.static["tokens"],
            "selector": self.static["selector"],
            "choose": static["choose"],
            "counts": self.static["counts"],
            "capacities": self.masked["counts"],
            "pictures": pictures,
            "samples": static.get("tiles", pictures),
            "skipped": len(static["skipped"]),
            "agreement": {name: _short(side["agreement"]) for name, side in sides.items()},
            "flops_share": {name: side["flops_share"] for name, side in sides.items()},
            "clamp_rate": masked["clamp_rate"]["any"],
        }


def calibrate_schedule(settings: ScheduleSettings, progress: Progress) -> Calibrated:
    """Find the constants, compare, write both files. An interrupted run is resumed by the same call.

    Raises:
        ConfigError, CheckpointError, InputError: a setting, checkpoint or picture that does not fit.
        EngineError: the disk. FlowCutError: PyTorch is not installed.
    """
    masked_out = _check_out(settings.out)
    choice = Choice.parse(settings.choose)
    require("torch", extra="torch")
    model = resolve(settings.model, random=settings.random, seed=settings.seed)
    adaptive = _adaptive(model, settings)
    config = model.config
    check_share(config.vision, adaptive.tokens, choice.share)
    image_settings = ImageSettings.from_directory(model.files, config.vision.image_size, config.grid_pinpoints)
    dataset = find_pictures(
        settings.images, settings.limit, progress, lambda image: tower_pixels(image, image_settings, config)
    )
    halves = split(dataset.pictures)
    fingerprint = vision_sha256(model.weights)
    around = circumstances((), settings.threads)
    inputs = digest([JOURNAL_FORMAT, fingerprint, adaptive.to_dict(), image_settings.to_dict(), around])
    journal = Journal(partial_path(settings.out, directory=False), inputs)
    if len(journal):
        LOG.info("resumed: %d results are there already", len(journal))
    try:
        outcome = _measure(model, choice, adaptive, image_settings, halves, journal, progress, settings.threads)
    finally:
        journal.close()
    origin = {**_origin(model, settings, choice, dataset, halves, fingerprint), **outcome.samples}
    asked = make_budget(config, settings.tokens).asked(config)
    result = Calibrated(asked, settings.out, masked_out, *outcome.documents(origin), model.note)
    write_file(masked_out, _encoded(result.masked))
    write_file(settings.out, _encoded(result.static))  # last: where it is new, both are
    journal.remove()
    return result


@dataclass(frozen=True)
class _Outcome:
    """The schedules and all that was measured of them. `kept` is adaptive's, of each half's samples."""

    model: Model
    adaptive: Schedule
    schedules: dict[str, Schedule]  # static, masked, closed_form
    compared: dict[str, list[Compared]]
    kept: tuple[list[Kept], list[Kept]]

    @property
    def points(self) -> list[int]:
        return self.adaptive.points(self.model.config.vision.num_hidden_layers)

    @property
    def samples(self) -> dict[str, Any]:
        """How many tiles the pictures of each half were cut into; nothing where they were not."""
        if not self.model.config.anyres:
            return {}
        return {"tiles": dict(zip(HALVES, map(len, self.kept), strict=True))}

    def documents(self, origin: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """The static and the masked schedule's file."""
        shared = {**origin, "adaptive": self._adaptive(), "closed_form": self._figures("closed_form", counts=True)}
        masked = self.schedules["masked"]
        clamped = {"clamp_rate": clamp_rate(self.points, masked.counts, self.kept[1])}
        return (
            {**self.schedules["static"].to_dict(), CALIBRATION: {**shared, **self._figures("static")}},
            {**masked.to_dict(), CALIBRATION: {**shared, **self._figures("masked"), **clamped}},
        )

    def _figures(self, name: str, counts: bool = False) -> dict[str, Any]:
        schedule, compared = self.schedules[name], self.compared[name]
        kept, cosines = [c.kept for c in compared], [c.cosine for c in compared]
        return {
            **({"counts": list(schedule.counts)} if counts else {}),
            "agreement": agreement(self.points, kept, self.kept[1], cosines),
            "flops_share": round(flops_share(self.model.config.vision, schedule.counts), DIGITS),
        }

    def _adaptive(self) -> dict[str, Any]:
        """Counts of each half, and what adaptive itself costs on the held-out one."""
        calibration, held_out = (_counts(kept) for kept in self.kept)
        shares = [flops_share(self.model.config.vision, row.tolist()) for row in held_out]
        return {
            "calibration": spread(calibration, self.points),
            "held_out": spread(held_out, self.points),
            "flops_share": round(float(np.mean(shares)), DIGITS),
        }


def _measure(
    model: Model,
    choice: Choice,
    adaptive: Schedule,
    image_settings: ImageSettings,
    halves: tuple[Sequence[Picture], Sequence[Picture]],
    journal: Journal,
    progress: Progress,
    threads: int | None,
) -> _Outcome:
    from calib.tower import Tower, torch_threads

    with torch_threads(threads):
        runs = Runs(Tower(model.weights), image_settings, journal, progress)
        seen = runs.kept(halves[0], adaptive, "adaptive, calibration half")
        held_out = runs.kept(halves[1], adaptive, "adaptive, held-out half")
        schedules = _schedules(model, choice, adaptive, halves[0], seen, runs)
        columns = runs.compared(halves[1], list(schedules.values()), adaptive, "compare with adaptive")
    return _Outcome(model, adaptive, schedules, dict(zip(schedules, columns, strict=True)), (seen, held_out))


def _schedules(
    model: Model, choice: Choice, adaptive: Schedule, pictures: Sequence[Picture], seen: list[Kept], runs: Runs
) -> dict[str, Schedule]:
    """What is chosen from the calibration half, and the closed form. Capacities are the greatest counts seen."""
    vision, tokens, counts = model.config.vision, adaptive.tokens, _counts(seen)

    def static(constants: tuple[int, ...]) -> Schedule:
        return Schedule("static", vision.patches, tokens, constants, adaptive.selector)

    def score(candidate: tuple[int, ...]) -> float:
        return final_jaccard(runs.kept(pictures, static(candidate), "search within the budget"), seen)

    if choice.rule == "flops":
        chosen = best_within(vision, tokens, choice.share, counts, score)
    else:
        chosen = constants(counts, choice.rule)
    return {
        "static": static(chosen),
        "masked": Schedule("masked", vision.patches, tokens, constants(counts, "max"), adaptive.selector),
        "closed_form": static(closed_form(vision, tokens)),
    }


def _adaptive(model: Model, settings: ScheduleSettings) -> Schedule:
    """The schedule whose counts are to be replaced by constants.

    Raises:
        ConfigError: a selector or budget that leaves nothing to calibrate, or tokens out of range.
    """
    patches = model.config.vision.patches
    tokens = make_budget(model.config, settings.tokens).tokens
    if tokens == patches:
        raise ConfigError(
            f"tokens must be less than the {patches} patches of a {'tile' if model.config.anyres else 'picture'}, "
            f"got {settings.tokens!r}: nothing is pruned, so there is nothing to calibrate."
        )
    if settings.selector is not None and selector(settings.selector).one_shot:
        raise ConfigError(
            f"selector must be flowcut, no-history, no-semantic or no-strength, got {settings.selector!r}, which "
            "chooses once and always as many as tokens says: there is nothing to calibrate."
        )
    return make_schedule("adaptive", model.config.vision, tokens, settings.selector)


def _origin(
    model: Model,
    settings: ScheduleSettings,
    choice: Choice,
    dataset: Dataset,
    halves: tuple[Sequence[Picture], Sequence[Picture]],
    fingerprint: str,
) -> dict[str, Any]:
    """What both files say of where they come from."""
    half = {p.sha256: name for name, pictures in zip(HALVES, halves, strict=True) for p in pictures}
    return {
        "vision_sha256": fingerprint,
        "model": model.name,
        "weights": f"random, seed {settings.seed}" if model.weights.random else "checkpoint",
        "geometry": asdict(model.config.vision),
        "choose": str(choice),
        **pictures_of(dataset, half=half),
        **circumstances((), settings.threads),
    }


def _check_out(out: Path) -> Path:
    """The masked schedule's path, beside the static one's.

    Raises:
        ConfigError: no .json file in an existing directory that can be written.
    """
    masked = out.with_suffix(".masked.json")
    for path in (out, masked):
        check_out(path, ".json", _is_schedule)
    return masked


def _is_schedule(path: Path) -> bool:
    with suppress(OSError, ValueError, ConfigError):
        return bool(Schedule.from_dict(json.loads(path.read_text(encoding="utf-8"))))
    return False


def _counts(kept: Sequence[Kept]) -> Counts:
    """[pictures, points]"""
    return np.array([[mask.bit_count() for mask in masks] for masks in kept], np.int64)


def _short(figures: dict[str, Any]) -> dict[str, Any]:
    return {name: figures[name] for name in ("final_jaccard", "feature_cosine")}


def _encoded(document: dict[str, Any]) -> bytes:
    return (json.dumps(document, indent=1, sort_keys=True) + "\n").encode()
