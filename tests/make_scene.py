#!/usr/bin/env python3
"""Draw the bundled example picture, flowcut/assets/example/scene.png: three shapes over a noisy background.

python tests/make_scene.py [OUT.png]
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE, SCALE = 336, 3


def scene() -> Image.Image:
    rng = np.random.Generator(np.random.PCG64(5))
    y, x = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    ground = np.stack([96 + 40 * y, 118 + 24 * x, 132 - 36 * y], -1) + rng.normal(0, 5, (SIZE, SIZE, 1))
    page = Image.fromarray(ground.clip(0, 255).astype(np.uint8)).resize((SIZE * SCALE,) * 2, Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(page)

    def box(cx: int, cy: int, r: int) -> list[int]:
        return [v * SCALE for v in (cx - r, cy - r, cx + r, cy + r)]

    draw.ellipse(box(112, 120, 58), fill=(206, 52, 46))
    draw.rectangle(box(246, 92, 34), fill=(238, 190, 60))
    draw.polygon([v * SCALE for v in (232, 214, 182, 296, 282, 296)], fill=(44, 84, 176))
    return page.resize((SIZE,) * 2, Image.Resampling.LANCZOS).filter(ImageFilter.SMOOTH)


if __name__ == "__main__":
    default = Path(__file__).parents[1] / "flowcut" / "assets" / "example" / "scene.png"
    scene().save(sys.argv[1] if len(sys.argv) > 1 else default, optimize=True)
