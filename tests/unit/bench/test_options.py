"""Numbers on command lines: a wrong one is one clear line, for every command alike."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable
from typing import Any

import pytest
from tierbench import cli, options

CHECKED = (
    options.count,
    options.count_list,
    options.whole,
    options.positive,
    options.not_negative,
    options.fraction,
    options.byte_size,
)
WRONG = {
    options.count: ("-5", "0", "1.5", "x", "", "9223372036854775808"),
    options.count_list: ("1,0", "", "1,,2", "-1"),
    options.whole: ("-1", "0.5", "nan"),
    options.positive: ("0", "-1", "nan", "inf", "x"),
    options.not_negative: ("-0.1", "nan", "inf"),
    options.fraction: ("-0.1", "1.1", "nan", "50%"),
    options.byte_size: ("0", "-5", "8G", "1.5", "16777216TiB"),
}
RIGHT: dict[Callable[[str], Any], tuple[str, Any]] = {
    options.count: ("7", 7),
    options.count_list: ("3,1", (3, 1)),
    options.whole: ("0", 0),
    options.positive: ("0.5", 0.5),
    options.not_negative: ("0", 0.0),
    options.fraction: ("1", 1.0),
    options.byte_size: ("1.5KiB", 1536),
}


@pytest.mark.parametrize("kind", CHECKED)
def test_what_is_taken(kind: Callable[[str], Any]) -> None:
    text, value = RIGHT[kind]
    assert kind(text) == value
    for wrong in WRONG[kind]:
        with pytest.raises(argparse.ArgumentTypeError):
            kind(wrong)


def actions(command: str) -> list[argparse.Action]:
    parser = argparse.ArgumentParser()
    importlib.import_module(f"tierbench.commands.{command.replace('-', '_')}").add_arguments(parser)
    return parser._actions


@pytest.mark.parametrize("command", list(cli.command_files()))
def test_no_command_takes_numbers_unchecked(command: str) -> None:
    bare = [
        action.option_strings
        for action in actions(command)
        if action.type in (int, float) and not action.choices
    ]
    assert not bare, f"tierbench {command}: {bare} take any number; use tierbench.options"


@pytest.mark.parametrize("command", list(cli.command_files()))
def test_wrong_numbers_are_refused_before_anything_is_done(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for action in actions(command):
        if action.type in CHECKED:
            wrong = WRONG[action.type][0]
            with pytest.raises(SystemExit) as caught:
                cli.main([command, f"{action.option_strings[0]}={wrong}"])
            assert caught.value.code == 2
            told = capsys.readouterr().err
            assert action.option_strings[0] in told
            assert "expected" in told
            assert told.count("\n") == 1
