"""What a run leaves for the next, whatever ended it."""

from __future__ import annotations

from pathlib import Path

import pytest

from calib.journal import Journal
from flowcut.errors import EngineError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Of a journal with two results."""
    journal = Journal(tmp_path / ".out.partial", "inputs")
    journal.add("a", {"kept": ["ff"]})
    journal.add("b", {"kept": ["f0"], "cosine": 0.1 + 0.2})
    journal.close()
    return tmp_path / ".out.partial"


def test_results_are_there_again(path: Path) -> None:
    journal = Journal(path, "inputs")
    assert len(journal) == 2
    assert journal.get("a") == {"key": "a", "kept": ["ff"]}
    assert journal.get("b") == {"key": "b", "kept": ["f0"], "cosine": 0.1 + 0.2}
    assert journal.get("c") is None


def test_results_of_other_inputs_are_not(path: Path) -> None:
    assert len(Journal(path, "other inputs")) == 0
    assert len(Journal(path, "inputs")) == 0, "the journal was begun anew"


@pytest.mark.parametrize("cut", range(1, 12))
def test_a_line_that_was_cut_is_ignored(path: Path, cut: int) -> None:
    path.write_bytes(path.read_bytes()[:-cut])
    journal = Journal(path, "inputs")
    assert journal.get("a") == {"key": "a", "kept": ["ff"]}
    assert (journal.get("b") is None) == (cut > 1)  # without its newline alone it is whole
    journal.add("c", {"kept": ["1"]})
    assert Journal(path, "inputs").get("c") == {"key": "c", "kept": ["1"]}


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"[]\n", b'{"inputs": "inputs"', b'"text"\n{}\n'], ids=repr)
def test_a_file_that_is_no_journal_is_replaced(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    assert len(Journal(path, "inputs")) == 0


def test_nothing_is_left_when_done(path: Path) -> None:
    Journal(path, "inputs").remove()
    assert list(path.parent.iterdir()) == []


def test_an_absent_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="must be a directory"):
        Journal(tmp_path / "nowhere" / ".out.partial", "inputs")
