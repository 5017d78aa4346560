"""Prompts with pictures as a runtime feeds them to a `language` graph that drops visual tokens, and how it is run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]


@dataclass(frozen=True)
class Picture:
    """Visual tokens [n, D], and the rows that the host leaves for them."""

    tokens: Array
    capacity: int


Prompt = Sequence[int | Picture]
"""Token numbers and pictures, in order."""


def feeds(prompts: Sequence[Prompt], slots: int, llm_tokens: int, width: int, lengths: bool) -> Arrays:
    """A prefill of right-padded prompts; rows that are no visual token hold noise, as vision's do."""
    rng = np.random.default_rng(7)
    pictures = [(b, item) for b, prompt in enumerate(prompts) for item in prompt if isinstance(item, Picture)]
    embeds = rng.standard_normal((max(1, len(pictures)), slots, width)).astype(np.float32)
    spans, counts = np.zeros((len(embeds), 3), np.int64), np.zeros(len(embeds), np.int64)
    ids, rows = ([list[int]() for _ in prompts] for _ in range(2))
    for i, (_, picture) in enumerate(pictures):
        embeds[i, : len(picture.tokens)] = picture.tokens
        counts[i] = len(picture.tokens)
    number = iter(range(len(pictures)))
    for b, prompt in enumerate(prompts):
        for item in prompt:
            if isinstance(item, Picture):
                i = next(number)
                spans[i] = b, len(ids[b]), item.capacity
                rows[b] += range(i * slots, i * slots + item.capacity)
                ids[b] += [5] * item.capacity
            else:
                rows[b].append(-1)
                ids[b].append(item)
    longest = max(map(len, ids))
    left = [
        len(ids[b]) - sum(max(0, p.capacity - llm_tokens) for p in prompt if isinstance(p, Picture))
        for b, prompt in enumerate(prompts)
    ]
    arrays = {
        "input_ids": np.array([[*row, *[3] * (longest - len(row))] for row in ids]),
        "position_ids": np.tile(np.arange(longest), (len(prompts), 1)),
        "image_rows": np.array([[*row, *[-1] * (longest - len(row))] for row in rows]),
        "last_token": np.array([len(row) - 1 for row in ids]),
        "image_embeds": embeds,
        "image_spans": spans,
        "pruned_position_ids": np.tile(np.arange(max(left)), (len(prompts), 1)),
    }
    return arrays | ({"image_lengths": counts} if lengths else {})


def decode_feeds(tokens: Array, lengths: Array, pruned_lengths: Array, like: Arrays) -> Arrays:
    """One more token [B] per sequence behind `lengths` and `pruned_lengths` of them. The dummy picture is of nobody."""
    batch = len(tokens)
    arrays = {
        "input_ids": tokens[:, None],
        "position_ids": lengths[:, None],
        "image_rows": np.full((batch, 1), -1),
        "last_token": np.zeros(batch, np.int64),
        "image_embeds": np.zeros((1, *like["image_embeds"].shape[1:]), np.float32),
        "image_spans": np.zeros((1, 3), np.int64),
        "pruned_position_ids": pruned_lengths[:, None],
    }
    return arrays | ({"image_lengths": np.array([9])} if "image_lengths" in like else {})


class Decoder:
    """The graphs of one decoder on ONNX Runtime, run one after the other; holds their cache."""

    def __init__(self, paths: Sequence[Path], batch: int) -> None:
        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = 1, 3
        self._graphs = [ort.InferenceSession(path, options, providers=["CPUExecutionProvider"]) for path in paths]
        self.cache = {
            i.name: np.zeros((batch, *i.shape[1:]), np.float16 if "float16" in i.type else np.float32)
            for graph in self._graphs
            for i in graph.get_inputs()
            if i.name.startswith("past.")
        }

    def run(self, step: Arrays) -> Arrays:
        """All outputs but the cache."""
        known = dict(step)
        for graph in self._graphs:
            names = [i.name for i in graph.get_inputs()]
            types = {i.name: np.float16 if "float16" in i.type else np.float32 for i in graph.get_inputs()}
            given = {name: known[name] for name in names if name in known}
            for name, array in given.items():
                if array.dtype == np.float32:
                    given[name] = array.astype(types[name])
            caches = {name: self.cache[name] for name in names if name in self.cache}
            outputs = [o.name for o in graph.get_outputs()]
            for name, array in zip(outputs, graph.run(outputs, given | caches), strict=True):
                if name.startswith("present."):
                    self.cache[name.replace("present", "past")] = array
                else:
                    known[name] = array
        return {name: array for name, array in known.items() if name not in step}

    def generate(self, prefill: Arrays, steps: int) -> tuple[Arrays, Array, list[Array]]:
        """The prefill's outputs, greedy tokens [B, steps + 1], and the logits of every step."""
        found = self.run(prefill)
        logits, tokens = [found["logits"]], [found["logits"].argmax(1)]
        for i in range(steps):
            step = decode_feeds(tokens[-1], found["lengths"] + i, found["pruned_lengths"] + i, prefill)
            logits.append(self.run(step)["logits"])
            tokens.append(logits[-1].argmax(1))
        return found, np.stack(tokens, 1), logits
