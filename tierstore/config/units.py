"""Sizes and times as people write them, and back.

A size is a whole number of bytes with an optional unit: `8GiB`, `512 MiB`, `1.5GB`, `1_000_000`.
KiB and its kin are powers of 1024, kB and its kin powers of 1000. A bare `G` is refused, because
half of its readers would be wrong. A time is in seconds unless it says `ms`, `s`, `min` or `h`.
"""

from __future__ import annotations

import re
from decimal import Decimal

BYTES = {
    "": 1,
    "b": 1,
    "kib": 1 << 10,
    "mib": 1 << 20,
    "gib": 1 << 30,
    "tib": 1 << 40,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
}
SECONDS = {"": Decimal(1), "ms": Decimal("0.001"), "s": Decimal(1), "min": Decimal(60), "h": Decimal(3600)}
QUANTITY = re.compile(r"\s*([+-]?\d[\d_]*(?:\.\d+)?)\s*([a-zA-Z]*)\s*")


def parse_bytes(text: str) -> int:
    """Bytes. Raises ValueError for an unknown unit or a size that is no whole number of bytes."""
    number, unit = _split(text)
    if unit.lower() not in BYTES:
        hint = (
            f"write {unit}iB or {unit}B"
            if unit.lower() in ("k", "m", "g", "t")
            else "use KiB, MiB, GiB or TiB"
        )
        raise ValueError(f"unknown unit {unit!r}; {hint}")
    size = number * BYTES[unit.lower()]
    if size != int(size):
        raise ValueError("it is no whole number of bytes")
    return int(size)


def parse_seconds(text: str) -> float:
    """Seconds. Raises ValueError for an unknown unit."""
    number, unit = _split(text)
    if unit.lower() not in SECONDS:
        raise ValueError(f"unknown unit {unit!r}; use ms, s, min or h")
    return float(number * SECONDS[unit.lower()])


def format_bytes(size: int) -> str:
    """The shortest exact form with a binary unit: 1073741824 -> "1GiB", 1000 -> "1000B"."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if size and size % BYTES[unit.lower()] == 0:
            return f"{size // BYTES[unit.lower()]}{unit}"
    return f"{size}B"


def _split(text: str) -> tuple[Decimal, str]:
    match = QUANTITY.fullmatch(text)
    if not match:
        raise ValueError("it is not a number with a unit")
    return Decimal(match[1].replace("_", "")), match[2]
