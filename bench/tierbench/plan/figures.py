"""What a machine can do, in the few numbers that a plan is made of, and where each comes from.

They are measured through the product itself, on a daemon of its own: what a look-up costs that finds
everything, what each record more takes to copy, what a look-up pays for its first read (waking the daemon,
one read at depth 1, waking the caller), and how many pages a second come from the disk when it is kept busy.
The first two are medians, of calls after a pause. The third has a long tail that waiting is made of, so all
of its distribution is kept.

Disks of virtual machines lend speed: for some seconds, or as long as a bucket of credit lasts, they are
faster than they stay. So the disk is kept busy for a while and priced at the slowest tenth of the second
half; the fastest second is told beside it.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from engram_client.errors import BadRequest, FormatError, StorageError


@dataclass(frozen=True)
class Figures:
    """Microseconds, pages of 4096 bytes, seconds. What is measured on a device is None without one."""

    transport: str
    record_bytes: int  # that `record_us` was measured with
    call_us: float  # a look-up of one token that finds everything, but for copying
    record_us: float  # copying one more record out of DRAM
    first_read_us: tuple[float, ...]  # what a look-up takes longer that must read: 0th to 100th percentile
    reads_per_s: float  # sustained
    reads_burst_per_s: float  # the best second
    disk_s: float  # how long the disk was kept busy
    row_file_bytes: int  # of the table that was read; a small one may lie in a host's cache
    to_device_us: float | None = None  # one copy to the device, but for its bytes
    to_device_bytes_per_s: float | None = None
    hbm_record_us: float | None = None  # gathering one more record out of HBM

    def __post_init__(self) -> None:
        if not isinstance(self.first_read_us, list | tuple):
            raise BadRequest(f"figures: first_read_us is {self.first_read_us!r}; expected percentiles")
        object.__setattr__(self, "first_read_us", tuple(self.first_read_us))
        named = {n: getattr(self, n) for n in ("record_bytes", "call_us", "record_us", "reads_per_s")}
        named |= {f"first_read_us[{i}]": value for i, value in enumerate(self.first_read_us)}
        optional = ("to_device_us", "to_device_bytes_per_s", "hbm_record_us")
        named |= {n: getattr(self, n) for n in optional if getattr(self, n) is not None}
        for name, value in named.items():
            if not isinstance(value, int | float) or not 0 < value < math.inf:
                raise BadRequest(f"figures: {name} is {value!r}; expected a number above 0")
        if len(self.first_read_us) < 2 or list(self.first_read_us) != sorted(self.first_read_us):
            raise BadRequest("figures: first_read_us holds two or more rising percentiles")

    def for_records_of(self, record_bytes: int) -> Figures:
        """The same machine with records of another size: copying takes as long a byte."""
        factor = record_bytes / self.record_bytes
        hbm = None if self.hbm_record_us is None else self.hbm_record_us * factor
        return dataclasses.replace(
            self, record_bytes=record_bytes, record_us=self.record_us * factor, hbm_record_us=hbm
        )

    def draw_first_reads(self, counts: np.ndarray, random: np.random.Generator) -> np.ndarray:
        """What so many first reads take together, int64 [n] -> float64 [n] microseconds."""
        percentiles = np.linspace(0, 1, len(self.first_read_us))
        drawn = np.interp(random.random(int(counts.sum())), percentiles, self.first_read_us)
        sums = np.concatenate([[0.0], np.cumsum(drawn)])
        ends = np.cumsum(counts)
        return sums[ends] - sums[ends - counts]

    def assumptions(self, source: str) -> list[tuple[str, str, str]]:
        """(what, how much, where from), for people."""
        p50, p99 = np.interp([0.5, 0.99], np.linspace(0, 1, len(self.first_read_us)), self.first_read_us)
        disk = f"the slowest tenth of {self.disk_s / 2:.0f} s; best second {self.reads_burst_per_s:,.0f}"
        gb_per_s = self.record_bytes / self.record_us / 1e3
        told = [
            (f"a look-up that finds everything, {self.transport}", f"{self.call_us:,.1f} us", source),
            (
                "  and each record it copies",
                f"{self.record_us:.3f} us",
                f"{source}, {gb_per_s:.1f} GB/s",
            ),
            ("a look-up's first read, with waking", f"p50 {p50:,.0f}, p99 {p99:,.0f} us", source),
            ("pages a second, sustained", f"{self.reads_per_s:,.0f}", f"{source}, {disk}"),
        ]
        if self.to_device_us is None:
            told.append(("copying rows to a GPU", "not counted", "no GPU here"))
        else:
            told.append(("a copy to the device", f"{self.to_device_us:.1f} us", source))
            told.append(("  at", f"{(self.to_device_bytes_per_s or 0) / 1e9:.1f} GB/s", source))
        return told


def load_figures(path: Path) -> Figures:
    """From a record of `tierbench plan`, or from its "figures" alone. Raises FormatError, StorageError."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise StorageError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise FormatError(f"{path}: not JSON: {error}") from error
    for key in ("results", "figures"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    return _checked(found, path)


def _checked(found: Any, path: Path) -> Figures:
    names = {field.name for field in dataclasses.fields(Figures)}
    needed = {f.name for f in dataclasses.fields(Figures) if f.default is dataclasses.MISSING}
    if not isinstance(found, dict) or not needed <= set(found) <= names:
        wrong = sorted(set(found) ^ needed) if isinstance(found, dict) else type(found).__name__
        raise FormatError(
            f"{path}: not the figures of a machine, or not all of them ({wrong}); give a record that "
            "`tierbench plan --record` wrote"
        )
    try:
        return Figures(**found)
    except (BadRequest, TypeError) as error:
        raise FormatError(f"{path}: {error}") from error
