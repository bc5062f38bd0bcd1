"""Every kernel of hashing and of the HBM tier, interpreted on CPU tensors, does what its twin does."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.source_tree import ROOT

pytest.importorskip("triton")


def test_kernels_do_what_their_twins_do() -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'bench'}"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.support.hbm_interpreted"]
    run = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (run.returncode, run.stdout) == (0, "interpreted\n"), run.stderr[-4000:]
