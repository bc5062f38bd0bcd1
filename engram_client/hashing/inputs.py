"""Arrays from outside, checked and brought into the one form the kernels are compiled for."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from engram_client.errors import BadRequest

Int64Array = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

INT64 = np.dtype(np.int64)
ID_DTYPES = (INT64, np.dtype(np.int32))
TOKEN_DTYPES = (*ID_DTYPES, np.dtype(np.uint32))
NO_DEAD = np.zeros((0, 0), dtype=np.bool_)  # as the kernels take "no position is dead"


def as_array(values: Any, what: str) -> npt.NDArray[Any]:
    """`values` as a numpy array; torch CPU tensors and nested lists are welcome."""
    try:
        return np.asarray(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise BadRequest(f"{what} cannot be read as an array in host memory: {error}") from error


def as_int64(values: Any, what: str, dtypes: tuple[np.dtype[Any], ...]) -> Int64Array:
    """`values` as writable contiguous int64, copied only where they are not that already."""
    array = as_array(values, what)
    if array.dtype is INT64 and array.flags.carray:
        return array
    if array.dtype not in dtypes:
        raise BadRequest(f"{what} must be {' or '.join(map(str, dtypes))}, got {array.dtype}")
    return np.require(array, dtype=np.int64, requirements=["C", "W", "A"])


def as_tokens(token_ids: Any) -> Int64Array:
    """Token ids [B,T] or [T] as int64 of the same shape."""
    tokens = as_int64(token_ids, "token_ids", TOKEN_DTYPES)
    if tokens.ndim not in (1, 2):
        raise BadRequest(f"token_ids must be [B,T] or [T], got shape {list(tokens.shape)}")
    return tokens


def as_dead(dead: Any, shape: tuple[int, ...]) -> BoolArray:
    """The dead mask as bool of the tokens' shape."""
    mask = as_array(dead, "dead")
    if mask.dtype != np.bool_ or mask.shape != shape:
        raise BadRequest(
            f"dead must be bool of the tokens' shape {list(shape)}, got {mask.dtype} {list(mask.shape)}"
        )
    return np.require(mask, requirements=["C", "W", "A"])


def as_records(values: Any, what: str, last: int, axis: str) -> Int64Array:
    """Keys or row ids [..., last] as int64 of the same shape."""
    array = as_int64(values, what, ID_DTYPES)
    if array.ndim == 0 or array.shape[-1] != last:
        raise BadRequest(f"{what} must be [..., {last}] ({axis}), got shape {list(array.shape)}")
    return array


def as_batch(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """[B,T] as it is, [T] as [1,T]."""
    return array if array.ndim == 2 else array[None]


def position(flat: int, shape: tuple[int, ...]) -> str:
    """`[1, 4]`, the place of a flat index in an array of `shape`."""
    return str([int(i) for i in np.unravel_index(flat, shape)])
