"""What a batch that was answered comes to, for all of its prompts or for one."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Mapping
from dataclasses import dataclass

from engines.runtime.clock import Clock
from engines.runtime.decoding import Answering, Finish
from engines.runtime.pictures import Tokens


@dataclass(frozen=True)
class Generation:
    """Answers to B prompts.

    Attributes:
        texts: without special tokens.
        token_ids: the same as numbers; the end token is not among them.
        finish: why each answer is complete, see engines.runtime.decoding.Finish.
        kept: see Prefill.
        prompt_tokens: per prompt its length with its visual tokens.
        pruned_prompt_tokens: the same behind the pruning inside the decoder.
        latency_ms: as in Prefill, then "time_to_first_token" from the call on, "decode" for all further tokens,
            "decode_per_token" for one step of the whole batch (absent where every answer ended at its first token, so
            that no step was run), and "total".
    """

    texts: list[str]
    token_ids: list[list[int]]
    finish: list[Finish]
    kept: list[list[Tokens]]
    prompt_tokens: list[int]
    pruned_prompt_tokens: list[int]
    latency_ms: Mapping[str, float]

    @property
    def ended(self) -> list[bool]:
        """Whether each answer came to its end, rather than to max_new_tokens."""
        return [finish != "length" for finish in self.finish]


def generation(answering: Answering) -> Generation:
    """The result of a batch that has come to its end.

    Raises:
        RequestTimeout, RequestCancelled: what ended the first request that has no answer.
    """
    return _generation(answering, range(len(answering.replies)), answering.latency_ms())


def member(answering: Answering, index: int, clock: Clock) -> Generation:
    """The result of one request of a batch, once its answer is complete, whatever becomes of the others.

    Args:
        clock: the request's own, which has run since before the batch's: its stages are those before the batch.

    Raises:
        RequestTimeout, RequestCancelled: what ended the request.
    """
    batch, total = answering.latency_ms(), clock.since_start()
    first = batch["time_to_first_token"] + total - batch["total"]
    return _generation(answering, [index], {**batch, **clock.stages, "time_to_first_token": first, "total": total})


def forget_frames(error: BaseException | None) -> None:
    """Let go of what the functions that an error passed through held: the KV cache among them, which would live for as
    long as somebody keeps the error. Where it was raised stays known.

    Python also hangs behind it, as its context, what a caller was handling when it called: that is the caller's own.
    """
    callers = {frame for frame, _ in traceback.walk_stack(sys._getframe(1))}
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__
        if error is not None and error.__traceback__ is not None and error.__traceback__.tb_frame in callers:
            return


def _generation(answering: Answering, members: range | list[int], latency_ms: Mapping[str, float]) -> Generation:
    replies, prefill = [answering.replies[i] for i in members], answering.prefill
    for reply in replies:
        if reply.error is not None:
            raise reply.error
    if prefill is None:
        raise RuntimeError("the batch has not been run")
    return Generation(
        texts=[reply.text for reply in replies],
        token_ids=[reply.token_ids for reply in replies],
        finish=[reply.finish for reply in replies if reply.finish is not None],
        kept=[prefill.kept[i] for i in members],
        prompt_tokens=[int(prefill.lengths[i]) for i in members],
        pruned_prompt_tokens=[int(prefill.pruned_lengths[i]) for i in members],
        latency_ms=latency_ms,
    )
