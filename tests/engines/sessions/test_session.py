"""The helpers that all sessions share."""

from __future__ import annotations

import numpy as np
import pytest

from engines.sessions import session
from flowcut.aliases import resolve
from flowcut.contract import GraphContract, Limits, cached_layers, language_contracts, vision_contract

LIMITS = Limits(max_batch=2, max_images=2, max_prompt=32, max_new_tokens=8)


def test_a_contract_is_sorted_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a large part of a millisecond with 32 layers, and a step of an answer asks several times."""
    asked: list[GraphContract] = []
    monkeypatch.setattr(session, "cached_layers", lambda contract: (asked.append(contract), cached_layers(contract))[1])
    contract = vision_contract(resolve("llava-tiny").config, 16, "fp32", LIMITS)
    feeds = {"pixel_values": np.zeros((1, 3, 168, 168), np.float32)}
    for _ in range(3):
        session.sizes_of(contract, feeds, None)
        assert session.state_pairs(contract) == []
        assert session.feeds_of(contract) == [*contract.inputs]
        session.results_of(contract).clear()  # a list of one's own
        assert session.results_of(contract) == [*contract.outputs]
    assert asked == [contract]


def test_other_graphs_take_embeddings_and_hidden_states() -> None:
    config = resolve("llava-tiny").config
    graphs = [
        vision_contract(config, 16, "fp32", LIMITS),
        *language_contracts(config, 16, "fp32", LIMITS, 3, llm_tokens=4),
    ]
    taken = [{spec.name for spec in session.taken_by_others(contract)} for contract in graphs]
    fed = {spec.name for contract in graphs for spec in session.feeds_of(contract)}
    assert taken[0] == {"image_embeds"}
    assert [len(names) for names in taken] == [1, 1, 1, 0]
    assert set().union(*taken) <= fed
    results = {spec.name for contract in graphs for spec in session.results_of(contract)}
    assert results & fed - set().union(*taken) <= {"pruned_lengths"}  # which a stage takes from the host
