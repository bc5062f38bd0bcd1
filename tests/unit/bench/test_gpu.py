"""`tierbench gpu`: sections by file, each apart from the others, bars, parts that fit."""

from __future__ import annotations

import json
import os
import re
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tierbench import cli
from tierbench.gpu import child, plan
from tierbench.gpu.bars import NOT_JUDGED, Bar
from tierbench.gpu.child import run_section
from tierbench.gpu.isolated import run_isolated
from tierbench.gpu.scale import check_scale

CPU = torch.device("cpu")
OPTIONS = ["--device", "cpu", "--scale", "check", "--seed", "0", "--scratch"]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.mark.parametrize("name", plan.section_files())
def test_every_section_runs_at_a_tiny_size(name: str, scratch: Path) -> None:
    """Its figures say nothing on a CPU; that each of its bars finds its figure does."""
    found = run_section(name, CPU, check_scale(scratch, seed=1))
    json.dumps(found, allow_nan=False)
    assert found["status"] == "done"
    assert [bar["verdict"] for bar in found["bars"]] == [NOT_JUDGED] * len(found["bars"]), found["bars"]


def test_a_record_is_written_for_each_section(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--device", "cpu", "--only", "copy", "--dir", str(tmp_path / "data")]
    assert cli.main(["gpu", *options, "--record", str(tmp_path / "records"), "--json"]) == 0
    outcome = json.loads(capsys.readouterr().out)["copy"]
    (path,) = (tmp_path / "records").iterdir()
    record = json.loads(path.read_text())
    assert record["name"] == "gpu-copy"
    assert record["results"]["results"] == outcome["results"]
    assert outcome["results"]["device_to_device_bytes_per_s"]["count"] == 2
    assert record["results"]["device"]["type"] == "cpu"
    assert str(tmp_path) not in path.read_text()


def test_a_section_that_hangs_is_ended_with_what_it_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both hold one end of a pipe, whose other end finds nobody left."""
    ours, theirs = os.pipe()
    os.set_inheritable(theirs, True)
    (tmp_path / "hanging.py").write_text(
        f"import os, time\nprint('was here', flush=True)\nos.fork()\nos.write({theirs}, b'.')\n"
        "time.sleep(600)\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("tierbench.gpu.isolated.CHILD", "hanging")
    monkeypatch.setattr(subprocess, "Popen", partial(subprocess.Popen, close_fds=False))
    found = run_isolated("any", ["--none"], 3.0)
    os.close(theirs)
    assert os.read(ours, 3) == b".."
    assert os.read(ours, 1) == b""
    os.close(ours)
    assert found["status"] == "timed out"
    assert "not done after 3 s" in found["error"]
    assert "was here" in found["log"]


def test_a_section_that_dies_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "dying.py").write_text("import os\nos.abort()\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr("tierbench.gpu.isolated.CHILD", "dying")
    found = run_isolated("any", [], 60)
    assert (found["status"], found["error"]) == ("failed", "left with exit code -6")


def test_no_such_device_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def in_this_process(name: str, options: list[str], timeout_s: float) -> dict[str, Any]:
        out = tmp_path / "out"
        assert child.main([name, *options, "--out", str(out)]) == 1
        return {**json.loads(out.read_text()), "took_s": 0.0}

    monkeypatch.setattr("tierbench.commands.gpu.run_isolated", in_this_process)
    assert cli.main(["gpu", "--device", "no-such", "--dir", str(tmp_path), "--only", "copy"]) == 2
    assert "--device no-such" in capsys.readouterr().err


def test_wrong_names(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gpu", "--only", "no-such"]) == 2
    assert "there is no section ['no-such']; there are copy" in capsys.readouterr().err


def test_sections_are_listed_with_their_timeouts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gpu", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("\t")[0] for line in lines] == list(plan.section_files())
    assert all(re.fullmatch(r"\w+\t\d+ s", line) for line in lines)


def test_each_part_fits_into_a_call_and_both_are_everything() -> None:
    parts = [plan.chosen([], part) for part in plan.PARTS]
    assert {name for part in parts for name in part} == set(plan.section_files())
    for names in parts:
        assert names[0] == plan.FIRST
        assert sum(plan.timeout_of(name) for name in names) <= plan.PART_LIMIT_S


def test_nothing_begins_that_could_end_too_late(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["gpu", "--device", "cpu", "--limit-s", "1", "--dir", str(tmp_path), "--json"]) == 1
    outcomes = json.loads(capsys.readouterr().out)
    assert {found["status"] for found in outcomes.values()} == {"left out"}


@pytest.mark.parametrize(
    ("figure", "sign", "bound", "verdict"),
    [
        (1.3, ">=", 1.2, "met"),
        (1.1, ">=", 1.2, "missed"),
        (0.02, "<=", 0.03, "met"),
        ("no", "==", "no", "met"),
    ],
)
def test_bars(figure: object, sign: str, bound: float | str, verdict: str) -> None:
    bar = Bar("what", "a.b", sign, bound)
    assert bar.judge({"a": {"b": figure}}, on_gpu=True)["verdict"] == verdict
    assert bar.judge({"a": {"b": figure}}, on_gpu=False)["verdict"] == NOT_JUDGED
    assert "no a.b" in bar.judge({"a": {}}, on_gpu=False)["verdict"]
