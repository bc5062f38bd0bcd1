"""Benchmark records: what they hold, and what they must not."""

from __future__ import annotations

import getpass
import json
import socket
from pathlib import Path

import numpy as np
import pytest
from tierbench.record import compare, summarize, write_record

from engram_client.errors import BadRequest, StorageError


def test_a_record_holds_what_is_needed_to_judge_it(tmp_path: Path) -> None:
    payload = {"rows": np.int64(5), "samples": np.array([1.5, 2.5]), "file": tmp_path / "t.bin"}
    path = write_record(
        "cold-rows", payload, tmp_path / "r", seed=3, parameters={"depth": 8}, data_path=tmp_path
    )
    record = json.loads(path.read_text())
    assert record["schema"] == {"name": "tierbench.record", "version": 2}
    assert record["name"] == "cold-rows"
    assert record["results"] == {"rows": 5, "samples": [1.5, 2.5], "file": "t.bin"}
    assert (record["seed"], record["parameters"]) == (3, {"depth": 8})
    assert record["packages"]["numpy"] == np.__version__
    assert record["machine"]["cores_usable"] >= 1
    assert record["machine"]["memory_bytes"] > 1 << 28
    assert record["machine"]["disk"]["kind"]
    assert record["date_utc"].endswith("Z")
    assert {"commit", "dirty"} <= record.keys()


def test_no_host_or_user_name_gets_in(tmp_path: Path) -> None:
    machine = json.loads(write_record("x", {}, tmp_path, data_path=tmp_path).read_text())["machine"]
    words = json.dumps(machine).split('"')
    assert socket.gethostname() not in words
    assert getpass.getuser() not in words
    assert str(tmp_path) not in json.dumps(machine)


def test_a_record_never_replaces_another(tmp_path: Path) -> None:
    paths = {write_record("x", {"run": i}, tmp_path, data_path=tmp_path) for i in range(3)}
    assert len(paths) == 3


def test_percentiles_are_of_the_samples() -> None:
    found = summarize(list(range(1001)))
    assert found["p50"] == 500
    assert found["p90"] == 900
    assert found["p99"] == 990
    assert found["p99.9"] == pytest.approx(999)
    assert (found["count"], found["min"], found["max"], found["mean"]) == (1001, 0, 1000, 500)


def test_ratios_are_taken_pair_by_pair() -> None:
    found = compare([1.0, 3.0, 8.0], [2.0, 2.0, 2.0])
    assert (found["ratio_min"], found["ratio_median"], found["ratio_max"]) == (0.5, 1.5, 4.0)


@pytest.mark.parametrize(("ours", "yardstick"), [([], []), ([1.0], []), ([1.0], [0.0])])
def test_ratios_need_yardsticks(ours: list[float], yardstick: list[float]) -> None:
    with pytest.raises(BadRequest, match="as many runs as yardsticks"):
        compare(ours, yardstick)


def test_refusals(tmp_path: Path) -> None:
    with pytest.raises(BadRequest, match="all finite"):
        summarize([])
    with pytest.raises(BadRequest, match="all finite"):
        summarize([1.0, float("nan")])
    with pytest.raises(BadRequest, match=r"record name '\.\./x'"):
        write_record("../x", {}, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="record cannot be written"):
        write_record("x", {}, tmp_path / "file", data_path=tmp_path)
