"""A checkpoint from the Hugging Face Hub: the local cache when it is complete, otherwise a download."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from pathlib import Path

from flowcut.checkpoint import INDEX, SINGLE
from flowcut.deps import require
from flowcut.errors import FlowCutError

_FILES = ["*.safetensors", "*.json", "*.jinja"]
_REQUEST_SECONDS = 4.0
_ANSWER_SECONDS = 5.0  # covers name resolution too, which no request timeout does


def fetch(alias: str, repo: str) -> Path:
    """Directory with the checkpoint of `repo`, downloaded if it has to be.

    Raises:
        FlowCutError: the Hub cannot be reached (known within 10 s), refuses, or the download fails.
    """
    hub = require("huggingface_hub", extra="export")
    http_error = require("huggingface_hub.errors", extra="export").HTTPError
    known = (OSError, ValueError, RuntimeError, http_error)  # RuntimeError: what its Rust transfer raises
    cached = _cached(repo)
    if cached is not None:
        return cached
    try:
        _within(_ANSWER_SECONDS, lambda: hub.HfApi().model_info(repo, timeout=_REQUEST_SECONDS))
        return Path(hub.snapshot_download(repo, allow_patterns=_FILES))
    except known as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        endpoint = require("huggingface_hub.constants", extra="export").ENDPOINT
        raise FlowCutError(
            f"{alias} must be downloaded from {endpoint} ({repo}), got: {reason.rstrip('.')}. "
            "Give a local copy with MODEL=DIR, or build with WEIGHTS=random."
        ) from None


def complete(directory: Path) -> bool:
    """Whether a checkpoint's files are all there. An interrupted download leaves some of them."""
    needed = ["config.json", "tokenizer.json", "preprocessor_config.json"]
    if not (directory / SINGLE).is_file():
        try:
            index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
            needed += index["weight_map"].values()
        except (OSError, ValueError, KeyError):
            return False
    return all((directory / name).is_file() for name in needed)


def _cached(repo: str) -> Path | None:
    hub = require("huggingface_hub", extra="export")
    missing = require("huggingface_hub.errors", extra="export").LocalEntryNotFoundError
    try:
        directory = Path(hub.snapshot_download(repo, allow_patterns=_FILES, local_files_only=True))
    except missing:
        return None
    return directory if complete(directory) else None


def _within(seconds: float, request: Callable[[], object]) -> None:
    """Run `request`, waiting no longer than `seconds`; what it raises is raised here."""
    failure: list[BaseException] = []

    def run() -> None:
        try:
            request()
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:.0f} s")
    if failure:
        raise failure[0]
