"""The kernel cache: another folder when any kernel source changes, and never an old result."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import pytest

import engram_client
from engram_client import jit

CALLEE = """
from engram_client.jit import {decorator}

@{decorator}
def step(x):
    return x + {amount}
"""
CALLER = """
from engram_client.hashing.callee import step
from engram_client.jit import kernel

@kernel
def run(x):
    return 10 * step(x)
"""
PROGRAM = "from engram_client.hashing.caller import run; print(run(1), len(run.stats.cache_hits))"


class TestDigest:
    def sources(self, folder: Path) -> list[Path]:
        for name, text in (("a.py", "A"), ("b.py", "B")):
            (folder / name).write_text(text)
        return [folder / "a.py", folder / "b.py"]

    def test_same_sources_same_digest(self, tmp_path: Path) -> None:
        sources = self.sources(tmp_path)
        assert jit.sources_digest(sources) == jit.sources_digest(sources)
        assert len(jit.sources_digest(sources)) == 16

    def test_a_changed_file_changes_it(self, tmp_path: Path) -> None:
        sources = self.sources(tmp_path)
        before = jit.sources_digest(sources)
        sources[1].write_text("C")
        assert jit.sources_digest(sources) != before

    def test_a_file_more_or_a_renamed_one_changes_it(self, tmp_path: Path) -> None:
        sources = self.sources(tmp_path)
        renamed = shutil.copy(sources[1], tmp_path / "c.py")
        digests = {
            jit.sources_digest(sources),
            jit.sources_digest(sources[:1]),
            jit.sources_digest([sources[0], renamed]),
        }
        assert len(digests) == 3

    def test_another_compiler_changes_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sources = self.sources(tmp_path)
        before = jit.sources_digest(sources)
        monkeypatch.setattr(jit.numba, "__version__", "0.0.1")
        assert jit.sources_digest(sources) != before

    def test_checked_indices_change_it(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sources = self.sources(tmp_path)
        monkeypatch.setattr(jit.numba.config, "BOUNDSCHECK", None)
        before = jit.sources_digest(sources)
        monkeypatch.setattr(jit.numba.config, "BOUNDSCHECK", 1)
        assert jit.sources_digest(sources) != before

    def test_every_folder_that_may_use_numba_is_covered(self) -> None:
        covered = jit.kernel_sources()
        assert Path(jit.__file__) in covered
        folders = {"/".join(path.parent.parts[-2:]) for path in covered}
        assert folders >= {
            "engram_client/hashing",
            "engram_client/arena",
            "engram_client/kernels",
            "tierstore/kernels",
        }


class TestFolder:
    @pytest.fixture(autouse=True)
    def forget_the_folder(self) -> Iterator[None]:
        jit.cache_folder.cache_clear()
        yield
        jit.cache_folder.cache_clear()

    def test_chosen_by_the_environment(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TIERSTORE_KERNEL_CACHE", str(tmp_path / "here"))
        folder = jit.cache_folder()
        assert folder == tmp_path / "here" / jit.sources_digest(jit.kernel_sources())
        assert folder.is_dir()

    def test_else_in_the_users_cache(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("TIERSTORE_KERNEL_CACHE", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert jit.cache_root() == tmp_path / "tierstore" / "kernels"

    def test_one_warning_where_it_cannot_be_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("TIERSTORE_KERNEL_CACHE", str(tmp_path / "file" / "cache"))
        with pytest.warns(UserWarning, match="kernels compile anew in each process"):
            assert jit.cache_folder() is None
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert jit.cache_folder() is None
            assert jit.kernel(lambda x: x + 1)(1) == 2  # compiles all the same


class MeetsAnother(jit.KernelFiles):
    """Files of a process that has looked at the index before anybody saved anything.

    `other` is such a one too, and saves B just before this one writes its file number `at`.
    """

    def __init__(self, folder: Path, at: int = -1, other: MeetsAnother | None = None) -> None:
        super().__init__(str(folder), "kernel", "stamp")
        self._at, self._other = at, other

    def _load_index(self) -> dict[str, str]:
        return {}

    @contextmanager
    def _open_for_write(self, path: str) -> Iterator[IO[bytes]]:
        self._at, other = self._at - 1, self._other
        if self._at < 0 and other is not None:
            self._other = None
            other.save("B", "code of B")
        with super()._open_for_write(path) as file:
            yield file


class TestKernelFiles:
    def files(self, folder: Path) -> jit.KernelFiles:
        return jit.KernelFiles(str(folder), "kernel", "stamp")

    @pytest.mark.parametrize("at", [0, 1])
    def test_two_processes_that_compile_at_once_never_get_each_others_code(
        self, tmp_path: Path, at: int
    ) -> None:
        MeetsAnother(tmp_path, at, MeetsAnother(tmp_path)).save("A", "code of A")
        assert self.files(tmp_path).load("A") in ("code of A", None)
        assert self.files(tmp_path).load("B") in ("code of B", None)

    @pytest.mark.parametrize("left", [0, 40])
    @pytest.mark.parametrize("which", ["kernel.nbi", "kernel.*.nbc"])
    def test_a_file_that_was_cut_is_made_anew(self, tmp_path: Path, which: str, left: int) -> None:
        self.files(tmp_path).save("A", "code of A" * 10)
        (path,) = tmp_path.glob(which)
        path.write_bytes(path.read_bytes()[:left])
        assert self.files(tmp_path).load("A") is None
        self.files(tmp_path).save("A", "code of A")
        assert self.files(tmp_path).load("A") == "code of A"

    def test_a_disk_that_takes_nothing_is_said(self, tmp_path: Path) -> None:
        with pytest.warns(UserWarning, match="kernels compile anew in each process"):
            self.files(tmp_path / "gone").save("A", "code of A")

    def test_each_specialisation_comes_back(self, tmp_path: Path) -> None:
        for key in "AB":
            self.files(tmp_path).save(key, f"code of {key}")
        assert [self.files(tmp_path).load(key) for key in "ABC"] == ["code of A", "code of B", None]


class TestFreshProcess:
    """A small package with one kernel that calls another one in another file."""

    @pytest.fixture
    def root(self, tmp_path: Path) -> Path:
        hashing = tmp_path / "engram_client" / "hashing"
        hashing.mkdir(parents=True)
        for folder in (hashing, hashing.parent):
            (folder / "__init__.py").write_text("")
        shutil.copy(Path(engram_client.__file__).with_name("jit.py"), hashing.parent)
        (hashing / "caller.py").write_text(CALLER)
        return tmp_path

    def run(self, root: Path, amount: int, decorator: str) -> tuple[int, int]:
        """The kernel's result in a process of its own, and how often it came from the cache."""
        callee = root / "engram_client" / "hashing" / "callee.py"
        callee.write_text(CALLEE.format(amount=amount, decorator=decorator))
        environment = {
            **os.environ,
            "PYTHONPATH": str(root),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TIERSTORE_KERNEL_CACHE": str(root / "cache"),
        }
        command = [sys.executable, "-c", PROGRAM]
        output = subprocess.run(
            command, cwd=root, env=environment, capture_output=True, text=True, check=True, timeout=120
        )
        result, hits = output.stdout.split()
        return int(result), int(hits)

    @pytest.mark.parametrize("decorator", ["kernel", "inline_kernel"])
    def test_a_changed_callee_in_another_file_is_compiled_in(self, root: Path, decorator: str) -> None:
        assert self.run(root, 1, decorator) == (20, 0)
        assert self.run(root, 1, decorator) == (20, 1)  # the cache is in use
        assert self.run(root, 5, decorator) == (60, 0)
        assert self.run(root, 1, decorator) == (20, 1)  # and the old sources still find theirs
        assert len(list((root / "cache").iterdir())) == 2
