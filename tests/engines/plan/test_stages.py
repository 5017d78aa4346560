"""Whole graphs: closed forms of llava-tiny's stages, and an engine directory that counts to what its graphs do."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_engine import LIMITS, write_engine

from engines.flops import count_model
from engines.plan.costs import Cost
from engines.plan.roof import Roof
from engines.plan.stages import STAGES, Lengths, directory_costs, graph_costs
from export.language import language_model
from export.vision import vision_model
from flowcut.aliases import Model, resolve
from flowcut.artifacts import read_manifest
from flowcut.budget import make_budget
from flowcut.config import Precision
from flowcut.contract import Limits, language_contracts, vision_contract
from flowcut.errors import ConfigError
from flowcut.schedule import make_schedule

TEXT, ROOM = 24, 7
BYTES = {"fp32": 4, "fp16": 2, "int8": 2, "int4": 2}
"""Of what is no layer's weight."""


@pytest.fixture(scope="module")
def tiny() -> Model:
    return resolve("llava-tiny")


def costs(
    model: Model, tokens: int, precision: Precision = "fp16", batch: int = 1, text: int = TEXT
) -> dict[str, Cost]:
    """Of one picture and `text` tokens a prompt, with a cache of ROOM rows beyond it."""
    prompt = tokens + text
    limits = Limits(batch, batch, prompt, ROOM)
    schedule = make_schedule("static", model.config.vision, tokens)
    contract = vision_contract(model.config, tokens, precision, limits)
    (language,) = language_contracts(model.config, tokens, precision, limits)
    vision = vision_model(model.weights, contract, schedule, precision, {})
    decoder = language_model(model.weights, language, precision, {})
    return graph_costs(vision, [decoder], Lengths(batch, batch, batch, prompt))


def layer_bytes(inputs: int, outputs: int, precision: str) -> float:
    """Of one matrix as it is stored, with its scales in float16: int8 one an output, int4 one a block of 64 or 128."""
    if precision == "int8":
        return inputs * outputs + 2 * outputs
    if precision == "int4":
        return inputs * outputs / 2 + 2 * (inputs // (128 if inputs % 128 == 0 else 64)) * outputs
    return inputs * outputs * BYTES[precision]


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8", "int4"])
@pytest.mark.parametrize(("tokens", "batch"), [(16, 1), (144, 3)])
def test_the_decoders_bytes_are_a_closed_form(tiny: Model, precision: Precision, tokens: int, batch: int) -> None:
    text, item = tiny.config.text, BYTES[precision]
    hidden, inner, layers, vocab = text.hidden_size, text.intermediate_size, text.num_hidden_layers, text.vocab_size
    matrices = [(hidden, 3 * hidden), (hidden, hidden), (hidden, 2 * inner), (inner, hidden)]
    weights = layers * sum(layer_bytes(*shape, precision) for shape in matrices)
    weights += item * (hidden * vocab + (2 * layers + 1) * hidden)  # head and norms
    found, prompt = costs(tiny, tokens, precision, batch), tokens + TEXT
    for stage, rows in (("prefill", prompt), ("decode", 1)):
        embedded = item * batch * rows * hidden
        angles = item * batch * rows * hidden // text.num_attention_heads  # of cos and of sin half a head
        angles = min(angles, item * (prompt + ROOM) * hidden // text.num_attention_heads)
        constants = found[stage].weight_bytes - weights - embedded - angles
        assert 0 < constants < 8 * (prompt + ROOM) + 400, "row numbers of the mask, and shapes"
        row = 2 * layers * hidden * item
        assert found[stage].state_bytes == batch * (prompt if stage == "prefill" else prompt + 1) * row
        pictures = batch if stage == "prefill" else 1
        numbers = 8 * batch * (3 * rows + 1)  # input_ids, position_ids, image_rows, last_token
        assert found[stage].io_bytes == item * pictures * tokens * hidden + 4 * batch * vocab + numbers


@pytest.mark.parametrize("tokens", [16, 144])
def test_the_decoders_least_operations_are_those_of_the_rows_in_use(tiny: Model, tokens: int) -> None:
    text, prompt = tiny.config.text, tokens + TEXT
    for stage, rows, pairs in (("prefill", prompt, prompt * (prompt + 1) // 2), ("decode", 1, prompt + 1)):
        found = costs(tiny, tokens)[stage]
        masked = text.num_hidden_layers * 4 * text.hidden_size * (rows * (prompt + ROOM) - pairs)
        assert found.least_flops == found.flops - masked


def test_the_towers_bytes_are_a_closed_form(tiny: Model) -> None:
    v, text, images = tiny.config.vision, tiny.config.text.hidden_size, 3
    found = costs(tiny, v.patches, "fp16", images)["vision"]
    h, inner, layers = v.hidden_size, v.intermediate_size, v.num_hidden_layers - 1
    weights = h * 3 * v.patch_size**2 + (v.patches + 1) * h + 2 * h  # patches, positions, the norm before
    weights += layers * (4 * (h * h + h) + 2 * h * inner + inner + h + 4 * h)
    weights += h * text + text + text * text + text
    numbers = 8 * v.patches  # kept, the same for every image
    assert 0 <= found.weight_bytes - 2 * weights - numbers < 8 * v.patches + 200, "the patches taken, and shapes"
    assert found.state_bytes == 0
    pixels, embeds = 3 * v.image_size**2, v.patches * text
    assert found.io_bytes == images * (2 * pixels + 2 * embeds + 8 * v.patches)
    assert found.activation_bytes > 10 * found.io_bytes


def test_counting_agrees_with_engines_flops(tiny: Model) -> None:
    limits, prompt = Limits(1, 1, 16 + TEXT, ROOM), 16 + TEXT
    (language,) = language_contracts(tiny.config, 16, "fp16", limits)
    decoder = language_model(tiny.weights, language, "fp16", {})
    found = costs(tiny, 16)
    for stage, rows in (("prefill", prompt), ("decode", 1)):
        counted = count_model(decoder, {"batch": 1, "images": 1, "sequence": rows})
        assert found[stage].by_group == counted.by_group
        assert found[stage].flops == counted.total


def test_more_tokens_never_cost_less(tiny: Model) -> None:
    rows = [costs(tiny, tokens) for tokens in (1, 2, 16, 100, 143, 144)]
    for stage, figure in (
        ("prefill", "least_flops"),
        ("prefill", "bytes"),
        ("decode", "least_flops"),
        ("vision", "flops"),
    ):
        found = [getattr(row[stage], figure) for row in rows]
        if stage != "vision":
            assert found == sorted(found)
            assert found[0] < found[-1]
        else:  # 144 prune nothing, and so score nothing
            assert found[:-1] == sorted(found[:-1])
    assert [row["vision"].scorings for row in rows] == [10] * 5 + [0]


@pytest.mark.parametrize("stage", STAGES)
def test_the_roofline_is_never_below_the_whole_graphs(tiny: Model, stage: str) -> None:
    cost = costs(tiny, 16)[stage]
    for flops_per_s in (1e9, 1e11, 1e14):
        for bytes_per_s in (1e9, 1e11, 1e13):
            roof = Roof("r", flops_per_s, bytes_per_s, "")
            assert roof.bound_ms(cost) >= roof.floor_ms(cost) * (1 - 1e-12)
            assert roof.bound_ms(cost) == pytest.approx(sum(roof.shares_ms(cost).values()))


# --- engine directories ---


@pytest.mark.parametrize("stages", [1, 3])
def test_a_directory_counts_to_what_its_graphs_do(tmp_path: Path, stages: int) -> None:
    made = write_engine(tmp_path / "engine", precision="fp16", stages=stages)
    manifest = read_manifest(made.directory)
    for data in made.directory.glob("*.data"):
        data.unlink()
    found = directory_costs(made.directory, manifest, 2, 2, 40)
    model, config = made.model, made.model.config
    vision = vision_model(model.weights, vision_contract(config, 16, "fp16", LIMITS), made.schedule, "fp16", {})
    contracts = language_contracts(config, 16, "fp16", LIMITS, stages)
    decoder = [language_model(model.weights, contract, "fp16", {}) for contract in contracts]
    assert found == graph_costs(vision, decoder, Lengths(2, 2, 2, 40))
    assert tuple(found) == STAGES


def test_a_decoder_in_stages_costs_what_it_does_in_one_and_what_passes_between(tmp_path: Path) -> None:
    whole, parts = (write_engine(tmp_path / str(n), precision="fp16", stages=n).directory for n in (1, 3))
    one, three = (directory_costs(path, read_manifest(path), 1, 1, 40) for path in (whole, parts))
    hidden = 2 * 40 * 192
    assert three["prefill"].least_flops == pytest.approx(one["prefill"].least_flops, rel=1e-3)
    assert three["prefill"].state_bytes == one["prefill"].state_bytes
    assert three["prefill"].io_bytes - one["prefill"].io_bytes == 2 * 2 * hidden + 2 * 8 * 40, "and positions again"


def test_a_directory_that_prunes_inside_the_decoder(tmp_path: Path) -> None:
    made = write_engine(tmp_path / "engine", precision="fp16", tokens=64, llm_tokens=16, limits=Limits(3, 4, 120, 32))
    manifest = read_manifest(made.directory)
    found = directory_costs(made.directory, manifest, 1, 1, 100, 52)
    text = manifest.geometry.text
    row = 2 * 2 * text.hidden_size
    later = text.num_hidden_layers - 2
    assert found["prefill"].state_bytes == row * (2 * 100 + later * 52)
    assert found["decode"].state_bytes == row * (2 * 101 + later * 53)
    assert found["prefill"].scorings == found["decode"].scorings == 1
    with pytest.raises(ConfigError, match="pruned_tokens must be given where visual tokens are dropped"):
        directory_costs(made.directory, manifest, 1, 1, 100)


def test_llava_nexts_tower_sees_tiles() -> None:
    model = resolve("llava-v1.6-vicuna-7b", random=True, decoder_layers=3)
    budget, limits = make_budget(model.config, 160), Limits(1, 1, 480, 1)
    schedule = make_schedule("static", model.config.vision, budget.tokens)
    contract = vision_contract(model.config, budget.tokens, "fp16", limits)
    vision = vision_model(model.weights, contract, schedule, "fp16", {})
    three, five = (graph_costs(vision, [], Lengths(1, 1, tiles, 480))["vision"] for tiles in (3, 5))
    assert three.by_group["linear"] * 5 == five.by_group["linear"] * 3


@pytest.mark.parametrize("name", ["batch", "images", "tiles", "prompt", "pruned"])
def test_lengths_are_at_least_one(name: str) -> None:
    given = {"batch": 1, "images": 1, "tiles": 1, "prompt": 1, name: 0}
    with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
        Lengths(**given)
