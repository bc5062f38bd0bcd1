"""`tierstore adopt`: take row files into the catalog that are not in it."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tierstore.packing.adopt import adopt

DESCRIPTION = """\
Takes row files into the catalog of a store directory: all that lie below DIR/tables and are not in it, or
those that are named, which then replace the generation that is current. For a catalog that was lost,
and for tables that were copied from another machine. A daemon that serves DIR takes up a table of a new name
when a client asks for it, and everything on SIGHUP.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = DESCRIPTION
    parser.add_argument("folder", type=Path, metavar="DIR", help="store directory")
    parser.add_argument("files", type=Path, nargs="*", metavar="FILE", help="row files inside DIR")
    parser.add_argument("--json", action="store_true", help="what was done, as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Prints what was taken in and what was left."""
    report = adopt(args.folder, args.files)
    if args.json:
        adopted = [{"path": str(f.path), "spec": f.spec.to_json()} for f in report.adopted]
        left = [{"path": str(path), "reason": reason} for path, reason in report.left]
        json.dump({"adopted": adopted, "left": left}, sys.stdout, indent=2)
        print()
        return 0
    for file in report.adopted:
        print(f"{file.spec.name}: generation {file.spec.generation} is current, {file.path}")
    for path, reason in report.left:
        print(f"{path} was left: {reason}")
    if not report.adopted and not report.left:
        print("every row file is in the catalog already")
    return 0
