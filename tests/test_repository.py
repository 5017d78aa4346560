"""The repository keeps the shape that CONTRIBUTING.md describes."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("flowcut", "export", "engines", "calib")
FOLDERS = {*PACKAGES, "tests", "docs", ".ci"}
FILES = {
    *(".gitignore", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "README.md", "pyproject.toml"),
}
# Modules that are torch code, or code that writes ONNX, and what they may import at the top.
TORCH_CODE = {f"flowcut.{name}" for name in ("language", "language_pruning", "loading", "packing", "pruner")}
TORCH_CODE |= {"flowcut.scoring", "flowcut.vision"}
TORCH_CODE |= {f"flowcut.tiny.{name}" for name in ("decoder", "decoder_lesson", "tower", "tower_lesson", "training")}
TORCH_CODE |= {f"calib.{name}" for name in ("awq", "inputs", "measure", "tower")}
TORCH_CODE |= {"engines.bench.peers_eager", "engines.bench.peers_run", "engines.bench.peers_transformers"}
TORCH_CODE |= {"engines.evaluate_one_by_one", "engines.evaluate_torch", "engines.prune_torch"}
MAY_NEED = {name: {"torch", "triton"} for name in TORCH_CODE}
ONNX_CODE = {f"export.{name}" for name in ("builder", "flow_score", "language", "language_pruning", "linear")}
ONNX_CODE |= {f"export.{name}" for name in ("packing", "pruning", "vision")}
MAY_NEED |= {name: {"onnx", "onnx_ir", "ml_dtypes"} for name in ONNX_CODE}
MAY_NEED |= {name: {"torch", "triton", "polygraphy"} for name in ("engines.reference", "engines.reference_next")}
MAY_NEED |= {"engines.flow_score.kernel": {"triton"}}
MAY_NEED |= {"flowcut.tiny.stages": {"torch", "triton", "safetensors"}}
OPTIONAL = (
    *("torch", "transformers", "triton", "safetensors", "ml_dtypes", "huggingface_hub"),
    *("onnx", "onnx_ir", "onnxruntime", "tensorrt", "tensorrt_rtx", "cuda", "polygraphy"),
)
IMPORT_ALL = """
import importlib, json, sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"{name} is blocked", name=name)

BLOCKED, modules = json.loads(sys.argv[1])
sys.meta_path.insert(0, Blocker())
failures = {}
for module in modules:
    try:
        importlib.import_module(module)
    except ImportError as error:
        failures[module] = str(error)
print(json.dumps(failures))
"""


def modules() -> list[str]:
    """Every module of the four packages, by its dotted name."""
    paths = (p.relative_to(ROOT).with_suffix("") for package in PACKAGES for p in (ROOT / package).rglob("*.py"))
    return sorted(".".join(p.parts).removesuffix(".__init__") for p in paths)


def import_failures(blocked: tuple[str, ...], names: list[str]) -> dict[str, str]:
    """Messages of the modules that cannot be imported, in a fresh process without `blocked`."""
    command = [sys.executable, "-c", IMPORT_ALL, json.dumps([blocked, names])]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    failures: dict[str, str] = json.loads(done.stdout)  # fails too if an import prints
    return failures


def test_importing_needs_only_the_base_dependencies() -> None:
    names = [name for name in modules() if name not in MAY_NEED]
    assert len(names) > 10
    assert import_failures(OPTIONAL, names) == {}


@pytest.mark.parametrize("needs", sorted({tuple(sorted(n)) for n in MAY_NEED.values()}), ids=",".join)
def test_some_modules_need_one_library_and_no_other(needs: tuple[str, ...]) -> None:
    names = sorted(name for name, libraries in MAY_NEED.items() if tuple(sorted(libraries)) == needs)
    assert set(modules()) >= set(names)
    assert import_failures(OPTIONAL, names).keys() == set(names), "needs none of them any more: take it off the list"
    assert import_failures(tuple(set(OPTIONAL) - set(needs)), names) == {}


def test_no_module_is_named_after_a_library() -> None:
    assert not {name.rpartition(".")[2] for name in modules()} & set(OPTIONAL)


def tracked_files() -> list[Path]:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [Path(line) for line in listing.splitlines()]


def test_top_level_is_the_stages_and_nothing_else() -> None:
    files = tracked_files()
    assert {f.parts[0] for f in files if len(f.parts) > 1} <= FOLDERS
    assert {f.name for f in files if len(f.parts) == 1} <= FILES
    assert all((ROOT / name).exists() for name in (*FOLDERS, *FILES))


@pytest.mark.parametrize("folder", PACKAGES)
def test_no_file_is_longer_than_one_can_hold_in_mind(folder: str) -> None:
    lengths = {p: len(p.read_text(encoding="utf-8").splitlines()) for p in (ROOT / folder).rglob("*.py")}
    assert lengths
    assert [f"{p.relative_to(ROOT)}: {n} lines" for p, n in lengths.items() if n >= 400] == []


def test_make_results_runs_every_script_that_writes_a_page() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    named = re.search(r"^EVERY_RESULT := (.*?[^\\])$", text, re.MULTILINE | re.DOTALL)
    assert named is not None
    scripts = {p.stem for p in (ROOT / "docs" / "results").glob("*.py") if "__main__" in p.read_text(encoding="utf-8")}
    assert set(named[1].replace("\\", " ").split()) == scripts


def test_every_package_is_shipped() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    folders = {p.parent for package in PACKAGES for p in (ROOT / package).rglob("*.py")}
    packages = sorted(".".join(folder.relative_to(ROOT).parts) for folder in folders)
    assert sorted(project["tool"]["setuptools"]["packages"]) == packages
    assert all((folder / "__init__.py").exists() for folder in folders)


def test_the_runtime_alone_does_not_pull_torch() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    for needs in (project["dependencies"], *(extras[name] for name in ("export", "cpu", "gpu", "rtx", "trt"))):
        assert not [need for need in needs if re.match(r"torch|transformers|flowcut-trt", need)]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_help_documents_every_variable_and_target() -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    printed = subprocess.run(["make", "-s"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    variables = re.findall(r"^([A-Z_]+) +=", text, re.MULTILINE)
    targets = re.search(r"^\.PHONY: help (.*)$", text, re.MULTILINE)
    assert targets is not None
    assert len(variables) == 22
    assert [v for v in variables if f"\n  {v}=" not in printed] == []
    assert [t for t in targets[1].split() if f"make {t}" not in printed] == []


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_engine_passes_every_variable_on() -> None:
    settings = ["MODEL=m", "WEIGHTS=random", "TOKENS=9", "SCHEDULE=s.json", "PRECISION=fp32", "BACKEND=ort"]
    settings += ["VISION_PRECISION=fp16", "STAGES=2", "CALIBRATION=a b", "LLM_TOKENS=5"]
    settings += ["SELECTOR=cls", "DECODER_LAYERS=3", "ARGS=--force", "IMAGE=a b", "QUESTION=what's"]
    command = ["make", "-n", "engine", *settings]
    outer = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}  # these tests may run under make
    printed = subprocess.run(command, cwd=ROOT, env=outer, capture_output=True, text=True, check=True).stdout
    recipe = " ".join(printed.partition("flowcut engine")[2].replace("\\\n", " ").split())
    assert recipe == (
        '"$FLOWCUT_MODEL" --tokens 9 --llm-tokens 5 --schedule "$FLOWCUT_SCHEDULE" '
        '--selector "$FLOWCUT_SELECTOR" --weights random '
        "--precision fp32 --backend ort --vision-precision fp16 --stages 2 "
        '${FLOWCUT_CALIBRATION:+--calibration "$FLOWCUT_CALIBRATION"} --decoder-layers 3 --out-root build --ask '
        '${FLOWCUT_IMAGE:+--image "$FLOWCUT_IMAGE"} '
        '${FLOWCUT_QUESTION:+--question "$FLOWCUT_QUESTION"} --force'
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_bench_builds_both_engines_alike_and_takes_those_that_are_there() -> None:
    settings = ["MODEL=m", "WEIGHTS=random", "TOKENS=9", "PRECISION=int4", "BACKEND=ort", "DECODER_LAYERS=3"]
    command = ["make", "-n", "bench", *settings, "ARGS=--max-batch 8", "BENCH=--batch 1,8", "IMAGE=a b"]
    outer = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
    printed = subprocess.run(command, cwd=ROOT, env=outer, capture_output=True, text=True, check=True).stdout
    builds = re.findall(r"flowcut engine (.*?) \| tee", " ".join(printed.replace("\\\n", " ").split()))
    pruned, baseline = (
        words.replace(' --schedule "$FLOWCUT_SCHEDULE" --selector "$FLOWCUT_SELECTOR"', "") for words in builds
    )
    assert baseline == pruned.replace("--tokens 9", "--tokens all")
    assert "--precision int4 --backend ort" in pruned
    assert pruned.endswith("--decoder-layers 3 --out-root build --max-batch 8")
    assert "pruned=${FLOWCUT_PRUNED:-$(" in printed
    assert "baseline=${FLOWCUT_BASELINE:-$(" in printed
    assert '--baseline "$baseline" ${FLOWCUT_IMAGE:+--image "$FLOWCUT_IMAGE"}' in printed
    assert printed.rstrip().endswith("--batch 1,8")


def test_ci_runs_the_documented_commands() -> None:
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & 0o111
    assert script.read_text(encoding="utf-8").splitlines()[-2:] == ["make test", "make test-long"]
