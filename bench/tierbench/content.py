"""Reproducible random tensor content: any byte range of any tensor, without the bytes before it.

A tensor's bytes are cut into blocks of 1 MiB. Block i of the tensor named n, for seed s, is the raw
output of SFC64 seeded with (s, digest of n, i), then brought into the dtype's finite range, element by
element:

    e4m3   any code but the two NaNs (0x7F, 0xFF), which become the largest finite codes
    e8m0   `low` + 0..15: sixteen scales in a row, two to the power of them
    bf16   any sign and mantissa, exponent code `low` + 0..7 (`low` a multiple of 8): never 0, Inf or NaN

The stream is numpy's documented one, so the same seed gives the same file on every machine. It is test
content: nothing about it is fit for anything secret.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np

BLOCK_BYTES = 1 << 20
CHUNK_BYTES = 1 << 16  # stays in the cache between passes
ByteArray = np.ndarray[Any, np.dtype[np.uint8]]


@dataclass(frozen=True)
class Random:
    """Random elements of `kind` "e4m3", "e8m0" or "bf16"; `low` as in the module's text."""

    kind: str
    low: int = 0


@dataclass(frozen=True)
class Literal:
    """These very bytes."""

    data: bytes


Content = Random | Literal


def block(content: Random, seed: int, name: str, index: int) -> ByteArray:
    """Bytes [index * BLOCK_BYTES, (index + 1) * BLOCK_BYTES) of an endless tensor."""
    digest = int.from_bytes(hashlib.sha256(name.encode()).digest()[:16], "little")
    source = np.random.SFC64(np.random.SeedSequence([seed, digest, index]))
    raw = source.random_raw(BLOCK_BYTES // 8).astype("<u8", copy=False).view(np.uint8)
    _FINITE[content.kind](raw, content.low)
    return raw


def content_bytes(content: Content, seed: int, name: str, first: int, count: int) -> ByteArray:
    """Bytes [first, first + count) of tensor `name`; touches only the blocks they lie in."""
    if isinstance(content, Literal):
        return np.frombuffer(content.data, np.uint8)[first : first + count].copy()
    out = np.empty(count, np.uint8)
    done = 0
    while done < count:
        index, start = divmod(first + done, BLOCK_BYTES)
        take = min(BLOCK_BYTES - start, count - done)
        out[done : done + take] = block(content, seed, name, index)[start : start + take]
        done += take
    return out


def _finite_e4m3(raw: ByteArray, low: int) -> None:
    for first in range(0, len(raw), CHUNK_BYTES):
        part = raw[first : first + CHUNK_BYTES]
        nan = part & 0x7F
        np.equal(nan, 0x7F, out=nan.view(np.bool_))
        np.subtract(part, nan, out=part)


def _finite_e8m0(raw: ByteArray, low: int) -> None:
    np.bitwise_and(raw, 15, out=raw)
    np.add(raw, low, out=raw)


def _finite_bf16(raw: ByteArray, low: int) -> None:
    words = raw.view("<u2")
    np.bitwise_and(words, 0x83FF, out=words)
    np.bitwise_or(words, low << 7, out=words)


_FINITE = {"e4m3": _finite_e4m3, "e8m0": _finite_e8m0, "bf16": _finite_bf16}
