"""Where the DRAM budget lies, over restarts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tierstore.store.balance import Balance, known_weights
from tierstore.tiers.counters import Counters
from tierstore.tiers.dram import DramTier

SIZES = {256: 10, 2048: 30}


class MovedOnce(DramTier):
    """Moves at the first step and never again."""

    def balance(self) -> bool:
        if self.weights == {256: 7, 2048: 5}:
            return False
        self.weights = {256: 7, 2048: 5}
        return True


def test_shares_are_found_again_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "warm" / "shares.json"
    balance = Balance(MovedOnce(1 << 20, SIZES, Counters()), path, 0)
    assert known_weights(path, SIZES) == SIZES
    balance.step()
    assert known_weights(path, SIZES) == {256: 7, 2048: 5}
    path.unlink()
    balance.step()
    assert not path.exists(), "nothing moved, nothing is written"


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"256": 1}', '{"256": 1, "2048": -1}', '{"256": 0, "2048": 0}', '{"a": 1}']
)
def test_shares_that_do_not_fit_are_not_used(tmp_path: Path, text: str) -> None:
    path = tmp_path / "shares.json"
    path.write_text(text)
    assert known_weights(path, SIZES) == SIZES


def test_a_folder_that_cannot_be_written_costs_only_the_memory(tmp_path: Path) -> None:
    (tmp_path / "warm").write_text("in the way")
    tier = MovedOnce(1 << 20, SIZES, Counters())
    Balance(tier, tmp_path / "warm" / "shares.json", 0).step()
    assert tier.weights == {256: 7, 2048: 5}


def test_closing_ends_the_thread() -> None:
    balance = Balance(DramTier(1 << 20, SIZES, Counters()), Path("unused"), 3600)
    balance.close()
    assert balance._thread is not None
    assert not balance._thread.is_alive()
