"""Training stores with some steps in them, and what every row is at each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from engram_client.hashing.schemes import engram_schemes
from engram_client.spec import HashScheme
from tests.support.training import push_of
from tierstore.catalog import Catalog
from tierstore.config import Training
from tierstore.snapshots import StepRows
from tierstore.training.recipe import layout_of, make_recipe
from tierstore.training.store import TrainingStore
from tierstore.updates import Initial, TrainedSpec

DIM, LAYERS = 8, (1, 15)
DEMO, PLAIN, ROUNDED = ("engram.layer1", "engram.layer15"), "words", "halves"
CONFIG = Training(dram_bytes=512 << 10, staging_bytes=64 << 10, keep_steps=100, segment_bytes=256 << 10)


def demo_schemes() -> tuple[HashScheme, ...]:
    """Heads large enough for row ids to determine an n-gram's key."""
    return engram_schemes(
        compressed_vocab_size=500, layer_ids=LAYERS, vocab_size_per_ngram=(260, 270),
        n_head_per_ngram=8, max_ngram_size=3, pad_id=2, seed=3,
    )  # fmt: skip


def specs(optimizer: str = "adam") -> list[TrainedSpec]:
    """Two layers of a demo model, a table without a scheme, and one of bfloat16 with masters."""
    recipe, initial = make_recipe(optimizer, learning_rate=0.05), Initial("normal", 0.5, 7)
    wide, rounded = layout_of(DIM, recipe), layout_of(DIM, recipe, dtype="bfloat16")
    made = recipe.to_json()
    demo = [
        TrainedSpec(f"engram.layer{s.layer_id}", s.rows, wide, initial, s, s.layer_id, "engram-demo", made)
        for s in demo_schemes()
    ]
    plain = TrainedSpec(PLAIN, 3001, wide, initial, optimizer=made)
    return [*demo, plain, TrainedSpec(ROUNDED, 700, rounded, initial, optimizer=made)]


def train(store: TrainingStore, steps: range, rows: int = 40) -> None:
    """Updates of every table and a commit for each step; the same for the same steps."""
    for step in steps:
        for number, (name, spec) in enumerate(store.tables().items()):
            rng = np.random.default_rng([step, number])
            ids = rng.choice(spec.rows, min(rows, spec.rows), replace=False)
            gradients = rng.standard_normal((ids.size, DIM)).astype(np.float32)
            store.update(push_of(store, step, ids, gradients, name, learning_rate=None), 30)
        store.commit(step, 30).wait(30)


def made_store(folder: Path, steps: int = 3, **options: Any) -> Path:
    """A store directory, trained so far and closed."""
    TrainingStore.create(folder, specs(**options))
    Catalog.open(folder, create=True).close()
    store = TrainingStore.open(folder, CONFIG)
    train(store, range(steps))
    store.close()
    return folder


def all_rows(rows: StepRows, number: int) -> np.ndarray:
    """uint8 [rows, row_bytes], read at once."""
    spec = rows.tables[number]
    out = np.empty((spec.rows, spec.row_bytes), np.uint8)
    rows.read(number, np.arange(spec.rows), out)
    return out
