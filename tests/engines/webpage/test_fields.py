"""JSON that fits its annotations becomes dataclasses; the rest is named with its place, its rule and its value."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import pytest

from engines.webpage.fields import Amount, Count, Share, Unfit, decode, parse


@dataclass(frozen=True)
class _Inner:
    share: Share
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True)
class _Outer:
    name: str
    size: Count
    inner: tuple[_Inner, ...]
    by_name: Mapping[str, Amount | None] | None = None
    flag: bool | None = None
    free: Any = None


GOOD = {"name": "n", "size": 3, "inner": [{"share": 1}, {"share": 0.5, "kind": "b"}], "by_name": {"x": 2, "y": None}}


def test_annotations_say_what_a_document_becomes() -> None:
    found = decode(_Outer, {**GOOD, "free": {"any": [1]}, "later": "ignored"}, "")
    assert found == _Outer("n", 3, (_Inner(1.0), _Inner(0.5, "b")), {"x": 2.0, "y": None}, None, {"any": [1]})
    assert type(found.inner[0].share) is float


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": 0}, "size must be a whole number, 1 or more, got 0."),
        ({"size": True}, "size must be a whole number, 1 or more, got True."),
        ({"size": 2.0}, "size must be a whole number, 1 or more, got 2.0."),
        ({"name": None}, "name must be text, got None."),
        ({"flag": "yes"}, "flag must be true or false, got 'yes'."),
        ({"inner": {}}, "inner must be a list, got {}."),
        ({"inner": [3]}, "inner[0] must be an object, got 3."),
        ({"inner": [{"share": 1.01}]}, "inner[0].share must be a number from 0 to 1, got 1.01."),
        ({"inner": [{"share": 1, "kind": "c"}]}, "inner[0].kind must be one of 'a', 'b', got 'c'."),
        ({"inner": [{}]}, "inner[0].share must be given, got none."),
        ({"by_name": {"x": -1}}, "by_name.x must be a number, 0 or more, got -1."),
        ({"by_name": {"x": 10**400}}, "by_name.x must be a number, 0 or more, got 1000"),
        ({"by_name": {"x": float("inf")}}, "by_name.x must be a number, 0 or more, got inf."),
        ({"name": 5 * ["a long value, too long to be read in a message"]}, "name must be text, got ['a long"),
    ],
)
def test_what_does_not_fit_is_named_with_rule_and_value(change: dict[str, Any], message: str) -> None:
    with pytest.raises(Unfit) as error:
        decode(_Outer, {**GOOD, **change}, "")
    assert str(error.value).startswith(message)
    assert len(str(error.value)) < 140


@pytest.mark.parametrize("text", ["NaN", '{"a": Infinity}', "", '{"a": ', "[" * 100_000, "1" * 5000])
def test_what_is_no_json_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        parse(text)


def test_json_is_what_the_standard_library_says() -> None:
    assert parse('{"a": [1, 2.5, null, "\\u00e9"]}') == {"a": [1, 2.5, None, "é"]}
