"""The addressing of a table: from n-gram keys to the row ids of all heads."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from engram_client.errors import IdOutOfRange
from engram_client.hashing import inputs, kernels
from engram_client.hashing.inputs import Int64Array
from engram_client.spec import HashScheme


@lru_cache(maxsize=256)
def head_arrays(scheme: HashScheme) -> tuple[npt.NDArray[np.uint64], Int64Array]:
    """Head sizes uint64 and head offsets int64, both [orders, heads], as the kernels want them."""
    return np.array(scheme.head_sizes, dtype=np.uint64), np.array(scheme.head_offsets, dtype=np.int64)


def row_ids_from_keys(scheme: HashScheme, ngram_keys: Any) -> Int64Array:
    """Row ids int64 [..., H] of n-gram keys int64 or int32 [..., orders]; H = orders * heads.

    Order-major, head offsets included. A key of -1 means "no row here" and gives rows of -1.
    Raises IdOutOfRange for any other negative key, BadRequest for another dtype or shape.
    """
    keys = inputs.as_records(ngram_keys, "ngram_keys", scheme.orders, "one key per order")
    sizes, offsets = head_arrays(scheme)
    rows = np.empty((*keys.shape[:-1], scheme.orders * scheme.heads), dtype=np.int64)
    shape = (keys.size // scheme.orders, scheme.orders)
    refused = kernels.rows_of_keys(keys.reshape(shape), sizes, offsets, rows.reshape(*shape, scheme.heads))
    if refused >= 0:
        where = inputs.position(refused, keys.shape)
        raise IdOutOfRange(f"ngram_keys{where} is {keys.flat[refused]}; keys are 0..2^63-1, or -1 for no row")
    return rows
