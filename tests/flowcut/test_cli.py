"""What the commands print and write: tables for people, one line of JSON for programs, files for both."""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from references import relative_error
from tiny_engine import LIMITS, write_engine

from flowcut.aliases import resolve
from flowcut.arguments import make_parser
from flowcut.artifacts import read_manifest, write_manifest
from flowcut.cli import HANDLERS, main
from flowcut.preprocess import ImageSettings, open_image, pixel_values
from flowcut.schedule import make_schedule
from flowcut.vision import VisionModel

ROOT = Path(__file__).parents[2]
HEAVY = ("numpy", "torch", "onnx", "onnx_ir", "onnxruntime", "tensorrt_rtx", "PIL", "rich", "tokenizers")


class Done(NamedTuple):
    """Exit code, the text before the last line of stdout, that line as JSON, and stderr."""

    code: int
    text: str
    result: dict[str, Any]
    stderr: str


Command = Callable[..., Done]


@pytest.fixture
def command(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Command:
    """command(*argv) in an empty directory, on a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(tmp_path)

    def run(*argv: object) -> Done:
        capfd.readouterr()
        with pytest.raises(SystemExit) as ended:
            main([str(argument) for argument in argv])
        out, err = capfd.readouterr()
        *text, last = out.splitlines()
        code = int(str(ended.value.code))
        assert code or not err, f"nothing to say on stderr, got {err}"
        return Done(code, "\n".join(text), json.loads(last), err)

    return run


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_engine(
        tmp_path_factory.mktemp("cli") / "engine", precision="fp16", backend="rtx", random=True
    ).directory


@pytest.fixture
def pictures(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"picture{i}.png" for i in range(2)]
    for path in paths:
        noise = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
        noise.resize((220, 180), Image.Resampling.BICUBIC).save(path)
    return paths


def documented_keys(command: str) -> set[str]:
    """The keys that a command's help promises."""
    (commands,) = (a for a in make_parser()._actions if isinstance(a, argparse._SubParsersAction))
    text = " ".join(commands.choices[command].format_help().split())
    listed = text[text.index("with the keys ") + len("with the keys ") :].split(";")[0].rstrip(".")
    return set(re.split(r", | and ", listed))


def fits(text: str) -> bool:
    """Within 80 columns, apart from lines that hold a path or prompt to be copied."""
    return all(len(line) <= 80 or "/" in line or line.startswith("prompt") for line in text.splitlines())


def test_engine_then_run_then_inspect(command: Command, pictures: list[Path]) -> None:
    built = command("engine", "llava-tiny", "--backend", "ort", "--out-root", "made", "--ask", "--repeats", 2)
    directory = Path(built.result["directory"])
    assert built.code == 0
    assert directory == Path("made/llava-tiny-16-fp16-ort")
    assert built.result.keys() == documented_keys("engine") | documented_keys("run")
    assert built.result["note"] == ""
    assert built.result["engine_bytes"] == {}
    assert built.result["latency_ms"]["prefill"]["n"] == 2
    for words in ("built made/llava-tiny-16-fp16-ort", "vision.onnx.data", "export: ", "16 of 144 patches"):
        assert words in built.text
    assert fits(built.text)

    asked = command("run", directory, "--image", pictures[0], "--question", "Why [not]?", "--repeats", 1)
    assert asked.result.keys() == documented_keys("run")
    assert asked.result["backend"] == asked.result["built_for"] == "ort"
    assert asked.result["ended"] is True
    assert [len(kept) for kept in asked.result["kept"]] == [16]
    assert "Why [not]?" in asked.text
    marks = re.findall(r"^ {9}([█·]{12})$", asked.text, re.MULTILINE)
    assert len(marks) == 12
    assert [i for i, mark in enumerate("".join(marks)) if mark == "█"] == asked.result["kept"][0]
    assert all(values["median"] <= values["p90"] for values in asked.result["latency_ms"].values())

    inspected = command("inspect", directory)
    assert inspected.result.keys() == documented_keys("inspect")
    assert inspected.result["ok"] is True
    assert inspected.result["manifest"] == json.loads((directory / "manifest.json").read_text())
    assert "static 135, 126, 116, 103, 16" in inspected.text
    assert fits(inspected.text)


def test_a_selector_is_said_everywhere(command: Command) -> None:
    options = ("--selector", "random-12", "--tokens", 9, "--ask", "--repeats", 1)
    built = command("export", "llava-tiny", *options, "--precision", "fp32")
    directory = Path(built.result["directory"])
    assert directory == Path("build/llava-tiny-9-random-12-fp32-ort")
    for done in (built, command("run", directory, "--repeats", 1)):
        assert (done.result["selector"], done.result["schedule"]) == ("random-12", "static")
        assert "kept     9 of 144 patches, selector random-12" in done.text
    assert "static 9, selector random-12" in command("inspect", directory).text
    pruned = command("prune", "llava-tiny", "--selector", "random-12", "--tokens", 9, "--overlay", "kept.png")
    assert pruned.result["schedule"]["selector"] == "random-12"
    assert pruned.result["kept"] == [sorted(built.result["kept"][0])]
    assert "selector random-12" in pruned.text
    assert fits(built.text)
    assert fits(pruned.text)


def test_a_directory_from_before_there_were_selectors_is_flowcuts(command: Command) -> None:
    command("export", "llava-tiny", "--out", "e")
    manifest = read_manifest(Path("e"))
    without = {key: value for key, value in manifest.schedule.items() if key != "selector"}
    assert without != manifest.schedule
    write_manifest(Path("e"), replace(manifest, schedule=without))
    done = command("run", "e", "--repeats", 1)
    assert done.result["selector"] == "flowcut"
    assert "selector" not in done.text + command("inspect", "e").text


def test_export_writes_what_engine_does_for_ort(command: Command) -> None:
    exported = command("export", "llava-tiny", "--precision", "fp32", "--tokens", 9, "--out", "here")
    engine = command(
        *("engine", "llava-tiny", "--precision", "fp32", "--tokens", 9, "--backend", "ort", "--out", "there")
    )
    assert exported.result.keys() == documented_keys("export") == engine.result.keys()
    assert read_manifest(Path("here")).files == read_manifest(Path("there")).files


def test_random_weights_are_said_everywhere(command: Command) -> None:
    note = "random weights, 1 of 4 decoder layers"
    options = ("--weights", "random", "--seed", 7, "--decoder-layers", 1)
    built = command("engine", "llava-tiny", *options, "--backend", "ort", "--out", "e", "--ask", "--repeats", 1)
    manifest = read_manifest(Path("e"))
    assert (manifest.weights, manifest.seed, manifest.note) == ("random", 7, note)
    for done in (built, command("run", "e", "--repeats", 1)):
        assert done.result["note"] == note
        assert note in done.text
    assert note in command("inspect", "e").text


def test_two_pictures_in_one_prompt(command: Command, directory: Path, pictures: list[Path]) -> None:
    done = command("run", directory, "--image", pictures[0], "--image", pictures[1], "--repeats", 1)
    assert len(done.result["kept"]) == 2
    assert done.text.count("16 of 144 patches") == 2
    assert "USER: <image> <image> What color" in done.text


def test_pictures_follow_one_option_and_a_question_needs_no_ask(command: Command, pictures: list[Path]) -> None:
    names = [str(path) for path in pictures[:2]]
    done = command("engine", "llava-tiny", "--backend", "ort", "--out", "e", "--repeats", "1", "--image", *names)
    assert len(done.result["kept"]) == 2


def test_answer_is_as_long_as_asked_for(command: Command, directory: Path) -> None:
    assert len(command("run", directory, "--answer-tokens", 5, "--repeats", 1).result["token_ids"]) == 5
    assert LIMITS.max_new_tokens == 32


def test_engine_of_another_backend_says_whose_latencies_these_are(command: Command, directory: Path) -> None:
    done = command("run", directory, "--backend", "ort", "--repeats", 1)
    assert (done.result["backend"], done.result["built_for"]) == ("ort", "rtx")
    assert "These are not GPU latencies." in done.text


def test_inspect_lists_differences_and_ends_with_1(command: Command) -> None:
    command("export", "llava-tiny", "--out", "e")
    Path("e/tokenizer.json").write_text("{}")
    done = command("inspect", "e")
    assert done.code == 1
    assert done.result["ok"] is False
    assert re.fullmatch(r"tokenizer\.json: expected \d+ bytes, got 2", done.result["differences"][0])


def test_errors_cannot_steer_the_terminal(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(["inspect", "e\x1b[2J"])
    assert capfd.readouterr().err.startswith(r"flowcut: e\x1b[2J must be an engine directory")


def test_inspect_check_says_what_was_checked(command: Command) -> None:
    command("export", "llava-tiny", "--out", "e")
    done = command("inspect", "e", "--check")
    assert done.code == 0
    assert done.result.keys() == documented_keys("inspect") | {"checks"}
    assert {each["name"]: each["verdict"] for each in done.result["checks"]} == {
        "manifest.json": "ok",
        "files": "ok",
        "GPU": "not applicable here",
        "onnxruntime": "ok",
    }
    assert all(each.keys() == {"name", "verdict", "detail"} for each in done.result["checks"])
    assert "not applicable here" in done.text
    assert done.result["manifest"]["command"] in done.text
    assert fits(done.text)
    weights = Path("e/vision.onnx.data")
    weights.write_bytes(weights.read_bytes()[::-1])
    assert command("inspect", "e").code == 0
    done = command("inspect", "e", "--check")
    assert (done.code, done.result["ok"]) == (1, False)
    assert done.result["checks"][1]["verdict"] == "differs"
    assert [line.split(": ")[0] for line in done.result["differences"]] == ["vision.onnx.data"]
    Path("e/manifest.json").write_text("{}")
    done = command("inspect", "e", "--check")
    assert (done.code, done.result["ok"], done.result["manifest"], done.result["checks"]) == (1, False, None, [])


@pytest.mark.parametrize("schedule", ["adaptive", "static", "masked"])
def test_prune_writes_what_the_tower_gives(command: Command, pictures: list[Path], schedule: str) -> None:
    images = [word for path in pictures for word in ("--image", path)]
    done = command("prune", "llava-tiny", *images, "--tokens", 20, "--schedule", schedule, "--out", "kept.npz")
    model = resolve("llava-tiny")
    settings = ImageSettings.from_directory(model.files, 168)
    pixels = torch.from_numpy(pixel_values([open_image(path) for path in pictures], settings))
    with torch.inference_mode():
        expected = VisionModel.from_weights(model.weights).features(
            pixels, make_schedule(schedule, model.config.vision, 20)
        )
    with np.load("kept.npz") as data:
        assert set(data.files) == {"kept", "counts", "features"}
        kept, counts, features = data["kept"], data["counts"], data["features"]
    assert kept.shape == (2, 20)
    assert kept.dtype.kind == counts.dtype.kind == "i"
    assert counts.shape == (2, 13)
    assert (features.shape, features.dtype) == ((2, 20, 128), np.float32)
    np.testing.assert_array_equal(kept, expected.kept.numpy())
    np.testing.assert_array_equal(counts, expected.counts.numpy())
    assert relative_error(features, expected.features.numpy()) < 1e-5
    assert done.result.keys() == documented_keys("prune")
    assert done.result["kept"] == kept.tolist()
    assert done.result["counts"] == counts.tolist()
    assert done.result["written"] == ["kept.npz"]
    assert done.result["schedule"]["kind"] == schedule
    assert [line.split()[0] for line in done.text.splitlines()[3:5]] == ["0", "1"]
    assert fits(done.text)


@pytest.mark.parametrize("schedule", ["static", "masked", "given.json"])
def test_prune_on_onnx_runtime_equals_torch(command: Command, schedule: str) -> None:
    given = {"kind": "masked", "patches": 144, "tokens": 16, "counts": [120, 80, 70, 40, 16]}
    Path("given.json").write_text(json.dumps(given))
    pixels = np.random.default_rng(1).standard_normal((3, 3, 168, 168)).astype(np.float32)
    np.save("pixels.npy", pixels)
    results = {}
    for backend in ("torch", "ort"):
        options = ("--pixels", "pixels.npy", "--schedule", schedule, "--backend", backend, "--out", f"{backend}.npz")
        results[backend] = command("prune", "llava-tiny", *options)
        assert results[backend].code == 0
    with np.load("torch.npz") as a, np.load("ort.npz") as b:
        np.testing.assert_array_equal(a["kept"], b["kept"])
        np.testing.assert_array_equal(a["counts"], b["counts"])
        assert a["kept"].dtype == b["kept"].dtype
        assert relative_error(b["features"], a["features"]) < 1e-4
    assert results["torch"].text.replace("torch", "") == results["ort"].text.replace("ort", "")


def test_preprocessed_pixels_give_what_the_picture_gives(command: Command, pictures: list[Path]) -> None:
    settings = ImageSettings.from_directory(resolve("llava-tiny").files, 168)
    np.save("pixels.npy", pixel_values([open_image(pictures[0])], settings).astype(np.float64))
    from_pixels, from_picture = (
        command("prune", "llava-tiny", *source).result
        for source in (("--pixels", "pixels.npy"), ("--image", pictures[0]))
    )
    assert from_pixels == from_picture


def test_overlay_is_a_picture_and_several_are_numbered(command: Command, pictures: list[Path]) -> None:
    images = [word for path in pictures for word in ("--image", path)]
    one = command("prune", "llava-tiny", *images[:2], "--overlay", "one.png")
    two = command("prune", "llava-tiny", *images, "--overlay", "two.png", "--backend", "ort", "--schedule", "masked")
    assert one.result["written"] == ["one.png"]
    assert two.result["written"] == ["two-0.png", "two-1.png"]
    pages = [np.asarray(Image.open(name).convert("RGB")) for name in ("one.png", "two-0.png", "two-1.png")]
    np.testing.assert_array_equal(pages[0], pages[1])  # masked keeps what adaptive keeps
    assert pages[0].shape == pages[2].shape
    assert (pages[0] != pages[2]).any()


def test_nothing_is_pruned_when_all_tokens_are_kept(command: Command) -> None:
    done = command("prune", "llava-tiny", "--tokens", "all")
    assert "Nothing is pruned: all 144 patches stay." in done.text
    assert done.result["kept"] == [list(range(144))]
    assert done.result["counts"] == [[144] * 13]
    assert done.result["schedule"]["kind"] == "off"


def test_verify_says_whether_it_is_ok(command: Command, directory: Path) -> None:
    done = command("verify", directory)
    assert done.result["ok"] is (done.code == 0)


def python(code: str, *argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *argv],
        cwd=ROOT,
        env={"PATH": "", **environment},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("arguments", ["--help", "--version", *(f"{name} --help" for name in HANDLERS), "run"])
def test_help_and_syntax_errors_import_nothing_heavy(arguments: str) -> None:
    """Seconds of the processor, and the least of three: others may be using it."""
    code = (
        "import sys, time; start = time.process_time()\n"
        "from flowcut.cli import main\n"
        "try: main(sys.argv[1:])\n"
        f"finally: print(sorted(set({HEAVY}) & set(sys.modules)), time.process_time() - start)"
    )
    runs = [python(code, *arguments.split()).stdout.splitlines()[-1].rsplit(" ", 1) for _ in range(3)]
    assert {imported for imported, _ in runs} == {"[]"}
    assert min(float(seconds) for _, seconds in runs) < 0.3


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("--help", ["engine", "export", "prune", "run", "verify", "inspect", "examples:", "Exit codes: 0"]),
        (
            "engine --help",
            ["no-history", "llava-1.5-7b", "compiles without a GPU", "11.1% of the patches", "nothing is downloaded"],
        ),
        ("export --help", ["engine --backend ort", "fp32"]),
        (
            "prune --help",
            [
                "no-semantic",
                "random-SEED",
                "pixel_values [B, 3, S, S]",
                "kept [B, K], counts [B, L+1] and features",
                "FILE-0.png",
            ],
        ),
        ("run --help", ["<image>", "ort runs everywhere", "bundled"]),
        ("verify --help", ["tolerances"]),
        ("inspect --help", ["exit code 1"]),
    ],
)
def test_help_teaches(
    arguments: str, words: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # help is as wide as the terminal, and the tests may run in any
    with pytest.raises(SystemExit) as ended:
        main(arguments.split())
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert all(word in " ".join(text.split()) for word in words)
    assert max(map(len, text.splitlines())) <= 90


def test_examples_of_the_help_parse() -> None:
    examples = [line for line in make_parser().epilog.splitlines() if line.startswith("  flowcut ")]  # type: ignore[union-attr]
    assert len(examples) >= 4
    for line in examples:
        assert make_parser().parse_args(re.sub('"[^"]*"', "text", line).split()[1:]).command in HANDLERS


def test_answer_survives_a_terminal_without_unicode(directory: Path) -> None:
    code = "import sys; from flowcut.cli import main; main(sys.argv[1:])"
    done = python(code, "run", str(directory), "--question", "Où?", "--repeats", "1", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stderr) == (0, "")
    assert "O\\xf9?" in done.stdout
    assert re.search(r"^ {9}[.#]{12}$", done.stdout, re.MULTILINE)
    json.loads(done.stdout.splitlines()[-1])


def test_a_closed_stdout_is_no_error(directory: Path) -> None:
    command = ["sh", "-c", '"$0" -m flowcut inspect "$1" >&-', sys.executable, str(directory)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
