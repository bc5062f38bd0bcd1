"""Opening the tables of a store directory: one that is damaged is left out, the others are served."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator

from engram_client.errors import FormatError, StorageError
from tierstore.catalog import CatalogEntry
from tierstore.devices.files import Direct, open_for_reads
from tierstore.format.rowfile import RowFile
from tierstore.store.table import ServedTable

log = logging.getLogger(__name__)
Broken = FormatError | StorageError


def open_tables(
    entries: Iterable[CatalogEntry], direct: Direct, numbers: Iterator[int]
) -> tuple[dict[str, ServedTable], dict[str, Broken]]:
    """The tables that can be served, and for each other one what is wrong with it.

    Every damaged table is logged. Raises its error where there are tables and none can be served.
    """
    tables: dict[str, ServedTable] = {}
    broken: dict[str, Broken] = {}
    for entry in entries:
        try:
            tables[entry.spec.name] = _open_table(entry, direct, next(numbers))
        except (FormatError, StorageError) as error:
            log.error("table %r is not served: %s", entry.spec.name, error)
            broken[entry.spec.name] = error
    if broken and not tables:
        raise next(iter(broken.values()))
    return tables, broken


def _open_table(entry: CatalogEntry, direct: Direct, number: int) -> ServedTable:
    row_file = RowFile.open(entry.path)
    found, expected = row_file.spec, entry.spec
    if (found.generation, found.name) != (expected.generation, expected.name):
        raise FormatError(
            f"{entry.path} holds generation {found.generation} of table {found.name!r}, the catalog expects "
            f"generation {expected.generation} of {expected.name!r}; restore the file or pack the table again"
        )
    return ServedTable(row_file, open_for_reads(entry.path, direct), number)
