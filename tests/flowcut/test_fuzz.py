"""Odd pictures and prompts, by the thousand (tests/fuzz.py) and one by one."""

from __future__ import annotations

import io
import json
import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_engine
from cli_refusals import environment
from fuzz import look
from odd_pictures import MODES, OTHERS, Made, convert, encode
from PIL import EpsImagePlugin, Image, ImageFile

from flowcut import preprocess
from flowcut.errors import InputError
from flowcut.preprocess import FORMATS, MAX_PIXELS, open_image
from flowcut.prompt import MAX_CHARACTERS, Tokenizer

HERE = Path(__file__).parents[1]
COLOURS = {"red": (250, 10, 20), "teal": (10, 130, 120), "white": (255, 255, 255), "black": (0, 0, 0)}
COLOURLESS = ("1", "L", "LA", "I", "F", "I;16", "I;16B")
EIGHT_BITS = ("JPEG", "GIF", "BMP", "PPM", "WEBP", "AVIF")  # or of another range, as Pillow writes them
CASES = [
    (mode, kind)
    for mode in (*MODES, "PA", "RGBX", "I;16B")
    for kind in (None, *FORMATS)
    if not (mode.startswith("I") and kind in EIGHT_BITS) or (mode, kind) == ("I;16", "PPM")
]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_engine.write_engine(tmp_path_factory.mktemp("fuzz") / "engine").directory


def fuzz(what: str, examples: int, *engine: Path) -> dict[str, int]:
    """What became of so many examples, of which each kind has to be there; no more memory is held afterwards."""
    command = [sys.executable, "-W", "ignore", "fuzz.py", what, str(examples), *map(str, engine)]
    variables = environment(OMP_NUM_THREADS="1")
    done = subprocess.run(command, cwd=HERE, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    seen: dict[str, int] = found["seen"]
    assert sum(seen.values()) >= examples
    first, *_, last = found["resident_bytes"]  # of one alone nothing could be told
    assert last < first + 300e6
    return seen


def test_odd_pictures_open_or_are_refused_in_one_line() -> None:
    assert set(fuzz("pictures", 200)) == {"whole", "opened", "refused"}


def test_odd_prompts_make_a_batch_or_are_refused_in_one_line(engine: Path) -> None:
    assert set(fuzz("prompts", 300, engine)) == {"read", "refused"}


def test_odd_questions_are_answered_or_refused_in_one_line(engine: Path) -> None:
    assert set(fuzz("questions", 60, engine)) == {"answered", "refused"}


@pytest.mark.soak
def test_10_000_odd_pictures_open_or_are_refused_in_one_line() -> None:
    assert set(fuzz("pictures", 10_000)) == {"whole", "opened", "refused"}


@pytest.mark.soak
def test_10_000_odd_prompts_make_a_batch_or_are_refused_in_one_line(engine: Path) -> None:
    assert set(fuzz("prompts", 10_000, engine)) == {"read", "refused"}


@pytest.mark.soak
def test_2_000_odd_questions_are_answered_or_refused_in_one_line(engine: Path) -> None:
    assert set(fuzz("questions", 2_000, engine)) == {"answered", "refused"}


def refusal(source: Any) -> str:
    with pytest.raises(InputError) as raised:
        open_image(source)
    message = str(raised.value)
    assert "\n" not in message
    assert len(message) < 800
    return message


@pytest.mark.parametrize(("mode", "kind"), CASES)
def test_known_colours_survive_every_mode_and_format(mode: str, kind: str | None) -> None:
    """8 levels are what JPEG, YCbCr, LAB and the rounding of CMYK may cost."""
    for colour in list(COLOURS.values())[2 if mode == "1" else 0 :]:
        image = in_mode(Image.new("RGBA", (16, 16), (*colour, 255)), mode)
        got = np.array(open_image(image if kind is None else encode(image, kind)))
        expected = np.array(luma(colour) if mode in COLOURLESS else colour)
        assert np.abs(got.astype(int) - expected).max() <= 8, (colour, got[0, 0])


def in_mode(image: Image.Image, mode: str) -> Image.Image:
    if mode == "I;16B":
        deep = convert(image, "I;16")
        return Image.frombytes("I;16B", deep.size, np.asarray(deep).astype(">u2").tobytes())
    return convert(image.convert("RGB").quantize(16), mode) if mode == "PA" else convert(image, mode)


def luma(colour: tuple[int, int, int]) -> int:
    """After ITU-R 601-2."""
    return round(np.dot(colour, (0.299, 0.587, 0.114)))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "La"])
def test_half_transparent_black_is_grey_in_every_mode_with_alpha(mode: str) -> None:
    image = Image.new("LA", (4, 4), (0, 128))
    if mode == "PA":
        image = Image.new("PA", (4, 4), (0, 128))
        image.putpalette([0, 0, 0])
    got = np.array(open_image(image.convert(mode)))
    assert got.min() == got.max() == 127


@pytest.mark.parametrize("kind", OTHERS)
def test_formats_that_hardly_anybody_sends_are_refused(kind: str) -> None:
    message = refusal(encode(Image.new("RGB", (32, 32), "red"), kind))
    assert message.startswith("image must be a picture that Pillow reads, got 'image'. Save it as one of JPEG, PNG,")


def test_postscript_does_not_start_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[Any] = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *arguments, **_: started.append(arguments))
    refusal(encode(Image.new("RGB", (32, 32), "red"), "EPS"))
    assert not started


def png_header(width: int, height: int) -> bytes:
    """Of a picture whose pixels do not come."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    size, check = struct.pack(">I", 13), struct.pack(">I", zlib.crc32(chunk))
    return b"\x89PNG\r\n\x1a\n" + size + chunk + check + struct.pack(">I", 1 << 20) + b"IDAT" + b"\0" * 40


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("pillows", [None, Image.MAX_IMAGE_PIXELS, 10 * MAX_PIXELS])
@pytest.mark.parametrize("size", [(MAX_PIXELS + 1, 1), (9460, 9460), (2**31 - 1, 2**31 - 1)])
def test_bomb_is_refused_by_a_limit_of_our_own_before_it_is_decoded(
    size: tuple[int, int], pillows: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decoding(_: ImageFile.ImageFile) -> None:
        pytest.fail("the pixels were decoded")

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows)
    monkeypatch.setattr(ImageFile.ImageFile, "load", decoding)
    assert f"at most {MAX_PIXELS} pixels, got 'image'" in refusal(png_header(*size))


def test_pictures_in_memory_have_the_same_limit() -> None:
    for large in (Image.new("1", (MAX_PIXELS + 1, 1)), np.broadcast_to(np.zeros(3, np.uint8), (1, MAX_PIXELS + 1, 3))):
        assert refusal(large) == (
            f"image must have at most {MAX_PIXELS} pixels, got 'image' of {MAX_PIXELS + 1} x 1. Scale it down first."
        )


def test_file_of_too_many_bytes_is_refused_unread(tmp_path: Path) -> None:
    path = tmp_path / "endless.png"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert f"at most {preprocess.MAX_BYTES} bytes, got '{path}' of {1 << 40}" in refusal(path)


def test_bytes_have_the_limit_of_files(monkeypatch: pytest.MonkeyPatch) -> None:
    content = encode(Image.new("RGB", (32, 32), "red"), "PNG")
    monkeypatch.setattr(preprocess, "MAX_BYTES", len(content))
    open_image(content)
    assert f"at most {len(content)} bytes, got 'image' of {len(content) + 1}" in refusal(content + b"\0")


def test_what_is_no_file_is_refused_without_waiting_for_it(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    names = [tmp_path / "pipe", tmp_path, tmp_path / "loop", tmp_path / "x" / "y", "/dev/zero", "", "a\0b", "\ud800"]
    for name in [*names, "n" * 300, "n/" * 3000, "two\nlines"]:
        assert "image must be an existing file, got " in refusal(name)


def test_file_that_may_not_be_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "closed.png").write_bytes(b"x")
    monkeypatch.setattr(Path, "open", closed)
    assert "readable file, got" in refusal(tmp_path / "closed.png")


def test_picture_that_memory_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(_: ImageFile.ImageFile) -> None:
        raise MemoryError

    content = encode(Image.new("RGB", (32, 20), "red"), "PNG")
    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    assert refusal(content) == "image must fit into memory, got 'image' of 32 x 20. Scale it down first."
    with pytest.raises(AssertionError, match="must fit into memory"):  # among odd pictures it is a failure
        look(Made(content, "PNG", (32, 20), whole=False))


def test_first_frame_of_every_animation_is_taken() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF", "AVIF"):
        stream = io.BytesIO()
        frames[0].save(stream, kind, save_all=True, append_images=frames[1:])
        with Image.open(io.BytesIO(stream.getvalue())) as opened:
            assert getattr(opened, "n_frames", 1) == 3, kind
        red, green, blue = open_image(stream.getvalue()).getpixel((8, 8))  # type: ignore[misc]
        assert red > 240, kind
        assert max(green, blue) < 15, kind


class Untouched:
    """A tokenizer that is not asked."""

    def encode(self, text: str) -> None:
        pytest.fail(f"{len(text)} characters were tokenized")


def test_prompt_too_long_for_any_model_is_refused_before_it_is_tokenized(engine: Path) -> None:
    tokenizer = Tokenizer.from_file(engine / "tokenizer.json", 3, 1024)
    tokenizer._tokenizer = Untouched()
    for text in ("a" * (MAX_CHARACTERS + 1), " " * (1 << 24), "\ud800" * (1 << 20)):
        with pytest.raises(InputError, match=rf"at most {MAX_CHARACTERS} characters, got {len(text)}\. Shorten it\."):
            tokenizer.encode(text, [], 1)


def test_messages_do_not_repeat_a_long_prompt(engine: Path) -> None:
    tokenizer = Tokenizer.from_file(engine / "tokenizer.json", 3, 1024)
    for text in (" " * MAX_CHARACTERS, "a" * 1000 + "\ud800" * 1000):
        with pytest.raises(InputError) as raised:
            tokenizer.encode(text, [], 1)
        assert len(str(raised.value)) < 200
