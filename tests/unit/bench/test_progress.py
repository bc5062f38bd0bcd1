"""Progress is for terminals, of what lasts: nothing on a pipe, nothing of what is soon done."""

from __future__ import annotations

import os
import pty
import select
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from tierbench import progress
from tierbench.progress import byte_progress, clock, count_progress, stage

KINDS = {
    "bytes": lambda: byte_progress("reading", 100),
    "counts": lambda: count_progress("reading", 100),
    "a stage": lambda: stage("reading"),
    "a clock": lambda: clock("reading", 100.0),
}


class Terminal:
    """A pseudo terminal as sys.stderr."""

    def __init__(self) -> None:
        self._read, write = pty.openpty()
        self.file = os.fdopen(write, "w")

    def told(self) -> str:
        """What has been written up to now."""
        self.file.flush()
        found = b""
        while select.select([self._read], [], [], 0)[0]:
            found += os.read(self._read, 1 << 16)
        return found.decode(errors="replace")

    def wait_for(self, word: str) -> None:
        """Returns once `word` has been written; fails after a minute, which is only a net."""
        found = ""
        while word not in found:
            assert select.select([self._read], [], [], 60)[0], f"{word!r} was not shown; {found!r} was"
            found += os.read(self._read, 1 << 16).decode(errors="replace")

    def close(self) -> None:
        self.file.close()
        os.close(self._read)


@contextmanager
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    """No fixture: pytest sets sys.stderr anew between a fixture and its test."""
    found = Terminal()
    monkeypatch.setattr(sys, "stderr", found.file)
    monkeypatch.setenv("TERM", "xterm")
    yield found
    found.close()


@pytest.mark.parametrize("kind", KINDS)
def test_what_lasts_is_shown_though_nothing_advances(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)
    with terminal(monkeypatch) as seen, KINDS[kind]():
        seen.wait_for("reading")
    assert not [t for t in threading.enumerate() if t.name == "progress"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_soon_done_shows_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE_S", 600.0)
    found: AbstractContextManager[Any] = KINDS[kind]()
    with terminal(monkeypatch) as seen:
        with found as advance:
            if advance is not None:
                advance(5)
        assert "reading" not in seen.told()


@pytest.mark.parametrize("kind", KINDS)
def test_a_pipe_gets_nothing(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)
    with open(tmp_path / "log", "w+") as log:
        monkeypatch.setattr(sys, "stderr", log)
        with KINDS[kind]() as advance:
            if advance is not None:
                advance(5)
        assert not [t for t in threading.enumerate() if t.name == "progress"]
        log.seek(0)
        assert log.read() == ""


def test_an_error_goes_through_and_ends_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "PATIENCE_S", 0.0)

    def fail(seen: Terminal) -> None:
        with stage("reading"):
            seen.wait_for("reading")
            raise RuntimeError("the reason")

    with terminal(monkeypatch) as seen, pytest.raises(RuntimeError, match="the reason"):
        fail(seen)
    assert not [t for t in threading.enumerate() if t.name == "progress"]
