"""Changing a daemon's DRAM budget while it serves: over its unix socket, by client and by command."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from engram_client import connect, errors
from tests.support.daemon import Daemon
from tierstore.cli import USAGE, main

MIB = 1 << 20


@pytest.fixture(autouse=True)
def budget_as_it_was(daemon: Daemon) -> Iterator[None]:
    with connect(daemon.unix) as client:
        before = client.stats()["dram_budget_bytes"]
        yield
        client.set_dram_budget(before)


def test_a_client_on_the_unix_socket_changes_it(daemon: Daemon) -> None:
    with connect(daemon.unix) as client:
        with pytest.raises(errors.BadRequest, match="nothing is in training"):
            client.set_training_budget(6 * MIB)
        assert client.set_dram_budget(6 * MIB) == 6 * MIB
        assert client.stats()["dram_bytes"] <= 6 * MIB


def test_tcp_is_refused(daemon: Daemon) -> None:
    with connect(daemon.tcp) as client:
        with pytest.raises(errors.BadRequest, match="unix socket only"):
            client.set_dram_budget(6 * MIB)
        assert client.stats()["dram_budget_bytes"] != 6 * MIB


def test_a_budget_beyond_the_machine_is_refused_by_the_daemon(daemon: Daemon) -> None:
    with connect(daemon.unix) as client, pytest.raises(errors.ConfigError, match="memory"):
        client.set_dram_budget(1 << 50)


def test_the_command_changes_it_and_says_so(daemon: Daemon, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["config", "--connect", daemon.unix, "--set", "dram.budget_bytes=5MiB"]
    assert main(arguments) == 0
    assert "5MiB is in force" in capsys.readouterr().out
    assert main([*arguments, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"dram.budget_bytes": 5 * MIB}


@pytest.mark.parametrize("settings", [[], ["--set", "nvme.read_threads=4"]])
def test_the_command_hands_on_nothing_else(
    daemon: Daemon, settings: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["config", "--connect", daemon.unix, *settings]) == USAGE
    assert "dram.budget_bytes" in capsys.readouterr().err
