"""What flows into linear layers: the largest value of each; of groups that AWQ scales also means and sampled rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from calib.groups import Group
from flowcut.errors import CheckpointError
from flowcut.tensors import Array

Pick = Callable[[int], Array]
"""Of so many tokens the rows to keep as samples."""


class Inputs:
    """Statistics of linear layers' inputs over samples.

    Attributes:
        largest: absolute value, by layer.
        rows: sampled inputs [n, in] float32, by group.
    """

    def __init__(self, groups: Iterable[Group]) -> None:
        self._groups = {group.name for group in groups}
        self.largest: dict[str, float] = {}
        self.rows: dict[str, list[Array]] = {}
        self._sums: dict[str, Array] = {}  # of absolute values, float64 [in]
        self._tokens: dict[str, int] = {}

    def mean(self, group: str) -> Array:
        """Mean absolute value of each channel, float64 [in]."""
        return np.asarray(self._sums[group] / self._tokens[group])

    def sample(self, group: str) -> Array:
        """All sampled rows, float32 [n, in]."""
        return np.concatenate(self.rows[group])

    @contextmanager
    def watching(self, module: nn.Module, prefix: str, pick: Pick) -> Iterator[None]:
        """Add what flows into the linear layers of `module`, whose names in the checkpoint begin with `prefix`.

        Raises:
            CheckpointError: an input that is not finite.
        """
        with ExitStack() as stack:
            for name, layer in module.named_modules():
                if isinstance(layer, nn.Linear):
                    stack.enter_context(layer.register_forward_pre_hook(self._hook(prefix + name, pick)))
            yield

    def merge(self, other: Inputs) -> None:
        """Add what another has seen."""
        for name, largest in other.largest.items():
            self.largest[name] = max(self.largest.get(name, 0.0), largest)
        for name, sums in other._sums.items():
            self._add(name, sums, other._tokens[name], other.sample(name))

    def saved(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Tensors and JSON that `restored` takes."""
        tensors = {f"sums.{name}": sums for name, sums in self._sums.items()}
        tensors |= {f"rows.{name}": self.sample(name) for name in self.rows}
        return tensors, {"largest": self.largest, "tokens": self._tokens}

    @staticmethod
    def restored(groups: Iterable[Group], tensors: Mapping[str, Array], info: Mapping[str, Any]) -> Inputs:
        """Inverse of `saved`."""
        inputs = Inputs(groups)
        inputs.largest = dict(info["largest"])
        for name, tokens in info["tokens"].items():
            inputs._add(name, tensors[f"sums.{name}"], tokens, tensors[f"rows.{name}"])
        return inputs

    def _hook(self, name: str, pick: Pick) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def see(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].detach().flatten(0, -2)
            largest = float(x.abs().max())
            if not np.isfinite(largest):
                raise CheckpointError(
                    f"input of {name} must be finite in float32, got NaN or infinity. Mend the checkpoint."
                )
            self.largest[name] = max(self.largest.get(name, 0.0), largest)
            if name in self._groups:
                self._add(name, x.abs().sum(0, dtype=torch.float64).numpy(), len(x), x[pick(len(x))].numpy())

        return see

    def _add(self, name: str, sums: Array, tokens: int, rows: Array) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + sums
        self._tokens[name] = self._tokens.get(name, 0) + tokens
        self.rows.setdefault(name, []).append(rows)
