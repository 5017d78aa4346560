"""The question by which the language model drops visual tokens, for `flowcut prune`: each picture is asked it alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flowcut.aliases import Model
from flowcut.anyres import image_slots
from flowcut.budget import Budget
from flowcut.config import LlavaConfig
from flowcut.errors import InputError
from flowcut.prompt import Encoded, Tokenizer, question_prompt


@dataclass(frozen=True)
class Asked:
    """A prompt for one picture, and how many of its visual tokens stay. Its last token chooses them."""

    tokenizer: Tokenizer
    prompt: str
    llm_tokens: int

    def encode(self, rows: int, slots: int) -> Encoded:
        """With so many visual tokens, of an image_embeds that has `slots` rows for a picture."""
        return self.tokenizer.encode(self.prompt, [rows], slots)


def check_question(config: LlavaConfig, question: str | None, budget: Budget) -> None:
    """Raise InputError where a question and the pruning inside the language model do not go together."""
    if question is None and budget.llm_tokens is not None and not config.anyres:
        raise InputError(
            f"question must be given with llm_tokens, got none with {budget.llm_tokens}: inside the language model the "
            "last token of the question's prompt chooses. Add --question."
        )
    if question is None or budget.llm_tokens is not None:
        return
    if config.anyres:
        raise InputError(
            f"question must not be given with tokens 'all', got {question!r}: then the language model drops nothing. "
            "Give --tokens a number."
        )
    raise InputError(
        f"llm_tokens must be given with question for LLaVA-1.5, got none with {question!r}: the encoder does not read "
        "it, and the language model drops nothing unless told to. Add --llm-tokens."
    )


def make_asked(model: Model, question: str | None, budget: Budget, rows: Sequence[int]) -> Asked | None:
    """The prompt, or None without a question. `rows` are the visual tokens that each picture may have.

    Raises:
        InputError: a question that is no text, names a picture itself, or is too long for the decoder.
    """
    if question is None or budget.llm_tokens is None:
        return None
    config = model.config
    if not question.strip():
        raise InputError(f"question must not be empty, got {question!r}.")
    tokenizer = Tokenizer.from_file(model.tokenizer, config.image_token_id, config.text.vocab_size)
    asked = Asked(tokenizer, question_prompt(question, 1, config.anyres), budget.llm_tokens)
    most, visual = config.text.max_position_embeddings, max(rows)
    length = len(asked.encode(visual, image_slots(config, budget.tokens)).input_ids)
    if length > most:
        raise InputError(
            f"question must make a prompt of at most {most} tokens (the decoder's positions), got {length} ({visual} "
            "of them visual). Shorten it, or lower --tokens."
        )
    return asked
