"""The `tierstore` command: a thin front that loads a subcommand only when it is asked for."""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import sys
from importlib import metadata
from types import ModuleType

from engram_client import errors

COMMANDS = {
    "serve": "serve a store directory to other processes and machines",
    "pack": "pack a checkpoint's tables into a store directory",
    "create": "make tables that are to be trained",
    "inspect": "say what a row file or store directory holds",
    "verify": "read every page and compare its checksum",
    "adopt": "take row files into the catalog that are not in it",
    "export": "write a committed step of a training store as a checkpoint",
    "publish": "make the weights of a committed step a generation that is served",
    "snapshot": "copy a committed step into a training store of its own",
    "reshard": "deal the rows of a training store out to another number of ranks",
    "rollback": "make an earlier generation of a table current again",
    "stats": "say how a daemon is doing",
    "config": "check and show the configuration",
}
OK, FOUND_PROBLEM, USAGE, STORAGE, UNAVAILABLE, INTERRUPTED = 0, 1, 2, 3, 4, 130
EPILOG = """\
exit codes:
  0    done
  1    the operation found a problem, such as damage that verify names
  2    bad usage or configuration
  3    storage or format error
  4    unavailable: nobody there, overloaded, too late, or locked by another process
  130  interrupted

Data goes to stdout, as JSON with --json; progress and errors go to stderr.
"""
EXIT_CODES: tuple[tuple[type[errors.TierstoreError], int], ...] = (
    (errors.ConfigError, USAGE),
    (errors.BadRequest, USAGE),
    (errors.UnknownTable, USAGE),
    (errors.StorageError, STORAGE),
    (errors.FormatError, STORAGE),
    (errors.Unavailable, UNAVAILABLE),
    (errors.Overloaded, UNAVAILABLE),
    (errors.DeadlineExceeded, UNAVAILABLE),
    (errors.StoreLocked, UNAVAILABLE),
)


def main(argv: list[str] | None = None) -> int:
    """Runs one subcommand; returns its exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # paths need not be UTF-8, and come out as they are
    parser = _front()
    name = next((a for a in arguments if not a.startswith("-")), None)
    command = _load(parser, name) if name in COMMANDS else None
    args = parser.parse_args(arguments)
    if command is None:
        parser.print_help(sys.stderr)
        return USAGE
    return run_command(command, args)


def run_command(command: ModuleType, args: argparse.Namespace) -> int:
    """One subcommand, with the errors a user can cause as one line and an exit code."""
    try:
        code = int(command.run(args))
        sys.stdout.flush()
        return code
    except errors.TierstoreError as error:
        _report(error, as_json=getattr(args, "json", False))
        return exit_code(error)
    except KeyboardInterrupt:
        print("tierstore: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader of our output went away, as `| head` does; keep the interpreter quiet about it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except OSError as error:
        # A path that is too long or that we may not look at, wherever that was noticed.
        where = f"{error.filename}: " if error.filename else ""
        message = f"{where}{error.strerror or error}; check the path and its permissions"
        _report(errors.StorageError(message), as_json=getattr(args, "json", False))
        return STORAGE


def exit_code(error: errors.TierstoreError) -> int:
    return next((code for kind, code in EXIT_CODES if isinstance(error, kind)), FOUND_PROBLEM)


def _front() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tierstore",
        description="A memory service for giant N-gram embedding tables.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_Version, nargs=0, help="print the version and exit")
    parser.set_defaults(subparsers=parser.add_subparsers(metavar="COMMAND"))
    for name, meaning in COMMANDS.items():
        parser.get_default("subparsers").add_parser(name, help=meaning, description=meaning)
    return parser


class _Version(argparse.Action):
    """Looked up only when it is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_arguments: object) -> None:
        print(f"tierstore {metadata.version('tierstore')}")
        parser.exit()


def _load(parser: argparse.ArgumentParser, name: str) -> ModuleType:
    command = importlib.import_module(f"tierstore.commands.{name}")
    command.add_arguments(parser.get_default("subparsers").choices[name])
    return command


def _report(error: errors.TierstoreError, *, as_json: bool) -> None:
    message = str(error)
    line = json.dumps({"error": error.code, "message": message}) if as_json else f"tierstore: {message}"
    print(line, file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
