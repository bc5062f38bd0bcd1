"""The process that tries GPUDirect Storage: reads pages of a file into a device and says how that went.

Run by gds_probe.py, with kvikio's compatibility mode forbidden; prints a line of JSON. Not yet run on a GPU.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tierstore.devices.gds_probe import GdsProbe

PAGE_BYTES = 4096
PAGES_TRIED = 16
DRIVER_STATS = Path("/proc/driver/nvidia-fs/stats")


def try_gds(sample: Path, device_index: int) -> GdsProbe:
    """Raises whatever torch and kvikio raise."""
    import kvikio
    import kvikio.cufile_driver
    import kvikio.defaults
    import torch

    size = min(os.path.getsize(sample), PAGES_TRIED * PAGE_BYTES) // PAGE_BYTES * PAGE_BYTES
    there = torch.zeros(size, dtype=torch.uint8, device=torch.device("cuda", device_index))
    before = _driver_reads()
    with kvikio.CuFile(sample, "r") as file:
        read = file.raw_read(there, size, 0, 0)
    with open(sample, "rb") as plain:
        expected = plain.read(size)
    if not size or read != size or bytes(there.cpu().numpy()) != expected:
        return GdsProbe("none", f"{read} of {size} bytes came back, or other ones than are in the file")
    if kvikio.defaults.is_compat_mode_preferred():
        return GdsProbe("compat", "kvikio took its compatibility mode though that was forbidden")
    if not kvikio.cufile_driver.get("is_gds_available"):
        return GdsProbe(
            "compat", "cuFile says that GPUDirect Storage is not available: it copies through host memory"
        )
    if before is not None and _driver_reads() == before:
        return GdsProbe("compat", "the nvidia-fs driver saw no read: cuFile copies through host memory")
    return GdsProbe("gds", f"kvikio {kvikio.__version__} read {size} bytes into the device")


def _driver_reads() -> str | None:
    """The line about reads in the driver's statistics; None where it keeps none."""
    try:
        lines = DRIVER_STATS.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return None
    return next((line for line in lines if line.lstrip().startswith("Reads")), None)


def main() -> None:
    try:
        found = try_gds(Path(sys.argv[1]), int(sys.argv[2]))
    except Exception as error:
        said = str(error).strip().partition("\n")[0]
        found = GdsProbe("none", f"{type(error).__name__}: {said}")
    print(json.dumps({"state": found.state, "reason": found.reason}), flush=True)
    os._exit(0)  # past the driver's own clean-up, which is known to hang


if __name__ == "__main__":
    main()
