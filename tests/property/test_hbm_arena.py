"""The HBM arena on CPU tensors against a model in plain Python, and without a value read back."""

from __future__ import annotations

from typing import Any

import hypothesis.extra.numpy as arrays
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_client.dequantize import dequantize
from engram_client.errors import BadRequest
from engram_client.hbm.arena import HbmArena, arena_bytes
from engram_client.hbm.index import INDEX_BYTES_PER_SET, fingerprint_of, mix, set_of
from engram_client.hbm.operations import Decoding, Keys, decoding_of
from engram_client.spec import Field, RowLayout
from tests.support import hbm_model
from tests.support.hbm_model import WAYS, Model, Name

CPU = torch.device("cpu")
ANY_KEY = st.integers(-(2**63), 2**63 - 1)
FEW_KEYS = st.integers(-3, 60)


def made(record_bytes: int, sets: int) -> HbmArena:
    arena = HbmArena(record_bytes, arena_bytes(record_bytes, sets), CPU)
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
    """Records that are here, owner by owner; checks that all else is zeros, and the list of the missing."""
    found: list[bytes | None] = [None] * len(names)
    for owner in {owner for _, owner in names}:
        places = [place for place, name in enumerate(names) if name[1] == owner]
        keys, _ = tensors([names[place] for place in places])
        out = torch.full((len(places), arena.record_bytes), 0xAA, dtype=torch.uint8)
        listed = torch.full((3 + 2 * len(places),), -7, dtype=torch.int64)
        arena.lookup_into(Keys(keys, owner, 1), out, listed)
        pairs = listed[1 : 1 + 2 * int(listed[0])].view(-1, 2).tolist()
        missing = {place for place, _ in pairs}
        assert pairs == [[place, int(keys[place])] for place in sorted(missing)]
        for number, (place, row) in enumerate(zip(places, out.numpy(), strict=True)):
            here = number not in missing and names[place][0] != -1
            assert here or not row.any()
            found[place] = row.tobytes() if here else None
    return found


def admit(arena: HbmArena, names: list[Name], pinned: bool = False) -> None:
    records = [record_of(name, arena.record_bytes) for name in names]
    arena.admit(*tensors(names), as_tensor(records, arena.record_bytes), pinned=pinned)


def play(arena: HbmArena, model: Model, steps: list[tuple[str, list[Name]]]) -> None:
    for action, names in steps:
        if action == "look":
            assert look_up(arena, names) == model.lookup(names)
        else:
            wanted = names[:20] if action == "pin" else names
            admit(arena, wanted, action == "pin")
            records = {name: record_of(name, arena.record_bytes) for name in wanted}
            model.admit(wanted, records, action == "pin")


NAMES = st.lists(st.tuples(st.one_of(FEW_KEYS, FEW_KEYS, ANY_KEY), st.integers(0, 2)), max_size=90)
STEPS = st.lists(st.tuples(st.sampled_from(["look", "look", "admit", "admit", "pin"]), NAMES), max_size=25)


@settings(max_examples=30)
@given(st.integers(1, 4), st.sampled_from([1, 6, 20, 24]), STEPS)
def test_every_step_is_the_models(sets: int, record_bytes: int, steps: list[tuple[str, list[Name]]]) -> None:
    arena, model = made(record_bytes, sets), Model(sets)
    play(arena, model, steps)
    stats = arena.stats()
    assert {name: stats[f"hbm_{name}"] for name in model.counters} == model.counters
    assert stats["hbm_records"] == len(model.held())
    assert stats["hbm_pinned"] == sum(len(here.pinned) for here in model.sets)
    everything = [each.name for each in model.held()]
    assert look_up(arena, everything) == [each.record for each in model.held()]


@settings(max_examples=30)
@given(st.integers(1, 4), st.integers(1, 6), STEPS)
def test_resizing_keeps_what_fits(before: int, after: int, steps: list[tuple[str, list[Name]]]) -> None:
    """The pinned first, then the main queue by its reads, then those on trial; and all their bytes."""
    arena, model = made(8, before), Model(before)
    play(arena, model, steps)
    arena.resize(arena_bytes(8, after))
    assert arena.slots == after * WAYS
    held = [(9, each) for here in model.sets for each in here.pinned]
    held += [(2 + each.reads, each) for here in model.sets for each in here.main]
    held += [(each.reads, each) for here in model.sets for each in here.small]
    stayed = [record is not None for record in look_up(arena, [each.name for _, each in held])]
    for number in range(after):
        here = [at for at, (_, each) in enumerate(held) if hbm_model.set_of(each.name, after) == number]
        kept, lost = [at for at in here if stayed[at]], [at for at in here if not stayed[at]]
        assert len(kept) == min(WAYS, len(here))
        assert not lost or min(held[at][0] for at in kept) >= max(held[at][0] for at in lost)
    for (_, each), stays in zip(held, stayed, strict=True):
        assert look_up(arena, [each.name]) == [each.record if stays else None]


@given(arrays.arrays(np.int64, 20, elements=st.integers(0, 2**63 - 1)), st.integers(0, 32767))
def test_sets_are_the_models(keys: np.ndarray, owner: int) -> None:
    for sets in (1, 3, 1000, 2**31 - 1):
        owners = torch.full((20,), owner, dtype=torch.int16)
        expected = [hbm_model.set_of((key, owner), sets) for key in keys.tolist()]
        numbers = mix(torch.from_numpy(keys), owners)
        assert set_of(numbers, sets).tolist() == expected
        prints = [hbm_model.fingerprint((key, owner)) for key in keys.tolist()]
        assert fingerprint_of(numbers).tolist() == prints


@pytest.mark.parametrize("stride", [1, 2, 3, 1000, 2**20, 2**31, 2**32, 2**36, 2**40 + 1])
def test_orderly_keys_spread_over_the_sets(stride: int) -> None:
    """As evenly as chance would have it: 64 a set, within six standard deviations."""
    sets, each = 1000, 64
    keys = torch.arange(sets * each) * stride
    for owner in (0, 5):
        owners = torch.full_like(keys, owner, dtype=torch.int16)
        loads = torch.bincount(set_of(mix(keys, owners), sets), minlength=sets)
        assert abs(loads - each).max() < 6 * each**0.5


def test_no_value_is_read_back() -> None:
    """Tensors on the meta device hold no values: whoever asks for one, or for a shape by one, fails."""
    arena = HbmArena(24, arena_bytes(24, 3), torch.device("meta"))
    keys = torch.empty(50, dtype=torch.int64, device="meta")
    out, found = torch.empty((50, 24), dtype=torch.uint8, device="meta"), keys.new_empty(103)
    arena.lookup_into(Keys(keys, 0, 3), out, found)
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

    @pytest.mark.parametrize("successes", [0, 1, 5, 11])
    def test_admission(self, monkeypatch: pytest.MonkeyPatch, successes: int) -> None:
        arena, write, calls = made(24, 2), torch.Tensor.index_copy_, 0

        def failing(*arguments: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > successes:
                raise RuntimeError("no memory")
            return write(*arguments)

        for _ in range(3):
            admit(arena, self.NAMES[:20])
        with monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "index_copy_", failing)
            with pytest.raises(RuntimeError, match="no memory"):
                admit(arena, self.NAMES, pinned=True)
        assert self.left(arena) == 0
        for first in range(0, 40, 10):
            admit(arena, self.NAMES[first : first + 10])  # nothing is pinned or held any more
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
            with pytest.raises(RuntimeError, match="no memory"):
                arena.resize(arena_bytes(24, 3))
        assert self.left(arena) == held > 0
        assert arena.budget_bytes == arena_bytes(24, 2)

    def test_all_of_it_given_back(self) -> None:
        arena = made(24, 9)
        admit(arena, self.NAMES)
        arena.drop_all()
        assert (arena.slots, arena.bytes, self.left(arena)) == (WAYS, arena_bytes(24, 1), 0)
        admit(arena, self.NAMES[:5])
        arena.resize(arena_bytes(24, 4))
        assert self.left(arena) == 5
        arena.drop_all()
        assert self.left(arena) == 0


class TestDecoding:
    """Records that leave the arena as numbers are what `dequantize` makes of their bytes."""

    LAYOUTS = [
        RowLayout((Field("weight", "float8_e4m3fn", 64), Field("scale", "float8_e8m0fnu", 2)), None),
        RowLayout((Field("weight", "float8_e4m3fn", 20),), 0.375),
        RowLayout((Field("weight", "float8_e4m3fn", 6),), None),
    ]

    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_hits(self, layout: RowLayout) -> None:
        rows = 3
        decoding = decoding_of(layout, rows)
        assert decoding == Decoding(layout, rows)
        arena = made(rows * layout.row_bytes, 2)
        names = [(key, 0) for key in range(6)]
        admit(arena, names[:4])
        out = torch.full((6, rows, layout.embedding_dim), 7, dtype=torch.bfloat16)
        arena.lookup_into(Keys(tensors(names)[0], 0, 1), out, torch.zeros(15, dtype=torch.int64), decoding)
        held = as_tensor([record_of(name, arena.record_bytes) for name in names[:4]], arena.record_bytes)
        expected = dequantize(layout, held.view(4, rows, -1), dtype=torch.bfloat16)
        torch.testing.assert_close(out[:4], expected, rtol=0, atol=0, equal_nan=True)
        assert not out[4:].any()

    def test_what_kernels_do_not_decode(self) -> None:
        weight = Field("weight", "float8_e4m3fn", 48)
        for fields in (
            (Field("weight", "bfloat16", 8),),
            (weight, Field("scale", "float32", 1)),
            (weight, Field("scale", "float8_e8m0fnu", 3)),  # three blocks of 16
            (Field("scale", "float8_e8m0fnu", 2), Field("weight", "float8_e4m3fn", 64)),
        ):
            assert decoding_of(RowLayout(fields, None), 2) is None


class TestBuffers:
    def test_unaligned_out(self) -> None:
        arena, names = made(24, 2), [(key, 0) for key in range(5)]
        admit(arena, names)
        buffer, found = torch.zeros(5 * 24 + 1, dtype=torch.uint8), torch.empty(13, dtype=torch.int64)
        arena.lookup_into(Keys(tensors(names)[0], 0, 1), buffer[1:].view(5, 24), found)
        records = [record_of(name, 24) for name in names]
        assert buffer[1:].numpy().tobytes() == b"".join(records)
        buffer.zero_()
        places, lines = torch.tensor([4, 0]), torch.tensor([1, 3])
        arena.scatter(as_tensor(records, 24), lines, buffer[1:].view(5, 24), places)
        assert buffer[1 + 4 * 24 :].numpy().tobytes() == records[1]
        assert buffer[1:25].numpy().tobytes() == records[3] and not buffer[25 : 1 + 4 * 24].any()

    def test_nothing_is_fine(self) -> None:
        arena, nothing = made(24, 2), torch.empty(0, dtype=torch.int64)
        found = torch.full((3,), 5)
        arena.lookup_into(Keys(nothing, 0, 1), torch.empty((0, 24), dtype=torch.uint8), found)
        assert found[0] == 0
        admit(arena, [])
        assert arena.stats()["hbm_misses"] == 0

    def test_zeros_stay_zeros(self) -> None:
        """Whatever was left out: what is missing reads as zeros."""
        arena = made(8, 1)
        for first in range(0, 300, 50):
            admit(arena, [(key, 0) for key in range(first, first + 50)])
            assert look_up(arena, [(-1, 0), (10**6, 0)]) == [None, None]


class TestBudgets:
    def test_memory_is_inside_the_budget(self) -> None:
        for record_bytes in (84, 264, 2112):
            for spare in (0, 1, 1000):
                asked = arena_bytes(record_bytes, 7) + spare
                arena = HbmArena(record_bytes, asked, CPU)
                assert arena.bytes <= asked < arena.bytes + WAYS * record_bytes + INDEX_BYTES_PER_SET

    def test_bookkeeping_is_small(self) -> None:
        arena = made(264, 1000)
        assert arena.bytes - arena.slots * 264 < 0.08 * arena.bytes

    def test_too_small_for_a_set(self) -> None:
        least = arena_bytes(2112, 1)
        assert HbmArena(2112, least, CPU).slots == WAYS
        with pytest.raises(
            BadRequest, match=rf"budget of {least - 1} bytes is too small.*takes {least} bytes"
        ):
            HbmArena(2112, least - 1, CPU)

    def test_a_refused_resize_changes_nothing(self) -> None:
        arena, names = made(24, 2), [(key, 1) for key in range(4)]
        admit(arena, names)
        with pytest.raises(BadRequest, match="HBM budget"):
            arena.resize(5)
        with pytest.raises(RuntimeError, match="memory"):
            arena.resize(1 << 60)
        assert look_up(arena, names) == [record_of(name, 24) for name in names]
        assert arena.stats()["hbm_budget_bytes"] == arena_bytes(24, 2)
