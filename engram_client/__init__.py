"""Thin client of the tierstore memory service: hashing, prefetch, look-ups, modules.

    from engram_client import connect

    client = connect("unix:/run/tierstore.sock")
    table = client.table("deepseek-v4.1.layer1")
    keys = table.mapping(CompressedTokenizer("tokenizer.json")).ngram_keys(token_ids, layer_id=1)
    rows = table.lookup_ngrams(keys)            # uint8 [..., H, row_bytes]
    values = table.dequantize(rows)             # torch [..., H, embedding_dim]

`engram_client.modules` holds the PyTorch modules; they and `dequantize` need torch, the rest does not.
"""

from engram_client import errors
from engram_client.client import Client, connect
from engram_client.errors import TierstoreError
from engram_client.hashing import Lookback, NgramHashMapping
from engram_client.prefetch import Handle
from engram_client.spec import Field, HashScheme, RowLayout, TableSpec
from engram_client.staging import StagedStep, StagingRing
from engram_client.step import Step, StepPrefetcher
from engram_client.table import Table
from engram_client.tokenizer import CompressedTokenizer
from engram_client.trained import TrainedTable, Training

__all__ = [
    "Client",
    "CompressedTokenizer",
    "Field",
    "Handle",
    "HashScheme",
    "Lookback",
    "NgramHashMapping",
    "RowLayout",
    "StagedStep",
    "StagingRing",
    "Step",
    "StepPrefetcher",
    "Table",
    "TableSpec",
    "TierstoreError",
    "TrainedTable",
    "Training",
    "connect",
    "errors",
]
