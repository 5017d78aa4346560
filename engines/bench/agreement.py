"""How far an engine agrees with what it stands for: which patches it keeps, and what it would say next.

A speed-up means nothing without it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from calib.agreement import DIGITS, mean_and_min
from calib.patches import jaccard, to_mask
from engines.runtime.model import Model
from engines.runtime.pictures import Tokens
from engines.runtime.reading import Opened, Reader
from engines.source import need_source
from flowcut.artifacts import Manifest
from flowcut.schedule import Schedule, make_schedule
from flowcut.selector import FLOWCUT, selector

if TYPE_CHECKING:
    from calib.tower import Tower

Pictures = Sequence[Path | Image.Image]


def encoder_kept(model: Model, reader: Reader, pictures: Pictures) -> list[Tokens]:
    """Numbers of the patches that an engine's vision graph keeps of each picture, ascending, of LLaVA-NeXT as
    flowcut.anyres.kept_patches has them: before any visual token is dropped inside the decoder."""
    kept = []
    for picture in pictures:
        opened = [reader.open(picture)]
        feeds = reader.geometry.feeds(opened, model.vision.contract)
        kept += reader.geometry.left(model.vision.run(feeds).arrays["kept"].astype(np.int64), {})
    return kept


def kept_agreement(
    manifest: Manifest,
    checkpoint: str | None,
    reader: Reader,
    pictures: Pictures,
    kept: Sequence[Tokens],
    threads: int | None = None,
) -> dict[str, Any]:
    """The Jaccard index of what an engine's encoder keeps and what the adaptive schedule keeps in float32 PyTorch.

    At the encoder's end. Which of these tokens the decoder drops depends on the question, and is the engine's own
    choice either way. Of LLaVA-NeXT the patches of all tiles are one set, those in the padding left out. A selector
    without an adaptive schedule is compared with FlowCut's.

    Args:
        checkpoint: see engines.source.source_weights.
        kept: `encoder_kept` of the pictures.
        threads: of PyTorch; None leaves the choice to torch.

    Returns:
        {"reference": what it is compared with, "jaccard": mean, "least": min, "pictures": n}

    Raises:
        CheckpointError: no checkpoint, or not the one that the directory was built from.
        FlowCutError: torch is not installed.
    """
    weights = need_source(manifest, checkpoint)  # which needs torch
    from calib.tower import Tower, torch_threads

    own = Schedule.from_dict(manifest.schedule)
    chosen = FLOWCUT if selector(own.selector).one_shot else own.selector
    adaptive = make_schedule("adaptive", manifest.geometry.vision, own.tokens, chosen)
    with torch_threads(threads):
        tower = Tower(weights)
        reference = [_kept(tower, adaptive, reader.open(picture)) for picture in pictures]
    pairs = zip(kept, reference, strict=True)
    found = mean_and_min([jaccard(to_mask(a.tolist()), to_mask(b.tolist())) for a, b in pairs])
    by = "" if chosen == FLOWCUT == own.selector else f" with the selector {chosen}"
    return {
        "reference": f"adaptive{by}, fp32, PyTorch",
        "jaccard": found["mean"],
        "least": found["min"],
        "pictures": len(reference),
    }


def logits_agreement(pruned: NDArray[Any], baseline: NDArray[Any]) -> dict[str, Any]:
    """How often two models would say the same token first, and the mean cosine between their logits.

    Args:
        pruned, baseline: [prompts, vocab], at least one prompt, of the same prompts.

    Returns:
        {"same_first_token": share, "logits_cosine": mean, "prompts": n}
    """
    a, b = pruned.astype(np.float64), baseline.astype(np.float64)
    lengths = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosines = (a * b).sum(-1) / np.maximum(lengths, np.finfo(np.float64).tiny)
    return {
        "same_first_token": round(float((a.argmax(-1) == b.argmax(-1)).mean()), DIGITS),
        "logits_cosine": round(float(cosines.mean()), DIGITS),
        "prompts": len(a),
    }


def _kept(tower: Tower, schedule: Schedule, picture: Opened) -> Tokens:
    """Of one picture, ascending; of LLaVA-NeXT its tiles put together."""
    each = np.stack([tower.run(pixels[None], schedule).numbers for pixels in picture.pixels])
    if picture.tiling is None:
        numbers: Tokens = each[0]
        return numbers
    from engines.prune_torch import merge

    return merge(each, [picture.tiling])[0]
