"""TableSpec and requests to and from protobuf messages."""

from __future__ import annotations

import json

import numpy as np

from engram_client.errors import BadRequest
from engram_client.spec import Field, HashScheme, RowLayout, TableSpec
from engram_client.transport.base import LookupRequest
from engram_client.wire import memory_pb2 as pb

WIRE_INT64 = np.dtype("<i8")
GENERATION_BYTES = 16


def spec_to_message(spec: TableSpec) -> pb.TableSpec:
    return pb.TableSpec(
        name=spec.name,
        generation=bytes.fromhex(spec.generation),
        uuid=bytes.fromhex(spec.uuid),
        rows=spec.rows,
        layout=pb.RowLayout(
            fields=[pb.Field(name=f.name, dtype=f.dtype, count=f.count) for f in spec.layout.fields],
            global_scale=spec.layout.global_scale,
        ),
        addressing=spec.addressing,
        scheme=_scheme_to_message(spec.scheme) if spec.scheme else None,
        layer=spec.layer,
        model=spec.model,
    )


def _scheme_to_message(scheme: HashScheme) -> pb.HashScheme:
    orders = zip(scheme.head_sizes, scheme.head_offsets, strict=True)
    return pb.HashScheme(
        kind=scheme.kind,
        layer_id=scheme.layer_id,
        multipliers=scheme.multipliers,
        orders=[pb.Order(head_sizes=sizes, head_offsets=offsets) for sizes, offsets in orders],
        vocab_size=scheme.vocab_size,
        pad_id=scheme.pad_id,
        eos_token_id=scheme.eos_token_id,
        vocabulary_digest=scheme.vocabulary_digest,
        parameters_json=json.dumps(scheme.parameters),
    )


def spec_from_message(message: pb.TableSpec) -> TableSpec:
    layout = message.layout
    return TableSpec(
        name=message.name,
        generation=message.generation.hex(),
        uuid=message.uuid.hex(),
        rows=message.rows,
        layout=RowLayout(
            tuple(Field(f.name, f.dtype, f.count) for f in layout.fields),
            layout.global_scale if layout.HasField("global_scale") else None,
        ),
        addressing="record" if message.addressing == "record" else "row",
        scheme=_scheme_from_message(message.scheme) if message.HasField("scheme") else None,
        layer=message.layer if message.HasField("layer") else None,
        model=message.model if message.HasField("model") else None,
    )


def _scheme_from_message(message: pb.HashScheme) -> HashScheme:
    return HashScheme(
        kind="ple" if message.kind == "ple" else "engram",
        layer_id=message.layer_id,
        multipliers=tuple(message.multipliers),
        head_sizes=tuple(tuple(o.head_sizes) for o in message.orders),
        head_offsets=tuple(tuple(o.head_offsets) for o in message.orders),
        vocab_size=message.vocab_size,
        pad_id=message.pad_id if message.HasField("pad_id") else None,
        eos_token_id=message.eos_token_id if message.HasField("eos_token_id") else None,
        vocabulary_digest=message.vocabulary_digest if message.HasField("vocabulary_digest") else None,
        parameters=json.loads(message.parameters_json or "{}"),
    )


def request_to_message(request: LookupRequest) -> pb.LookupRequest:
    packed = request.ids.astype(WIRE_INT64, copy=False).tobytes()
    heads = pb.HeadRange(start=request.heads[0], stop=request.heads[1]) if request.heads else None
    return pb.LookupRequest(
        table=request.table,
        generation=bytes.fromhex(request.generation),
        ngram_keys=packed if request.address == "ngram" else None,
        row_ids=packed if request.address == "row" else None,
        heads=heads,
    )


def request_from_message(message: pb.LookupRequest, orders: int) -> LookupRequest:
    """`orders` of the table shape the keys. Raises BadRequest where the message makes no sense."""
    address = message.WhichOneof("address")
    if address is None:
        raise BadRequest(f"table {message.table!r}: the request names neither ngram_keys nor row_ids")
    if len(message.generation) != GENERATION_BYTES:
        raise BadRequest(
            f"table {message.table!r}: generation must be {GENERATION_BYTES} bytes, "
            f"got {len(message.generation)}; "
            "DescribeTable tells it"
        )
    packed = message.ngram_keys if address == "ngram_keys" else message.row_ids
    width = orders if address == "ngram_keys" else 1
    if len(packed) % (WIRE_INT64.itemsize * width):
        raise BadRequest(
            f"table {message.table!r}: {address} has {len(packed)} bytes, not a multiple of "
            f"{WIRE_INT64.itemsize * width} ({width} little-endian int64 an entry)"
        )
    ids = np.frombuffer(packed, WIRE_INT64).astype(np.int64)  # a copy: kernels know one kind of array
    heads = (message.heads.start, message.heads.stop) if message.HasField("heads") else None
    generation = message.generation.hex()
    if address == "ngram_keys":
        return LookupRequest(message.table, generation, "ngram", ids.reshape(-1, width), heads)
    return LookupRequest(message.table, generation, "row", ids, heads)
