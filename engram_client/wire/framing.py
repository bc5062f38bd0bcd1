"""LookupResponse without a protobuf object around the rows.

The message has one `bytes` field, so on the wire it is one tag byte, the length as a varint, and
the rows. Writing that by hand saves a copy of the rows on each side and stays exactly what
protobuf would have written; a reader falls back to protobuf for anything else it is sent. What is
received is handed on as it is, so rows that need no other place are never copied by the client.
"""

from __future__ import annotations

import ctypes

import numpy as np

from engram_client.wire import memory_pb2 as pb

ROWS_TAG = (pb.LookupResponse.ROWS_FIELD_NUMBER << 3) | 2  # 2: length-delimited

_new_bytes = ctypes.pythonapi.PyBytes_FromStringAndSize
_new_bytes.restype, _new_bytes.argtypes = ctypes.py_object, (ctypes.c_void_p, ctypes.c_ssize_t)
_address_of_bytes = ctypes.pythonapi.PyBytes_AsString
_address_of_bytes.restype, _address_of_bytes.argtypes = ctypes.c_void_p, (ctypes.py_object,)


def new_message(rows_bytes: int) -> tuple[bytes, np.ndarray]:
    """A LookupResponse with so many bytes of rows, and these, uint8, to be filled in before it is sent.

    Until then the content of the rows is undefined. CPython lets whoever makes a bytes object write
    into it as long as nobody else has it; that saves a buffer and a copy as large as the reply.
    """
    if not rows_bytes:
        return b"", np.empty(0, np.uint8)  # protobuf leaves an empty field out
    head = bytes([ROWS_TAG]) + _varint(rows_bytes)
    message: bytes = _new_bytes(None, len(head) + rows_bytes)
    start = _address_of_bytes(message)
    ctypes.memmove(start, head, len(head))
    return message, np.asarray(_Inside(message, start + len(head), rows_bytes))


class _Inside:
    """Memory inside a bytes object in the form numpy takes it; keeps the object alive."""

    def __init__(self, message: bytes, address: int, size_bytes: int) -> None:
        self._message = message
        self.__array_interface__ = {
            "data": (address, False),  # not read-only
            "shape": (size_bytes,),
            "typestr": "|u1",
            "version": 3,
        }


def decode_rows(message: bytes) -> np.ndarray:
    """The rows of a LookupResponse, uint8 [bytes], without a copy where it is framed as `new_message` does.

    They may be written: the caller must be the only one who has the message, as a deserializer is.
    """
    if len(message) > 2 and message[0] == ROWS_TAG:  # CPython shares bytes objects of a single byte
        length, start = _read_varint(message, 1)
        if start + length == len(message):
            return np.asarray(_Inside(message, _address_of_bytes(message) + start, length))
    return np.frombuffer(bytearray(pb.LookupResponse.FromString(message).rows), np.uint8)


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
