"""`flowcut prune` on ONNX Runtime, float32, through graphs exported for the occasion.

Of the language model that is the first of as many stages as there can be: the two layers before visual tokens are
dropped.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import Progress

from engines.options import Options
from engines.pipeline import graph_metadata, save_graph
from engines.prune_question import Asked
from engines.prune_result import Floats, Integers, Pruned
from engines.runtime.pictures import Geometry
from engines.runtime.reading import pruning
from engines.sessions.ort_session import OrtSession
from engines.sessions.session import Array, feeds_of
from flowcut.aliases import Model
from flowcut.anyres import Tiling, image_slots, kept_patches, vision_feeds
from flowcut.budget import PRUNE_LAYER, Budget
from flowcut.contract import GraphContract, Limits, language_contracts, vision_contract
from flowcut.deps import require
from flowcut.prompt import Encoded, batch
from flowcut.schedule import Schedule, check_fixed_shapes

if TYPE_CHECKING:
    import onnx_ir as ir


def prune_ort(
    model: Model,
    schedule: Schedule,
    pixels: Floats,
    progress: Progress,
    threads: int | None = None,
    tilings: Sequence[Tiling] = (),
    asked: Asked | None = None,
) -> Pruned:
    """See engines.prune. The schedule must have fixed shapes. `tilings`: of LLaVA-NeXT's pictures."""
    check_fixed_shapes(schedule)
    require("onnx_ir", "export")
    graphs = _Graphs(model, schedule, progress, threads)
    outputs = graphs.see(pixels, tilings)
    return Pruned(
        outputs["tile_kept" if tilings else "kept"],
        outputs["counts"],
        outputs["features"],
        _trace(outputs),
        tilings,
        [kept_patches(places) for places in outputs["kept"]] if tilings else [],
        None if asked is None else graphs.left(outputs, asked, tilings),
    )


@dataclass(frozen=True)
class _Graphs:
    """Each is exported, run and gone before the next."""

    model: Model
    schedule: Schedule
    progress: Progress
    threads: int | None

    def see(self, pixels: Floats, tilings: Sequence[Tiling]) -> dict[str, Array]:
        """All that the vision graph returns."""
        from export.vision import traced_contract, vision_model

        model, schedule = self.model, self.schedule
        contract = vision_contract(model.config, schedule.tokens, "fp32", Limits(max_images=len(tilings or pixels)))
        metadata = graph_metadata(model, schedule, "fp32")
        graph = vision_model(model.weights, contract, schedule, "fp32", metadata, trace=True)
        others = vision_feeds(model.config, schedule.tokens, tilings).arrays() if tilings else {}
        session = self._open(graph, traced_contract(contract, schedule, model.config.vision))
        return session.run({"pixel_values": pixels, **others}).arrays

    def left(self, seen: Mapping[str, Array], asked: Asked, tilings: Sequence[Tiling]) -> list[Integers]:
        """Of each picture's patches those that the language model leaves, asked one picture at a time."""
        from export.language import language_model

        model, tokens, budget = self.model, self.schedule.tokens, Budget(self.schedule.tokens, asked.llm_tokens)
        rows = vision_feeds(model.config, tokens, tilings).rows if tilings else [tokens] * len(seen["kept"])
        prompts = [asked.encode(count, image_slots(model.config, tokens)) for count in rows]
        limits = Limits(1, 1, _room(prompts), 1)
        stages = model.config.text.num_hidden_layers - PRUNE_LAYER  # the most, so that the first has no layer more
        contract, *_ = language_contracts(model.config, tokens, "fp32", limits, stages, asked.llm_tokens)
        metadata = graph_metadata(model, self.schedule, "fp32", asked.llm_tokens)
        session = self._open(language_model(model.weights, contract, "fp32", metadata), contract)
        geometry, own = Geometry(model.config, tokens), pruning(model.config, budget, limits)
        left = []
        for i, prompt in enumerate(prompts):
            picture = {name: array[i : i + 1] for name, array in seen.items()}
            known = {**vars(batch([prompt], limits.max_prompt, own)), **picture}
            feeds = {spec.name: known[spec.name] for spec in feeds_of(contract)}
            left += geometry.left(picture["kept"], session.run(feeds, session.allocate_state(1)).arrays)
        return left

    def _open(self, graph: ir.Model, contract: GraphContract) -> OrtSession:
        with tempfile.TemporaryDirectory(prefix="flowcut-") as directory:
            path = Path(directory) / f"{contract.name}.onnx"
            save_graph(graph, path, self.progress)
            return OrtSession(path, contract, Options(threads=self.threads))


def _room(prompts: Sequence[Encoded]) -> int:
    """Longest prompt, were its picture as large as can be: on that the graph's lengths behind the pruning rest."""
    return max(len(prompt.input_ids) - int(prompt.spans[0, 1]) + prompt.slots for prompt in prompts)


def _trace(outputs: Mapping[str, Array]) -> list[tuple[int, list[Integers]]]:
    """Valid rows of each `kept.<layer>` output."""
    layers = sorted(int(name.split(".")[1]) for name in outputs if name.startswith("kept."))
    valid = {layer: outputs["counts"][:, layer + 1] for layer in layers}
    return [(i, [row[:n] for row, n in zip(outputs[f"kept.{i}"], valid[i], strict=True)]) for i in layers]
