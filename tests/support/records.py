"""Records made for tests: valid, unless a test changes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def record_of(name: str, results: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A whole record as JSON would hold it."""
    return {
        "schema": {"name": "tierbench.record", "version": 2},
        "name": name,
        "date_utc": "2026-01-31T12:00:00Z",
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "dirty": False,
        "machine": {"cpu": "a processor", "cores_usable": 2, "memory_bytes": 8 << 30},
        "packages": {"numpy": "2.0.0"},
        "seed": 0,
        "parameters": {"windows": 10},
        "results": results,
        **changes,
    }


def written(folder: Path, record: dict[str, Any], file: str = "record.json") -> Path:
    path = folder / file
    path.write_text(json.dumps(record), encoding="utf-8")
    return path
