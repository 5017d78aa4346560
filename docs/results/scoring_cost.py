"""What scoring costs beside the encoder it runs in: writes scoring_cost.json and .md.

    python docs/results/scoring_cost.py                    # needs .[torch,export,cpu]; all three parts
    python docs/results/scoring_cost.py --part roofline    # a second: arithmetic, for GPUs
    python docs/results/scoring_cost.py --part agreement   # minutes: scoring at pruning points only, on llava-tiny
    python docs/results/scoring_cost.py --part cpu         # minutes: measured here, on an otherwise idle machine

Each part replaces its own section of the .json; the .md is written from all that is there.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
from rich.progress import Progress
from scoring_cost_page import BUILT, FUSED, ZEROED, page

from engines.flow_score.launch import Call
from engines.flow_score.traffic import ITEMSIZE, Traffic, traffic
from engines.roofline import GPUS, LAUNCH_US, EncoderLayer, Gpu, encoder_layer
from flowcut.aliases import resolve
from flowcut.atomic import write_file
from flowcut.checkpoint import random_weights
from flowcut.config import LlavaConfig, Precision, TextConfig, VisionConfig
from flowcut.contract import Limits, vision_contract
from flowcut.schedule import Schedule, make_schedule, pruning_points

Section = dict[str, Any]
# The decoder plays no part, and the projector little: both are small.
CLIP = LlavaConfig(VisionConfig(), TextConfig(64, 128, 1, 4, 4, 512), image_token_id=448)
KEYS, TOKENS = CLIP.vision.patches + 1, 64
BATCHES = (1, 8)
MODEL, SCENES = "llava-tiny", 400
BUDGETS = (8, 16, 32)  # of llava-tiny's 144 patches
WARMUP, PAIRS, PROFILED, THREADS = 3, 60, 10, 2
PATH = Path(__file__).with_suffix(".json")


# --- roofline: arithmetic only ---


def roofline() -> Section:
    layers = CLIP.vision.num_hidden_layers
    scored = Schedule("adaptive", CLIP.vision.patches, TOKENS).scored_layers(layers)
    head = {"keys": KEYS, "launch_us": LAUNCH_US, "scored_layers": [len(scored), len(pruning_points(layers))]}
    return {**head, "batches": [step(images) for images in BATCHES]}


def step(images: int) -> Section:
    """One encoder layer and one scoring step of so many images in float16, then what each GPU would need for them."""
    vision = CLIP.vision
    layer = encoder_layer(unpruned(), 0, images)
    moved = traffic(Call(images, vision.num_attention_heads, KEYS), "fp16", vision.head_size)
    neighbours = 4 * images * KEYS * vision.hidden_size * ITEMSIZE["fp16"]  # Q, K, V and attention's output
    sizes = {**vars(moved), "total_bytes": moved.total_bytes, "device_bytes": moved.device_bytes}
    gpus = {gpu.name: on_gpu(gpu, layer, moved, neighbours) for gpu in GPUS}
    return {"images": images, "layer": vars(layer), "traffic": sizes, "neighbour_bytes": neighbours, "gpus": gpus}


def unpruned() -> Any:
    """The graph of the whole tower. Weights are drawn when a graph is saved, which this one is not."""
    from export.vision import vision_model

    patches = CLIP.vision.patches
    contract = vision_contract(CLIP, patches, "fp16", Limits())
    return vision_model(random_weights(CLIP), contract, Schedule("off", patches, patches), "fp16", {})


def on_gpu(gpu: Gpu, layer: EncoderLayer, moved: Traffic, neighbours: int) -> Section:
    """Microseconds. `designs` has low and high of each: bytes and launches, no latency within a kernel."""
    logits = moved.logits_written + moved.logits_read
    fused = between(gpu, logits + moved.other_bytes, moved.logits_written + moved.combine_device_bytes, 1)
    zeroed = between(gpu, moved.total_bytes - logits, moved.device_bytes - 2 * moved.logits_written, 2)
    return {
        "arithmetic_us": gpu.arithmetic_us(layer.flops),
        "weights_us": gpu.memory_us(layer.weight_bytes),
        "layer_us": layer.bound_us(gpu),
        "kv_device_us": gpu.memory_us(moved.kv_bytes),
        "kv_l2_us": gpu.l2_us(moved.kv_bytes) if gpu.l2_gbps else None,
        "logits_l2_us": gpu.l2_us(logits) if gpu.l2_gbps else None,
        "launches_us": [2 * us for us in LAUNCH_US],
        "l2_holds_neighbours": gpu.holds(neighbours),
        "designs": {BUILT: between(gpu, moved.total_bytes, moved.device_bytes, 2), FUSED: fused, ZEROED: zeroed},
    }


def between(gpu: Gpu, l2_bytes: int, device_bytes: int, launches: int) -> tuple[float, float]:
    """All bytes from L2 with cheap launches, and all from device memory with dear ones."""
    low, high = (launches * us for us in LAUNCH_US)
    return gpu.l2_us(l2_bytes) + low, gpu.memory_us(device_bytes) + high


# --- agreement: scoring only at pruning points ---


class AtPoints(Schedule):
    """The same schedule, but layers without a pruning point are not scored."""

    def scored_layers(self, layers: int) -> Sequence[int]:
        return self.points(layers)


def agreement() -> Section:
    import torch

    from engines.evaluate_torch import Eager
    from flowcut.preprocess import ImageSettings, pixel_values
    from flowcut.tiny.scenes import make_scene, render

    model = resolve(MODEL)
    eager, pictures = Eager.load(model), [render(make_scene("test", number)) for number in range(SCENES)]
    settings = ImageSettings.from_directory(model.files, model.config.vision.image_size)
    pixels = torch.from_numpy(pixel_values(pictures, settings))
    vision = model.config.vision
    scored = Schedule("adaptive", vision.patches, TOKENS).scored_layers(vision.num_hidden_layers)
    head = {"model": model.name, "sha256": model.weights.sha256, "split": "test", "scenes": SCENES}
    head |= {"scored": len(scored), "points": len(pruning_points(vision.num_hidden_layers))}
    rows = [compared(eager, pixels, kind, tokens) for kind in ("adaptive", "static") for tokens in BUDGETS]
    return {**head, "rows": rows}


def compared(eager: Any, pixels: Any, kind: str, tokens: int) -> Section:
    """Every layer scored against pruning points alone: what is kept, how many, and what is answered."""
    import torch

    every = make_schedule(kind, eager.vision.config.vision, tokens)
    some = AtPoints(**vars(every))
    with torch.inference_mode():
        a, b = (eager.vision.features(pixels, schedule) for schedule in (every, some))
    on_the_way = [jaccard(x, y) for (_, x), (_, y) in zip(a.trace, b.trace, strict=True)]
    points = pruning_points(eager.vision.config.vision.num_hidden_layers)
    counts = [output.counts[:, [point + 1 for point in points]] for output in (a, b)]
    return {
        "schedule": kind,
        "tokens": tokens,
        "jaccard": float(np.mean(jaccard(a.kept, b.kept))),
        "jaccard_at_points": [float(np.mean(values)) for values in on_the_way],
        "equal_counts": float((counts[0] == counts[1]).double().mean()),
        "count_difference": float((counts[0] - counts[1]).abs().double().mean()),
        **answered(eager, every, some),
    }


def jaccard(a: Any, b: Any) -> list[float]:
    """Of each image's two sets of patch numbers."""
    pairs = (({*x.tolist()}, {*y.tolist()}) for x, y in zip(a, b, strict=True))
    return [len(x & y) / len(x | y) for x, y in pairs]


def answered(eager: Any, every: Schedule, some: Schedule) -> Section:
    from engines.evaluate import ask, make_pages
    from engines.evaluate_score import overall
    from engines.evaluate_torch import TorchAnswerer

    pages, quiet = make_pages("test", SCENES), Progress(disable=True)
    a, b = (ask(TorchAnswerer(eager, schedule), pages, schedule.selector, quiet) for schedule in (every, some))
    differ = sum(x.got != y.got for x, y in zip(a, b, strict=True)) / len(a)
    return {"every_layer": overall(a).to_dict(), "at_points": overall(b).to_dict(), "answers_that_differ": differ}


# --- cpu: measured here ---


def cpu(
    precisions: Sequence[Precision], pairs: int = PAIRS, config: LlavaConfig = CLIP, tokens: int = TOKENS
) -> Section:
    """Paired runs of the pruned vision graph, with scoring and with constants in its place, in this process."""
    import onnxruntime as ort

    head = {"keys": config.vision.patches + 1, "tokens": tokens, "schedule": "static", "threads": THREADS}
    head |= {"processor": processor(), "onnxruntime": ort.__version__, "numpy": np.__version__}
    return {**head, "precisions": {name: paired(config, tokens, name, pairs) for name in precisions}}


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def paired(config: LlavaConfig, tokens: int, precision: Precision, pairs: int) -> Section:
    with tempfile.TemporaryDirectory() as directory:
        scored, constant = write_graphs(Path(directory), config, tokens, precision)
        run_scored, run_constant = (runner(path, config, precision) for path in (scored, constant))
        shapes = [[output.shape for output in run()] for run in (run_scored, run_constant)]
        if shapes[0] != shapes[1]:
            raise SystemExit(f"shapes must be equal with and without scoring, got {shapes}.")
        times = np.array([timed_pair(run_scored, run_constant, i % 2 == 1) for i in range(-WARMUP, pairs)])[WARMUP:]
        del run_scored, run_constant
        profile = profiled(scored, config, precision)
    ratio = times[:, 0] / times[:, 1] - 1
    rng = np.random.Generator(np.random.PCG64(0))
    medians = np.median(rng.choice(ratio, (2000, pairs)), axis=1)
    return {
        "n": pairs,
        "scored_ms": float(np.median(times[:, 0]) * 1e3),
        "constant_ms": float(np.median(times[:, 1]) * 1e3),
        "overhead": float(np.median(ratio)),
        "interval": np.percentile(medians, (2.5, 97.5)).tolist(),
        "quartiles": np.percentile(ratio, (25, 75)).tolist(),
        "range": [float(ratio.min()), float(ratio.max())],
        "profile": profile,
    }


def timed_pair(scored: Callable[[], Any], constant: Callable[[], Any], swap: bool) -> tuple[float, float]:
    """Seconds of each, one after the other; which is first alternates."""
    if swap:
        second, first = timed_pair(constant, scored, False)
        return first, second
    start = perf_counter()
    scored()
    middle = perf_counter()
    constant()
    return middle - start, perf_counter() - middle


def write_graphs(directory: Path, config: LlavaConfig, tokens: int, precision: Precision) -> tuple[Path, Path]:
    """The pruned vision graph, and the same without scoring. Both read the weights from one file."""
    import onnx_ir as ir

    from export.builder import save
    from export.vision import vision_model

    contract = vision_contract(config, tokens, precision, Limits())
    schedule = make_schedule("static", config.vision, tokens)
    scored, constant = directory / "scored.onnx", directory / "constant.onnx"
    save(vision_model(random_weights(config), contract, schedule, precision, {}), scored)
    model = ir.load(scored)
    for key, function in model.functions.items():
        model.functions[key] = constant_function(function)
    ir.save(model, constant)
    return scored, constant


def constant_function(function: Any) -> Any:
    """A function with the signature of FlowScore, whose running score is the number of the row: all else is dropped."""
    import onnx_ir as ir

    inputs = {value.name: ir.Value(name=value.name) for value in function.inputs}
    row = ir.node("Cast", [inputs["rows"]], {"to": ir.DataType.FLOAT})
    images = ir.node("Shape", [inputs["k"]], {"start": 0, "end": 1})
    one = ir.node("Constant", [], {"value_ints": [1]})
    shape = ir.node("Concat", [images.outputs[0], one.outputs[0]], {"axis": 0})
    running = ir.node("Expand", [row.outputs[0], shape.outputs[0]])
    running.outputs[0].name = function.outputs[0].name
    graph = ir.Graph(
        list(inputs.values()),
        running.outputs,
        nodes=[row, images, one, shape, running],
        opset_imports=function.graph.opset_imports,
        name=function.name,
    )
    return ir.Function(function.domain, function.name, graph=graph, attributes=list(function.attributes.values()))


def runner(path: Path, config: LlavaConfig, precision: Precision, profile: Path | None = None) -> Any:
    """A function that runs the graph on one picture; its attribute `session` is ONNX Runtime's."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = THREADS, 3
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    size = config.vision.image_size
    dtype = {"fp32": np.float32, "fp16": np.float16}[precision]
    feed = {"pixel_values": np.random.default_rng(0).standard_normal((1, 3, size, size)).astype(dtype)}

    def run() -> Any:
        return session.run(None, feed)

    run.session = session  # type: ignore[attr-defined]
    return run


def profiled(path: Path, config: LlavaConfig, precision: Precision) -> Section:
    """Where the time of runs of their own went: scoring's share of what all nodes took, and its ops in milliseconds."""
    run = runner(path, config, precision, path.parent / "profile")
    for _ in range(PROFILED):
        run()
    events = json.loads(Path(run.session.end_profiling()).read_text(encoding="utf-8"))
    nodes = [e for e in events if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")]
    scoring: dict[str, float] = {}
    for event in nodes:
        if "FlowScore" in event["name"]:  # what is inlined is named after its function
            op = event["args"]["op_name"]
            scoring[op] = scoring.get(op, 0.0) + event["dur"] / 1e3 / PROFILED
    total_ms = sum(e["dur"] for e in nodes) / 1e3 / PROFILED
    by_op = {op: ms for op, ms in sorted(scoring.items(), key=lambda item: -item[1]) if ms >= 0.05}
    return {"runs": PROFILED, "total_ms": total_ms, "share": sum(scoring.values()) / total_ms, "ops_ms": by_op}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=("all", "roofline", "agreement", "cpu"), default="all")
    parser.add_argument("--pairs", type=int, default=PAIRS, metavar="N", help=f"timed pairs (default: {PAIRS})")
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "fp16"), default=["fp32", "fp16"])
    given = parser.parse_args(arguments)
    if given.pairs < 1:
        parser.error(f"--pairs must be at least 1, got {given.pairs}.")
    parts: dict[str, Callable[[], Section]] = {
        "roofline": roofline,
        "agreement": agreement,
        "cpu": lambda: cpu(given.precisions, given.pairs),
    }
    data = json.loads(PATH.read_text(encoding="utf-8")) if PATH.is_file() else {}
    for name in parts if given.part == "all" else [given.part]:
        data[name] = json.loads(json.dumps(parts[name]()))
        write_file(PATH, (json.dumps(data, indent=1) + "\n").encode())
    write_file(PATH.with_suffix(".md"), page(data).encode())


if __name__ == "__main__":
    main()
