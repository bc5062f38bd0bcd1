"""A disk that answers late: every read begins only after a pause, which costs no processor time."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import wraps
from typing import Any

from tierstore.devices.base import PageReader


def late(reader: PageReader, latency_s: float) -> PageReader:
    """The same reader: whoever begins a read with it, in whatever way it offers, sleeps so long first."""
    begins = [name for name in dir(PageReader) if not name.startswith("_") and name != "close"]
    for name in begins:
        setattr(reader, name, _after_a_pause(getattr(reader, name), latency_s))
    return reader


def _after_a_pause(begin: Callable[..., Any], latency_s: float) -> Callable[..., Any]:
    @wraps(begin)
    def begin_late(*args: Any, **kwargs: Any) -> Any:
        time.sleep(latency_s)
        return begin(*args, **kwargs)

    return begin_late
