"""The daemon's arena in device memory, on CPU tensors: what was put in, in the face of writers and faults."""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from engram_client.arena import read as compiled
from engram_client.arena.layout import RECORD_AT, WAYS, slot_bytes_for
from engram_client.errors import ConfigError
from engram_client.gpu import ipc
from engram_client.gpu.ipc import IpcDriver, NotShared
from engram_client.hbm import mirror as mirrors
from engram_client.hbm.imported import open_mirror
from engram_client.hbm.mirror import Mirror, mirror_bytes
from engram_client.jit import kernel
from engram_client.transport.attachment import OfferedHbm
from engram_client.transport.handoff import HbmNote
from tierstore.tiers import hbm_memory
from tierstore.tiers.counters import Counters
from tierstore.tiers.dram import DramTier
from tierstore.tiers.hbm import HbmArena, HbmTier

CPU = torch.device("cpu")
RECORD_BYTES = 40


def slots_of(keys: np.ndarray, owners: np.ndarray, record_bytes: int = RECORD_BYTES) -> np.ndarray:
    """As they lie in DRAM; each record tells whose it is."""
    slots = np.zeros((len(keys), slot_bytes_for(record_bytes)), np.uint8)
    slots[:, :8], slots[:, 8:16] = keys[:, None].view(np.uint8), owners[:, None].view(np.uint8)
    slots[:, RECORD_AT : RECORD_AT + record_bytes] = records_of(keys, owners, record_bytes)
    return slots


def records_of(keys: np.ndarray, owners: np.ndarray, record_bytes: int = RECORD_BYTES) -> np.ndarray:
    """uint8 [n, record_bytes]."""
    return ((keys * 31 + owners * 7)[:, None] + np.arange(record_bytes)).astype(np.uint8)


def read(arena: HbmArena, keys: np.ndarray, owners: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    out = torch.full((len(keys), arena.record_bytes), 3, dtype=torch.uint8)
    missing = arena._mirror.read_into(torch.from_numpy(keys), torch.from_numpy(owners), arena.serving, out)
    return out.numpy(), missing.numpy()


@pytest.mark.parametrize("record_bytes", [40, 21, 2112])
@given(seed=st.integers(0, 2**32 - 1))
@settings(max_examples=4, deadline=None)
def test_what_is_found_is_what_was_put_in(record_bytes: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    arena = HbmArena(mirror_bytes(3, record_bytes), record_bytes, CPU)
    held = 0
    for _ in range(6):
        keys, owners = random.integers(0, 60, 25), random.integers(0, 3, 25)
        came, left = arena.admit(slots_of(keys, owners, record_bytes))
        held += came - left
        assert arena.records == held <= arena.sets * WAYS
        everything = np.stack(np.meshgrid(np.arange(60), np.arange(3)), -1).reshape(-1, 2)
        rows, missing = read(arena, everything[:, 0].copy(), everything[:, 1].copy())
        assert (~missing).sum() == held
        expected = records_of(everything[:, 0], everything[:, 1], record_bytes)
        assert np.array_equal(rows[~missing], expected[~missing]) and not rows[missing].any()
    rows, missing = read(arena, np.array([-1, -2]), np.array([0, 0]))
    assert missing.tolist() == [False, True] and not rows.any()


@kernel
def hash_of(keys, owners, sets, out):
    """Set and tag of each, int64 [n, 2]."""
    for i in range(keys.size):
        h = compiled.mix(keys[i], owners[i])
        out[i, 0], out[i, 1] = compiled.set_of(h, sets), compiled.tag_of(h)


def test_sets_and_tags_are_those_of_the_compiled_reader() -> None:
    random = np.random.default_rng(5)
    keys, owners = random.integers(-(2**63), 2**63 - 1, 5000), random.integers(0, 2**40, 5000)
    out = np.empty((5000, 2), np.int64)
    hash_of(keys, owners, 2**31 - 7, out)
    hashed = mirrors.mix(torch.from_numpy(keys), torch.from_numpy(owners))
    assert np.array_equal(mirrors.set_of(hashed, 2**31 - 7).numpy(), out[:, 0])
    assert np.array_equal(mirrors.tag_of(hashed).numpy().view(np.uint16), out[:, 1].astype(np.uint16))


class TestWriters:
    """Whatever a writer does between a reader's operations, it finds the right record or none."""

    @pytest.fixture
    def arena(self) -> HbmArena:
        arena = HbmArena(mirror_bytes(1, RECORD_BYTES), RECORD_BYTES, CPU)
        arena.admit(slots_of(np.array([5]), np.array([0])))
        return arena

    def found(self, arena: HbmArena) -> bool:
        return not read(arena, np.array([5]), np.array([0]))[1].any()

    def test_a_set_that_is_being_written_is_missing(self, arena: HbmArena) -> None:
        assert self.found(arena)
        arena._mirror.sequences[0] += 1
        assert not self.found(arena)
        arena._mirror.sequences[0] += 1
        assert self.found(arena)

    def test_a_set_that_changes_under_the_copy_is_missing(
        self, arena: HbmArena, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        real = torch.Tensor.copy_

        def copy_then_change(there: torch.Tensor, here: torch.Tensor) -> torch.Tensor:
            done = real(there, here)
            arena._mirror.sequences[0] += 2
            return done

        monkeypatch.setattr(torch.Tensor, "copy_", copy_then_change)
        rows, missing = read(arena, np.array([5]), np.array([0]))
        assert missing.all() and not rows.any()

    def test_another_nonce_is_another_arena(self, arena: HbmArena) -> None:
        arena._mirror.control.zero_()
        assert not self.found(arena)


def dram_with(keys: np.ndarray, reads: int) -> DramTier:
    """A DRAM tier with records of owner 0 that were read so often."""
    dram = DramTier(1 << 20, {RECORD_BYTES: 1}, Counters())
    arena = dram.arena(RECORD_BYTES)
    assert arena is not None
    records = np.ascontiguousarray(records_of(keys, np.zeros_like(keys)))
    arena.admit(keys, np.zeros_like(keys), records.ctypes.data, np.arange(len(keys)), wanted_soon=False)
    out = np.empty_like(records)
    for _ in range(reads):
        arena.read(keys, 0, 1, (0, RECORD_BYTES), out.ctypes.data)
    return dram


def tier_over(dram: DramTier, budget_bytes: int = 64 << 10, device: str = "cpu") -> HbmTier:
    sizes = frozenset({RECORD_BYTES})
    return HbmTier(dram, sizes, device, budget_bytes, staging_bytes=1 << 20, reads_min=4, counters=Counters())


class TestPromotion:
    def test_hot_records_come_once(self) -> None:
        keys = np.arange(50)
        dram = dram_with(keys, reads=3)
        tier = tier_over(dram)
        assert tier.promote(1 << 20) == 50
        rows, missing = read(tier.arenas()[RECORD_BYTES], keys, np.zeros_like(keys))
        assert not missing.any() and np.array_equal(rows, records_of(keys, np.zeros_like(keys)))
        for _ in range(3):
            assert tier.promote(1 << 20) == 0, "the same records were brought again"
        assert tier.stats()["hbm_records"] == 50

    def test_what_was_driven_out_comes_back_only_for_new_reads(self) -> None:
        keys = np.arange(400)
        dram = dram_with(keys, reads=3)
        tier = tier_over(dram, budget_bytes=mirror_bytes(2, RECORD_BYTES))
        assert tier.promote(1 << 20) == 400
        assert tier.stats()["hbm_records"] == 2 * WAYS
        assert tier.promote(1 << 20) == 0

    def test_cold_records_stay_where_they_are(self) -> None:
        assert tier_over(dram_with(np.arange(50), reads=1)).promote(1 << 20) == 0

    def test_so_many_bytes_at_a_time(self) -> None:
        tier = tier_over(dram_with(np.arange(50), reads=3))
        slot_bytes = slot_bytes_for(RECORD_BYTES)
        rounds = [tier.promote(20 * slot_bytes) for _ in range(6)]
        assert max(rounds) <= 20 and sum(rounds) == 50


class TestFaults:
    @pytest.mark.parametrize(
        ("budget_bytes", "device", "told"),
        [(1 << 20, "no-such", "no-such"), (200, "cpu", "hold no set of records of 40 bytes")],
    )
    def test_a_tier_that_cannot_be_is_off_and_says_so(
        self, budget_bytes: int, device: str, told: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        tier = tier_over(dram_with(np.arange(5), 3), budget_bytes, device)
        (line,) = caplog.messages
        assert "DRAM serves alone" in line and told in line
        assert tier.promote(1 << 20) == 0 and tier.stats()["hbm_bytes"] == 0
        with pytest.raises(ConfigError, match="lower it, or free memory"):
            tier.resize(budget_bytes)

    def test_too_little_free_memory_changes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Another process has taken it since."""
        tier = tier_over(dram_with(np.arange(5), 3))
        arenas = tier.arenas()

        def refuse(device: torch.device, size_bytes: int) -> None:
            raise NotShared("cuMemAlloc_v2 failed: out of memory (error 2)")

        monkeypatch.setattr("tierstore.tiers.hbm.make_memory", refuse)
        with pytest.raises(ConfigError, match="out of memory"):
            tier.resize(1 << 20)
        assert tier.arenas() == arenas and tier.stats()["hbm_budget_bytes"] == 64 << 10
        assert tier.promote(1 << 20) == 5

    def test_memory_that_runs_out_later_turns_the_tier_off(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        tier, told = tier_over(dram_with(np.arange(5), 3)), []
        tier.on_change = lambda: told.append(tier.arenas())
        arena = tier.arenas()[RECORD_BYTES]
        retired = arena._mirror

        def refuse(*args: object) -> None:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 64 MiB\nmore")

        monkeypatch.setattr(HbmArena, "_write", refuse)
        assert tier.promote(1 << 20) == tier.promote(1 << 20) == 0
        (line,) = caplog.messages
        assert "until hbm.budget_bytes is set anew" in line and "more" not in line
        assert told == [{}] and retired.control.item() == 0, "clients must be told, and find nothing"
        monkeypatch.undo()
        tier.resize(64 << 10)
        assert tier.stats()["hbm_budget_bytes"] == 64 << 10

    def test_memory_is_freed_only_a_while_after_everybody_was_told(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        freed: list[object] = []
        monkeypatch.setattr("tierstore.tiers.hbm.free_later", lambda memory: freed.append(memory))
        tier = tier_over(dram_with(np.arange(5), 3))
        memory = tier.arenas()[RECORD_BYTES].memory
        tier.on_change = lambda: freed.append("told")
        tier.resize(0)
        assert freed == ["told", memory]


class FakeCuda:
    """libcuda, in host memory; `fail` names a call that fails."""

    def __init__(self, fail: str = "") -> None:
        self._fail, self.memory, self.calls = fail, {}, []

    def __getattr__(self, name: str) -> Callable[..., int]:
        def call(*arguments: object) -> int:
            self.calls.append(name)
            if name == self._fail:
                return 2
            if name == "cuMemAlloc_v2":
                arguments[0]._obj.value = 4096  # type: ignore[attr-defined]
            elif name == "cuIpcGetMemHandle":
                arguments[0]._obj.reserved[:] = bytes(range(64))  # type: ignore[attr-defined]
            elif name == "cuIpcOpenMemHandle_v2":
                assert bytes(arguments[1].reserved) == bytes(range(64))  # type: ignore[attr-defined]
                arguments[0]._obj.value = 8192  # type: ignore[attr-defined]
            elif name == "cuGetErrorString":
                arguments[1]._obj.value = b"out of memory"  # type: ignore[attr-defined]
            return 0

        return call


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], FakeCuda]:
    """Put a double in the place of libcuda and of what torch makes of an address."""

    def put(fail: str = "") -> FakeCuda:
        fake = FakeCuda(fail)
        monkeypatch.setattr(ipc.ctypes, "CDLL", lambda name: fake)
        monkeypatch.setattr(IpcDriver, "_context", lambda self, device: contextlib.nullcontext())
        for module in (hbm_memory, __import__("engram_client.hbm.imported", fromlist=["x"])):
            monkeypatch.setattr(module, "bytes_at", lambda address, size, device: torch.ones(size).byte())
            monkeypatch.setattr(module, "device_name", lambda device: "GPU-1")
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        return fake

    return put


def offered(handle: str) -> OfferedHbm:
    return OfferedHbm(HbmNote("cuda", "GPU-1", 1, RECORD_BYTES, 9, handle, None), [])


class TestIpc:
    def test_memory_is_made_and_opened_by_its_handle(self, cuda: Callable[[str], FakeCuda]) -> None:
        fake = cuda("")
        memory = hbm_memory.CudaMemory(torch.device("cuda", 0), 1000)
        assert memory.handle == bytes(range(64)).hex() and memory.descriptor() is None
        assert not memory.tensor.any(), "it has to begin with zeros"
        mirror = open_mirror(offered(memory.handle), torch.device("cuda", 0))
        assert isinstance(mirror, Mirror)
        del mirror
        memory.free()
        assert fake.calls == [
            "cuMemAlloc_v2", "cuIpcGetMemHandle", "cuIpcOpenMemHandle_v2", "cuIpcCloseMemHandle",
            "cuMemFree_v2",
        ]  # fmt: skip

    @pytest.mark.parametrize("call", ["cuMemAlloc_v2", "cuIpcGetMemHandle"])
    def test_a_device_that_cannot_says_why(self, cuda: Callable[[str], FakeCuda], call: str) -> None:
        fake = cuda(call)
        with pytest.raises(NotShared, match=rf"{call} failed: out of memory \(error 2\)"):
            hbm_memory.CudaMemory(torch.device("cuda", 0), 1000)
        assert ("cuMemFree_v2" in fake.calls) == (call == "cuIpcGetMemHandle"), "what was made is freed"

    def test_a_dead_daemons_handle_is_refused(self, cuda: Callable[[str], FakeCuda]) -> None:
        cuda("cuIpcOpenMemHandle_v2")
        with pytest.raises(NotShared, match="cuIpcOpenMemHandle_v2 failed"):
            open_mirror(offered(bytes(range(64)).hex()), torch.device("cuda", 0))

    def test_another_gpu_is_another_memory(self) -> None:
        with pytest.raises(NotShared, match="lies on GPU-1, and rows are wanted on cpu"):
            open_mirror(offered("00" * 64), CPU)

    def test_without_a_driver(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def missing(name: str) -> None:
            raise OSError("libcuda.so.1: cannot open shared object file")

        monkeypatch.setattr(ipc.ctypes, "CDLL", missing)
        with pytest.raises(NotShared, match="no CUDA driver"):
            IpcDriver()
