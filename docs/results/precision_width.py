"""The error of one decoder layer of a 7B's size in each precision; precision.py writes it down."""

from __future__ import annotations

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress

from calib.awq import search
from calib.calibration import Calibration, smoothed
from calib.groups import DECODER, decoder_groups
from calib.inputs import Inputs
from engines.options import Options
from engines.pipeline import save_graph
from engines.sessions.ort_session import OrtSession
from engines.widen import widened, widened_contract
from export.language import language_model
from flowcut.aliases import Model, resolve
from flowcut.config import Precision
from flowcut.contract import Limits, exchange_dtype, language_contracts
from flowcut.language import DecoderLayer, Step
from flowcut.loading import load_module

MODEL, TOKENS = "llava-1.5-7b", 64
LAYER = f"{DECODER}0."
WIDTHS: tuple[tuple[Precision, bool], ...] = (
    ("fp32", False),
    ("fp16", False),
    ("bf16", False),
    ("int8", False),
    ("fp8", True),
    ("int4", False),
    ("int4", True),
)


@cache
def model() -> Model:
    """Two layers, so that the first is a stage of its own, which returns what it computed."""
    return resolve(MODEL, random=True, decoder_layers=2)


def inputs(seed: int) -> np.ndarray:
    """Embeddings [TOKENS, D] float32: channels of unequal size, as a trained decoder's are, to give AWQ something."""
    rng = np.random.Generator(np.random.PCG64(seed))
    size = model().config.text.hidden_size
    sizes = np.exp(np.random.Generator(np.random.PCG64(0)).standard_normal(size))
    return (0.5 * rng.standard_normal((TOKENS, size)) * sizes).astype(np.float32)


@cache
def layer() -> DecoderLayer:
    with torch.device("meta"):
        module = DecoderLayer(model().config.text)
    return load_module(module, model().weights, LAYER, torch.float32, "cpu")


@torch.inference_mode()
def run_torch(hidden: np.ndarray) -> np.ndarray:
    """The layer's output [TOKENS, D] in float32."""
    text = model().config.text
    step = Step.at(torch.arange(TOKENS)[None], text, torch.float32)
    keys, values = (torch.zeros(1, text.num_key_value_heads, TOKENS, text.head_size) for _ in range(2))
    return layer()(torch.from_numpy(hidden)[None], step, keys, values)[0].numpy()


@cache
def calibration() -> Calibration:
    """Ranges and scales of the one layer, from other inputs than the error is measured on."""
    groups = decoder_groups(model().config, 0)
    seen = Inputs(groups)
    with seen.watching(layer(), LAYER, lambda tokens: np.arange(tokens)):
        run_torch(inputs(1))
    scales = {}
    for group in groups:
        weights = [model().weights.load(f"{name}.weight").astype(np.float32) for name in group.layers]
        scales[group.name] = search(weights, seen.sample(group.name), seen.mean(group.name)).scale
    return Calibration(model().weights.sha256, seen.largest, scales, {}, "")


def layer_errors(setting: tuple[Precision, bool], progress: Progress) -> dict[str, Any]:
    """Relative error of what the layer adds, by ONNX Runtime, and the setting in words."""
    precision, calibrated = setting
    hidden = inputs(0)
    added = run_torch(hidden) - hidden
    wrong = run_ort(precision, calibrated, hidden, progress) - hidden - added
    how = {"int4": ", AWQ" if calibrated else ", to nearest"}.get(precision, "")
    return {
        "setting": precision + how, "model": MODEL, "width": hidden.shape[1], "tokens": TOKENS,
        "error": float(f"{np.sqrt(np.mean(wrong**2) / np.mean(added**2)):.3g}"),
    }  # fmt: skip


def run_ort(precision: Precision, calibrated: bool, hidden: np.ndarray, progress: Progress) -> np.ndarray:
    """The same through the exported graph; all tokens are a picture's, so no text embedding takes part."""
    config, weights = model().config, model().weights
    if calibrated and precision == "int4":
        weights = smoothed(weights, calibration(), {"language"})
    contract = language_contracts(config, TOKENS, precision, Limits(1, 1, TOKENS, 1), stages=2)[0]
    graph = language_model(weights, contract, precision, {}, calibration().ranges if calibrated else None)
    rows = np.arange(TOKENS)[None]
    feeds = {
        "input_ids": np.zeros_like(rows),
        "position_ids": rows,
        "image_rows": rows,
        "image_embeds": hidden[None].astype(exchange_dtype(precision)),
    }
    with tempfile.TemporaryDirectory(prefix="flowcut-") as folder:
        path = Path(folder) / f"{contract.name}.onnx"
        save_graph(graph, path, progress)
        if precision == "bf16":
            with widened(path) as copy:
                session = OrtSession(copy, widened_contract(contract), Options(exact=True))
        else:
            session = OrtSession(path, contract, Options(exact=True))
        return session.run(feeds, session.allocate_state(1)).arrays["hidden.1"][0].astype(np.float32)
