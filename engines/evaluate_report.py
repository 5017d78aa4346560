"""An evaluation as a table for people. The line of JSON for programs is the command's."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engines.evaluate import Evaluation
from engines.evaluate_score import Score, by_kind, by_selector, overall


def evaluated(console: Console, result: Evaluation) -> None:
    """Accuracy per kind of question and overall, with 95% intervals."""
    subject, scenes = result.subject, len({answer.scene for answer in result.answers})
    inside = f", {subject.llm_tokens} inside the language model" if subject.llm_tokens else ""
    kept = f"{subject.model}: {subject.tokens} of {subject.patches} patches{inside}"
    console.print(Text(kept, "bold"), soft_wrap=True)
    console.print(
        f"selector {subject.selector}, schedule {subject.schedule}, {subject.backend} {subject.precision}; "
        f"{scenes} scene{'s' * (scenes != 1)} of the {result.split} split",
        soft_wrap=True,
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1), show_edge=False)
    for name in ("questions", "n", "right", "95% interval"):
        table.add_column(name, justify="left" if name == "questions" else "right")
    for kind, score in by_kind(result.answers).items():
        table.add_row(kind, *_cells(score))
    table.add_section()
    table.add_row("all", *_cells(overall(result.answers)), style="bold")
    console.print(table)
    seeds = by_selector(result.answers)
    if len(seeds) > 1:
        console.print("the mean of " + ", ".join(f"{name} {share:.1%}" for name, share in seeds.items()))
    if subject.note:
        console.print(f"{subject.note}: these numbers say nothing of the trained model.")


def _cells(score: Score) -> tuple[str, str, str]:
    low, high = score.interval
    return str(score.n), f"{score.accuracy:.1%}", f"{low:.1%} - {high:.1%}"
