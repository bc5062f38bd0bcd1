"""The journal of a pack: whole lines are believed, torn ones are cut off, foreign ones are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from engram_client.errors import FormatError
from tierstore.format.journal import Journal

IDENTITY = {"uuid": "ab" * 16, "leaf_pages": 4}
LEAVES = [bytes([i]) * 16 for i in range(5)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    journal = Journal.open(tmp_path / "journal", IDENTITY)
    journal.append(LEAVES[:2])
    journal.append(LEAVES[2:])
    return tmp_path / "journal"


def test_a_reopened_journal_names_the_same_leaves(path: Path) -> None:
    assert Journal.open(path, IDENTITY).leaves == LEAVES


def test_a_torn_line_ends_the_journal_and_appending_goes_on(path: Path) -> None:
    whole = path.read_bytes()
    last_line = whole.rstrip(b"\n").rfind(b"\n") + 1
    for keep in range(last_line, len(whole)):
        path.write_bytes(whole[:keep])
        journal = Journal.open(path, IDENTITY)
        assert journal.leaves == LEAVES[:2]
        journal.append(LEAVES[2:])
        assert path.read_bytes() == whole


def test_a_changed_byte_ends_the_journal_there(path: Path) -> None:
    whole = bytearray(path.read_bytes())
    whole[-20] ^= 1
    path.write_bytes(whole)
    assert Journal.open(path, IDENTITY).leaves == LEAVES[:2]


def test_a_journal_whose_first_line_is_torn_begins_anew(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:30])
    assert Journal.open(path, IDENTITY).leaves == []
    assert Journal.open(path, IDENTITY).leaves == []


def test_a_journal_of_another_table_is_refused(path: Path) -> None:
    with pytest.raises(FormatError, match="belongs to another packing"):
        Journal.open(path, IDENTITY | {"uuid": "cd" * 16})
