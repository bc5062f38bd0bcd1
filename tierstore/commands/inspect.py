"""`tierstore inspect`: what a row file or a store directory holds, from headers alone."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engram_client.errors import FormatError
from engram_client.spec import HashScheme, TableSpec
from tierstore.catalog import Catalog, CatalogEntry
from tierstore.commands.readable import readable_bytes
from tierstore.format.geometry import Geometry
from tierstore.format.rowfile import RowFile
from tierstore.snapshots.rows import FOLDER
from tierstore.updates import TrainedSpec
from tierstore.updates.disk import REAL_DISK
from tierstore.updates.identity import is_created, load_identity


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("target", type=Path, metavar="DIR|FILE", help="store directory, or one row file")
    parser.add_argument("name", nargs="?", metavar="NAME", help="one table of DIR (default: list them)")
    parser.add_argument("--json", action="store_true", help="everything, as JSON on stdout")


def run(args: argparse.Namespace) -> int:
    """Prints one table's description, or the tables of a store directory."""
    if args.target.is_file():
        return _show_file(RowFile.open(args.target), args.json)
    if not args.target.exists():
        raise FormatError(f"{args.target} does not exist; give a store directory or a .rows file")
    with Catalog.open(args.target) as catalog:
        if args.name:
            return _show_file(RowFile.open(catalog.entry(args.name).path), args.json)
        entries = [entry for _, entry in sorted(catalog.tables().items())] + catalog.retired
    training = _in_training(args.target)
    if args.json:
        told = {"training": [spec.to_json() for spec in training]} if training else {}
        _print_json({"tables": [_entry_json(entry) for entry in entries], **told})
        return 0
    if entries:
        _print_table(entries)
    if training:
        _print_training(args.target, training)
    if not entries and not training:
        print(f"{args.target} holds no tables")
    return 0


def _in_training(directory: Path) -> Sequence[TrainedSpec]:
    """What is trained there, whoever has it open."""
    folder = directory / FOLDER
    return load_identity(REAL_DISK, folder).tables if is_created(REAL_DISK, folder) else ()


def _show_file(row_file: RowFile, as_json: bool) -> int:
    if as_json:
        _print_json(_file_json(row_file))
        return 0
    width = max(len(key) for key, _ in _facts(row_file))
    for key, value in _facts(row_file):
        print(f"{key:<{width}}  {value}")
    return 0


def _facts(row_file: RowFile) -> list[tuple[str, str]]:
    spec, geometry = row_file.spec, row_file.geometry
    fields = ", ".join(f"{f.name} {f.count} x {f.dtype}" for f in spec.layout.fields)
    return [
        ("file", str(row_file.path)),
        ("table", spec.name),
        ("model", f"{spec.model or 'unknown'}, layer {'none' if spec.layer is None else spec.layer}"),
        ("generation", spec.generation),
        ("uuid", spec.uuid),
        ("rows", f"{spec.rows} of {spec.row_bytes} bytes: {fields}"),
        ("global scale", "none" if spec.layout.global_scale is None else str(spec.layout.global_scale)),
        ("addressing", f"{spec.addressing}, {spec.record_rows} rows ({spec.record_bytes} bytes) to a key"),
        ("file size", f"{readable_bytes(geometry.file_bytes)} ({geometry.file_bytes} bytes)"),
        ("pages", _pages_sentence(geometry)),
        ("waste", f"{geometry.waste:.2%}"),
        *_scheme_facts(spec.scheme),
    ]


def _pages_sentence(geometry: Geometry) -> str:
    pages = f"{geometry.data_pages} data pages from page {geometry.first_page}"
    if geometry.rows_per_page:
        return f"{pages}, {geometry.rows_per_page} rows each"
    return f"{pages}, {geometry.pages_per_row} to a row"


def _scheme_facts(scheme: HashScheme | None) -> list[tuple[str, str]]:
    if scheme is None:
        return [("hash scheme", "none")]
    heads = [size for sizes in scheme.head_sizes for size in sizes]
    segment = f"pad id {scheme.pad_id}" if scheme.kind == "engram" else f"EOS id {scheme.eos_token_id}"
    return [
        (
            "hash scheme",
            f"{scheme.kind}, layer {scheme.layer_id}, n-grams of 2 to {scheme.max_ngram_size} tokens",
        ),
        ("heads", f"{scheme.heads} for each of {scheme.orders} orders, {min(heads)} to {max(heads)} rows"),
        ("vocabulary", f"{scheme.vocab_size} ids, {segment}, digest {scheme.vocabulary_digest or 'unknown'}"),
        ("multipliers", " ".join(str(m) for m in scheme.multipliers)),
        ("parameters", json.dumps(scheme.parameters, sort_keys=True)),
    ]


def _file_json(row_file: RowFile) -> dict[str, Any]:
    return {"path": str(row_file.path), "spec": row_file.spec.to_json(), **_geometry_json(row_file.geometry)}


def _geometry_json(geometry: Geometry) -> dict[str, Any]:
    return {
        "row_bytes": geometry.row_bytes,
        "rows_per_page": geometry.rows_per_page,
        "pages_per_row": geometry.pages_per_row,
        "first_page": geometry.first_page,
        "data_pages": geometry.data_pages,
        "file_bytes": geometry.file_bytes,
        "waste": round(geometry.waste, 6),
    }


def _entry_json(entry: CatalogEntry) -> dict[str, Any]:
    return {
        "path": str(entry.path),
        "state": entry.state,
        "retired_unix_s": entry.retired_unix_s,
        "spec": entry.spec.to_json(),
    }


def _print_json(obj: dict[str, Any]) -> None:
    json.dump(obj, sys.stdout, indent=2)
    print()


def _print_table(entries: list[CatalogEntry]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = ("table", "layer", "rows", "row bytes", "on disk", "addressing", "state", "generation")
    table = Table(*columns, box=None, header_style="bold")
    for entry in entries:
        table.add_row(*_cells(entry.spec, entry))
    # Piped output is for other programs: no wrapping at a terminal width nobody has.
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _print_training(directory: Path, specs: Sequence[TrainedSpec]) -> None:
    from rich.console import Console
    from rich.table import Table

    columns = (
        "in training",
        "layer",
        "rows",
        "row bytes",
        "pages on disk",
        "optimizer",
        "share",
        "begins with",
    )
    table = Table(*columns, box=None, header_style="bold")
    for spec in specs:
        pages = directory / FOLDER / "pages" / f"{spec.name}.rows"
        size = readable_bytes(pages.stat().st_blocks * 512) if pages.exists() else "missing"
        layer = "" if spec.layer is None else str(spec.layer)
        part = spec.partition
        share = f"{part.rank}/{part.world} of {part.rows} rows" if part else "whole"
        table.add_row(
            spec.name, layer, str(spec.rows), str(spec.row_bytes), size,
            str(spec.optimizer.get("optimizer", "")), share, str(spec.initial),
        )  # fmt: skip
    Console(width=None if sys.stdout.isatty() else 200).print(table)


def _cells(spec: TableSpec, entry: CatalogEntry) -> tuple[str, ...]:
    size = readable_bytes(entry.path.stat().st_size) if entry.path.exists() else "missing"
    layer = "" if spec.layer is None else str(spec.layer)
    return (
        spec.name, layer, str(spec.rows), str(spec.row_bytes), size, spec.addressing, entry.state,
        spec.generation,
    )  # fmt: skip
