"""Optional dependencies, imported where they are used and named with the extra that installs them."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from flowcut.errors import FlowCutError


def available(module: str) -> bool:
    """Whether `module` can be found, without importing it."""
    return importlib.util.find_spec(module) is not None


def require(module: str, extra: str) -> ModuleType:
    """Import `module`, or say which extra installs it.

    Raises:
        FlowCutError: the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.split(".")[0]:
            raise
        raise FlowCutError(
            f"{error.name} is not installed. In the checkout, `make setup` installs everything, "
            f"pip install -e '.[{extra}]' what is missing."
        ) from None
