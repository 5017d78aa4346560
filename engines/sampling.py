"""How the next token is chosen, and when an answer ends: for each prompt of a batch on its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowcut.config import is_integer
from flowcut.errors import ConfigError


@dataclass(frozen=True)
class Sampling:
    """What `generate` of transformers calls by the same names.

    Attributes:
        max_new_tokens: longest answer.
    """

    max_new_tokens: int = 64

    def __post_init__(self) -> None:
        if not is_integer(self.max_new_tokens) or self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens must be at least 1, got {self.max_new_tokens!r}.")


class Sampler:
    """The choices for one prompt.

    Args:
        prompt_ids: the prompt's tokens, visual ones as image_token_id.
    """

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int] | NDArray[np.int64]) -> None:
        self._sampling = sampling

    def next(self, logits: NDArray[np.float32]) -> int:
        """The next token, from its logits [vocab]."""
        return int(np.argmax(logits))
