"""Every benchmark runs at a tiny size and says what it must: figures beside a yardstick, and a record."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tierbench import beside, cli
from tierbench.alternate import against_best, alternate, latencies_us, rate, rate_of_callers
from tierbench.filled_arena import filled_arena

PEERS = {"EngramDB server": "engramdb", "Mooncake EngramStore": "mooncake"}
TINY = ["--rows-per-head", "2000", "--windows", "2", "--window-s", "0.02"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder, so that the table is made once for the whole file."""
    return tmp_path_factory.mktemp("bench")


def figures(capsys: pytest.CaptureFixture[str], data: Path, name: str, *options: str) -> dict[str, Any]:
    """What `tierbench NAME --json` says, and that its record says the same."""
    records = data / f"records-{name}"
    assert cli.main([name, "--dir", str(data), "--record", str(records), "--json", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    (path,) = records.iterdir()
    record = json.loads(path.read_text())
    assert record["name"] == name
    assert record["results"] == found
    assert record["parameters"]["windows"] == 2
    assert str(data) not in path.read_text()
    return found


def assert_pairs(found: dict[str, Any]) -> None:
    """Two windows of each, and the ratios that follow from them."""
    assert len(found["ours"]) == len(found["yardstick"]) == 2
    ratios = [a / b for a, b in zip(found["ours"], found["yardstick"], strict=True)]
    assert found["ratio_min"] == min(ratios) > 0
    assert found["ratio_max"] == max(ratios)


def test_lookup(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    """The yardsticks compare what they fetch with what was put in."""
    sizes = ["--arena-bytes", "8MiB", "--tokens", "8", "--warm-tokens", "16", "--lmdb-rows", "2000"]
    found = figures(capsys, data, "lookup", *TINY, *sizes)
    assert found["rows_a_batch"] == 8 * 48
    for kind in ("records", "rows", "api"):
        for threads in ("threads_1", "threads_2"):
            assert_pairs(found[kind]["batch"][threads])
            assert found[kind]["batch"][threads]["yardstick_name"].startswith("torch.index_select")
            for name in ("numpy.take", "numpy.take from a memmap", "LMDB get"):
                assert found[kind]["batch"][threads]["medians"][name] > 0
        assert found[kind]["scaling"]["threads"] == 2
        assert_pairs(found[kind]["scaling"]["ours"])
        assert {"ours", "torch.index_select int64"} <= set(found[kind]["token"])
        medians = [found[kind]["batch"][threads]["medians"] for threads in ("threads_1", "threads_2")]
        for name, told in zip((beside.ENGRAMDB, f"{beside.ENGRAMDB}, 2 callers"), medians, strict=True):
            assert (name in told) == (found["engramdb"]["version"] is not None)
    assert not (data / "beside-scratch").exists()
    assert found["api"]["misses"] == 0
    assert 0.7 < found["records"]["fill"] <= 0.8


def test_lookup_says_where_engramdb_is_missing(
    capsys: pytest.CaptureFixture[str], data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(beside, "installed_version", lambda: None)
    sizes = ["--arena-bytes", "8MiB", "--tokens", "8", "--warm-tokens", "16", "--threads", "1"]
    sizes += ["--lmdb-rows", "2000"]
    assert cli.main(["lookup", "--dir", str(data), "--json", *TINY, *sizes]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["engramdb"]["version"] is None
    assert "not installed" in found["engramdb"]["note"]
    assert beside.ENGRAMDB not in found["rows"]["batch"]["threads_1"]["medians"]


def test_cold(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    sizes = ["--batch-rows", "64", "--sample-rows", "50", "--lmdb-rows", "3000", "--callers", "1,2"]
    found = figures(capsys, data, "cold", *TINY, *sizes)
    for engine, depth in (("pread", 32), ("io_uring", 64)):
        if engine == "io_uring" and found[engine] is None:
            continue  # the system refuses it
        assert found[engine]["depth"] == depth
        for callers in ("callers_1", "callers_2"):
            told = found[engine][callers]
            assert told["bytes_per_row"]["min"] >= 4096
            assert told["rows_per_s"]["count"] == 2
            assert (told["beside_fio"] is None) == (found[engine]["fio"] is None)
            if told["beside_fio"]:
                assert_pairs(told["beside_fio"])
    assert found["fio"] or found["pread"]["fio"] is None
    assert min(v for v in found["other_ways"]["rows_per_s"].values() if v is not None) > 0


def test_remote(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    sizes = ["--dram-bytes", "64MiB", "--different", "2", "--peer-rows-per-head", "1000"]
    found = figures(capsys, data, "remote", *TINY, *sizes)
    assert set(found["peers"]) == {name for name, package in PEERS.items() if find_spec(package)}
    for peer in found["peers"].values():
        assert_pairs(peer["rows_per_s"])
    for transport in ("tcp", "unix"):
        assert found[transport]["batch"]["rows_a_call"] == 171 * 24
        assert found[transport]["token"]["rows_a_call"] == 48
        for kind in ("batch", "token"):
            assert_pairs(found[transport][kind]["rows_per_s"])
            assert found[transport][kind]["taken_us"]["ours"]["p50"] > 0


def test_pack(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    found = figures(capsys, data, "pack", "--windows", "2", "--source-bytes", "4MiB")
    assert_pairs(found["bytes_per_s"])


def test_tables_are_for_people(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    assert cli.main(["pack", "--dir", str(data), "--windows", "1", "--source-bytes", "1MiB"]) == 0
    captured = capsys.readouterr()
    assert "ratio" in captured.out
    assert "cp, fsync" in captured.out
    assert captured.err == ""


def test_extent(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    records = data / "records-extent"
    sizes = ["--rows-per-head", "2000", "--tokens-per-row", "0.7", "--batch-tokens", "64"]
    assert cli.main(["extent", "--dir", str(data), "--record", str(records), "--json", *sizes]) == 0
    found = json.loads(capsys.readouterr().out)
    (path,) = records.iterdir()
    assert json.loads(path.read_text())["results"] == found
    assert found["tokens"] == 1400
    ours, bare = found["with_extent"], found["without"]
    assert (ours["seen_missed"], ours["new_missed"]) == (bare["seen_missed"], bare["new_missed"])
    assert bare["extent_hits"] == 0 < ours["extent_hits"]
    assert 1 <= ours["pages_per_seen_record"] < bare["pages_per_seen_record"] <= 8
    assert 0 < ours["reads_per_seen_record"] < ours["pages_per_seen_record"]
    assert ours["reads_per_seen_record_clairvoyant"] == 1 < bare["reads_per_seen_record_clairvoyant"]
    assert len(ours["by_part"]) == 10
    assert ours["by_part"][-1]["filled"] == pytest.approx(ours["extent_filled"], rel=0.2)


TEXT = ["--rows-per-head", "2000", "--windows", "2", "--tokens", "20000"]


def test_overlap(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    sizes = ["--hidden", "64,128", "--batches", "2", "--chunks", "8", "--steps", "8", "--threads", "1"]
    budgets = ["--warm-tokens", "500", "--hit-dram-bytes", "128MiB"]
    found = figures(capsys, data, "overlap", *TEXT, *sizes, *budgets)
    kinds = [(s["kind"], s["hidden"], s["batch"], s["length"]) for s in found["sizes"]]
    assert kinds == [
        ("decode", 64, 2, 1),
        ("prefill", 64, 1, 8),
        ("decode", 128, 2, 1),
        ("prefill", 128, 1, 8),
    ]
    for size in found["sizes"]:
        assert size["hits"]["hit_rate"] == {"ahead": 1.0, "in-layer": 1.0}
        assert size["tenth"]["hit_rate"]["ahead"] < 1
        for state in ("tenth", "hits"):
            for name in ("prefetched", "in the layer", "resident again"):
                assert_pairs(size[state][name]["over_resident"])
                assert set(size[state][name]["waited_share"]) == {"layer_1", "layer_5"}
            assert size[state]["resident"]["step_ms"]["count"] == 2 * (8 if size["kind"] == "decode" else 3)
            assert ("first_chunk_ms" in size[state]) == (size["kind"] == "prefill")
    assert [c["kind"] for c in found["crossings"]] == ["decode", "prefill"]
    assert [len(c["sizes"]) for c in found["crossings"]] == [2, 2]
    assert found["dram_bytes"] == found["table_bytes"] // 10


def test_ahead(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    sizes = ["--sizes", "1,16", "--steps", "2x1,1x40", "--busy-us", "50", "--dram-bytes", "128MiB"]
    found = figures(capsys, data, "ahead", *TEXT, *sizes, "--transports", "local")
    for state in ("hits", "cold"):
        for tokens in ("1", "16"):
            assert_pairs(found["local"]["callers"][state][tokens]["ratio"])
    for shape in ("2x1", "1x40"):
        told = found["local"]["dedupe"][shape]
        assert 0 < told["distinct_share"] <= 1
        assert_pairs(told["numbers"]["ratio"])
        assert_pairs(told["bytes"]["ratio"])
        for state in ("as it comes", "hits"):
            assert 0 <= found["local"]["order"][shape][state]["in_order_share"] <= 1


def test_staging(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    sizes = ["--rows-per-head", "2000", "--windows", "2", "--sizes", "1,64", "--busy-us", "50"]
    found = figures(capsys, data, "staging", *sizes, "--dram-bytes", "512MiB")
    for tokens in ("1", "64"):
        assert 0 < found[tokens]["start_us"]["p50"] <= found[tokens]["there_us"]["p50"]
        for pair in ("there_to_lookup", "busy"):
            assert_pairs(found[tokens][pair])


def test_wrong_sizes_are_one_line(capsys: pytest.CaptureFixture[str], data: Path) -> None:
    assert cli.main(["lookup", "--dir", str(data), "--fill", "0", *TINY]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_windows_are_alternated_in_turn() -> None:
    order: list[str] = []

    def contender(name: str) -> int:
        order.append(name)
        return len(order)

    samples = alternate(3, {name: lambda name=name: contender(name) for name in "abc"}, "test")
    assert "".join(order) == "abcbcacab"
    assert samples == {"a": [1, 6, 8], "b": [2, 4, 9], "c": [3, 5, 7]}


def test_the_best_yardstick_is_the_one_compared() -> None:
    found = against_best([2.0, 6.0], {"slow": [1.0, 1.0], "fast": [2.0, 3.0]}, {"beside": [9.0, 9.0]})
    assert found["yardstick_name"] == "fast"
    assert found["ratio_median"] == 1.5
    assert found["medians"] == {"slow": 1.0, "fast": 2.5, "beside": 9.0}


def test_rates_count_what_steps_did() -> None:
    calls: list[int] = []
    assert rate(lambda call: calls.append(call) or 1, 0.0) > 0
    assert calls == [0]
    assert rate_of_callers([lambda call: 1, lambda call: 0], 0.0) > 0
    assert latencies_us(lambda call: calls.append(call) or 1, 10).shape == (10,)


def test_a_filled_arena_returns_its_content() -> None:
    filled = filled_arena(1 << 20, 48, 2, 0.5, seed=1)
    batches = filled.batches(10, 3)
    assert batches.shape == (3, 20)
    filled.check(batches[1])
    assert filled.step(batches, rows_per_record=4)(0) == 80
    assert np.isin(batches, filled.groups).all()
