"""Reads the layers of the configuration and keeps where each value came from."""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram_client.errors import ConfigError
from tierstore.config.memory_limit import MemoryLimit, memory_limit
from tierstore.config.rules import check_config
from tierstore.config.schema import KEYS, SECTIONS, Config
from tierstore.config.values import ValueType, parse_text, parse_value, value_type

ENV_PREFIX = "TIERSTORE_"
ENV_OF_OTHERS = frozenset({"TIERSTORE_KERNEL_CACHE"})  # read by engram_client.jit
ENV_KEYS = {ENV_PREFIX + key.replace(".", "_").upper(): key for key in KEYS}


@dataclass(frozen=True)
class LoadedConfig:
    """A checked configuration, and for every key "section.name" the layer that set it."""

    config: Config
    origins: dict[str, str]  # "default", "file PATH", "env VARIABLE" or "flag --NAME ..."

    def value(self, key: str) -> Any:
        section, name = key.split(".")
        return getattr(getattr(self.config, section), name)

    def kind(self, key: str) -> ValueType:
        return value_type(KEYS[key], key.split(".")[1])


@dataclass(frozen=True)
class _Setting:
    key: str
    value: object
    origin: str


def load_config(
    *,
    file: Path | None,
    environ: Mapping[str, str],
    flags: Mapping[str, object],
    flag_names: Mapping[str, str] | None = None,
    memory: MemoryLimit | None = None,
) -> LoadedConfig:
    """Defaults, then `file`, then `environ`, then `flags` ("section.name" -> value or text).

    `flag_names` says what a user typed for a key where that was not `--set KEY`. `memory` is what
    the budgets are held against; by default what this process may really use. Raises ConfigError
    with the path of the bad key, what was expected and got, and the layer it came from.
    """
    values: dict[str, dict[str, Any]] = {section: {} for section in SECTIONS}
    origins = dict.fromkeys(KEYS, "default")
    settings = [*_from_file(file), *_from_environ(environ), *_from_flags(flags, flag_names or {})]
    for setting in settings:
        section, name = setting.key.split(".")
        values[section][name] = setting.value
        origins[setting.key] = setting.origin
    sections: dict[str, Any] = {name: section(**values[name]) for name, section in SECTIONS.items()}
    config = Config(**sections)
    check_config(config, memory or memory_limit(), origins)
    return LoadedConfig(config, origins)


def _from_file(file: Path | None) -> Iterator[_Setting]:
    if file is None:
        return
    origin = f"file {file}"
    for section, content in _read_toml(file).items():
        if section not in SECTIONS:
            raise _unknown(section, origin, SECTIONS)
        if not isinstance(content, dict):
            raise ConfigError(f"$.{section} ({origin}): expected a table [{section}], got {content!r}")
        for name, raw in content.items():
            key = f"{section}.{name}"
            yield _Setting(key, parse_value(key, _kind(key, origin), raw, origin), origin)


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_bytes().decode())
    except OSError as error:
        raise ConfigError(f"configuration file {file} cannot be read: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"configuration file {file} is not valid TOML: {error}") from error


def _from_environ(environ: Mapping[str, str]) -> Iterator[_Setting]:
    for variable in sorted(environ):
        if not variable.startswith(ENV_PREFIX) or variable in ENV_OF_OTHERS:
            continue
        if variable not in ENV_KEYS:
            near = _near(variable, [*ENV_KEYS, *ENV_OF_OTHERS])
            raise ConfigError(
                f"environment variable {variable} names no configuration key{near}; unset or rename it"
            )
        key, origin = ENV_KEYS[variable], f"env {variable}"
        yield _Setting(key, parse_text(key, _kind(key, origin), environ[variable], origin), origin)


def _from_flags(flags: Mapping[str, object], names: Mapping[str, str]) -> Iterator[_Setting]:
    for key, raw in flags.items():
        origin = f"flag {names.get(key, f'--set {key}')}"
        kind = _kind(key, origin)
        text = isinstance(raw, str)
        value = parse_text(key, kind, str(raw), origin) if text else parse_value(key, kind, raw, origin)
        yield _Setting(key, value, origin)


def _kind(key: str, origin: str) -> ValueType:
    if key not in KEYS:
        raise _unknown(key, origin, KEYS)
    return value_type(KEYS[key], key.split(".")[1])


def _unknown(key: str, origin: str, known: Iterable[str]) -> ConfigError:
    near = _near(key, known)
    return ConfigError(f"$.{key} ({origin}): unknown key{near}; `tierstore config --show` lists all keys")


def _near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=2, cutoff=0.6)
    return f"; did you mean {' or '.join(close)}?" if close else ""
