"""What is wrong is said in one line that names the field, the rule and the remedy; no file is touched.

Exit code 1 for what a user can mend, 2 for wrong syntax.
"""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import recipe
from cli_refusals import Refused, files, refusals, run
from conftest import WriteCheckpoint
from next_checkpoint import write_next
from PIL import Image
from safetensors.numpy import load_file, save_file
from tiny_engine import write_engine

from engines.backends import gpu_present
from flowcut.aliases import ASSETS
from flowcut.deps import available

ROOT = Path(__file__).parents[2]
TINY = ASSETS / "llava-tiny"
RTX = pytest.mark.skipif(not available("tensorrt_rtx"), reason="needs the rtx extra (tensorrt-rtx-cu13)")
NO_GPU = pytest.mark.skipif(gpu_present(), reason="there is a GPU here")


@pytest.fixture(scope="module")
def engine_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Says it was built for rtx; ONNX Runtime runs it."""
    return write_engine(tmp_path_factory.mktemp("cli") / "engine", precision="fp16", backend="rtx").directory


@pytest.fixture(scope="module")
def next_checkpoint(checkpoint: WriteCheckpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LLaVA-NeXT, of 64 patches a tile and 5 tiles a picture."""
    return write_next(checkpoint("tiny"), tmp_path_factory.mktemp("next") / "checkpoint")


@pytest.fixture
def place(tmp_path: Path, next_checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with inputs of every bad kind."""
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 120, 3), np.uint8))
    image.save("picture.png")
    content = Path("picture.png").read_bytes()
    Path("text.png").write_text("not a picture")
    Path("truncated.png").write_bytes(content[: len(content) // 2])
    Path("empty.png").touch()
    Path("folder.png").mkdir()
    _write_arrays()
    _write_schedules()
    Path("next").symlink_to(next_checkpoint)
    return here


def _write_arrays() -> None:
    right = np.zeros((1, 3, 168, 168), np.float32)
    np.save("right.npy", right)
    np.save("flat.npy", right[0])
    np.save("other.npy", np.zeros((1, 3, 336, 336), np.float32))
    np.save("none.npy", right[:0])
    np.save("complex.npy", right.astype(np.complex64))
    np.save("objects.npy", np.array([{}]), allow_pickle=True)
    np.save("huge.npy", np.full_like(right, 1e300, np.float64))
    right[0, 0, 5, 5] = np.nan
    np.save("nan.npy", right)
    np.savez("archive.npy.npz", right)
    Path("archive.npy.npz").rename("archive.npy")
    Path("text.npy").write_text("1 2 3")
    Path("empty.npy").touch()
    Path("short.npy").write_bytes(Path("right.npy").read_bytes()[:5000])
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999, 3, 168, 168), }"
    Path("claims.npy").write_bytes(b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header)


def _write_schedules() -> None:
    static = {"kind": "static", "patches": 144, "tokens": 16, "counts": [100, 80, 60, 40, 16]}
    for name, content in {
        "budget": static | {"tokens": 32, "counts": [100, 80, 60, 40, 32]},
        "points": static | {"counts": [100, 16]},
        "rising": static | {"counts": [100, 120, 60, 40, 16]},
        "keys": {"kind": "static"},
        "list": [1, 2],
        "cls": static | {"counts": [16], "selector": "cls"},
        "adaptive": {"kind": "adaptive", "patches": 144, "tokens": 16, "counts": []},
    }.items():
        Path(f"{name}.json").write_text(json.dumps(content))
    Path("broken.json").write_text("{")


@pytest.fixture
def refused(place: Path, capfd: pytest.CaptureFixture[str]) -> Refused:
    return refusals(place, capfd)


BUILD: dict[str, tuple[str, str]] = {
    "no tokens": ("llava-tiny --tokens 0", r"tokens must be in 1\.\.144 \(.*\) or 'all', got 0\."),
    "negative tokens": ("llava-tiny --tokens -3", r"tokens must be in 1\.\.144 .*, got -3\."),
    "too many tokens": ("llava-tiny --tokens 145", r"tokens must be in 1\.\.144 .*, got 145\."),
    "no llm tokens": ("llava-tiny --tokens 48 --llm-tokens 0", r"llm_tokens must be in 1\.\.47 .*, got 0\."),
    "as many llm tokens": ("llava-tiny --tokens 48 --llm-tokens 48", r"llm_tokens must be in 1\.\.47 .*, got 48\."),
    "nothing left to see fewer": (
        "llava-tiny --llm-tokens 8 --decoder-layers 2",
        r"decoder_layers must be at least 3 where visual tokens are dropped inside .*, got 2\.",
    ),
    "stages that part the two layers": (
        "llava-tiny --llm-tokens 8 --stages 4",
        r"stages must be in 1\.\.3 \(the first has 2 of 4 decoder layers\), got 4\.",
    ),
    "odd tokens of a picture": ("next --tokens 25", r"tokens must be even and in 2\.\.126 for LLaVA-NeXT .*, got 25\."),
    "no tokens of a picture": ("next --tokens 0", r"tokens must be even and in 2\.\.126 .*or 'all', got 0\."),
    "one token of a picture": ("next --tokens 1", r"tokens must be even and in 2\.\.126 .*, got 1\."),
    "too many tokens of a picture": ("next --tokens 128", r"tokens must be even and in 2\.\.126 .*, got 128\."),
    "llm tokens of a picture": (
        "next --tokens 24 --llm-tokens 12",
        r"llm_tokens must not be given for LLaVA-NeXT, got 12\. Its tokens are the whole picture's",
    ),
    "two layers of LLaVA-NeXT": ("next --decoder-layers 2", r"decoder_layers must be at least 3 .*, got 2\."),
    "a prompt without room": ("next --tokens 24 --max-prompt 61", r"max_prompt must be in 62\.\..*, got 61\."),
    "unknown alias": (
        "llava-2.0",
        r"model must be one of llava-tiny, .* or a directory, got 'llava-2\.0'\. .*config\.json",
    ),
    "adaptive": ("llava-tiny --schedule adaptive", r"schedule must be static, masked or a \.json file .*masked keeps"),
    "adaptive file": ("llava-tiny --schedule adaptive.json", r"schedule must be static, masked or a \.json file"),
    "unknown schedule": (
        "llava-tiny --schedule slow",
        r"schedule must be adaptive, static, masked or a \.json .*'slow'",
    ),
    "absent schedule": ("llava-tiny --schedule nowhere.json", r"schedule nowhere\.json must be a readable JSON file"),
    "broken schedule": ("llava-tiny --schedule broken.json", r"schedule broken\.json must be a readable JSON file"),
    "a list as schedule": ("llava-tiny --schedule list.json", r"schedule must have the keys .*got list"),
    "schedule's keys": ("llava-tiny --schedule keys.json", r"schedule must have the keys .*got \['kind'\]"),
    "rising schedule": ("llava-tiny --schedule rising.json", r"schedule\.counts must fall .*got \[100, 120"),
    "another budget": ("llava-tiny --tokens 16 --schedule budget.json", r"'tokens': 16.*got .*'tokens': 32.*--tokens"),
    "another depth": ("llava-tiny --schedule points.json", r"'pruning points': 5.*got .*'pruning points': 2"),
    "unknown selector": (
        "llava-tiny --selector flow",
        r"selector must be one of flowcut, .*'flow'\. Did you mean flowcut\?",
    ),
    "selector of a file": (
        "llava-tiny --schedule cls.json --selector grid",
        r"cls\.json must be made for .*'grid'.*got .*'cls'.*--selector",
    ),
    "nothing to follow": (
        "llava-tiny --schedule masked --selector cls",
        r"schedule must be static with the selector cls, .* got 'masked'\. Ask for static, or for another selector",
    ),
    "no layers": ("llava-tiny --decoder-layers 0", r"decoder_layers must be in 1\.\.4, got 0"),
    "too many layers": ("llava-tiny --decoder-layers 5", r"decoder_layers must be in 1\.\.4, got 5"),
    "no batch": ("llava-tiny --max-batch 0", r"max_batch must be at least 1, got 0"),
    "no images": ("llava-tiny --max-images 0", r"max_images must be at least 1, got 0"),
    "no answer": ("llava-tiny --max-new-tokens 0", r"max_new_tokens must be at least 1, got 0"),
    "long answer": ("llava-tiny --max-new-tokens 4090", r"max_new_tokens must be in 1\.\.4079 .*got 4090\. Lower"),
    "answer beyond the engine": (
        "llava-tiny --ask --max-new-tokens 9 --answer-tokens 10",
        r"answer_tokens must be at most 9 .*got 10\.",
    ),
    "prompt beyond the engine": (
        "llava-tiny --max-prompt 20 --question why?",
        r"prompt 0 must have 1\.\.20 tokens, got 28 ",
    ),
    "no prompt": ("llava-tiny --max-prompt 0", r"max_prompt must be in 17\.\.3968 .*got 0\."),
    "prompt of a picture alone": ("llava-tiny --max-prompt 16", r"max_prompt must be in 17\.\.3968 .*got 16\."),
    "long prompt": ("llava-tiny --max-prompt 3969", r"max_prompt must be in 17\.\.3968 .*got 3969\."),
    "negative seed": ("llava-tiny --weights random --seed -1", r"seed must be 0 or more, got -1"),
    "target of ort": (
        "llava-tiny --backend ort --compute-capability sm86",
        "compute_capability must be left out .*sm86",
    ),
    "out and a file": ("llava-tiny --backend ort --out picture.png", r"picture\.png must be a directory, got a file"),
    "somebody's files": (
        "llava-tiny --backend ort --out .",
        r"must be empty or an engine directory, got neither\. Name a new",
    ),
    "question without place": (
        "llava-tiny --ask --prompt Why?",
        r"prompt must have one <image> for each image \(1\), got 0",
    ),
    "question about text": ("llava-tiny --ask --image text.png", r"image must be a picture that Pillow reads"),
    "no repeats": ("llava-tiny --ask --repeats 0", r"repeats must be at least 1, got 0"),
}


@pytest.mark.parametrize("case", BUILD)
def test_build_setting_is_refused_before_anything_is_written(case: str, refused: Refused) -> None:
    command, message = BUILD[case]
    backend = () if "--backend" in command else ("--backend", "ort")
    assert re.search(message, refused("engine", *command.split(), *backend))


COMPILER: dict[str, tuple[str, str]] = {
    "fp32": (
        "--precision fp32",
        "precision must be one of fp16, .* for backend rtx,.* got 'fp32'.*BACKEND=ort",
    ),
    "unknown GPU": ("--compute-capability sm1", r"compute_capability must be one of sm75, .*, got sm1\."),
    "one unknown GPU": ("--compute-capability SM86 --compute-capability gtx", r"must be one of .*, got gtx\."),
}


@RTX
@pytest.mark.parametrize("case", COMPILER)
def test_compiler_setting_is_refused_before_the_export(case: str, refused: Refused) -> None:
    options, message = COMPILER[case]
    assert re.search(message, refused("engine", "llava-tiny", "--backend", "rtx", *options.split()))


PLACE = "USER: <image>\nWhy? ASSISTANT:"
QUESTIONS: dict[str, tuple[list[str], str]] = {
    "text": (["--image", "text.png"], r"image must be a picture that Pillow reads, got 'text\.png'"),
    "truncated": (["--image", "truncated.png"], r"image must be whole, got 'truncated\.png'.*truncated"),
    "empty": (["--image", "empty.png"], r"image must not be empty, got 'empty\.png' of 0 bytes"),
    "absent": (["--image", "nowhere.png"], r"image must be an existing file, got 'nowhere\.png'"),
    "folder": (["--image", "folder.png"], r"image must be an existing file, got 'folder\.png'"),
    "no place": (["--prompt", "Why?"], r"prompt must have one <image> for each image \(1\), got 0\. Put <image> where"),
    "two places": (["--prompt", PLACE * 2], r"prompt must have one <image> for each image \(1\), got 2"),
    "one place for two": (
        ["--prompt", PLACE, "--image", "picture.png", "--image", "picture.png"],
        r"one <image> for each image \(2\), got 1",
    ),
    "empty prompt": (["--prompt", ""], "prompt must not be empty, got ''"),
    "empty question": (["--question", " "], "question must not be empty, got ' '"),
    "many threads": (["--threads", "100000"], r"threads must be at most \d+, got 100000"),
    "long prompt": (
        ["--question", "why " * 90],
        r"prompt 0 must have 1\.\.64 tokens, got \d+ \(16 of them visual\)\. .*--max-prompt \d+",
    ),
    "many pictures": (["--image", "picture.png"] * 5, r"images must be at most 4 at once .*got 5.*--max-images 5"),
    "no answer": (["--answer-tokens", "0"], "answer_tokens must be at least 1, got 0"),
    "long answer": (["--answer-tokens", "33"], r"answer_tokens must be at most 32 .*got 33\. .*--max-new-tokens"),
    "no repeats": (["--repeats", "0"], "repeats must be at least 1, got 0"),
    "no threads": (["--threads", "0"], "threads must be at least 1, got 0"),
    "another library": (["--backend", "trt"], r"backend must be one of auto, rtx, ort for this directory.*got 'trt'"),
}


@pytest.mark.parametrize("case", QUESTIONS)
def test_question_that_cannot_be_asked_is_refused(case: str, engine_directory: Path, refused: Refused) -> None:
    options, message = QUESTIONS[case]
    assert re.search(message, refused("run", engine_directory, *options))


@NO_GPU
def test_engine_without_a_gpu_names_the_backend_that_works(engine_directory: Path, refused: Refused) -> None:
    message = refused("run", engine_directory, "--backend", "rtx")
    assert re.search(
        r"backend rtx runs on a GPU, and no CUDA GPU is present\. The same directory .*--backend ort", message
    )


PRUNE: dict[str, tuple[str, str]] = {
    "three dimensions": ("--pixels flat.npy", r"pixels must have the shape \[B, 3, 168, 168\], got \[3, 168, 168\]"),
    "another size": ("--pixels other.npy", r"the shape \[B, 3, 168, 168\], got \[1, 3, 336, 336\]"),
    "no pictures": ("--pixels none.npy", r"the shape \[B, 3, 168, 168\], got \[0, 3, 168, 168\]"),
    "not a number": ("--pixels nan.npy", r"pixels must be finite in float32, got 1 values that are not"),
    "beyond float32": ("--pixels huge.npy", r"pixels must be finite in float32, got 84672 values that are not"),
    "complex": ("--pixels complex.npy", r"pixels must be real numbers, got complex64"),
    "objects": ("--pixels objects.npy", r"pixels must be a \.npy file, got 'objects\.npy'"),
    "archive": ("--pixels archive.npy", r"pixels must be a \.npy file, got 'archive\.npy'"),
    "text": ("--pixels text.npy", r"pixels must be a \.npy file, got 'text\.npy'"),
    "empty file": ("--pixels empty.npy", r"pixels must be a \.npy file, got 'empty\.npy'"),
    "cut short": ("--pixels short.npy", r"pixels must be a \.npy file, got 'short\.npy'"),
    "claims 34 TB": ("--pixels claims.npy", r"pixels must be a \.npy file, got 'claims\.npy'"),
    "absent": ("--pixels nowhere.npy", r"pixels must be a \.npy file, got 'nowhere\.npy': No such file"),
    "folder": ("--pixels folder.png", r"pixels must be a \.npy file, got 'folder\.png': Is a directory"),
    "not a picture": ("--image text.png", "image must be a picture that Pillow reads"),
    "tokens": ("--tokens 145", r"tokens must be in 1\.\.144"),
    "schedule": ("--tokens 16 --schedule budget.json", "another file, --tokens .* or --selector"),
    "adaptive on ort": (
        "--backend ort --schedule adaptive",
        r"schedule must be static, masked or a \.json .*masked keeps the same patches",
    ),
    "adaptive with one shot": (
        "--schedule adaptive --selector random",
        r"schedule must be static with the selector random-0, .* got 'adaptive'\. Ask for static, or",
    ),
    "absent folder": (
        "--out nowhere/kept.npz",
        r"out must be a file in an existing directory, got 'nowhere/kept\.npz'",
    ),
    "out is a folder": ("--out folder.png", r"out must be a file in an existing directory, got 'folder\.png'"),
    "absent overlay folder": ("--out kept.npz --overlay nowhere/a.png", "overlay must be a file in an existing"),
    "one name for both": ("--out a --overlay a", "out and overlay must be different files, got 'a' for both"),
}


@pytest.mark.parametrize("case", PRUNE)
def test_prune_refuses(case: str, refused: Refused) -> None:
    options, message = PRUNE[case]
    assert re.search(message, refused("prune", "llava-tiny", *options.split()))


@pytest.mark.parametrize("command", ["run", "inspect", "verify"])
def test_what_is_not_an_engine_directory_is_refused(command: str, place: Path, refused: Refused) -> None:
    for directory, found in (
        ("nowhere", "got none"),
        ("picture.png", "got none"),
        (".", r"got one without manifest\.json"),
    ):
        assert re.search(rf"must be an engine directory, {found}\. `flowcut engine MODEL`", refused(command, directory))
    (place / "manifest.json").write_text("{}")
    assert "missing keys: backend, build_seconds" in refused(command, ".")


def test_changed_engine_directory_is_refused(engine_directory: Path, place: Path, refused: Refused) -> None:
    shutil.copytree(engine_directory, "engine")
    (place / "engine" / "tokenizer.json").write_text("{}")
    (place / "engine" / "language.onnx.data").unlink()
    for command in ("run", "inspect"):
        message = refused(command, "engine")
        assert "language.onnx.data: missing; tokenizer.json: expected" in message
        assert message.endswith("Build it again.")


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "fly",
        "engine",
        "engine llava-tiny --tokens abc",
        "engine llava-tiny --tokens 1.5",
        "engine llava-tiny --backend onnx",
        "engine llava-tiny --precision int3",
        "engine llava-tiny --max-batch many",
        "engine llava-tiny --out a --out-root b",
        "engine llava-tiny --question a --prompt b",
        "export llava-tiny --backend rtx",
        "prune llava-tiny --image a.png --pixels b.npy",
        "prune llava-tiny --schedule",
        "run",
        "run a b",
        "run a --backend cpu",
        "inspect a --fast",
    ],
)
def test_wrong_syntax_ends_with_2_and_one_line(arguments: str, place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = files(place)
    code, message = run(capfd, *arguments.split())
    assert code == 2
    assert message.startswith("flowcut")
    assert message.count("\n") == 1
    assert "Traceback" not in message
    assert files(place) == before


@pytest.mark.parametrize("command", ["engine", "prune"])
def test_all_wrong_tensors_of_a_checkpoint_are_listed_at_once(command: str, place: Path, refused: Refused) -> None:
    recipe.write(place / "model", *recipe.PRESETS["tiny"], shard_bytes=300_000)
    first, second, *_, last = sorted((place / "model").glob("*.safetensors"))
    tensors = {name: array.copy() for name, array in load_file(first).items()}
    gone = min(tensors)
    del tensors[gone]
    save_file(tensors | {"surplus": np.zeros(3, np.float32)}, first)
    tensors = {name: array.copy() for name, array in load_file(second).items()}
    misshaped = min(tensors)
    save_file(tensors | {misshaped: np.zeros((2, 2), np.float32)}, second)
    last.write_bytes(last.read_bytes()[:-100])
    message = refused(command, "model", *(("--backend", "ort") if command == "engine" else ()))
    for part in (f"missing tensors: {gone}", "extra tensors: surplus", f"misshaped tensors: {misshaped} [2, 2]"):
        assert part in message
    assert f"damaged files: {last.name}" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model_type": "llava_onevision"},
            "model_type must be 'llava' or 'llava_next', got 'llava_onevision'. Take one",
        ),
        ({"text_config": None}, "text_config must be an object, got None"),
        ({"vision_feature_layer": -1}, "vision_feature_layer must be -2, got -1"),
        ({"image_token_index": 1024}, r"image_token_index must be in 0..1023"),
    ],
)
def test_config_of_another_model_is_refused(
    change: dict[str, object], message: str, place: Path, refused: Refused
) -> None:
    shutil.copytree(TINY, "model")
    path = place / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert message in refused("engine", "model", "--backend", "ort")


@pytest.mark.parametrize(
    ("module", "command", "extra"),
    [
        ("tensorrt_rtx", "engine llava-tiny --backend rtx", "rtx"),
        ("onnx_ir", "engine llava-tiny --backend ort", "export"),
        ("safetensors", "engine llava-tiny --backend ort", "export"),
        ("huggingface_hub", "engine llava-1.5-7b --backend ort", "export"),
        ("torch", "prune llava-tiny", "torch"),
        ("onnx_ir", "prune llava-tiny --backend ort --schedule static", "export"),
        ("onnxruntime", "run ENGINE", "cpu"),
    ],
)
def test_missing_library_is_named_with_its_extra(
    module: str,
    command: str,
    extra: str,
    engine_directory: Path,
    refused: Refused,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    message = refused(*command.replace("ENGINE", str(engine_directory)).split())
    assert message.startswith(f"{module} is not installed. ")
    assert f"pip install -e '.[{extra}]'" in message
