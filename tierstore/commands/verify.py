"""`tierstore verify`: read every page again and name every damaged one with the rows it holds."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from engram_client.errors import FormatError, StorageError
from tierstore.catalog import Catalog, CatalogEntry
from tierstore.commands.pack_progress import progress_display
from tierstore.commands.readable import readable_bytes
from tierstore.format.verify import VerifyReport, verify
from tierstore.packing import Progress

EPILOG = "Exit code 1 means damage was found."
SHOWN_PAGES = 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    parser.add_argument("target", type=Path, metavar="DIR|FILE", help="store directory, or one row file")
    parser.add_argument("name", nargs="?", metavar="NAME", help="one table of DIR (default: all of them)")
    parser.add_argument("--json", action="store_true", help="tell the result as JSON on stdout")
    parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def run(args: argparse.Namespace) -> int:
    """Verifies each table; 1 where one of them is damaged."""
    targets = _targets(args.target, args.name)
    with progress_display(quiet=args.quiet) as (_, on_progress):
        results = [_verified(label, path, entry, on_progress) for label, path, entry in targets]
    if args.json:
        json.dump({"tables": results}, sys.stdout, indent=2)
        print()
    else:
        lines = [line for result in results for line in _sentences(result)]
        print("\n".join(lines or [f"{args.target} holds no tables"]))
    return 0 if all(result["whole"] for result in results) else 1


def _targets(target: Path, name: str | None) -> list[tuple[str, Path, CatalogEntry | None]]:
    if target.is_file():
        return [(target.name, target, None)]
    if not target.exists():
        raise FormatError(f"{target} does not exist; give a store directory or a .rows file")
    with Catalog.open(target) as catalog:
        entries = {name: catalog.entry(name)} if name else catalog.tables()
    return [(name, entry.path, entry) for name, entry in sorted(entries.items())]


def _verified(
    label: str, path: Path, entry: CatalogEntry | None, on_progress: Callable[[Progress], None]
) -> dict[str, Any]:
    """One table's result as it is told with --json."""
    started_s = time.monotonic()
    result: dict[str, Any] = {"name": label, "path": str(path), "whole": False, "error": None}
    try:
        report = verify(path, lambda done, total: on_progress(Progress(label, done, total, 0)))
    except (FormatError, StorageError) as error:
        return result | {"error": str(error)}
    mismatch = _wrong_generation(report, entry)
    duration_s = time.monotonic() - started_s
    return result | _facts(report) | {
        "whole": report.whole and mismatch is None,
        "error": mismatch,
        "duration_s": round(duration_s, 3),
    }  # fmt: skip


def _wrong_generation(report: VerifyReport, entry: CatalogEntry | None) -> str | None:
    if entry and entry.spec.generation != report.row_file.spec.generation:
        found = report.row_file.spec.generation
        return f"the catalog expects generation {entry.spec.generation}, the file is {found}"
    return None


def _facts(report: VerifyReport) -> dict[str, Any]:
    return {
        "generation": report.row_file.spec.generation,
        "computed_generation": report.generation,
        "rows": report.row_file.spec.rows,
        "file_bytes": report.row_file.geometry.file_bytes,
        "damaged_pages": report.damaged_pages,
        "damaged": [
            {"page": d.page, "first_row": d.first_row, "last_row": d.last_row} for d in report.damaged
        ],
        "missing_bytes": report.missing_bytes,
        "missing_rows": report.missing_rows,
        "trailing_bytes": report.trailing_bytes,
    }


def _sentences(result: dict[str, Any]) -> list[str]:
    name = result["name"]
    if result["whole"]:
        rate = readable_bytes(result["file_bytes"] / max(result["duration_s"], 1e-3))
        size = readable_bytes(result["file_bytes"])
        read = f"{result['rows']} rows, {size} read at {rate}/s"
        return [f"{name}: whole, {read}, generation {result['generation']}"]
    lines = [f"{name}: DAMAGED, {result['path']}"]
    if result["error"]:
        lines.append(f"  {result['error']}")
    if "damaged_pages" in result:
        lines += _damage(result)
    return [*lines, "  restore the file from a copy, or pack the table again with --replace"]


def _damage(result: dict[str, Any]) -> list[str]:
    lines = [
        f"  page {d['page']}: wrong checksum; it holds rows {d['first_row']} to {d['last_row']}"
        for d in result["damaged"][:SHOWN_PAGES]
    ]
    if result["damaged_pages"] > SHOWN_PAGES:
        lines.append(f"  and {result['damaged_pages'] - SHOWN_PAGES} pages more; --json names up to 10000")
    if result["missing_rows"]:
        first, last = result["missing_rows"]
        lines.append(f"  {result['missing_bytes']} bytes are missing: rows {first} to {last}")
    if result["trailing_bytes"]:
        lines.append(f"  {result['trailing_bytes']} bytes follow the last page")
    if result["computed_generation"] != result["generation"]:
        lines.append(
            f"  generation: the header says {result['generation']}, "
            f"the pages make {result['computed_generation']}"
        )
    return lines
