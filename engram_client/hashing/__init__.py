"""From token ids to n-gram keys and row ids, and back from row ids to keys."""

from engram_client.hashing.lookback import Lookback
from engram_client.hashing.mapping import NgramHashMapping
from engram_client.hashing.recover import recover_keys
from engram_client.hashing.rows import row_ids_from_keys
from engram_client.hashing.schemes import check_scheme, engram_schemes, head_offsets, ple_scheme

__all__ = [
    "Lookback",
    "NgramHashMapping",
    "check_scheme",
    "engram_schemes",
    "head_offsets",
    "ple_scheme",
    "recover_keys",
    "row_ids_from_keys",
]
