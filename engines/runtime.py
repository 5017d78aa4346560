"""An engine directory, loaded: pictures and prompts to logits and answers.

    engine = load_engine("build/llava-tiny-16-fp16-rtx")
    answer = engine.generate("cat.jpg", question_prompt("What is this?"))
    answer.texts[0], answer.kept[0][0], answer.latency_ms["prefill"]

Needs numpy, pillow, tokenizers and one engine library; neither torch nor transformers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from engines.backends import Backend
from engines.loading import open_directory
from engines.pictures import Geometry, Tokens
from engines.session import Array, DeviceTensor, Session, State, feeds_of
from flowcut.anyres import image_slots
from flowcut.artifacts import Manifest
from flowcut.budget import Budget
from flowcut.config import LlavaConfig
from flowcut.contract import Limits, pruned_limit
from flowcut.errors import InputError
from flowcut.preprocess import ImageSettings, open_image
from flowcut.prompt import Batch, Pruning, Tokenizer, batch

Picture = Path | str | bytes | Image.Image | NDArray[np.uint8]
"""Whatever flowcut.preprocess.open_image takes."""
Pictures = Picture | Sequence[Picture]
"""Of one prompt."""
Tensor = Array | DeviceTensor
Pick = Callable[[NDArray[np.float32]], Tokens]
"""Chooses the next token of each sequence, [B], from logits [B, vocab]."""


@dataclass(frozen=True)
class Prefill:
    """What the model knows after reading B prompts.

    Attributes:
        logits: [B, vocab] float32, of the token that follows each prompt.
        kept: per prompt, per picture, the numbers of the patches left at the end, ascending: of LLaVA-NeXT as
            flowcut.anyres.kept_patches numbers them, and where visual tokens are dropped inside the decoder, behind
            that.
        lengths: [B], tokens of each prompt with its visual tokens.
        pruned_lengths: [B], the same behind the pruning inside the decoder; `lengths` where there is none.
        latency_ms: "preprocess" (decode, resize, tokenize), "vision", "prefill", and "total" around them all.
        device_ms: "vision" and "prefill" without the copies from and to the host.
        pictures: image_embeds, the projector's output, and for LLaVA-NeXT image_lengths of all pictures; state: the KV
            cache. Both are for decoding.
    """

    logits: NDArray[np.float32]
    kept: list[list[Tokens]]
    lengths: Tokens
    pruned_lengths: Tokens
    latency_ms: Mapping[str, float]
    device_ms: Mapping[str, float]
    pictures: Mapping[str, Tensor]
    state: State


@dataclass(frozen=True)
class Generation:
    """Answers to B prompts.

    Attributes:
        texts: without special tokens.
        token_ids: the same as numbers; the end token is not among them.
        ended: whether the model ended its answer itself, rather than at max_new_tokens.
        kept: see Prefill.
        prompt_tokens: per prompt its length with its visual tokens.
        pruned_prompt_tokens: the same behind the pruning inside the decoder.
        latency_ms: as in Prefill, then "time_to_first_token" from the call on, "decode" for all further tokens,
            "decode_per_token" for one step of the whole batch (absent where every answer ended at its first token, so
            that no step was run), and "total".
    """

    texts: list[str]
    token_ids: list[list[int]]
    ended: list[bool]
    kept: list[list[Tokens]]
    prompt_tokens: list[int]
    pruned_prompt_tokens: list[int]
    latency_ms: Mapping[str, float]


def load_engine(
    directory: Path | str, backend: str = "auto", threads: int | None = None, exact: bool = False
) -> LlavaEngine:
    """Load an engine directory.

    Args:
        backend: "rtx" or "trt", which must be the one the directory was built for; "ort" for ONNX Runtime (CUDA where
            onnxruntime-gpu and a GPU are present, else the CPU); "auto" for the directory's own, or ort where there is
            no GPU or its library is not installed. A plan that is refused, as one for another GPU or version is, is an
            error with "auto" too.
        threads: of ONNX Runtime on the CPU; None leaves it to choose.
        exact: on the CPU, multiply int8 and int4 weights by activations as they are, as TensorRT does. ONNX Runtime
            rounds these to int8 too, unless told not to, and is several times as fast.

    Raises:
        EngineError: not an engine directory, one whose files have changed, or an engine that cannot run here.
        FlowCutError: the backend's library is not installed.
    """
    parts = open_directory(Path(directory), backend, threads, exact)
    return LlavaEngine(parts.manifest, parts.backend, parts.vision, parts.language, parts.tokenizer, parts.settings)


class LlavaEngine:
    """A pruned LLaVA that answers. May be called from several threads: a request's state is its own."""

    def __init__(
        self,
        manifest: Manifest,
        backend: Backend,
        vision: Session,
        language: Session,
        tokenizer: Tokenizer,
        settings: ImageSettings,
    ) -> None:
        self.manifest, self.backend = manifest, backend
        self._vision, self._language = vision, language
        self._tokenizer, self._settings = tokenizer, settings
        self._geometry = Geometry(manifest.geometry, manifest.tokens)
        self._feeds = {spec.name: spec for spec in feeds_of(language.contract)}

    def prefill(self, images: Pictures | Sequence[Pictures], prompts: str | Sequence[str]) -> Prefill:
        """Read prompts with their pictures.

        Args:
            images: for each prompt a picture or a list of pictures; for a single str prompt, simply its own.
            prompts: with one `<image>` where each picture belongs (see flowcut.prompt.question_prompt).

        Raises:
            InputError: a picture or prompt that cannot be used, or more of them than the engine was built for.
        """
        start = time.perf_counter()
        requested, texts = self._requests(images, prompts)
        opened = [[open_image(picture) for picture in each] for each in requested]
        encoded = self._encode(opened, texts)
        pictures = [picture for each in opened for picture in each]
        vision_feeds = self._geometry.feeds(pictures, self._settings, self._vision.contract) if pictures else {}
        clock = _Clock(start, "preprocess")
        seen, places, vision_ms = self._see(vision_feeds)
        clock.stop("vision")
        state = self._language.allocate_state(len(texts))
        result = self._language.run(self._taken({**vars(encoded), **seen}, encoded.image_spans), state)
        clock.stop("prefill")
        kept = iter(self._geometry.left(places, result.arrays))
        lengths = result.arrays.get("lengths", encoded.lengths)
        return Prefill(
            logits=result.arrays["logits"],
            kept=[[next(kept) for _ in each] for each in opened],
            lengths=lengths,
            pruned_lengths=result.arrays.get("pruned_lengths", lengths),
            latency_ms=clock.finish(),
            device_ms={"vision": vision_ms, "prefill": result.device_ms},
            pictures=seen,
            state=state,
        )

    def generate(
        self, images: Pictures | Sequence[Pictures], prompts: str | Sequence[str], max_new_tokens: int = 64
    ) -> Generation:
        """Answer prompts, always with the likeliest token. Arguments and errors are those of `prefill`.

        Raises:
            InputError: also for more new tokens than the cache has room for.
        """
        start = time.perf_counter()
        self._check_new_tokens(max_new_tokens)
        prefill = self.prefill(images, prompts)
        answers = _Answers(len(prefill.lengths), self.manifest.geometry.eos_token_ids)
        steps = self._decode(prefill, greedy, max_new_tokens)
        answers.add(next(steps))
        first = time.perf_counter()
        count = 0
        while not answers.complete and (tokens := next(steps, None)) is not None:
            answers.add(tokens)
            count += 1
        decode_ms = (time.perf_counter() - first) * 1e3
        texts = [self._tokenizer.decode(ids) for ids in answers.token_ids]
        latency_ms = {
            **prefill.latency_ms,
            "time_to_first_token": (first - start) * 1e3,
            "decode": decode_ms,
            **({"decode_per_token": decode_ms / count} if count else {}),
            "total": (time.perf_counter() - start) * 1e3,
        }
        return Generation(
            texts=texts,
            token_ids=answers.token_ids,
            ended=answers.ended,
            kept=prefill.kept,
            prompt_tokens=prefill.lengths.tolist(),
            pruned_prompt_tokens=prefill.pruned_lengths.tolist(),
            latency_ms=latency_ms,
        )

    def _decode(self, prefill: Prefill, pick: Pick, count: int) -> Iterator[Tokens]:
        """`count` times the next token of every sequence, [B], computed as they are asked for.

        A sequence that has ended goes on being computed with what it would say next, which its owner ignores. The
        pictures are fed again, in no sequence: a graph that drops visual tokens scores them to no effect.
        """
        tokens = pick(prefill.logits)
        yield tokens
        last_token, image_rows = np.zeros(len(tokens), np.int64), np.full((len(tokens), 1), -1, np.int64)
        for step in range(count - 1):
            feeds = {
                "input_ids": tokens[:, None],
                "position_ids": (prefill.lengths + step)[:, None],
                "pruned_position_ids": (prefill.pruned_lengths + step)[:, None],
                "image_rows": image_rows,
                "last_token": last_token,
                **prefill.pictures,
            }
            tokens = pick(self._language.run(self._taken(feeds), prefill.state).arrays["logits"])
            yield tokens

    def _taken(self, known: Mapping[str, Tensor], spans: Array | None = None) -> dict[str, Tensor]:
        """Of what is known, the language graph's inputs. Pictures without `spans` are in no sequence."""
        feeds = {name: known[name] for name in self._feeds if name in known}
        if "image_spans" in self._feeds:
            none = np.zeros((known["image_embeds"].shape[0], 3), np.int64)
            feeds["image_spans"] = none if spans is None or not len(spans) else spans
        return feeds

    def _requests(
        self, images: Pictures | Sequence[Pictures], prompts: str | Sequence[str]
    ) -> tuple[list[list[Picture]], list[str]]:
        """Pictures per prompt, and prompts, both counted against the limits."""
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        entries: Any = [images] if isinstance(prompts, str) else images
        if not isinstance(entries, list | tuple) or len(entries) != len(texts):
            got = f"{len(entries)} entries" if isinstance(entries, list | tuple) else type(entries).__name__
            raise InputError(
                f"images must be a list with one entry for each of {len(texts)} prompts, got {got}. "
                "An entry is a picture or a list of pictures, [] for none."
            )
        pictures = [list(entry) if isinstance(entry, list | tuple) else [entry] for entry in entries]
        limits = self.manifest.limits
        self._check_count("prompts", len(texts), limits.max_batch, "batch")
        self._check_count("images", sum(map(len, pictures)), limits.max_images, "images")
        return pictures, texts

    def _encode(self, pictures: list[list[Image.Image]], prompts: list[str]) -> Batch:
        manifest, slots = self.manifest, image_slots(self.manifest.geometry, self.manifest.tokens)
        encoded = [
            self._tokenizer.encode(prompt, self._geometry.rows(each), slots)
            for each, prompt in zip(pictures, prompts, strict=True)
        ]
        return batch(encoded, manifest.limits.max_prompt, pruning(manifest.geometry, manifest.budget, manifest.limits))

    def _see(self, feeds: Mapping[str, Array]) -> tuple[dict[str, Tensor], Tokens, float]:
        """What of vision's outputs stays where it is, `kept` [images, slots], and the device's milliseconds."""
        if not feeds:
            return self._no_pictures(), np.empty((0, 0), np.int64), 0.0
        result = self._vision.run(feeds, keep=["image_embeds", "image_lengths"])
        return dict(result.kept), result.arrays["kept"], result.device_ms

    def _no_pictures(self) -> dict[str, Tensor]:
        """What the language graph takes where no prompt has a picture: one that no token refers to."""
        specs = (self._feeds[name] for name in ("image_embeds", "image_lengths") if name in self._feeds)
        return {spec.name: np.zeros(spec.shape({"images": 1}), spec.dtype) for spec in specs}

    def _check_count(self, field: str, got: int, limit: int, option: str) -> None:
        if got > limit:
            raise InputError(
                f"{field} must be at most {limit} at once (the engine's max_{option}), got {got}. "
                f"Send fewer, or rebuild the engine with --max-{option} {got}."
            )

    def _check_new_tokens(self, count: int) -> None:
        limit = self.manifest.limits.max_new_tokens
        if not isinstance(count, int) or isinstance(count, bool) or not 1 <= count <= limit:
            remedy = "Ask for fewer, or rebuild the engine with --max-new-tokens."
            raise InputError(f"max_new_tokens must be in 1..{limit} (the engine's limit), got {count!r}. {remedy}")


def pruning(config: LlavaConfig, budget: Budget, limits: Limits) -> Pruning | None:
    """What flowcut.prompt.batch has to know of the pruning inside the decoder."""
    if budget.llm_tokens is None:
        return None
    return Pruning(budget.llm_tokens, pruned_limit(config, budget.tokens, budget.llm_tokens, limits))


def greedy(logits: NDArray[np.float32]) -> Tokens:
    """The likeliest token; of equal ones the first."""
    tokens: Tokens = np.argmax(logits, axis=-1).astype(np.int64, copy=False)
    return tokens


class _Answers:
    """Tokens of each sequence up to its end token."""

    def __init__(self, count: int, eos_token_ids: Sequence[int]) -> None:
        self.token_ids: list[list[int]] = [[] for _ in range(count)]
        self.ended = [False] * count
        self._eos = frozenset(eos_token_ids)

    @property
    def complete(self) -> bool:
        return all(self.ended)

    def add(self, tokens: Tokens) -> None:
        """One token for each sequence; those that have ended ignore theirs."""
        for i, token in enumerate(tokens.tolist()):
            self.ended[i] = self.ended[i] or token in self._eos
            if not self.ended[i]:
                self.token_ids[i].append(token)


class _Clock:
    """Milliseconds of consecutive stages."""

    def __init__(self, start: float, first_stage: str) -> None:
        self._start = self._last = start
        self._stages: dict[str, float] = {}
        self.stop(first_stage)

    def stop(self, stage: str) -> None:
        """What happened since the last stage was `stage`."""
        now = time.perf_counter()
        self._stages[stage] = (now - self._last) * 1e3
        self._last = now

    def finish(self) -> dict[str, float]:
        return {**self._stages, "total": (time.perf_counter() - self._start) * 1e3}
