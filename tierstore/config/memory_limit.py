"""How much memory this process may really use: the machine's, or less where a cgroup says so.

In a container the machine's memory is a false promise: the kernel kills the process at the limit
of its control group, or of any group above it. `/proc/self/cgroup` names the group of every
hierarchy, `/proc/self/mountinfo` where that hierarchy is mounted and which of its groups the
mount shows as its root. From the group up to the mount's root each folder may hold a limit; the
least of them, and of the physical memory, counts. Version 2 writes `memory.max` ("max" for none),
version 1 `memory.limit_in_bytes` (a number larger than any memory for none).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath


@dataclass(frozen=True)
class MemoryLimit:
    bytes: int
    source: str  # what sets it, for an error message


@dataclass(frozen=True)
class _Hierarchy:
    """One mounted tree of control groups that can limit memory."""

    mount: PurePosixPath  # where it is mounted
    root: PurePosixPath  # the group that the mount shows
    controllers: frozenset[str]  # empty for version 2

    @property
    def limit_file(self) -> str:
        return "memory.limit_in_bytes" if self.controllers else "memory.max"


def memory_limit(root: Path = Path("/")) -> MemoryLimit:
    """The least limit; `root` is the folder that /proc and /sys are read under."""
    limits = [MemoryLimit(_physical_bytes(root), "physical memory")]
    groups = dict(_groups(root))
    for hierarchy in _hierarchies(root):
        group = groups.get("memory" if hierarchy.controllers else "")
        if group is not None:
            limits += _limits_upwards(root, hierarchy, group)
    return min(limits, key=lambda limit: limit.bytes)


def _physical_bytes(root: Path) -> int:
    for line in (root / "proc/meminfo").read_text().splitlines():
        name, _, amount = line.partition(":")
        if name == "MemTotal":
            return int(amount.split()[0]) * 1024
    raise OSError(f"{root / 'proc/meminfo'} has no MemTotal")


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []  # a kernel without control groups has no such file, and no limit


def _groups(root: Path) -> Iterator[tuple[str, PurePosixPath]]:
    """(controller, group) of this process; the controller of version 2 is the empty string."""
    for line in _lines(root / "proc/self/cgroup"):
        _, controllers, group = line.split(":", 2)
        for controller in controllers.split(","):
            yield controller, PurePosixPath(group)


def _hierarchies(root: Path) -> Iterator[_Hierarchy]:
    for line in _lines(root / "proc/self/mountinfo"):
        before, _, after = line.partition(" - ")
        shown, mount = before.split()[3:5]
        kind, _, options = after.split()[:3]
        controllers = frozenset(options.split(",")) if kind == "cgroup" else frozenset[str]()
        if kind == "cgroup2" or "memory" in controllers:
            yield _Hierarchy(PurePosixPath(mount), PurePosixPath(shown), controllers)


def _limits_upwards(root: Path, hierarchy: _Hierarchy, group: PurePosixPath) -> Iterator[MemoryLimit]:
    inside = group.is_relative_to(hierarchy.root)
    # A group outside what the mount shows: the mount's root is the nearest that can be read.
    relative = group.relative_to(hierarchy.root) if inside else PurePosixPath()
    for folder in (relative, *relative.parents):
        path = hierarchy.mount / folder / hierarchy.limit_file
        text = "".join(_lines(root / path.relative_to("/")))
        if text.isdecimal():
            yield MemoryLimit(int(text), f"control group limit {path}")
