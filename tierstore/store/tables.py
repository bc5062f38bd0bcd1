"""The tables of a store directory: one that is damaged is left out, the others are served.

A store that serves can take up what was packed since. A table of a new name joins the others. A new
generation becomes *current*, under a number of its own: what arenas and extents hold of the one before is
never found under it. The one before stays as the *earlier* generation until its time is up, and answers
whoever still asks for it, so clients move over when it suits them. Where the catalog names it again
(`tierstore rollback`), the two change places, with all that is cached of them. Requests that have begun end
with the table they began with, and a row file is closed once nobody holds it.
"""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from engram_client.errors import FormatError, StorageError, UnknownTable
from engram_client.spec import TableSpec
from tierstore.catalog import Catalog, CatalogEntry
from tierstore.devices.files import Direct, open_for_reads
from tierstore.format.rowfile import RowFile
from tierstore.store.table import ServedTable

log = logging.getLogger(__name__)
Broken = FormatError | StorageError
Opened = tuple[dict[str, ServedTable], dict[str, Broken]]  # and for each other one what is wrong with it


def table_bytes(tables: Iterable[ServedTable]) -> Counter[int]:
    """Bytes of all rows, by the bytes of the records they are looked up in."""
    sizes: Counter[int] = Counter()
    for table in tables:
        sizes[table.spec.record_bytes] += table.spec.rows * table.spec.row_bytes
    return sizes


class Tables:
    """What is served. Asking takes no lock; changing it is for one caller at a time."""

    def __init__(self, directory: Path, direct: Direct) -> None:
        """Reads the catalog, opens nothing. Raises FormatError, StorageError."""
        self._directory = directory
        self._direct = direct
        self._numbers = itertools.count(1)
        self._served: dict[str, ServedTable] = {}  # the current ones
        self._earlier: dict[str, ServedTable] = {}
        self._broken: dict[str, Broken] = {}
        self._entries = self._catalogued()

    def _catalogued(self) -> list[CatalogEntry]:
        with Catalog.open(self._directory) as catalog:
            return list(catalog.tables().values())

    def open(self) -> None:
        """Open what can be served. Raises what is wrong where there are tables and none can be."""
        self._served, self._broken = self._open(self._entries)
        if self._broken and not self._served:
            raise next(iter(self._broken.values()))

    def __iter__(self) -> Iterator[ServedTable]:
        """Current and earlier ones."""
        return iter([*self._served.values(), *self._earlier.values()])  # the dictionaries are never changed

    def __len__(self) -> int:
        return len(self._served)

    @property
    def damaged(self) -> int:
        """How many are known and not served."""
        return len(self._broken)

    def specs(self) -> dict[str, TableSpec]:
        return {name: table.spec for name, table in self._served.items()}

    def knows(self, name: str) -> bool:
        """Whether it is served, or known not to be."""
        return name in self._served or name in self._broken

    def get(self, name: str, generation: str | None = None) -> ServedTable:
        """The current table of a name, or the earlier one where that is `generation`.

        Raises UnknownTable, naming those there are; what is wrong with a damaged one.
        """
        earlier = self._earlier.get(name)
        if earlier is not None and earlier.spec.generation == generation:
            return earlier
        if table := self._served.get(name):
            return table
        if error := self._broken.get(name):
            raise type(error)(f"table {name!r} is not served: {error}")
        have = ", ".join(sorted(self._served)) or "none"
        raise UnknownTable(
            f"no table {name!r} is served from {self._directory}; served: {have}; "
            "one that was packed since is taken up when a client asks for it with client.table(name)"
        )

    def record_sizes(self) -> frozenset[int]:
        """Bytes of the records that clients look up whole."""
        specs = [table.spec for table in self]
        return frozenset(spec.record_bytes for spec in specs if spec.addressing == "record")

    def owners(self) -> dict[str, int]:
        """Every owner of records by what it is in any process: a generation and an order."""
        return {
            f"{table.spec.generation}/{order}": table.owner + order
            for table in self
            for order in range(len(table.head_sizes))
        }

    def take_up(
        self, *, replace: bool, make_room: Callable[[ServedTable], None]
    ) -> tuple[list[str], list[ServedTable]]:
        """Serve tables packed since and, with `replace`, other generations of those served.

        Returns the names, and tables that nobody can ask for any more. `make_room` is called before a table
        is served for the first time and raises FormatError where there is no room. What cannot be served is
        logged, and the generation before goes on.
        """
        news = self._news(replace)
        again = [entry.spec.name for entry in news if self._is_earlier(entry)]
        opened, broken = self._open(entry for entry in news if entry.spec.name not in again)
        taken: dict[str, ServedTable] = {name: self._earlier[name] for name in again}
        for name, table in opened.items():
            try:
                make_room(table)
                taken[name] = table
            except FormatError as error:
                log.error("table %r is not served: %s", name, error)
                broken[name] = error
        for name, table in taken.items():
            log.info("table %r is served, generation %s", name, table.spec.generation)
        dropped = [table for name, table in self._earlier.items() if name in taken and name not in again]
        earlier = {name: self._served[name] for name in taken if name in self._served}
        self._earlier = {**self._earlier, **earlier}  # first: what is asked for is always in one of the two
        self._served = {**self._served, **taken}
        broken = {**self._broken, **broken}
        self._broken = {name: error for name, error in broken.items() if name not in self._served}
        return sorted(taken), dropped

    def earlier(self) -> list[ServedTable]:
        """Those that are still there for clients who have not moved over."""
        return list(self._earlier.values())

    def drop_earlier(self, table: ServedTable) -> bool:
        """Serve it no more; False where it is not an earlier one, or is current again."""
        name = table.spec.name
        if self._earlier.get(name) is not table:
            return False
        self._earlier = {other: kept for other, kept in self._earlier.items() if other != name}
        return True

    def _is_earlier(self, entry: CatalogEntry) -> bool:
        earlier = self._earlier.get(entry.spec.name)
        return earlier is not None and earlier.spec.generation == entry.spec.generation

    def _news(self, replace: bool) -> list[CatalogEntry]:
        """Without `replace` only what was never heard of: a damaged table is not tried again and again."""
        if not replace:
            return [entry for entry in self._catalogued() if not self.knows(entry.spec.name)]
        served = {name: table.spec.generation for name, table in self._served.items()}
        return [e for e in self._catalogued() if served.get(e.spec.name) != e.spec.generation]

    def _open(self, entries: Iterable[CatalogEntry]) -> Opened:
        """What is wrong with a table that cannot be served is logged."""
        tables: dict[str, ServedTable] = {}
        broken: dict[str, Broken] = {}
        for entry in entries:
            try:
                tables[entry.spec.name] = _open_table(entry, self._direct, next(self._numbers))
            except (FormatError, StorageError) as error:
                log.error("table %r is not served: %s", entry.spec.name, error)
                broken[entry.spec.name] = error
        return tables, broken

    def close(self) -> None:
        for table in self:
            table.close()


def _open_table(entry: CatalogEntry, direct: Direct, number: int) -> ServedTable:
    row_file = RowFile.open(entry.path)
    found, expected = row_file.spec, entry.spec
    if (found.generation, found.name) != (expected.generation, expected.name):
        raise FormatError(
            f"{entry.path} holds generation {found.generation} of table {found.name!r}, the catalog expects "
            f"generation {expected.generation} of {expected.name!r}; restore the file or pack the table again"
        )
    return ServedTable(row_file, open_for_reads(entry.path, direct), number)
