"""Pictures to pixel_values, as the checkpoint's own image processor makes them, with numpy and Pillow only.

The reference is the Pillow backend of transformers' CLIPImageProcessor and LlavaImageProcessor, operation for
operation, so that the results are equal to the last bit. LLaVA-NeXT's tiles: flowcut/tiles.py.
"""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from flowcut.errors import InputError
from flowcut.image_settings import ImageSettings

__all__ = ["FORMATS", "MAX_BYTES", "MAX_PIXELS", "MAX_RESIZED_PIXELS", "ImageSettings", "normalised", "open_image"]
__all__ += ["pixel_values", "resize", "rgb", "undo"]

FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "AVIF")
"""Of files, by Pillow's names; JPEG includes MPO, as cameras write it. Pillow knows more: one of them starts a program
(EPS), and many are hardly ever read, hence hardly ever tested. AVIF is last, as an old Pillow does not know it."""
MAX_PIXELS = 89_478_485
"""Most pixels of a picture: Pillow's own default. Pillow's MAX_IMAGE_PIXELS counts too where it is lower."""
MAX_BYTES = 1 << 29
"""Of a picture's file: more than MAX_PIXELS take as they are, in four bytes each."""
MAX_RESIZED_PIXELS = 1 << 26
"""Most pixels of an intermediate picture: 4 bytes each in Pillow, so 256 MiB."""


def open_image(source: Path | str | bytes | Image.Image | NDArray[np.uint8]) -> Image.Image:
    """A picture in RGB from a file, a file's bytes, a Pillow image or an array [height, width, 3] of uint8.

    As in transformers, the orientation that a camera stored (EXIF) is applied to files and bytes and not to Pillow
    images, transparency is laid over white, and other modes go through Pillow's `convert("RGB")`. Of an animation, the
    first frame is taken.

    Raises:
        InputError: missing, empty, damaged, not a picture in one of FORMATS, of more than MAX_PIXELS or MAX_BYTES; all
            but damage is found before anything is decoded.
    """
    if isinstance(source, Image.Image):
        _check_size(source.size, "image", MAX_PIXELS)
        return _not_empty(_guarded(source, "image"), "image")
    if isinstance(source, np.ndarray):
        return _from_array(source)
    if isinstance(source, bytes):
        return _decode(source, "image")
    if isinstance(source, (str, Path)):
        return _decode(_read_bytes(Path(source)), _shown(source))
    raise InputError(f"image must be a file, bytes, a Pillow image or an array, got {type(source).__name__}.")


def pixel_values(images: Sequence[Image.Image], settings: ImageSettings) -> NDArray[np.float32]:
    """Pictures as [images, 3, image_size, image_size].

    Raises:
        InputError: a picture so long and narrow that resizing its short edge would take too much memory.
    """
    return normalised([_fit(rgb(image), settings) for image in images], settings)


def normalised(images: Sequence[Image.Image], settings: ImageSettings) -> NDArray[np.float32]:
    """[images, 3, image_size, image_size] of RGB pictures that have this size: rescaled and normalised."""
    out = np.empty((len(images), 3, settings.image_size, settings.image_size), dtype=np.float32)
    for row, image in zip(out, images, strict=True):
        row[:] = _normalise(np.asarray(image), settings).transpose(2, 0, 1)
    return out


def resize(image: Image.Image, width: int, height: int, settings: ImageSettings) -> Image.Image:
    """The whole picture at another size.

    Raises:
        InputError: it or what Pillow makes on the way there would take too much memory.
    """
    _limit(image, width, height)
    return image.resize((width, height), Image.Resampling(settings.resample))


def undo(pixels: NDArray[np.float32], settings: ImageSettings) -> Image.Image:
    """The picture that [3, image_size, image_size] of `pixel_values` shows, back in 0..255."""
    colours = pixels.astype(np.float64).transpose(1, 2, 0)
    if settings.do_normalize:
        colours = colours * np.array(settings.std) + np.array(settings.mean)
    if settings.do_rescale:
        colours = colours / settings.rescale_factor
    return Image.fromarray(np.clip(np.rint(colours), 0, 255).astype(np.uint8))


def _fit(image: Image.Image, settings: ImageSettings) -> Image.Image:
    """Pad, resize and crop to image_size x image_size."""
    if settings.do_pad:
        image = _pad_to_square(image, settings.mean)
    if settings.do_resize:
        image = resize(image, *_resized(image.width, image.height, settings), settings)
    if settings.do_center_crop:
        side = settings.image_size
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))  # black where the picture is smaller
    return image


def _resized(width: int, height: int, settings: ImageSettings) -> tuple[int, int]:
    edge = settings.shortest_edge
    if settings.stretch:
        return edge, edge
    longest = int(edge * max(width, height) / min(width, height))
    return (edge, longest) if width <= height else (longest, edge)


def _pad_to_square(image: Image.Image, mean: Sequence[float]) -> Image.Image:
    side = max(image.size)
    _limit(image, side, side)
    red, green, blue = (int(value * 255) for value in mean)
    square = Image.new("RGB", (side, side), (red, green, blue))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def _limit(image: Image.Image, width: int, height: int) -> None:
    # Resizing only what the crop keeps would take less, but Pillow's `box` is float32: other pixels than the reference.
    # Pillow resizes rows before columns, with up to 4 weights of 8 bytes for each pixel of an edge.
    needed = max(width * max(height, image.height), 8 * max(image.size))
    if needed > max(MAX_RESIZED_PIXELS, image.width * image.height):
        raise InputError(
            f"image must take at most {MAX_RESIZED_PIXELS} pixels while it is resized, got {needed} for "
            f"{image.width} x {image.height} -> {width} x {height}. Cut it to a less narrow picture."
        )


def _normalise(image: NDArray[np.uint8], settings: ImageSettings) -> NDArray[np.float32]:
    """[..., 3] of 0..255 to the range of the checkpoint; the product in float64, the rest in float32."""
    values = image.astype(np.float32)
    if settings.do_rescale:
        values = (image.astype(np.float64) * settings.rescale_factor).astype(np.float32)
    if settings.do_normalize:
        values -= np.array(settings.mean, dtype=np.float32)
        values /= np.array(settings.std, dtype=np.float32)
    return values


def _read_bytes(path: Path) -> bytes:
    """Of a regular file: pipes and devices may have no end. os.path, as Path.is_file raises for some bad names."""
    name = _shown(path)
    if not os.path.isfile(path):  # noqa: PTH113
        raise InputError(f"image must be an existing file, got {name!r}.")
    try:
        with path.open("rb") as file:
            _check_bytes(os.fstat(file.fileno()).st_size, name)
            return file.read(MAX_BYTES + 1)  # it may have grown
    except OSError as error:
        raise InputError(f"image must be a readable file, got {name!r}: {error.strerror}.") from None


def _decode(content: bytes, name: str) -> Image.Image:
    if not content:
        raise InputError(f"image must not be empty, got {name!r} of 0 bytes.")
    _check_bytes(len(content), name)
    own = Image.MAX_IMAGE_PIXELS
    limit = MAX_PIXELS if own is None else min(own, MAX_PIXELS)
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"image must have at most {limit} pixels, got {name!r}. Scale it down first.") from None
    except Exception as error:  # Image.open also lets parsers' own errors through
        raise InputError(
            f"image must be a picture that Pillow reads, got {name!r}. Save it as one of {', '.join(FORMATS)}."
        ) from error
    # Pillow itself only warns up to twice the limit. Filters of warnings are the process's: not ours to change.
    _check_size(image.size, name, limit)
    return _not_empty(_guarded(image, name, upright=True), name)


def _check_bytes(count: int, name: str) -> None:
    if count > MAX_BYTES:
        raise InputError(f"image must have at most {MAX_BYTES} bytes, got {name!r} of {count}. Save it smaller first.")


def _check_size(size: tuple[int, int], name: str, limit: int) -> None:
    if size[0] * size[1] > limit:
        raise InputError(
            f"image must have at most {limit} pixels, got {name!r} of {size[0]} x {size[1]}. Scale it down first."
        )


def _guarded(image: Image.Image, name: str, upright: bool = False) -> Image.Image:
    """Load the pixels. Damaged bytes make Pillow's decoders raise errors of many kinds, OSError the most usual."""
    size = f"{image.width} x {image.height}"
    try:
        if upright:
            ImageOps.exif_transpose(image, in_place=True)
        return rgb(image)
    except MemoryError:
        raise InputError(f"image must fit into memory, got {name!r} of {size}. Scale it down first.") from None
    except Exception as error:
        why = _shown(" ".join(str(error).split()))
        raise InputError(f"image must be whole, got {name!r}, which is damaged or truncated ({why}).") from error


def _shown(text: object, most: int = 200) -> str:
    """For one line of a message."""
    whole = str(text)
    return whole if len(whole) <= most else whole[:most] + ".."


def rgb(image: Image.Image) -> Image.Image:
    """In RGB, as `open_image` says."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
        # 16 bits: convert() would cut them at 255 and leave most pictures white
        deep = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((deep * 255 + 32767) // 65535).astype(np.uint8)).convert("RGB")
    if image.mode == "La":  # Pillow has no other way from there
        image = image.convert("LA")
    transparent = "A" in image.getbands() or image.info.get("transparency") is not None
    if transparent:
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def _not_empty(image: Image.Image, name: str) -> Image.Image:
    if 0 in image.size:
        raise InputError(f"image must have pixels, got {name!r} of {image.width} x {image.height}.")
    return image


def _from_array(array: NDArray[np.uint8]) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or 0 in array.shape:
        raise InputError(f"image must be [height, width, 3] of uint8, got {list(array.shape)} of {array.dtype}.")
    _check_size((array.shape[1], array.shape[0]), "image", MAX_PIXELS)
    return Image.fromarray(array)
