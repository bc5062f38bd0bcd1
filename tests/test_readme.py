"""What the README tells a newcomer to type is typed here.

A fence that follows the line `<!-- run -->` is run: `sh` by bash, `python` as a script, all in the
order of the page, in one fresh folder, with this environment's commands on PATH.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.source_tree import ROOT

RUNNABLE = re.compile(r"^<!-- run -->\n+```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
MARK = re.compile(r"^\s*<!--\s*run\b.*$", re.MULTILINE)
TIMEOUT_S = 240  # only a net under a command that hangs


@dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int

    def command(self) -> list[str]:
        interpreters = {"sh": ["bash", "-euo", "pipefail", "-c"], "python": [sys.executable, "-c"]}
        assert self.language in interpreters, (
            f"README.md:{self.line}: cannot run a fence of {self.language!r}"
        )
        return [*interpreters[self.language], self.text]


def blocks(page: str) -> list[Block]:
    found = [Block(m[1], m[2], page.count("\n", 0, m.start(2)) + 1) for m in RUNNABLE.finditer(page)]
    marks = len(MARK.findall(page))
    assert len(found) == marks, f"{marks} marks `<!-- run -->`, but {len(found)} of them stand before a fence"
    return found


def run_all(page: str, folder: Path) -> None:
    """Stops at the first block that fails, with its line and output."""
    environ = dict(os.environ, HOME=str(folder), XDG_CACHE_HOME=os.environ.get("XDG_CACHE_HOME") or _cache())
    environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environ['PATH']}"
    for block in blocks(page):
        child = subprocess.run(
            block.command(),
            cwd=folder,
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=TIMEOUT_S,
            check=False,
        )
        if child.returncode:
            pytest.fail(f"README.md:{block.line}: exit code {child.returncode}\n{block.text}\n{child.stdout}")


def _cache() -> str:
    """Compiled kernels may be shared with the rest of the test run; nothing else of HOME is."""
    return str(Path.home() / ".cache")


def test_the_readme_runs(tmp_path: Path) -> None:
    page = (ROOT / "README.md").read_text()
    assert blocks(page), "README.md marks nothing with <!-- run -->"
    run_all(page, tmp_path)


def test_blocks_run_in_order_in_one_folder(tmp_path: Path) -> None:
    page = (
        "<!-- run -->\n```sh\necho one > a\n```\n"
        "```sh\nexit 1\n```\n"
        "<!-- run -->\n\n```python\nopen('b', 'w').write(open('a').read() + 'two')\n```\n"
    )
    run_all(page, tmp_path)
    assert (tmp_path / "b").read_text() == "one\ntwo"


def test_a_failing_block_is_named(tmp_path: Path) -> None:
    page = "# A\n\n<!-- run -->\n```sh\necho said; false; echo never\n```\n"
    with pytest.raises(pytest.fail.Exception, match=r"README\.md:5: exit code 1") as caught:
        run_all(page, tmp_path)
    assert "said\n" in str(caught.value)
    assert "\nnever" not in str(caught.value)


@pytest.mark.parametrize("page", ["<!-- run -->\nNo fence.\n", "<!-- run: -->\n```sh\ntrue\n```\n"])
def test_a_mark_without_a_fence_is_an_error(page: str) -> None:
    with pytest.raises(AssertionError, match="stand before a fence"):
        blocks(page)
