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
from engines.roofline import KNOWN, Gpu
from engines.runtime.engine import LlavaEngine
from flowcut.anyres import choose_tiling
from flowcut.artifacts import Manifest
from flowcut.config import Precision
from flowcut.errors import ConfigError, FlowCutError
from flowcut.preprocess import open_image

if TYPE_CHECKING:
    from engines.plan.roof import Roof

OTHER_MAKES = {"PCIE", "NVL", "LAPTOP", "D", "NX", "NANO", "MAX"}
"""Words of a driver's name of a GPU that is slower than the one whose figures are published under the same number."""

Graphs = Mapping[str, Precision]
"""What each stage's graph computes in, by STAGES."""


def graphs_of(manifest: Manifest) -> Graphs:
    """Of an engine directory."""
    own = dict.fromkeys(("prefill", "decode"), manifest.precision)
    return {"vision": manifest.vision_precision, **own}


@dataclass(frozen=True)
class DeviceRoof:
    """What times are held against.

    Attributes:
        roof: the device's, as it is told; of a GPU at the decoder's precision.
        roofs: each stage's.
        threads: of a CPU, whose roof is measured; None for published figures.
    """

    roof: Roof
    roofs: Mapping[str, Roof]
    threads: int | None

    def again(self, graphs: Graphs) -> DeviceRoof:
        """The better of this and, on a CPU, of another measurement."""
        if self.threads is None:
            return self
        old = CpuRoof(self.roof.flops_per_s, self.roof.bytes_per_s)
        best = old.best(measure_roof(self.threads))
        return _cpu(replace(self.roof, **vars(best)), graphs, self.threads)

    def to_dict(self) -> dict[str, Any]:
        roof = self.roof
        names = ("name", "source", "flops_per_s", "bytes_per_s")
        return {name: getattr(roof, name) for name in names}


def device_roof(machine: Mapping[str, Any], graphs: Graphs) -> tuple[DeviceRoof | None, list[str]]:
    """The roof of a machine as engines.bench.device.describe has it, or why there is none, in one line."""
    from engines.plan.roof import Roof, gpu_roof

    try:
        if machine["kind"] == "gpu":
            gpu = _published(machine["device"])
            roofs = {stage: gpu_roof(gpu, precision) for stage, precision in graphs.items()}
            return DeviceRoof(roofs["prefill"], roofs, None), []
        threads = machine["threads"]
        found = measure_roof(threads)
    except FlowCutError as error:
        return None, [f"shares of the roofline are left out: {error}"]
    source = (
        "measured here: the best float32 product of ONNX Runtime and the best copy or read of numpy, "
        f"{threads} thread{'s' * (threads > 1)}"
    )
    return _cpu(Roof(machine["device"], found.flops_per_s, found.bytes_per_s, source), graphs, threads), []


def _cpu(roof: Roof, graphs: Graphs, threads: int) -> DeviceRoof:
    """ONNX Runtime's CPU provider keeps float16 and bfloat16 weights as float32: twice the bytes of the file."""
    wide = replace(roof, bytes_per_s=roof.bytes_per_s / 2)
    roofs = {stage: wide if precision in ("fp16", "bf16") else roof for stage, precision in graphs.items()}
    return DeviceRoof(roof, roofs, threads)


def _published(name: str) -> Gpu:
    """The product of a driver's name for it.

    Raises:
        ConfigError: none that is known, or another make of it, which is slower.
    """
    words = re.split(r"[\s-]+", name)
    known = [gpu for gpu in KNOWN if _key(gpu.name) in words]
    if len(known) != 1 or OTHER_MAKES & {word.upper() for word in words}:
        raise ConfigError(f"the GPU must be one whose published figures are known here, got {name}.")
    return known[0]


def _key(name: str) -> str:
    """The word of a product's name that no other has: "H100", "4090", "Orin"."""
    return next(word for word in name.split() if word == "Orin" or sum(map(str.isdigit, word)) >= 2)


class Counter:
    """Counts the stages of an engine directory. `problems` says in one line why it could not."""

    def __init__(self, roof: DeviceRoof | None) -> None:
        self._roofs, self.problems = {} if roof is None else roof.roofs, list[str]()

    def count(self, engine: LlavaEngine, directory: Path, work: Work, output: Output) -> dict[str, Counted]:
        """By "vision", "prefill" and "decode"; nothing where onnx is not installed.

        ONNX Runtime's attention computes all rows of the cache, those of TensorRT the rows in use.
        """
        from engines.plan.stages import directory_costs

        manifest = engine.manifest
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
        found = {}
        for name, cost in costs.items():
            least = cost.flops if engine.backend == "ort" or cost.least_flops is None else cost.least_flops
            roof = self._roofs.get(name)
            found[name] = Counted(least, cost.bytes, None if roof is None else roof.bound_ms(cost))
        return found


def _tiles(manifest: Manifest, work: Work) -> int | None:
    """Of all pictures of a batch; None for LLaVA-1.5, which has no tiles."""
    if not manifest.geometry.anyres:
        return None
    return sum(choose_tiling(manifest.geometry, *open_image(each).size).tiles for each in work.pictures)
