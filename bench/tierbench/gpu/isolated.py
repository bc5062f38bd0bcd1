"""One section in a process of its own, which is killed with all that it started when its time is over."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CHILD = "tierbench.gpu.child"
NO_DEVICE = "no device"
TOLD_CHARACTERS = 2000  # of what a section that failed wrote last


def run_isolated(name: str, arguments: list[str], timeout_s: float) -> dict[str, Any]:
    """What `child.run_section` returned, or {"status": "failed" or "timed out", "error": ...}, with "took_s".

    What the section prints goes to our stderr.
    """
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="tierbench-gpu-") as folder:
        out, log = Path(folder, "results"), Path(folder, "log")
        command = [sys.executable, "-m", CHILD, name, *arguments, "--out", str(out)]
        with open(log, "wb") as sink:
            process = subprocess.Popen(command, stdout=sink, stderr=sink, start_new_session=True)
            try:
                code = process.wait(timeout_s)
                found = _read(out, f"left with exit code {code}", "failed")
            except subprocess.TimeoutExpired:
                _end(process)
                found = _read(out, f"not done after {timeout_s:.0f} s", "timed out")
            finally:
                _end(process)
        text = log.read_text(errors="replace")
    sys.stderr.write(text)
    if found["status"] != "done":
        found["log"] = text[-TOLD_CHARACTERS:]
    return {**found, "took_s": round(time.monotonic() - started, 2)}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Also what the section started and did not end: it is a session of its own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _read(out: Path, otherwise: str, status: str) -> dict[str, Any]:
    """The section's own answer where it got to write one: it may hang or die after that."""
    if out.exists():
        answer: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
        return answer
    return {"status": status, "error": otherwise}
