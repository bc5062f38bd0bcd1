"""Shares of a sharded training as whole tables, and whole tables as shares.

Row `id` is row `id // world` of share `id % world` (engram_client/partition.py). So a batch of rows is a
batch of each share's, and nothing is held but what is read. The step is one that all shares keep; what is not
of one training, or not all of it, is refused before anything is written.

Tables that are put together get a uuid that follows from those of their shares: who does it twice gets the
same bytes.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, fields, replace

import numpy as np

from engram_client.agreement import check_training, common_step, training_of
from engram_client.errors import BadRequest, StepConflict
from engram_client.partition import Partition
from tierstore.snapshots.rows import StepRows
from tierstore.snapshots.state import TrainingState
from tierstore.updates import TrainedSpec


@dataclass(frozen=True)
class Source:
    """A training store, here or a daemon's, of which steps can be read. `name` is for errors."""

    name: str
    partitions: dict[str, Partition | None]  # of its tables
    steps: Callable[[], list[int]]
    open: Callable[[int | None], StepRows]


@contextmanager
def whole_step(
    sources: Sequence[Source], step: int | None, *, lone_share: bool = False
) -> Iterator[StepRows]:
    """A step (None: the last that all keep) of one store, or of the shares that are in these.

    A single share is taken as it is where `lone_share`. Raises BadRequest where sources are not all shares of
    one training, StepConflict where they do not keep a step together, and what opening raises.
    """
    if len(sources) == 1 and (lone_share or not any(sources[0].partitions.values())):
        with closing(sources[0].open(step)) as rows:
            yield rows
        return
    ordered = _by_rank(sources)
    names = [source.name for source in ordered]
    common = common_step([s.steps() for s in ordered], step, names=names, go_back="--step {}")
    with ExitStack() as stack:
        shares = [stack.enter_context(closing(source.open(common))) for source in ordered]
        _check_same(shares, names)
        yield WholeTables(shares)


def _by_rank(sources: Sequence[Source]) -> list[Source]:
    """Raises BadRequest unless they are shares 0, 1, ... of one world, each once."""
    found: dict[int, Source] = {}
    worlds: dict[int, str] = {}
    for source in sources:
        parts = {(part.rank, part.world) if part else None for part in source.partitions.values()}
        part = parts.pop()
        if part is None or parts:
            raise BadRequest(
                f"{source.name} holds whole tables; give it alone, or all shares of a sharded training"
            )
        rank, world = part
        worlds[world] = f"{source.name} is share {rank} of {world}"
        if len(worlds) > 1:
            raise BadRequest(f"shares are not of one training: {'; '.join(worlds.values())}")
        if rank in found:
            raise BadRequest(
                f"share {rank} of {world} is there twice: {found[rank].name} and {source.name}; give each "
                "share once"
            )
        found[rank] = source
    world = next(iter(worlds))
    if missing := sorted(set(range(world)) - set(found)):
        told = ", ".join(map(str, missing))
        raise BadRequest(
            f"shares are missing: {told} of {world}; given are "
            f"{', '.join(source.name for source in found.values())}: all {world} make up the tables"
        )
    return [found[rank] for rank in range(world)]


def _check_same(shares: Sequence[StepRows], names: Sequence[str]) -> None:
    """Raises BadRequest where they are not of one training, StepConflict where its progress is not one."""
    states = [TrainingState.decode(share.state) for share in shares]
    expected = training_of([[spec.uuid for spec in share.tables] for share in shares])
    check_training([state.training for state in states], expected, names)
    first = [_without_owner(spec) for spec in shares[0].tables]
    progress = _progress(shares[0], states[0])
    for share, state, name in zip(shares, states, names, strict=True):
        for mine, its in zip(first, map(_without_owner, share.tables), strict=False):
            if mine != its:
                what = next(f.name for f in fields(mine) if getattr(mine, f.name) != getattr(its, f.name))
                raise BadRequest(
                    f"shares are not of one table: {names[0]} has table {mine.name!r}, {name} {its.name!r} "
                    f"with another {what}: {getattr(mine, what)} and {getattr(its, what)}"
                )
        if len(share.tables) != len(first):
            raise BadRequest(f"{names[0]} has {len(first)} tables, {name} has {len(share.tables)}")
        if _progress(share, state) != progress:
            raise StepConflict(
                f"at step {share.step} shares are not equally far: {names[0]} tells {progress}, {name} "
                f"{_progress(share, state)}; they were not trained together"
            )


def _without_owner(spec: TrainedSpec) -> TrainedSpec:
    """What is the same for every share of a table."""
    return replace(_whole(spec), uuid="", initial=replace(spec.initial, path=None))


def _progress(share: StepRows, state: TrainingState) -> list[object]:
    return [state.tables.get(spec.uuid) for spec in share.tables]


def _whole(spec: TrainedSpec) -> TrainedSpec:
    part = spec.partition
    assert part is not None
    return replace(spec, rows=part.rows, scheme=part.scheme, partition=None)


class WholeTables:
    """All rows of tables whose shares these are, in the order of ranks; see `StepRows`."""

    def __init__(self, shares: Sequence[StepRows]) -> None:
        self._shares = list(shares)
        first = shares[0]
        self.step = first.step
        self.tables = [
            replace(_whole(spec), uuid=_joined_uuid([share.tables[number].uuid for share in shares]))
            for number, spec in enumerate(first.tables)
        ]
        kept = TrainingState.decode(first.state).tables
        told = {
            w.uuid: kept[s.uuid] for w, s in zip(self.tables, first.tables, strict=True) if s.uuid in kept
        }
        self.state = TrainingState(told).encode() if first.state else b""

    def read(self, table: int, ids: np.ndarray, out: np.ndarray) -> None:
        """Rows `ids` int64 [n] of table number `table` into `out` uint8 [n, row_bytes]."""
        for share in self._shares:
            part = _partition(share, table)
            mine = np.flatnonzero(part.owners(ids) == part.rank)
            if mine.size:
                rows = np.empty((mine.size, out.shape[1]), np.uint8)
                share.read(table, part.places(ids[mine]), rows)
                out[mine] = rows

    def touched(self, table: int, first: int, last: int) -> np.ndarray:
        """See `StepRows`."""
        found = []
        for share in self._shares:
            part = _partition(share, table)
            low, high = (part.places_before(row) for row in (first, last))
            if low < high:
                found.append(part.row_ids(share.touched(table, low, high)))
        return np.sort(np.concatenate(found)) if found else np.zeros(0, np.int64)

    def close(self) -> None:
        """Shares are their owner's to close."""


class Share:
    """The rows of whole tables that share `rank` of `world` keeps; see `StepRows`."""

    def __init__(self, rows: StepRows, tables: Sequence[TrainedSpec], training: str) -> None:
        """`tables` as the share has them; `training` is the name of what it is a share of."""
        self._rows, self.step, self.tables = rows, rows.step, list(tables)
        kept = TrainingState.decode(rows.state).tables
        told = {t.uuid: kept[w.uuid] for t, w in zip(tables, rows.tables, strict=True) if w.uuid in kept}
        self.state = TrainingState(told, training).encode()

    def read(self, table: int, ids: np.ndarray, out: np.ndarray) -> None:
        """See `StepRows`."""
        self._rows.read(table, _partition(self, table).row_ids(ids), out)

    def touched(self, table: int, first: int, last: int) -> np.ndarray:
        """See `StepRows`."""
        part = _partition(self, table)
        low, high = (min(part.rows, place * part.world) for place in (first, last))
        if low >= high:
            return np.zeros(0, np.int64)
        ids = self._rows.touched(table, low, high)
        return part.places(ids[part.owners(ids) == part.rank])

    def close(self) -> None:
        """The rows are their owner's to close."""


def shares_of(rows: StepRows, world: int) -> list[Share]:
    """Whole tables dealt out to `world` ranks. Raises BadRequest for tables that are shares already."""
    for spec in rows.tables:
        if spec.partition is not None:
            raise BadRequest(f"table {spec.name!r} is a share already; give all of them together")
    made = [[_dealt(spec, rank, world) for spec in rows.tables] for rank in range(world)]
    training = training_of([[spec.uuid for spec in tables] for tables in made])
    return [Share(rows, tables, training) for tables in made]


def _dealt(spec: TrainedSpec, rank: int, world: int) -> TrainedSpec:
    part = Partition(rank, world, spec.rows, spec.scheme)
    uuid = os.urandom(16).hex()  # dealt out twice they are two trainings
    return replace(spec, rows=part.store_rows, scheme=None, uuid=uuid, partition=part)


def _partition(rows: StepRows, table: int) -> Partition:
    part = rows.tables[table].partition
    assert part is not None
    return part


def _joined_uuid(uuids: Sequence[str]) -> str:
    return hashlib.blake2b(";".join(uuids).encode(), digest_size=16).hexdigest()
