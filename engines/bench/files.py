"""What a benchmark leaves: bench.json, bench.md, bench.svg, bench.png and kept.png, all or nothing."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
from PIL import Image

from engines.bench.comparable import REPORT, check_out
from engines.bench.records import Benchmark, Measured
from engines.bench.settings import BenchSettings
from engines.bench.show import markdown, picture
from engines.trust import PREPROCESSOR
from flowcut.anyres import choose_tiling
from flowcut.artifacts import read_manifest
from flowcut.atomic import replacing
from flowcut.overlay import draw, draw_tiles
from flowcut.preprocess import ImageSettings, open_image, pixel_values, undo
from flowcut.schedule import pruning_points
from flowcut.tiles import image_tiles


def write_results(settings: BenchSettings, found: Benchmark) -> list[str]:
    """Write them into `settings.results`, in place of an earlier benchmark's; returns the paths.

    Raises:
        ConfigError: the directory has come to hold something else meanwhile.
        EngineError: the disk refuses.
    """
    target = settings.results
    contents = {
        "bench.json": found.to_json(),
        "bench.md": markdown(found).encode(),
        "bench.svg": picture(found, "svg"),
        "bench.png": picture(found, "png"),
        **overlays(settings, found),
    }
    report = target / REPORT
    with replacing(target, lambda _: check_out(settings)) as folder:
        if report.is_file():
            shutil.copyfile(report, folder / REPORT)
        for name, content in contents.items():
            (folder / name).write_bytes(content)
    return [str(target / name) for name in contents]


def overlays(settings: BenchSettings, found: Benchmark) -> dict[str, bytes]:
    """The first picture with the patches that were kept of it; of the baseline too, if that drops any."""
    pages = {}
    for name, directory, subject in (
        ("kept.png", settings.directory, found.pruned),
        ("kept-baseline.png", settings.baseline, found.baseline),
    ):
        if directory is not None and subject is not None and subject.about["tokens"] < subject.about["patches"]:
            buffer = io.BytesIO()
            _overlay(directory, settings.pictures[0], subject).save(buffer, format="PNG")
            pages[name] = buffer.getvalue()
    return pages


def _overlay(directory: Path, path: Path, subject: Measured) -> Image.Image:
    manifest, image = read_manifest(directory), open_image(path)
    config = manifest.geometry
    settings = ImageSettings.from_dict(json.loads((directory / PREPROCESSOR).read_text(encoding="utf-8")))
    kept = np.array(subject.kept, np.int64)
    if config.anyres:
        tiling = choose_tiling(config, *image.size)
        tiles = [undo(tile, settings) for tile in image_tiles(image, settings, tiling)]
        return draw_tiles(tiles, [], tiling, settings.image_size, kept)
    seen = undo(pixel_values([image], settings)[0], settings)
    last = pruning_points(config.vision.num_hidden_layers)[-1]
    return draw(seen, [(last, kept)], config.vision.grid, settings.image_size)
