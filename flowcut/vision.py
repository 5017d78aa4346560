"""CLIP vision tower with FlowCut inside, and LLaVA's projector, in eager PyTorch.

The reference that every exported graph is compared with, and the only place where the adaptive schedule runs.
Parameter names are the checkpoint's. Source: FlowCut, arXiv 2505.19536, as specified in docs/algorithm.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowcut.anyres import Tiling
from flowcut.checkpoint import Weights
from flowcut.config import LlavaConfig, VisionConfig
from flowcut.loading import load_module
from flowcut.packing import pack
from flowcut.pruner import Pruner
from flowcut.schedule import Schedule


@dataclass(frozen=True)
class VisionOutput:
    """What the tower returns for B images.

    Attributes:
        features: [B, T, hidden], hidden state -2 of the kept patches, before the projector.
        kept: [B, T] int64, original patch numbers, ascending.
        counts: [B, L+1] int64, patches entering layer 0, then leaving each layer.
        trace: per pruning point the layer and, per image, the patch numbers kept there.
    """

    features: Tensor
    kept: Tensor
    counts: Tensor
    trace: list[tuple[int, list[Tensor]]]


class VisionModel(nn.Module):
    """Pruned CLIP tower and projector: pixel_values [B, 3, S, S] -> image_embeds [B, T, text hidden].

    The B images are those that the tower sees: pictures of LLaVA-1.5, tiles of LLaVA-NeXT, which `see` makes one of.
    """

    def __init__(self, config: LlavaConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_tower = nn.ModuleDict({"vision_model": ClipTower(config.vision)})
        self.multi_modal_projector = Projector(config.vision.hidden_size, config.text.hidden_size)
        if config.anyres:
            self.image_newline = nn.Parameter(torch.empty(config.text.hidden_size))

    @staticmethod
    def from_weights(weights: Weights, dtype: torch.dtype = torch.float32, device: str = "cpu") -> VisionModel:
        """Build from checkpoint tensors, one at a time."""
        with torch.device("meta"):
            model = VisionModel(weights.config)
        return load_module(model, weights, "", dtype, device)

    def features(self, pixel_values: Tensor, schedule: Schedule) -> VisionOutput:
        """Run the tower. Every image is independent of the others in its batch, whatever the schedule."""
        tower = self.vision_tower["vision_model"]
        if schedule.kind == "adaptive" and len(pixel_values) > 1:
            return _stack([tower(p[None], schedule) for p in pixel_values])
        output: VisionOutput = tower(pixel_values, schedule)
        return output

    def forward(self, pixel_values: Tensor, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """image_embeds [B, T, text hidden] and kept [B, T]."""
        output = self.features(pixel_values, schedule)
        return self.multi_modal_projector(output.features), output.kept

    def see(self, tiles: Tensor, tiling: Tiling, schedule: Schedule) -> tuple[Tensor, Tensor]:
        """One picture of LLaVA-NeXT: tiles [tiles, 3, S, S], the base tile first, to visual tokens in reading order.

        Returns:
            embeddings [n, text hidden] and their places [n] (flowcut.anyres).
        """
        embeds, kept = self(tiles, schedule)
        return pack(embeds, kept, tiling, self.image_newline)


class ClipTower(nn.Module):
    """CLIP's vision transformer up to hidden state -2; the last layer and post_layernorm are not built."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)  # the checkpoints' spelling
        layers = [EncoderLayer(config) for _ in range(config.num_hidden_layers - 1)]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self._layers = layers

    def forward(self, pixel_values: Tensor, schedule: Schedule) -> VisionOutput:
        hidden = self.pre_layrnorm(self.embeddings(pixel_values))  # [B, N+1, hidden]
        pruner = Pruner(schedule, self.config.num_hidden_layers, len(hidden), hidden.device)
        for i, layer in enumerate(self._layers):
            q, k, v = layer.project(hidden)
            hidden = layer(hidden, q, k, v, pruner.attention_mask())
            hidden = pruner.after_layer(i, q, k, v, hidden)
        kept, counts, trace = pruner.finish()
        return VisionOutput(hidden[:, 1:], kept, counts, trace)


class Embeddings(nn.Module):
    """Patch, class and position embeddings: [B, 3, S, S] -> [B, N+1, hidden]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, config.patch_size, config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(config.patches + 1, config.hidden_size)

    def forward(self, pixel_values: Tensor) -> Tensor:
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)  # [B, N, hidden]
        cls = self.class_embedding.expand(len(patches), 1, -1)
        return torch.cat([cls, patches], 1) + self.position_embedding.weight


class EncoderLayer(nn.Module):
    """One pre-norm encoder layer whose q, k, v are visible to the pruner."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.heads = config.num_attention_heads
        self.layer_norm1 = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self.layer_norm2 = nn.LayerNorm(size, eps=config.layer_norm_eps)
        names = ("q_proj", "k_proj", "v_proj", "out_proj")
        self.self_attn = nn.ModuleDict({name: nn.Linear(size, size) for name in names})
        self.mlp = nn.ModuleDict(
            {"fc1": nn.Linear(size, config.intermediate_size), "fc2": nn.Linear(config.intermediate_size, size)}
        )

    def project(self, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v as [B, H, N+1, d]."""
        x = self.layer_norm1(hidden)
        q, k, v = (
            self.self_attn[n](x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for n in ("q_proj", "k_proj", "v_proj")
        )
        return q, k, v

    def forward(self, hidden: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return self.finish(hidden, F.scaled_dot_product_attention(q, k, v, attn_mask=mask))

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """All that follows the attention [B, H, N+1, d], on the hidden state [B, N+1, hidden] that went into it."""
        hidden = hidden + self.self_attn["out_proj"](attended.transpose(1, 2).flatten(2))
        x = self.mlp["fc1"](self.layer_norm2(hidden))
        out: Tensor = hidden + self.mlp["fc2"](x * torch.sigmoid(1.702 * x))  # quick_gelu
        return out


class Projector(nn.Module):
    """LLaVA-1.5's two-layer projector."""

    def __init__(self, vision_size: int, text_size: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(vision_size, text_size)
        self.linear_2 = nn.Linear(text_size, text_size)

    def forward(self, features: Tensor) -> Tensor:
        projected: Tensor = self.linear_2(F.gelu(self.linear_1(features)))
        return projected


def _stack(outputs: list[VisionOutput]) -> VisionOutput:
    """One output for a batch whose images ran alone. Their pruning points may differ, so each keeps its own trace."""
    layers = sorted({layer for o in outputs for layer, _ in o.trace})
    trace = [(layer, [_kept_after(o, layer) for o in outputs]) for layer in layers]
    return VisionOutput(
        torch.cat([o.features for o in outputs]),
        torch.cat([o.kept for o in outputs]),
        torch.cat([o.counts for o in outputs]),
        trace,
    )


def _kept_after(output: VisionOutput, layer: int) -> Tensor:
    """Patch numbers of a single image after `layer`, whether or not it pruned exactly there."""
    kept = torch.arange(int(output.counts[0, 0]))
    for at, numbers in output.trace:
        kept = numbers[0] if at <= layer else kept
    return kept
