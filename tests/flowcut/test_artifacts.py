"""The manifest says what an engine directory is, and every change to the directory shows."""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowcut.artifacts import (
    SCHEMA,
    Manifest,
    check_files,
    installed_versions,
    publish,
    read_manifest,
    timestamp,
    what_differs,
    write_manifest,
)
from flowcut.config import LlavaConfig, TextConfig, VisionConfig
from flowcut.contract import Limits
from flowcut.errors import ConfigError, EngineError
from flowcut.integrity import MANIFEST, FileRecord

MANIFEST_OF_7B = Manifest(
    source="llava-1.5-7b",
    model="llava-1.5-7b",
    weights="random",
    note="random weights: for timing only",
    source_sha256="",
    geometry=LlavaConfig(VisionConfig(), TextConfig(vocab_size=32064), eos_token_ids=(2, 7)),
    tokens=64,
    llm_tokens=16,
    schedule={"kind": "static", "patches": 576, "tokens": 64, "counts": [576, 300, 64]},
    precision="int4",
    vision_precision="int8",
    stages=2,
    calibration={"sha256": "0" * 64, "pictures": 32},
    backend="rtx",
    limits=Limits(max_batch=2),
    versions={"python": "3.11.7"},
    compute_capabilities=("sm80", "sm89"),
    created="2026-01-02T03:04:05+00:00",
    build_seconds={"vision": 18.25, "language": 4.0},
)


class Raw(str):
    """JSON as it stands, rather than a string in it."""


LEAVES = st.none() | st.booleans() | st.integers() | st.sampled_from(["", "rtx", "x"])
KEYS = st.sampled_from(sorted(json.loads(MANIFEST_OF_7B.to_json())))
HUGE = st.integers(300, 4200).map(
    lambda digits: 10**digits
)  # Python reads no more digits of JSON, and floats end at 308
DEPTHS = st.sampled_from([100, 300, 500, 700, 900, 2000])


def nested(depth: int) -> str:
    """JSON of lists in lists; json.dumps would go no deeper than what is tested."""
    return "[" * depth + "]" * depth


def places(data: object, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    """Ways to every value in JSON data."""
    inside = data.items() if isinstance(data, dict) else enumerate(data) if isinstance(data, list) else ()
    return [path] * bool(path) + [way for key, value in inside for way in places(value, (*path, key))]


PLACES = st.sampled_from(places(json.loads(MANIFEST_OF_7B.to_json())))


def build(target: Path, **files: bytes) -> Manifest:
    with publish(target) as partial:
        for name, content in files.items():
            (partial / name).write_bytes(content)
        return write_manifest(partial, MANIFEST_OF_7B)


def changed(change: Callable[[dict[str, Any]], Any]) -> str:
    data = json.loads(MANIFEST_OF_7B.to_json())
    change(data)
    return json.dumps(data)


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "engine"


def test_manifest_survives_the_disk(target: Path) -> None:
    written = build(target, engine=b"weights")
    assert read_manifest(target) == written
    assert written.files == {"engine": FileRecord(hashlib.sha256(b"weights").hexdigest(), 7)}
    assert replace(written, files={}, sha256="") == MANIFEST_OF_7B


def test_the_manifest_carries_the_hash_of_its_own_text(target: Path) -> None:
    """As anybody can check without this project: empty the line, hash the rest."""
    written = build(target, engine=b"weights")
    text = (target / MANIFEST).read_text(encoding="ascii")
    emptied = re.sub(r'^  "sha256": "[0-9a-f]{64}"', '  "sha256": ""', text, flags=re.MULTILINE)
    assert emptied != text
    assert written.sha256 == hashlib.sha256(emptied.encode()).hexdigest()
    assert written.sha256 in text


def test_every_changed_byte_of_a_manifest_is_refused(target: Path) -> None:
    build(target, engine=b"weights")
    path, draw = target / MANIFEST, random.Random(0)
    content = path.read_bytes()
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= draw.randrange(1, 256)
        path.write_bytes(changed)
        with pytest.raises(EngineError, match=r"manifest\.json") as caught:
            read_manifest(target)
        assert "\n" not in str(caught.value)
    path.write_bytes(content)
    read_manifest(target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text + "\n", "byte for byte"),
        (lambda text: " " + text, "byte for byte"),
        (lambda text: text.replace("\n", "\r\n"), "byte for byte"),
        (lambda text: text[:-1], "byte for byte"),
        (lambda text: text.replace("18.25", "1825e-2"), "byte for byte"),
        (lambda text: text.replace("18.25", "1e999"), "byte for byte"),
        (lambda text: text.replace("18.25", "NaN"), "NaN, which JSON has not"),
        (lambda text: text.replace('"seed": 0', '"seed": 0,\n  "seed": 0'), "byte for byte"),
        (
            lambda text: text.replace('"seed": 0', '"seed": 1'),
            "sha256 must be [0-9a-f]{64}, its own, got '[0-9a-f]{64}'",
        ),
        (lambda text: text.replace('"int8"', '"int\\u0038"'), "byte for byte"),
        (lambda text: re.sub('  "sha256": "[0-9a-f]{64}",\n  "source"', '  "sha256": "",\n  "source"', text), "got ''"),
    ],
)
def test_a_manifest_is_refused_that_says_the_same_otherwise(
    target: Path, change: Callable[[str], str], message: str
) -> None:
    build(target)
    path = target / MANIFEST
    text = change(path.read_text(encoding="ascii"))
    assert text != path.read_text(encoding="ascii")
    path.write_bytes(text.encode("ascii"))
    with pytest.raises(EngineError, match=message):
        read_manifest(target)


def test_a_command_with_any_path_survives(target: Path) -> None:
    """A path need not be UTF-8: Python has its other bytes as lone surrogates."""
    command = "flowcut engine 'a b' --out '/tmp/\udcff\u00e9\n'"
    with publish(target) as partial:
        write_manifest(partial, replace(MANIFEST_OF_7B, command=command))
    assert read_manifest(target).command == command
    assert "\n" not in read_manifest(target).remedy


def test_the_remedy_is_the_command_where_it_is_known() -> None:
    assert MANIFEST_OF_7B.remedy == "Build it again."
    known = replace(MANIFEST_OF_7B, command="flowcut engine m")
    assert known.remedy == "Build it again: flowcut engine m"
    assert known.remedy_in(Path("a b")) == "Build it again: flowcut engine m --out 'a b'"
    rooted = replace(known, command="flowcut engine m --out-root 'x y' --tokens 9")
    assert rooted.remedy_in(Path("a b")) == "Build it again: flowcut engine m --tokens 9 --out 'a b'"
    told = replace(known, command="flowcut engine m --out there")
    assert told.remedy_in(Path("here")) == told.remedy
    assert MANIFEST_OF_7B.remedy_in(Path("here")) == "Build it again."


def test_what_was_only_added_is_to_be_moved_out(target: Path) -> None:
    manifest = build(target, graph=b"x")
    (target / "notes.txt").write_text("mine")
    assert what_differs(target, manifest, check_files(target, manifest)).endswith("Move what was added out of it.")
    (target / "graph").unlink()
    assert what_differs(target, manifest, check_files(target, manifest)).endswith("Build it again.")


def test_a_manifest_that_is_no_plain_file_is_refused(target: Path) -> None:
    build(target)
    path, elsewhere = target / MANIFEST, target.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)
    with pytest.raises(EngineError, match=r"manifest\.json must be .*, got: a symbolic link, not a plain file"):
        read_manifest(target)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(EngineError, match="got: a pipe, not a plain file"):
        read_manifest(target)
    with pytest.raises(EngineError, match="Name a new or empty directory with --out"):
        build(target)
    path.unlink()
    path.mkdir()
    with pytest.raises(EngineError, match="got: a folder, not a plain file"):
        read_manifest(target)


def test_gigabytes_that_have_the_manifests_name_are_not_read(target: Path) -> None:
    build(target)
    with (target / MANIFEST).open("r+b") as file:
        file.truncate(100 << 30)  # of which the disk holds nothing
    with pytest.raises(EngineError, match=rf"content must be at most {1 << 20} bytes, got {100 << 30}"):
        read_manifest(target)


def test_text_does_not_depend_on_the_order_of_insertion() -> None:
    reordered = replace(MANIFEST_OF_7B, schedule=dict(reversed(MANIFEST_OF_7B.schedule.items())))
    assert reordered.to_json() == MANIFEST_OF_7B.to_json()
    assert list(json.loads(reordered.to_json())) == sorted(json.loads(reordered.to_json()))


def test_unknown_keys_are_named_wherever_they_are() -> None:
    with pytest.raises(EngineError, match="unknown keys: colour, shape"):
        Manifest.from_json(changed(lambda d: d.update(shape=1, colour=2)))
    with pytest.raises(EngineError, match=r"unknown keys: geometry\.vision\.colour"):
        Manifest.from_json(changed(lambda d: d["geometry"]["vision"].update(colour=2)))


def test_missing_keys_are_named_wherever_they_are() -> None:
    with pytest.raises(EngineError, match="missing keys: model, tokens"):
        Manifest.from_json(changed(lambda d: [d.pop("tokens"), d.pop("model")]))
    with pytest.raises(EngineError, match=r"missing keys: limits\.max_batch"):
        Manifest.from_json(changed(lambda d: d["limits"].pop("max_batch")))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(tokens="64"), "tokens must be int, got '64'"),
        (lambda d: d.update(tokens=True), "tokens must be int, got True"),
        (lambda d: d.update(tokens=577), r"tokens must be in 1\.\.576, got 577"),
        (lambda d: d.update(weights="trained"), "weights must be one of 'checkpoint', 'random', got 'trained'"),
        (lambda d: d.update(backend="ort"), "compute_capabilities must be empty for ort"),
        (lambda d: d.update(compute_capabilities=[]), r"must be what the engines were compiled for \(rtx\), got \[\]"),
        (lambda d: d.update(versions=["3.11"]), "versions must be"),
        (lambda d: d["versions"].update(python=3.11), r"versions\.python must be str, got 3\.11"),
        (lambda d: d.update(compute_capabilities=[8.0]), r"compute_capabilities\[0\] must be str"),
        (lambda d: d["limits"].update(max_batch=0), "max_batch must be at least 1"),
        (lambda d: d["geometry"]["text"].update(hidden_size=4095), "hidden_size must be a multiple"),
        (lambda d: d["schedule"].pop("counts"), "schedule must have the keys"),
        (lambda d: d["schedule"].update(counts=[3]), "schedule.counts must fall from at most 576 to exactly 64"),
        (lambda d: d["calibration"].pop("pictures"), "calibration must be empty or have sha256 and pictures, got"),
        (lambda d: d["calibration"].update(pictures="32"), "calibration must be empty or have sha256 and pictures"),
        (lambda d: d.update(files={"a": {"sha256": "0" * 63, "bytes": 1}}), "sha256 must be 64"),
        (lambda d: d.update(files={"a": {"sha256": "0" * 64, "bytes": -1}}), "bytes must be 0 or more"),
    ],
)
def test_values_that_do_not_fit_are_refused(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    with pytest.raises(EngineError, match=message) as caught:
        Manifest.from_json(changed(change))
    assert "\n" not in str(caught.value)


def test_construction_checks_what_types_cannot() -> None:
    with pytest.raises(ConfigError, match="tokens must be in"):
        replace(MANIFEST_OF_7B, tokens=0)
    with pytest.raises(ConfigError, match="llm_tokens must be at least 1 or null, got 0"):
        replace(MANIFEST_OF_7B, llm_tokens=0)
    shallow = replace(MANIFEST_OF_7B.geometry, text=replace(MANIFEST_OF_7B.geometry.text, num_hidden_layers=2))
    with pytest.raises(ConfigError, match="decoder_layers must be at least 3"):
        replace(MANIFEST_OF_7B, geometry=shallow)


@given(st.lists(LEAVES, max_size=3) | st.dictionaries(KEYS, LEAVES, max_size=4) | LEAVES)
def test_any_json_is_refused_with_an_engine_error(data: object) -> None:
    with pytest.raises(EngineError):
        Manifest.from_json(json.dumps(data))


@given(KEYS, LEAVES | st.lists(LEAVES, max_size=3))
def test_any_value_of_the_wrong_kind_is_an_engine_error_or_a_manifest(key: str, value: object) -> None:
    try:
        Manifest.from_json(changed(lambda d: d.update({key: value})))
    except EngineError as error:
        assert key in str(error) or key == "schema"  # noqa: PT017


@given(PLACES, LEAVES | HUGE | HUGE.map(lambda number: -number) | DEPTHS.map(nested).map(Raw))
def test_any_value_anywhere_is_an_engine_error_or_a_manifest(
    tmp_path_factory: pytest.TempPathFactory, place: tuple[str | int, ...], value: object
) -> None:
    """Of a file, which has to be canonical text too."""
    data = json.loads(MANIFEST_OF_7B.to_json())
    inner: Any = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = "HERE" if isinstance(value, Raw) else value
    text = json.dumps(data, indent=2, sort_keys=True)
    directory = tmp_path_factory.mktemp("any")
    (directory / MANIFEST).write_text(text.replace('"HERE"', str(value)) + "\n", encoding="ascii")
    with pytest.raises(EngineError) as caught:  # sha256 fits none
        read_manifest(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("depth", [300, 500, 700, 900])
def test_depth_that_json_allows_is_refused_by_name(target: Path, depth: int) -> None:
    """As an origin of a schedule, which may hold anything."""
    build(target)
    text = (target / MANIFEST).read_text(encoding="ascii")
    text = text.replace('"schedule": {', f'"schedule": {{\n    "calibration": {nested(depth)},')
    (target / MANIFEST).write_text(text, encoding="ascii")
    with pytest.raises(EngineError, match=r"manifest\.json: content must be as it was written, byte for byte, got"):
        read_manifest(target)


def test_a_number_beyond_floats_is_refused_by_name(target: Path) -> None:
    build(target)
    text = (target / MANIFEST).read_text(encoding="ascii").replace("18.25", "1" + "0" * 400)
    (target / MANIFEST).write_text(text, encoding="ascii")
    with pytest.raises(EngineError, match="content must be as it was written, byte for byte, got a number or a depth"):
        read_manifest(target)


def test_the_first_line_that_differs_is_named(target: Path) -> None:
    build(target)
    path = target / MANIFEST
    lines = path.read_text(encoding="ascii").splitlines()
    number = next(i for i, line in enumerate(lines, 1) if '"seed"' in line)
    lines[number - 1] += " "
    path.write_text("\n".join(lines) + "\n", encoding="ascii")
    with pytest.raises(EngineError, match=rf"got other text from line {number} on\."):
        read_manifest(target)


def test_another_schema_is_refused_before_its_keys_are_looked_at(target: Path) -> None:
    with pytest.raises(
        EngineError, match=f"schema must be {SCHEMA}, got {SCHEMA + 1}: the directory was built by another version"
    ):
        Manifest.from_json(json.dumps({"schema": SCHEMA + 1, "new": 1}))


def test_a_directory_that_is_no_engine_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="absent must be an engine directory, got none"):
        read_manifest(tmp_path / "absent")
    (tmp_path / "file").touch()
    with pytest.raises(EngineError, match="got none"):
        read_manifest(tmp_path / "file")
    with pytest.raises(EngineError, match=r"got one without manifest\.json"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b"null", b"[" * 100_000])
def test_a_broken_manifest_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(EngineError, match=r"manifest\.json.*Build it again"):
        read_manifest(tmp_path)


def test_every_kind_of_difference_is_listed(target: Path) -> None:
    manifest = build(target, gone=b"a", grown=b"b", flipped=b"c", same=b"d")
    assert check_files(target, manifest) == []
    (target / "gone").unlink()
    (target / "grown").write_bytes(b"bb")
    (target / "flipped").write_bytes(b"C")
    (target / "deep").mkdir()
    (target / "deep" / "new").touch()
    lines = check_files(target, manifest)
    assert [line.split(":")[0] for line in lines] == ["deep/new", "flipped", "gone", "grown"]
    assert lines[0] == "deep/new: not in the manifest"
    assert hashlib.sha256(b"C").hexdigest() in lines[1]
    assert lines[2:] == ["gone: missing", "grown: expected 1 bytes, got 2"]


def test_a_manifest_cannot_point_outside_its_directory(target: Path) -> None:
    record = FileRecord("0" * 64, 1)
    for name in ("../secret", "/etc/passwd", "a/../../secret", "./a", "a//b", "a/", "", ".", "a\0b", MANIFEST):
        with pytest.raises(ConfigError, match="files must be named by paths inside the directory, got"):
            replace(MANIFEST_OF_7B, files={name: record})


def test_a_message_names_no_more_than_can_be_read(target: Path) -> None:
    manifest = build(target)
    message = what_differs(target, manifest, [f"{i}: missing" for i in range(9)])
    assert message == (
        f"{target} must hold what was built there, got 0: missing; 1: missing; 2: missing; 3: missing; 4: missing "
        "and 4 more. Build it again."
    )
    assert "and 0 more" not in what_differs(target, manifest, ["0: missing"] * 5)


def test_an_engine_directory_is_replaced(target: Path) -> None:
    build(target, old=b"1")
    build(target, new=b"2")
    assert {p.name for p in target.iterdir()} == {"new", MANIFEST}


def test_an_engine_directory_of_another_schema_is_replaced(target: Path) -> None:
    target.mkdir()
    (target / MANIFEST).write_text('{"schema": 99, "files": {"x": {}}}')
    (target / "x").touch()
    build(target, new=b"2")
    assert {p.name for p in target.iterdir()} == {"new", MANIFEST}


def test_an_empty_directory_is_a_fine_target(target: Path) -> None:
    target.mkdir()
    build(target, new=b"2")
    assert (target / "new").exists()


def foreign(directory: Path) -> None:
    directory.mkdir()
    (directory / "thesis.tex").write_text("mine")


def web_page(directory: Path) -> None:
    foreign(directory)
    (directory / MANIFEST).write_text('{"name": "a web page"}')


def engine_and_notes(directory: Path) -> None:
    build(directory, engine=b"1")
    (directory / "thesis.tex").write_text("mine")


def test_somebodys_empty_folder_is_not_replaced(target: Path) -> None:
    build(target, engine=b"1")
    (target / "for\x1bwhat").mkdir()
    with pytest.raises(EngineError, match=r"must hold only what a build wrote, got also for\\x1bwhat\."):
        build(target, new=b"2")
    assert sorted(p.name for p in target.iterdir()) == ["engine", "for\x1bwhat", MANIFEST]


@pytest.mark.parametrize("prepare", [foreign, web_page, engine_and_notes])
def test_somebody_elses_files_are_never_replaced(target: Path, prepare: Callable[[Path], None]) -> None:
    prepare(target)
    with pytest.raises(EngineError, match="Name a new or empty directory with --out"):
        build(target, new=b"2")
    assert (target / "thesis.tex").read_text() == "mine"
    assert [p.name for p in target.parent.iterdir()] == ["engine"]


def test_a_file_is_never_replaced(target: Path) -> None:
    target.write_text("mine")
    with pytest.raises(EngineError, match="must be a directory, got a file"):
        build(target)
    assert target.read_text() == "mine"


def test_timestamp_is_utc() -> None:
    assert datetime.fromisoformat(timestamp()).utcoffset().total_seconds() == 0  # type: ignore[union-attr]


def test_versions_name_what_is_installed_and_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import metadata

    found = installed_versions()
    assert found["numpy"] == __import__("numpy").__version__
    assert {"python", "flowcut-trt"} <= found.keys()
    monkeypatch.setattr(metadata, "version", lambda name: (_ for _ in ()).throw(metadata.PackageNotFoundError(name)))
    assert installed_versions().keys() == {"python", "flowcut-trt"}
