"""Numbers as people read them, with their units."""

from __future__ import annotations

import json
from typing import Any

UNKNOWN = "not known"
NONE = "-"
TIMES = "\N{MULTIPLICATION SIGN}"
LIBRARIES = {"ort": "ONNX Runtime", "rtx": "TensorRT-RTX", "trt": "TensorRT"}
STAGES = {
    "preprocess": "preprocess",
    "vision": "vision",
    "prefill": "prefill",
    "rest": "rest",
    "total": "first token",
    "decode": "decode",
    "decode_per_token": "each further token",
}
"""Stages by the names of bench.json; "total" is the time from the picture's file to the first token."""


def times(ratio: float | None) -> str:
    """A speed-up."""
    return NONE if ratio is None else f"{ratio:.2f}{TIMES}"


def milliseconds(value: float | None) -> str:
    """Three digits or more, without the unit."""
    if value is None:
        return NONE
    return f"{value:.{0 if value >= 1000 else 1 if value >= 100 else 2 if value >= 1 else 3}f}"


def percent(share: float | None, digits: int = 0) -> str:
    """Of a share."""
    return NONE if share is None else f"{share:.{digits}%}"


def amount(value: float | None, unit: str, step: int = 1000) -> str:
    """With a prefix: 1.5 T, 20 G. step: 1024 for memory."""
    if value is None:
        return NONE
    prefixes, binary = " kMGTPE", step == 1024
    power = 0
    while value >= step and power < len(prefixes) - 1:
        value, power = value / step, power + 1
    prefix = prefixes[power].strip() + ("i" if binary and power else "")
    return f"{value:.{0 if power == 0 else 1 if value >= 100 else 2}f} {prefix.replace('ki', 'Ki')}{unit}"


def count(number: int, noun: str) -> str:
    """1 picture, 2 pictures."""
    return f"{number} {noun}{'s' * (number != 1)}"


def setting(value: Any) -> str:
    """A setting or version of any kind."""
    if isinstance(value, str):
        return value
    if isinstance(value, list | tuple) and all(isinstance(each, str | int | float) for each in value):
        return ", ".join(str(each) for each in value) or "none"
    if value is None:
        return "none"
    return json.dumps(value, ensure_ascii=False, default=str)


def library(backend: str) -> str:
    """The name of a backend's library."""
    return LIBRARIES.get(backend, backend)
