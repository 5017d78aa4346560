"""Names, shapes and dtypes of a LLaVA-1.5 or LLaVA-NeXT checkpoint's tensors.

One spelling is used here, that of the `llava-hf/llava-1.5-*-hf` repositories: `vision_tower.vision_model.*`,
`multi_modal_projector.*`, `language_model.model.*`, `language_model.lm_head.weight`.
"""

from __future__ import annotations

import hashlib
import json
import re
from typing import Any

import numpy as np
import numpy.typing as npt

from flowcut.config import LlavaConfig, TextConfig, VisionConfig
from flowcut.deps import require
from flowcut.errors import CheckpointError

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

NEWLINE = "image_newline"
"""LLaVA-NeXT's embedding at the end of a row of patches, [text hidden]."""
_TILE = 256  # rows of a matrix that stay in the processor's cache together with what becomes of them
_SPELLINGS = (
    # transformers 5: the tower has lost its inner module, though some versions still saved it
    (re.compile(r"^model\.vision_tower\.(?:vision_model\.)?"), "vision_tower.vision_model."),
    (re.compile(r"^model\.multi_modal_projector\."), "multi_modal_projector."),
    (re.compile(r"^model\.language_model\."), "language_model.model."),
    (re.compile(r"^lm_head\."), "language_model.lm_head."),
    (re.compile(r"^model\.image_newline$"), NEWLINE),
)


def expected_tensors(config: LlavaConfig) -> dict[str, Shape]:
    """Shape of every tensor of a checkpoint, by name; `lm_head` is absent where it is the embedding.

    The tower's last layer and its post_layernorm are included: they are stored though LLaVA never runs them.
    """
    inner, outer = config.vision.hidden_size, config.text.hidden_size
    return {
        **_tower_tensors(config.vision, "vision_tower.vision_model."),
        **_linear("multi_modal_projector.linear_1", outer, inner),
        **_linear("multi_modal_projector.linear_2", outer, outer),
        **_decoder_tensors(config.text, "language_model."),
        **({NEWLINE: (outer,)} if config.anyres else {}),
    }


def _tower_tensors(v: VisionConfig, prefix: str) -> dict[str, Shape]:
    out: dict[str, Shape] = {
        f"{prefix}embeddings.class_embedding": (v.hidden_size,),
        f"{prefix}embeddings.patch_embedding.weight": (v.hidden_size, 3, v.patch_size, v.patch_size),
        f"{prefix}embeddings.position_embedding.weight": (v.patches + 1, v.hidden_size),
    }
    for norm in ("pre_layrnorm", "post_layernorm"):  # pre_layrnorm: the checkpoints' spelling
        out |= _linear(prefix + norm, v.hidden_size)
    for i in range(v.num_hidden_layers):
        layer = f"{prefix}encoder.layers.{i}."
        out |= _linear(f"{layer}layer_norm1", v.hidden_size) | _linear(f"{layer}layer_norm2", v.hidden_size)
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            out |= _linear(f"{layer}self_attn.{name}", v.hidden_size, v.hidden_size)
        out |= _linear(f"{layer}mlp.fc1", v.intermediate_size, v.hidden_size)
        out |= _linear(f"{layer}mlp.fc2", v.hidden_size, v.intermediate_size)
    return out


def _decoder_tensors(t: TextConfig, prefix: str) -> dict[str, Shape]:
    d, m, kv = t.hidden_size, t.intermediate_size, t.num_key_value_heads * t.head_size
    out: dict[str, Shape] = {f"{prefix}model.embed_tokens.weight": (t.vocab_size, d)}
    for i in range(t.num_hidden_layers):
        layer = f"{prefix}model.layers.{i}."
        out |= {f"{layer}{norm}.weight": (d,) for norm in ("input_layernorm", "post_attention_layernorm")}
        rows = {"q_proj": d, "k_proj": kv, "v_proj": kv, "o_proj": d}
        out |= {f"{layer}self_attn.{name}.weight": (n, d) for name, n in rows.items()}
        out |= {f"{layer}mlp.{name}.weight": (m, d) for name in ("gate_proj", "up_proj")}
        out[f"{layer}mlp.down_proj.weight"] = (d, m)
    out[f"{prefix}model.norm.weight"] = (d,)
    if not t.tie_word_embeddings:
        out[f"{prefix}lm_head.weight"] = (t.vocab_size, d)
    return out


def _linear(name: str, *shape: int) -> dict[str, Shape]:
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def canonical_name(name: str) -> str:
    """The name used here for a tensor of a file in either spelling."""
    for pattern, prefix in _SPELLINGS:
        name, changed = pattern.subn(prefix, name)
        if changed:
            break
    return name


def numpy_dtype(name: str) -> np.dtype[Any]:
    """numpy's dtype of a name; bfloat16 is ml_dtypes'."""
    return np.dtype(require("ml_dtypes", extra="export").bfloat16 if name == "bfloat16" else name)


def geometry_digest(config: LlavaConfig) -> hashlib._Hash:
    """A SHA-256 begun with the geometry, for the tensors' content to be added."""
    return hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True).encode())


def transposed(matrix: Array) -> Array:
    """A contiguous copy of matrix.T, a few rows at a time: as a whole, int8 takes seven times as long."""
    out = np.empty(matrix.shape[::-1], matrix.dtype)
    for start in range(0, len(matrix), _TILE):
        out[:, start : start + _TILE] = matrix[start : start + _TILE].T
    return out


def narrowed(name: str, array: Array, dtype: Any, precision: str) -> Array:
    """A checkpoint's tensor as `dtype`, which `precision` stores or computes in.

    Raises:
        CheckpointError: a value that is not finite, or is not in `dtype`.
    """
    with np.errstate(over="ignore"):  # what follows says which tensor it was
        narrow = array.astype(dtype, copy=False)
    if not np.isfinite(narrow).all():
        check_finite(name, array)
        check_finite(name, narrow, precision)
    return narrow


def check_finite(name: str, array: Array, precision: str = "") -> None:
    """Raise CheckpointError where `array`, a checkpoint's tensor or what became of it in `precision`, is not finite."""
    finite = np.isfinite(array)
    if finite.all():
        return
    first = tuple(int(i) for i in np.unravel_index(finite.argmin(), finite.shape))
    as_what = f" in {precision}" if precision else ""
    remedy = " Choose another precision, or mend the checkpoint." if precision else " Mend the checkpoint."
    raise CheckpointError(
        f"{name} must be finite{as_what}, got {array[first]} at {list(first)} and "
        f"{finite.size - int(finite.sum())} such values in all.{remedy}"
    )
