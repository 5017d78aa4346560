"""Directories as `flowcut bench` writes them, made up: realistic values that follow from the tokens kept."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw

PATCHES = 576
VERSIONS = {"python": "3.11.9", "flowcut-trt": "0.1.0", "onnxruntime": "1.31.1", "numpy": "2.3.1"}
MACHINE = {
    "device": "AMD EPYC 7B13",
    "kind": "cpu",
    "cores": 2,
    "threads": 2,
    "load_before": 0.4,
    "load_after": 1.9,
    "clocks_mhz": [2450, 2450],
    "memory_bytes": 25_000_000_000,
    "versions": VERSIONS,
    "roof": {
        "name": "this CPU, 2 threads",
        "source": "measured: a matrix product and a copy before the run",
        "flops_per_s": 1.4e11,
        "bytes_per_s": 2.1e10,
    },
}
STAGE_MS = {"preprocess": (9.0, 0.0), "vision": (800.0, 0.9), "prefill": (120.0, 6.4), "decode_per_token": (92.0, 0.04)}
"""Milliseconds as a + b * tokens."""
KEPT = {"reference": "adaptive, fp32, PyTorch", "jaccard": 0.87, "pictures": 4}
SAME = {"same_first_token": 0.75, "logits_cosine": 0.981, "prompts": 4}


def summary(median: float, spread: float = 0.03, n: int = 20) -> dict[str, Any]:
    """As bench.json has it."""
    low, high = median * (1 - spread / 2), median * (1 + 2 * spread)
    values = {"median": median, "p90": median * (1 + spread), "p99": high, "min": low, "max": high}
    return {**{name: round(value, 5) for name, value in values.items()}, "n": n, "spread": spread}


def ratio(value: float, limit: float | None, n: int = 20) -> dict[str, Any]:
    """As bench.json has it."""
    share = None if limit is None else round(value / limit, 4)
    ends = {"low": round(value * 0.97, 4), "high": round(value * 1.03, 4)}
    return {"ratio": round(value, 4), **ends, "n": n, "flop_ratio": limit, "share_of_flop_ratio": share}


def subject(
    name: str, tokens: int, batches: Sequence[int] = (1,), slower: float = 1.0, spread: float = 0.03, **changes: Any
) -> dict[str, Any]:
    """An engine, or a peer where `kind` says so."""
    peer = changes.get("kind") == "peer"
    return {
        "name": name,
        "title": f"{name}, {tokens} of {PATCHES} tokens",
        "kind": "engine",
        "directory": None if peer else f"build/llava-1.5-7b-{tokens}-fp32-ort",
        "sha256": None if peer else f"{tokens:064x}",
        "model": "llava-1.5-7b",
        "note": "",
        "weights": "checkpoint",
        "source_sha256": "5" * 64,
        "backend": "ort",
        "built_for": None if peer else "ort",
        "precision": "fp32",
        "vision_precision": "fp32",
        "decoder_layers": 2,
        "tokens": tokens,
        "patches": PATCHES,
        "llm_tokens": None,
        "schedule": "static",
        "selector": "flowcut",
        "counts": [] if tokens == PATCHES else [400, 300, 200, tokens],
        "cuda_graphs": None,
        "peak_memory_bytes": 3_000_000_000 + 1_000_000 * tokens,
        "device_memory_bytes": None,
        "kept": [list(range(tokens))],
        "batches": [batch_of(each, tokens, slower, spread, counted=not peer) for each in batches],
        **changes,
    }


def batch_of(batch: int, tokens: int, slower: float, spread: float, counted: bool) -> dict[str, Any]:
    """One subject at one batch size."""
    ms = {name: slower * batch**0.9 * (a + b * tokens) for name, (a, b) in STAGE_MS.items()}
    ms["total"] = 1.004 * (ms["preprocess"] + ms["vision"] + ms["prefill"])
    roofs = {"vision": 0.8 * ms["vision"], "prefill": 0.7 * ms["prefill"], "decode": 0.5 * ms["decode_per_token"]}
    shares = {"vision": 0.8, "prefill": 0.7, "decode": 0.5}
    return {
        "batch": batch,
        "visual_tokens": tokens,
        "text_tokens": 40,
        "prompt_tokens": tokens + 40,
        "stages": {name: summary(value, spread) for name, value in ms.items()},
        "device_ms": {},
        "decode_tokens_per_s": round(1e3 * batch / ms["decode_per_token"], 3),
        "flops": {name: int(value * 1.4e8) for name, value in roofs.items()} if counted else None,
        "bytes": {name: int(value * 2.1e7) for name, value in roofs.items()} if counted else None,
        "roofline_ms": {name: round(value, 5) for name, value in roofs.items()} if counted else None,
        "roofline_share": shares if counted else None,
    }


def comparison(pruned: Mapping[str, Any], other: Mapping[str, Any], at: int) -> dict[str, Any]:
    """Of two subjects at the batch with the number `at` among them."""
    ours, theirs = pruned["batches"][at]["stages"], other["batches"][at]["stages"]
    ratios = {}
    for stage in ("vision", "prefill", "total", "decode_per_token"):
        value = theirs[stage]["median"] / ours[stage]["median"]
        ratios[stage] = ratio(value, round(value / 0.93, 4) if other["kind"] == "engine" else None)
    return {"subject": pruned["name"], "against": other["name"], "batch": ours and pruned["batches"][at]["batch"]} | {
        "ratios": ratios
    }


def bench(
    tokens: int = 64,
    baseline: bool = True,
    peers: Sequence[str] = (),
    batches: Sequence[int] = (1,),
    accuracy: bool = False,
    **changes: Any,
) -> dict[str, Any]:
    """The whole document."""
    pruned = subject("pruned", tokens, batches)
    other = subject("baseline", PATCHES, batches) if baseline else None
    more = [subject(name, PATCHES, batches, 1.1 + 0.1 * i, kind="peer") for i, name in enumerate(peers)]
    against = [each for each in (other, *more) if each is not None]
    comparisons = [comparison(pruned, each, at) for at in range(len(batches)) for each in against]
    found = comparisons[0]["ratios"] if baseline else {}
    document = {
        "schema": 1,
        "command": f"flowcut bench {pruned['directory']} --baseline build/llava-1.5-7b-576-fp32-ort --repeats 20",
        "created": f"2026-03-01T12:{tokens % 60:02}:00+00:00",
        "model": "llava-1.5-7b",
        "note": "",
        "weights": "checkpoint",
        "backend": "ort",
        "pruned": pruned,
        "baseline": other,
        "peers": more,
        "speedup": {stage: found[stage]["ratio"] for stage in ("vision", "prefill", "total")} if baseline else None,
        "comparisons": comparisons,
        "agreement": {"kept": KEPT, "kept_reason": "", "baseline": SAME if baseline else None},
        "accuracy": scores(tokens) if accuracy else None,
        "mismatch": [],
        "warnings": [],
        "machine": MACHINE,
        "settings": {"batches": list(batches), "repeats": 20, "warmup": 3, "new_tokens": 16, "pictures": ["scene.png"]},
    }
    return document | changes


def scores(tokens: int) -> dict[str, Any]:
    """Right answers, which fewer tokens have fewer of."""
    right = round(0.6 + 0.05 * tokens**0.3, 3)
    own = {"accuracy": right, "n": 300, "interval": [round(right - 0.04, 3), round(right + 0.04, 3)]}
    whole = {"accuracy": 0.993, "n": 300, "interval": [0.97, 0.998]}
    return {"pruned": own, "baseline": whole, "scenes": 50, "split": "test"}


def write_bench(directory: Path, document: object, pictures: bool = True) -> Path:
    """A directory with the document and, unless told otherwise, its pictures."""
    directory.mkdir(parents=True)
    (directory / "bench.json").write_text(json.dumps(document, indent=1), encoding="utf-8")
    if pictures:
        for name, colour in (("kept.png", "#c33"), ("kept-baseline.png", "#37c")):
            _picture(colour).save(directory / name)
    return directory


def _picture(colour: str) -> Image.Image:
    image = Image.new("RGB", (612, 288), "white")
    draw = ImageDraw.Draw(image)
    for i in range(24):
        for j in range(24):
            fill = colour if (i * 7 + j * 3) % 5 == 0 else "#ddd"
            draw.rectangle((324 + i * 12, j * 12, 334 + i * 12, j * 12 + 10), fill=fill)
    draw.ellipse((40, 40, 240, 240), fill=colour)
    return image
