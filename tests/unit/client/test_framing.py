"""Replies framed by hand are what protobuf would have written."""

from __future__ import annotations

import numpy as np
import pytest

from engram_client.wire import memory_pb2 as pb
from engram_client.wire.framing import decode_rows, new_message


@pytest.mark.parametrize("size", [0, 1, 2, 127, 128, 264, 16383, 16384, 2**21 + 5])
def test_a_filled_message_is_what_protobuf_writes(size: int) -> None:
    content = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    message, rows = new_message(size)
    rows[:] = content
    assert message == pb.LookupResponse(rows=content.tobytes()).SerializeToString()
    assert bytes(decode_rows(message)) == content.tobytes()


def test_the_rows_keep_the_message_alive() -> None:
    rows = new_message(1 << 20)[1]
    rows[:] = 7
    others = [new_message(1 << 20)[1] for _ in range(4)]
    for other in others:
        other[:] = 0
    assert int(rows.min()) == int(rows.max()) == 7
    assert rows.flags.writeable
    assert rows.flags.carray


def test_other_framings_are_read_by_protobuf() -> None:
    message = pb.LookupResponse(rows=b"abc").SerializeToString()
    assert bytes(decode_rows(message + message)) == b"abc"  # the last of a repeated field counts
    assert bytes(decode_rows(b"")) == b""
