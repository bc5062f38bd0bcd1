"""fio: random 4 KiB reads of the same file, past the page cache."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from engram_client.errors import Unavailable

ENGINES = {
    "pread": lambda depth: ["--ioengine=psync", "--thread", f"--numjobs={depth}"],
    "io_uring": lambda depth: ["--ioengine=io_uring", f"--iodepth={depth}", "--numjobs=1"],
}


@dataclass(frozen=True)
class FioSample:
    """One run: reads/s, and the processor cores it took."""

    reads_per_s: float
    cores: float


def fio_version() -> str | None:
    """The installed fio's version, or None."""
    if shutil.which("fio") is None:
        return None
    return subprocess.run(["fio", "--version"], capture_output=True, text=True, check=True).stdout.strip()


def fio_random_reads(
    path: Path, engine: str, depth: int, window_s: float, first_byte: int, seed: int
) -> FioSample:
    """Read pages of `path` from byte `first_byte` on for `window_s`. Raises Unavailable.

    `engine` is a key of ENGINES; `depth` reads are under way at a time.
    """
    command = [
        "fio", "--name=pages", f"--filename={path}", "--readonly", "--rw=randread", "--bs=4k", "--direct=1",
        f"--offset={first_byte}", "--norandommap", f"--randseed={seed + 1}", "--time_based",
        f"--runtime={round(window_s * 1000)}ms", "--group_reporting", "--output-format=json",
        *ENGINES[engine](depth),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines()
        raise Unavailable(
            f"fio with {engine} ended with code {done.returncode}: {reason[-1] if reason else 'no word'}"
        )
    job = json.loads(done.stdout[done.stdout.index("{") :])["jobs"][0]
    cores = (job["usr_cpu"] + job["sys_cpu"]) / 100 * (depth if engine == "pread" else 1)
    return FioSample(float(job["read"]["iops"]), cores)
