"""The long and live benchmarks at a tiny size: they run, and their records hold what they must."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tierbench import cli
from tierbench.consumed import consumed_table
from tierbench.pauses import Phases, looking
from tierbench.sharded import ROW_BYTES, ExpectedRows, ShardedTable

from engram_client import connect
from engram_client.hashing import row_ids_from_keys

HEAD = ["--rows-per-head", "2000"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder, so that tables are made once for the whole file."""
    return tmp_path_factory.mktemp("bench")


def figures(capsys: pytest.CaptureFixture[str], data: Path, name: str, *options: str) -> dict[str, Any]:
    """What `tierbench NAME --json` says, and that its record says the same and names no path."""
    records = data / f"records-{name}"
    shutil.rmtree(records, ignore_errors=True)
    assert cli.main([name, "--dir", str(data), "--record", str(records), "--json", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    (path,) = records.iterdir()
    assert json.loads(path.read_text())["results"] == found
    assert str(data) not in path.read_text()
    return found


def test_soak(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    sizes = ["--shards", "3", "--dram-bytes", "8MiB", "--tokens", "3000", "--snapshot-period-s", "0.2"]
    pace = ["--duration-s", "1", "--check-period-s", "0.2", "--look-period-s", "0.1"]
    found = figures(capsys, data, "soak", *HEAD, *sizes, *pace, "--text-tokens", "48", "--cold-tokens", "16")
    memory = found["memory"]
    assert memory["bound_bytes"] == (8 << 20) + (300 << 20)
    assert memory["within"]
    assert 7 << 20 < memory["shared_bytes_max"] <= 96 << 20  # the arena, and staging buffers
    assert memory["resident_bytes"]["max"] <= memory["peak_bytes"] <= memory["bound_bytes"]
    assert not memory["has_torch"]
    assert found["rows_checked"] >= 24
    assert found["rows_wrong"] == 0
    assert found["failures"] == {}
    assert found["packing"]["source_files_removed"] == 3
    assert found["row_file_open_s"] < found["daemon_ready_s"]
    assert 0 < found["reading"]["hit_rate"] < 1
    assert found["by_part"][0]["took_ms"]["p99"] >= found["by_part"][0]["took_ms"]["p50"] > 0


def test_scale(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    sizes = ["--shards", "3", "--small-rows-per-head", "300", "--dram-bytes", "32MiB", "--batch-tokens", "64"]
    found = figures(capsys, data, "scale", *HEAD, *sizes, "--windows", "2", "--window-s", "0.05")
    assert found["rows"]["large"] > 5 * found["rows"]["small"]
    assert found["fill"]["large"] == pytest.approx(found["fill"]["small"], abs=0.01)
    assert min(found["hits"]["hit_rate"]["large"]["min"], found["hits"]["hit_rate"]["small"]["min"]) == 1
    assert found["misses"]["hit_rate"]["large"]["max"] == 0
    assert 0.85 < found["hits_and_misses"]["hit_rate"]["large"]["p50"] < 0.95
    for kind in ("token", "hits", "hits_and_misses", "misses"):
        assert len(found[kind]["us_per_token"]["ours"]) == 2


def test_mixed(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    sizes = ["--tokens", "3000", "--batch-tokens", "64", "--hot-bytes", "32MiB", "--latency-ms", "5"]
    found = figures(capsys, data, "mixed", *HEAD, *sizes, "--windows", "2", "--window-s", "0.05")
    trace = found["trace"]
    entries = 64 * 3 * (1800 // 64)
    assert 0 < trace["hit_entries"] <= entries - trace["missing_records"] < entries
    assert trace["hit_rate_of_hits_alone"] > 0.9
    assert trace["us_per_miss_alone"] > trace["us_per_hit_alone"] > 0
    assert len(trace["mixed_over_separate"]["ours"]) == 2
    for kind, tokens in (("token", 1), ("batch", 64)):
        beside = found["beside_misses"][kind]
        assert beside["tokens_a_call"] == tokens
        assert min(beside["records_missed_beside"].values()) > 0
        assert set(beside["taken_us"]) == {"quiet", "fast", "slow"}
    assert not (data / "mixed-scratch").exists()


def test_live_resizing(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    sizes = ["--small-bytes", "16MiB", "--large-bytes", "40MiB", "--hot-tokens", "256", "--rounds", "2"]
    pace = ["--threads", "2", "--phase-s", "0.1"]
    found = figures(capsys, data, "live", "--part", "resize", *sizes, *pace)
    for where in ("in_process_threads_2", "daemon_threads_2"):
        assert found[where]["records_moved"] > 768
        assert found[where]["records_evicted"] > 0  # the small budget cannot hold what the large one did
        for kind in ("quiet", "busy", "shrink", "grow"):
            phase = found[where]["phases"][kind]
            assert len(phase["phase_s"]) == 2
            assert phase["longest_ms"][0] == phase["took_ms"]["max"] > 0
    assert found["daemon_threads_2"]["resident_bytes_max"] > 16 << 20


def test_live_restarts(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    sizes = ["--dram-bytes", "64MiB", "--tokens", "5000", "--probe-tokens", "500"]
    restart = figures(capsys, data, "live", "--part", "restart", *HEAD, *sizes)["restart"]
    after, killed = restart["after_restart"], restart["killed_while_refilling"]
    assert restart["stop_exit_code"] == 0
    assert abs(restart["points_lost"]) < 1
    assert 0 < after["bytes_read_over_budget"] <= 1.1
    assert after["ready_s"] < after["first_lookup_s"]
    asked_before = 3 * 64  # records that were looked up, so read, before the refill came to them, in either
    assert abs(after["records_restored"] - killed["records_restored_next"]) <= asked_before
    assert after["records_restored"] > 3 * asked_before
    assert (killed["rows_wrong"], killed["exit_code"]) == (0, 0)
    assert killed["rows_compared"] > 0


def test_a_sharded_table_holds_what_is_expected(data: Path) -> None:
    table = ShardedTable(300, 4)
    prepared, packing = consumed_table(data, table)
    assert packing["rows"] == prepared.spec.rows == table.planned_bytes() // ROW_BYTES
    assert packing["source_files_removed"] == 4
    assert not list(prepared.store.parent.rglob("*.safetensors"))
    keys = np.random.default_rng(3).integers(0, 2**63 - 1, (5, 3), np.int64)
    assert prepared.spec.scheme is not None
    row_ids = row_ids_from_keys(prepared.spec.scheme, keys)
    with connect(f"local:{prepared.store}") as client:
        rows = np.asarray(client.table(prepared.spec.name).lookup_ngrams(keys))
    expected = ExpectedRows(table, prepared.spec.rows).rows(row_ids.reshape(-1))
    assert np.array_equal(rows.reshape(-1, ROW_BYTES), expected)
    again, same = consumed_table(data, table)
    assert (again.spec.generation, same) == (prepared.spec.generation, packing)


def test_a_call_belongs_to_every_phase_it_overlaps() -> None:
    phases = Phases()
    phases.spans_ns = {"first": [(0, 10_000_000)], "second": [(10_000_001, 20_000_000)]}
    with looking([]) as none:
        assert none == []
    with looking([lambda number: number == 1]) as (looker,):
        while len(looker.waits) < 3:
            pass
    for noted in (looker.began_ns, looker.took_ns, looker.read, looker.waits):
        del noted[3:]
    looker.waits[0], looker.waits[1], looker.waits[2] = 1, 0, 0
    looker.began_ns[0], looker.took_ns[0] = 1_000_000, 2_000_000
    looker.began_ns[1], looker.took_ns[1] = 4_000_000, 3_000_000
    looker.began_ns[2], looker.took_ns[2] = 9_000_000, 80_000_000
    told = phases.told([looker])
    assert told["first"]["longest_ms"] == [80, 2]
    assert told["first"]["longest_ms_that_waited"] == [2]
    assert told["first"]["calls_beyond_bar_per_s"] == 100  # one in ten milliseconds
    assert told["first"]["calls_beyond_bar_that_waited_per_s"] == 0
    assert (told["first"]["calls_that_read"], told["first"]["took_ms_of_those"]["max"]) == (1, 3)
    assert told["second"]["took_ms"]["max"] == 80
    assert told["second"]["calls_that_read"] == 0


def test_an_error_of_a_looker_is_not_lost() -> None:
    def fail(number: int) -> bool:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"), looking([fail]):
        pass
