"""`tierbench NAME ...`: each subcommand is one module in `commands`, imported only when it is called.

Exit codes are those of `tierstore`: 0 done, 1 a problem was found, 2 bad usage, 3 storage or format,
4 unavailable, 130 interrupted, 128 + N ended by signal N. Data goes to stdout; progress and errors, one
line each, to stderr.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from engram_client.errors import TierstoreError
from tierbench.signals import Ended, ending_signals_raised
from tierstore.cli import INTERRUPTED, OK, STORAGE, USAGE, exit_code

FOLDER = Path(__file__).parent / "commands"


def command_files() -> dict[str, Path]:
    """Subcommands by name: `make_checkpoint.py` is `make-checkpoint`."""
    files = sorted(path for path in FOLDER.glob("*.py") if not path.name.startswith("_"))
    return {path.stem.replace("_", "-"): path for path in files}


def one_line_help(path: Path) -> str:
    """The first line of a module's docstring, read without importing the module."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def overview() -> str:
    commands = command_files()
    width = max(len(name) for name in commands)
    lines = [f"  {name:<{width}}  {one_line_help(path)}" for name, path in commands.items()]
    return "\n".join(
        [
            "usage: tierbench COMMAND [options]",
            "",
            "Makes checkpoints and measures tierstore beside its yardsticks.",
            "",
            "commands:",
            *lines,
            "",
            "`tierbench COMMAND --help` tells its options; exit codes are those of `tierstore --help`.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = command_files()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview(), file=sys.stdout if arguments else sys.stderr)
        return OK if arguments else USAGE
    name, rest = arguments[0], arguments[1:]
    if name not in commands:
        print(f"tierbench: error: unknown command {name!r}; known: {', '.join(commands)}", file=sys.stderr)
        return USAGE
    return run_command(name, rest)


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line, without all options there are."""

    def error(self, message: str) -> NoReturn:
        self.exit(USAGE, f"{self.prog}: error: {message}; see {self.prog} --help\n")


def run_command(name: str, arguments: list[str]) -> int:
    try:
        with ending_signals_raised():
            return _called(name, arguments)
    except TierstoreError as error:
        print(f"tierbench: {error}", file=sys.stderr)
        return exit_code(error)
    except Ended as ended:
        print(f"tierbench: ended by {signal.Signals(ended.number).name}", file=sys.stderr)
        return 128 + ended.number
    except KeyboardInterrupt:
        print("tierbench: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # whoever read our output went away, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as error:  # the outside world in ways of its own: a full disk, a folder that is closed
        print(f"tierbench: {error.filename or name}: {error.strerror or error}", file=sys.stderr)
        return STORAGE


def _called(name: str, arguments: list[str]) -> int:
    module = importlib.import_module(f"tierbench.commands.{name.replace('-', '_')}")
    parser = OneLineParser(
        prog=f"tierbench {name}",
        description=module.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    module.add_arguments(parser)
    args = parser.parse_args(arguments)
    if folder := getattr(args, "record", None):
        from tierbench.record import check_writable

        check_writable(folder)  # now, not after all the work
    code = int(module.run(args))
    sys.stdout.flush()
    return code


if __name__ == "__main__":
    sys.exit(main())
