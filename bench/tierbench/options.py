"""What options of every command take: counts, whole numbers, positive numbers, shares, sizes.

A wrong one is refused while the command line is read, in one line that says what is taken and what was given,
before anything is made or measured.
"""

from __future__ import annotations

import argparse
import math

from tierstore.config.units import parse_bytes

COUNT_MAX = 2**63 - 1


def count(text: str) -> int:
    """A whole number from 1 on."""
    return _whole(text, 1)


def whole(text: str) -> int:
    """A whole number from 0 on; also what seeds are."""
    return _whole(text, 0)


def positive(text: str) -> float:
    """A finite number above 0, such as a time that something lasts."""
    found = _number(text)
    if not found > 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number above 0")
    return found


def not_negative(text: str) -> float:
    """A finite number from 0 on, such as a pause or a price."""
    found = _number(text)
    if found < 0:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a number of 0 or more")
    return found


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    found = _number(text)
    if not 0 <= found <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a share, a number from 0 to 1")
    return found


def count_list(text: str) -> tuple[int, ...]:
    """Counts with commas between them."""
    return tuple(count(part) for part in text.split(","))


def byte_size(text: str) -> int:
    """Bytes, at least one, as people write them: 4GiB."""
    try:
        found = parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
    if not 1 <= found <= COUNT_MAX:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a size of 1 byte or more, below 2^63")
    return found


def _whole(text: str, least: int) -> int:
    try:
        found = int(text)
    except ValueError:
        found = least - 1
    if not least <= found <= COUNT_MAX:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number from {least} on, below 2^63")
    return found


def _number(text: str) -> float:
    try:
        found = float(text)
    except ValueError:
        found = math.nan
    if not math.isfinite(found):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a finite number")
    return found
