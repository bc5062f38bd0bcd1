"""`tierstore config`, run as a user runs it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tierstore.cli import main
from tierstore.config import load_config
from tierstore.config.schema import KEYS


def test_show_is_a_configuration_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["config", "--show", "--set", "dram.budget_bytes=96MiB", "--set", 'serve.unix=/tmp/ü "x"']) == 0
    )
    shown = capsys.readouterr().out
    again = tmp_path / "again.toml"
    again.write_text(shown)
    config = load_config(file=again, environ={}, flags={}).config
    assert config.dram.budget_bytes == 96 << 20
    assert config.serve.unix == '/tmp/ü "x"'
    assert {f"{s}.{n}" for s, names in tomllib.loads(shown).items() for n in names} == set(KEYS)
    assert 'budget_bytes = "96MiB"' in shown
    assert "# flag --set dram.budget_bytes: DRAM for cached records" in shown


def test_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "t.toml"
    file.write_text("[log]\nlevel = 'debug'\n")
    assert main(["config", "--json", "--config", str(file)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["log.level"]["value"] == "debug"
    assert shown["log.level"]["origin"] == f"file {file}"
    assert shown["nvme.read_threads"]["origin"] == "default"
    assert all(entry["meaning"] for entry in shown.values())


def test_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("TIERSTORE_NVME_READ_THREADS", "7")
    assert main(["config", "--show"]) == 0
    assert "# env TIERSTORE_NVME_READ_THREADS:" in capsys.readouterr().out


def test_check_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--set", "log.level=debug"]) == 0
    assert "1 of " in capsys.readouterr().out


@pytest.mark.parametrize("argument", ["dram.budget=8GiB", "dram.budget_bytes", "dram.budget_bytes=-1"])
def test_bad_configuration_is_one_line_and_exit_code_2(
    argument: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "--show", "--set", argument]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("tierstore: ")
    assert output.err.count("\n") == 1


def test_errors_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "--json", "--set", "log.level=loud"]) == 2
    error = json.loads(capsys.readouterr().err)
    assert error["error"] == "config_error"
    assert "$.log.level" in error["message"]


def test_closed_pipe_is_no_error() -> None:
    environ = {k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"}
    script = "import sys; from tierstore.cli import main; sys.exit(main(['config', '--show']))"
    child = subprocess.Popen(
        [sys.executable, "-c", script], env=environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert child.stdout is not None
    child.stdout.close()
    _, err = child.communicate()
    assert (child.returncode, err) == (0, b"")
