"""Directories that `flowcut bench` wrote: their bench.json, checked, and their pictures."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.bench.settings import results_of
from engines.webpage.fields import Unfit, decode, parse
from engines.webpage.schema import SCHEMA, Bench
from flowcut.errors import InputError
from flowcut.integrity import MANIFEST, open_plain

RESULTS = "bench.json"
MOST_BYTES = 16 << 20
"""Of bench.json, which has some ten thousand."""
MOST_PICTURE_BYTES = 8 << 20
PICTURES = {"kept.png": "pruned", "kept-baseline.png": "baseline"}
"""Pictures of the patches kept, and the subject that kept them."""


@dataclass(frozen=True)
class Picture:
    """A picture of the patches that one subject kept. png is empty where `missing` says why."""

    name: str
    subject: str
    png: bytes = b""
    width: int = 0
    height: int = 0
    missing: str = ""


@dataclass(frozen=True)
class Run:
    """One run of `flowcut bench`. directory: as the user named it, or the one beside an engine directory."""

    directory: Path
    bench: Bench
    pictures: tuple[Picture, ...]


def read_runs(directories: Sequence[Path]) -> tuple[Run, ...]:
    """One run per directory, once if two names mean the same one.

    Raises:
        InputError: no directory, no results in it, or results that cannot be used.
    """
    found = {place.resolve(): place for place in reversed([_place_of(each) for each in directories])}
    return tuple(read_run(place) for place in reversed(found.values()))


def read_run(directory: Path) -> Run:
    """What `flowcut bench` wrote there.

    Raises:
        InputError: bench.json is unreadable, or says what no benchmark says.
    """
    path = directory / RESULTS
    try:
        bench: Bench = decode(Bench, _document(path), "")
        _check(bench)
    except Unfit as error:
        raise InputError(f"{path}: {error} Measure again with `flowcut bench`.") from None
    return Run(directory, bench, tuple(_pictures(directory, bench)))


def _place_of(directory: Path) -> Path:
    """The directory itself, or the one beside it where it is an engine directory."""
    if not directory.is_dir():
        got = "a file" if directory.exists() else "none"
        raise InputError(
            f"DIR must be a directory that `flowcut bench` wrote, or its engine directory, got {got} at "
            f"{str(directory)!r}. `flowcut bench ENGINE_DIR --baseline ENGINE_DIR` writes one."
        )
    if (directory / RESULTS).exists():
        return directory
    beside = results_of(directory)
    if (beside / RESULTS).exists():
        return beside
    if (directory / MANIFEST).exists():
        raise InputError(
            f"DIR must have been measured, got the engine directory {str(directory)!r} without "
            f"{str(beside / RESULTS)!r}. `flowcut bench {directory} --baseline ENGINE_DIR` measures it."
        )
    raise InputError(
        f"DIR must hold {RESULTS}, got {str(directory)!r} without. "
        f"`flowcut bench ENGINE_DIR --out {directory}` writes it."
    )


def _document(path: Path) -> dict[str, Any]:
    """The JSON object in bench.json, of the schema that this version reads."""
    text = _text(path)
    try:
        found = parse(text)
    except ValueError as error:
        raise Unfit("content", "JSON, complete", _Said(f"{error}")) from None
    if not isinstance(found, dict):
        raise Unfit("content", "a JSON object", found)
    if (schema := found.get("schema")) != SCHEMA or type(schema) is not int:
        raise Unfit("schema", f"{SCHEMA}, which this version of flowcut-trt reads", schema)
    return found


def _text(path: Path) -> str:
    try:
        return _content(path, MOST_BYTES).decode("utf-8")
    except UnicodeDecodeError as error:
        raise Unfit("content", "UTF-8 text", _Said(str(error))) from None
    except OSError as error:
        raise InputError(f"{path} must be a file that can be read, got: {error.strerror or error}.") from None


def _content(path: Path, most: int) -> bytes:
    """Without reading gigabytes that somebody gave its name, or waiting for a pipe."""
    with open_plain(path) as raw, io.BufferedReader(raw) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise Unfit("content", f"at most {most} bytes", _Said("more"))
    return content


def _check(bench: Bench) -> None:
    """Raise Unfit where parts that fit each by itself do not fit together."""
    names = [each.name for each in bench.subjects]
    if len(set(names)) < len(names):
        raise Unfit("peers", "subjects of different names", names)
    for subject in bench.subjects:
        _check_subject(subject.name, subject.tokens, subject.patches, [each.batch for each in subject.batches])
    for i, one in enumerate(bench.comparisons):
        for role, name in (("subject", one.subject), ("against", one.against)):
            found = bench.subject(name)
            if found is None or found.at(one.batch) is None:
                rule = f"a subject measured at batch {one.batch} ({', '.join(names)})"
                raise Unfit(f"comparisons[{i}].{role}", rule, name)


def _check_subject(name: str, tokens: int, patches: int, batches: list[int]) -> None:
    if tokens > patches:
        raise Unfit(f"{name}: tokens", f"at most {patches}, its patches", tokens)
    if not batches or len(set(batches)) < len(batches):
        raise Unfit(f"{name}: batches", "one batch size or several different ones", batches)


def _pictures(directory: Path, bench: Bench) -> list[Picture]:
    """Those of the subjects there are. One that is missing or broken is no reason for no page.

    A subject that keeps every patch needs none.
    """
    found = []
    for name, subject in PICTURES.items():
        keeper = bench.subject(subject)
        if keeper is not None and ((directory / name).exists() or keeper.tokens < keeper.patches):
            found.append(_picture(directory / name, subject))
    return found


def _picture(path: Path, subject: str) -> Picture:
    from PIL import Image

    try:
        content = _content(path, MOST_PICTURE_BYTES)
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            image.verify()
            return Picture(path.name, subject, content, *image.size)
    except FileNotFoundError:
        reason = "it is not there"
    except Unfit:
        reason = f"it is larger than {MOST_PICTURE_BYTES >> 20} MB"
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        reason = "it is not a PNG picture that can be read"
    return Picture(path.name, subject, missing=reason)


class _Said:
    """For a message: words that are no value to be quoted."""

    def __init__(self, words: str) -> None:
        self._words = words

    def __repr__(self) -> str:
        return self._words
