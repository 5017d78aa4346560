"""What tests feed to sessions of llava-tiny in fp16, on the fake GPU or a real one."""

from __future__ import annotations

import numpy as np
import recipe
from tiny_engine import LIMITS, TinyEngine

from engines.options import Options
from engines.sessions.cuda_device import CudaDevice
from engines.sessions.ort_session import OrtSession
from engines.sessions.session import Session
from engines.sessions.trt_session import TrtSession
from flowcut.contract import GraphContract, language_contract, vision_contract

Feeds = dict[str, np.ndarray]


def contract_of(tiny: TinyEngine, graph: str) -> GraphContract:
    make = {"vision": vision_contract, "language": language_contract}[graph]
    return make(tiny.model.config, tiny.schedule.tokens, "fp16", LIMITS)


def session_of(tiny: TinyEngine, graph: str, backend: str = "rtx", sha256: str = "", **options: object) -> TrtSession:
    path, chosen = tiny.directory / f"{graph}.engine", Options.make(options)
    return TrtSession(path, contract_of(tiny, graph), backend, CudaDevice(backend), chosen, sha256)


def reference(tiny: TinyEngine, graph: str) -> OrtSession:
    return OrtSession(tiny.directory / f"{graph}.onnx", contract_of(tiny, graph))


def pixels(tiny: TinyEngine, images: int, seed: int = 0) -> Feeds:
    size = tiny.model.config.vision.image_size
    return {"pixel_values": recipe.pixels(size, images, seed).astype(np.float16)}


def prompts(batch: int = 2, length: int = 24, seed: int = 0) -> Feeds:
    rng = np.random.default_rng(seed)
    rows = np.full((batch, length), -1)
    rows[0, 2:18] = np.arange(16)
    return {
        "input_ids": rng.integers(3, 448, (batch, length)),
        "position_ids": np.tile(np.arange(length), (batch, 1)),
        "image_rows": rows,
        "last_token": np.arange(batch) + length - batch,
        "image_embeds": rng.standard_normal((1, 16, 192)).astype(np.float16),
    }


def next_tokens(feeds: Feeds, step: int) -> Feeds:
    batch = len(feeds["last_token"])
    return feeds | {
        "input_ids": np.full((batch, 1), 5 + step),
        "position_ids": (feeds["last_token"] + 1 + step)[:, None],
        "image_rows": np.full((batch, 1), -1),
        "last_token": np.zeros(batch, np.int64),
    }


def steps_of(feeds: Feeds, decode: int = 4) -> list[Feeds]:
    return [feeds, *(next_tokens(feeds, i) for i in range(decode))]


def follow(session: Session, feeds: Feeds, decode: int = 4) -> np.ndarray:
    """Logits of a prompt and of the steps behind it, [1 + decode, B, V]."""
    state = session.allocate_state(len(feeds["last_token"]))
    return np.stack([session.run(step, state).arrays["logits"] for step in steps_of(feeds, decode)])


def close(got: np.ndarray, expected: np.ndarray) -> bool:
    return float(np.abs(got - expected).max()) <= 1e-3 * float(np.abs(expected).max())
