"""Whether a device is there, and whether kernels of ours do on it what they are for.

Triton compiles at a kernel's first launch, with a C compiler and an assembler that a machine may not have,
and what it compiles can be wrong. Neither may be found out by a caller. So kernels come in *groups*, each
with a trial: its kernels run once, on a tiny input, on the very device, beside their twins in torch
operations. If the trial raises or the results differ, the group never serves on that device in this process,
the log says so once, with what it costs, and the twins serve.

    HASHING = KernelGroup("hashing on the device", "some ten small operations instead of one kernel", _trial)

    if HASHING.serves(tokens.device):
        ...launch...
    else:
        ...torch operations...

On CPU tensors a group serves only under Triton's interpreter (TRITON_INTERPRET=1), which is for tests.
A trial waits for the device, which must not happen while a graph is captured: a group that has not been tried
by then leaves the graph to its twin and says so. Whoever captures runs the call once before, as one does.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from engram_client.errors import BadRequest

log = logging.getLogger(__name__)


def as_device(device: torch.device | str, what: str = "device") -> torch.device:
    """A device that torch can use here, with its index. Raises BadRequest, with what torch said."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        said = str(error).strip().partition("\n")[0]
        raise BadRequest(f'{what} {device} cannot be used: {said}; name another, such as "cpu"') from error


def out_of_memory(error: BaseException) -> bool:
    """Whether torch had no memory for what was asked of it, on a GPU or on the host."""
    said = str(error)  # the driver's words are others than torch's, where a kernel or a stream is made
    known = "out of memory" in said or "can't allocate memory" in said
    return isinstance(error, torch.cuda.OutOfMemoryError) or (isinstance(error, RuntimeError) and known)


def made_current(device: torch.device) -> AbstractContextManager[object]:
    """While it holds, kernels are launched on `device`: Triton asks torch which one is current."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def capturing(device: torch.device) -> bool:
    """Whether the current stream of `device` is being captured into a CUDA graph."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def interpreted() -> bool:
    """Whether Triton's kernels are interpreted, on any tensors, rather than compiled."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def triton_missing(device: torch.device) -> str | None:
    """Why no Triton kernel can be launched on `device`, in words; None where one can be tried."""
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"tensors on {device.type} are not for Triton"
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'tierstore[gpu]')"
    if device.type == "cuda" and torch.version.hip is None and _capability(device) < (7, 0):
        return f"{torch.cuda.get_device_name(device)} is older than what Triton compiles for"
    return None


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


class KernelGroup:
    """Kernels that serve together or not at all. Thread safe.

    name:  what they do, as the log says it
    cost:  what it costs where they do not serve
    trial: runs them on a device that it is given, on a tiny input, and raises where they do not do the same
           as their twins; it imports them, so that nothing else has to
    """

    def __init__(self, name: str, cost: str, trial: Callable[[torch.device], None]) -> None:
        self.name, self.cost = name, cost
        self._trial = trial
        self._served: dict[torch.device, bool] = {}
        self._trying = threading.RLock()  # a trial may ask of another group, or its own
        self._said_captured = False

    def serves(self, device: torch.device) -> bool:
        """Whether they can be launched on `device`; the first call there tries them, and waits for that."""
        served = self._served.get(device)
        if served is not None:
            return served
        if capturing(device):
            if not self._said_captured:
                self._said_captured = True
                log.warning(
                    "%s was never called before this capture, so the graph gets plain torch operations: %s; "
                    "call it once before capturing",
                    self.name, self.cost,
                )  # fmt: skip
            return False
        with self._trying:
            if device not in self._served:
                self._served[device] = self._tried(device)
            return self._served[device]

    def _tried(self, device: torch.device) -> bool:
        missing = triton_missing(device)
        if missing is None:
            try:
                with torch.inference_mode(False), torch.no_grad(), made_current(device):
                    self._trial(device)
                return True
            except Exception as error:  # whatever a compiler, a driver or a comparison says
                said = str(error).strip().partition("\n")[0]
                missing = f"{type(error).__name__}: {said}"
        if device.type == "cuda":  # elsewhere nobody expects kernels
            log.warning(
                "%s on %s is done by plain torch operations, not by its kernels (%s): %s",
                self.name, device, missing, self.cost,
            )  # fmt: skip
        return False
