"""Making a store of tables that are to be trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engram_client.errors import BadRequest, StorageError
from engram_client.hashing import NgramHashMapping
from engram_client.partition import Partition
from engram_client.spec import HashScheme
from engram_client.tokenizer import CompressedTokenizer
from tierstore.catalog import Catalog
from tierstore.training.recipe import layout_of, make_recipe
from tierstore.training.store import TrainingStore
from tierstore.updates import Initial, TrainedSpec


@dataclass(frozen=True)
class NewTable:
    name: str
    rows: int
    dim: int
    scheme: HashScheme | None = None
    model: str | None = None


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
    **recipe: Any,
) -> list[TrainedSpec]:
    """Make an empty training store of `tables` in `directory`, and a store directory where it is none.

    `recipe` may give `learning_rate`, `weight_decay`, `rate_scale`. With `share` (rank, world) the store
    keeps that rank's rows of the tables, for sharded training. Raises BadRequest, StorageError.
    """
    if not tables:
        raise BadRequest("no table is named; give --table NAME:ROWS:DIM or --model")
    made = make_recipe(optimizer, settings=settings or {}, **recipe)
    initial = Initial("normal", initial_std, seed) if initial_std else Initial()
    specs = []
    for table in tables:
        part = Partition(*share, table.rows, table.scheme) if share else None
        layout = layout_of(table.dim, made, dtype=dtype, master=master)
        layer = table.scheme.layer_id if table.scheme else None
        spec = TrainedSpec(
            table.name, part.store_rows if part else table.rows, layout, initial,
            None if part else table.scheme, layer, table.model, made.to_json(), partition=part,
        )  # fmt: skip
        specs.append(spec)
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {directory}: {error.strerror}") from error
    with Catalog.open(directory, create=True) as catalog:
        packed = catalog.tables()
    for spec in specs:
        if spec.name in packed:
            raise BadRequest(f"{directory} has a packed table {spec.name!r}; a name means one table")
    TrainingStore.create(directory, specs)
    return specs
