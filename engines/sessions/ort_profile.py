"""Where a session of ONNX Runtime spends its time, node by node, from the profile that it writes."""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import threading
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from engines.sessions.session import LayerTime
from flowcut.errors import EngineError

LOG = logging.getLogger("flowcut.onnxruntime")
_SUFFIX = "_kernel_time"

Event = Mapping[str, Any]


class Profile:
    """The profile of one session, in a temporary folder that goes with it.

    ONNX Runtime keeps what it measures in memory, at most a million nodes, and writes it once, when it is told to end:
    nothing is measured behind that. Of a node on the CUDA provider it measures what launching it takes.

    Args:
        options: onnxruntime.SessionOptions of the session to be made.
    """

    def __init__(self, options: Any) -> None:
        folder = tempfile.mkdtemp(prefix="flowcut-profile-")
        self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        self._lock, self._runs, self._skipped, self._over = threading.Lock(), 0, 0, False
        options.enable_profiling = True
        options.profile_file_prefix = str(Path(folder) / "profile")

    def count(self) -> None:
        """One more run is over."""
        with self._lock:
            self._runs += 1

    def forget(self) -> None:
        """Leave out the runs that are over."""
        with self._lock:
            self._skipped = self._runs

    def end(self, session: Any) -> list[list[Event]]:
        """The nodes of each run, in the order that the runs ended; nothing when it is called again.

        Raises:
            EngineError: the temporary folder's disk is full.
        """
        with self._lock:
            if self._over:
                return []
            self._over = True
            path = session.end_profiling()
            try:
                runs = list(runs_of(json.loads(Path(path).read_text(encoding="utf-8"))))
            except (OSError, ValueError) as error:
                raise EngineError(
                    f"{path} must hold ONNX Runtime's profile, got: {error}. Is the disk full? TMPDIR says where "
                    "temporary files go."
                ) from None
            finally:
                self._remove()
            if len(runs) < self._runs:
                LOG.warning("ONNX Runtime measured %d of %d runs: it ran out of room.", len(runs), self._runs)
            return runs[self._skipped :]


def runs_of(events: Iterable[Event]) -> Iterator[list[Event]]:
    """The nodes of each run. A run happens in one thread, and its own event follows those of its nodes."""
    nodes: dict[int, list[Event]] = {}
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX):
            nodes.setdefault(event["tid"], []).append(event)
        elif event.get("name") == "model_run":
            yield nodes.pop(event["tid"], [])


def layer_times(graph: str, runs: Iterable[Sequence[Event]]) -> list[LayerTime]:
    """Sums over runs, the slowest node first."""
    calls: dict[tuple[str, str, str], list[float]] = {}
    for event in (event for run in runs for event in run):
        # Nodes without a name are all called after their operator: the index tells them apart.
        key = (event["args"].get("node_index", ""), event["name"].removesuffix(_SUFFIX), event["args"]["op_name"])
        calls.setdefault(key, []).append(event["dur"] / 1e3)
    times = [LayerTime(graph, name, op, len(ms), sum(ms)) for (_, name, op), ms in calls.items()]
    return sorted(times, key=lambda time: -time.total_ms)
