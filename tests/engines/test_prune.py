"""Arrays in, arrays and pictures out; both backends tell the same story point by point."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from references import relative_error
from rich.progress import Progress

from engines.prune import PruneSettings, overlays, prune
from engines.prune_files import output_paths, read_pixels, write_outputs
from engines.prune_ort import prune_ort
from engines.prune_result import Pruned
from engines.prune_torch import prune_torch
from flowcut.aliases import Model, resolve
from flowcut.errors import ConfigError, InputError
from flowcut.preprocess import ImageSettings
from flowcut.schedule import make_schedule

PROGRESSIVE = ("flowcut", "no-history", "no-semantic", "no-strength")


@pytest.fixture(scope="module")
def model() -> Model:
    return resolve("llava-tiny")


@pytest.fixture(scope="module")
def pixels() -> np.ndarray:
    rng = np.random.default_rng(4)
    return rng.standard_normal((3, 3, 168, 168)).astype(np.float32)


@pytest.mark.parametrize(
    ("spec", "selector"),
    [("masked", "flowcut"), *(("static", name) for name in (*PROGRESSIVE, "cls", "grid", "random-0", "random-1"))],
)
def test_both_backends_trace_the_same_patches(model: Model, pixels: np.ndarray, spec: str, selector: str) -> None:
    schedule = make_schedule(spec, model.config.vision, 16, selector)
    eager, graph = prune_torch(model, schedule, pixels), prune_ort(model, schedule, pixels, Progress(disable=True))
    assert [layer for layer, _ in graph.trace] == [layer for layer, _ in eager.trace] == schedule.points(12)
    assert schedule.points(12) == ([1, 3, 5, 7, 9] if selector in PROGRESSIVE else [10])
    for (layer, ours), (_, theirs) in zip(graph.trace, eager.trace, strict=True):
        assert [len(numbers) for numbers in ours] == graph.counts[:, layer + 1].tolist()
        assert [numbers.tolist() for numbers in ours] == [numbers.tolist() for numbers in theirs]
    np.testing.assert_array_equal(graph.kept, np.stack(graph.trace[-1][1]))
    assert relative_error(graph.features, eager.features) <= 1e-4


@pytest.mark.parametrize(
    ("backend", "selector", "kind"),
    [
        ("torch", None, "adaptive"),
        ("ort", "no-history", "masked"),
        ("torch", "cls", "static"),
        ("ort", "grid", "static"),
    ],
)
def test_schedule_by_default_is_the_one_that_follows_the_data_if_the_selector_has_any(
    backend: str, selector: str | None, kind: str, tmp_path: Path
) -> None:
    np.save(tmp_path / "pixels.npy", np.zeros((1, 3, 168, 168), np.float32))
    settings = PruneSettings("llava-tiny", backend=backend, selector=selector, pixels=tmp_path / "pixels.npy")
    result = prune(settings, Progress(disable=True)).to_dict()
    assert result["schedule"]["kind"] == kind
    assert result["schedule"]["selector"] == (selector or "flowcut")


def test_adaptive_graph_is_refused(model: Model, pixels: np.ndarray) -> None:
    with pytest.raises(ConfigError, match="'adaptive': its lengths depend on the picture"):
        prune_ort(model, make_schedule("adaptive", model.config.vision, 16), pixels, Progress(disable=True))


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "int8", "uint16", ">f4"])
def test_pixels_of_any_real_type_are_read(tmp_path: Path, dtype: str) -> None:
    array = np.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4).astype(dtype)
    for order in ("C", "F"):
        np.save(tmp_path / "a.npy", np.asarray(array, order=order))
        got = read_pixels(tmp_path / "a.npy", 4)
        assert got.dtype == np.float32
        assert got.dtype.isnative
        assert got.flags.c_contiguous
        assert got.flags.writeable
        np.testing.assert_array_equal(got, array)


def test_pages_are_numbered_when_there_are_several(tmp_path: Path) -> None:
    out, overlay = tmp_path / "kept.npz", tmp_path / "page.png"
    assert output_paths(None, None, 3) == ([], [])
    assert output_paths(out, overlay, 1) == ([out], [overlay])
    assert output_paths(out, overlay, 2) == ([out], [tmp_path / "page-0.png", tmp_path / "page-1.png"])
    with pytest.raises(InputError, match="out and overlay must be different files"):
        output_paths(tmp_path / "page-1.png", overlay, 2)
    (tmp_path / "page-1.png").mkdir()
    with pytest.raises(InputError, match="overlay must be a file in an existing directory"):
        output_paths(None, overlay, 2)


def test_written_files_hold_what_was_given(tmp_path: Path, model: Model, pixels: np.ndarray) -> None:
    kept, counts = np.array([[1, 5]]), np.full((1, 13), 2)
    pruned = Pruned(kept, counts, np.ones((1, 2, 128), np.float32), [(9, [kept[0]])])
    pages = overlays(pruned, pixels[:1], ImageSettings.from_directory(model.files, 168), 12)
    out, page = tmp_path / "a.npz", tmp_path / "a.png"
    out.write_text("old")
    assert write_outputs(pruned.arrays(), pages, ([out], [page])) == [str(out), str(page)]
    with np.load(out) as data:
        assert sorted(data.files) == ["counts", "features", "kept"]
        np.testing.assert_array_equal(data["kept"], kept)
        np.testing.assert_array_equal(data["counts"], counts)
        assert data["features"].shape == (1, 2, 128)
    np.testing.assert_array_equal(np.asarray(Image.open(page)), np.asarray(pages[0]))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.npz", "a.png"]
