"""All runs of a study, each in a process of its own: with one thread each, as many at once as one says."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from engram_client import NgramHashMapping
from tierbench.learn.memory import Memory, Resident, Tiered
from tierbench.learn.model import ENGRAM_LAYER, MAX_NGRAM_SIZE, ORDERS, LanguageModel, Shape
from tierbench.learn.runs import Recipe, lanes, tokens_needed, train, validate
from tierbench.learn.text import PAD_ID, make_text

STATE_AND_WEIGHT_BYTES = 12  # of an element: float32, and both of Adam's means
Kind = Literal["without", "tierstore", "resident"]


@dataclass(frozen=True)
class Study:
    """What all runs of a study share."""

    folder: Path
    vocab_size: int
    hidden: int
    layers: int
    recipe: Recipe
    validation_tokens: int
    dram_share: float
    commit_steps: int


@dataclass(frozen=True)
class Run:
    """One of them; `rows_per_head` says how large the table is, 0 for a model without one."""

    kind: Kind
    rows_per_head: int
    seed: int


def measure(
    study: Study, runs: Iterable[Run], processes: int, done: Callable[[Run], None]
) -> list[dict[str, Any]]:
    """What each run came to, in the order given. Raises what a run raises."""
    runs = list(runs)
    make_text(study.folder, study.vocab_size, study.validation_tokens)  # once, and not by all at once
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        waiting = {pool.submit(run_one, study, run): at for at, run in enumerate(runs)}
        found: dict[int, dict[str, Any]] = {}
        for future in as_completed(waiting):
            found[waiting[future]] = future.result()
            done(runs[waiting[future]])
    return [found[at] for at in range(len(runs))]


def run_one(study: Study, run: Run) -> dict[str, Any]:
    """Train and validate one model."""
    torch.set_num_threads(1)
    recipe = study.recipe
    text = make_text(study.folder, study.vocab_size, study.validation_tokens)
    mapping = mapping_for(text.tokenizer, max(1, run.rows_per_head))
    shape = Shape(study.vocab_size, study.hidden, study.layers, recipe.context)
    model = LanguageModel(shape, with_memory=run.kind != "without", seed=run.seed)
    rows = int(mapping.head_sizes[ENGRAM_LAYER].sum())
    held_out = Recipe(recipe.batch, recipe.context, _steps_within(study), recipe.rate)
    with memory_for(study, run, rows, shape.row_width) as memory:
        losses, seconds = train(model, memory, mapping, lanes(text.training, recipe), recipe)
        loss = validate(model, memory, mapping, lanes(text.validation, held_out))
        counters = memory.client.stats() if isinstance(memory, Tiered) else {}
    return {
        "kind": run.kind,
        "seed": run.seed,
        "table_rows": rows if memory else 0,
        "validation_loss": loss,
        "training_loss_last": float(torch.tensor(losses[-len(losses) // 10 :]).mean()),
        "tokens_per_s": tokens_needed(recipe) / seconds,
        "counters": {name: count for name, count in counters.items() if name.startswith("training")},
    }


def _steps_within(study: Study) -> int:
    recipe = study.recipe
    return (study.validation_tokens // recipe.batch - 1) // recipe.context


def mapping_for(tokenizer: Any, rows_per_head: int) -> NgramHashMapping:
    """Hashing by the published demo's rules, for one layer."""
    return NgramHashMapping.engram(
        tokenizer,
        layer_ids=[ENGRAM_LAYER],
        vocab_size_per_ngram=[rows_per_head] * ORDERS,
        n_head_per_ngram=Shape.heads,
        max_ngram_size=MAX_NGRAM_SIZE,
        pad_id=PAD_ID,
        seed=0,
    )


@contextmanager
def memory_for(study: Study, run: Run, rows: int, row_width: int) -> Iterator[Memory | None]:
    """The table of a run, which begins with rows of its seed; gone when the run is over."""
    if run.kind == "without":
        yield None
        return
    folder = Path(tempfile.mkdtemp(prefix=f"learn-{os.getpid()}-", dir=study.folder))
    try:
        dram_bytes = max(1 << 20, int(rows * row_width * STATE_AND_WEIGHT_BYTES * study.dram_share))
        tiered = Tiered(
            folder / "store",
            rows,
            row_width,
            dram_bytes=dram_bytes,
            commit_steps=study.commit_steps,
            seed=run.seed,
        )
        with tiered:
            yield tiered if run.kind == "tierstore" else Resident(tiered.initial())
    finally:
        shutil.rmtree(folder, ignore_errors=True)
