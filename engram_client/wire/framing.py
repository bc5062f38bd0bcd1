"""LookupResponse without a protobuf object around the rows.

The message has one `bytes` field, so on the wire it is one tag byte, the length as a varint, and
the rows. Writing that by hand saves a copy of the rows on each side and stays exactly what
protobuf would have written; a reader falls back to protobuf for anything else it is sent.
"""

from __future__ import annotations

import numpy as np

from engram_client.wire import memory_pb2 as pb

ROWS_TAG = (pb.LookupResponse.ROWS_FIELD_NUMBER << 3) | 2  # 2: length-delimited


def encode_rows(rows: np.ndarray) -> bytes:
    """A LookupResponse holding `rows`, uint8 C-contiguous of any shape."""
    if not rows.nbytes:
        return b""  # protobuf leaves an empty field out
    return b"".join((bytes([ROWS_TAG]) + _varint(rows.nbytes), rows.reshape(-1).data))


def decode_rows(message: bytes) -> memoryview:
    """The rows of a LookupResponse, without a copy where it is framed as `encode_rows` does."""
    if message and message[0] == ROWS_TAG:
        length, start = _read_varint(message, 1)
        if start + length == len(message):
            return memoryview(message)[start:]
    return memoryview(pb.LookupResponse.FromString(message).rows)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(message: bytes, at: int) -> tuple[int, int]:
    """The number at `at` and where it ends; (-1, at) where it does not end."""
    value = 0
    for i, byte in enumerate(message[at : at + 10]):
        value |= (byte & 0x7F) << (7 * i)
        if byte < 0x80:
            return value, at + i + 1
    return -1, at
