"""Replies framed by hand are what protobuf writes, and are read as protobuf reads them."""

from __future__ import annotations

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import example, given
from hypothesis import strategies as st

from engram_client.wire import framing
from engram_client.wire import memory_pb2 as pb


def written(rows: bytes) -> bytes:
    message, inside = framing.new_message(len(rows))
    inside[:] = np.frombuffer(rows, np.uint8)
    return message


@given(st.binary(max_size=600))
@example(b"")
def test_a_reply_is_what_protobuf_writes(rows: bytes) -> None:
    assert written(rows) == pb.LookupResponse(rows=rows).SerializeToString()


@pytest.mark.parametrize("size", [0, 1, 127, 128, 16_383, 16_384, 2**21 - 1, 2**21])
def test_every_length_of_the_length(size: int) -> None:
    rows = np.random.default_rng(size).integers(0, 256, size, np.uint8).tobytes()
    assert written(rows) == pb.LookupResponse(rows=rows).SerializeToString()
    assert bytes(framing.decode_rows(written(rows))) == rows


def test_replies_made_at_once_do_not_share_memory() -> None:
    made = [framing.new_message(100) for _ in range(20)]
    for i, (_, rows) in enumerate(made):
        rows[:] = i
    for i, (message, rows) in enumerate(made):
        assert pb.LookupResponse.FromString(message).rows == bytes([i]) * 100
        assert rows.flags.writeable


def test_the_rows_keep_the_message_alive() -> None:
    message, rows = framing.new_message(1 << 20)
    rows[:] = 7
    del message
    kept = [bytearray(1 << 20) for _ in range(8)]  # would take the memory if it were free
    assert (rows == 7).all()
    assert len(kept) == 8


def test_rows_are_read_without_a_copy() -> None:
    message = pb.LookupResponse(rows=b"abc" * 1000).SerializeToString()
    found = framing.decode_rows(message)
    assert bytes(found) == b"abc" * 1000
    found[:] = 7  # nobody else has the message, so it may be seen to change
    assert message.endswith(bytes([7]) * 3000)
    del message
    kept = [bytearray(3000) for _ in range(64)]  # would take the memory if it were free
    assert (found == 7).all()
    assert len(kept) == 64


varints = st.integers(0, 300).map(lambda n: bytes([n]) if n < 128 else bytes([n & 127 | 128, n >> 7]))
pieces = st.one_of(
    st.binary(max_size=12),
    st.binary(max_size=200).map(lambda rows: pb.LookupResponse(rows=rows).SerializeToString()),
    st.tuples(st.sampled_from([b"\x0a", b"\x12", b"\x08", b"\x8a\x00"]), varints, st.binary(max_size=9)).map(
        b"".join
    ),
)


@given(st.lists(pieces, max_size=4).map(b"".join))
@example(b"\x0a")
@example(b"\x0a\x80")
@example(b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\x7f")
@example(b"\x0a\x83\x00abc")
@example(b"\x0a\x01a\x0a\x01b")
def test_whatever_protobuf_understands_is_understood_alike(message: bytes) -> None:
    try:
        expected = pb.LookupResponse.FromString(message).rows
    except DecodeError:
        with pytest.raises(DecodeError):
            framing.decode_rows(message)
        return
    assert bytes(framing.decode_rows(message)) == expected
