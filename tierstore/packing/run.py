"""The course of a pack: plan it or find its plan, claim its tables, write, publish, clean up."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from engram_client.errors import BadRequest, FormatError
from engram_client.spec import TableSpec
from tierstore.catalog import Catalog
from tierstore.format.direct import sync_folder
from tierstore.format.header import LEAF_PAGES
from tierstore.format.reads import FileRows
from tierstore.format.rowfile import RowFile
from tierstore.format.source import TableSource
from tierstore.format.sources import open_checkpoint
from tierstore.format.writer import SYNC_BYTES, RowFileJob, finish, write_rows
from tierstore.packing.claim import claim
from tierstore.packing.consume import Consumer, check_consumable
from tierstore.packing.names import check_name
from tierstore.packing.plan import PackOptions, PackPlan, plan_folder
from tierstore.packing.space import check_space

RECORDS_PAY_HEAD_ROWS = 4_000_000


@dataclass(frozen=True)
class Progress:
    """How far a pack is: bytes of row files written by this and earlier runs, and in all."""

    table: str
    done_bytes: int
    total_bytes: int
    resumed_bytes: int


@dataclass(frozen=True)
class PackedTable:
    """One table that was published."""

    spec: TableSpec
    path: Path
    file_bytes: int
    resumed_rows: int
    duration_s: float


@dataclass(frozen=True)
class PackReport:
    """What one `pack` did."""

    tables: tuple[PackedTable, ...]
    removed: tuple[Path, ...]


Notify = Callable[[str], None]
OnProgress = Callable[[Progress], None]


def pack(
    origin: Path,
    folder: Path,
    options: PackOptions,
    *,
    notify: Notify,
    on_progress: OnProgress,
    leaf_pages: int = LEAF_PAGES,
    sync_bytes: int = SYNC_BYTES,
) -> PackReport:
    """Pack the tables of checkpoint `origin` into store directory `folder`, or go on doing so.

    `notify` is told sentences for a person. Raises BadRequest, FormatError, StorageError,
    StoreLocked. `leaf_pages` and `sync_bytes` set how much is digested and forced to disk at once.
    """
    origin, folder = origin.absolute(), folder.absolute()
    packing = folder / "packing"
    if not origin.exists() and not plan_folder(packing, origin).exists():
        raise FormatError(f"{origin} does not exist; SOURCE is a checkpoint's folder or .safetensors file")
    # What cannot be packed is refused before anything is made in DIR.
    new = (
        None if (plan_folder(packing, origin) / "plan.json").exists() else _new_plan(origin, folder, options)
    )
    with ExitStack() as stack:
        stack.enter_context(claim(plan_folder(packing, origin), f"checkpoint {origin}"))
        resumed = _resumed_plan(packing, origin, options, notify)
        plan = resumed or new or _new_plan(origin, folder, options)
        for table in plan.tables:
            stack.enter_context(claim(packing / table.source.name, f"table {table.source.name!r}"))
        catalog = stack.enter_context(Catalog.open(folder, create=True))
        if options.consume == "yes":
            check_consumable(plan)
        if resumed is None:
            _begin(packing, origin, plan, options, catalog)
        report = _Run(folder, plan, options, catalog, notify, on_progress, leaf_pages, sync_bytes).run()
        (plan_folder(packing, origin) / "plan.json").unlink()
        return report


def _new_plan(origin: Path, folder: Path, options: PackOptions) -> PackPlan:
    """A plan that nothing but the disk can refuse. Raises BadRequest, FormatError."""
    plan = PackPlan.make(origin, options, _sources(origin, options))
    for table in plan.tables:
        check_name(table.source.name)
        RowFileJob.plan(table.source, table.spec, folder)
    return plan


def _sources(origin: Path, options: PackOptions) -> list[TableSource]:
    sources = open_checkpoint(
        origin, model=options.model, layout_file=options.layout_file, tokenizer=options.tokenizer,
        layers=options.layers,
    )  # fmt: skip
    if options.name is not None:
        if len(sources) != 1:
            layers = ", ".join(str(source.layer) for source in sources)
            raise BadRequest(
                f"--name {options.name} names one table, {origin} has {len(sources)} (layers {layers}); "
                "choose one with --layer"
            )
        sources = [replace(sources[0], name=options.name)]
    return sources


def _resumed_plan(packing: Path, origin: Path, options: PackOptions, notify: Notify) -> PackPlan | None:
    """The plan of an unfinished pack of `origin`, checked against today; None to begin anew."""
    plan = PackPlan.load(plan_folder(packing, origin) / "plan.json")
    if plan is None:
        return None
    if options.restart:
        _discard(packing, plan)
        return None
    again = "use --restart to drop what was packed and begin again"
    if plan.options != options.identity():
        raise BadRequest(
            f"an unfinished pack of {origin} was begun with other options: {plan.options}, now "
            f"{options.identity()}; give the same, or {again}"
        )
    if changed := plan.changed_files():
        raise FormatError(f"{changed[0]} was changed since packing began; {again}")
    if not plan.missing_files() and plan.sources != _sources(origin, options):
        raise FormatError(f"{origin} is read differently than when packing began; {again}")
    notify(f"going on with an unfinished pack of {origin}")
    return plan


def _begin(packing: Path, origin: Path, plan: PackPlan, options: PackOptions, catalog: Catalog) -> None:
    """Check that a new plan may be carried out, and write it down."""
    names = {table.source.name for table in plan.tables}
    taken = sorted(names & catalog.tables().keys())
    if taken and not options.replace:
        raise BadRequest(
            f"table {taken[0]!r} is already in {catalog.folder}, generation "
            f"{catalog.tables()[taken[0]].spec.generation}; use --replace to publish a new generation, "
            "or --name for another table"
        )
    for path in packing.glob("plan-*/plan.json"):
        other = PackPlan.load(path)
        if other and names & {table.source.name for table in other.tables}:
            if not options.restart:
                raise BadRequest(
                    f"an unfinished pack of {other.origin} writes a table of the same name; finish it with "
                    f"`tierstore pack {other.origin} {packing.parent}`, use --name, or --restart to drop it"
                )
            _discard(packing, other)
    for name in names:
        _empty(packing / name)
    plan.save(plan_folder(packing, origin) / "plan.json")


def _discard(packing: Path, plan: PackPlan) -> None:
    """Forget an unfinished pack, unless that would lose rows for good."""
    if missing := plan.missing_files():
        raise BadRequest(
            f"{missing[0]} is gone: with --consume its rows are now only in {packing}; run without "
            f"--restart to finish that pack, or remove {plan_folder(packing, plan.origin)} to give them up"
        )
    for table in plan.tables:
        _empty(packing / table.source.name)
    (plan_folder(packing, plan.origin) / "plan.json").unlink()


def _empty(folder: Path) -> None:
    for name in ("journal", "rows.partial"):
        (folder / name).unlink(missing_ok=True)


class _Run:
    """Carrying out one plan."""

    def __init__(
        self, folder: Path, plan: PackPlan, options: PackOptions, catalog: Catalog, notify: Notify,
        on_progress: OnProgress, leaf_pages: int, sync_bytes: int,
    ) -> None:  # fmt: skip
        self.folder, self.plan, self.options, self.catalog = folder, plan, options, catalog
        self.notify, self.on_progress = notify, on_progress
        published = {entry.spec.uuid for entry in catalog.tables().values()}
        self.sources = {table.source.name: table.source for table in plan.tables}
        self.jobs = {
            table.source.name: replace(
                RowFileJob.plan(table.source, table.spec, folder / "packing" / table.source.name, leaf_pages),
                sync_bytes=sync_bytes,
            )
            for table in plan.tables
            if table.uuid not in published
        }
        self.journals = {name: job.open_journal() for name, job in self.jobs.items()}
        self.resumed_rows = {table.source.name: self._safe_rows(table.source) for table in plan.tables}

    def run(self) -> PackReport:
        consume = self.options.consume != "no"
        check_space(self.folder, self.plan, self.jobs, self.resumed_rows, consume)
        consumer = Consumer(self.plan, self.resumed_rows, consume)
        packed = []
        for name, job in self.jobs.items():
            self._advise(job)
            packed.append(self._pack_table(name, job, consumer))
        for table in self.plan.tables:
            consumer.on_safe(table.source.name, table.source.rows)
            _empty(self.folder / "packing" / table.source.name)
        return PackReport(tuple(packed), tuple(consumer.removed))

    def _pack_table(self, name: str, job: RowFileJob, consumer: Consumer) -> PackedTable:
        started_s = time.monotonic()
        total_bytes = job.header.geometry.file_bytes
        resumed_rows = self.resumed_rows[name]
        resumed_bytes = resumed_rows * total_bytes // job.source.rows

        def on_packed(rows: int) -> None:
            done_bytes = rows * total_bytes // job.source.rows
            self.on_progress(Progress(name, done_bytes, total_bytes, resumed_bytes))

        if resumed_rows:
            self.notify(
                f"table {name}: the first {resumed_rows} of {job.source.rows} rows are packed already"
            )
        if resumed_rows < job.source.rows:
            source = self.sources[name]
            write_rows(
                job, FileRows(source), self.journals[name], on_packed,
                lambda rows: consumer.on_safe(name, rows),
            )  # fmt: skip
            self.plan.check_unchanged(source.files)
        path = finish(job, self.journals[name], self.folder / "tables" / name)
        spec = RowFile.open(path).spec
        self._publish(spec, path)
        return PackedTable(spec, path, total_bytes, resumed_rows, time.monotonic() - started_s)

    def _publish(self, spec: TableSpec, path: Path) -> None:
        replaced = self.catalog.publish(spec, str(path.relative_to(self.folder)))
        sync_folder(self.folder)
        if replaced and not self.options.prune:
            self.notify(
                f"table {spec.name}: generation {replaced.spec.generation} is retired; its file stays "
                f"at {replaced.path} until a pack with --prune"
            )
        if self.options.prune:
            for entry in self.catalog.retired:
                if entry.spec.name == spec.name:
                    entry.path.unlink(missing_ok=True)
                    self.catalog.forget(entry)
                    self.notify(f"table {spec.name}: removed retired generation {entry.spec.generation}")

    def _safe_rows(self, source: TableSource) -> int:
        if source.name not in self.jobs:
            return source.rows
        return self.jobs[source.name].rows_in(len(self.journals[source.name].leaves))

    def _advise(self, job: RowFileJob) -> None:
        """Say where records will not pay, or why they are not used."""
        scheme, name = job.spec.scheme, job.spec.name
        if scheme is None:
            return
        head_rows = min(size for sizes in scheme.head_sizes for size in sizes)
        if job.spec.addressing == "record" and head_rows < RECORDS_PAY_HEAD_ROWS:
            self.notify(
                f"table {name}: {head_rows} rows a head is few: n-grams share rows, and caching whole "
                f"records hits less often than caching rows (from about {RECORDS_PAY_HEAD_ROWS} on they "
                "are even); --addressing row serves it by rows"
            )
        if job.spec.addressing == "row" and self.options.addressing == "auto":
            self.notify(
                f"table {name}: its heads are too small for row ids to determine an n-gram key; "
                "it is served by rows"
            )
