"""The training loop: against the same steps in one process, and stopped and gone on with."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.progress import Progress
from training_lesson import MakeSmallLesson, SmallLesson, SmallNet

from flowcut.errors import FlowCutError
from flowcut.tiny.training import LOG_EVERY, Plan, fit, load

PLAN = Plan(steps=60, batch=16, rate=0.02, warmup=10, cool=40, horizon=80, seed=7)
SAVED, FAILS = 20, 40  # steps: of the last state on the disk, and of the fault
PLANS = (
    PLAN,
    Plan(3300, 32, 1.5e-3, 200, 2000, 5000),
    Plan(30, 16, 1.5e-3, 10, 20, 30),
)

pytestmark = pytest.mark.usefixtures("one_thread")


def train(directory: Path, make: MakeSmallLesson) -> Progress:
    progress = Progress(disable=True)
    fit("small", make, PLAN, directory, progress)
    return progress


def state(directory: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = torch.load(directory / "small.pt", weights_only=True)
    return loaded


def curve(directory: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (directory / "small.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained without a stop."""
    directory = tmp_path_factory.mktemp("whole")
    progress = train(directory, MakeSmallLesson())
    assert progress.tasks[0].completed == PLAN.steps
    return directory


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, pytest.ExceptionInfo[FlowCutError]]:
    """Stopped by a fault in a worker at step FAILS, with the state of step SAVED on the disk."""
    directory = tmp_path_factory.mktemp("broken")
    with pytest.raises(FlowCutError) as caught:
        train(directory, MakeSmallLesson(fails_at=FAILS, unsaved_from=SAVED))
    return directory, caught


@pytest.fixture(scope="module")
def resumed(broken: tuple[Path, pytest.ExceptionInfo[FlowCutError]]) -> Path:
    directory, _ = broken
    assert state(directory)["step"] == SAVED
    assert [line["step"] for line in curve(directory)] == [LOG_EVERY], "nothing to forget: the test shows nothing"
    train(directory, MakeSmallLesson())
    return directory


def test_a_fault_in_a_worker_is_told_in_one_line(
    broken: tuple[Path, pytest.ExceptionInfo[FlowCutError]],
) -> None:
    message = str(broken[1].value)
    assert message.startswith("small must train to its end, got ")
    assert "no electricity" in message
    assert "\n" not in message
    assert "Traceback" not in message


def test_going_on_gives_the_very_parameters_of_not_stopping(whole: Path, resumed: Path) -> None:
    one, other = state(whole), state(resumed)
    assert one["step"] == other["step"] == PLAN.steps
    assert one["module"].keys() == other["module"].keys()
    for name, value in one["module"].items():
        assert torch.equal(value, other["module"][name]), name


def test_curve_says_every_step_once(whole: Path, resumed: Path) -> None:
    assert [line["step"] for line in curve(whole)] == [25, 50, 60]
    assert [line["step"] for line in curve(resumed)] == [25, 50, 60]
    for one, other in zip(curve(whole)[1:], curve(resumed)[1:], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    seconds = [line["seconds"] for line in curve(resumed)]
    assert seconds == sorted(seconds)
    assert [path.suffix for path in sorted(resumed.iterdir())] == [".jsonl", ".pt"]


def test_it_learns_and_says_so(whole: Path) -> None:
    lines = curve(whole)
    assert lines[-1]["loss"] < 0.5 * lines[0]["loss"]
    lesson = SmallLesson(MakeSmallLesson())
    load("small", lesson.module, whole)
    assert lesson.measure()["error"] == pytest.approx(lines[-1]["error"], abs=1e-6)


def test_all_processes_together_do_the_steps_of_one(whole: Path) -> None:
    """Muon for matrices in layers, AdamW for all else, decay for matrices only, the whole batch's gradient."""
    torch.manual_seed(PLAN.seed)
    net = SmallNet()
    layers = [net.body["layers"][i].weight for i in range(2)]  # type: ignore[index]
    plain = [net.embed.weight, net.norm.weight, net.norm.bias, net.head.bias]
    plain += [net.body["layers"][i].bias for i in range(2)]  # type: ignore[index]
    groups = [{"params": [net.head.weight], "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    lesson = SmallLesson(MakeSmallLesson())
    lesson.module = net
    optimizers = [
        torch.optim.Muon(layers, 1.0, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(groups, 1.0, betas=(0.9, 0.98)),
    ]
    for step in range(PLAN.steps):
        rng = np.random.Generator(np.random.PCG64([PLAN.seed, step]))
        net.zero_grad()
        lesson.loss(rng, PLAN.batch, slice(None)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = PLAN.rate_at(step)
            optimizer.step()
    trained = state(whole)["module"]
    for name, value in net.state_dict().items():
        torch.testing.assert_close(trained[name], value, rtol=1e-3, atol=1e-3, msg=name)


def test_muon_has_the_matrices_of_layers_and_no_other(whole: Path) -> None:
    muon, adam = state(whole)["optimizers"]
    assert [tuple(s["momentum_buffer"].shape) for s in muon["state"].values()] == [(6, 8), (8, 6)]
    decayed, plain = adam["param_groups"]
    shapes = [[tuple(adam["state"][i]["exp_avg"].shape) for i in g["params"]] for g in (decayed, plain)]
    assert shapes == [[(3, 8)], [(11, 8), (6,), (8,), (8,), (8,), (3,)]]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.05, 0.0)


@pytest.mark.parametrize("plan", PLANS)
def test_rate_rises_falls_as_a_cosine_and_ends_at_nothing(plan: Plan) -> None:
    rates = [plan.rate_at(step) for step in range(plan.steps + 1)]
    assert rates[0] == pytest.approx(plan.rate / plan.warmup)
    assert rates[plan.warmup - 1] == rates[plan.warmup] == max(rates) == plan.rate
    assert np.all(np.diff(rates[: plan.warmup]) > 0)
    assert np.all(np.diff(rates[plan.warmup :]) < 0)
    done = (plan.cool - plan.warmup) / (plan.horizon - plan.warmup)
    assert rates[plan.cool] == pytest.approx(plan.rate * math.cos(math.pi / 2 * done) ** 2)
    line = np.linspace(rates[plan.cool], 0, plan.steps - plan.cool + 1)
    np.testing.assert_allclose(rates[plan.cool :], line, atol=1e-12)
