"""An engine directory, loaded: pictures and prompts to logits and answers.

    engine = load_engine("build/llava-tiny-16-fp16-rtx")
    answer = engine.generate("cat.jpg", question_prompt("What is this?"))
    answer.texts[0], answer.kept[0][0], answer.latency_ms["prefill"]

Needs numpy, pillow, tokenizers and one engine library; neither torch nor transformers.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from engines.loading import Parts, open_directory
from engines.options import Options
from engines.runtime.clock import Clock
from engines.runtime.control import Control
from engines.runtime.counters import Counters
from engines.runtime.decoding import Answering, Chunk, Reply
from engines.runtime.gate import Gate, closed
from engines.runtime.generation import Generation, forget_frames, generation
from engines.runtime.memory import MemoryReport, memory_report
from engines.runtime.model import Model, Prefill
from engines.runtime.reading import Pictures, Reader, Request
from engines.runtime.sampling import GREEDY, Sampling
from engines.runtime.scheduler import Batching, Work

__all__ = ["Chunk", "Generation", "LlavaEngine", "Options", "Prefill", "Sampling", "load_engine"]

LOG = logging.getLogger("flowcut.engines.runtime")


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
    engine = LlavaEngine(open_directory(Path(directory), backend, chosen), chosen)
    LOG.info("loaded %s: backend %s, %s, %s", directory, engine.backend, engine.manifest.limits, chosen)
    return engine


class LlavaEngine:
    """A pruned LLaVA that answers. May be called from many threads: a request's state is its own, and those that find
    no place wait in the order they came. In a `with` it is closed behind it."""

    def __init__(self, parts: Parts, options: Options) -> None:
        self.manifest, self.backend, self.options = parts.manifest, parts.backend, options
        self.reader, self.template = Reader(parts.manifest, parts.tokenizer, parts.settings), parts.template
        self._counters = Counters()
        self.gate = Gate(options.concurrency, options.waiting, self._counters)
        self._model: Model | None = Model(parts, self.reader, options.picture_cache_mb * 10**6, self._counters)

    @property
    def model(self) -> Model:
        """The graphs.

        Raises:
            EngineError: the engine is closed.
        """
        if (model := self._model) is None:
            raise closed()
        return model

    def counters(self) -> dict[str, Any]:
        """What was done since the engine was loaded, see engines.runtime.counters.Counters.snapshot."""
        return self._counters.snapshot()

    def memory(self) -> MemoryReport:
        """What the engine takes now, and what it may take."""
        return memory_report(self.manifest, self.backend, self.options, self.model)

    def close(self) -> None:
        """Refuse requests from now on, those that wait among them, and give the memory back as soon as the last one at
        work has ended, for which this does not wait."""
        if (model := self._model) is not None:
            self._model = None
            self.gate.close(model.close)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

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
            EngineError: the engine library failed, or the engine is closed.
        """
        clock, replies = Clock(), list[Reply]()
        with self._counted(clock, replies):
            control = Control(timeout_s, cancel)
            replies += self._replies(self.reader.read_all(images, prompts, Sampling(1), control))
            requests, model = [reply.request for reply in replies], self.model
            model.prepare(requests)
            clock.stop("preprocess")
            with self.gate.enter(control):
                clock.stop("queue")
                return replace(model.prefill(requests, clock), state=None)  # which is whoever's comes next

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
        clock, replies = Clock(), list[Reply]()
        with self._counted(clock, replies):
            return _result_of(self._begin(images, prompts, sampling, Control(timeout_s, cancel), clock, replies))

    def stream(
        self,
        images: Pictures | Sequence[Pictures],
        prompts: str | Sequence[str],
        sampling: Sampling | Sequence[Sampling] = GREEDY,
        *,
        timeout_s: float | None = None,
        cancel: threading.Event | None = None,
    ) -> Generator[Chunk, None, Generation]:
        """Answer prompts piece by piece, as they come, and return what `generate` does (which `yield from` gives).
        Arguments and errors are those of `generate`, raised when the first piece is asked for. Closing the iterator
        ends the request, which holds its place until then: one thread that begins as many streams as there are places
        (Options.concurrency) and asks for more waits for itself."""
        clock, replies = Clock(), list[Reply]()
        with self._counted(clock, replies):
            control = Control(timeout_s, cancel)
            return (yield from _chunks_of(self._begin(images, prompts, sampling, control, clock, replies)))

    def batching(self, max_wait_ms: float = 5.0, waiting: int = 256) -> Batching:
        """A queue whose requests, from whichever threads, are answered in batches of what the engine was built for:

            with engine.batching() as queue:
                tickets = [queue.submit(image, prompt) for image, prompt in questions]
                answers = [ticket.result() for ticket in tickets]

        The outputs are those of `generate`, but for rounding: sums in a batch may be taken in another order. It is to
        be ended, by `with` or close(): its threads hold it and the engine until then, even where nobody else does.

        Args:
            max_wait_ms: how long a request waits for others to join it, at most, before it asks for its place.
            waiting: requests that may be in the queue, pictures and all; one more is refused with QueueFull.

        Raises:
            ConfigError: not such numbers.
        """
        work = Work(self._read_one, self._together, self.gate, self._counters, self.manifest.limits)
        return Batching(work, max_wait_ms, waiting, self.options.concurrency)

    def _read_one(self, images: Pictures, prompt: str, sampling: Sampling, control: Control) -> Request:
        request = self.reader.read(images, prompt, sampling, control)
        self.model.prepare([request])
        return request

    def _together(self, requests: Sequence[Request]) -> Answering:
        return Answering(self.model, nullcontext(), self._replies(requests))

    def _replies(self, requests: Sequence[Request]) -> list[Reply]:
        eos, tokenizer = self.manifest.geometry.eos_token_ids, self.reader.tokenizer
        return [Reply(i, request, tokenizer, eos) for i, request in enumerate(requests)]

    def _begin(
        self,
        images: Pictures | Sequence[Pictures],
        prompts: str | Sequence[str],
        sampling: Sampling | Sequence[Sampling],
        control: Control,
        clock: Clock,
        replies: list[Reply],
    ) -> Answering:
        """Read a call, which fills `replies`."""
        replies += self._replies(self.reader.read_all(images, prompts, sampling, control))
        return Answering(self.model, self.gate.enter(control), replies, clock)

    @contextmanager
    def _counted(self, clock: Clock, replies: list[Reply]) -> Iterator[None]:
        """One call, whatever comes of it. An error that somebody keeps does not keep the call's memory: its `replies`
        and what has a name in functions called from here."""
        try:
            yield
        except BaseException as error:
            self._count(error, clock, replies)
            forget_frames(error)
            raise
        self._count(None, clock, replies)

    def _count(self, error: BaseException | None, clock: Clock, replies: list[Reply]) -> None:
        tokens = sum(len(reply.token_ids) for reply in replies)
        self._counters.ended(error, len(replies), tokens, clock.stages)
        replies.clear()


def _result_of(answering: Answering) -> Generation:
    for _ in answering:
        pass
    return generation(answering)


def _chunks_of(answering: Answering) -> Generator[Chunk, None, Generation]:
    with closing(iter(answering)) as steps:
        for chunks in steps:
            yield from chunks
    return generation(answering)
