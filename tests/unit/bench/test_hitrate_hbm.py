"""The HBM tier's replay against `engram_client.hbm` itself, entry by entry, and its place among the tiers."""

from __future__ import annotations

import numpy as np
import pytest
from tierbench.policy import hbm
from tierbench.policy.hbm import HbmReplay, sets_within, smallest_bytes
from tierbench.policy.product import HELD

torch = pytest.importorskip("torch")

from engram_client.errors import BadRequest  # noqa: E402
from engram_client.hbm import index, replacement  # noqa: E402
from engram_client.hbm.arena import HbmArena, arena_bytes  # noqa: E402
from engram_client.hbm.misses import Lines  # noqa: E402
from engram_client.hbm.operations import Keys  # noqa: E402

RECORD_BYTES = 16
LAYERS, ORDERS = 2, 3


def names_of(random: np.random.Generator, lookups: int, population: int) -> list[np.ndarray]:
    """Look-ups of whole lines, int64 [tokens, ORDERS] each, some keys of which come again and again."""
    drawn = []
    for _ in range(lookups):
        tokens = int(random.integers(1, 90))
        keys = np.minimum(random.pareto(0.6, (tokens, ORDERS)), 1e15).astype(np.int64) % population
        keys[random.random(keys.shape) < 0.3] += int(random.integers(0, 2**62))
        drawn.append(keys)
    return drawn


class Product:
    """The client's tier without a service behind it: what its HbmTable does, on its arena."""

    def __init__(self, sets: int, width: int = ORDERS) -> None:
        budget = arena_bytes(RECORD_BYTES, sets)
        self.arena, self.width = HbmArena(RECORD_BYTES, budget, torch.device("cpu")), width

    def look_up(self, keys: np.ndarray, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Which entries it has, and the lines that it asks the table for."""
        asked = Keys(torch.from_numpy(keys.reshape(-1).copy()), layer * self.width, self.width)
        out = torch.empty((keys.size, RECORD_BYTES), dtype=torch.uint8)
        found = torch.empty(3 + 2 * keys.size, dtype=torch.int64)
        self.arena.lookup_into(asked, out, found)
        pairs = found[1 : 1 + 2 * int(found[0])].view(-1, 2).numpy()
        here = np.ones(keys.size, np.bool_)
        here[pairs[:, 0]] = False
        if not len(pairs):
            return here, np.zeros((0, self.width), np.int64)
        lines = Lines.of(pairs, self.width).ids
        owners = torch.from_numpy(layer * self.width + np.arange(lines.size) % self.width).short()
        records = torch.zeros((lines.size, RECORD_BYTES), dtype=torch.uint8)
        self.arena.admit(torch.from_numpy(lines.reshape(-1).copy()), owners, records)
        return here, lines


@pytest.mark.parametrize(("sets", "population"), [(1, 60), (7, 300), (40, 2_000)])
@pytest.mark.parametrize("seed", [1, 2])
def test_it_holds_what_the_client_holds(sets: int, population: int, seed: int) -> None:
    """Hit by hit, and what is asked of the table, in its order; two tables take turns."""
    drawn = names_of(np.random.default_rng(seed), 60, population)
    keys = np.concatenate([d.reshape(-1) for d in drawn])
    layers = np.arange(len(drawn)) % LAYERS
    owners = np.concatenate(
        [((layer + 1) << 8) + np.arange(d.size) % ORDERS for d, layer in zip(drawn, layers, strict=True)]
    )
    ends = np.cumsum([d.size for d in drawn])
    outcome = np.zeros(keys.size, np.uint8)
    asked, asked_owners, asked_ends, source = HbmReplay(sets, ORDERS, 10**6).look_up(
        keys, owners, ends, outcome
    )
    product, first, start = Product(sets), 0, 0
    for d, layer, end, last in zip(drawn, layers, ends, asked_ends, strict=True):
        held, lines = product.look_up(d, int(layer))
        assert (outcome[start:end] == HELD).tolist() == held.tolist()
        real = lines.reshape(-1) >= 0
        assert asked[first:last].tolist() == lines.reshape(-1)[real].tolist()
        wanted = ((layer + 1) << 8) + np.tile(np.arange(ORDERS), len(lines))[real]
        assert asked_owners[first:last].tolist() == wanted.tolist()
        first, start = int(last), int(end)
    assert 0.05 < (outcome == HELD).mean() < 0.95, "the case tests nothing"
    missed = outcome != HELD
    assert (asked[source[missed]] == keys[missed]).all()
    assert (asked_owners[source[missed]] == owners[missed]).all()
    assert (source[~missed] == -1).all()


def test_rows_are_held_as_records_of_one() -> None:
    random = np.random.default_rng(5)
    drawn = [np.minimum(random.pareto(0.6, (70, 1)), 1e9).astype(np.int64) % 400 for _ in range(40)]
    keys, ends = np.concatenate([d.reshape(-1) for d in drawn]), np.cumsum([d.size for d in drawn])
    outcome = np.zeros(keys.size, np.uint8)
    HbmReplay(8, 1, 10**6).look_up(keys, np.full(keys.size, 1 << 8), ends, outcome)
    product = Product(8, width=1)
    held = np.concatenate([product.look_up(d, 0)[0] for d in drawn])
    assert (outcome == HELD).tolist() == held.tolist()


def test_its_numbers_are_the_clients() -> None:
    for module, names in (
        (index, ("WAYS", "INDEX_BYTES_PER_SET")),
        (replacement, ("ADMISSIONS_PER_SET", "TRIAL_WAYS", "UNREAD", "READ", "MAIN", "MAIN_READ")),
    ):
        for name in names:
            assert getattr(hbm, name) == getattr(module, name), name


@pytest.mark.parametrize("record_bytes", [264, 1280, 2112])
def test_a_budget_holds_as_many_records_as_the_clients(record_bytes: int) -> None:
    for budget in (smallest_bytes(record_bytes), 1 << 20):
        arena = HbmArena(record_bytes, budget, torch.device("cpu"))
        assert arena.slots == hbm.WAYS * sets_within(budget, record_bytes)
    with pytest.raises(BadRequest):
        HbmArena(record_bytes, smallest_bytes(record_bytes) - 1, torch.device("cpu"))
    assert sets_within(smallest_bytes(record_bytes) - 1, record_bytes) < 1
