"""Errors on the wire: a gRPC status for any client, and the error's code for ours."""

from __future__ import annotations

import grpc

from engram_client import errors
from engram_client.errors import TierstoreError

ERROR_KEY = "tierstore-error"

_STATUS = {
    errors.IdOutOfRange: grpc.StatusCode.OUT_OF_RANGE,
    errors.BadRequest: grpc.StatusCode.INVALID_ARGUMENT,
    errors.UnknownTable: grpc.StatusCode.NOT_FOUND,
    errors.GenerationMismatch: grpc.StatusCode.FAILED_PRECONDITION,
    errors.DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    errors.Cancelled: grpc.StatusCode.CANCELLED,
    errors.Unavailable: grpc.StatusCode.UNAVAILABLE,
    errors.Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    errors.DataCorrupt: grpc.StatusCode.DATA_LOSS,
}


def status_of(error: TierstoreError) -> grpc.StatusCode:
    """The status of the error's class, or of the nearest class above it."""
    for kind in type(error).__mro__:
        if kind in _STATUS:
            return _STATUS[kind]
    return grpc.StatusCode.INTERNAL
