"""The command-line flags that every command with a configuration shares."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path

from engram_client.errors import ConfigError
from tierstore.config.load import LoadedConfig, load_config


def add_config_arguments(
    parser: argparse.ArgumentParser, shortcuts: Mapping[str, tuple[str, str]] | None = None
) -> None:
    """`--config`, `--set`, and a flag of its own for some keys: {"--unix": ("serve.unix", "PATH")}."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="TOML file with the configuration")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="one value, such as dram.budget_bytes=8GiB; may be repeated, wins over file and environment",
    )
    for flag, (key, metavar) in (shortcuts or {}).items():
        parser.add_argument(
            flag, dest=f"key:{key}:{flag}", metavar=metavar, help=f"same as --set {key}={metavar}"
        )


def config_from_arguments(args: argparse.Namespace) -> LoadedConfig:
    """The configuration that a command line, the environment and the named file give together."""
    flags = dict(_assignment(text) for text in args.set)
    names = {}
    for dest, value in vars(args).items():
        if dest.startswith("key:") and value is not None:
            _, key, flag = dest.split(":", 2)
            flags[key], names[key] = value, flag
    return load_config(file=args.config, environ=os.environ, flags=flags, flag_names=names)


def _assignment(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"flag --set {text}: expected KEY=VALUE, such as --set dram.budget_bytes=8GiB")
    return key.strip(), value
