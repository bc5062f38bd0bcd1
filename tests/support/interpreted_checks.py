"""What Triton's interpreter is asked, in a process of its own: whether it interprets is settled at import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.support.daemon import environment

CPU = torch.device("cpu")
GOLDEN = Path(__file__).parents[1] / "golden" / "deepseek_v41_gate.npz"


def interpret(*checks: str, **arguments: Any) -> str:
    """Run these functions of this module in a child; what it printed. Fails where one does."""
    script = "from tests.support.interpreted_checks import main; main()"
    child = subprocess.run(
        [sys.executable, "-c", script, json.dumps([checks, arguments])],
        capture_output=True, text=True, timeout=240, check=False,
        env={**environment(), "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert child.returncode == 0, child.stdout + child.stderr
    return child.stdout


def main() -> None:
    torch.set_num_threads(1)
    checks, arguments = json.loads(sys.argv[1])
    assert os.environ["TRITON_INTERPRET"] == "1"
    for name in checks:
        check: Callable[..., None] = globals()[name]
        check(**arguments)
        print("done", name)


def groups(**_: Any) -> None:
    """Every group passes its own trial."""
    from engram_client.gpu import bus_launch, fused, graph_reader

    for group in (bus_launch.BUS, fused.DECODE, fused.GATE, graph_reader.WAITING):
        if not group.serves(CPU):
            group._trial(CPU)  # says why
            raise AssertionError(group.name)


def hashing_and_hbm(**_: Any) -> None:
    """See hbm_interpreted.py."""
    from tests.support import hbm_interpreted

    hbm_interpreted.check()


def golden_gate(**_: Any) -> None:
    """The published vector in float32, through the module, dead positions included."""
    from engram_client.gpu import fused
    from engram_client.modules import DeepseekV41Engram

    with np.load(GOLDEN) as file:
        vector = {name: torch.from_numpy(file[name]) for name in file.files}
    names = {"wkv.weight": "wkv", "q_weight": "q_weight", "k_weight": "k_weight"}
    state = {name: vector[key] for name, key in names.items()}
    module = DeepseekV41Engram.from_state_dict(state, eps=float(vector["eps"]), dtype=torch.float32)
    hidden, rows = vector["hidden_states"].float(), vector["rows"].float()
    launched = []
    plain, fused.gate = fused.gate, lambda *a, **k: launched.append(1) or plain(*a, **k)  # type: ignore[func-returns-value]
    with torch.inference_mode():
        output = module(hidden, rows, dead=vector["dead"])
        assert launched
        torch.testing.assert_close(output.double(), vector["output"], rtol=1e-5, atol=1e-6)
        assert torch.equal(output[vector["dead"]], hidden[vector["dead"]])
        half = module(hidden.expand(2, -1, -1, -1)[:, :3], rows.expand(2, -1, -1)[:, :3])
        assert half.shape == (2, 3, 4, 48)
    launched.clear()
    assert module(hidden, rows).requires_grad and not launched  # gradients take the plain form


def decoding(**_: Any) -> None:
    """Layouts with and without scales, a global scale, odd widths, picked lines, an empty batch."""
    from engram_client.dequantize import by_arithmetic
    from engram_client.gpu import fused
    from engram_client.spec import Field, RowLayout

    random = np.random.default_rng(61)
    for weights, scales, global_scale in ((256, 8, None), (160, 0, 0.37), (48, 3, 2.0)):
        fields = [Field("weight", "float8_e4m3fn", weights)]
        if scales:
            fields.append(Field("scale", "float8_e8m0fnu", scales))
        layout = RowLayout(tuple(fields), global_scale)
        rows = random.integers(0, 256, (7, 3, layout.row_bytes), np.uint8)
        rows[..., weights:] = random.integers(100, 150, rows[..., weights:].shape)
        lines, picks = torch.from_numpy(rows), torch.from_numpy(random.integers(0, 7, (2, 4)))
        for result in (torch.bfloat16, torch.float32):
            if result == torch.bfloat16 and global_scale == 0.37:
                continue  # Triton's interpreter cuts to BF16 where a GPU rounds
            assert fused.decodes(layout, result, CPU)
            for found, wanted in (
                (fused.decode(layout, lines, result), by_arithmetic(layout, lines, result)),
                (fused.decode(layout, lines, result, picks), by_arithmetic(layout, lines[picks], result)),
            ):
                torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)
        assert fused.decode(layout, lines[:0], torch.bfloat16).shape == (0, 3, weights)
    assert not fused.decodes(layout, torch.float64, CPU)
    assert not fused.decodes(RowLayout((Field("weight", "bfloat16", 4),)), torch.bfloat16, CPU)


def arena(unix: str, tables: dict[str, list[list[int]]], **_: Any) -> None:
    """The kernel and its twin over one daemon: the same rows, lists and counts, for every alignment."""
    from engram_client import connect
    from engram_client.arena.listed_read import read_listed
    from engram_client.gpu.bus import BusReader

    with connect(unix) as client:
        for (name, lines), heads in ((t, h) for t in tables.items() for h in (None, slice(1, 2))):
            keys, table = np.array(lines), client.table(name)
            if heads is not None and table.spec.addressing != "record":
                continue
            table.lookup_ngrams(keys[: len(keys) // 2]) if table.spec.scheme else table.lookup(keys[:2, 0])
            reader = BusReader(table, CPU, entries_max=keys.size, heads=heads, touches=64)
            ids = torch.from_numpy(keys.reshape(-1))
            out = torch.full((keys.size, reader.entry_bytes), 7, dtype=torch.uint8)
            reader.read(ids, out)
            counters = reader._lists.counters.clone()
            missed = reader.missed()
            twin, missing = torch.full_like(out, 7), torch.zeros(keys.size, dtype=torch.bool)
            told, listed = torch.zeros(4, dtype=torch.int64), torch.zeros((keys.size, 2), dtype=torch.int64)
            read_listed(
                reader._words, ids.numpy(), reader._orders, False, twin.numpy(), missing.numpy(),
                listed.numpy(), np.zeros(64, np.int64), told.numpy(),
            )  # fmt: skip
            assert torch.equal(out, twin) and out.any(), name
            assert torch.equal(reader.missing, missing)
            assert np.array_equal(missed.positions, listed[: len(missed.ids), 0].numpy())
            assert counters[:2].tolist() == told[:2].tolist() and 0 < told[0] < keys.size
