"""Triton kernels compiled to PTX, for a GPU that need not be here. Compiling needs triton, importing this does not.

A child process compiles: in this one the kernels may be there already as Triton's interpreter wants them, and Triton
takes settings from the environment, where they would change what is compiled.
    python -m engines.flow_score.compile       # the child: jobs as lines of JSON on stdin, kernels as such on stdout
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from engines.flow_score.launch import INPUTS, INTEGERS, OUTPUTS, Variant
from flowcut.deps import available, require
from flowcut.errors import EngineError

TARGETS = (80, 86, 89, 90, 100, 120)
"""Compute capabilities without the dot. PTX for one runs on it and on every later GPU."""
# For sm_100 Triton takes maxima by redux.f32, an instruction of that very GPU. Else it compiles the same for sm_120.
COMPILED_AS = {100: 120}
FORMAT = 1
"""To be raised when this file makes other PTX of the same kernel, so that what was kept before is not used."""
# PTX 8.7 is the oldest that names all targets: drivers R570 and later take it. Fused multiply-add is Triton's default.
OPTIONS = {"ptx_version": 87, "enable_fp_fusion": True}
_FOREIGN = re.compile(r"TRITON_|NVPTX_|MLIR_|LLVM_|PTXAS_|DISABLE_PTXAS_|USE_IR_LOC")  # Triton's settings
_USAGE = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores.*Used (\d+) registers", re.DOTALL)
_ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class CompiledKernel:
    """One kernel's PTX and what a launch must know.

    Attributes:
        sm: the target, 80 for sm_80.
        entry: the function's name in the PTX.
        threads: per block.
        shared_bytes: dynamic shared memory per block.
        registers: per thread, as ptxas for `sm` uses them.
        spills: bytes per thread that did not fit into registers, stack included.
        triton: the version that compiled it.
        seconds: compiling took; 0 where it was read.
    """

    variant: Variant
    sm: int
    entry: str
    ptx: str
    threads: int
    shared_bytes: int
    registers: int
    spills: int
    triton: str
    seconds: float = 0.0

    def facts(self) -> dict[str, Any]:
        """All but the PTX and the seconds, for JSON."""
        facts = asdict(self)
        del facts["ptx"], facts["seconds"]
        return facts

    @classmethod
    def of(cls, facts: dict[str, Any], ptx: str, seconds: float = 0.0) -> CompiledKernel:
        """What `facts` returned, with its PTX."""
        return cls(**{**facts, "variant": Variant(**facts["variant"])}, ptx=ptx, seconds=seconds)


Job = tuple[Variant, int]


def check_target(sm: int) -> int:
    """`sm`, or EngineError if kernels are not compiled for it."""
    if sm not in TARGETS:
        raise EngineError(
            f"target must be one of {', '.join(map(str, TARGETS))}, got {sm!r}. Older GPUs have no kernels; one in "
            "between runs the PTX of the next lower."
        )
    return sm


def compile_kernel(variant: Variant, sm: int) -> CompiledKernel:
    """Compile one kernel for compute capability `sm`: about 3 s.

    Raises:
        EngineError: `sm` is not in TARGETS, or the compiler failed.
        FlowCutError: triton is not installed.
    """
    (kernel,) = compile_kernels([(variant, sm)])
    return kernel


def compile_kernels(jobs: Sequence[Job], processes: int | None = None) -> Iterator[CompiledKernel]:
    """Compile many, in as many processes as there are processors, and yield them in order: about 1 s each.

    Raises:
        as compile_kernel.
    """
    if not available("triton"):
        require("triton", "kernels")  # raises; importing it here would fix whether this process interprets kernels
    for _, sm in jobs:
        check_target(sm)
    count = max(1, min(processes or os.cpu_count() or 1, len(jobs)))
    with ExitStack() as stack:
        children = [stack.enter_context(_Child(jobs[i::count])) for i in range(count)]
        for i in range(len(jobs)):
            yield children[i % count].result()


class _Child:
    """A process that compiles its jobs one after another. Leaves no file behind."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._jobs = iter(jobs)
        self._scratch = tempfile.TemporaryDirectory(prefix="flowcut-")
        self._said = Path(self._scratch.name) / "stderr"
        asked = Path(self._scratch.name) / "jobs"
        asked.write_text("".join(json.dumps([asdict(variant), sm]) + "\n" for variant, sm in jobs))
        command = [sys.executable, "-P", "-m", __name__]  # without the working directory on the path
        with asked.open("rb") as stdin, self._said.open("wb") as stderr:
            self._process = subprocess.Popen(
                command, stdin=stdin, stdout=subprocess.PIPE, stderr=stderr, env=self._environment()
            )

    def _environment(self) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not _FOREIGN.match(name)}
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        # Triton's own files go where ours go; lines would name our paths.
        triton = {"TRITON_HOME": self._scratch.name, "TMPDIR": self._scratch.name, "TRITON_DISABLE_LINE_INFO": "1"}
        return {**kept, **triton, "PYTHONPATH": path}

    def result(self) -> CompiledKernel:
        """The next job's kernel. EngineError if the compiler failed."""
        variant, sm = next(self._jobs)
        assert self._process.stdout is not None  # a pipe was asked for
        line = self._process.stdout.readline()
        if not line:
            reason = self._said.read_text(errors="replace").strip().rpartition("\n")[2].rpartition("Error: ")[2]
            raise EngineError(f"{variant.label} must compile for sm_{sm}, got: {reason}.")
        facts = json.loads(line)
        return CompiledKernel.of(facts, facts.pop("ptx"), facts.pop("seconds"))

    def __enter__(self) -> _Child:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        if error is not None:  # or the caller wants no more
            self._process.kill()
        self._process.communicate()
        self._scratch.cleanup()


def tidy(ptx: str, variant: Variant, sm: int) -> str:
    """PTX for any GPU from `sm` on, without comments, blank lines and hidden parameters.

    Triton names architecture-specific targets (sm_90a), whose PTX runs on no later GPU, though the kernels use nothing
    special; and appends pointers to scratch memory to every kernel's parameters, which TensorRT does not pass.

    Raises:
        EngineError: the kernel reads a hidden parameter.
    """
    lines = (re.sub(r"\s*//.*", "", line).rstrip() for line in ptx.splitlines())
    text = "".join(f"{line}\n" for line in lines if line)
    text = re.sub(r"^\.target sm_\d+a?$", f".target sm_{sm}", text, flags=re.MULTILINE)
    wanted = len(INPUTS[variant.kernel]) + len(INTEGERS[variant.kernel]) + len(OUTPUTS[variant.kernel])
    parameters = re.findall(rf"^\t\.param .* ({variant.kernel}_param_\d+),?$", text, re.MULTILINE)
    hidden = parameters[wanted:]
    if len(parameters) < wanted or any(len(re.findall(rf"{name}\b", text)) > 1 for name in hidden):
        raise EngineError(f"{variant.label} must read its {wanted} arguments only, got PTX with {len(parameters)}.")
    for name in reversed(hidden):  # each is then the last one
        text = re.sub(rf",\n\t\.param .* {name}$", "", text, flags=re.MULTILINE)
    return text


def _serve() -> None:
    """The child: compile what stdin names, and print it for the parent."""
    for line in sys.stdin:
        variant, sm = json.loads(line)
        kernel = _compile_here(Variant(**variant), sm)
        print(json.dumps({**kernel.facts(), "ptx": kernel.ptx, "seconds": kernel.seconds}), flush=True)  # noqa: T201


def _compile_here(variant: Variant, sm: int) -> CompiledKernel:
    """Compile in this process, with Triton as it finds it."""
    import triton
    from triton.backends.compiler import GPUTarget

    started = time.perf_counter()
    options = {**OPTIONS, "num_warps": variant.num_warps, "maxnreg": variant.max_registers}
    compiled = triton.compile(_source(variant), target=GPUTarget("cuda", COMPILED_AS.get(sm, sm), 32), options=options)
    facts = compiled.metadata
    if scratch := facts.global_scratch_size + facts.profile_scratch_size:
        raise EngineError(f"{variant.label} must need no scratch memory, got {scratch} bytes.")
    ptx = tidy(compiled.asm["ptx"], variant, sm)
    registers, spills = _assembled(ptx, sm)
    return CompiledKernel(
        variant=variant,
        sm=sm,
        entry=facts.name,
        ptx=ptx,
        threads=32 * facts.num_warps,
        shared_bytes=facts.shared,
        registers=registers,
        spills=spills,
        triton=triton.__version__,
        seconds=time.perf_counter() - started,
    )


def _source(variant: Variant) -> Any:
    """What Triton compiles: the function, its arguments' types, its constants; pointers are multiples of 16 bytes."""
    from triton.compiler import ASTSource

    from engines.flow_score import kernel

    function = getattr(kernel, variant.kernel)
    types = {**dict.fromkeys(variant.constants, "constexpr"), **variant.pointers}
    signature = {name: types.get(name, "i32") for name in function.arg_names}
    constants = {(function.arg_names.index(name),): value for name, value in variant.constants.items()}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(signature) if name in variant.pointers}
    return ASTSource(fn=function, signature=signature, constexprs=constants, attrs=aligned)


def _assembled(ptx: str, sm: int) -> tuple[int, int]:
    """Registers and spilled bytes per thread, by Triton's ptxas. EngineError if it refuses the PTX."""
    from triton.backends import nvidia

    ptxas = Path(nvidia.__path__[0]) / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [str(ptxas), "-v", f"--gpu-name=sm_{sm}", file.name, "-o", os.devnull]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    usage = _USAGE.search(done.stderr)
    if done.returncode or usage is None:
        raise EngineError(f"PTX must assemble for sm_{sm}, got: {done.stderr.partition(chr(10))[0]}")
    stack, stored, registers = map(int, usage.groups())
    return registers, max(stack, stored)


if __name__ == "__main__":
    _serve()
