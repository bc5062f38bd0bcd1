"""Kernels of hashing and of the HBM tier under Triton's interpreter, in the process of interpreted_checks.py.

Each program is interpreted lane by lane, a tenth of a second each, so shapes are small. What the kernels
share with their twins is compared with what shares nothing with either where there is such a thing: the
conformance vectors, the compiled hashing of the CPU, the arena's model in plain Python.
"""

from __future__ import annotations

import numpy as np
import torch

from engram_client.hashing.device import HASHING
from engram_client.hbm.arena import HbmArena, arena_bytes
from engram_client.hbm.operations import KERNELS, Keys, decoding_of
from engram_client.spec import Field, RowLayout
from tests.support.hbm_model import Model, Name
from tests.unit.client.test_hashing import qwen, small, v41
from tests.vectors import load_json

CPU = torch.device("cpu")
ROW = RowLayout((Field("weight", "float8_e4m3fn", 20),), 0.375)  # no power of two, and a global scale


def check_vectors() -> None:
    case = next(case for case in load_json("deepseek_v41")["cases"] if case["dead"])
    dead = torch.zeros((1, len(case["token_ids"])), dtype=torch.bool)
    dead[0, case["dead"]] = True
    rows = v41().on_device(CPU).row_ids(torch.tensor([case["token_ids"]]), 1, dead)
    assert rows[0].tolist() == case["row_ids"]["1"]
    for case in load_json("qwen_ple")["cases"][:4]:
        assert qwen().on_device(CPU).row_ids(torch.tensor(case["token_ids"]), 0).tolist() == case["row_ids"]


def check_chunks() -> None:
    """Lookback, dead positions and foreign ids, against the kernels that numba compiles."""
    mapping, random = small(), np.random.default_rng(3)
    twin, tokens, dead = mapping.on_device(CPU), random.integers(0, 6, (3, 9)), random.random((3, 9)) < 0.3
    state, kept = twin.lookback(3), mapping.lookback(3)
    for start, stop in ((0, 4), (4, 5), (5, 9)):
        ids, mask = tokens[:, start:stop], dead[:, start:stop]
        given = torch.from_numpy(ids).int(), torch.from_numpy(mask)
        for layer in mapping.layer_ids:
            keys = twin.ngram_keys(given[0], layer, given[1], lookback=state).numpy()
            assert np.array_equal(keys, mapping.ngram_keys(ids, layer, mask, lookback=kept))
        state.advance(*given)
        kept.advance(ids, mask)


def record_of(name: Name, record_bytes: int) -> bytes:
    return np.random.default_rng([name[0], name[1]]).integers(1, 120, record_bytes, np.uint8).tobytes()


def check_arena() -> None:
    """An arena of kernels, step by step the model's: unaligned records, pins, evictions, hashed and "
    "decoded."""
    mapping, rows = small(), 2
    record_bytes, layer = rows * ROW.row_bytes, mapping.layer_ids[0]
    arena, model, width = HbmArena(record_bytes, arena_bytes(record_bytes, 1), CPU), Model(1), 2
    assert not arena.in_order
    twin, random = mapping.on_device(CPU), np.random.default_rng(9)
    for step in range(3):
        ids = torch.from_numpy(random.integers(0, 6, (1, 11)))
        dead = torch.from_numpy(random.random((1, 11)) < 0.2)
        keys, found = torch.empty(22, dtype=torch.int64), torch.empty(3 + 2 * 22, dtype=torch.int64)
        out = torch.full((22, record_bytes), 9, dtype=torch.uint8)
        arena.lookup_into(Keys(keys, 0, width, twin.inputs(ids, layer, dead)), out, found)
        hashed = torch.from_numpy(mapping.ngram_keys(ids.numpy(), layer, dead.numpy()))
        assert torch.equal(keys, hashed.masked_fill(dead.unsqueeze(-1), -1).reshape(-1))
        names = [(int(key), place % width) for place, key in enumerate(keys)]
        wanted = model.lookup(names)
        assert [row.tobytes() if row.any() else None for row in out.numpy()] == wanted
        listed = found[1 : 1 + 2 * int(found[0])].view(-1, 2).tolist()
        gone = [
            [p, n[0]] for p, (n, r) in enumerate(zip(names, wanted, strict=True)) if r is None and n[0] != -1
        ]
        assert sorted(listed) == gone
        check_decoded(arena, keys, wanted, rows)
        bring = sorted({(name[1], name[0]) for name in names if name[0] >= 0})[:10]
        some = [(key, owner) for owner, key in bring]
        records = {name: record_of(name, record_bytes) for name in some}
        data = torch.from_numpy(np.frombuffer(b"".join(records.values()), np.uint8).copy())
        owners = torch.tensor([owner for _, owner in some], dtype=torch.int16)
        offered = torch.tensor([key for key, _ in some])
        arena.admit(offered, owners, data.view(-1, record_bytes), pinned=step == 1)
        model.admit(some, records, step == 1)
    stats = arena.stats()
    assert stats["hbm_evicted"] == model.counters["evicted"]
    assert stats["hbm_records"] == len(model.held())


def check_decoded(arena: HbmArena, keys: torch.Tensor, wanted: list[bytes | None], rows: int) -> None:
    from engram_client.dequantize import dequantize

    numbers = torch.full((len(keys), rows, ROW.embedding_dim), 5.0, dtype=torch.bfloat16)
    found = torch.empty(3 + 2 * len(keys), dtype=torch.int64)
    arena.lookup_into(Keys(keys, 0, 2), numbers, found, decoding_of(ROW, rows))
    for row, record in zip(numbers, wanted, strict=True):
        held = np.frombuffer(record or bytes(rows * ROW.row_bytes), np.uint8).reshape(rows, -1)
        assert torch.equal(row, dequantize(ROW, held.copy(), dtype=torch.bfloat16))


def check() -> None:
    assert HASHING.serves(CPU), "the trial of hashing failed"
    assert KERNELS.serves(CPU), "the trial of the HBM tier failed"
    check_vectors()
    check_chunks()
    check_arena()
