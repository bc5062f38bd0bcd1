"""What every method of our services has around it: messages decoded and encoded, errors as a status."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from engram_client.errors import TierstoreError
from tierstore.rpc.status import ERROR_KEY, status_of

log = logging.getLogger(__name__)
MESSAGE_CHARACTERS_MAX = 1000  # of an error; gRPC allows 8 KiB of metadata, and percent-encodes some

Handle = Callable[..., Awaitable[Any]]


def method(handle: Handle, request: Any, serialize: Any) -> grpc.RpcMethodHandler:
    """A unary method that takes messages of the class `request`."""
    return grpc.unary_unary_rpc_method_handler(
        guarded(handle), request_deserializer=request.FromString, response_serializer=serialize
    )


def guarded(handle: Handle) -> Handle:
    """Our errors become a status with the error's code; others are logged and stay vague."""

    async def guarded_handle(request: Any, context: Any) -> Any:
        try:
            return await handle(request, context)
        except TierstoreError as error:
            await context.abort(status_of(error), _told(error), ((ERROR_KEY, error.code),))
        except Exception as error:
            log.exception("a request failed unexpectedly")
            text = f"internal error ({type(error).__name__}); the daemon's log has the details"
            await context.abort(grpc.StatusCode.INTERNAL, text, ((ERROR_KEY, TierstoreError.code),))

    return guarded_handle


def _told(error: TierstoreError) -> str:
    """The message, short enough for the metadata it travels in."""
    text = str(error)
    return text if len(text) <= MESSAGE_CHARACTERS_MAX else text[:MESSAGE_CHARACTERS_MAX] + " ..."


def serialized(message: Any) -> bytes:
    packed: bytes = message.SerializeToString()
    return packed
