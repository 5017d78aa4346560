"""The optimization profile and the check of a network's tensors against the contract."""

import pytest

from engines.profiles import check_tensors, shape_ranges
from flowcut.config import LlavaConfig, TextConfig, VisionConfig
from flowcut.contract import GraphContract, Limits, Range, TensorSpec, language_contract
from flowcut.errors import EngineError

X = TensorSpec("x", "float16", ("batch", 8))
KEPT = TensorSpec("kept", "int64", ("batch", 4))


def test_shapes_take_each_range_end_and_leave_fixed_dimensions_alone() -> None:
    contract = GraphContract("g", (X, TensorSpec("w", "float16", (3, 5))), (KEPT,), {"batch": Range(1, 2, 4)})
    assert shape_ranges(contract) == {"x": ((1, 8), (2, 8), (4, 8)), "w": ((3, 5), (3, 5), (3, 5))}


def test_the_cache_has_the_same_rows_in_prefill_and_decode() -> None:
    text = TextConfig(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2)
    config = LlavaConfig(VisionConfig(), text, image_token_id=7)
    limits = Limits(max_batch=2, max_images=3, max_prompt=10, max_new_tokens=6)
    ranges = shape_ranges(language_contract(config, 5, "fp16", limits))
    assert ranges["past.1.value"] == ((1, 2, 16, 16), (1, 2, 16, 16), (2, 2, 16, 16))
    assert ranges["input_ids"] == ((1, 1), (1, 10), (2, 10))
    assert ranges["image_embeds"] == ((1, 5, 64), (1, 5, 64), (3, 5, 64))


def test_a_dynamic_dimension_is_minus_one_in_the_network() -> None:
    check_tensors("g inputs", [X, KEPT], [TensorSpec("kept", "int64", (-1, 4)), TensorSpec("x", "float16", (-1, 8))])


@pytest.mark.parametrize(
    "found",
    [
        TensorSpec("x", "float32", (-1, 8)),
        TensorSpec("x", "float16", (-1, 9)),
        TensorSpec("x", "float16", (1, 8)),
        TensorSpec("x", "float16", (-1, -1)),
        TensorSpec("x", "float16", (-1, 8, 1)),
    ],
    ids=["dtype", "size", "fixed batch", "not fixed", "rank"],
)
def test_a_changed_tensor_is_refused(found: TensorSpec) -> None:
    with pytest.raises(EngineError, match=r"difference: changed x\."):
        check_tensors("g inputs", [X], [found])


def test_an_output_size_that_was_not_inferred_is_accepted_but_not_another_one() -> None:
    check_tensors("g outputs", [KEPT], [TensorSpec("kept", "int64", (-1, -1))])
    with pytest.raises(EngineError):
        check_tensors("g outputs", [KEPT], [TensorSpec("kept", "int64", (-1, 5))])


def test_the_error_shows_expected_got_and_difference_of_what_differs_only() -> None:
    same = TensorSpec("same", "int64", ("batch",))
    found = [TensorSpec("pixels", "float16", (-1, 8)), TensorSpec("same", "int64", (-1,))]
    with pytest.raises(EngineError) as caught:
        check_tensors("vision inputs", [X, same], found)
    assert str(caught.value) == (
        "vision inputs must be the contract's: expected x float16[batch, 8]; got pixels float16[-1, 8]; "
        "difference: missing x; unexpected pixels. Export the graph again."
    )
