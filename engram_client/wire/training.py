"""Training requests to and from protobuf messages."""

from __future__ import annotations

import json

import numpy as np

from engram_client.errors import BadRequest
from engram_client.partition import Partition
from engram_client.transport.training import BFLOAT16_BITS, TrainedDescription, UpdateRequest
from engram_client.wire import memory_pb2 as pb
from engram_client.wire.convert import GENERATION_BYTES, WIRE_INT64, spec_from_message, spec_to_message

DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}
NAMES: dict[np.dtype, str] = {
    np.dtype(np.float32): "float32",
    np.dtype(np.float16): "float16",
    BFLOAT16_BITS: "bfloat16",
}


def update_to_message(request: UpdateRequest) -> pb.UpdateRequest:
    name = NAMES[request.gradients.dtype]
    return pb.UpdateRequest(
        table=request.table,
        generation=bytes.fromhex(request.generation),
        step=request.step,
        row_ids=request.ids.astype(WIRE_INT64, copy=False).tobytes(),
        dtype=name,
        gradients=request.gradients.astype(DTYPES[name], copy=False).tobytes(),
        learning_rate=request.learning_rate,
        weight_decay=request.weight_decay,
        rank=request.rank,
        world=request.world,
        push=request.push,
        part=request.part,
        parts=request.parts,
    )


def update_from_message(message: pb.UpdateRequest) -> UpdateRequest:
    """Raises BadRequest where the message makes no sense."""
    where = f"table {message.table!r}"
    if len(message.generation) != GENERATION_BYTES:
        raise BadRequest(
            f"{where}: generation must be {GENERATION_BYTES} bytes, got {len(message.generation)}"
        )
    if message.dtype not in DTYPES:
        raise BadRequest(f"{where}: gradients are {', '.join(DTYPES)}, got {message.dtype!r}")
    if len(message.row_ids) % WIRE_INT64.itemsize:
        raise BadRequest(f"{where}: row_ids has {len(message.row_ids)} bytes, no multiple of 8")
    ids = np.frombuffer(message.row_ids, WIRE_INT64).astype(np.int64)
    dtype = DTYPES[message.dtype]
    if (ids.size and len(message.gradients) % (ids.size * dtype.itemsize)) or (
        message.gradients and not ids.size
    ):
        raise BadRequest(
            f"{where}: gradients has {len(message.gradients)} bytes, not as many {message.dtype} for each of "
            f"{ids.size} rows"
        )
    dim = len(message.gradients) // (ids.size * dtype.itemsize) if ids.size else 0
    gradients = np.frombuffer(message.gradients, dtype).reshape(ids.size, dim)
    return UpdateRequest(
        message.table,
        message.generation.hex(),
        message.step,
        ids,
        gradients.astype(dtype.newbyteorder("="), copy=False),
        message.learning_rate if message.HasField("learning_rate") else None,
        message.weight_decay if message.HasField("weight_decay") else None,
        message.rank,
        message.world,
        message.push,
        message.part,
        message.parts,
    )


def description_to_message(description: TrainedDescription) -> pb.TrainedTable:
    return pb.TrainedTable(
        spec=spec_to_message(description.spec),
        optimizer_json=json.dumps(description.optimizer),
        committed_step=description.committed_step,
        updated_step=description.updated_step,
        partition_json=json.dumps(description.partition.to_json()) if description.partition else "",
        initial_json=json.dumps(description.initial),
        not_finite=description.not_finite,
        training=description.training,
    )


def description_from_message(message: pb.TrainedTable) -> TrainedDescription:
    return TrainedDescription(
        spec_from_message(message.spec),
        json.loads(message.optimizer_json or "{}"),
        message.committed_step if message.HasField("committed_step") else None,
        message.updated_step if message.HasField("updated_step") else None,
        Partition.from_json(json.loads(message.partition_json)) if message.partition_json else None,
        json.loads(message.initial_json or "{}"),
        message.not_finite or "refuse",
        message.training,
    )
