"""What a loaded engine takes of memory, and the process it is in."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.options import Options
from engines.runtime.model import Model
from engines.sessions.session import state_pairs
from flowcut.artifacts import Manifest
from flowcut.contract import GraphContract, itemsize

_STATUS = Path("/proc/self/status")


@dataclass(frozen=True)
class MemoryReport:
    """All in bytes.

    Attributes:
        files: by graph, the weights or engine on the disk. ONNX Runtime's CPU provider, which computes fp16 and bf16 in
            float32, takes twice as much for these.
        sessions: of "vision" and "language" what each says it holds, by kind (Session.memory_bytes).
        cache_per_prompt: KV cache of one prompt at full length. Of a CPU's memory only rows that were used are taken.
        cache_at_most: of as many prompts as can be at work at once.
        pictures: visual tokens that are kept of pictures already seen.
        pictures_at_most: what these may take.
        resident: what the process has in memory now, other engines and libraries in it included; None where the system
            does not tell.
        peak: the most it ever had; None likewise.
    """

    files: Mapping[str, int]
    sessions: Mapping[str, Mapping[str, int]]
    cache_per_prompt: int
    cache_at_most: int
    pictures: int
    pictures_at_most: int
    resident: int | None
    peak: int | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def memory_report(manifest: Manifest, backend: str, options: Options, model: Model) -> MemoryReport:
    """Of an engine as it is now."""
    suffix = "onnx.data" if backend == "ort" else "engine"
    prompt = cache_bytes(model.language.contract)
    sessions = {"vision": model.vision, "language": model.language}
    resident, peak = process_bytes()
    return MemoryReport(
        files={graph: manifest.files[f"{graph}.{suffix}"].bytes for graph in manifest.graphs},
        sessions={name: dict(session.memory_bytes()) for name, session in sessions.items()},
        cache_per_prompt=prompt,
        cache_at_most=prompt * manifest.limits.max_batch * options.concurrency,
        pictures=model.pictures.bytes,
        pictures_at_most=options.picture_cache_mb * 10**6,
        resident=resident,
        peak=peak,
    )


def cache_bytes(contract: GraphContract) -> int:
    """KV cache of one prompt, by the decoder's contract."""
    specs = (spec for spec, _ in state_pairs(contract))
    return sum(math.prod(spec.shape({"batch": 1})) * itemsize(spec.dtype) for spec in specs)


def process_bytes() -> tuple[int | None, int | None]:
    """What this process has in memory, and the most it ever had; None where the system does not tell."""
    try:
        text = _STATUS.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None, None
    found = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB$", text, re.MULTILINE))
    now, most = (int(found[name]) * 1024 if name in found else None for name in ("VmRSS", "VmHWM"))
    return now, most
