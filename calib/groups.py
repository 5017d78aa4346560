"""Which linear layers a checkpoint's graphs have, and whose inputs can be scaled at no cost.

Layers that read the same input are a group. A scale per input channel goes into their columns, and its inverse into
what makes the input: the gain (and bias) of a norm, or the rows of a linear layer where nothing but the group reads
them.

    language   q, k, v <- input norm            o <- v, unless several query heads share its rows
               gate, up <- norm before the MLP  down <- up
    vision     q, k, v <- layer_norm1           fc1 <- layer_norm2

Vision's out_proj could be scaled through v, but FlowScore reads v: other patches would be kept. fc2 and the projector
read what no linear layer makes (quick_gelu, the residual stream, gelu).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from flowcut.config import LlavaConfig

TOWER = "vision_tower.vision_model.encoder.layers."
DECODER = "language_model.model.layers."
PROJECTOR = "multi_modal_projector."


@dataclass(frozen=True)
class Group:
    """Linear layers with one input that can be scaled.

    Attributes:
        layers: their names in the checkpoint, without ".weight"; the first one names the group.
        makers: tensors to be divided along their first axis.
        inputs: channels.
    """

    layers: tuple[str, ...]
    makers: tuple[str, ...]
    inputs: int

    @property
    def name(self) -> str:
        return self.layers[0]

    @property
    def part(self) -> str:
        return part_of(self.name)


def part_of(layer: str) -> str:
    """The graph that has the linear layer: "vision" or "language"."""
    return "language" if layer.startswith("language_model.") else "vision"


def groups(config: LlavaConfig) -> tuple[Group, ...]:
    """All groups, in the order in which data flows."""
    vision = (group for i in range(config.vision.num_hidden_layers - 1) for group in vision_groups(config, i))
    language = (group for i in range(config.text.num_hidden_layers) for group in decoder_groups(config, i))
    return (*vision, *language)


def vision_groups(config: LlavaConfig, index: int) -> tuple[Group, ...]:
    """Groups of one layer of the tower."""
    name, size = f"{TOWER}{index}.", config.vision.hidden_size
    qkv = tuple(f"{name}self_attn.{part}" for part in ("q_proj", "k_proj", "v_proj"))
    norms = [tuple(f"{name}{norm}.{leaf}" for leaf in ("weight", "bias")) for norm in ("layer_norm1", "layer_norm2")]
    return Group(qkv, norms[0], size), Group((f"{name}mlp.fc1",), norms[1], size)


def decoder_groups(config: LlavaConfig, index: int) -> tuple[Group, ...]:
    """Groups of one decoder layer."""
    text, name = config.text, f"{DECODER}{index}."
    attn, mlp = f"{name}self_attn.", f"{name}mlp."
    qkv = tuple(f"{attn}{part}" for part in ("q_proj", "k_proj", "v_proj"))
    attended = Group((f"{attn}o_proj",), (f"{attn}v_proj.weight",), text.hidden_size)
    shared = text.num_key_value_heads != text.num_attention_heads
    return (
        Group(qkv, (f"{name}input_layernorm.weight",), text.hidden_size),
        *(() if shared else (attended,)),
        Group((f"{mlp}gate_proj", f"{mlp}up_proj"), (f"{name}post_attention_layernorm.weight",), text.hidden_size),
        Group((f"{mlp}down_proj",), (f"{mlp}up_proj.weight",), text.intermediate_size),
    )


def linear_layers(config: LlavaConfig) -> Iterator[str]:
    """Every linear layer of the two graphs that a quantized precision rounds."""
    attention, mlp = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj", "down_proj")
    for i in range(config.vision.num_hidden_layers - 1):
        yield from (f"{TOWER}{i}.self_attn.{part}" for part in (*attention, "out_proj"))
        yield from (f"{TOWER}{i}.mlp.{part}" for part in ("fc1", "fc2"))
    yield from (f"{PROJECTOR}{part}" for part in ("linear_1", "linear_2"))
    for i in range(config.text.num_hidden_layers):
        yield from (f"{DECODER}{i}.self_attn.{part}" for part in (*attention, "o_proj"))
        yield from (f"{DECODER}{i}.mlp.{part}" for part in mlp)
