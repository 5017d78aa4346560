"""Operations of the vision tower, against torch's own counter."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from calib.flops import flops, flops_share, least_share
from flowcut.aliases import resolve
from flowcut.config import VisionConfig
from flowcut.schedule import Schedule, closed_form, make_schedule
from flowcut.vision import VisionModel

LLAVA = VisionConfig()


@pytest.fixture(scope="module")
def model() -> VisionModel:
    return VisionModel.from_weights(resolve("llava-tiny").weights)


def counted(model: VisionModel, schedule: Schedule) -> int:
    """What torch counts in the layers."""
    side = model.config.vision.image_size
    # fused attention is not counted
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.inference_mode():
        model.features(torch.zeros(1, 3, side, side), schedule)
    return sum(n for op, n in counter.get_flop_counts()["Global"].items() if op is not torch.ops.aten.convolution)


def test_unpruned_layers_are_what_torch_counts(model: VisionModel) -> None:
    vision = model.config.vision
    assert flops(vision) == counted(model, make_schedule("static", vision, vision.patches))


@pytest.mark.parametrize("tokens", [1, 16, 100])
def test_pruned_layers_are_what_torch_counts_but_for_scoring(model: VisionModel, tokens: int) -> None:
    vision = model.config.vision
    schedule = make_schedule("static", vision, tokens)
    assert flops(vision, schedule.counts) <= counted(model, schedule) <= 1.01 * flops(vision, schedule.counts)


def test_shares_are_of_the_unpruned_tower() -> None:
    counts = closed_form(LLAVA, 64)
    assert flops_share(LLAVA, (576,) * 11) == 1
    assert flops_share(LLAVA, counts) == flops(LLAVA, counts) / flops(LLAVA)
    # by hand: two layers see 577 rows, 21 see 65; a row costs 24 h^2 in linear layers (m = 4 h) and 4 n h in attention
    cost = {n: n * (24 * 1024**2 + 4 * n * 1024) for n in (577, 65)}
    assert least_share(LLAVA, 64) == pytest.approx((2 * cost[577] + 21 * cost[65]) / (23 * cost[577]))
