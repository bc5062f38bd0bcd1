"""The front of the `tierstore` command: what it says and how it ends."""

from __future__ import annotations

import argparse
import json
import types
from collections.abc import Callable
from importlib import metadata

import pytest

from engram_client import errors
from tierstore.cli import COMMANDS, main, run_command


def ends(command: Callable[[argparse.Namespace], int], *, as_json: bool = False) -> int:
    module = types.ModuleType("command")
    module.run = command  # type: ignore[attr-defined]
    return run_command(module, argparse.Namespace(json=as_json))


def raising(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        raise error

    return run


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main([name, "--help"])
    assert caught.value.code == 0
    help_text = capsys.readouterr().out
    assert help_text.startswith(f"usage: tierstore {name}")
    assert "--json" in help_text


def test_help_lists_exit_codes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "exit codes:" in capsys.readouterr().out


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr().out == f"tierstore {metadata.version('tierstore')}\n"


def test_no_command_is_bad_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("usage: tierstore")


@pytest.mark.parametrize("arguments", [["unpack"], ["config", "--shwo"], ["config", "extra"]])
def test_bad_usage(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.VocabularyMismatch, 1),
        (errors.ConfigError, 2),
        (errors.UnknownTable, 2),
        (errors.IdOutOfRange, 2),
        (errors.DataCorrupt, 3),
        (errors.FormatError, 3),
        (errors.StoreLocked, 4),
        (errors.DeadlineExceeded, 4),
        (errors.Unavailable, 4),
    ],
)
def test_exit_codes(
    error: type[errors.TierstoreError], code: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ends(raising(error("what happened"))) == code
    assert capsys.readouterr().err == "tierstore: what happened\n"


def test_errors_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(raising(errors.DataCorrupt("page 7")), as_json=True) == 3
    assert json.loads(capsys.readouterr().err) == {"error": "data_corrupt", "message": "page 7"}


def test_interrupted(capsys: pytest.CaptureFixture[str]) -> None:
    assert ends(raising(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == "tierstore: interrupted\n"


def test_a_mistake_of_ours_is_not_hidden() -> None:
    with pytest.raises(ZeroDivisionError):
        ends(raising(ZeroDivisionError()))


def test_a_command_says_how_it_ended() -> None:
    assert ends(lambda args: 1) == 1
