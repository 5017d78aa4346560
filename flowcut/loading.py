"""Checkpoint tensors into torch modules built on the meta device, one tensor at a time."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from torch import nn

from flowcut.checkpoint import Weights
from flowcut.tensors import check_finite

Module = TypeVar("Module", bound=nn.Module)


def load_module(model: Module, weights: Weights, prefix: str, dtype: torch.dtype, device: str) -> Module:
    """Give every parameter of `model` the checkpoint tensor `prefix` + its name; never two copies of the model.

    Raises:
        CheckpointError: a tensor that is not finite.
    """
    for name, _ in list(model.named_parameters()):
        owner, _, leaf = name.rpartition(".")
        array = weights.load(prefix + name)
        check_finite(prefix + name, array)
        tensor = _to_torch(array).to(device=device, dtype=dtype)
        setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
    return model.eval()


def _to_torch(array: np.ndarray) -> torch.Tensor:
    """A torch copy of a numpy array; bfloat16 travels as int16 bits."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(np.array(array.view(np.int16))).view(torch.bfloat16)
    return torch.from_numpy(np.array(array))
