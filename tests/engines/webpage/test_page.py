"""The page as a document: complete without the network, with text as text and numbers as bench.json has them."""

from __future__ import annotations

import base64
import copy
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from bench_files import MACHINE, bench, write_bench

from engines.webpage.groups import grouped
from engines.webpage.page import render
from engines.webpage.results import read_runs

HOSTILE = "<script>alert('x')</script><img src=x onerror=alert(1)>\"'&"
VOID = {"meta", "link", "img", "br", "input", "hr"}
LOADS = {"src", "srcset", "href", "xlink:href", "data", "action", "poster", "background", "formaction", "cite", "ping"}


class _Document(HTMLParser):
    """Tags, attributes, and the text of the page without that of <style>."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.style = ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID and not (self.get_starttag_text() or "").endswith("/>"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, (tag, self.open)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "style":
            self.style += data
        else:
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def _page(tmp_path: Path, *documents: dict[str, Any], pictures: bool = True) -> _Document:
    places = [write_bench(tmp_path / f"r{i}", each, pictures) for i, each in enumerate(documents)]
    return _Document(render(grouped(read_runs(places)), "0.1", "2026-03-01T12:00:00+00:00"))


def _hostile() -> dict[str, Any]:
    """Everything that is text in a document, hostile."""
    document = copy.deepcopy(bench(64, peers=["peer"]))
    document |= {"command": f"flowcut bench {HOSTILE}", "model": HOSTILE, "note": HOSTILE, "created": HOSTILE}
    document |= {"mismatch": [HOSTILE], "warnings": [HOSTILE], "settings": {HOSTILE: {HOSTILE: HOSTILE}}}
    document["agreement"] = {"kept": None, "kept_reason": HOSTILE, "baseline": None, "baseline_reason": HOSTILE}
    document["machine"] = {**MACHINE, "device": HOSTILE, "versions": {HOSTILE: HOSTILE}}
    document["machine"]["roof"] = {**MACHINE["roof"], "name": HOSTILE, "source": HOSTILE}
    for each in (document["pruned"], document["baseline"], *document["peers"]):
        each |= {"title": HOSTILE, "directory": HOSTILE, "schedule": HOSTILE, "selector": HOSTILE, "note": HOSTILE}
        each |= {"precision": HOSTILE, "backend": HOSTILE}
    return document


@pytest.mark.parametrize("documents", [(bench(64), bench(128)), (_hostile(),)], ids=["plain", "hostile"])
def test_nothing_on_the_page_can_load_anything(tmp_path: Path, documents: tuple[dict[str, Any], ...]) -> None:
    page = _page(tmp_path, *documents)
    assert page.open == []
    found = [(tag, name, value) for tag, attrs in page.tags for name, value in attrs.items() if name in LOADS]
    assert {tag for tag, _, _ in found} <= {"img", "link", "a"}
    assert all((value or "").startswith(("data:", "#")) for _, _, value in found), found
    assert {"script", "iframe", "object", "embed", "base", "form", "video", "audio", "use", "image"}.isdisjoint(
        tag for tag, _ in page.tags
    )
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]
    assert not re.search(r"url\(|@import|expression\(", page.style)
    policy = next(meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")


def test_hostile_text_is_shown_as_it_is(tmp_path: Path) -> None:
    page = _page(tmp_path, _hostile())
    shown = " ".join(HOSTILE.split())
    assert page.text.count(shown) > 20
    assert page.all("script") == []
    assert all(set(each) <= {"src", "width", "height", "alt"} for each in page.all("img"))


def test_pictures_are_those_of_the_directories_and_each_is_there_once(tmp_path: Path) -> None:
    page = _page(tmp_path, bench(64), bench(128))
    images = page.all("img")
    assert [each["alt"] for each in images] == [
        "Patches kept by pruned: 64 of 576, of the first picture of r0",
        "Patches kept by baseline: 576 of 576, of the first picture of r0, r1",
        "Patches kept by pruned: 128 of 576, of the first picture of r1",
    ]
    source = images[0]["src"] or ""
    assert base64.b64decode(source.removeprefix("data:image/png;base64,")) == (tmp_path / "r0/kept.png").read_bytes()


def test_a_missing_picture_is_said_and_the_page_made(tmp_path: Path) -> None:
    page = _page(tmp_path, bench(64), pictures=False)
    assert page.all("img") == []
    assert f"No picture: kept.png of {tmp_path}/r0: it is not there." in page.text


def test_ids_are_unique_and_every_reference_has_its_target(tmp_path: Path) -> None:
    machine = {**MACHINE, "device": "another"}
    page = _page(tmp_path, bench(64, batches=(1, 2)), bench(128), bench(64, machine=machine))
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids)) > 10
    wanted = {name for _, attrs in page.tags for name in (attrs.get("aria-labelledby") or "").split()}
    wanted |= {(attrs["href"] or "")[1:] for attrs in page.all("a")}
    assert wanted
    assert wanted <= set(ids)


def test_groups_that_cannot_be_compared_say_so_and_by_what(tmp_path: Path) -> None:
    page = _page(tmp_path, bench(64), bench(128, machine={**MACHINE, "device": "Other CPU"}))
    assert "2 groups that cannot be compared." in page.text
    assert re.search(r"group device .*AMD EPYC 7B13 AMD EPYC 7B13 .*Other CPU Other CPU", page.text)
    one = _page(tmp_path / "one", bench(64))
    assert "cannot be compared" not in one.text


def test_mismatch_warnings_and_random_weights_are_loud(tmp_path: Path) -> None:
    marked = bench(
        64,
        mismatch=["precision is fp16, not fp32"],
        warnings=["a spread of 14%"],
        note="random weights, 2 of 32 layers",
    )
    page = _page(tmp_path, marked)
    classes = [attrs.get("class") or "" for _, attrs in page.tags]
    assert sum(name.startswith("loud mismatch") for name in classes) == 1
    assert sum(name.startswith("mind warnings") for name in classes) == 1
    assert sum(name.startswith("mind note") for name in classes) == 1
    for text in ("MISMATCH in", "precision is fp16, not fp32", "a spread of 14%", "random weights, 2 of 32 layers"):
        assert text in page.text
    plain = [attrs.get("class") or "" for _, attrs in _page(tmp_path / "plain", bench(64)).tags]
    assert not [name for name in plain if name.startswith(("loud", "mind"))]


def test_random_weights_without_a_note_are_marked_all_the_same(tmp_path: Path) -> None:
    page = _page(tmp_path, bench(64, weights="random"))
    assert "random weights (" in page.text


def test_a_run_without_a_baseline_says_how_to_get_a_speedup(tmp_path: Path) -> None:
    page = _page(tmp_path, bench(64, baseline=False))
    assert "No speed-up: it was measured without a baseline." in page.text
    assert "None: there is neither a baseline nor a peer." in page.text
    assert "\N{MULTIPLICATION SIGN} to" not in page.text


def test_a_wide_spread_is_marked_and_a_narrow_one_is_not(tmp_path: Path) -> None:
    document = copy.deepcopy(bench(64))
    document["pruned"]["batches"][0]["stages"]["vision"]["spread"] = 0.14
    assert _page(tmp_path, document).text.count("14% wide") == 1
    assert " wide " not in _page(tmp_path / "narrow", bench(64)).text


def test_an_interval_that_includes_one_is_no_speedup(tmp_path: Path) -> None:
    document = copy.deepcopy(bench(64))
    document["comparisons"][0]["ratios"]["total"] |= {"ratio": 1.1, "low": 0.9, "high": 1.3}
    assert "the interval includes 1" in _page(tmp_path, document).text
    assert "the interval includes 1" not in _page(tmp_path / "sure", bench(64)).text


def test_an_unknown_roof_is_said(tmp_path: Path) -> None:
    document = bench(64, machine={**MACHINE, "roof": None})
    assert "Not known: what this machine can do at best" in _page(tmp_path, document).text
    assert "share of the roofline" in _page(tmp_path / "known", bench(64)).text


def test_what_another_version_may_leave_out_is_a_dash(tmp_path: Path) -> None:
    document = copy.deepcopy(bench(64, peers=["peer"], settings={}))
    for subject in (document["pruned"], document["baseline"], *document["peers"]):
        for batch in subject["batches"]:
            batch |= {"flops": None, "bytes": None, "roofline_ms": None, "roofline_share": None, "device_ms": None}
            batch |= {"decode_tokens_per_s": None}
            batch["stages"] |= {"preprocess": None, "vision": None, "decode_per_token": None}
        for key in ("sha256", "directory", "selector", "schedule", "counts", "peak_memory_bytes", "kept"):
            subject[key] = None
    for each in document["comparisons"]:
        each["ratios"] = {"total": {**each["ratios"]["total"], "flop_ratio": None, "share_of_flop_ratio": None}}
    document["machine"] = {"device": "d", "kind": "cpu", "versions": {}}
    page = _page(tmp_path, document)
    assert page.open == []
    assert "FLOP limit not counted" in page.text
    assert "None" not in page.text
