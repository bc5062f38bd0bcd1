"""Sharing one DRAM budget among arenas, each of which holds records of one size.

Within an arena tables, layers and orders compete record by record. Between arenas the budget moves
to where a byte saves more reads. What a byte would save is measured, not guessed: a set remembers
as many records as it holds after it has let them go, so a record that comes back from among them
is one that an arena of twice the size would have had. Weighted by the pages that bringing a record
takes, and divided by the bytes of the arena, this is the worth of its next byte. Where hits grow
with the logarithm of the size, as they nearly do on text, it is right for giving up as for gaining.

A step moves bytes from the arena where they are worth least to the one where they are worth most:
a tenth of the budget at most, no more than doubles the one or halves the other, and nothing where it
is not worth half as much again, or saves less than a hundredth of the pages read. So shares come to
rest, and measuring goes on in a new arena before the next step.
"""

from __future__ import annotations

from dataclasses import dataclass

from engram_client.arena.layout import ArenaGeometry
from engram_client.errors import ConfigError

STEP_SHARE = 10  # at most this part of the budget moves at once
LEAST_SHARE = 100  # and this part of it an arena keeps
RETURNED_MIN = 256  # fewer records that came back prove nothing
GAIN_SHARE = 100  # a step saves at least this part of the pages read


@dataclass(frozen=True)
class Tally:
    """What an arena did in some period; `bytes` is its share of the budget meanwhile."""

    bytes: int
    returned: int  # records admitted that an arena of twice the size would have had
    admitted: int  # all records
    pages: int  # read for them

    @property
    def worth(self) -> float:
        """Pages that one byte more would have saved."""
        return self.returned * self.pages / max(1, self.admitted) / self.bytes


def next_shares(tallies: dict[int, Tally]) -> dict[int, int] | None:
    """Bytes for each record size after one step; None where nothing is to be moved."""
    budget_bytes = sum(t.bytes for t in tallies.values())
    least = {r: max(ArenaGeometry(1, r).total_bytes, budget_bytes // LEAST_SHARE) for r in tallies}
    givers = [r for r in tallies if tallies[r].bytes > least[r]]
    if not givers:
        return None
    taker = max(tallies, key=lambda r: tallies[r].worth)
    giver = min(givers, key=lambda r: tallies[r].worth)
    more, less = tallies[taker], tallies[giver]
    step = min(budget_bytes // STEP_SHARE, more.bytes, less.bytes // 2, less.bytes - least[giver])
    saved = (more.worth - less.worth) * step
    pages = sum(t.pages for t in tallies.values())
    if more.returned < RETURNED_MIN or more.worth < 1.5 * less.worth or saved * GAIN_SHARE < pages:
        return None
    shares = {r: t.bytes for r, t in tallies.items()}
    shares[taker] += step
    shares[giver] -= step
    return shares


def share_budget(budget_bytes: int, weights: dict[int, int]) -> dict[int, int]:
    """Bytes for each record size: one set, and of the rest a share by its weight.

    Raises ConfigError where there is not enough for one set of each.
    """
    smallest = smallest_shares(weights)
    spare, total = budget_bytes - sum(smallest.values()), max(1, sum(weights.values()))
    if spare < 0:
        sizes = ", ".join(map(str, sorted(weights)))
        raise ConfigError(
            f"$.dram.budget_bytes: expected at least {sum(smallest.values())} bytes for records of "
            f"{sizes} bytes, got {budget_bytes}; raise the budget, or set it to 0 to cache nothing"
        )
    return {r: smallest[r] + spare * weight // total for r, weight in weights.items()}


def weights_of(shares: dict[int, int]) -> dict[int, int]:
    """Weights for which `share_budget` gives these shares of the same budget."""
    smallest = smallest_shares(shares)
    return {r: share - smallest[r] for r, share in shares.items()}


def smallest_shares(sizes: dict[int, int]) -> dict[int, int]:
    return {r: ArenaGeometry(1, r).total_bytes for r in sizes}
