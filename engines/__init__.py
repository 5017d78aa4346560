"""ONNX graphs to TensorRT engines, and their use: `from engines import load_engine`."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engines.options import Options as Options
    from engines.runtime.chat import Chat as Chat
    from engines.runtime.engine import LlavaEngine as LlavaEngine
    from engines.runtime.engine import load_engine as load_engine
    from engines.runtime.generation import Generation as Generation
    from engines.runtime.sampling import Sampling as Sampling

_HOMES = {
    "Chat": "engines.runtime.chat",
    "Generation": "engines.runtime.generation",
    "LlavaEngine": "engines.runtime.engine",
    "Options": "engines.options",
    "Sampling": "engines.runtime.sampling",
    "load_engine": "engines.runtime.engine",
}
__all__ = ["Chat", "Generation", "LlavaEngine", "Options", "Sampling", "load_engine"]


def __getattr__(name: str) -> Any:
    """Import the runtime when it is asked for: building needs none of it."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
