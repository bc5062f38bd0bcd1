"""numpy and torch at the edge of the client: what comes in decides what goes out.

torch is only touched once the caller has handed over a tensor, so the client runs without it.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import numpy as np

from engram_client.errors import BadRequest

if TYPE_CHECKING:
    import torch

    Array = np.ndarray | torch.Tensor


def is_tensor(values: Any) -> bool:
    """Whether `values` is a torch tensor, found out without importing torch."""
    return type(values).__module__.partition(".")[0] == "torch"


def to_host(values: Any) -> Any:
    """A tensor as a numpy array in host memory; anything else as it is.

    Of a tensor on a device the host waits for what makes it, and not for what that stream was given since.
    Raises BadRequest for a tensor that numpy cannot hold, such as a BF16 or a sparse one.
    """
    if not is_tensor(values):
        return values
    if on_device(values):
        from engram_client.gpu.carrier import carrier_of

        return carrier_of(values.device).ids(values)
    try:
        return values.detach().cpu().numpy()
    except (TypeError, RuntimeError, AttributeError) as error:
        raise BadRequest(f"ids must be int64 or int32, got a tensor that is neither: {error}") from error


def numbers_to_host(values: Any) -> np.ndarray:
    """Numbers as a numpy array in host memory; of a bfloat16 tensor its bits, uint16."""
    if not is_tensor(values):
        return np.asarray(values)
    import torch

    host = values.detach().cpu()
    if host.dtype == torch.bfloat16:
        return host.contiguous().view(torch.int16).numpy().view(np.uint16)
    array: np.ndarray = host.numpy()
    return array


def like(rows: np.ndarray, ids: Any) -> Array:
    """`rows` as the kind of array, and on the device, that `ids` is."""
    if not is_tensor(ids):
        return rows
    import torch

    return to_device(rows, ids.device) if on_device(ids) else torch.from_numpy(rows)


def on_device(values: Any) -> bool:
    """Whether `values` is a tensor that is not in host memory."""
    return is_tensor(values) and values.device.type != "cpu"


def to_device(rows: np.ndarray, device: torch.device) -> torch.Tensor:
    """Rows uint8 as a tensor on a device, through pinned memory, in the order of its current stream."""
    from engram_client.gpu.carrier import carrier_of

    return carrier_of(device).send(rows)


def into_device(rows: np.ndarray, out: torch.Tensor, index: np.ndarray | None = None) -> None:
    """Copy rows uint8 [n, ...], or `rows[index]`, into a contiguous tensor on a device; see `to_device`."""
    from engram_client.gpu.carrier import carrier_of

    carrier_of(out.device).send_into(rows, out, index)


def writable_host_view(out: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """A caller's buffer as a numpy array to be filled; None where it is a tensor on a device.

    Raises BadRequest where it is not uint8, not C-contiguous, read-only or of another shape.
    """
    if type(out) is np.ndarray and out.shape == shape and out.dtype == np.uint8 and out.flags.carray:
        return out
    if is_tensor(out):
        given, dtype, contiguous = tuple(out.shape), str(out.dtype), bool(out.is_contiguous())
        _check_buffer(given, shape, dtype.removeprefix("torch."), contiguous)
        host: np.ndarray | None = out.detach().numpy() if out.device.type == "cpu" else None
        return host
    if not isinstance(out, np.ndarray):
        raise BadRequest(f"out must be a numpy array or a torch tensor, got {type(out).__name__}")
    _check_buffer(out.shape, shape, str(out.dtype), out.flags.c_contiguous and out.flags.writeable)
    return out


def address_of(array: np.ndarray) -> int:
    """Where a C-contiguous array's bytes lie; `array.ctypes.data` takes four times as long."""
    if array.size and array.flags.writeable:
        return ctypes.addressof(ctypes.c_char.from_buffer(array.data))
    return int(array.ctypes.data)


def _check_buffer(given: tuple[int, ...], shape: tuple[int, ...], dtype: str, contiguous: bool) -> None:
    if given != shape or dtype != "uint8" or not contiguous:
        raise BadRequest(
            f"out must be writable C-contiguous uint8 of shape {list(shape)}, got {dtype} of shape "
            f"{list(given)}" + ("" if contiguous else ", not contiguous or read-only")
        )
