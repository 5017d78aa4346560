"""The manifest says what an engine directory is, and every change to the directory shows."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flowcut.artifacts import (
    MANIFEST,
    SCHEMA,
    FileRecord,
    Manifest,
    check_files,
    installed_versions,
    publish,
    read_manifest,
    timestamp,
    write_manifest,
)
from flowcut.config import LlavaConfig, TextConfig, VisionConfig
from flowcut.contract import Limits
from flowcut.errors import ConfigError, EngineError

MANIFEST_OF_7B = Manifest(
    source="llava-1.5-7b",
    model="llava-1.5-7b",
    weights="random",
    note="random weights: for timing only",
    source_sha256="",
    geometry=LlavaConfig(VisionConfig(), TextConfig(vocab_size=32064), eos_token_ids=(2, 7)),
    tokens=64,
    llm_tokens=16,
    schedule={"kind": "static", "keep": [576, 300, 64]},
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

LEAVES = st.none() | st.booleans() | st.integers() | st.sampled_from(["", "rtx", "x"])
KEYS = st.sampled_from(sorted(json.loads(MANIFEST_OF_7B.to_json())))


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
    assert replace(written, files={}) == MANIFEST_OF_7B


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
        (lambda d: d.update(versions=["3.11"]), "versions must be"),
        (lambda d: d["versions"].update(python=3.11), r"versions\.python must be str, got 3\.11"),
        (lambda d: d.update(compute_capabilities=[8.0]), r"compute_capabilities\[0\] must be str"),
        (lambda d: d["limits"].update(max_batch=0), "max_batch must be at least 1"),
        (lambda d: d["geometry"]["text"].update(hidden_size=4095), "hidden_size must be a multiple"),
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
    build(target)
    secret = target.parent / "secret"
    secret.write_bytes(b"x")
    record = FileRecord(hashlib.sha256(b"x").hexdigest(), 1)
    assert check_files(target, replace(MANIFEST_OF_7B, files={"../secret": record})) == ["../secret: missing"]


def test_files_larger_than_one_read_are_hashed_whole(tmp_path: Path) -> None:
    content = bytes(range(256)) * 40_000
    (tmp_path / "big").write_bytes(content)
    record = write_manifest(tmp_path, MANIFEST_OF_7B).files["big"]
    assert record == FileRecord(hashlib.sha256(content).hexdigest(), len(content))


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


@pytest.mark.parametrize("prepare", [foreign, web_page, engine_and_notes])
def test_somebody_elses_files_are_never_replaced(target: Path, prepare: Callable[[Path], None]) -> None:
    prepare(target)
    with pytest.raises(EngineError, match="Remove it or build into another directory"):
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
