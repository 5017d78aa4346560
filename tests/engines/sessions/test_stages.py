"""A decoder in stages against the same decoder in one graph, on ONNX Runtime and on the fake GPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import fake_gpu
import numpy as np
import pytest
from fake_gpu import FakeGpu
from tiny_engine import LIMITS, TinyEngine, write_engine

from engines.options import Options
from engines.sessions.cuda_buffers import bytes_for
from engines.sessions.cuda_device import CudaDevice
from engines.sessions.ort_session import OrtSession
from engines.sessions.session import Session, feeds_of
from engines.sessions.stages import Chain
from engines.sessions.trt_session import TrtSession
from flowcut.contract import GraphContract, cached_layers, language_contract, language_contracts
from flowcut.errors import EngineError

Feeds = dict[str, np.ndarray]
Open = Callable[[int], Session]
TOKENS = 16


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], TinyEngine]:
    """tiny(stages) -> a directory of the same weights, written once."""
    made: dict[int, TinyEngine] = {}

    def write(stages: int) -> TinyEngine:
        if stages not in made:
            directory = tmp_path_factory.mktemp("stages") / "engine"
            made[stages] = write_engine(directory, backend="rtx", random=True, stages=stages)
        return made[stages]

    return write


def open_decoder(engine: TinyEngine, stages: int, make: Callable[[str, GraphContract], Session]) -> Session:
    built_for = (engine.model.config, TOKENS, "fp32", LIMITS)
    sessions = [make(c.name, c) for c in language_contracts(*built_for, stages)]
    return sessions[0] if stages == 1 else Chain(language_contract(*built_for), sessions)


@pytest.fixture
def on_ort(tiny: Callable[[int], TinyEngine]) -> Open:
    def decoder(stages: int) -> Session:
        engine = tiny(stages)
        return open_decoder(
            engine, stages, lambda name, c: OrtSession(engine.directory / f"{name}.onnx", c, Options(threads=1))
        )

    return decoder


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeGpu:
    return fake_gpu.install(monkeypatch)


@pytest.fixture
def on_gpu(tiny: Callable[[int], TinyEngine], gpu: FakeGpu) -> Open:
    def decoder(stages: int) -> Session:
        engine, device = tiny(stages), CudaDevice("rtx")

        def make(name: str, contract: GraphContract) -> Session:
            return TrtSession(engine.directory / f"{name}.engine", contract, "rtx", device, Options(concurrency=4))

        return open_decoder(engine, stages, make)

    return decoder


def prompts(batch: int = 2, length: int = 24, seed: int = 0) -> Feeds:
    """Prompts of different lengths, the first one with a picture."""
    rng = np.random.default_rng(seed)
    rows = np.full((batch, length), -1)
    rows[0, 2 : 2 + TOKENS] = np.arange(TOKENS)
    return {
        "input_ids": rng.integers(3, 448, (batch, length)),
        "position_ids": np.tile(np.arange(length), (batch, 1)),
        "image_rows": rows,
        "last_token": length - 1 - 3 * np.arange(batch),
        "image_embeds": rng.standard_normal((1, TOKENS, 192)).astype(np.float32),
    }


def steps_of(feeds: Feeds, decode: int = 4) -> list[Feeds]:
    batch = len(feeds["last_token"])
    return [
        feeds,
        *(
            feeds
            | {
                "input_ids": np.full((batch, 1), 5 + step),
                "position_ids": (feeds["last_token"] + 1 + step)[:, None],
                "image_rows": np.full((batch, 1), -1),
                "last_token": np.zeros(batch, np.int64),
            }
            for step in range(decode)
        ),
    ]


def follow(decoder: Session, feeds: Feeds) -> np.ndarray:
    """Logits of every step, [steps, B, V]."""
    state = decoder.allocate_state(len(feeds["last_token"]))
    return np.stack([decoder.run(step, state).arrays["logits"] for step in steps_of(feeds)])


def close(got: np.ndarray, expected: np.ndarray) -> bool:
    return bool(np.abs(got - expected).max() <= 1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("stages", [2, 3])
def test_a_chain_computes_what_the_one_graph_does(on_ort: Open, stages: int, batch: int) -> None:
    feeds = prompts(batch)
    got, expected = (follow(on_ort(n), feeds) for n in (stages, 1))
    assert close(got, expected)
    assert not close(got[1], got[2])  # or nothing would have been decoded


@pytest.mark.parametrize("stages", [2, 3])
def test_a_chain_on_the_gpu_computes_what_onnx_runtime_does(on_ort: Open, on_gpu: Open, stages: int) -> None:
    assert close(follow(on_gpu(stages), prompts()), follow(on_ort(1), prompts()))


def test_every_layer_is_in_one_stage(tiny: Callable[[int], TinyEngine]) -> None:
    config = tiny(1).model.config
    for stages in range(1, config.text.num_hidden_layers + 1):
        contracts = language_contracts(config, TOKENS, "fp32", LIMITS, stages)
        layers = [layer for contract in contracts for layer in cached_layers(contract)]
        assert layers == list(range(config.text.num_hidden_layers))
        assert all(cached_layers(contract) for contract in contracts)


def test_a_chain_is_called_as_the_whole_decoder(on_ort: Open) -> None:
    whole, chain = on_ort(1), on_ort(3)
    assert chain.contract == whole.contract
    result = chain.run(prompts(), chain.allocate_state(2), keep=["logits"])
    assert result.arrays == {}
    np.testing.assert_allclose(
        result.kept["logits"].numpy(), whole.run(prompts(), whole.allocate_state(2)).arrays["logits"], rtol=1e-4
    )
    assert result.device_ms > 0


def test_wrong_feeds_are_refused_before_the_first_stage_runs(gpu: FakeGpu, on_gpu: Open) -> None:
    chain = on_gpu(2)
    state = chain.allocate_state(2)
    gpu.calls.clear()
    for spec in feeds_of(chain.contract):
        feeds = {name: value for name, value in prompts().items() if name != spec.name}
        with pytest.raises(EngineError, match=f"language inputs must be .* difference: {spec.name}"):
            chain.run(feeds, state)
    with pytest.raises(EngineError, match="language must be run with a state"):
        chain.run(prompts())
    with pytest.raises(EngineError, match="language must be run with a state that it allocated"):
        chain.run(prompts(), on_gpu(1).allocate_state(2))
    assert "execute" not in gpu.calls


def test_hidden_does_not_leave_the_device(gpu: FakeGpu, on_gpu: Open) -> None:
    chain, feeds = on_gpu(2), prompts()
    state = chain.allocate_state(2)
    gpu.calls.clear()
    gpu.copied_bytes = 0
    result = chain.run(feeds, state)
    run = ["record", "wait", "record", "execute", "record", "wait", "copy", "sync"]
    assert gpu.calls == [*["copy"] * 4, *run, *["copy"] * 3, *run]
    (hidden,) = (spec for spec in chain.stages[1].contract.inputs if spec.name.startswith("hidden."))  # type: ignore[attr-defined]
    within = 2 * bytes_for(hidden, {"batch": 2, "sequence": 24})  # out of the first stage's place, into the second's
    twice = feeds["position_ids"].nbytes  # both stages take it
    host = sum(a.nbytes for a in feeds.values()) + twice + result.arrays["logits"].nbytes
    assert gpu.copied_bytes == host + within
    assert result.device_ms == 2  # a millisecond of the fake clock for each execution


def test_stages_allocate_nothing_while_they_run(gpu: FakeGpu, on_gpu: Open) -> None:
    chain, feeds = on_gpu(3), prompts()
    before = gpu.allocations, gpu.device_bytes
    for _ in range(3):
        follow(chain, feeds)
    assert (gpu.allocations, gpu.device_bytes) == before


@pytest.mark.parametrize("backend", ["ort", "gpu"])
def test_requests_may_alternate_between_steps(backend: str, request: pytest.FixtureRequest) -> None:
    chain = request.getfixturevalue(f"on_{backend}")(2)
    requests = [prompts(2, seed=0), prompts(1, seed=1), prompts(2, 20, seed=2)]
    states = [chain.allocate_state(len(feeds["last_token"])) for feeds in requests]
    interleaved = [
        [chain.run(step, state).arrays["logits"] for step, state in zip(together, states, strict=True)]
        for together in zip(*map(steps_of, requests), strict=True)
    ]
    for i, feeds in enumerate(requests):
        assert close(np.stack([each[i] for each in interleaved]), follow(chain, feeds))


@pytest.mark.parametrize("backend", ["ort", "gpu"])
def test_any_thread_may_call(backend: str, request: pytest.FixtureRequest) -> None:
    chain = request.getfixturevalue(f"on_{backend}")(3)
    expected = {seed: follow(chain, prompts(seed=seed)) for seed in range(4)}
    got: dict[int, np.ndarray] = {}

    def answer(seed: int) -> None:
        got[seed] = follow(chain, prompts(seed=seed))

    threads = [threading.Thread(target=answer, args=[seed]) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert got.keys() == expected.keys()
    assert all(close(got[seed], expected[seed]) for seed in expected)


def test_a_stage_of_another_decoder_is_refused(tiny: Callable[[int], TinyEngine]) -> None:
    engine = tiny(2)
    second, third = language_contracts(engine.model.config, TOKENS, "fp32", LIMITS, 3)[1:]
    for contract, path in ((second, "language.0.onnx"), (third, "language.1.onnx")):
        with pytest.raises(EngineError, match=r"language\.\d inputs must be the contract's"):
            OrtSession(Path(engine.directory) / path, contract)
