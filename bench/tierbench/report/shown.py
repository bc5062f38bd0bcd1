"""Numbers as people read them, with their unit."""

from __future__ import annotations

import re

NBSP = "\u00a0"  # a number and its unit stay on one line

_BINARY = (("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10))
_TIMES = (("s", 1e6), ("ms", 1e3), ("µs", 1.0), ("ns", 1e-3))
_DECIMAL = (("G", 1e9), ("M", 1e6), ("k", 1e3))


def three_digits(value: float) -> str:
    """At least three significant digits, thousands apart: 0.667, 12.4, 1,240."""
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if size >= 10 else f"{value:.2f}" if size >= 1 else f"{value:.3g}"


def size(count: float) -> str:
    """Bytes: 18.9 GiB."""
    for unit, of in _BINARY:
        if abs(count) >= of:
            return f"{float(f'{count / of:.3g}'):,g}{NBSP}{unit}"
    return f"{count:,.0f}{NBSP}B"


def time_us(value: float) -> str:
    """Microseconds in the unit that fits."""
    for unit, of in _TIMES:
        if abs(value) >= of:
            return f"{three_digits(value / of)}{NBSP}{unit}"
    return f"{value:.3g}{NBSP}µs"


def count(value: float) -> str:
    """25.4 M."""
    for unit, of in _DECIMAL:
        if abs(value) >= of:
            return f"{three_digits(value / of)}{NBSP}{unit}"
    return three_digits(value)


def percent(share: float) -> str:
    return f"{100 * share:.1f}{NBSP}%"


def whole_percent(share: float) -> str:
    return (
        f"{100 * share:g}{NBSP}%"
        if abs(100 * share - round(100 * share)) < 1e-9
        else f"{100 * share:.1f}{NBSP}%"
    )


def plain(value: float) -> str:
    return three_digits(value)


def tidy(shown: str) -> str:
    """Without zeros that end decimals: for scales and for what is asked."""
    return re.sub(r"(\.\d*?)0+(?!\d)", r"\1", shown).replace(f".{NBSP}", NBSP).rstrip(".")
