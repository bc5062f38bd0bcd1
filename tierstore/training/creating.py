"""Making a store of tables that are to be trained."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from engram_client.errors import BadRequest, StorageError
from engram_client.hashing import NgramHashMapping
from engram_client.partition import Partition
from engram_client.spec import RowLayout
from engram_client.tokenizer import CompressedTokenizer
from tierstore.catalog import Catalog
from tierstore.packing import Progress
from tierstore.training.origin import PACKED_HERE, NewTable, Origin, begun_tables, check_names
from tierstore.training.recipe import Recipe, layout_of, make_recipe
from tierstore.training.store import FOLDER, TrainingStore
from tierstore.updates import Initial, TrainedSpec
from tierstore.updates.disk import REAL_DISK
from tierstore.updates.identity import is_created

__all__ = ["NewTable", "Origin", "create_training", "engram_tables"]


def engram_tables(
    tokenizer: Path,
    *,
    layer_ids: Sequence[int],
    vocab_size_per_ngram: Sequence[int],
    heads: int,
    pad_id: int,
    seed: int,
    dim: int,
) -> list[NewTable]:
    """One table for each layer of an Engram model, by the published demo's parameters. Raises BadRequest."""
    mapping = NgramHashMapping.engram(
        CompressedTokenizer(tokenizer),
        layer_ids=layer_ids,
        vocab_size_per_ngram=vocab_size_per_ngram,
        n_head_per_ngram=heads,
        max_ngram_size=len(vocab_size_per_ngram) + 1,
        pad_id=pad_id,
        seed=seed,
    )
    schemes = [mapping.scheme(layer) for layer in layer_ids]
    return [NewTable(f"engram.layer{s.layer_id}", s.rows, dim, s, "engram-demo") for s in schemes]


def create_training(
    directory: Path | str,
    tables: Sequence[NewTable],
    *,
    optimizer: str,
    settings: dict[str, float] | None = None,
    dtype: str = "float32",
    master: bool = True,
    initial_std: float = 0.0,
    seed: int = 0,
    share: tuple[int, int] | None = None,
    origin: Origin | None = None,
    notify: Callable[[str], None] = lambda sentence: None,
    on_progress: Callable[[Progress], None] = lambda progress: None,
    **recipe: Any,
) -> list[TrainedSpec]:
    """Make a training store of `tables` in `directory`, and a store directory where it is none.

    Tables of `origin` begin with the weights they have there, decoded to `dtype`, and the optimizer's initial
    state; the others empty. `recipe` may give `learning_rate`, `weight_decay`, `rate_scale`. With `share`
    (rank, world) the store keeps that rank's rows of the tables, for sharded training. Killed meanwhile it
    leaves no store, and what it leaves the next create takes up or removes. Raises BadRequest, UnknownTable,
    FormatError, StorageError, StoreLocked.
    """
    directory = Path(directory)
    made = make_recipe(optimizer, settings=settings or {}, **recipe)
    initial = Initial("normal", initial_std, seed) if initial_std else Initial()
    if is_created(REAL_DISK, directory / FOLDER):
        raise BadRequest(f"{directory} holds a training store already; open it, or choose another folder")
    with ExitStack() as stack:
        begun = stack.enter_context(begun_tables(origin, directory, notify, on_progress)) if origin else []
        if not (begun or tables):
            raise BadRequest("no table is named; give --table NAME:ROWS:DIM, --model or --from")
        specs = []
        for table in (*begun, *tables):
            layout = layout_of(table.dim, made, dtype=dtype, master=master)
            specs.append(_spec(table, layout, table.initial or initial, made, share))
        check_names((*begun, *tables), directory)
        try:
            directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot make {directory}: {error.strerror}") from error
        Catalog.open(directory, create=True).close()
        TrainingStore.create(directory, specs)
    shutil.rmtree(directory / FOLDER / PACKED_HERE, ignore_errors=True)  # of a create that was given up
    return specs


def _spec(
    table: NewTable, layout: RowLayout, initial: Initial, recipe: Recipe, share: tuple[int, int] | None
) -> TrainedSpec:
    part = Partition(*share, table.rows, table.scheme) if share else None
    layer = table.scheme.layer_id if table.scheme else table.layer
    return TrainedSpec(
        table.name, part.store_rows if part else table.rows, layout, initial,
        None if part else table.scheme, layer, table.model, recipe.to_json(), partition=part,
    )  # fmt: skip
