"""Pictures of every format and mode, whole and damaged, for hypothesis."""

from __future__ import annotations

import io
import struct
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import strategies as st
from PIL import Image, ImageCms, PngImagePlugin

from flowcut.preprocess import FORMATS

MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16")
OTHERS = ("EPS", "ICO", "TGA", "JPEG2000", "PCX", "PDF", "DIB", "SGI", "ICNS")
"""Formats that Pillow writes and that are refused."""
ANIMATED = ("GIF", "WEBP", "PNG", "TIFF", "AVIF")
ORIENTATION = 0x0112
SIDES = st.one_of(st.integers(1, 40), st.integers(1, 300))
CLAIMS = (0, 1, 255, 9459, 9460, 32767, 65535, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
"""Widths and heights that a damaged header may state."""
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@dataclass
class Made:
    """A file's bytes; `whole`: an undamaged picture in a format that is read."""

    content: bytes = field(repr=False)
    kind: str
    size: tuple[int, int]
    whole: bool
    history: list[str] = field(default_factory=list)


def convert(image: Image.Image, mode: str) -> Image.Image:
    """An RGBA picture in any mode, by Pillow's own means."""
    if mode == "I;16":
        return image.convert("I").point(lambda value: value * 257).convert("I;16")
    if mode == "LAB":
        profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        return ImageCms.profileToProfile(image.convert("RGB"), *profiles, outputMode="LAB") or image
    return image.convert("RGB").quantize(16) if mode == "P" else image.convert(mode)


def encode(image: Image.Image, kind: str, **options: Any) -> bytes:
    """In a format, in RGB where that has no such mode."""
    for candidate in (image, image.convert("RGBA").convert("RGB")):
        stream = io.BytesIO()
        try:
            candidate.save(stream, kind, **options)
        except Exception:  # Pillow refuses a mode or option of this format in many ways
            continue
        return stream.getvalue()
    plain = io.BytesIO()
    try:
        image.convert("RGBA").convert("RGB").save(plain, kind)
    except ValueError:  # icons have a least size
        return b""
    return plain.getvalue()


@st.composite
def pictures(draw: st.DrawFn) -> Made:
    """A file, most often damaged afterwards."""
    mode, kind = draw(st.sampled_from(MODES)), draw(st.sampled_from([*FORMATS * 3, *OTHERS]))
    width, height = draw(SIDES), draw(SIDES)
    values = np.random.default_rng(draw(st.integers(0, 9))).integers(0, 256, (height, width, 4), dtype=np.uint8)
    image = convert(Image.fromarray(values), mode)
    content = encode(image, kind, **draw(save_options(kind, image)))
    bomb = b"bomb" in content[:200_500] and len(content) > 50_000  # in the text, which Pillow refuses
    made = Made(content, kind, (width, height), whole=kind in FORMATS and not bomb)
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2, 4]))):
        damage(draw, made)
    return made


@st.composite
def save_options(draw: st.DrawFn, kind: str, image: Image.Image) -> dict[str, Any]:
    """Orientation, colour profile, frames, transparency and text, where the format has them."""
    options: dict[str, Any] = {}
    if draw(st.booleans()):
        exif = Image.Exif()
        exif[ORIENTATION] = draw(st.integers(1, 8))
        options["exif"] = exif.tobytes()
    if draw(st.booleans()):
        options["icc_profile"] = draw(st.sampled_from([SRGB, SRGB[:100], b"", b"\0" * 200_000]))
    if kind in ANIMATED and not (kind == "AVIF" and "exif" in options) and draw(st.booleans()):  # Pillow 13 crashes
        options |= {"save_all": True, "append_images": [image.rotate(90), image.transpose(Image.Transpose.ROTATE_180)]}
    if kind in ("PNG", "GIF") and draw(st.booleans()):
        options["transparency"] = draw(st.integers(0, 15))
    if kind == "PNG" and draw(st.integers(0, 9)) == 0:
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_text("bomb", "0" * draw(st.sampled_from([10, 1 << 20, 100 << 20])), zip=True)
    if kind == "TIFF":
        options["compression"] = draw(st.sampled_from([None, "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"]))
    return options


def damage(draw: st.DrawFn, made: Made) -> None:
    """Change its bytes in one way."""
    way = draw(st.sampled_from([flip, cut, splice, claim, claim, insert, double]))
    changed = way(draw, made)
    made.history.append(way.__name__)
    made.whole = made.whole and changed == made.content
    made.content = changed


def place(draw: st.DrawFn, made: Made) -> int:
    """Somewhere, the header rather than the rest."""
    return draw(st.one_of(st.integers(0, 120), st.integers(0, 1 << 20))) % max(len(made.content), 1)


def flip(draw: st.DrawFn, made: Made) -> bytes:
    content = bytearray(made.content)
    for _ in range(draw(st.integers(1, 8))):
        at, value = place(draw, made), draw(st.integers(0, 255))
        content[at : at + 1] = bytes([value])
    return bytes(content)


def cut(draw: st.DrawFn, made: Made) -> bytes:
    return made.content[: place(draw, made)]


def splice(draw: st.DrawFn, made: Made) -> bytes:
    """A piece of it over another."""
    first, second, length = place(draw, made), place(draw, made), draw(st.integers(1, 64))
    return made.content[:first] + made.content[second : second + length] + made.content[first + length :]


def insert(draw: st.DrawFn, made: Made) -> bytes:
    at = place(draw, made)
    return made.content[:at] + draw(st.binary(min_size=1, max_size=40)) + made.content[at:]


def double(draw: st.DrawFn, made: Made) -> bytes:
    at = place(draw, made)
    return made.content[:at] + made.content


def claim(draw: st.DrawFn, made: Made) -> bytes:
    """Another width or height, wherever the header seems to state it."""
    side, value = draw(st.sampled_from(made.size)), draw(st.sampled_from(CLAIMS))
    for code in draw(st.permutations([">I", "<I", ">H", "<H"])):
        most = 2 ** (8 * struct.calcsize(code)) - 1
        at = made.content.find(struct.pack(code, side), 4, 400)
        if at >= 0:
            return made.content[:at] + struct.pack(code, min(value, most)) + made.content[at + struct.calcsize(code) :]
    return made.content
