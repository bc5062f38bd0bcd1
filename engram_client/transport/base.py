"""The one small interface between the public client and wherever the rows are.

A transport moves one `LookupRequest` and fills the caller's buffer; it does not validate ids,
split requests for the caller, or know about tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from engram_client.spec import TableSpec
from engram_client.transport.landing import Landing
from engram_client.transport.training import TrainingTransport

if TYPE_CHECKING:
    from engram_client.transport.attachment import View

RESIZE_TIMEOUT_S = 600.0  # of a budget that changes: records are copied at some GB/s


@dataclass(frozen=True)
class LookupRequest:
    """Rows wanted from one generation of one table.

    `ids` is C-contiguous int64: n-gram keys [n, orders] for address "ngram", row ids [n] for
    address "row"; -1 asks for no row. `heads` is a half-open range and only goes with "ngram".
    """

    table: str
    generation: str
    address: Literal["ngram", "row"]
    ids: np.ndarray
    heads: tuple[int, int] | None = None


class PendingRows(Protocol):
    """A look-up that somebody else works on."""

    def done(self) -> bool:
        """Whether `result` would return or raise at once."""

    def result(self, timeout_s: float | None) -> np.ndarray:
        """The rows, uint8 of any shape, an array of their own; may be called again.

        Raises TimeoutError where they are not there in time (and may be waited for again), Cancelled
        once it was cancelled or its client closed, and what `lookup` raises.
        """

    def cancel(self) -> bool:
        """Give the rows up and free their memory; idempotent, from anywhere at any time."""


class Filling(Protocol):
    """A look-up that somebody else works on, into a place of a staging ring."""

    def done(self) -> bool:
        """Whether `wait` would not wait: the rows landed, failed, or are to be looked up anew."""

    def wait(self, timeout_s: float | None) -> None:
        """Return once the rows are there and stamped; may be called again.

        Raises TimeoutError where they are not in time (and may be waited for again), Cancelled, and what
        `lookup` raises; then they will never be stamped.
        """

    def give_up(self) -> bool:
        """Have nothing more written there; False while something is. From anywhere at any time, and again."""


HitPath = Callable[[np.ndarray, np.ndarray | None], np.ndarray | None]


class Transport(Protocol):
    """Where rows come from. Thread safe; every error is an engram_client.errors class."""

    def list_tables(self) -> dict[str, TableSpec]:
        """Every table served, by name."""

    def describe_table(self, name: str) -> TableSpec:
        """One table. Raises UnknownTable."""

    def lookup(self, request: LookupRequest, out: np.ndarray, timeout_s: float | None) -> None:
        """Fill `out`, uint8 C-contiguous [n, orders, heads * row_bytes] or [n, row_bytes].

        Either all of `out` is right when this returns, or an error is raised and its content is
        undefined.
        """

    def fetch(self, request: LookupRequest, entry_bytes: int, timeout_s: float | None) -> np.ndarray:
        """As `lookup`, into memory that the transport has anyway or takes: uint8 [n, entry_bytes].

        `entry_bytes` are those that the rows of one id, or one line of n-gram keys, come to.
        """

    def hit_path(self, spec: TableSpec, heads: tuple[int, int] | None = None) -> HitPath | None:
        """A shorter way than `lookup` to whole records, or these heads of them, where there is one.

        Called with n-gram keys and None, or a buffer for the rows, it returns rows uint8
        [..., H, row_bytes], or None for whatever it cannot answer whole.
        """

    def shared_view(self, spec: TableSpec, heads: tuple[int, int] | None = None) -> View | None:
        """The service's own memory with the cached records, where this process may read it; else None.

        One object as long as nothing changes: who keeps another one reads memory that records left.
        """

    def start_lookup(
        self, request: LookupRequest, entry_bytes: int, timeout_s: float | None
    ) -> PendingRows | None:
        """Begin a look-up that needs no thread of this process; None where there is no such way now.

        Takes microseconds. `request.ids` must not change meanwhile.
        """

    def prepare_filling(self) -> None:
        """Have all that `start_filling` needs at hand, so that the first one is as quick as the others."""

    def start_filling(
        self, request: LookupRequest, landing: Landing, timeout_s: float | None
    ) -> Filling | None:
        """Begin a look-up into staging memory as `start_lookup`; None where there is no such way now.

        The completion word is "not there" already. `request.ids` must not change meanwhile.
        """

    def prefetch(self, request: LookupRequest) -> bool:
        """Hint that these rows are wanted soon; False where the hint was dropped."""

    def stats(self) -> dict[str, int]:
        """The service's counters."""

    def set_dram_budget(self, budget_bytes: int) -> int:
        """Change the service's DRAM budget while it serves; returns the budget in force, in bytes."""

    def set_hbm_budget(self, budget_bytes: int) -> int:
        """As `set_dram_budget`, for the service's own arena in device memory; 0 for none."""

    def set_training_budget(self, budget_bytes: int, timeout_s: float | None) -> int:
        """As `set_dram_budget`, for rows in training; dirty ones are written back first."""

    def training(self) -> TrainingTransport:
        """Where updates of tables in training go. Raises FormatError, StoreLocked, BadRequest."""

    def close(self) -> None:
        """Release connections; waiting calls raise Cancelled or Unavailable."""


@runtime_checkable
class FillsDevices(Protocol):
    """What a transport may be able to do besides: records in bulk, from the disk to a device."""

    def fill_device(
        self, spec: TableSpec, entries: np.ndarray, orders: np.ndarray, out: Any, timeout_s: float | None
    ) -> str:
        """Record `entries[i]`, a key of order `orders[i]` or a row id, becomes `out[i]`.

        int64 [n] both; out uint8 [n, record_bytes], a contiguous torch tensor. Nothing is cached on the way.
        Returns the way that was taken, in a word; raises what `lookup` raises, and then `out` is undefined.
        """
