"""`tierbench NAME ...`: each subcommand is one module in `commands`, imported only when it is called.

Exit codes: 0 done; 1 an error, told in one line on stderr; 2 wrong usage; 130 interrupted. Data goes to
stdout, progress and errors to stderr.
"""

from __future__ import annotations

import argparse
import ast
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path

from engram_client.errors import TierstoreError

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
            "`tierbench COMMAND --help` tells its options.",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    commands = command_files()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(overview(), file=sys.stdout if arguments else sys.stderr)
        return 0 if arguments else 2
    name, rest = arguments[0], arguments[1:]
    if name not in commands:
        print(f"tierbench: error: unknown command {name!r}; known: {', '.join(commands)}", file=sys.stderr)
        return 2
    return run_command(name, rest)


def run_command(name: str, arguments: list[str]) -> int:
    try:
        module = importlib.import_module(f"tierbench.commands.{name.replace('-', '_')}")
        parser = argparse.ArgumentParser(
            prog=f"tierbench {name}",
            description=module.__doc__,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        module.add_arguments(parser)
        return int(module.run(parser.parse_args(arguments)))
    except TierstoreError as error:
        print(f"tierbench {name}: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"tierbench {name}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of stdout has gone, as `head` does
        sys.stderr.close()
        return 1


if __name__ == "__main__":
    sys.exit(main())
