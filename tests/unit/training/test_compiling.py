"""Who opens training first on a machine has a child compile, and says so; nobody does afterwards."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tierstore.training import compiling


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(compiling, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(compiling.os, "sched_getaffinity", lambda pid: {0, 1})
    return tmp_path


@pytest.mark.parametrize(("child", "done"), [("pass", True), ("raise SystemExit(3)", False)])
def test_a_child_compiles_once(folder: Path, monkeypatch, caplog, child: str, done: bool) -> None:
    monkeypatch.setattr(compiling, "CHILD", child)
    caplog.set_level(logging.WARNING)
    for _ in range(2):
        with compiling.compiled_beside():
            pass
    assert (folder / compiling.DONE).exists() == done
    assert len([r for r in caplog.records if str(folder) in r.getMessage()]) == (1 if done else 2)


def test_what_is_compiled_is_not_compiled_again(folder: Path, monkeypatch, caplog) -> None:
    (folder / compiling.DONE).touch()
    monkeypatch.setattr(compiling.subprocess, "Popen", None)  # not called
    with compiling.compiled_beside():
        pass
    assert not caplog.records


def test_a_failure_in_the_block_leaves_no_child(folder: Path, monkeypatch) -> None:
    children = []
    popen = compiling.subprocess.Popen
    monkeypatch.setattr(compiling, "CHILD", "import time; time.sleep(60)")
    monkeypatch.setattr(
        compiling.subprocess, "Popen", lambda *a, **k: children.append(popen(*a, **k)) or children[-1]
    )
    with pytest.raises(ValueError, match="of the block"), compiling.compiled_beside():
        raise ValueError("of the block")
    assert children[0].returncode is not None
    assert not (folder / compiling.DONE).exists()


def test_every_kernel_can_be_called_with_nothing() -> None:
    compiling.compile_kernels()
