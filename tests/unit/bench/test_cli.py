"""The dispatcher: names from files, errors in one line, documented exit codes."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest
from tierbench import cli


def test_the_overview_lists_each_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, path in cli.command_files().items():
        assert name in out
        assert cli.one_line_help(path) in out
        assert cli.one_line_help(path).endswith(".")


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert cli.main(["no-such"]) == 2
    assert "unknown command 'no-such'; known: " in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        cli.main(["make-checkpoint", "--model", "gpt"])
    assert caught.value.code == 2


def test_an_error_is_one_line_on_stderr(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = ["--model", "qwen-ple", "--rows-per-head", "1", "--out", str(tmp_path / "x")]
    assert cli.main(["make-checkpoint", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("tierbench: need 2 to 1099511627776 rows per head")
    assert captured.err.count("\n") == 1


def test_a_new_command_needs_only_its_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "say_it.py").write_text(
        '"""Say it."""\n'
        "def add_arguments(parser):\n    parser.add_argument('word')\n"
        "def run(args):\n    print(args.word)\n    return 7\n"
    )
    from tierbench import commands

    monkeypatch.setattr(cli, "FOLDER", tmp_path)
    monkeypatch.setattr(commands, "__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "tierbench.commands.say_it", raising=False)
    assert cli.main(["say-it", "hello"]) == 7
    assert capsys.readouterr().out == "hello\n"


def test_interruption(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    from tierbench.commands import corpus

    def interrupt(args: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(corpus, "run", interrupt)
    assert cli.main(["corpus", "--out", "x.npz"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_that_end_unwind(
    number: signal.Signals, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from tierbench.commands import corpus

    unwound = []

    def end(args: object) -> int:
        try:
            os.kill(os.getpid(), number)
            signal.sigtimedwait([], 10)
        finally:
            unwound.append(True)
        return 0

    before = signal.getsignal(number)
    monkeypatch.setattr(corpus, "run", end)
    assert cli.main(["corpus", "--out", "x.npz"]) == 128 + number
    assert unwound
    assert f"ended by {number.name}" in capsys.readouterr().err
    assert signal.getsignal(number) == before


def test_a_record_that_cannot_be_written_is_refused_before_the_work(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from tierbench.commands import serve

    monkeypatch.setattr(serve, "run", lambda args: pytest.fail("it worked"))
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        assert cli.main(["serve", "--record", str(place)]) == 3
        shown = capsys.readouterr()
        assert f"{place}: records cannot be written there" in shown.err
        assert shown.err.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file"]


def test_a_signal_that_python_drops_comes_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Raised where a destructor runs, an exception goes no further."""
    from tierbench.commands import corpus

    class Last:
        def __del__(self) -> None:
            os.kill(os.getpid(), signal.SIGTERM)
            list(range(1000))

    def end(args: object) -> int:
        last = Last()
        del last
        for _ in range(1000):
            signal.sigtimedwait([], 0.01)
        pytest.fail("nothing came")

    monkeypatch.setattr(corpus, "run", end)
    assert cli.main(["corpus", "--out", "x.npz"]) == 128 + signal.SIGTERM
    assert capsys.readouterr().err == "tierbench: ended by SIGTERM\n"
