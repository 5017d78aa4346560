"""Decode steps as CUDA graphs on the fake GPU, captured here with TensorRT and by TensorRT-RTX itself."""

from __future__ import annotations

import logging

import fake_gpu
import numpy as np
import pytest
from fake_gpu import FakeGpu
from fake_tensorrt import CudaGraphStrategy
from tiny_engine import TinyEngine, write_engine
from trt_feeds import close, follow, next_tokens, prompts, reference, session_of, steps_of

from engines.options import Options
from engines.sessions import trt_session
from flowcut.errors import ConfigError

BACKENDS = ["rtx", "trt"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyEngine:
    return write_engine(tmp_path_factory.mktemp("contexts") / "engine", precision="fp16", backend="rtx")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return fake_gpu.install(monkeypatch)


def on_compute(gpu: FakeGpu) -> list[str]:
    return [what for what in gpu.calls if what in ("execute", "launch")]


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("backend", BACKENDS)
def test_graphs_compute_what_single_kernels_do(tiny: TinyEngine, gpu: FakeGpu, backend: str, batch: int) -> None:
    got, plain = (
        follow(session_of(tiny, "language", backend, cuda_graphs=graphs), prompts(batch), 6) for graphs in (True, False)
    )
    np.testing.assert_array_equal(got, plain)
    assert close(got, follow(reference(tiny, "language"), prompts(batch), 6))


def test_with_tensorrt_a_step_is_captured_when_it_comes_again(tiny: TinyEngine, gpu: FakeGpu) -> None:
    session = session_of(tiny, "language", "trt")
    follow(session, prompts(2), 4)
    assert on_compute(gpu) == ["execute", "execute", "launch", "launch", "launch"]
    assert gpu.graphs == 1
    gpu.calls.clear()
    follow(session, prompts(2), 4)  # in the other slot or the same: at most one more graph
    follow(session, prompts(2), 4)
    assert gpu.graphs <= 2
    assert on_compute(gpu).count("launch") >= 7


def test_a_graph_is_for_one_place_and_one_batch_size(tiny: TinyEngine, gpu: FakeGpu) -> None:
    session = session_of(tiny, "language", "trt")
    requests = [prompts(batch, seed=batch) for batch in (1, 2)]
    states = [session.allocate_state(batch) for batch in (1, 2)]
    got = [
        [session.run(step, state).arrays["logits"] for step, state in zip(steps, states, strict=True)]
        for steps in zip(*(steps_of(feeds, 5) for feeds in requests), strict=True)
    ]
    assert gpu.graphs == 2
    for i, feeds in enumerate(requests):
        assert close(np.stack([step[i] for step in got]), follow(reference(tiny, "language"), feeds, 5))


def test_a_prefill_between_two_steps_leaves_their_graph_alone(tiny: TinyEngine, gpu: FakeGpu) -> None:
    """The fake refuses a graph whose context was used with other shapes since."""
    session = session_of(tiny, "language", "trt", concurrency=1)
    expected = follow(reference(tiny, "language"), prompts(2), 5)
    for _ in range(2):
        assert close(follow(session, prompts(2), 5), expected)
        assert close(follow(session, prompts(3, 20), 5), follow(reference(tiny, "language"), prompts(3, 20), 5))
    assert gpu.graphs == 2


def test_there_is_an_end_to_the_number_of_graphs(
    tiny: TinyEngine, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt_session, "MOST_STEPS", 1)
    session = session_of(tiny, "language", "trt", concurrency=1)
    for batch in (1, 2, 3, 1):
        assert close(follow(session, prompts(batch)), follow(reference(tiny, "language"), prompts(batch)))
    assert gpu.graphs == 1


def test_where_capturing_fails_steps_run_without(
    tiny: TinyEngine, gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    gpu.fail_capture = True
    session, expected = (
        session_of(tiny, "language", "trt", concurrency=1),
        follow(reference(tiny, "language"), prompts()),
    )
    for _ in range(3):
        assert close(follow(session, prompts()), expected)
    assert on_compute(gpu) == ["execute"] * 15
    (said,) = (record for record in caplog.records if record.levelno >= logging.WARNING)
    assert said.getMessage().startswith("decode steps run without a CUDA graph: language: tensorrt did not be captured")


def test_a_capture_that_failed_is_tried_once_more(
    tiny: TinyEngine, gpu: FakeGpu, caplog: pytest.LogCaptureFixture
) -> None:
    session, feeds = session_of(tiny, "language", "trt", concurrency=1), prompts()
    state, steps = session.allocate_state(2), steps_of(feeds, 5)
    got = []
    for i, step in enumerate(steps):
        gpu.fail_capture = i == 2  # the second step, which is captured
        got.append(session.run(step, state).arrays["logits"])
    assert on_compute(gpu) == ["execute"] * 3 + ["launch"] * 3
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert close(np.stack(got), follow(reference(tiny, "language"), feeds, 5))


def test_where_the_driver_cannot_capture_steps_run_without(
    tiny: TinyEngine, gpu: FakeGpu, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(builder: object, options: object = None) -> None:
        raise fake_gpu.CudaError("the graph cannot be instantiated")

    monkeypatch.setattr(fake_gpu.GraphBuilder, "complete", refuse)
    session = session_of(tiny, "language", "trt")
    assert close(follow(session, prompts()), follow(reference(tiny, "language"), prompts()))
    assert "the graph cannot be instantiated" in caplog.text


@pytest.mark.parametrize("options", [{"cuda_graphs": False}, {"profile": True}])
def test_there_are_no_graphs_where_they_are_off_or_layers_are_timed(
    tiny: TinyEngine, gpu: FakeGpu, options: dict[str, bool]
) -> None:
    for backend in BACKENDS:
        session = session_of(tiny, "language", backend, **options)
        follow(session, prompts())
        assert {context.config.cuda_graph_strategy for context in gpu.contexts} == {CudaGraphStrategy.DISABLED}
    assert on_compute(gpu) == ["execute"] * 10
    assert gpu.graphs == 0


def test_tensorrt_rtx_captures_by_itself_and_only_what_repeats(tiny: TinyEngine, gpu: FakeGpu) -> None:
    session = session_of(tiny, "language", "rtx", concurrency=1)
    follow(session, prompts())
    follow(session, prompts(3))
    strategies = sorted(context.config.cuda_graph_strategy.name for context in gpu.contexts)
    assert strategies == ["DISABLED", "WHOLE_GRAPH_CAPTURE", "WHOLE_GRAPH_CAPTURE"]
    assert gpu.graphs == 0
    assert "launch" not in gpu.calls


def test_contexts_share_one_scratch_memory(tiny: TinyEngine, gpu: FakeGpu) -> None:
    session = session_of(tiny, "language", "trt")
    follow(session, prompts())
    assert len(gpu.contexts) == 3  # of two places, and of a step in one
    assert len({context.scratch for context in gpu.contexts}) == 1


def test_device_ms_is_the_execution_alone(tiny: TinyEngine, gpu: FakeGpu) -> None:
    session = session_of(tiny, "language", "trt")
    feeds, state = prompts(), session.allocate_state(2)
    took = [session.run(step, state).device_ms for step in [feeds, *(next_tokens(feeds, i) for i in range(3))]]
    assert took == [1.0] * 4  # a copy takes ten


def test_the_switch_is_true_or_false() -> None:
    with pytest.raises(ConfigError, match="cuda_graphs must be True or False, got 1"):
        Options(cuda_graphs=1)  # type: ignore[arg-type]
