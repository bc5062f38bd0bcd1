"""What a benchmark ran on: processor, memory, disk, kernel, versions. Never a host's or a user's name."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("tierstore", "numpy", "numba", "llvmlite", "torch", "grpcio", "protobuf", "lmdb", "tokenizers",
            "msgspec")  # fmt: skip
PEERS = ("engramdb-python", "mooncake-transfer-engine-non-cuda")


def describe_machine(data_path: Path) -> dict[str, Any]:
    """A description fit for a public record; `data_path` lies on the disk that was measured."""
    return {
        "cpu": _first_value("/proc/cpuinfo", ("model name", "Hardware", "CPU part")) or platform.machine(),
        "cores_usable": len(os.sched_getaffinity(0)),
        "cores_quota": _cpu_quota(),
        "memory_bytes": _memory_bytes(),
        "memory_limit_bytes": _memory_limit_bytes(),
        "architecture": platform.machine(),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "disk": describe_disk(data_path),
        "gpus": _gpus(),
    }


def package_versions(names: Iterable[str] = (*PACKAGES, *PEERS)) -> dict[str, str]:
    """Installed versions; packages that are not there are left out."""
    found = {}
    for name in names:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def describe_disk(path: Path) -> dict[str, Any]:
    """Kind of the block device and file system `path` lies on."""
    status = os.stat(path)
    numbers = f"{os.major(status.st_dev)}:{os.minor(status.st_dev)}"
    device = Path(f"/sys/dev/block/{numbers}")
    name = device.resolve().name if device.exists() else None
    rotational = next(
        (text for base in (device, device / "..") if (text := _read(base / "queue" / "rotational"))), None
    )
    return {
        "kind": _disk_kind(name, rotational),
        "model": next((t for b in (device, device / "..") if (t := _read(b / "device" / "model"))), None),
        "filesystem": _filesystem(numbers),
        "read_limits": _read_limits(numbers),
    }


def _read_limits(numbers: str) -> list[str]:
    """What this process's cgroup lets it read from a device, as the kernel writes it; [] without limits.

    A virtual disk that others slow down now and then is held steady by a limit below what it always gives.
    """
    whole_disk = _read(Path(f"/sys/dev/block/{numbers}").resolve().parent / "dev")  # limits are the disk's
    found = []
    for line in (_read(Path("/proc/self/cgroup")) or "").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":  # version 2
            files = [Path(f"/sys/fs/cgroup{group}/io.max")]
        elif "blkio" in controllers.split(","):
            folder = Path(f"/sys/fs/cgroup/blkio{group}")
            files = [folder / f"blkio.throttle.read_{unit}_device" for unit in ("iops", "bps")]
        else:
            continue
        for file in files:
            limits = [
                text for text in (_read(file) or "").splitlines() if text.split()[0] in (numbers, whole_disk)
            ]
            found += [f"{file.name}: {text.split(' ', 1)[1]}" for text in limits]
    return found


def _disk_kind(name: str | None, rotational: str | None) -> str:
    if name is None:
        return "no block device (memory, overlay or network)"
    if name.startswith(("vd", "xvd")):
        return "virtual disk; what is behind it is not told"
    family = (
        "NVMe" if name.startswith("nvme") else "SCSI or SATA" if name.startswith("sd") else "block device"
    )
    return f"{family}, {'rotating' if rotational == '1' else 'solid state'}"


def _filesystem(numbers: str) -> str | None:
    for line in (_read(Path("/proc/self/mountinfo")) or "").splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[2] == numbers:
            return after.split()[0]
    return None


def _first_value(path: str, keys: tuple[str, ...]) -> str | None:
    for line in (_read(Path(path)) or "").splitlines():
        key, _, value = line.partition(":")
        if key.strip() in keys:
            return value.strip()
    return None


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _memory_limit_bytes() -> int | None:
    """The cgroup's limit, or None where there is none."""
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        text = _read(Path(path))
        if text and text.isdigit() and int(text) < _memory_bytes():
            return int(text)
    return None


def _cpu_quota() -> float | None:
    """Cores the cgroup grants, or None where it sets no limit."""
    parts = (_read(Path("/sys/fs/cgroup/cpu.max")) or "").split()
    return int(parts[0]) / int(parts[1]) if len(parts) == 2 and parts[0].isdigit() else None


def _gpus() -> list[str]:
    folders = sorted(Path("/proc/driver/nvidia/gpus").glob("*"))
    return [model for f in folders if (model := _first_value(str(f / "information"), ("Model",)))]


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
