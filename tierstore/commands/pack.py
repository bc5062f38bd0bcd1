"""`tierstore pack`: a checkpoint's tables become row files in a store directory."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tierstore.commands.pack_progress import progress_display
from tierstore.commands.readable import readable_bytes
from tierstore.format.sources import MODELS
from tierstore.packing import PackedTable, PackOptions, PackReport, pack

EPILOG = """\
A pack that was interrupted, killed or ran out of disk leaves no table; the same command goes on
where it stopped. A table appears in DIR at once, when all of it is safe on disk. A daemon that serves DIR
takes up a table of a new name when a client asks for it, and new generations on SIGHUP.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add = parser.add_argument
    add("source", type=Path, metavar="SOURCE", help="checkpoint: a folder or a .safetensors file")
    add("directory", type=Path, metavar="DIR", help="store directory; made where there is none")
    add("--name", help="name of the table (default: from the checkpoint)")
    add("--layer", type=int, action="append", metavar="L", help="only this layer's table; may be repeated")
    add("--addressing", choices=("auto", "record", "row"), default="auto",
        help="what a key names: an n-gram's rows, or one row (default: the former where it can)")  # fmt: skip
    add("--model", choices=("auto", *(m for m in MODELS if m != "auto")), default="auto",
        help="whose checkpoint it is (default: by its tensors' names)")  # fmt: skip
    add("--layout", type=Path, metavar="FILE", help="layout file that describes a plain [rows, dim] tensor")
    add("--tokenizer", type=Path, metavar="FILE", help="tokenizer.json: its vocabulary is checked and noted")
    add("--consume", nargs="?", choices=("yes", "force"), const="yes", default="no",
        help="remove each source file once its rows are safe; force: with its other tensors")  # fmt: skip
    add("--replace", action="store_true", help="publish a new generation of a table that is there")
    add("--prune", action="store_true", help="remove the files of generations this pack retires")
    add("--restart", action="store_true", help="drop an unfinished pack and begin again")
    add("--json", action="store_true", help="tell the result as JSON on stdout")
    add("--quiet", action="store_true", help="no progress and no advice on stderr")


def run(args: argparse.Namespace) -> int:
    """Packs and says what was published."""
    options = PackOptions(
        name=args.name,
        layers=tuple(args.layer) if args.layer else None,
        addressing=args.addressing,
        model=args.model,
        layout_file=args.layout,
        tokenizer=args.tokenizer,
        consume=args.consume,
        replace=args.replace,
        prune=args.prune,
        restart=args.restart,
    )
    with progress_display(quiet=args.quiet) as (notify, on_progress):
        report = pack(args.source, args.directory, options, notify=notify, on_progress=on_progress)
    if args.json:
        json.dump(_as_json(report), sys.stdout, indent=2)
        print()
    else:
        print("\n".join(_sentences(report)))
    return 0


def _as_json(report: PackReport) -> dict[str, Any]:
    return {
        "tables": [
            {
                "name": table.spec.name,
                "generation": table.spec.generation,
                "path": str(table.path),
                "rows": table.spec.rows,
                "row_bytes": table.spec.row_bytes,
                "addressing": table.spec.addressing,
                "file_bytes": table.file_bytes,
                "resumed_rows": table.resumed_rows,
                "duration_s": round(table.duration_s, 3),
            }
            for table in report.tables
        ],
        "removed": [str(path) for path in report.removed],
    }


def _sentences(report: PackReport) -> list[str]:
    lines = [_sentence(table) for table in report.tables]
    if report.removed:
        lines.append(f"removed {len(report.removed)} source files")
    return lines or ["every table was published already"]


def _sentence(table: PackedTable) -> str:
    spec = table.spec
    new_rows = spec.rows - table.resumed_rows
    new_bytes = new_rows * table.file_bytes // spec.rows
    rate = f"{readable_bytes(int(new_bytes / max(table.duration_s, 1e-3)))}/s"
    return (
        f"{spec.name}: {spec.rows} rows of {spec.row_bytes} bytes, {readable_bytes(table.file_bytes)} in "
        f"{table.duration_s:.1f} s ({rate}), generation {spec.generation}\n  {table.path}"
    )
