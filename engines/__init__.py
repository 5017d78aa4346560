"""ONNX graphs to TensorRT engines, and their use: `from engines import load_engine`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engines.runtime import load_engine as load_engine

__all__ = ["load_engine"]


def __getattr__(name: str) -> Any:
    """Import the runtime when it is asked for: building needs none of it."""
    if name != "load_engine":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from engines.runtime import load_engine

    return load_engine
