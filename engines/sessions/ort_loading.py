"""How ONNX Runtime opens a graph, and that a process opens each only once.

A session packs weights anew for its kernels, which computes 104 tokens of 4 layers at width 2048 in 295 ms instead of
446 (decoding, bound by memory, gains nothing), and holds what it packed by itself: a second session of the same file
takes the same memory again. From Python nothing shares it: a container of packed weights is an argument that only the C
interface has, and weights handed over by SessionOptions.add_initializer or add_external_initializers are packed by each
session as before, and kept besides. Packed weights that ONNX Runtime saves are mapped by whoever loads them, but are
another file, twice as large and made for one kind of processor. So engines of one file share the session itself, which
may run in several threads at once. A baseline directory and a pruned one have different graphs and share nothing, and
neither do bf16 graphs on a CPU, each of which is opened from a widened copy of its own (engines.widen).

float16 weights become float32 either way, since the CPU provider has no float16 matrix product: twice the file's size.
"""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from engines.backends import gpu_present
from engines.options import Options
from flowcut.deps import require
from flowcut.errors import EngineError

LOG = logging.getLogger("flowcut.onnxruntime")
CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"
CUDA_SETTINGS = {
    # TF32, its default, rounds float32 products to 10 bits, and near-equal flow scores would rank differently.
    "use_tf32": 0,
    # By default the arena doubles whenever it is too small, so that up to half of a GPU's memory is held for nothing.
    "arena_extend_strategy": "kSameAsRequested",
    # By default cuDNN times every algorithm for each number of pictures that is new; the one convolution here is the
    # cutting into patches, a product of matrices in whichever way it is computed.
    "cudnn_conv_algo_search": "HEURISTIC",
    # enable_cuda_graph stays off: a graph is replayed at one shape with inputs and outputs at the addresses they had,
    # and admits no node on the CPU. Here pictures and prompts differ in number and length, every request has a cache of
    # its own, and sizes are computed from shapes on the CPU. TensorRT's sessions are the ones made for it.
    # device_id stays 0, as in every binding: CUDA_VISIBLE_DEVICES says which GPU that is.
}
EXACT = ("session.qdq_matmulnbits_accuracy_level", "1")
"""ONNX Runtime's setting by which inputs of int8 and int4 layers stay float32. By default, 4, they become int8."""

_Key = tuple[object, ...]
_open: WeakValueDictionary[_Key, Any] = WeakValueDictionary()
_opening = threading.Lock()


def on_cuda() -> bool:
    """Whether ONNX Runtime's CUDA provider is installed and a GPU is present.

    Raises:
        FlowCutError: onnxruntime is not installed.
    """
    return CUDA in require("onnxruntime", extra="cpu").get_available_providers() and gpu_present()


def open_shared(path: Path, options: Options, cuda: bool) -> Any:
    """ONNX Runtime's session of a graph: one that is open already in this process, for the same file and settings.

    Raises:
        EngineError: a file that does not load.
    """
    with _opening:  # also while it loads: whoever else wants it now is not to load it again
        key = (*_identity(path), options.threads, options.exact, options.spin, cuda, _severity())
        session = _open.get(key)
        if session is None:
            session = _open[key] = open_graph(path, session_options(options), cuda)
        return session


def open_graph(path: Path, options: Any, cuda: bool) -> Any:
    """A session of one's own.

    Args:
        options: onnxruntime.SessionOptions.

    Raises:
        EngineError: a file that does not load.
    """
    providers = [(CUDA, CUDA_SETTINGS)] * cuda + [CPU]
    try:
        return require("onnxruntime", extra="cpu").InferenceSession(path, options, providers=providers)
    except Exception as error:  # its errors share no base class
        raise EngineError(f"{path} could not be loaded by ONNX Runtime: {one_line(error)}") from error


def session_options(chosen: Options) -> Any:
    """onnxruntime.SessionOptions."""
    options = require("onnxruntime", extra="cpu").SessionOptions()
    options.log_severity_level = _severity()
    # Its graphs are run node by node, each by all threads: ExecutionMode.ORT_PARALLEL and inter_op_num_threads, which
    # run nodes side by side, have nothing to win in a chain of layers.
    options.intra_op_num_threads = chosen.threads or 0
    if chosen.spin:
        # Two sessions take turns: threads of the one that is done must not spin on the cores that the other needs. On
        # two cores this takes llava-tiny's vision from 13 to 9 ms.
        options.add_session_config_entry("session.force_spinning_stop", "1")
    else:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    if chosen.exact:
        options.add_session_config_entry(*EXACT)
    return options


def weight_files(path: Path) -> list[Path]:
    """A graph's file, and that of its weights where they are in another."""
    return [file for file in (path, path.with_name(f"{path.name}.data")) if file.exists()]


def one_line(error: Exception) -> str:
    """Its message."""
    return " ".join(str(error).split())


def _identity(path: Path) -> _Key:
    """What tells these files from any that are put in their place or change."""
    stats = [file.stat() for file in weight_files(path)]
    return tuple((s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for s in stats)


def _severity() -> int:
    """ONNX Runtime writes to stderr, past Python's logging: errors that are raised as well, warnings that nobody here
    can act on."""
    return 2 if LOG.isEnabledFor(logging.DEBUG) else 4
