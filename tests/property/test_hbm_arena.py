"""The HBM arena on CPU tensors against a model in plain Python, and without a value read back."""

from __future__ import annotations

from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_client.errors import BadRequest
from engram_client.hbm.arena import HbmArena
from engram_client.hbm.index import INDEX_BYTES_PER_SET, Index, rank_in_runs, set_of
from tests.support import hbm_model
from tests.support.hbm_model import WAYS, Model, Name

CPU = torch.device("cpu")
ANY_KEY = st.integers(-(2**63), 2**63 - 1)
FEW_KEYS = st.integers(-3, 60)


def budget(record_bytes: int, sets: int) -> int:
    """Bytes that make an arena of so many sets."""
    return (sets + 1) * (WAYS * record_bytes + INDEX_BYTES_PER_SET)


def made(record_bytes: int, sets: int) -> HbmArena:
    arena = HbmArena(record_bytes, budget(record_bytes, sets), CPU)
    assert arena.slots == sets * WAYS
    return arena


def record_of(name: Name, record_bytes: int) -> bytes:
    """Bytes of nobody else's."""
    random = np.random.default_rng([name[0] % 2**63, name[1]])
    return random.integers(1, 256, record_bytes, np.uint8).tobytes()


def tensors(names: list[Name]) -> tuple[torch.Tensor, torch.Tensor]:
    keys = torch.tensor([key for key, _ in names], dtype=torch.int64)
    return keys, torch.tensor([owner for _, owner in names], dtype=torch.int16)


def as_tensor(records: list[bytes], record_bytes: int) -> torch.Tensor:
    joined = np.frombuffer(b"".join(records), np.uint8).copy()
    return torch.from_numpy(joined).reshape(len(records), record_bytes)


def no_memory(*arguments: Any) -> None:
    raise RuntimeError("no memory")


def look_up(arena: HbmArena, names: list[Name]) -> list[bytes | None]:
    """Records that are here; checks that all else is zeros."""
    out = torch.full((len(names), arena.record_bytes), 0xAA, dtype=torch.uint8)
    missing = arena.lookup_into(*tensors(names), out).tolist()
    found: list[bytes | None] = []
    for row, name, gone in zip(out.numpy(), names, missing, strict=True):
        assert not (gone and name[0] == -1)
        here = not gone and name[0] != -1
        assert here or not row.any()
        found.append(row.tobytes() if here else None)
    return found


def admit(arena: HbmArena, names: list[Name], pinned: bool = False) -> None:
    records = [record_of(name, arena.record_bytes) for name in names]
    arena.admit(*tensors(names), as_tensor(records, arena.record_bytes), pinned=pinned)


NAMES = st.lists(st.tuples(st.one_of(FEW_KEYS, FEW_KEYS, ANY_KEY), st.integers(0, 2)), max_size=90)
STEPS = st.lists(st.tuples(st.sampled_from(["look", "look", "admit", "admit", "pin"]), NAMES), max_size=25)


@settings(max_examples=60)
@given(st.integers(1, 4), st.sampled_from([1, 6, 20, 24]), STEPS)
def test_every_step_is_the_models(sets: int, record_bytes: int, steps: list[tuple[str, list[Name]]]) -> None:
    arena, model = made(record_bytes, sets), Model(sets)
    for action, names in steps:
        if action == "look":
            assert look_up(arena, names) == model.lookup(names)
        else:
            wanted = names[:20] if action == "pin" else names
            admit(arena, wanted, action == "pin")
            model.admit({name: record_of(name, record_bytes) for name in wanted}, action == "pin")
    stats = arena.stats()
    assert {name: stats[f"hbm_{name}"] for name in model.counters} == model.counters
    assert stats["hbm_records"] == len(model.held())
    assert stats["hbm_pinned"] == sum(way.pinned for way in model.held())
    everything = [way.name for way in model.held()]
    assert look_up(arena, everything) == [way.record for way in model.held()]


@settings(max_examples=60)
@given(st.integers(1, 4), st.integers(1, 6), STEPS)
def test_resizing_keeps_what_fits(before: int, after: int, steps: list[tuple[str, list[Name]]]) -> None:
    """The pinned first, then the most read; and the bytes of all that stays."""
    record_bytes = 8
    arena, model = made(record_bytes, before), Model(before)
    for action, names in steps:
        if action == "look":
            look_up(arena, names)
            model.lookup(names)
        else:
            wanted = names[:20] if action == "pin" else names
            admit(arena, wanted, action == "pin")
            model.admit({name: record_of(name, record_bytes) for name in wanted}, action == "pin")
    arena.resize(budget(record_bytes, after))
    assert arena.slots == after * WAYS
    held = model.held()
    stayed = [record is not None for record in look_up(arena, [way.name for way in held])]
    for number in range(after):
        here = [place for place, way in enumerate(held) if hbm_model.set_of(way.name, after) == number]
        worth = {place: 9 if held[place].pinned else held[place].count for place in here}
        kept, lost = [p for p in here if stayed[p]], [p for p in here if not stayed[p]]
        assert len(kept) == min(WAYS, len(here))
        assert not lost or min(worth[p] for p in kept) >= max(worth[p] for p in lost)
    for way, stays in zip(held, stayed, strict=True):
        assert look_up(arena, [way.name]) == [way.record if stays else None]


@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=30))
def test_ranks(elements: list[tuple[int, bool]]) -> None:
    elements = sorted(elements, key=lambda element: element[0])
    expected = [
        sum(counted for run, counted in elements[:place] if run == elements[place][0])
        for place in range(len(elements))
    ]
    runs = torch.tensor([run for run, _ in elements], dtype=torch.int64)
    counted = torch.tensor([counted for _, counted in elements], dtype=torch.bool)
    if elements:
        assert rank_in_runs(runs, counted).tolist() == expected


@given(arrays.arrays(np.int64, 20, elements=st.integers(0, 2**63 - 1)), st.integers(0, 32767))
def test_sets_are_the_models(keys: np.ndarray, owner: int) -> None:
    for sets in (1, 3, 1000, 2**31 - 1):
        owners = torch.full((20,), owner, dtype=torch.int16)
        expected = [hbm_model.set_of((key, owner), sets) for key in keys.tolist()]
        assert set_of(torch.from_numpy(keys), owners, sets).tolist() == expected


@pytest.mark.parametrize("stride", [1, 2, 3, 1000, 2**20, 2**31, 2**32, 2**36, 2**40 + 1])
def test_orderly_keys_spread_over_the_sets(stride: int) -> None:
    """As evenly as chance would have it: 64 a set, within six standard deviations."""
    sets, each = 1000, 64
    keys = torch.arange(sets * each) * stride
    for owner in (0, 5):
        owners = torch.full_like(keys, owner, dtype=torch.int16)
        loads = torch.bincount(set_of(keys, owners, sets), minlength=sets)
        assert abs(loads - each).max() < 6 * each**0.5


def test_no_value_is_read_back() -> None:
    """Tensors on the meta device hold no values: whoever asks for one, or for a shape by one, fails."""
    arena = HbmArena(24, budget(24, 3), torch.device("meta"))
    keys = torch.empty(50, dtype=torch.int64, device="meta")
    owners, out = keys.to(torch.int16), torch.empty((50, 24), dtype=torch.uint8, device="meta")
    assert arena.lookup_into(keys, owners, out).shape == (50,)
    arena.admit(keys, owners, out)
    arena.admit(keys, owners, out, pinned=True)
    arena.resize(budget(24, 2))
    with pytest.raises(Exception, match="meta"):
        arena.stats()


class TestFailures:
    """What an operation that fails half-way leaves behind is never taken for a record."""

    NAMES = [(key, 0) for key in range(40)]

    def left(self, arena: HbmArena) -> int:
        """Checks that all that is found is right; how much that is."""
        found = look_up(arena, self.NAMES)
        held = [(name, record) for name, record in zip(self.NAMES, found, strict=True) if record is not None]
        assert all(record == record_of(name, 24) for name, record in held)
        return len(held)

    @pytest.mark.parametrize("successes", range(4))
    def test_admission(self, monkeypatch: pytest.MonkeyPatch, successes: int) -> None:
        arena, take, calls = made(24, 2), Index._take, 0

        def failing(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > successes:
                raise RuntimeError("no memory")
            return take(*arguments)

        for _ in range(3):
            admit(arena, self.NAMES[:20])
        with monkeypatch.context() as patch:
            patch.setattr(Index, "_take", failing)
            with pytest.raises(RuntimeError, match="no memory"):
                admit(arena, self.NAMES, pinned=True)
        assert self.left(arena) == 0
        for _ in range(3):
            admit(arena, self.NAMES)  # nothing is pinned or held any more
        assert self.left(arena) > 20

    def test_records_that_do_not_fit(self) -> None:
        arena = made(24, 2)
        admit(arena, self.NAMES[:6])
        with pytest.raises((RuntimeError, IndexError)):
            arena.admit(*tensors(self.NAMES), torch.zeros((3, 24), dtype=torch.uint8))
        assert self.left(arena) == 0

    def test_moving(self, monkeypatch: pytest.MonkeyPatch) -> None:
        arena = made(24, 2)
        admit(arena, self.NAMES[:6])
        held = self.left(arena)
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "index_copy_", no_memory)
            with pytest.raises(BadRequest, match="no memory to move"):
                arena.resize(budget(24, 3))
        assert self.left(arena) == held > 0


class TestBuffers:
    def test_unaligned_out(self) -> None:
        arena, names = made(24, 2), [(key, 0) for key in range(5)]
        admit(arena, names)
        buffer = torch.zeros(5 * 24 + 1, dtype=torch.uint8)
        arena.lookup_into(*tensors(names), buffer[1:].view(5, 24))
        assert buffer[1:].numpy().tobytes() == b"".join(record_of(name, 24) for name in names)

    def test_nothing_is_fine(self) -> None:
        arena = made(24, 2)
        assert look_up(arena, []) == []
        admit(arena, [])
        assert arena.stats()["hbm_misses"] == 0

    def test_zeros_stay_zeros(self) -> None:
        """Whatever was left out or written nowhere: what is missing reads as zeros."""
        arena = made(8, 1)
        for first in range(0, 300, 50):
            admit(arena, [(key, 0) for key in range(first, first + 50)])
            assert look_up(arena, [(-1, 0), (10**6, 0)]) == [None, None]


class TestBudgets:
    def test_memory_is_inside_the_budget(self) -> None:
        for record_bytes in (84, 264, 2112):
            for spare in (0, 1, 1000):
                asked = budget(record_bytes, 7) + spare
                arena = HbmArena(record_bytes, asked, CPU)
                assert arena.bytes <= asked < arena.bytes + WAYS * record_bytes + INDEX_BYTES_PER_SET

    def test_bookkeeping_is_small(self) -> None:
        arena = made(264, 1000)
        assert arena.bytes - arena.slots * 264 < 0.08 * arena.bytes

    def test_too_small_for_a_set(self) -> None:
        least = budget(2112, 1)
        assert HbmArena(2112, least, CPU).slots == WAYS
        with pytest.raises(
            BadRequest, match=rf"budget of {least - 1} bytes is too small.*takes {least} bytes"
        ):
            HbmArena(2112, least - 1, CPU)

    def test_a_refused_resize_changes_nothing(self) -> None:
        arena, names = made(24, 2), [(key, 1) for key in range(4)]
        admit(arena, names)
        for wrong in (5, 1 << 60):
            with pytest.raises(BadRequest, match="HBM budget"):
                arena.resize(wrong)
        assert look_up(arena, names) == [record_of(name, 24) for name in names]
        assert arena.stats()["hbm_budget_bytes"] == budget(24, 2)
