"""`tierstore rollback`: make an earlier generation of a table current again."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from engram_client.errors import FormatError
from tierstore.catalog import Catalog
from tierstore.format.direct import sync_folder
from tierstore.format.rowfile import RowFile

DESCRIPTION = """\
Makes the generation of a table that was replaced last, or one that is named, current again. The one
that was current is kept as an earlier one, so the same command undoes this. A daemon that serves DIR follows
on SIGHUP; where it still serves the earlier generation too, the two change places with all that is cached.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("folder", type=Path, metavar="DIR", help="store directory")
    parser.add_argument("table", metavar="TABLE", help="name of the table")
    parser.add_argument(
        "--to", default="", metavar="GENERATION", help="which one, or how it begins (default: replaced last)"
    )
    parser.add_argument("--json", action="store_true", help="what was done, as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Prints both generations."""
    with Catalog.open(args.folder) as catalog:
        entry = catalog.earlier(args.table, args.to)
        found = RowFile.open(entry.path).spec.generation
        if found != entry.spec.generation:
            raise FormatError(
                f"{entry.path} holds generation {found}, the catalog expects {entry.spec.generation}; "
                "restore the file; nothing was changed"
            )
        replaced = catalog.publish(entry.spec, str(entry.path.relative_to(catalog.folder)))
        sync_folder(catalog.folder)
    before = replaced.spec.generation if replaced else None
    if args.json:
        json.dump({"table": args.table, "current": entry.spec.generation, "replaced": before}, sys.stdout)
        print()
    else:
        print(f"{args.table}: generation {entry.spec.generation} is current again, {before} is kept")
    return 0
