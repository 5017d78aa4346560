"""Stage 1: the CLIP tower, taught what the renderer knows.

Patches learn what they show (shape, colour, glyph, size, where its middle is), read linearly from hidden state -2, as
the projector will. CLS learns which things the picture holds, at five depths, so that its attention has a
reason at every layer that FlowCut scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from flowcut.config import VisionConfig
from flowcut.tiny.drawing import GRID, GROUND, PATCH, PATCHES, UNCLEAR, Labels
from flowcut.tiny.scenes import COLOURS, GLYPHS, LARGEST, MOST, SHAPES, SIZE
from flowcut.vision import Embeddings, EncoderLayer

CLS_DEPTHS = (4, 6, 8)
"""Hidden states whose CLS is asked too, beside -2 and the last."""
SEVERAL = 5  # "4 or more"


class Tower(nn.Module):
    """The whole tower, its last layer and norm included, under the checkpoint's names, with a fast way through it.

    PyTorch's fused attention is three times slower than two products and a softmax here: short sequences, small heads.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        size = config.hidden_size
        self.embeddings = Embeddings(config)
        self.pre_layrnorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        layers = [EncoderLayer(config) for _ in range(config.num_hidden_layers)]
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(layers)})
        self.post_layernorm = nn.LayerNorm(size, eps=config.layer_norm_eps)
        self._layers = layers
        self.apply(_initialise)

    def forward(self, patches: Tensor) -> list[Tensor]:
        """patches [B, N, 3 * P * P] -> all hidden states, [B, N+1, hidden] each; the last is normed."""
        e = self.embeddings
        x = F.linear(patches, e.patch_embedding.weight.flatten(1))
        x = torch.cat([e.class_embedding.expand(len(x), 1, -1), x], 1) + e.position_embedding.weight
        states = [self.pre_layrnorm(x)]
        for layer in self._layers:
            states.append(_through(layer, states[-1]))
        states[-1] = self.post_layernorm(states[-1])
        return states


def _through(layer: EncoderLayer, hidden: Tensor) -> Tensor:
    q, k, v = layer.project(hidden)
    return layer.finish(hidden, ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).softmax(-1) @ v)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)
    elif isinstance(module, Embeddings):
        nn.init.normal_(module.class_embedding, std=0.02)
        nn.init.normal_(module.position_embedding.weight, std=0.02)


PATCH_PARTS = {"shape": len(SHAPES) + 1, "colour": len(COLOURS) + 1, "glyph": len(GLYPHS) + 1, "centre": 1, "where": 5}
"""What is read from a patch; class 0 is the ground's. where: the patch's own x, y, then its thing's x, y, size."""
PAIRS = len(SHAPES) * len(COLOURS)
CLS_PARTS = {
    "pairs": PAIRS,
    "glyphs": len(GLYPHS),
    "counts": (len(SHAPES) + len(COLOURS)) * SEVERAL,
    "things": MOST + 1,
}


class Teacher(nn.Module):
    """The tower with linear readers on its hidden states. Its loss is what stage 1 minimises."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.tower = Tower(config)
        self.patch_reader = nn.Linear(config.hidden_size, sum(PATCH_PARTS.values()))
        self.cls_readers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(config.hidden_size), nn.Linear(config.hidden_size, sum(CLS_PARTS.values())))
            for _ in range(len(CLS_DEPTHS) + 2)
        )
        self.patch_reader.apply(_initialise)
        self.cls_readers.apply(_initialise)

    def forward(self, patches: Tensor) -> tuple[dict[str, Tensor], list[dict[str, Tensor]]]:
        """Readings of every patch [B, N, ...], and of CLS [B, ...] at each depth, the last depth last."""
        states = self.tower(patches)
        read = self.patch_reader(states[-2][:, 1:]).float()
        depths = [*(states[i] for i in CLS_DEPTHS), states[-2], states[-1]]
        told = [r(s[:, 0]).float() for r, s in zip(self.cls_readers, depths, strict=True)]
        return _split(read, PATCH_PARTS), [_split(t, CLS_PARTS) for t in told]


def _split(x: Tensor, parts: Mapping[str, int]) -> dict[str, Tensor]:
    return dict(zip(parts, torch.split(x, list(parts.values()), -1), strict=True))


def to_patches(pictures: NDArray[np.uint8], mean: Tensor, std: Tensor) -> Tensor:
    """[B, S, S, 3] pictures -> [B, N, 3 * P * P] normalised, in the order of a convolution's weights."""
    x = (torch.from_numpy(pictures).float() / 255 - mean) / std
    x = x.view(len(x), GRID, PATCH, GRID, PATCH, 3).permute(0, 1, 3, 5, 2, 4)
    return x.reshape(len(x), PATCHES, -1)


def targets(labels: Labels, rows: NDArray[np.int64]) -> dict[str, Tensor]:
    """What `Teacher` should read from pictures `rows`."""
    owner = labels.owner[rows].astype(np.int64)
    index = np.maximum(owner, 0)
    seen = np.take_along_axis(labels.table[rows].astype(np.int64), index[..., None], 1)  # [B, N, 3]
    place = np.take_along_axis(labels.place[rows], index[..., None], 1) / np.array([SIZE, SIZE, LARGEST], np.float32)
    ground = owner < 0
    shape, colour, glyph = (np.where(ground, 0, seen[..., i] + (i < 2)) for i in range(3))
    centre = np.zeros(owner.shape, np.float32)
    scene, thing = np.nonzero(labels.centre[rows] >= 0)
    centre[scene, labels.centre[rows][scene, thing]] = 1
    weight = np.where(owner == UNCLEAR, 0.0, np.where(owner == GROUND, 0.2, 1.0)).astype(np.float32)
    own = (np.stack(np.divmod(np.arange(PATCHES), GRID)[::-1], -1).astype(np.float32) + 0.5) / GRID
    where = np.concatenate([np.broadcast_to(own, (*owner.shape, 2)), place], -1) * 2 - 1
    result = {"shape": shape, "colour": colour, "glyph": glyph, "centre": centre, "where": where, "weight": weight}
    return {k: torch.from_numpy(v) for k, v in (result | _scene_targets(labels, rows)).items()}


def _scene_targets(labels: Labels, rows: NDArray[np.int64]) -> dict[str, NDArray[Any]]:
    table = labels.table[rows].astype(np.int64)  # [B, MOST, 3]
    scene, thing = np.nonzero(table[..., 0] >= 0)
    shape, colour, glyph = table[scene, thing].T
    pairs = np.zeros((len(rows), PAIRS), np.float32)
    pairs[scene, shape * len(COLOURS) + colour] = 1
    glyphs = np.zeros((len(rows), len(GLYPHS) + 1), np.float32)
    glyphs[scene, glyph] = 1
    counts = np.zeros((len(rows), len(SHAPES) + len(COLOURS)), np.int64)
    np.add.at(counts, (scene, shape), 1)
    np.add.at(counts, (scene, len(SHAPES) + colour), 1)
    things = (table[..., 0] >= 0).sum(1)
    return {"pairs": pairs, "glyphs": glyphs[:, 1:], "counts": counts.clip(max=SEVERAL - 1), "things": things}


def patch_loss(read: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Tensor:
    """Weighted mean over patches: cross entropies of the classes, absolute errors of the places."""
    weight, thing = wanted["weight"], (wanted["shape"] > 0).float()
    classes = torch.zeros(weight.numel())
    for name, rate in (("shape", 1.0), ("colour", 1.0), ("glyph", 1.5)):
        wrong = F.cross_entropy(read[name].flatten(0, 1), wanted[name].flatten(), reduction="none")
        classes = classes + rate * wrong
    centre = F.binary_cross_entropy_with_logits(read["centre"].squeeze(-1), wanted["centre"], reduction="none")
    off = (read["where"] - wanted["where"]).abs()
    total = ((classes.view_as(weight) + centre) * weight).sum() / weight.sum()
    own, its = off[..., :2].mean(), (off[..., 2:].mean(-1) * thing).sum() / thing.sum()
    return total + own + 5 * its


def cls_loss(told: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> Tensor:
    """Which pairs of shape and colour, which glyphs, how many of each, how many things."""
    pairs = F.binary_cross_entropy_with_logits(told["pairs"], wanted["pairs"])
    glyphs = F.binary_cross_entropy_with_logits(told["glyphs"], wanted["glyphs"])
    counts = F.cross_entropy(told["counts"].reshape(-1, SEVERAL), wanted["counts"].flatten())
    return 5 * pairs + 2 * glyphs + counts + 0.5 * F.cross_entropy(told["things"], wanted["things"])


def accuracies(
    read: Mapping[str, Tensor], told: Mapping[str, Tensor], wanted: Mapping[str, Tensor]
) -> dict[str, float]:
    """Shares of patches on things read rightly, and of the scene's pairs that CLS finds."""
    thing = wanted["shape"] > 0
    result = {n: (read[n].argmax(-1) == wanted[n])[thing].float().mean().item() for n in ("shape", "colour")}
    glyph = wanted["glyph"] > 0
    result["glyph"] = (read["glyph"].argmax(-1) == wanted["glyph"])[glyph].float().mean().item()
    centre = wanted["centre"] > 0
    result["centre"] = (read["centre"].squeeze(-1) > 0)[centre].float().mean().item()
    found = read["centre"].squeeze(-1) > 0
    result["centre_precision"] = (centre & found).sum().item() / max(1, int(found.sum()))  # 0 where none is found
    result["pixels"] = ((read["where"] - wanted["where"]).abs()[..., 2:4][thing].mean() * SIZE / 2).item()
    result["size"] = ((read["where"] - wanted["where"]).abs()[..., 4][thing].mean() * LARGEST / 2).item()
    result["cls_pairs"] = (told["pairs"] > 0)[wanted["pairs"] > 0].float().mean().item()
    result["cls_glyphs"] = (told["glyphs"] > 0)[wanted["glyphs"] > 0].float().mean().item()
    counts = told["counts"].view(len(told["counts"]), -1, SEVERAL).argmax(-1)
    result["cls_counts"] = (counts == wanted["counts"]).float().mean().item()
    return result
