"""Shares of tables as ranks leave them, without the ranks: trained by the rule of who keeps which row."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np

from tests.support.trained_steps import CONFIG, DIM, all_rows, demo_schemes
from tests.support.training import push_of
from tierstore.catalog import Catalog
from tierstore.snapshots import Source, StepRows, open_storage, whole_step
from tierstore.snapshots.state import TrainingState
from tierstore.training.creating import NewTable, create_training
from tierstore.training.store import TrainingStore

PLAIN, ROWS, TINY = "words", 1501, "tiny"


def new_tables() -> list[NewTable]:
    """One with a hash scheme, one without, and one of two rows."""
    scheme = demo_schemes()[0]
    demo = NewTable("engram.layer1", scheme.rows, DIM, scheme, "engram-demo")
    return [demo, NewTable(PLAIN, ROWS, DIM), NewTable(TINY, 2, DIM)]


def create_shares(folder: Path, world: int, seed: int = 7) -> list[Path]:
    folders = [folder / str(rank) for rank in range(world)]
    for rank, each in enumerate(folders):
        create_training(
            each, new_tables(), optimizer="adam", learning_rate=0.05, dtype="bfloat16", initial_std=0.5,
            seed=seed, share=(rank, world),
        )  # fmt: skip
    return folders


def train_shares(folders: list[Path], steps: range, training: str = "") -> None:
    """Each share gets its rows of the same gradients, and a commit a step."""
    for rank, folder in enumerate(folders):
        store = TrainingStore.open(folder, CONFIG)
        try:
            train_part(store, steps, rank, len(folders), training)
        finally:
            store.close()


def train_part(store: TrainingStore, steps: range, rank: int = 0, world: int = 1, training: str = "") -> None:
    for step in steps:
        for number, table in enumerate(new_tables()):
            rng = np.random.default_rng([step, number])
            ids = rng.choice(table.rows, min(60, table.rows), replace=False)
            gradients = rng.standard_normal((ids.size, DIM)).astype(np.float32)
            mine = ids % world == rank
            push = push_of(store, step, ids[mine] // world, gradients[mine], table.name, learning_rate=None)
            store.update(push, 30)
        store.commit(step, 30, training).wait(30)


@contextmanager
def joined(shares: list[Path], step: int | None = None) -> Iterator[StepRows]:
    with ExitStack() as stack:
        yield stack.enter_context(whole_step([source(each, stack) for each in shares], step))


def source(folder: Path, stack: ExitStack) -> Source:
    storage = stack.enter_context(open_storage(folder))
    partitions = {spec.name: spec.partition for spec in storage.tables}
    return Source(folder.name, partitions, storage.steps, storage.snapshot)


def whole_store(shares: list[Path], folder: Path) -> TrainingStore:
    """Not trained, of the tables that these shares make up."""
    with joined(shares) as rows:
        TrainingStore.create(folder, rows.tables)
    Catalog.open(folder, create=True).close()
    return TrainingStore.open(folder, CONFIG)


def everything(rows: StepRows) -> list[bytes]:
    """Every row of every table, and how far each is."""
    told = [all_rows(rows, number).tobytes() for number in range(len(rows.tables))]
    kept = TrainingState.decode(rows.state).tables
    return told + [str(kept[spec.uuid]).encode() for spec in rows.tables]
