"""How many patches each pruning point keeps: docs/algorithm.md 2 and 3 as plain arithmetic.

Four kinds, one code path in the modules that use them:

- `off`       nothing is pruned;
- `adaptive`  the count follows from the data, one image at a time (eager PyTorch only);
- `static`    constants, so every shape is fixed;
- `masked`    constants bound the shapes, the count within them follows from the data on the device.

Which patches they are is the selector's choice (flowcut/selector.py). A one-shot selector has one pruning point, which
leaves exactly T, so `static` is its only kind.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

from flowcut.checkpoint import Weights
from flowcut.config import VisionConfig, is_integer
from flowcut.errors import ConfigError
from flowcut.fingerprint import vision_sha256
from flowcut.selector import FLOWCUT
from flowcut.selector import selector as find_selector

Kind = Literal["off", "adaptive", "static", "masked"]
ENTROPY_RATIO = 0.9
"""The entropy ratio that the closed form assumes where no calibration was done."""
DEFAULT_SHARE = 64 / 576
"""Share of the patches kept by default: the paper's 64 of LLaVA-1.5's 576."""
CALIBRATION = "calibration"
"""The key under which a schedule file may say what it was calibrated on."""


def pruning_points(layers: int) -> list[int]:
    """Layers after which patches are dropped: those with an even number of layers left before hidden state -2."""
    select = layers - 2
    return [i for i in range(select) if (select - i - 1) % 2 == 0]


def layers_left(layers: int, layer: int) -> int:
    """`left` of docs/algorithm.md 2: layers between this one and the last that feeds hidden state -2."""
    return layers - 2 - layer - 1


def drop_count(patches: int, tokens: int, left: int, entropy_ratio: float) -> int:
    """Patches the adaptive rule drops: round_half_even((N - T) / sqrt(left) * (1 - e^2)).

    Args:
        patches: N, patches still present.
        tokens: T, patches wanted at the end.
        left: layers left; at 0 all surplus goes.
        entropy_ratio: e, entropy of the layer's CLS attention over ln N.
    """
    if left == 0:
        return patches - tokens
    if patches <= 1:
        return 0
    return min(round((patches - tokens) / math.sqrt(left) * (1 - entropy_ratio**2)), patches - tokens)


def closed_form(vision: VisionConfig, tokens: int, entropy_ratio: float = ENTROPY_RATIO) -> tuple[int, ...]:
    """Kept counts per pruning point when every layer's entropy ratio is taken to be the same."""
    counts, patches = [], vision.patches
    for layer in pruning_points(vision.num_hidden_layers):
        patches -= drop_count(patches, tokens, layers_left(vision.num_hidden_layers, layer), entropy_ratio)
        counts.append(patches)
    return tuple(counts)


@dataclass(frozen=True)
class Schedule:
    """What the pruner does, fixed before any image is seen.

    Attributes:
        kind: see the module's docstring.
        patches: patches of one image, N at layer 0.
        tokens: patches kept in the end, T.
        counts: per pruning point the patches kept (`static`) or the capacity (`masked`); empty otherwise.
        selector: name of what chooses the patches.
    """

    kind: Kind
    patches: int
    tokens: int
    counts: tuple[int, ...] = ()
    selector: str = FLOWCUT

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ConfigError(f"schedule.kind must be one of {', '.join(get_args(Kind))}, got {self.kind!r}.")
        one_shot = find_selector(self.selector).one_shot
        check_tokens(self.tokens, self.patches)
        if (self.kind == "off") != (self.tokens == self.patches):
            raise ConfigError(
                f"schedule.kind must be 'off' exactly when tokens equals patches, got kind={self.kind!r}, "
                f"tokens={self.tokens}, patches={self.patches}."
            )
        if one_shot and self.kind not in ("off", "static"):
            raise ConfigError(
                f"schedule must be static with the selector {self.selector}, which chooses once, after the last layer, "
                f"and always as many as tokens says, got {self.kind!r}. Ask for static, or for another selector."
            )
        if (self.kind in ("static", "masked")) != bool(self.counts):
            raise ConfigError(f"schedule.counts must be given for static and masked only, got {self.counts!r}.")
        if self.counts:
            steps = (self.patches, *self.counts)
            falling = all(a >= b for a, b in pairwise(steps))
            if not falling or self.counts[-1] != self.tokens:
                raise ConfigError(
                    f"schedule.counts must fall from at most {self.patches} to exactly {self.tokens} (tokens), "
                    f"got {list(self.counts)}."
                )
            if one_shot and len(self.counts) > 1:
                raise ConfigError(
                    f"schedule.counts must be [{self.tokens}] with the selector {self.selector}, which has one pruning "
                    f"point, got {list(self.counts)}."
                )

    def points(self, layers: int) -> list[int]:
        """Layers of a tower of `layers` after which patches are dropped; `counts` has one number for each."""
        return [layers - 2] if find_selector(self.selector).one_shot else pruning_points(layers)

    def scored_layers(self, layers: int) -> Sequence[int]:
        """Layers whose score the selector reads while there are more than `tokens` patches."""
        points = self.points(layers)
        return range(points[-1] + 1) if find_selector(self.selector).history else points

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "counts": list(self.counts)}

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Schedule:
        """Inverse of `to_dict`; unknown or missing keys are errors, but older files have no selector.

        What a file says under "calibration" is its origin and not part of the schedule.
        """
        expected, optional = {"kind", "patches", "tokens", "counts"}, {"selector", CALIBRATION}
        if not isinstance(data, Mapping) or set(data) - optional != expected:
            got = sorted(data) if isinstance(data, Mapping) else type(data).__name__
            raise ConfigError(
                f"schedule must have the keys {sorted(expected)} and may have {' and '.join(sorted(optional))}, "
                f"got {got}."
            )
        counts = data["counts"]
        numbers = [data["patches"], data["tokens"], *(counts if isinstance(counts, (list, tuple)) else [None])]
        if not all(is_integer(n) for n in numbers):
            raise ConfigError(f"schedule.patches, tokens and counts must be integers, got {dict(data)!r}.")
        chosen = find_selector(data.get("selector", FLOWCUT)).name
        return Schedule(data["kind"], data["patches"], data["tokens"], tuple(counts), chosen)


def default_tokens(patches: int) -> int:
    """11.1% of the patches."""
    return max(1, round(patches * DEFAULT_SHARE))


def file_tokens(spec: str) -> int | None:
    """Patches kept according to a schedule file; None for a name, or for a file that make_schedule will refuse."""
    if not spec.endswith(".json"):
        return None
    with suppress(OSError, ValueError, TypeError, KeyError):
        tokens = json.loads(Path(spec).read_text(encoding="utf-8"))["tokens"]
        return tokens if is_integer(tokens) else None
    return None


def default_schedule(selector: str | None, backend: str) -> str:
    """adaptive in torch; masked, which keeps the same patches, on ONNX Runtime; static where there is no other."""
    if selector is not None and find_selector(selector).one_shot:
        return "static"
    return "masked" if backend == "ort" else "adaptive"


def check_tokens(tokens: int, patches: int) -> None:
    """Raise ConfigError unless 1 <= tokens <= patches."""
    if not is_integer(tokens) or not 1 <= tokens <= patches:
        raise ConfigError(f"tokens must be in 1..{patches} (the patches of one image) or 'all', got {tokens!r}.")


def check_fixed_shapes(schedule: Schedule) -> None:
    """Raise ConfigError for a schedule that no graph can hold, before any weight is read."""
    if schedule.kind == "adaptive":
        raise ConfigError(
            "schedule must be static, masked or a .json file where a graph is exported, got 'adaptive': its lengths "
            "depend on the picture. masked keeps the same patches."
        )


def make_schedule(
    spec: str, vision: VisionConfig, tokens: int, selector: str | None = None, weights: Weights | None = None
) -> Schedule:
    """The schedule for a name (`adaptive`, `static`, `masked`) or a schedule .json file.

    Bare `static` takes the closed form; bare `masked` has full capacity. With tokens = patches it is always `off`.

    Args:
        selector: None: what the file says, and flowcut where there is none.
        weights: a calibrated file is refused if it was made for another tower than theirs; read only for such a file.

    Raises:
        ConfigError: unknown name, unreadable file, or a file for another geometry, budget, selector or checkpoint.
    """
    check_tokens(tokens, vision.patches)
    if spec.endswith(".json"):
        return _load(Path(spec), vision, tokens, selector, weights)
    if spec not in ("adaptive", "static", "masked"):
        raise ConfigError(f"schedule must be adaptive, static, masked or a .json file, got {spec!r}.")
    chosen, patches = find_selector(FLOWCUT if selector is None else selector), vision.patches
    if tokens == patches:
        return Schedule("off", patches, tokens, (), chosen.name)
    if spec == "static":
        counts = (tokens,) if chosen.one_shot else closed_form(vision, tokens)
        return Schedule("static", patches, tokens, counts, chosen.name)
    if spec == "masked":
        full = (patches,) * (len(pruning_points(vision.num_hidden_layers)) - 1)
        return Schedule("masked", patches, tokens, (*full, tokens), chosen.name)
    return Schedule("adaptive", patches, tokens, (), chosen.name)


def _load(path: Path, vision: VisionConfig, tokens: int, selector: str | None, weights: Weights | None) -> Schedule:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"schedule {path} must be a readable JSON file, got: {error}.") from None
    schedule = Schedule.from_dict(data)
    wanted: dict[str, int | str] = {
        "patches": vision.patches,
        "tokens": tokens,
        "pruning points": len(schedule.points(vision.num_hidden_layers)),
    }
    got: dict[str, int | str] = {
        "patches": schedule.patches,
        "tokens": schedule.tokens,
        "pruning points": len(schedule.counts),
    }
    if not schedule.counts:
        del wanted["pruning points"], got["pruning points"]
    if selector is not None:
        wanted["selector"], got["selector"] = find_selector(selector).name, schedule.selector
    if wanted != got:
        ours, theirs = ({name: side[name] for name in wanted if wanted[name] != got[name]} for side in (wanted, got))
        raise ConfigError(
            f"schedule {path} must be made for {ours}, got {theirs}. Choose another file, --tokens (of LLaVA-NeXT "
            "twice the file's, which are a tile's) or --selector."
        )
    if CALIBRATION in data:
        _check_origin(path, data[CALIBRATION], vision, weights)
    return schedule


def _check_origin(path: Path, origin: object, vision: VisionConfig, weights: Weights | None) -> None:
    """Raise ConfigError for a file that was calibrated on a tower of another geometry or with other weights."""
    geometry = origin.get("geometry") if isinstance(origin, Mapping) else None
    made_for = origin.get("vision_sha256") if isinstance(origin, Mapping) else None
    if not isinstance(geometry, Mapping) or not isinstance(made_for, str):
        raise ConfigError(
            f"schedule {path} must say geometry and vision_sha256 in its calibration, as `flowcut calibrate schedule` "
            "wrote them. Make it again, or take the calibration out."
        )
    ours = asdict(vision)
    differing = [name for name in sorted(ours.keys() | geometry.keys()) if ours.get(name) != geometry.get(name)]
    if differing:
        wanted, got = ({name: side.get(name) for name in differing} for side in (ours, geometry))
        raise ConfigError(f"schedule {path} must be made for {wanted}, got {got}. Calibrate this checkpoint.")
    if weights is not None and (own := vision_sha256(weights)) != made_for:
        raise ConfigError(
            f"schedule {path} must be made for this checkpoint, whose vision tower has the sha256 {own[:12]}, got one "
            f"for {made_for[:12]}. Calibrate this checkpoint, or name the one that it was calibrated on."
        )
