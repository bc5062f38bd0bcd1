"""The kernels of the client's device paths under Triton's interpreter, beside their twins."""

from __future__ import annotations

from tests.support.interpreted_checks import interpret


def test_trials_and_fused_kernels() -> None:
    assert interpret("groups", "golden_gate", "decoding").split()[1::2] == [
        "groups",
        "golden_gate",
        "decoding",
    ]
