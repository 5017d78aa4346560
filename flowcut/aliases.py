"""Which model a name means: a local directory, a bundled checkpoint or a repository on the Hugging Face Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from flowcut.checkpoint import Weights, open_checkpoint, random_weights
from flowcut.config import LlavaConfig
from flowcut.errors import ConfigError
from flowcut.hub import fetch

ASSETS = Path(__file__).parent / "assets"
TOKENIZER = "tokenizer.json"


@dataclass(frozen=True)
class Alias:
    """A short name. `repo` is on the Hub; without one the checkpoint itself is bundled."""

    repo: str | None = None


# assets/<alias> holds each one's config.json and preprocessor_config.json. The tokenizer beside those of Hub models is
# llava-tiny's with their <image> and <pad> numbers: with random weights no tokenizer means more than another.
ALIASES: dict[str, Alias] = {
    "llava-tiny": Alias(),
    "llava-1.5-7b": Alias("llava-hf/llava-1.5-7b-hf"),
    "llava-1.5-13b": Alias("llava-hf/llava-1.5-13b-hf"),
    "llava-v1.6-vicuna-7b": Alias("llava-hf/llava-v1.6-vicuna-7b-hf"),
    "llava-v1.6-vicuna-13b": Alias("llava-hf/llava-v1.6-vicuna-13b-hf"),
}


@dataclass(frozen=True)
class Model:
    """A model found: `name` is safe as a file name, `files` holds tokenizer and preprocessor settings, `note` is what
    every output has to say about it ("random weights", "2 of 32 decoder layers", or nothing)."""

    name: str
    config: LlavaConfig
    weights: Weights
    files: Path
    note: str

    @property
    def tokenizer(self) -> Path:
        """Its tokenizer.json, or the stand-in's where it has none; `note` then says so."""
        own = self.files / TOKENIZER
        return own if own.is_file() else ASSETS / "stand-in" / TOKENIZER


def resolve(model: str, *, random: bool = False, decoder_layers: int | None = None, seed: int = 0) -> Model:
    """Find a model by directory or alias; a directory wins.

    `random` takes the geometry only and needs no network. `decoder_layers` keeps the first ones.

    Raises:
        ConfigError: neither a directory nor an alias, or a config.json that is not LLaVA's.
        CheckpointError: tensors that do not fit config.json.
        FlowCutError: the Hub does not answer.
    """
    name, files = _locate(model, random)
    full = LlavaConfig.from_file(files / "config.json")
    config = _keep_layers(full, decoder_layers)
    weights = random_weights(config, seed) if random else open_checkpoint(files, config)
    notes = ["random weights"] if random else []
    if config != full:
        notes.append(f"{config.text.num_hidden_layers} of {full.text.num_hidden_layers} decoder layers")
    if not (files / TOKENIZER).is_file():
        notes.append(f"stand-in tokenizer (no {TOKENIZER} in the checkpoint)")
    return Model(name, config, weights, files, ", ".join(notes))


def _locate(model: str, random: bool) -> tuple[str, Path]:
    directory = Path(model).expanduser()
    if model and directory.is_dir():
        return _safe_name(directory), directory
    model = next((name for name, alias in ALIASES.items() if alias.repo == model), model)
    if model not in ALIASES:
        close = get_close_matches(model, ALIASES, n=1)
        hint = f"Did you mean {close[0]}? " if close else ""
        raise ConfigError(
            f"model must be one of {', '.join(ALIASES)} or a directory, got {model!r}. {hint}"
            "A directory in the Hugging Face llava or llava_next format holds config.json, *.safetensors and "
            "tokenizer.json."
        )
    alias = ALIASES[model]
    if random or alias.repo is None:
        return model, ASSETS / model
    return model, fetch(model, alias.repo)


def _safe_name(directory: Path) -> str:
    return re.sub(r"[^A-Za-z0-9._-]+", "-", directory.resolve().name).strip(".-") or "model"


def _keep_layers(config: LlavaConfig, layers: int | None) -> LlavaConfig:
    if layers is None:
        return config
    if not 1 <= layers <= config.text.num_hidden_layers:
        raise ConfigError(f"decoder_layers must be in 1..{config.text.num_hidden_layers}, got {layers}.")
    return replace(config, text=replace(config.text, num_hidden_layers=layers))
