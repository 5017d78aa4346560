"""How many visual tokens are left where: in the encoder, and after the second layer of the decoder.

LLaVA-1.5 prunes in the encoder; with `--llm-tokens` again inside the language model. LLaVA-NeXT's one number is the
whole picture's budget: half of it is kept of every tile, all of it inside the language model (docs/algorithm.md 5).
"""

from __future__ import annotations

from dataclasses import dataclass

from flowcut.config import LlavaConfig, is_integer
from flowcut.errors import ConfigError
from flowcut.schedule import check_tokens, default_tokens, file_tokens

PRUNE_LAYER = 1
"""Index of the decoder layer after which visual tokens are dropped."""
NEXT_SHARE = 160 / 2880


@dataclass(frozen=True)
class Budget:
    """Visual tokens kept.

    Attributes:
        tokens: of each image that the tower sees: a picture of LLaVA-1.5, a tile of LLaVA-NeXT.
        llm_tokens: of each picture from the decoder layer after PRUNE_LAYER on; None: nothing is dropped there.
    """

    tokens: int
    llm_tokens: int | None = None

    def __post_init__(self) -> None:
        for name, value in (("tokens", self.tokens), ("llm_tokens", self.llm_tokens)):
            absent = name == "llm_tokens" and value is None
            if not absent and not (is_integer(value) and value >= 1):
                raise ConfigError(f"{name} must be an integer of at least 1, got {value!r}.")

    def label(self, config: LlavaConfig) -> str:
        """For the names of directories: "64", "192to64", and the whole picture's for LLaVA-NeXT."""
        if config.anyres or self.llm_tokens is None:
            return str(self.asked(config))
        return f"{self.tokens}to{self.llm_tokens}"

    def asked(self, config: LlavaConfig) -> int:
        """The number that --tokens gives: a picture's, for LLaVA-NeXT that of all its tiles."""
        return (self.llm_tokens or self.tokens * config.max_tiles) if config.anyres else self.tokens


def make_budget(
    config: LlavaConfig, tokens: int | str | None, schedule: str = "", llm_tokens: int | None = None
) -> Budget:
    """What --tokens, --schedule and --llm-tokens mean for a model.

    Args:
        tokens: a number, "all", or None for the schedule file's, else the default: 11.1% of the patches of LLaVA-1.5,
            5.6% (160 of 2880) of LLaVA-NeXT's.

    Raises:
        ConfigError: numbers that the model does not have, or that leave nothing to drop.
    """
    if config.anyres:
        budget = _next_budget(config, tokens, schedule, llm_tokens)
    else:
        patches = config.vision.patches
        chosen = (file_tokens(schedule) or default_tokens(patches)) if tokens is None else tokens
        kept = patches if chosen == "all" else chosen
        if not is_integer(kept):
            raise ConfigError(f"tokens must be an integer or 'all', got {kept!r}.")
        check_tokens(kept, patches)
        _check_llm_tokens(kept, llm_tokens)
        budget = Budget(kept, llm_tokens)
    check_budget(config, budget)
    return budget


def check_budget(config: LlavaConfig, budget: Budget) -> None:
    """Raise ConfigError where the decoder has no layer left to see fewer tokens."""
    layers = config.text.num_hidden_layers
    if budget.llm_tokens is not None and layers < PRUNE_LAYER + 2:
        raise ConfigError(
            f"decoder_layers must be at least {PRUNE_LAYER + 2} where visual tokens are dropped inside the language "
            f"model (after its second layer), got {layers}."
        )


def _next_budget(config: LlavaConfig, tokens: int | str | None, schedule: str, llm_tokens: int | None) -> Budget:
    patches = config.vision.patches
    if llm_tokens is not None:
        raise ConfigError(
            f"llm_tokens must not be given for LLaVA-NeXT, got {llm_tokens}. Its tokens are the whole picture's: half "
            "are kept of every tile, all of them inside the language model."
        )
    if tokens == "all":
        return Budget(patches)
    most = 2 * (patches - 1)
    if tokens is None:
        per_tile = file_tokens(schedule)
        share = 2 * round(patches * config.max_tiles * NEXT_SHARE / 2)  # of very many tiles, more than half can be
        tokens = 2 * per_tile if per_tile else min(max(2, share), most)
    if not is_integer(tokens) or tokens % 2 or not 2 <= tokens <= most:
        raise ConfigError(
            f"tokens must be even and in 2..{most} for LLaVA-NeXT (half are kept of every tile of {patches} patches), "
            f"or 'all', got {tokens!r}."
        )
    return Budget(tokens // 2, tokens)


def _check_llm_tokens(tokens: int, kept: int | None) -> None:
    if kept is not None and not (is_integer(kept) and 1 <= kept < tokens):
        raise ConfigError(
            f"llm_tokens must be in 1..{tokens - 1} (fewer than the {tokens} tokens that the encoder keeps), "
            f"got {kept!r}."
        )
