"""Processes that train and commit, killed at random moments; what they leave is opened by others."""

from __future__ import annotations

import subprocess
import sys


def test_what_a_killed_trainer_leaves_is_a_committed_step() -> None:
    command = [sys.executable, "-m", "tierstore.testing.crashes", "--crashes", "0", "--kills", "3"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 processes killed"), done.stdout
