"""Errors that a user can mend. The command line prints one as a single line and exits 1."""

from __future__ import annotations


class FlowCutError(Exception):
    """Something the user can mend: "<field> must be <rule>, got <value>." and then the remedy."""


class ConfigError(FlowCutError):
    """A setting, a config.json field or a schedule that does not fit."""


class CheckpointError(FlowCutError):
    """A checkpoint whose files or tensors are missing, extra, misshaped or unreadable."""


class InputError(FlowCutError):
    """A picture or a prompt that cannot be used."""


class TooLarge(InputError):
    """More tokens or pictures than the engine was built for."""


class EngineError(FlowCutError):
    """An engine or engine directory that cannot be built, loaded or run."""


class RequestTimeout(FlowCutError):
    """A request that was not answered in its time. The engine is well, and so are other requests."""


class RequestCancelled(FlowCutError):
    """A request that its owner called off."""


class QueueFull(FlowCutError):
    """More requests than may wait. Nothing was begun: send it again later."""
