"""Visual tokens of pictures that were seen before, by what is in the picture: bounded, the longest unused go first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engines.sessions.session import DeviceTensor, bytes_of


@dataclass(frozen=True)
class Seen:
    """What vision returned of one picture.

    Attributes:
        rows: image_embeds and, of LLaVA-NeXT, image_lengths, [1, ...] each, on the device.
        kept: [slots], see flowcut.contract.vision_contract.
    """

    rows: Mapping[str, DeviceTensor]
    kept: NDArray[np.int64]


class PictureCache:
    """Safe to use from several threads.

    Args:
        limit_bytes: of the tensors in it; a picture that alone takes more is not kept.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit, self._lock = limit_bytes, threading.Lock()
        self._pictures: OrderedDict[str, Seen] = OrderedDict()
        self.bytes = 0

    def __len__(self) -> int:
        return len(self._pictures)

    def __contains__(self, key: str) -> bool:
        return key in self._pictures

    def get(self, key: str) -> Seen | None:
        """What was seen of the picture, from now on the last used."""
        with self._lock:
            if (seen := self._pictures.get(key)) is not None:
                self._pictures.move_to_end(key)
            return seen

    def put(self, key: str, seen: Seen) -> None:
        """Keep it, and let others go for it."""
        with self._lock:
            if key in self._pictures or _bytes(seen) > self._limit:
                return
            self._pictures[key] = seen
            self.bytes += _bytes(seen)
            while self.bytes > self._limit:
                _, gone = self._pictures.popitem(last=False)
                self.bytes -= _bytes(gone)


def _bytes(seen: Seen) -> int:
    return sum(bytes_of(tensor) for tensor in seen.rows.values())
