"""Finding pictures, passing over what cannot be used, and halving by content."""

from __future__ import annotations

import hashlib
import io
import logging
import os
from pathlib import Path

import pytest
from PIL import Image

from calib.dataset import Picture, find_pictures, split
from flowcut.errors import ConfigError, InputError


def encoded(shade: int, kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 40).point(lambda p: (p + shade) % 256).save(buffer, kind)
    return buffer.getvalue()


def write(directory: Path, **contents: bytes) -> Path:
    """Files by name; "__" stands for "/" and "_" for "."."""
    for key, content in contents.items():
        path = directory / key.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return directory


def test_pictures_of_all_folders_come_by_name_with_their_hashes(tmp_path: Path) -> None:
    contents = {"b_png": encoded(1), "a__z_JPG": encoded(2, "JPEG"), "a__deep__c_webp": encoded(3, "WEBP")}
    found = find_pictures(write(tmp_path, **contents, notes_txt=b"no picture"))
    assert [p.name for p in found.pictures] == ["a/deep/c.webp", "a/z.JPG", "b.png"]
    assert [p.path for p in found.pictures] == [tmp_path / p.name for p in found.pictures]
    expected = [hashlib.sha256(contents[key]).hexdigest() for key in ("a__deep__c_webp", "a__z_JPG", "b_png")]
    assert [p.sha256 for p in found.pictures] == expected
    assert found.skipped == ()


def test_hidden_files_and_folders_are_not_looked_at(tmp_path: Path) -> None:
    write(tmp_path, a_png=encoded(1), _b_png=encoded(2), _cache__c_png=encoded(3))
    assert (tmp_path / ".b.png").is_file()
    assert (tmp_path / ".cache" / "c.png").is_file()
    assert [p.name for p in find_pictures(tmp_path).pictures] == ["a.png"]


def test_broken_pictures_are_skipped_listed_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    jpeg = encoded(1, "JPEG")
    write(tmp_path, a_jpg=jpeg, b_jpg=jpeg[: len(jpeg) * 2 // 3], c_png=b"not a picture", d_png=b"")
    with caplog.at_level(logging.WARNING):
        found = find_pictures(tmp_path)
    assert [p.name for p in found.pictures] == ["a.jpg"]
    reasons = dict(found.skipped)
    assert list(reasons) == ["b.jpg", "c.png", "d.png"]
    assert "truncated" in reasons["b.jpg"]
    assert "that Pillow reads" in reasons["c.png"]
    assert "empty" in reasons["d.png"]
    assert [record.levelname for record in caplog.records] == ["WARNING"] * 3
    assert str(tmp_path) not in " ".join(reasons.values())


def test_of_equal_files_the_first_by_name_counts(tmp_path: Path) -> None:
    same = encoded(1)
    found = find_pictures(write(tmp_path, b_png=same, a__x_png=same, c_png=encoded(2), d_png=same))
    assert [p.name for p in found.pictures] == ["a/x.png", "c.png"]
    assert found.skipped == (("b.png", "same content as a/x.png"), ("d.png", "same content as a/x.png"))


def test_limit_counts_usable_pictures(tmp_path: Path) -> None:
    write(tmp_path, a_png=b"broken", b_png=encoded(1), c_png=encoded(2), d_png=b"broken", e_png=encoded(3))
    found = find_pictures(tmp_path, limit=2)
    assert [p.name for p in found.pictures] == ["b.png", "c.png"]
    assert [name for name, _ in found.skipped] == ["a.png"]
    with pytest.raises(ConfigError, match=r"limit must be at least 1, got 0\."):
        find_pictures(tmp_path, limit=0)


def test_a_picture_that_the_check_refuses_is_skipped(tmp_path: Path) -> None:
    def narrow(image: Image.Image) -> None:
        if image.height > 64:
            raise InputError("too long")

    write(tmp_path, a_png=encoded(1))
    Image.new("RGB", (8, 65)).save(tmp_path / "b.png")
    found = find_pictures(tmp_path, check=narrow)
    assert [p.name for p in found.pictures] == ["a.png"]
    assert found.skipped == (("b.png", "too long"),)


def test_a_name_that_is_not_utf8_is_recorded_legibly(tmp_path: Path) -> None:
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.png")).write_bytes(encoded(1))
    (picture,) = find_pictures(tmp_path).pictures
    assert picture.name == "\\xe9.png"
    assert picture.path.is_file()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"images must hold a picture .* got none in"),
        ({"notes_txt": b"text"}, r"images must hold a picture .* got none in"),
        (
            {"a_png": b"x", "b_png": b"y"},
            r"at least one usable picture, got none in .*: a\.png \(damaged, or not a pic",
        ),
    ],
    ids=["empty", "other files", "all broken"],
)
def test_a_directory_without_a_usable_picture_is_refused(tmp_path: Path, files: dict[str, bytes], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        find_pictures(write(tmp_path, **files))


def test_what_is_no_directory_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file.png").write_bytes(encoded(1))
    with pytest.raises(ConfigError, match=r"images must be a directory of pictures, got .*nowhere', which is nothing"):
        find_pictures(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match=r"images must be a directory of pictures, got .*file\.png', which is a file"):
        find_pictures(tmp_path / "file.png")


def test_an_unreadable_folder_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(path: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(os, "scandir", closed)  # the superuser may read any folder
    with pytest.raises(ConfigError, match=r"images must be readable, got '.*': Permission denied\."):
        find_pictures(tmp_path)


def pictures(*hashes: str, name: str = "p") -> list[Picture]:
    return [Picture(Path(name + h), name + h, h) for h in hashes]


@pytest.mark.parametrize("count", [2, 3, 10, 11])
def test_halves_share_the_pictures_out(count: int) -> None:
    hashes = [hashlib.sha256(bytes([i])).hexdigest() for i in range(count)]
    calibration, held_out = split(pictures(*hashes))
    assert len(calibration) - len(held_out) == count % 2
    assert sorted(p.sha256 for p in (*calibration, *held_out)) == sorted(hashes)


def test_halves_depend_on_content_alone() -> None:
    hashes = [hashlib.sha256(bytes([i])).hexdigest() for i in range(9)]
    first = [{p.sha256 for p in half} for half in split(pictures(*hashes))]
    again = [{p.sha256 for p in half} for half in split(pictures(*hashes[::-1], name="renamed"))]
    assert first == again


def test_one_picture_cannot_be_halved() -> None:
    with pytest.raises(ConfigError, match=r"at least 2 usable pictures, .*, got 1\."):
        split(pictures("a"))
