"""A moment by which an answer is wanted, passed down instead of a timeout so that waits add up."""

from __future__ import annotations

import time
from numbers import Real

from engram_client.errors import BadRequest, DeadlineExceeded

NEVER_NS = 2**63 - 1
TIMEOUT_S_MAX = 1e8  # three years; the system's own waits refuse numbers not much larger


class Deadline:
    """`Deadline.after(0.5)`: half a second from now; `Deadline.after(None)`: never."""

    def __init__(self, at: float | None, timeout_s: float | None) -> None:
        self._at = at
        self._timeout_s = timeout_s

    @classmethod
    def after(cls, timeout_s: float | None) -> Deadline:
        if timeout_s is None:
            return cls(None, None)
        if not isinstance(timeout_s, Real) or not timeout_s >= 0:
            raise BadRequest(f"timeout must be >= 0 seconds or None, got {timeout_s!r}")
        if timeout_s > TIMEOUT_S_MAX:
            return cls(None, None)
        timeout_s = float(timeout_s)  # a small float type would lose the clock's digits
        return cls(time.monotonic() + timeout_s, timeout_s)

    def remaining_s(self) -> float | None:
        """Seconds left, never negative; None without a limit."""
        return None if self._at is None else max(0.0, self._at - time.monotonic())

    def at_ns(self) -> int:
        """The moment on the monotonic clock, in nanoseconds; NEVER_NS without a limit."""
        return NEVER_NS if self._at is None else int(self._at * 1e9)

    def check(self, doing: str) -> None:
        """Raise DeadlineExceeded once the moment has passed."""
        if self._at is not None and time.monotonic() >= self._at:
            raise self.exceeded(doing)

    def exceeded(self, doing: str) -> DeadlineExceeded:
        return DeadlineExceeded(
            f"rows were not there after {self._timeout_s:g} s, while {doing}; "
            "allow more time, prefetch earlier, or raise the DRAM budget"
        )
