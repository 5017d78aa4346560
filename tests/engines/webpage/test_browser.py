"""The page opened in a real browser: it loads nothing, says no errors, fits, can be read, and runs no script."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest
from bench_files import MACHINE, bench, write_bench

from engines.webpage.report import ReportSettings, write_report

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

HOSTILE = "<script>window.broken = 1</script><img src=http://127.0.0.1:9/x onerror=window.broken=2>"
TIMES = "\N{MULTIPLICATION SIGN}"
KNOWN = re.compile(r"accuracy|agreement|overlap|right \d|agree \d|not known")
CONTRAST = """
() => {
  const rgb = text => (text.match(/[\\d.]+/g) || []).map(Number);
  const part = v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = c => 0.2126 * part(c[0]) + 0.7152 * part(c[1]) + 0.0722 * part(c[2]);
  const behind = e => {
    for (; e; e = e.parentElement) {
      const c = rgb(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || c[3] > 0) return c;
    }
    return [255, 255, 255];
  };
  const found = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.data.trim());
    if (!own || e.closest("title, desc, style") || !e.getClientRects().length) continue;
    const svg = e instanceof SVGElement, style = getComputedStyle(e);
    const a = light(rgb(svg ? style.fill : style.color)), b = light(behind(e));
    found.push([(Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05), e.tagName + ": " + e.textContent.slice(0, 40)]);
  }
  return found;
}
"""


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    """Three budgets and peers of one machine, one of them marked with everything, and another machine with nothing."""
    peers = ["transformers-sdpa", "ort-unpruned"]
    gpu = {**MACHINE, "device": "NVIDIA H100 80GB HBM3", "kind": "gpu", "clocks_mhz": None, "roof": None}
    unknown = {"kept": None, "kept_reason": "torch is not installed", "baseline": None}
    marked = {"mismatch": ["precision is fp16, not fp32"], "warnings": ["vision: spread 14%"], "agreement": unknown}
    return [
        bench(64, peers=peers, accuracy=True),
        bench(128, accuracy=True),
        bench(192),
        bench(64, batches=(1, 4), machine=gpu, backend="rtx", weights="random", note="random weights", **marked),
    ]


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory, documents: list[dict[str, Any]]) -> Path:
    folder = tmp_path_factory.mktemp("page")
    places = [write_bench(folder / f"run{i}", each, pictures=i < 3) for i, each in enumerate(documents)]
    write_report(ReportSettings(tuple(places), folder / "page.html"))
    return folder / "page.html"


@contextmanager
def _opened(
    browser: Browser, file: Path, width: int = 1280, scheme: Literal["light", "dark"] = "light"
) -> Iterator[Page]:
    """The page; at the end, nothing but itself may have been asked for and nothing may have gone wrong."""
    asked: list[str] = []
    wrong: list[str] = []
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
    page = context.new_page()
    page.on("request", lambda request: asked.append(request.url))
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append(dialog.message))
    page.goto(file.as_uri(), wait_until="load")
    yield page
    assert [url for url in asked if not url.startswith("data:")] == [file.as_uri()]
    assert wrong == []
    context.close()


def test_it_opens_without_a_request_or_an_error_and_every_picture_is_there(browser: Browser, page_file: Path) -> None:
    with _opened(browser, page_file) as page:
        assert page.title().startswith("Prefill latency: llava-1.5-7b")
        widths = page.eval_on_selector_all("img", "all => all.map(each => each.naturalWidth)")
        assert widths == [612] * 4
        assert page.locator("svg.chart").count() == 6
        for box in page.locator("svg.chart").all():
            size = box.bounding_box()
            assert size is not None
            assert size["width"] > 200
            assert size["height"] > 100


def test_the_numbers_are_those_of_bench_json(
    browser: Browser, page_file: Path, documents: list[dict[str, Any]]
) -> None:
    with _opened(browser, page_file) as page:
        first = page.locator("section.group").first
        rows = first.locator("table.comparisons tr").filter(has=page.locator("td.speedup"))
        shown = [row.locator("td.speedup").inner_text() for row in rows.all()]
        ratios = [r for d in documents[:3] for c in d["comparisons"] for r in c["ratios"].values()]
        assert shown == [f"{ratio['ratio']:.2f}{TIMES}" for ratio in ratios]
        subjects = [s for d in documents for s in (d["pruned"], d["baseline"], *d["peers"])]
        order = ("preprocess", "vision", "prefill", "total", "decode_per_token")
        medians = [b["stages"][stage]["median"] for s in subjects for b in s["batches"] for stage in order]
        medians_shown = page.eval_on_selector_all(
            "table.measurements th.stage + td", "all => all.map(each => each.innerText)"
        )
        assert [float(text) for text in medians_shown] == pytest.approx(medians, rel=6e-3)
        shares = first.locator("table.roofline td.share").all_inner_texts()
        assert len(shares) == 6 * 3
        assert set(shares) == {"80%", "70%", "50%"}


def test_every_speedup_has_accuracy_or_agreement_beside_it(browser: Browser, page_file: Path) -> None:
    with _opened(browser, page_file) as page:
        beside = page.evaluate(
            """() => [...document.querySelectorAll(".speedup")].map(e => {
                const row = e.closest("tr"), body = e.closest("tbody");
                const cost = e.closest(".card")?.querySelector(".cost")
                    ?? row.querySelector(".cost") ?? body.querySelector(".cost");
                return [e.innerText, cost ? cost.innerText : ""];
            })"""
        )
        assert len(beside) > 60
        assert [speedup for speedup, cost in beside if not KNOWN.search(cost)] == []
        text = page.locator("body").inner_text()
        places = {e for e in re.findall(rf"\d\.\d\d{TIMES}", text)}
        assert {speedup for speedup, _ in beside} <= places
        assert "accuracy not known: the weights are random" in text
        assert "overlap of the kept patches not known: torch is not installed" in text
        notes = page.locator("svg.chart text.note").all_text_contents()
        assert notes == ["right 77.4%", "right 81.4%", "agree 75%"]
        said = page.eval_on_selector_all(".mark title", "all => all.map(each => each.textContent)")
        speedups = [title for title in said if TIMES in title]
        assert len(speedups) == 9 + 9 + 6
        assert [title for title in speedups if not KNOWN.search(title)] == []


@pytest.mark.parametrize("width", [1280, 768, 360])
def test_nothing_is_wider_than_the_window_and_tables_scroll_in_their_boxes(
    browser: Browser, page_file: Path, width: int
) -> None:
    with _opened(browser, page_file, width) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == width
        boxes = page.eval_on_selector_all(
            "table", "all => all.map(e => [!!e.closest('.scroll'), e.closest('.scroll').scrollWidth > innerWidth])"
        )
        assert all(inside for inside, _ in boxes)
        assert any(scrolls for _, scrolls in boxes) or width > 360
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement !== document.body")


def test_every_table_has_headers_and_every_scroll_box_a_name_and_the_keyboard(
    browser: Browser, page_file: Path
) -> None:
    with _opened(browser, page_file) as page:
        heads = page.eval_on_selector_all(
            "table", "all => all.map(e => [e.querySelectorAll('thead th[scope=col]').length, !!e.tHead])"
        )
        assert len(heads) > 10
        assert all(count > 1 and head for count, head in heads)
        assert page.locator("tbody tr").count() > 100
        assert page.locator("tbody tr:not(:has(th[scope]))").count() == 0
        boxes = page.locator(".scroll")
        assert boxes.count() == page.locator(".scroll[tabindex='0'][role=region][aria-label]").count()
        named = page.eval_on_selector_all(
            "svg[role=img]", "all => all.map(e => e.getAttribute('aria-label') || e.querySelector('title').textContent)"
        )
        assert all(named)
        levels = page.eval_on_selector_all("h1, h2, h3, h4", "all => all.map(e => +e.tagName[1])")
        assert levels.count(1) == 1
        assert all(after <= before + 1 for before, after in pairwise(levels))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_can_be_read_in_both_schemes(
    browser: Browser, page_file: Path, scheme: Literal["light", "dark"]
) -> None:
    with _opened(browser, page_file, scheme=scheme) as page:
        found = page.evaluate(CONTRAST)
        assert len(found) > 300
        assert {kind.split(":")[0] for _, kind in found} >= {"P", "TD", "TH", "text", "LI", "CODE", "PRE", "SPAN"}
        assert [each for each in found if each[0] < 4.5] == []
        paper = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (paper == "rgb(255, 255, 255)") == (scheme == "light")


def test_hostile_text_is_shown_and_no_script_runs(browser: Browser, tmp_path: Path) -> None:
    document = copy.deepcopy(bench(64))
    document |= {"command": HOSTILE, "model": HOSTILE, "note": HOSTILE, "warnings": [HOSTILE], "mismatch": [HOSTILE]}
    document["settings"] = {HOSTILE: HOSTILE}
    for subject in (document["pruned"], document["baseline"]):
        subject |= {"title": HOSTILE, "directory": HOSTILE, "selector": HOSTILE}
    place = write_bench(tmp_path / "<img src=x onerror=window.broken=3>.bench", document)
    write_report(ReportSettings((place,), tmp_path / "page.html"))
    with _opened(browser, tmp_path / "page.html") as page:
        page.wait_for_timeout(200)
        assert page.evaluate("window.broken") is None
        assert page.locator("script").count() == 0
        assert page.locator("img").count() == 2
        text = page.locator("body").inner_text()
        assert text.count(HOSTILE) >= 8
        assert "<img src=x onerror=window.broken=3>.bench" in text


def test_the_policy_stops_what_a_template_would_let_through(browser: Browser, page_file: Path, tmp_path: Path) -> None:
    broken = tmp_path / "page.html"
    text = page_file.read_text(encoding="utf-8")
    broken.write_text(text.replace("</body>", "<script>window.broken = 1</script></body>"), encoding="utf-8")
    context = browser.new_context(offline=True)
    page = context.new_page()
    page.goto(broken.as_uri())
    assert page.evaluate("window.broken") is None
    context.close()


def test_it_prints_in_light_colours_and_keeps_every_table_whole(browser: Browser, page_file: Path) -> None:
    with _opened(browser, page_file, scheme="dark") as page:
        page.emulate_media(media="print", color_scheme="dark")
        assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert page.eval_on_selector_all(
            ".scroll", "all => all.every(e => getComputedStyle(e).overflowX === 'visible')"
        )
        assert page.pdf(format="A4").startswith(b"%PDF")


def test_links_lead_to_their_groups(browser: Browser, page_file: Path) -> None:
    with _opened(browser, page_file) as page:
        links = page.locator("nav a")
        assert links.count() == 2
        links.nth(1).click()
        assert page.evaluate("document.querySelector(location.hash + ' h2').innerText") == links.nth(1).inner_text()
