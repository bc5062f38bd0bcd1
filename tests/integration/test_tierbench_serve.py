"""`tierbench serve` against a real daemon and an empty service, at a size that takes seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tierbench import cli

SIZES = ["--rows-per-head", "2000", "--clients", "2", "--window-s", "0.1", "--tokens", "400", "--factor", "4",
         "--halvings", "0", "--points-max", "2", "--dram-bytes", "64MiB", "--first-share", "0.3"]  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("serve")


def test_serve(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--dir", str(data), "--record", str(tmp_path), "--keys", "zipf", "--arrivals", "poisson"]
    assert cli.main(["serve", *options, *SIZES]) == 0
    shown = capsys.readouterr().out
    (path,) = tmp_path.iterdir()
    record = json.loads(path.read_text())
    found = record["results"]
    assert record["parameters"]["clients"] == found["clients"] == 2
    assert found["rows_a_call"] == 2 * 24
    assert list(found["ways"]) == ["shared memory", "unix", "tcp"]
    for way, curves in found["ways"].items():
        assert f"{way}: " in shown
        assert curves["hit_rate"] == 1.0
        assert (f"empty, {way}: " in shown) == ("empty" in curves) == (way != "shared memory")
        for curve in (curves["ours"], curves.get("empty", curves["ours"])):
            assert curve["closed_loop_per_s"] > 0
            assert len(curve["points"]) in (1, 2)
            for point in curve["points"]:
                latency, service = point["latency_us"], point["service_us"]
                assert latency["count"] == point["due"] >= point["done"]
                assert 0 < latency["p50"] <= latency["p99"] <= latency["max"]
                assert service["count"] == 0 or latency["max"] >= service["max"]
                assert point["lag_us"]["count"] <= point["due"]
                assert point["verdict"] in ("kept", "saturated", "not generated")


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (["--factor", "1"], "--factor 1.0: rates rise by it"),
        (["--tokens", "3"], "fewer than --clients 2"),
        (["--ways", "pigeon"], "'pigeon': expected some of shm, unix, tcp"),
    ],
)
def test_wrong_loads(wrong: list[str], said: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = cli.main(["serve", "--dir", str(data), *SIZES, *wrong])
    except SystemExit as left:
        code = left.code
    assert code == 2
    told = capsys.readouterr()
    assert said in told.err
    assert told.err.count("\n") == 1
