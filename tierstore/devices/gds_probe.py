"""Whether GPUDirect Storage really works here, found out where it can do no harm.

kvikio reads a file into device memory by one of three ways, and only one of them is GPUDirect Storage:

    gds       the disk's controller writes into device memory, past the processor's memory
    compat    reads into host memory and a copy, by kvikio itself or within cuFile: its *compatibility mode*
    none      no driver, no kvikio, or it fails

In compatibility mode rows are right and nothing is gained over our own io_uring and one copy, so it counts as
what it is: not GPUDirect Storage. Some set-ups hang when compatibility mode is forbidden, and a driver that
does not fit can take its process with it. So the answers are had in this order: libcuda is looked for; then
whether kvikio is installed, without importing it; then a child process forbids compatibility mode, reads
pages of the very file system into the device and compares them. It is killed when its time is over.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import logging
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

log = logging.getLogger(__name__)
CHILD = "tierstore.devices.gds_child"
TOLD_CHARACTERS = 300
State = Literal["gds", "compat", "none"]


@dataclass(frozen=True)
class GdsProbe:
    """What there is, and why not more, in words."""

    state: State
    reason: str

    @property
    def usable(self) -> bool:
        """Whether pages may be read into device memory by cuFile."""
        return self.state == "gds"


def probe_gds(sample: Path, device_index: int, timeout_s: float) -> GdsProbe:
    """Find out what reading `sample`, a file of at least a page on the store's disk, into a device takes.

    Imports neither torch nor kvikio; takes `timeout_s` at most, and a moment.
    """
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return GdsProbe("none", "there is no CUDA driver (libcuda.so.1)")
    if importlib.util.find_spec("kvikio") is None:
        return GdsProbe("none", "kvikio is not installed (pip install 'tierstore[gds]')")
    return _ask_child(sample, device_index, timeout_s)


def _ask_child(sample: Path, device_index: int, timeout_s: float) -> GdsProbe:
    command = [sys.executable, "-m", CHILD, str(sample), str(device_index)]
    environment = {**os.environ, "KVIKIO_COMPAT_MODE": "OFF"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment, start_new_session=True
    )
    try:
        out, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        # Not waited for without end: a process that hangs in a driver cannot always be killed.
        try:
            process.communicate(timeout=1.0)
        except subprocess.TimeoutExpired:
            log.warning("the process that tried GPUDirect Storage hangs in the driver and cannot be ended")
        return GdsProbe("none", f"kvikio did not answer within {timeout_s:g} s (hbm.gds_probe_timeout_s)")
    except BaseException:
        process.kill()
        raise
    try:
        answer = json.loads(out.splitlines()[-1])
        return GdsProbe(answer["state"], str(answer["reason"]))
    except (IndexError, ValueError, KeyError, TypeError):
        lines = errors.decode(errors="replace").strip().splitlines()
        said = lines[-1][:TOLD_CHARACTERS] if lines else "it said nothing"
        return GdsProbe("none", f"kvikio ended its process with exit code {process.returncode}: {said}")
