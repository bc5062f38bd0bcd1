"""The kernels of hashing, the HBM tier and the client's device paths interpreted, beside their twins."""

from __future__ import annotations

import pytest

from tests.support.interpreted_checks import interpret

pytest.importorskip("triton")


def test_trials_and_what_kernels_do() -> None:
    """All in one child: half of the time is its imports."""
    checks = ("groups", "golden_gate", "decoding", "hashing_and_hbm")
    assert interpret(*checks).split()[1::2] == list(checks)
