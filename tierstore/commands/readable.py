"""Byte counts for people: three digits and a binary unit."""

from __future__ import annotations


def readable_bytes(count: float) -> str:
    """1536 -> "1.50 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:#.3g} {unit}".replace(". ", " ")
        count /= 1024
    return f"{count:#.4g} TiB"
