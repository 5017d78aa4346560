"""What the package asks of TensorRT, by mypy against tensorrt-stubs (TensorRT 10.13).

In the package the module is a parameter, hence Any. Here copies of its files are read with the real thing in that
place: `trt` becomes the module tensorrt, and names that stand for one kind of object get that class.
"""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
FILES = (
    *("engines/compiler.py", "engines/profiles.py", "engines/listeners.py", "engines/sessions/trt_session.py"),
    *("engines/sessions/cuda_contexts.py", "engines/flow_score/plugin.py"),
)
CLASSES = {
    "builder": "Builder",
    "config": "IBuilderConfig",
    "context": "IExecutionContext",
    "engine": "ICudaEngine",
    "logger": "ILogger",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
}
# Where the stubs and the package differ, and why the package is right.
KNOWN = {
    '"num_compute_capabilities"': "TensorRT-RTX alone has it",
    '"set_compute_capability"': "TensorRT-RTX alone has it",
    '"create_runtime_cache"': "TensorRT-RTX alone has it",
    '"set_runtime_cache"': "TensorRT-RTX alone has it",
    '"cuda_graph_strategy"': "TensorRT-RTX alone has it",
    '"CudaGraphStrategy"': "TensorRT-RTX alone has it",
    '"get_aliased_input_tensor"': "newer than the stubs",
    'incompatible type "*tuple[tuple[int, ...]': "the bindings make Dims of a tuple; run with TensorRT-RTX",
    '"tuple" has incompatible type "Dims"': "the bindings' Dims can be iterated; run with TensorRT-RTX",
    'Signature of "write" incompatible': "the stub has (capsule, size), its own text and TensorRT-RTX (data)",
    'has no attribute "__signature__"': "no matter of TensorRT's",
}
# The stubs are no valid Python there ("in" as a parameter's name, say). None of these is used here.
BROKEN = {"add_scale_nd", "configure_plugin", "get_workspace_size", "on_shape_change"}
WRONG = {
    "tensorrt.BuilderFlag.TF33": 'no attribute "TF33"',
    "tensorrt.DataType.BFLOAT16": 'no attribute "BFLOAT16"',
    "tensorrt.Builder(tensorrt.Logger()).create_network('1')": "incompatible type",
    "tensorrt.Runtime(7)": "incompatible type",
}
FUTURE = "from __future__ import annotations\n"


class Concrete(ast.NodeTransformer):
    """`trt`, `session.trt` and the like -> the module; Any -> the class that CLASSES has for the name."""

    def visit_Name(self, node: ast.Name) -> ast.AST:
        return ast.Name("tensorrt", node.ctx) if node.id == "trt" and isinstance(node.ctx, ast.Load) else node

    def visit_Attribute(self, node: ast.Attribute) -> ast.AST:
        if node.attr in ("trt", "_trt") and isinstance(node.ctx, ast.Load):
            return ast.Name("tensorrt", node.ctx)
        return self.generic_visit(node)

    def visit_arg(self, node: ast.arg) -> ast.AST:
        node.annotation = self._class(node.arg, node.annotation)
        return node

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        if isinstance(node.target, ast.Name):
            node.annotation = self._class(node.target.id, node.annotation) or node.annotation
        return node

    def _class(self, name: str, annotation: ast.expr | None) -> ast.expr | None:
        if name in CLASSES and isinstance(annotation, ast.Name) and annotation.id == "Any":
            return ast.Constant(f"tensorrt.{CLASSES[name]}")
        return annotation


@pytest.fixture(scope="module")
def stubs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stubs where mypy takes them for sources: as installed they lack py.typed."""
    try:
        wheel = metadata.distribution("tensorrt-stubs")
    except metadata.PackageNotFoundError:
        pytest.skip("needs tensorrt-stubs, which `make setup` installs without its dependencies")
    directory = tmp_path_factory.mktemp("stubs")
    for file in wheel.files or ():
        if file.suffix == ".pyi":
            (directory / file.parent).mkdir(exist_ok=True)
            source, broken = mended(file.read_text(encoding="utf-8"))
            assert set(broken) <= BROKEN
            (directory / file).write_text(source, encoding="utf-8")
    return directory


def mended(source: str) -> tuple[str, list[str]]:
    """A stub that parses, and the methods whose parameters had to go for that."""
    # Its variable `bool`, a DataType, hides the type.
    source = re.sub(r"(-> |: |\[|\| )bool\b(?! *:)", r"\1builtins.bool", f"import builtins\n{source}")
    lines, broken = source.splitlines(), []
    while (at := _unreadable("\n".join(lines))) is not None:
        name = re.match(r"( +)def (\w+)\(", lines[at])
        assert name is not None, lines[at]
        broken.append(name[2])
        lines[at] = f"{name[1]}def {name[2]}(self, *_: typing.Any, **__: typing.Any) -> typing.Any:"
    return "\n".join(lines), broken


def _unreadable(source: str) -> int | None:
    """The first line that Python cannot read."""
    try:
        ast.parse(source)
    except SyntaxError as error:
        return (error.lineno or 1) - 1
    return None


@pytest.fixture(scope="module")
def said(stubs: Path) -> dict[str, list[str]]:
    """mypy's complaints by file: of the package's and of one that holds WRONG."""
    sources = {"wrong": "".join(f"{line}\n" for line in WRONG)}
    for name in FILES:
        tree = Concrete().visit(ast.parse((ROOT / name).read_text(encoding="utf-8").replace(FUTURE, "")))
        sources[name] = ast.unparse(ast.fix_missing_locations(tree))
    files = {f"checked_{i}.py": name for i, name in enumerate(sources)}
    for file, name in files.items():
        (stubs / file).write_text(f"{FUTURE}import tensorrt\n{sources[name]}", encoding="utf-8")
    options = ["--follow-imports=silent", "--ignore-missing-imports", "--no-site-packages", "--config-file="]
    command = [sys.executable, "-m", "mypy", *options, f"--cache-dir={stubs}/.cache", *files]
    environment = os.environ | {"MYPYPATH": str(stubs)}
    done = subprocess.run(command, cwd=stubs, env=environment, capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert "errors prevented further checking" not in done.stdout
    lines = [line.partition(":") for line in done.stdout.splitlines() if ": error: " in line]
    return {name: [rest for at, _, rest in lines if at == file] for file, name in files.items()}


@pytest.mark.parametrize("file", FILES)
def test_types_agree_with_the_stubs(said: dict[str, list[str]], file: str) -> None:
    assert [line for line in said[file] if not any(text in line for text in KNOWN)] == []


def test_every_known_difference_is_still_one(said: dict[str, list[str]]) -> None:
    lines = [line for file in FILES for line in said[file]]
    assert [text for text in KNOWN if not any(text in line for line in lines)] == []


@pytest.mark.parametrize("line", range(len(WRONG)), ids=list(WRONG))
def test_a_wrong_use_would_show(said: dict[str, list[str]], line: int) -> None:
    complaints = [each for each in said["wrong"] if each.startswith(f"{line + 3}: ")]
    assert any(list(WRONG.values())[line] in each for each in complaints), said["wrong"]


def test_the_stubs_do_not_cover_tensorrt_plugin(stubs: Path) -> None:
    """docs/plugin.md says so; test_plugin.py runs NVIDIA's code instead."""
    assert not list(stubs.rglob("plugin*"))
