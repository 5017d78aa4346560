"""Run TensorRT engines with nothing but TensorRT, cuda.core and numpy: as any deployment might, without this project.

    python -I engine_alone.py '[{"name": "path.engine", ..}, "pixels.npy", "results.npz", runs]'

`results` holds the outputs as "name.output". The last line of stdout is JSON: milliseconds between CUDA events around
each engine's execution, and which modules of this project, of torch or Triton were imported: none.
"""

import json
import statistics
import sys
from pathlib import Path

import numpy as np
import tensorrt as trt
from cuda.core import Device, EventOptions, LegacyPinnedMemoryResource

paths, feeds_path, results_path, runs = json.loads(sys.argv[1])
pixels = np.load(feeds_path)
device = Device(0)
device.set_current()
stream, pinned = device.create_stream(), LegacyPinnedMemoryResource()
runtime = trt.Runtime(trt.Logger(trt.Logger.WARNING))
alive, contexts, outputs = [], {}, {}


def staged(array):
    memory = pinned.allocate(array.nbytes)
    np.from_dlpack(memory).view(np.uint8)[: array.nbytes] = array.reshape(-1).view(np.uint8)
    return memory


for name, path in paths.items():
    engine = runtime.deserialize_cuda_engine(Path(path).read_bytes())
    assert engine is not None, path
    context = engine.create_execution_context()
    assert context.set_input_shape("pixel_values", pixels.shape)
    outputs[name] = {}
    for i in range(engine.num_io_tensors):
        tensor = engine.get_tensor_name(i)
        array = np.empty(tuple(context.get_tensor_shape(tensor)), trt.nptype(engine.get_tensor_dtype(tensor)))
        buffer = device.allocate(array.nbytes, stream=stream)
        assert context.set_tensor_address(tensor, int(buffer.handle))
        if engine.get_tensor_mode(tensor) == trt.TensorIOMode.INPUT:
            memory = staged(pixels)
            buffer.copy_from(memory, stream=stream)
            alive.append(memory)
        else:
            outputs[name][tensor] = (array, buffer)
        alive += [engine, buffer]
    contexts[name] = context

times = {name: [] for name in paths}
for i in range(runs + 20):
    for name, context in contexts.items():  # in turn, so that both see the same clocks
        timed = EventOptions(timing_enabled=True)
        start = stream.record(options=timed)
        assert context.execute_async_v3(int(stream.handle))
        end = stream.record(options=timed)
        stream.sync()
        if i >= 20:
            times[name].append(end - start)

results = {}
for name, tensors in outputs.items():
    for tensor, (array, buffer) in tensors.items():
        memory = pinned.allocate(array.nbytes)
        memory.copy_from(buffer, stream=stream)
        stream.sync()
        raw = np.from_dlpack(memory).view(np.uint8)[: array.nbytes]
        results[f"{name}.{tensor}"] = raw.view(array.dtype).reshape(array.shape).copy()
np.savez(results_path, **results)
foreign = [m for m in sys.modules if m.split(".")[0] in ("triton", "torch", "engines", "export", "flowcut", "calib")]
figures = {
    name: {"median_ms": statistics.median(t), "p90_ms": float(np.quantile(t, 0.9)), "n": len(t)}
    for name, t in times.items()
}
print(json.dumps({"foreign": foreign, "gpu": device.name, "tensorrt": trt.__version__, "engines": figures}))
