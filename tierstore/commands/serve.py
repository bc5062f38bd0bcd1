"""`tierstore serve`: the daemon in the foreground."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from tierstore.config import add_config_arguments, config_from_arguments

SHORTCUTS = {
    "--unix": ("serve.unix", "PATH"),
    "--tcp": ("serve.tcp", "HOST:PORT"),
    "--dram": ("dram.budget_bytes", "BYTES"),
}
EPILOG = """\
SIGTERM or SIGINT: stop taking requests, let running ones finish (serve.drain_timeout_s), exit 0.
A second signal: exit at once. SIGHUP: serve what was packed since, also new generations of tables.
Once it serves, one line on stdout names the addresses.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "directory", type=Path, metavar="DIR", help="store directory, as `tierstore pack` makes"
    )
    parser.add_argument("--json", action="store_true", help="the line on stdout as a JSON object")
    parser.add_argument(
        "--train", dest="key:training.enabled:--train", action="store_const", const="true",
        help="same as --set training.enabled=true",
    )  # fmt: skip
    add_config_arguments(parser, SHORTCUTS)


def run(args: argparse.Namespace) -> int:
    """Serves until told to stop."""
    from tierstore.daemon import run_daemon  # grpc and numba: not needed for --help

    loaded = config_from_arguments(args)
    logging.basicConfig(
        stream=sys.stderr,
        level=loaded.config.log.level.upper(),
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )

    def say_ready(addresses: list[str]) -> None:
        text = json.dumps({"serving": addresses}) if args.json else f"serving {' '.join(addresses)}"
        print(text, flush=True)

    run_daemon(args.directory, loaded.config, say_ready)
    return 0
