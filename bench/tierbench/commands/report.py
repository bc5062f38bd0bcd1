"""The state of a deployment as one HTML file that opens offline, from records.

RECORDS are files or folders; without any it takes bench/results. Files that are no records are named in the
report and on stderr; exit code 1 says that there were some. --png writes each chart as an image as well.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from engram_client.errors import BadRequest, StorageError
from tierbench.progress import count_progress
from tierbench.record import RESULTS
from tierbench.records import find_records, load_all
from tierbench.report.page import page, sections_of
from tierstore.cli import FOUND_PROBLEM, OK

PAGE_BYTES_MAX = 2_000_000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("records", nargs="*", type=Path, metavar="RECORDS", help="files or folders (default: bench/results)")
    add("--out", type=Path, default=Path("report.html"), metavar="FILE", help="default: %(default)s")
    add("--png", type=Path, metavar="DIR", help="write every chart as a PNG into this folder")
    add("--json", action="store_true", help="what was written and refused, as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    records, refused = load_all(find_records(args.records or [RESULTS]))
    for words in refused:
        print(f"tierbench: refused {words}", file=sys.stderr)
    if not records:
        raise BadRequest("there is no record to report; make some with `tierbench record --out DIR`")
    sections = sections_of(records)
    text = page(records, refused, sections).encode()
    if len(text) > PAGE_BYTES_MAX:
        raise BadRequest(
            f"the report would take {len(text):,} bytes, at most {PAGE_BYTES_MAX:,}; name fewer records"
        )
    _write(args.out, text)
    charts = [chart for section in sections for chart in section.charts]
    images: list[Path] = []
    if args.png:
        from tierbench.report.png import write_png  # takes matplotlib, which takes a second

        with count_progress("drawing", len(charts)) as progress:
            for chart in charts:
                images.append(write_png(chart, args.png))
                progress(1)
    if args.json:
        told = {"out": str(args.out), "bytes": len(text), "records": len(records), "refused": refused,
                "images": [str(image) for image in images]}  # fmt: skip
        print(json.dumps(told, indent=2))
    else:
        print(f"{args.out}: {len(records)} records, {len(text) / 1000:.0f} kB")
    return FOUND_PROBLEM if refused else OK


def _write(out: Path, text: bytes) -> None:
    """Whole or not at all, beside the place and then moved there."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        descriptor, half = tempfile.mkstemp(dir=out.parent, prefix=f".{out.name}.")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(text)
            os.chmod(half, 0o644)
            os.replace(half, out)
        except BaseException:
            os.unlink(half)
            raise
    except OSError as error:
        raise StorageError(f"{out}: report cannot be written: {error.strerror or error}") from error
