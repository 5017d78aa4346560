"""Our counts beside the paper's TFLOPs, and which way of counting the two have in common.

The paper (FlowCut, arXiv 2505.19536) gives a pair for each model, not how it was counted. So ways of counting are
tried: with and without vision, with logits of the last position or of every one, with attention over all pairs of the
prompt or causal; always products alone, two operations for a multiply-add. What each piece takes is counted from the
graphs; `Pieces` puts them together for any length, which the graph of that length counts to as well (a test says so).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from rich.progress import Progress

from engines.flops import count_model
from engines.plan.settings import PlanSettings
from engines.plan.subject import Subject, find_subject
from flowcut.aliases import resolve
from flowcut.anyres import choose_tiling, vision_feeds
from flowcut.budget import PRUNE_LAYER, Budget, make_budget
from flowcut.config import LlavaConfig

SOURCE = "FlowCut, arXiv 2505.19536"
TERA = 1e12
HALF_UNIT = 0.005
"""TFLOPs: the figures have two decimals."""
PICTURES = ((672, 672), (640, 480), (640, 427), (1024, 576), (480, 640), (427, 640), (336, 336))
"""Width and height of common pictures: a square, photographs of 4:3, 3:2 and 16:9, upright ones, and a small square."""
MOST_TEXT, MOST_VISUAL = 400, 2928


@dataclass(frozen=True)
class Published:
    """TFLOPs with all `visual` tokens and with `tokens` of them."""

    tokens: int
    visual: int
    before: float
    after: float


PUBLISHED = {
    "llava-1.5-7b": Published(64, 576, 8.82, 1.95),
    "llava-v1.6-vicuna-7b": Published(160, 2880, 31.03, 4.29),
}
FIRST, NEXT = PUBLISHED


@dataclass(frozen=True)
class Way:
    """One way of counting."""

    vision: bool
    every_logit: bool
    causal: bool

    def to_dict(self) -> dict[str, Any]:
        return {
            "vision": self.vision,
            "logits": "every position" if self.every_logit else "last position",
            "attention": "causal" if self.causal else "all pairs",
        }


WAYS = tuple(Way(*flags) for flags in product((False, True), repeat=3))


@dataclass(frozen=True)
class Pieces:
    """Operations of products, counted from graphs.

    Attributes:
        layer: of one decoder layer's linear products for one position. head: logits of one position.
        pair: of one layer's attention for one query and key.
        vision: of one picture, unpruned and pruned.
    """

    layers: int
    layer: int
    head: int
    pair: int
    vision: tuple[int, int]

    def total(self, way: Way, early: int, late: int, pruned: bool) -> int:
        """Of `early` positions in the layers up to PRUNE_LAYER, `late` in the others and at the head."""
        first = PRUNE_LAYER + 1
        layers = first * self._layer(early, way) + (self.layers - first) * self._layer(late, way)
        return layers + self.head * (late if way.every_logit else 1) + self.vision[pruned] * way.vision

    def length(self, way: Way, tflops: float, pruned: bool) -> int:
        """The number of positions, the same in all layers, that comes nearest."""
        low, high = 1, 2 * MOST_VISUAL
        while low < high:
            middle = (low + high) // 2
            low, high = (middle + 1, high) if self.total(way, middle, middle, pruned) < tflops * TERA else (low, middle)
        return min((low - 1, low), key=lambda n: abs(self.total(way, n, n, pruned) - tflops * TERA))

    def _layer(self, positions: int, way: Way) -> int:
        pairs = positions * (positions + 1) // 2 if way.causal else positions * positions
        return positions * self.layer + pairs * self.pair


def count_pieces(subject: Subject, budget: Budget) -> Pieces:
    """From the unpruned decoder's graph at one length, and the tower's two."""
    _, decoder, _ = subject.graphs(subject.baseline)
    rows, text = 64, subject.config.text
    (graph,) = decoder
    found = count_model(graph, {"batch": 1, "images": 1, "sequence": rows}, causal=True).by_group
    one = count_model(graph, {"batch": 1, "images": 1, "sequence": 1}).by_group["linear"]
    layer, layers = (found["linear"] - one) // (rows - 1), text.num_hidden_layers
    pair = found["attention"] // (rows * (rows + 1) // 2) // layers
    towers = (subject.row(each).costs["vision"].by_group for each in (subject.baseline, budget))
    before, after = (tower["linear"] + tower["attention"] for tower in towers)
    return Pieces(layers, layer // layers, one - layer, pair, (before, after))


@dataclass(frozen=True)
class Fit:
    """A way of counting against LLaVA-1.5's pair, with the text tokens that suit it best. TFLOPs."""

    way: Way
    text_tokens: int
    before: float
    after: float

    @property
    def off(self) -> float:
        """The greater of both differences."""
        published = PUBLISHED[FIRST]
        return max(abs(self.before - published.before), abs(self.after - published.after))

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.way.to_dict(),
            "text_tokens": self.text_tokens,
            "before_tflops": self.before,
            "after_tflops": self.after,
            "off_tflops": self.off,
            "within_rounding": self.off <= HALF_UNIT,
        }


def fit(pieces: Pieces, way: Way) -> Fit:
    """LLaVA-1.5: the text tokens at which the greater difference is least."""
    p = PUBLISHED[FIRST]

    def tried(text: int) -> Fit:
        sizes = ((p.visual + text, False), (p.tokens + text, True))
        before, after = (pieces.total(way, n, n, pruned) / TERA for n, pruned in sizes)
        return Fit(way, text, before, after)

    return min(map(tried, range(1, MOST_TEXT)), key=lambda found: found.off)


@dataclass(frozen=True)
class Comparison:
    """What stands beside a published pair; docs/plan.md says what each key is. `best` is what fits LLaVA-1.5's."""

    model: str
    implied: dict[str, float]
    counted: dict[str, float]
    best: Fit
    ways: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    pictures: list[dict[str, Any]]

    def to_dict(self) -> dict[str, Any]:
        published = PUBLISHED[self.model]
        return {
            "source": SOURCE,
            **asdict(published),
            "half_unit_tflops": HALF_UNIT,
            "implied": self.implied,
            "counted": self.counted,
            "best": self.best.to_dict(),
            "ways": self.ways,
            "steps": self.steps,
            "pictures": self.pictures,
        }


def published_name(config: LlavaConfig) -> str | None:
    """The published model of this geometry, whole; None for any other."""
    shape = (config.vision, config.text, config.grid_pinpoints)
    for name in PUBLISHED:
        own = resolve(name, random=True).config
        if shape == (own.vision, own.text, own.grid_pinpoints):
            return name
    return None


def compare(subject: Subject, progress: Progress) -> Comparison | None:
    """Of a published model, whatever was asked about it; None for others."""
    name = published_name(subject.config)
    if name is None:
        return None
    task = progress.add_task("counting beside published figures", total=len(dict.fromkeys((FIRST, name))) + 1)
    found = {}
    for model in dict.fromkeys((FIRST, name)):
        one = find_subject(PlanSettings(model))
        found[model] = one, count_pieces(one, make_budget(one.config, PUBLISHED[model].tokens))
        progress.advance(task)
    fits = [fit(found[FIRST][1], way) for way in WAYS]
    best = min(fits, key=lambda each: each.off)
    one, pieces = found[name]
    ways = [each.to_dict() for each in fits] if name == FIRST else [_next_way(one, pieces, each) for each in fits]
    steps = _steps(one, pieces, best, PUBLISHED[name])
    pictures = [] if name == FIRST else [_picture(one.config, pieces, best, size) for size in PICTURES]
    progress.remove_task(task)
    return Comparison(name, _implied(PUBLISHED[name]), _counted(pieces, PUBLISHED[name]), best, ways, steps, pictures)


def _implied(published: Published) -> dict[str, float]:
    """What a pair says of itself, were each token to cost the same: (visual + text) x each = before."""
    each = (published.before - published.after) * TERA / (published.visual - published.tokens)
    text = published.before * TERA / each - published.visual
    return {"flops_per_token": each, "weights": each / 2, "text_tokens": text}


def _counted(pieces: Pieces, published: Published) -> dict[str, float]:
    weights = pieces.layer * pieces.layers / 2
    return {
        "layer_weights": weights,
        "head_weights": pieces.head / 2,
        "layers_for_visual_tflops": 2 * weights * published.visual / TERA,
        "vision_before_tflops": pieces.vision[0] / TERA,
        "vision_after_tflops": pieces.vision[1] / TERA,
    }


def _two_stage(subject: Subject, text: int) -> tuple[int, int]:
    """Positions before and behind the decoder's pruning, of the picture that the subject is about."""
    budget = make_budget(subject.config, PUBLISHED[NEXT].tokens)
    other = replace(subject, settings=replace(subject.settings, text_tokens=text))
    _, lengths = other.lengths(budget)
    return lengths.prompt, lengths.prompt if lengths.pruned is None else lengths.pruned


def _next_way(subject: Subject, pieces: Pieces, fitted: Fit) -> dict[str, Any]:
    """LLaVA-NeXT: the lengths that a way of counting makes of the pair, first with LLaVA-1.5's text tokens, then with
    those at which our pruning in two stages comes nearest."""
    p, way, text = PUBLISHED[NEXT], fitted.way, fitted.text_tokens
    before = pieces.length(way, p.before, pruned=False)

    def after(tokens: int) -> float:
        return pieces.total(way, *_two_stage(subject, tokens), True) / TERA

    own = min(range(1, MOST_TEXT), key=lambda tokens: abs(after(tokens) - p.after))
    return {
        **way.to_dict(),
        "text_tokens": text,
        "visual_before": before - text,
        "visual_after": pieces.length(way, p.after, pruned=True) - text,
        "two_stage_tflops": after(text),
        "two_stage_off_tflops": after(text) - p.after,
        "two_stage_text_tokens": own,
        "two_stage_visual_before": before - own,
    }


def _picture(config: LlavaConfig, pieces: Pieces, best: Fit, size: tuple[int, int]) -> dict[str, Any]:
    """One picture's visual tokens, and its language model's TFLOPs in the way that fits LLaVA-1.5 best."""
    cut, text = choose_tiling(config, *size), best.text_tokens
    budget = make_budget(config, PUBLISHED[NEXT].tokens)
    (whole,), (left,) = (vision_feeds(config, n, [cut]).rows for n in (config.vision.patches, budget.tokens))
    late = min(left, budget.llm_tokens or left)
    way = replace(best.way, vision=False)
    return {
        "picture": list(size),
        "tiles": cut.tiles,
        "visual_before": whole,
        "visual_after": [left, late],
        "before_tflops": pieces.total(way, whole + text, whole + text, False) / TERA,
        "after_tflops": pieces.total(way, left + text, late + text, True) / TERA,
    }


def _steps(subject: Subject, pieces: Pieces, best: Fit, published: Published) -> list[dict[str, Any]]:
    """From what `flowcut plan` counts to what was published, one change at a time, each before and after pruning."""
    budgets = (subject.baseline, make_budget(subject.config, published.tokens))
    rows = [subject.row(budget) for budget in budgets]
    costs = [(row.costs["vision"], row.costs["prefill"]) for row in rows]
    steps = [
        ("as counted here", [vision.flops + prefill.flops for vision, prefill in costs]),
        ("products alone", [_products(vision.by_group) + _products(prefill.by_group) for vision, prefill in costs]),
    ]

    def positions(text: int) -> list[tuple[int, int]]:
        other = replace(subject, settings=replace(subject.settings, text_tokens=text))
        found = [other.lengths(budget)[1] for budget in budgets]
        return [(each.prompt, each.pruned or each.prompt) for each in found]

    def add(change: str, way: Way, lengths: Sequence[tuple[int, int]]) -> None:
        steps.append((change, [pieces.total(way, *each, bool(i)) for i, each in enumerate(lengths)]))

    own, way, text = positions(subject.settings.text_tokens), Way(True, False, False), best.text_tokens
    add("attention over the prompt's rows, not the cache's", way, own)
    for name in ("vision", "every_logit", "causal"):
        if getattr(way, name) != getattr(best.way, name):
            way = replace(way, **{name: getattr(best.way, name)})
            add(_CHANGES[name][getattr(way, name)], way, own)
    add(f"{text} text tokens, not {subject.settings.text_tokens}", way, positions(text))
    if subject.config.anyres:
        before = pieces.length(best.way, published.before, pruned=False)
        (_, after), lengths = positions(text), (before, before)
        add(f"unpruned, {before - text} visual tokens", way, [lengths, after])
    return [{"change": change, "before_tflops": a / TERA, "after_tflops": b / TERA} for change, (a, b) in steps]


_CHANGES = {
    "vision": {False: "without vision", True: "with vision"},
    "every_logit": {False: "logits of the last position", True: "logits of every position"},
    "causal": {False: "attention over all pairs", True: "causal attention"},
}


def _products(groups: Any) -> int:
    return int(groups["linear"] + groups["attention"])
