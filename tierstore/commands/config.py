"""`tierstore config`: every configuration key, its value, and where the value came from."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator

from engram_client import connect
from engram_client.errors import ConfigError
from tierstore.config import LoadedConfig, add_config_arguments, config_from_arguments
from tierstore.config.units import format_bytes

LIVE_KEYS = ("dram.budget_bytes", "hbm.budget_bytes", "training.dram_bytes")
EPILOG = """\
Later layers win: defaults, the TOML file, the environment (TIERSTORE_DRAM_BUDGET_BYTES for
dram.budget_bytes), flags. What --show prints is itself a complete configuration file.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument(
        "--show", action="store_true", help="print every key, value, origin and meaning, as TOML"
    )
    parser.add_argument("--json", action="store_true", help="the same as one JSON object")
    parser.add_argument(
        "--connect",
        metavar="unix:PATH",
        help=f"hand {', '.join(LIVE_KEYS)}, given by --set, to a daemon that is serving",
    )
    add_config_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Checks the configuration; prints it with --show or --json, else says in one line that it is good."""
    loaded = config_from_arguments(args)
    if args.connect:
        _change_budget(args, loaded)
    elif args.json:
        json.dump(_as_json(loaded), sys.stdout, indent=2)
        print()
    elif args.show:
        print("\n".join(_toml_lines(loaded)))
    else:
        changed = sum(origin != "default" for origin in loaded.origins.values())
        print(f"the configuration is good: {changed} of {len(loaded.origins)} values set; --show prints them")
    return 0


def _change_budget(args: argparse.Namespace, loaded: LoadedConfig) -> None:
    """Only what was asked for is handed on, and only a budget can change while serving."""
    given = {key for key, origin in loaded.origins.items() if origin.startswith("flag")}
    if not given or not given <= set(LIVE_KEYS):
        named = ", ".join(sorted(given)) or "none"
        raise ConfigError(
            f"--connect changes a daemon that is serving: expected --set of "
            f"{', '.join(LIVE_KEYS)} and nothing else, got keys: {named}; other keys wait for the next start"
        )
    in_force = {}
    with connect(args.connect) as client:
        changes = (client.set_dram_budget, client.set_hbm_budget, client.set_training_budget)
        for key, change in zip(LIVE_KEYS, changes, strict=True):
            if key in given:
                in_force[key] = change(int(str(loaded.value(key))))
    if args.json:
        print(json.dumps(in_force))
    else:
        for key, budget in in_force.items():
            print(f"{key} = {format_bytes(budget)} is in force")


def _as_json(loaded: LoadedConfig) -> dict[str, dict[str, object]]:
    return {
        key: {"value": loaded.value(key), "origin": origin, "meaning": loaded.kind(key).meaning}
        for key, origin in loaded.origins.items()
    }


def _toml_lines(loaded: LoadedConfig) -> Iterator[str]:
    current = None
    for key, origin in loaded.origins.items():
        section, name = key.split(".")
        if section != current:
            yield f"[{section}]" if current is None else f"\n[{section}]"
            current = section
        yield f"{f'{name} = {_toml_value(loaded, key)}':<40}# {origin}: {loaded.kind(key).meaning}"


def _toml_value(loaded: LoadedConfig, key: str) -> str:
    value = loaded.value(key)
    # A JSON string, number or truth value is the same thing in TOML.
    return json.dumps(format_bytes(value) if loaded.kind(key).unit == "bytes" else value, ensure_ascii=False)
