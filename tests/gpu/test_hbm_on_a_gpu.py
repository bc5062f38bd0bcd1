"""The HBM tier on a GPU: kernels beside twins, order between streams, graphs, races, no waiting, no memory.

Written on a machine without one: complete, and never run.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from engram_client import Client, connect
from engram_client.dequantize import dequantize
from engram_client.errors import BadRequest
from engram_client.gpu import PinnedRing, record_current, side_stream
from engram_client.hashing.device import HASHING
from engram_client.hbm import HbmTier
from engram_client.hbm.arena import HbmArena, arena_bytes
from engram_client.hbm.operations import KERNELS, Decoding, Keys
from engram_client.spec import Field, RowLayout
from tests.support.stores import V41, PackedStore, opened, random_keys, small_config
from tests.unit.client.test_hashing import v41

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]
RECORD_BYTES, WORDS = 2112, 264
LAYOUT = RowLayout((Field("weight", "float8_e4m3fn", 256), Field("scale", "float8_e8m0fnu", 8)), None)


@pytest.fixture(scope="module")
def device() -> torch.device:
    return torch.device("cuda", 0)


@pytest.fixture(scope="module")
def client(packed: PackedStore, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    folder = packed.copy_to(tmp_path_factory.mktemp("gpu"))
    with opened(folder, small_config(4 << 20)), connect(f"local:{folder}") as client:
        yield client


def records_of(keys: torch.Tensor) -> torch.Tensor:
    """Bytes that tell whose they are, and were they torn, where."""
    words = keys.unsqueeze(1) * 1_000_003 + torch.arange(WORDS, device=keys.device)
    return words.view(torch.uint8)


def found_for(keys: torch.Tensor) -> torch.Tensor:
    return torch.empty(3 + 2 * len(keys), dtype=torch.int64, device=keys.device)


def test_kernels_serve_here(device: torch.device) -> None:
    """Their trials pass: compiled, they do what torch operations do."""
    assert HASHING.serves(device)
    assert KERNELS.serves(device)


def test_hashing_is_the_hosts(device: torch.device) -> None:
    mapping, random = v41(), np.random.default_rng(1)
    twin, tokens, dead = (
        mapping.on_device(device),
        random.integers(0, 129280, (3, 700)),
        random.random((3, 700)) < 0.1,
    )
    state, kept = twin.lookback(3), mapping.lookback(3)
    for start, stop in ((0, 500), (500, 501), (501, 700)):
        ids, mask = tokens[:, start:stop], dead[:, start:stop]
        there, silent = torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)
        for layer in mapping.layer_ids:
            keys = twin.ngram_keys(there, layer, silent, lookback=state)
            assert np.array_equal(keys.cpu().numpy(), mapping.ngram_keys(ids, layer, mask, lookback=kept))
        state.advance(there, silent)
        kept.advance(ids, mask)


def test_every_number_there_is(device: torch.device) -> None:
    """All 65,536 pairs of weight and scale, those below 2^-126 included."""
    rows = torch.zeros((256 * 8, 264), dtype=torch.uint8)
    rows[:, :256] = torch.arange(256, dtype=torch.uint8)
    rows[:, 256:] = torch.arange(256 * 8).remainder(256).to(torch.uint8).unsqueeze(1)
    keys = torch.arange(256, device=device)
    arena = HbmArena(RECORD_BYTES, arena_bytes(RECORD_BYTES, 64), device)
    arena.admit(keys, torch.zeros_like(keys, dtype=torch.int16), rows.view(256, -1).to(device), pinned=True)
    out = torch.empty((256, 8, 256), dtype=torch.bfloat16, device=device)
    found = found_for(keys)
    arena.lookup_into(Keys(keys, 0, 1), out, found, Decoding(LAYOUT, 8))
    missing = found[1 : 1 + 2 * int(found[0])].view(-1, 2)[:, 0].cpu()
    expected = dequantize(LAYOUT, rows.view(256, 8, 264), dtype=torch.bfloat16)
    expected[missing] = 0
    assert len(missing) < 64
    torch.testing.assert_close(out.cpu(), expected, rtol=0, atol=0, equal_nan=True)


def test_hits_never_make_the_host_wait(device: torch.device) -> None:
    arena, keys = HbmArena(RECORD_BYTES, 4 << 20, device), torch.arange(600, device=device)
    arena.admit(keys, torch.zeros_like(keys, dtype=torch.int16), records_of(keys))
    out, found = torch.empty((600, RECORD_BYTES), dtype=torch.uint8, device=device), found_for(keys)
    arena.lookup_into(Keys(keys, 0, 1), out, found)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        arena.lookup_into(Keys(keys, 0, 1), out, found)
        more = keys + 10_000
        arena.admit(more, torch.zeros_like(more, dtype=torch.int16), records_of(more))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_captured_look_up_follows_what_is_let_in(
    device: torch.device, client: Client, packed: PackedStore
) -> None:
    tier = HbmTier([client.table(V41)], budget_bytes=2 << 20, device=device)
    hot, oracle = tier.table(V41), packed.oracles[V41]
    keys = torch.from_numpy(random_keys(oracle, 16)).to(device)
    out = torch.empty((16, 24, 264), dtype=torch.uint8, device=device)
    found = torch.empty(hot.found_size(keys), dtype=torch.int64, device=device)
    hot.hits_into(keys, out, found)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        misses = hot.hits_into(keys, out, found)
    graph.replay()
    assert int(misses.count[0]) == 48
    assert hot.fill(misses, out) == 48
    assert np.array_equal(out.cpu().numpy(), oracle.lookup_ngrams(keys.cpu().numpy()))
    tier.settle()
    for seed in (1, 2):
        fresh = random_keys(oracle, 16, seed=seed)
        hot.lookup_ngrams(fresh)
        tier.settle()
        keys.copy_(torch.from_numpy(fresh))
        graph.replay()
        assert int(misses.count[0]) == 0
        assert np.array_equal(out.cpu().numpy(), oracle.lookup_ngrams(fresh))
    with pytest.raises(BadRequest, match="graphs_are_gone"):
        tier.resize(4 << 20)
    del graph
    tier.resize(4 << 20, graphs_are_gone=True)
    assert np.array_equal(hot.lookup_ngrams(keys).cpu().numpy(), oracle.lookup_ngrams(fresh))


def test_rows_are_there_when_the_stream_goes_on(
    device: torch.device, client: Client, packed: PackedStore
) -> None:
    """Misses in many pieces, a stream of the caller's own that is busy, and memory that is handed "
    "out again at once."""
    tier = HbmTier([client.table(V41)], budget_bytes=400_000, device=device, staging_bytes=1)
    hot, oracle, stream = tier.table(V41), packed.oracles[V41], torch.cuda.Stream(device)
    for seed in range(20):
        keys = random_keys(oracle, 90, seed=seed % 7)
        with torch.cuda.stream(stream):
            torch.cuda._sleep(2_000_000)
            rows = hot.lookup_ngrams(keys)
            total = rows.long().sum()  # reads them behind the look-up, before anybody waits
            del rows
        assert int(total) == int(oracle.lookup_ngrams(keys).astype(np.int64).sum())


def test_look_ups_beside_admissions_are_whole_or_missing(device: torch.device) -> None:
    """Eight sets are replaced over and over on one stream while two others read them, one by a graph."""
    arena = HbmArena(RECORD_BYTES, arena_bytes(RECORD_BYTES, 8), device)
    assert not arena.in_order
    pool = torch.arange(2000, device=device)
    side, streams = side_stream(device), [torch.cuda.Stream(device) for _ in range(2)]
    side.wait_for(record_current(device))
    torn, hits = (torch.zeros(2, dtype=torch.int64, device=device) for _ in range(2))  # of each stream

    def check(number: int) -> None:
        (keys, out), found = buffers[number], lists[number]
        arena.lookup_into(Keys(keys, 0, 1), out, found)
        right = (out == records_of(keys)).all(1)
        empty = (out == 0).all(1)
        torn[number] += (~right & ~empty).sum()
        hits[number] += right.sum()

    buffers = [
        (
            pool[torch.randint(2000, (512,), device=device)],
            torch.empty((512, RECORD_BYTES), dtype=torch.uint8, device=device),
        )
        for _ in streams
    ]
    lists = [found_for(keys) for keys, _ in buffers]
    check(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        check(1)
    for _ in range(300):
        some = pool[torch.randint(2000, (256,), device=device)]
        side.wait_for(record_current(device))
        side.run(
            lambda some=some: arena.admit(some, torch.zeros_like(some, dtype=torch.int16), records_of(some)),
            uses=(some,),
        )
        with torch.cuda.stream(streams[0]):
            check(0)
        with torch.cuda.stream(streams[1]):
            graph.replay()
    torch.cuda.synchronize()
    assert int(torn.sum()) == 0
    assert int(hits.min()) > 1000


def test_threads_with_streams_of_their_own(device: torch.device, client: Client, packed: PackedStore) -> None:
    tier, oracle = HbmTier([client.table(V41)], budget_bytes=300_000, device=device), packed.oracles[V41]
    hot, known, wrong = tier.table(V41), random_keys(oracle, 60, seed=1), []
    expected = oracle.lookup_ngrams(known)

    def look(seed: int) -> None:
        random = np.random.default_rng(seed)
        with torch.cuda.stream(torch.cuda.Stream(device)):
            for _ in range(50):
                picks = random.integers(0, 60, 25)
                if not np.array_equal(hot.lookup_ngrams(known[picks]).cpu().numpy(), expected[picks]):
                    wrong.append(seed)

    threads = [threading.Thread(target=look, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for sets in (4, 9, 2):
        tier.resize(arena_bytes(RECORD_BYTES, sets))
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_buffer_is_not_written_before_its_copy_has_ended(device: torch.device) -> None:
    ring, side = PinnedRing(device, buffers=1, buffer_bytes=1 << 20), side_stream(device)
    there = [torch.empty(1 << 20, dtype=torch.uint8, device=device) for _ in range(5)]
    side.wait_for(record_current(device))
    for number, target in enumerate(there):
        with ring.take(timeout_s=20) as buffer:
            assert buffer.memory.is_pinned()
            buffer.memory.fill_(number)

            def copy(target: torch.Tensor = target, memory: torch.Tensor = buffer.memory) -> None:
                torch.cuda._sleep(2_000_000)
                target.copy_(memory, non_blocking=True)

            side.run(copy, uses=(target,))
            buffer.busy_until(side.record())
    side.record().block_current(device)
    assert [int(target.unique().item()) for target in there] == [0, 1, 2, 3, 4]


def test_too_little_memory_is_said_and_served(
    device: torch.device, client: Client, packed: PackedStore, caplog: pytest.LogCaptureFixture
) -> None:
    free, _ = torch.cuda.mem_get_info(device)
    taken = torch.empty(free - (1 << 30), dtype=torch.uint8, device=device)
    tier = HbmTier([client.table(V41)], budget_bytes=64 << 30, device=device)
    assert "has no room for an HBM budget" in caplog.text
    keys = random_keys(packed.oracles[V41], 40)
    assert np.array_equal(
        tier.table(V41).lookup_ngrams(keys).cpu().numpy(), packed.oracles[V41].lookup_ngrams(keys)
    )
    del taken
    torch.cuda.empty_cache()
