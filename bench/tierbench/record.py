"""Benchmark records: one JSON file a run, with all that is needed to judge and repeat it.

    {
      "schema": {"name": "tierbench.record", "version": 2},
      "name": "cold", "date_utc": "2026-01-31T12:00:00Z",
      "commit": "...", "dirty": false,          of the source that ran; null outside a repository
      "machine": {...}, "packages": {...},
      "seed": 0, "parameters": {...},           what was run
      "results": {...}                          samples as `summarize` tells them, ratios as `compare` does
    }

A figure without its yardstick, taken in the same run, says little: `compare` keeps the pairs. docs/RECORDS.md
describes records for those who read them; `records` does.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from engram_client.errors import BadRequest, StorageError
from tierbench.machine import describe_machine, package_versions

SCHEMA_NAME, SCHEMA_VERSION = "tierbench.record", 2
SOURCE_ROOT = Path(__file__).resolve().parents[2]
RESULTS = SOURCE_ROOT / "bench" / "results"
PERCENTILES = (50.0, 90.0, 99.0, 99.9)


def summarize(samples: Sequence[float] | np.ndarray) -> dict[str, float | int]:
    """Count, mean, extremes and percentiles p50, p90, p99, p99.9 of samples in any one unit."""
    values = np.asarray(samples, np.float64)
    if values.size == 0 or not np.isfinite(values).all():
        raise BadRequest(f"percentiles need at least one sample, all finite; got {values.size} samples")
    found = {
        f"p{p:g}": float(v) for p, v in zip(PERCENTILES, np.percentile(values, PERCENTILES), strict=True)
    }
    return {
        "count": int(values.size),
        "mean": float(values.mean()),
        "min": float(values.min()),
        "max": float(values.max()),
        **found,
    }


def compare(ours: Sequence[float], yardstick: Sequence[float]) -> dict[str, Any]:
    """Ratios ours / yardstick of alternated runs, pair by pair, and their median and spread."""
    if len(ours) != len(yardstick) or not ours or min(yardstick) <= 0:
        raise BadRequest(
            f"ratios need as many runs as yardsticks, all above 0; got {len(ours)} and {len(yardstick)}"
        )
    ratios = [a / b for a, b in zip(ours, yardstick, strict=True)]
    return {
        "ours": list(ours),
        "yardstick": list(yardstick),
        "ratio_median": float(np.median(ratios)),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
    }


def write_record(
    name: str,
    payload: Mapping[str, Any],
    out_dir: Path | str = RESULTS,
    *,
    seed: int | None = None,
    parameters: Mapping[str, Any] | None = None,
    data_path: Path | str = ".",
) -> Path:
    """Write `payload` as results of `name`; returns `out_dir/NAME-DATE.json`, which is never an older one.

    `data_path` lies on the disk that was measured. Raises BadRequest for a name that is no file name,
    StorageError where the folder cannot be written.
    """
    if not re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name):
        raise BadRequest(f"record name {name!r}: use lower-case letters, digits, dots and dashes")
    now = datetime.now(UTC)
    record = {
        "schema": {"name": SCHEMA_NAME, "version": SCHEMA_VERSION},
        "name": name,
        "date_utc": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
        **source_state(),
        "machine": describe_machine(Path(data_path)),
        "packages": package_versions(),
        "seed": seed,
        "parameters": dict(parameters or {}),
        "results": dict(payload),
    }
    text = json.dumps(record, indent=2, allow_nan=False, default=_plain) + "\n"
    return _write_new(Path(out_dir), f"{name}-{now.strftime('%Y%m%d-%H%M%S')}", text)


def _plain(value: Any) -> Any:
    """JSON for numpy scalars and arrays, and for paths by their last part alone."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    if isinstance(value, os.PathLike):
        return Path(value).name
    raise TypeError(f"{type(value).__name__} does not belong into a record")


def check_writable(folder: Path) -> None:
    """Raises StorageError where no record could be written into `folder`, which need not be there yet."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    if not there.is_dir():
        raise StorageError(f"{folder}: records cannot be written there: {there} is no folder; choose another")
    if not os.access(there, os.W_OK | os.X_OK):
        raise StorageError(
            f"{folder}: records cannot be written there: {there} may not be written; choose another"
        )


def check_place(file: Path) -> None:
    """Raises StorageError where `file` could not be written now: its folder is there, and it is none."""
    folder = file.absolute().parent
    if not folder.is_dir():
        raise StorageError(f"{file}: cannot be written: no such folder; make it, or choose another")
    if file.is_dir():
        raise StorageError(f"{file}: cannot be written: it is a folder; name a file in it")
    if not os.access(file if file.exists() else folder, os.W_OK):
        raise StorageError(f"{file}: cannot be written: not permitted; choose another place")


def _write_new(folder: Path, stem: str, text: str) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for attempt in range(1000):
            path = folder / (f"{stem}.json" if attempt == 0 else f"{stem}-{attempt}.json")
            try:
                with open(path, "x", encoding="utf-8") as file:
                    file.write(text)
                return path
            except FileExistsError:
                continue
    except OSError as error:
        raise StorageError(f"{folder}: record cannot be written: {error.strerror or error}") from error
    raise StorageError(f"{folder}: a thousand records {stem} are there already; move some away")


def source_state() -> dict[str, Any]:
    """Commit of the source and whether files differ from it (records themselves do not count)."""
    commit = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--", ".", ":(exclude)bench/results")
    return {"commit": commit or None, "dirty": None if changed is None else bool(changed)}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(SOURCE_ROOT), *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
