"""What is imported before a user sees anything: nothing heavy. Seconds are in docs/results/runtime_overhead.md."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_engine import TinyEngine, write_engine

ROOT = Path(__file__).parent.parent.parent
NEEDED = {"numpy", "PIL", "tokenizers", "onnxruntime"}
REPORT = """
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules} - before - sys.stdlib_module_names)))
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyEngine:
    return write_engine(tmp_path_factory.mktemp("start") / "engine")


def imported(code: str, *arguments: str) -> set[str]:
    """Packages, other than Python's own, that a fresh process has imported for `code`."""
    script = 'import json, sys\nbefore = {name.partition(".")[0] for name in sys.modules}\n' + code + REPORT
    command = [sys.executable, "-c", script, *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["run", "--help"], ["engine", "--help"], ["nonsense"]]
)
def test_help_and_refusals_import_nothing_but_the_grammar(arguments: list[str]) -> None:
    code = f"from flowcut.cli import main\ntry:\n    main({arguments})\nexcept SystemExit:\n    pass\n"
    assert imported(code) == {"flowcut"}


def test_loading_and_answering_import_what_they_need_and_nothing_else(tiny: TinyEngine) -> None:
    code = (
        "from engines.runtime.engine import Sampling, load_engine\n"
        'engine = load_engine(sys.argv[1], "ort", threads=1)\n'
        'engine.generate([], "What is it?", Sampling(max_new_tokens=2))\n'
    )
    assert imported(code, str(tiny.directory)) == NEEDED | {"flowcut", "engines"}
