"""Draw how llava-tiny learnt: docs/results/training_curve.{json,svg} from the work directory of `make tiny`.

    .venv/bin/python docs/results/training_curve.py [build/tiny-full]

Without an argument the picture is drawn again from the committed json.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
import matplotlib.pyplot as plt

from flowcut.tiny.stages import history

HERE = Path(__file__).parent
SHOWN = {
    "tower": {
        "shape": "shape of a patch",
        "colour": "colour",
        "glyph": "letter or digit",
        "cls_pairs": "things that CLS finds",
    },
    "decoder": {k: k for k in ("color", "shape", "count", "larger", "relation", "text")},
}


def main() -> None:
    store = HERE / "training_curve.json"
    if len(sys.argv) > 1:
        store.write_text(json.dumps(history(Path(sys.argv[1]))) + "\n", encoding="utf-8")
    draw(json.loads(store.read_text(encoding="utf-8")), HERE / "training_curve.svg")


def draw(data: dict[str, Any], path: Path) -> None:
    """Loss above, accuracies on validation scenes below, a column for each stage."""
    mpl.rcParams["svg.hashsalt"] = "flowcut"
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex="col")
    for column, (stage, names) in enumerate(SHOWN.items()):
        curve = data[stage]
        minutes = [point["seconds"] / 60 for point in curve]
        loss, accuracy = axes[0, column], axes[1, column]
        loss.plot(minutes, [point["loss"] for point in curve], color="black")
        loss.set(title=f"{stage}: {curve[-1]['step']} steps", ylabel="training loss", yscale="log")
        for name, label in names.items():
            measured = [(point["seconds"] / 60, point[name]) for point in curve if name in point]
            accuracy.plot(*zip(*measured, strict=True), marker=".", label=label)
        accuracy.set(xlabel="minutes on 2 cores", ylabel="right on validation scenes", ylim=(0, 1.02))
        accuracy.legend(loc="lower right", fontsize=8)
        for axis in (loss, accuracy):
            axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
