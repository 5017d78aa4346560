"""What is planned: a model's geometry with its budgets, and the graphs that would be exported for each. No weights."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from engines.plan.costs import PAST, Cost, stored_bytes
from engines.plan.settings import AS_BUILT, PlanSettings
from engines.plan.stages import Lengths, first_token_costs, graph_costs
from flowcut.aliases import resolve
from flowcut.anyres import choose_tiling, image_slots, vision_feeds
from flowcut.artifacts import Manifest, read_manifest
from flowcut.budget import Budget, make_budget
from flowcut.checkpoint import Weights, random_weights
from flowcut.config import LlavaConfig, Precision
from flowcut.contract import GraphContract, Limits, itemsize, language_contracts, vision_contract
from flowcut.errors import ConfigError
from flowcut.integrity import MANIFEST
from flowcut.schedule import Schedule, check_fixed_shapes, make_schedule
from flowcut.selector import FLOWCUT
from flowcut.tensors import expected_tensors

if TYPE_CHECKING:
    import onnx_ir as ir


@dataclass(frozen=True)
class Row:
    """One budget: what it asks for.

    Attributes:
        asked: the number that --tokens gives.
        visual: tokens of one picture that enter the decoder.
        costs: by engines.plan.stages.STAGES.
        cache_bytes: KV cache of prompt and answer, rows in use.
        weight_bytes: of both graphs, as they are stored.
    """

    budget: Budget
    asked: int
    visual: int
    lengths: Lengths
    counts: tuple[int, ...]
    costs: dict[str, Cost]
    cache_bytes: int
    weight_bytes: int


@dataclass(frozen=True)
class Subject:
    """A model as it would be built, for one kind of prompt.

    Attributes:
        schedule: static, masked or a file's name; own: an engine directory's schedule, which its own budget takes.
        settings: what is asked of it.
    """

    name: str
    config: LlavaConfig
    note: str
    precision: Precision
    vision: Precision
    schedule: str
    selector: str | None
    stages: int
    settings: PlanSettings
    manifest: Manifest | None = None
    _rows: dict[Budget, Row] = field(default_factory=dict, compare=False, repr=False)
    _first: dict[Budget, dict[str, Cost]] = field(default_factory=dict, compare=False, repr=False)

    @cached_property
    def weights(self) -> Weights:
        """Drawn when a graph is saved, which none is."""
        return random_weights(self.config)

    @property
    def baseline(self) -> Budget:
        """Nothing is pruned."""
        return Budget(self.config.vision.patches)

    @property
    def tiles(self) -> int:
        """Images that the tower sees of one picture."""
        return choose_tiling(self.config, *self.settings.size).tiles if self.config.anyres else 1

    def budgets(self) -> list[Budget]:
        """Those asked for, without the baseline, in the order given."""
        if self.manifest is not None:
            asked = [self.manifest.budget]
        else:
            given = self.settings.tokens or (None,)
            own = (self.config, self.schedule, self.settings.llm_tokens)
            asked = [make_budget(own[0], tokens, own[1], own[2]) for tokens in given]
        return [budget for budget in dict.fromkeys(asked) if budget != self.baseline]

    def lengths(self, budget: Budget) -> tuple[int, Lengths]:
        """Visual tokens of one picture that enter the decoder, and the lengths of what is run."""
        visual, batch = budget.tokens, self.settings.batch
        if self.config.anyres:
            cut = choose_tiling(self.config, *self.settings.size)
            (visual,) = vision_feeds(self.config, budget.tokens, [cut]).rows
        prompt, kept = visual + self.settings.text_tokens, budget.llm_tokens
        pruned = None if kept is None else prompt - max(0, visual - kept)
        return visual, Lengths(batch, batch, batch * self.tiles, prompt, pruned)

    def graphs(self, budget: Budget) -> tuple[ir.Model, list[ir.Model], list[GraphContract]]:
        """Vision, the decoder's stages, and their contracts."""
        from export.language import language_model
        from export.vision import vision_model

        limits, config = self._limits(budget), self.config
        contract = vision_contract(config, budget.tokens, self.vision, limits, self.precision)
        schedule, ranges = self.schedule_of(budget), _ranges(config)
        vision = vision_model(self.weights, contract, schedule, self.vision, {}, ranges=ranges)
        kept = budget.llm_tokens
        contracts = language_contracts(config, budget.tokens, self.precision, limits, self.stages, kept)
        decoder = [language_model(self.weights, each, self.precision, {}, ranges) for each in contracts]
        return vision, decoder, list(contracts)

    def schedule_of(self, budget: Budget) -> Schedule:
        """The tower's."""
        if self.manifest is not None and budget == self.manifest.budget:
            return Schedule.from_dict(self.manifest.schedule)
        spec = "static" if budget == self.baseline else self.schedule
        schedule = make_schedule(spec, self.config.vision, budget.tokens, self.selector)
        check_fixed_shapes(schedule)
        return schedule

    def check(self, budget: Budget) -> None:
        """Raise what counting this budget would, but for graphs that cannot be made."""
        self.schedule_of(budget)
        self._limits(budget)

    def row(self, budget: Budget) -> Row:
        """Counted once, however often it is asked for."""
        if budget not in self._rows:
            self._rows[budget] = self._row(budget)
        return self._rows[budget]

    def first_token(self, budget: Budget) -> dict[str, Cost]:
        """Vision and prefill alone, likewise."""
        if budget in self._rows:
            return self._rows[budget].costs
        if budget not in self._first:
            vision, decoder, _ = self.graphs(budget)
            self._first[budget] = first_token_costs(vision, decoder, self.lengths(budget)[1])
        return self._first[budget]

    def _row(self, budget: Budget) -> Row:
        vision, decoder, contracts = self.graphs(budget)
        visual, lengths = self.lengths(budget)
        costs = graph_costs(vision, decoder, lengths)
        weights = sum(map(stored_bytes, (vision, *decoder)))
        counts, cache = self.schedule_of(budget).counts, cache_bytes(contracts, lengths, self.settings.new_tokens)
        return Row(budget, budget.asked(self.config), visual, lengths, counts, costs, cache, weights)

    def _limits(self, budget: Budget) -> Limits:
        """Of an engine for such prompts, with room for a picture as large as can be."""
        settings, slots = self.settings, image_slots(self.config, budget.tokens)
        batch = settings.batch
        prompt = slots + settings.text_tokens
        most = self.config.text.max_position_embeddings - slots - settings.new_tokens
        if settings.text_tokens > most:
            raise ConfigError(
                f"text_tokens must be at most {max(0, most)} ({self.config.text.max_position_embeddings} positions "
                f"less one picture's {slots} tokens and {settings.new_tokens} new ones), got {settings.text_tokens}."
            )
        return Limits(batch, batch, prompt, settings.new_tokens)


def find_subject(settings: PlanSettings) -> Subject:
    """The model or engine directory that the settings name.

    Raises:
        ConfigError: neither, or a setting that does not fit. EngineError: a directory's manifest cannot be used.
    """
    directory = Path(settings.model).expanduser()
    if settings.model and (directory / MANIFEST).is_file():
        return _built(settings, read_manifest(directory))
    full = resolve(settings.model, random=True)
    model = resolve(settings.model, random=True, decoder_layers=settings.decoder_layers)
    layers, whole = (each.config.text.num_hidden_layers for each in (model, full))
    precision: Precision = settings.precision or "fp16"
    schedule = settings.schedule or "static"
    if settings.target_ms is not None and schedule.endswith(".json"):
        raise ConfigError(
            f"schedule must be static or masked where target_ms is given, got {schedule!r}, which is for one budget."
        )
    return Subject(
        name=model.name,
        config=model.config,
        note=f"{layers} of {whole} decoder layers" if layers != whole else "",
        precision=precision,
        vision=settings.vision_precision or ("int8" if precision == "int4" else precision),
        schedule=schedule,
        selector=settings.selector,
        stages=1,
        settings=settings,
    )


def _built(settings: PlanSettings, manifest: Manifest) -> Subject:
    """What an engine directory was built as; other budgets of the same model take the closed form."""
    for name in AS_BUILT:
        if value := getattr(settings, name):
            raise ConfigError(
                f"{name} must be left out for an engine directory, which is planned as it was built, got {value!r}. "
                "Plan its model to try others."
            )
    limits = manifest.limits
    if settings.batch > limits.max_batch:
        raise ConfigError(f"batch must be in 1..{limits.max_batch} (the directory's), got {settings.batch}.")
    kind = manifest.schedule["kind"]
    subject = Subject(
        name=manifest.model,
        config=manifest.geometry,
        note=manifest.note,
        precision=manifest.precision,
        vision=manifest.vision_precision,
        schedule=kind if kind == "masked" else "static",
        selector=manifest.schedule.get("selector", FLOWCUT),
        stages=manifest.stages,
        settings=replace(settings, llm_tokens=None if manifest.geometry.anyres else manifest.llm_tokens),
        manifest=manifest,
    )
    _, lengths = subject.lengths(manifest.budget)
    if lengths.prompt > limits.max_prompt:
        most = limits.max_prompt - lengths.prompt + settings.text_tokens
        raise ConfigError(f"text_tokens must be in 1..{most} for this directory, got {settings.text_tokens}.")
    return subject


def cache_bytes(contracts: list[GraphContract], lengths: Lengths, new_tokens: int) -> int:
    """KV cache of prompts and answers: the rows that come into use."""
    total = 0
    for spec in (spec for contract in contracts for spec in contract.inputs if spec.name.startswith(PAST)):
        _, heads, _, size = spec.shape({"batch": lengths.batch})
        total += lengths.batch * heads * size * itemsize(spec.dtype) * (lengths.rows(spec.name) + new_tokens)
    return total


def _ranges(config: LlavaConfig) -> dict[str, float]:
    """For fp8: some range for the input of every layer. Its value is not counted."""
    suffix = ".weight"
    return {name.removesuffix(suffix): 1.0 for name in expected_tensors(config) if name.endswith(suffix)}
