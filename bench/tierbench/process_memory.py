"""What a process's memory is, by the kernel's own count.

`resident` counts every page that the process has mapped and that is in memory: its own, files', and
shared memory, each page once, so an arena in a memfd is in it whole. `peak` is the highest it ever
was, also between two looks. `proportional` counts a page that n processes map as 1/n of itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

STATUS_LINES = {"VmRSS": "resident", "VmHWM": "peak", "RssAnon": "private", "RssShmem": "shared"}


@dataclass(frozen=True)
class ProcessMemory:
    """Bytes."""

    resident: int
    peak: int
    private: int  # anonymous
    shared: int  # shared memory, such as a memfd

    @classmethod
    def of(cls, pid: int) -> ProcessMemory:
        """Raises OSError where there is no such process."""
        found = dict.fromkeys(STATUS_LINES.values(), 0)
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            name, _, amount = line.partition(":")
            if name in STATUS_LINES:
                found[STATUS_LINES[name]] = int(amount.split()[0]) * 1024
        return cls(**found)


def proportional_bytes(pid: int) -> int:
    """The proportional set size; walks all page tables, so ask seldom. Raises OSError."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/{pid}/smaps_rollup has no Pss")


def maps_library(pid: int, name: str) -> bool:
    """Whether a process has a shared library of that name loaded, as "libtorch"."""
    return any(name in line for line in Path(f"/proc/{pid}/maps").read_text().splitlines())
