"""Operations and bytes of what was timed, counted from the very graphs, and the roof of the device that ran them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines.bench.cpu_roof import CpuRoof, measure_roof
from engines.bench.records import Counted
from engines.bench.subjects import Output, Work
from engines.roofline import KNOWN
from flowcut.anyres import choose_tiling
from flowcut.artifacts import Manifest
from flowcut.config import Precision
from flowcut.errors import FlowCutError
from flowcut.preprocess import open_image

if TYPE_CHECKING:
    from engines.plan.roof import Roof


@dataclass(frozen=True)
class DeviceRoof:
    """What a time is held against. threads: of a CPU, whose roof is measured; None for published figures."""

    roof: Roof
    threads: int | None

    def again(self) -> DeviceRoof:
        """The better of this and, on a CPU, of another measurement."""
        if self.threads is None:
            return self
        old = CpuRoof(self.roof.flops_per_s, self.roof.bytes_per_s)
        best = old.best(measure_roof(self.threads))
        return replace(self, roof=replace(self.roof, flops_per_s=best.flops_per_s, bytes_per_s=best.bytes_per_s))

    def to_dict(self) -> dict[str, Any]:
        roof = self.roof
        return {
            "name": roof.name,
            "source": roof.source,
            "flops_per_s": roof.flops_per_s,
            "bytes_per_s": roof.bytes_per_s,
        }


def device_roof(machine: Mapping[str, Any], precision: Precision) -> tuple[DeviceRoof | None, list[str]]:
    """The roof of a machine as engines.bench.device.describe has it, or why there is none, in one line."""
    from engines.plan.roof import Roof, gpu_roof

    if machine["kind"] == "gpu":
        name = machine["device"]
        known = [gpu for gpu in KNOWN if _key(gpu.name) in re.split(r"[\s-]+", name)]
        if len(known) != 1:
            return None, [f"no published roof is known here for {name}: shares of the roofline are left out."]
        return DeviceRoof(gpu_roof(known[0], precision), None), []
    threads = machine["threads"]
    try:
        found = measure_roof(threads)
    except FlowCutError as error:
        return None, [f"shares of the roofline are left out: {error}"]
    source = (
        "measured here: the best float32 product of ONNX Runtime and the best copy of numpy, "
        f"{threads} thread{'s' * (threads > 1)}"
    )
    return DeviceRoof(Roof(machine["device"], found.flops_per_s, found.bytes_per_s, source), threads), []


def _key(name: str) -> str:
    """The word of a product's name that no other has: "H100", "4090", "Orin"."""
    return next(word for word in name.split() if word == "Orin" or sum(map(str.isdigit, word)) >= 2)


class Counter:
    """Counts the stages of an engine directory. `problems` says in one line why it could not."""

    def __init__(self, roof: Roof | None) -> None:
        self._roof, self.problems = roof, list[str]()

    def count(self, directory: Path, manifest: Manifest, work: Work, output: Output) -> dict[str, Counted]:
        """By "vision", "prefill" and "decode"; nothing where onnx is not installed."""
        from engines.plan.stages import directory_costs

        pruned = max(output.pruned_prompt_tokens) if manifest.llm_tokens is not None else None
        tiles = _tiles(manifest, work)
        try:
            costs = directory_costs(
                directory, manifest, work.batch, work.batch, max(output.prompt_tokens), pruned, tiles
            )
        except FlowCutError as error:
            if str(error) not in self.problems:
                self.problems.append(f"operations were not counted: {error}")
            return {}
        roof = self._roof
        return {
            name: Counted(cost.flops, cost.bytes, None if roof is None else roof.bound_ms(cost))
            for name, cost in costs.items()
        }


def _tiles(manifest: Manifest, work: Work) -> int | None:
    """Of all pictures of a batch; None for LLaVA-1.5, which has no tiles."""
    if not manifest.geometry.anyres:
        return None
    return sum(choose_tiling(manifest.geometry, *open_image(each).size).tiles for each in work.pictures)
