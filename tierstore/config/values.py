"""One value of the configuration: its declared type, its bounds, and how text becomes it."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from engram_client.errors import ConfigError
from tierstore.config.units import parse_bytes, parse_seconds

TRUTH = {
    "true": True,
    "yes": True,
    "on": True,
    "1": True,
    "false": False,
    "no": False,
    "off": False,
    "0": False,
}


class ValueType:
    """What one key may hold, read from its `Annotated` declaration."""

    def __init__(self, declared: Any) -> None:
        metas = [m for m in getattr(declared, "__metadata__", ()) if isinstance(m, msgspec.Meta)]
        self.declared = declared
        self.base = get_args(declared)[0] if get_origin(declared) is Annotated else declared
        self.unit = next((m.extra["unit"] for m in metas if m.extra), None)
        self.meaning = next((m.description for m in metas if m.description), "")
        self.ge = next((m.ge for m in metas if m.ge is not None), None)
        self.le = next((m.le for m in metas if m.le is not None), None)

    def expected(self) -> str:
        """The type and its bounds, for an error message."""
        if get_origin(self.base) is Literal:
            return "one of " + ", ".join(get_args(self.base))
        kind = {
            "bytes": "a size such as 512MiB",
            "seconds": "a time in seconds such as 10 or 500ms",
            None: {int: "a whole number", bool: "true or false", str: "text"}.get(self.base, "a value"),
        }[self.unit]
        low = f" of at least {self.ge}" if self.ge is not None else ""
        high = f"{' and' if low else ' of'} at most {self.le}" if self.le is not None else ""
        return kind + low + high


@cache
def _declarations(section: type) -> dict[str, Any]:
    return get_type_hints(section, include_extras=True)


@cache
def value_type(section: type, name: str) -> ValueType:
    return ValueType(_declarations(section)[name])


def parse_value(key: str, kind: ValueType, raw: object, origin: str) -> object:
    """`raw`, typed (TOML) or text (environment, flags), as the key's value. Raises ConfigError."""
    typed = raw
    try:
        if kind.unit == "bytes" and isinstance(raw, str):
            typed = parse_bytes(raw)
        elif kind.unit == "seconds" and isinstance(raw, str):
            typed = parse_seconds(raw)
    except ValueError as error:
        raise _wrong(key, kind, raw, origin, str(error)) from None
    return check_value(key, kind, typed, origin)


def parse_text(key: str, kind: ValueType, text: str, origin: str) -> object:
    """A value that can only be given as text: `12` may mean a number, `on` a truth value."""
    if kind.base is bool:
        return check_value(key, kind, TRUTH.get(text.strip().lower(), text), origin)
    if kind.base is int and kind.unit is None:
        try:
            return check_value(key, kind, int(text), origin)
        except ValueError:
            raise _wrong(key, kind, text, origin) from None
    return parse_value(key, kind, text, origin)


def check_value(key: str, kind: ValueType, value: object, origin: str = "") -> object:
    """`value` if it has the declared type and lies within its bounds. Raises ConfigError."""
    try:
        return msgspec.convert(value, kind.declared)
    except msgspec.ValidationError:
        raise _wrong(key, kind, value, origin) from None


def _wrong(key: str, kind: ValueType, got: object, origin: str, detail: str = "") -> ConfigError:
    shown = repr(got) if isinstance(got, str) else str(got)
    where = f" ({origin})" if origin else ""
    why = f": {detail}" if detail else ""
    return ConfigError(f"$.{key}{where}: expected {kind.expected()}, got {shown}{why}")
