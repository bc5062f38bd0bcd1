"""Specs and requests survive the wire; requests that make no sense do not get in."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engram_client.errors import BadRequest
from engram_client.spec import ELEMENT_BYTES, Field, HashScheme, RowLayout, TableSpec
from engram_client.transport.base import LookupRequest
from engram_client.wire import memory_pb2 as pb
from engram_client.wire.convert import (
    request_from_message,
    request_to_message,
    spec_from_message,
    spec_to_message,
)

INT64 = st.integers(-(2**63), 2**63 - 1)
HEX = st.binary(min_size=16, max_size=16).map(bytes.hex)
NUMBERS = st.integers(0, 2**63 - 1)


@st.composite
def schemes(draw: st.DrawFn) -> HashScheme:
    orders, heads = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    matrix = st.lists(
        st.lists(NUMBERS, min_size=heads, max_size=heads).map(tuple), min_size=orders, max_size=orders
    ).map(tuple)
    return HashScheme(
        kind=draw(st.sampled_from(["engram", "ple"])),
        layer_id=draw(NUMBERS),
        multipliers=tuple(draw(st.lists(NUMBERS, max_size=4))),
        head_sizes=draw(matrix),
        head_offsets=draw(matrix),
        vocab_size=draw(NUMBERS),
        pad_id=draw(st.none() | NUMBERS),
        eos_token_id=draw(st.none() | NUMBERS),
        vocabulary_digest=draw(st.none() | st.text(max_size=70)),
        parameters=draw(st.dictionaries(st.text(max_size=5), st.none() | st.booleans() | INT64 | st.text())),
    )


FIELDS = st.builds(
    Field, st.text(max_size=9), st.sampled_from(sorted(ELEMENT_BYTES)), st.integers(1, 2**32 - 1)
)
SPECS = st.builds(
    TableSpec,
    name=st.text(max_size=20),
    generation=HEX,
    uuid=HEX,
    rows=NUMBERS,
    layout=st.builds(
        RowLayout,
        st.lists(FIELDS, min_size=1, max_size=3).map(tuple),
        st.none() | st.floats(allow_nan=False),
    ),
    addressing=st.sampled_from(["record", "row"]),
    scheme=st.none() | schemes(),
    layer=st.none() | INT64,
    model=st.none() | st.text(max_size=20),
)


@given(SPECS)
def test_a_spec_survives_the_wire(spec: TableSpec) -> None:
    message = pb.TableSpec.FromString(spec_to_message(spec).SerializeToString())
    found = spec_from_message(message)
    assert found == spec
    assert (found.scheme.parameters if found.scheme else None) == (
        spec.scheme.parameters if spec.scheme else None
    )


@given(st.text(max_size=20), HEX, st.integers(0, 5), st.integers(1, 4), st.data())
def test_a_request_survives_the_wire(
    table: str, generation: str, n: int, orders: int, data: st.DataObject
) -> None:
    by_key = data.draw(st.booleans())
    ids = data.draw(st.lists(INT64, min_size=n * orders, max_size=n * orders))
    heads = data.draw(st.none() | st.tuples(st.integers(0, 9), st.integers(0, 9))) if by_key else None
    array = np.array(ids, np.int64).reshape((n, orders) if by_key else (-1,))
    sent = LookupRequest(table, generation, "ngram" if by_key else "row", array, heads)
    message = pb.LookupRequest.FromString(request_to_message(sent).SerializeToString())
    got = request_from_message(message, orders)
    assert (got.table, got.generation, got.address, got.heads) == (table, generation, sent.address, heads)
    assert got.ids.dtype == np.int64
    assert np.array_equal(got.ids, array)


def test_ids_are_little_endian_on_the_wire() -> None:
    sent = LookupRequest("t", "00" * 16, "row", np.array([1, -1, 2**62]))
    assert request_to_message(sent).row_ids == (
        b"\x01" + bytes(7) + b"\xff" * 8 + bytes(7) + b"\x40"
    )  # fmt: skip


@pytest.mark.parametrize(("message", "what"), [
    (pb.LookupRequest(table="t", generation=bytes(16)), "names neither"),
    (pb.LookupRequest(table="t", generation=bytes(15), row_ids=b""), "16 bytes, got 15"),
    (pb.LookupRequest(table="t", row_ids=b""), "16 bytes, got 0"),
    (pb.LookupRequest(table="t", generation=bytes(16), row_ids=bytes(9)), "9 bytes, not a multiple of 8"),
    (pb.LookupRequest(table="t", generation=bytes(16), ngram_keys=bytes(16)), "multiple of 24"),
])  # fmt: skip
def test_messages_that_make_no_sense(message: pb.LookupRequest, what: str) -> None:
    with pytest.raises(BadRequest, match=what):
        request_from_message(message, 3)


def test_an_empty_batch_is_a_batch() -> None:
    for fields, shape in (({"row_ids": b""}, (0,)), ({"ngram_keys": b""}, (0, 3))):
        message = pb.LookupRequest(table="t", generation=bytes(16), **fields)
        assert request_from_message(message, 3).ids.shape == shape
