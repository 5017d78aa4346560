"""An engine directory, loaded: pictures and prompts to logits and answers.

    engine = load_engine("build/llava-tiny-16-fp16-rtx")
    answer = engine.generate("cat.jpg", question_prompt("What is this?"))
    answer.texts[0], answer.kept[0][0], answer.latency_ms["prefill"]

Needs numpy, pillow, tokenizers and one engine library; neither torch nor transformers.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.clock import Clock
from engines.control import Control
from engines.decoding import Answering, Chunk, Finish, Reply
from engines.gate import Gate
from engines.loading import Parts, open_directory
from engines.model import Model, Prefill
from engines.options import Options
from engines.pictures import Tokens
from engines.reading import Pictures, Reader, Request
from engines.sampling import Sampling

__all__ = ["Chunk", "Generation", "LlavaEngine", "Options", "Prefill", "Sampling", "load_engine"]

GREEDY = Sampling()


@dataclass(frozen=True)
class Generation:
    """Answers to B prompts.

    Attributes:
        texts: without special tokens.
        token_ids: the same as numbers; the end token is not among them.
        finish: why each answer is complete, see engines.decoding.Finish.
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


def load_engine(directory: Path | str, backend: str = "auto", **options: Any) -> LlavaEngine:
    """Load an engine directory.

    Args:
        backend: "rtx" or "trt", which must be the one the directory was built for; "ort" for ONNX Runtime (CUDA where
            onnxruntime-gpu and a GPU are present, else the CPU); "auto" for the directory's own, or ort where there is
            no GPU or its library is not installed. A plan that is refused, as one for another GPU or version is, is an
            error with "auto" too.
        options: the fields of engines.options.Options, such as threads=1 or concurrency=4.

    Raises:
        ConfigError: options that do not exist or do not fit.
        EngineError: not an engine directory, one whose files have changed, or an engine that cannot run here.
        FlowCutError: the backend's library is not installed.
    """
    chosen = Options.make(options)
    return LlavaEngine(open_directory(Path(directory), backend, chosen), chosen)


class LlavaEngine:
    """A pruned LLaVA that answers. May be called from many threads: a request's state is its own, and those that find
    no place wait in the order they came."""

    def __init__(self, parts: Parts, options: Options) -> None:
        self.manifest, self.backend, self.options = parts.manifest, parts.backend, options
        self.reader = Reader(parts.manifest, parts.tokenizer, parts.settings)
        self.gate = Gate(options.concurrency, options.waiting)
        self.model = Model(parts, self.reader, options.picture_cache_mb * 10**6)

    def prefill(
        self,
        images: Pictures | Sequence[Pictures],
        prompts: str | Sequence[str],
        *,
        timeout_s: float | None = None,
        cancel: threading.Event | None = None,
    ) -> Prefill:
        """Read prompts with their pictures.

        Args:
            images: for each prompt a picture or a list of pictures; for a single str prompt, simply its own.
            prompts: with one `<image>` where each picture belongs (see flowcut.prompt.question_prompt).
            timeout_s: seconds from now within which the answer is wanted, the time in the queue included.
            cancel: an event that another thread sets to call the request off.

        Raises:
            InputError: a picture or prompt that cannot be used, or more of them than the engine was built for.
            RequestTimeout, RequestCancelled: by the arguments of these names.
            QueueFull: more requests wait than may.
        """
        clock, control = Clock(), Control(timeout_s, cancel)
        requests = self.reader.read_all(images, prompts, Sampling(1), control)
        self.model.prepare(requests)
        clock.stop("preprocess")
        with self.gate.enter(control):
            clock.stop("queue")
            return self.model.prefill(requests, clock)

    def generate(
        self,
        images: Pictures | Sequence[Pictures],
        prompts: str | Sequence[str],
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        *,
        timeout_s: float | None = None,
        cancel: threading.Event | None = None,
    ) -> Generation:
        """Answer prompts. Other arguments and errors are those of `prefill`.

        Args:
            sampling: how to choose tokens and when to stop, of all prompts or of each; the likeliest token unless it
                says otherwise.

        Raises:
            InputError: also for more new tokens than the cache has room for.
        """
        answering = self._answering(images, prompts, sampling, timeout_s, cancel)
        for _ in answering:
            pass
        return generation(answering)

    def stream(
        self,
        images: Pictures | Sequence[Pictures],
        prompts: str | Sequence[str],
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        *,
        timeout_s: float | None = None,
        cancel: threading.Event | None = None,
    ) -> Iterator[Chunk]:
        """Answer prompts piece by piece, as they come. Arguments and errors are those of `generate`, raised when the
        first piece is asked for. Closing the iterator ends the request, which holds its place until then."""
        answering = self._answering(images, prompts, sampling, timeout_s, cancel)
        for chunks in answering:
            yield from chunks
        generation(answering)

    def answering(self, requests: Sequence[Request], control: Control, clock: Clock | None = None) -> Answering:
        """Requests that `reader` has read, whoever they are from, as one batch: iterate over its steps."""
        eos, tokenizer = self.manifest.geometry.eos_token_ids, self.reader.tokenizer
        replies = [Reply(i, request, tokenizer, eos) for i, request in enumerate(requests)]
        return Answering(self.model, self.gate, replies, control, clock)

    def _answering(
        self,
        images: Pictures | Sequence[Pictures],
        prompts: str | Sequence[str],
        sampling: Sampling | Sequence[Sampling],
        timeout_s: float | None,
        cancel: threading.Event | None,
    ) -> Answering:
        clock, control = Clock(), Control(timeout_s, cancel)
        return self.answering(self.reader.read_all(images, prompts, sampling, control), control, clock)


def generation(answering: Answering) -> Generation:
    """The result of a batch that has come to its end.

    Raises:
        RequestTimeout, RequestCancelled: what ended the first request that has no answer.
    """
    replies, prefill = answering.replies, answering.prefill
    for reply in replies:
        if reply.error is not None:
            raise reply.error
    if prefill is None:
        raise RuntimeError("the batch has not been run")
    return Generation(
        texts=[reply.text for reply in replies],
        token_ids=[reply.token_ids for reply in replies],
        finish=[reply.finish for reply in replies if reply.finish is not None],
        kept=prefill.kept,
        prompt_tokens=prefill.lengths.tolist(),
        pruned_prompt_tokens=prefill.pruned_lengths.tolist(),
        latency_ms=answering.latency_ms(),
    )
