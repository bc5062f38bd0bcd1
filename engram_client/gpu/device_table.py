"""A table's rows for ids on a device: read over the bus by the device itself, or staged by the CPU.

    near = DeviceTable(client.table("deepseek-v4.1.layer1"), "cuda", entries_max=3 * 8192)
    layer = EngramLayer(engram, EngramLookup(mapping.on_device("cuda"), near, layer_id=1))

The device's own way spares the host's wait for the ids, its copy of the rows and one of two trips through
host memory; but what it misses costs a second round, and a large batch of misses is read ahead better by the
service. `bus_entries_max` sets up to how many keys a look-up goes that way. The default is every size that
was asked for: the section `bus` of `tierbench gpu` measures both ways at decode and prefill sizes, and no
record of a GPU exists yet that says otherwise (docs/decisions/0023-*).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from engram_client.errors import BadRequest
from engram_client.gpu.bus import BusReader
from engram_client.gpu.carrier import carrier_of
from engram_client.table import DEFAULT_TIMEOUT_S, Table


class DeviceTable:
    """A record-addressed table for one device. Belongs to one thread and one stream at a time.

    spec: the table's
    """

    def __init__(
        self,
        table: Table,
        device: torch.device | str,
        *,
        entries_max: int,
        bus_entries_max: int | None = None,
    ) -> None:
        """Look-ups of up to `entries_max` n-gram keys may go over the bus, of `bus_entries_max` do.

        0 means that none does. Raises BadRequest.
        """
        if table.spec.addressing != "record":
            raise BadRequest(f"table {table.spec.name!r} is addressed by rows: use BusReader for its row ids")
        self.spec = table.spec
        self._table = table
        self._reader = BusReader(table, device, entries_max=entries_max)
        self.device = self._reader.device
        self.bus_entries_max = entries_max if bus_entries_max is None else bus_entries_max

    def goes_over_the_bus(self, keys: int) -> bool:
        """Whether a look-up of so many keys is read by the device itself, as things are."""
        fits = 0 < keys <= min(self.bus_entries_max, self._reader.entries_max)
        return fits and self._reader.refresh()

    def lookup_ngrams(self, ngram_keys: Any, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> Tensor:
        """Rows of n-gram keys int64 [..., orders]: uint8 [..., H, row_bytes] on the device."""
        return self.prefetch_ngrams(ngram_keys, timeout=timeout).wait()

    def lookup_ngrams_into(
        self, ngram_keys: Any, out: Tensor, *, timeout: float | None = DEFAULT_TIMEOUT_S
    ) -> None:
        """As `lookup_ngrams`, into a contiguous uint8 buffer on the device; undefined if it raises."""
        keys = self._keys(ngram_keys)
        if self.goes_over_the_bus(keys.numel()):
            self._reader.lookup_into(keys, out, timeout=timeout)
        else:
            self._table.lookup_ngrams_into(keys, out, timeout=timeout)

    def prefetch_ngrams(self, ngram_keys: Any, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> Any:
        """Start `lookup_ngrams`; the handle's `wait` gives its rows.

        A read over the bus that is waited for only after the next one has begun is looked up anew.
        """
        keys = self._keys(ngram_keys)
        if not self.goes_over_the_bus(keys.numel()):
            return self._table.prefetch_ngrams(keys, timeout=timeout)
        scheme = self.spec.scheme
        assert scheme is not None, "a record-addressed table has one"
        shape = (*keys.shape[:-1], scheme.orders * scheme.heads, self.spec.row_bytes)
        out = carrier_of(self.device).empty(shape)
        self._reader.read(keys, out)
        return _Read(self._reader, self._table, keys, out, timeout)

    def dequantize(self, rows: Any, *, dtype: torch.dtype | None = None, index: Any = None) -> Tensor:
        """Rows uint8 [..., row_bytes] as a tensor [..., embedding_dim], where the rows are."""
        return self._table.dequantize(rows, dtype=dtype, index=index)

    def _keys(self, ngram_keys: Any) -> Tensor:
        keys = torch.as_tensor(ngram_keys, device=self.device)
        orders = self.spec.scheme.orders if self.spec.scheme else 1
        if keys.dtype not in (torch.int64, torch.int32) or keys.shape[-1:] != (orders,):
            raise BadRequest(
                f"ngram_keys must be int64 or int32 [..., {orders}], got {keys.dtype} {list(keys.shape)}"
            )
        return keys.long().contiguous()


class _Read:
    """A read over the bus that has been started."""

    def __init__(
        self, reader: BusReader, table: Table, keys: Tensor, out: Tensor, timeout_s: float | None
    ) -> None:
        self._reader, self._table, self._keys, self._out = reader, table, keys, out
        self._timeout_s, self._number = timeout_s, reader.reads
        self._filled = False

    def done(self) -> bool:
        return self._filled

    def wait(self, timeout: float | None = None) -> Tensor:
        """The rows; waits for the device, and for the service where something is missing."""
        if not self._filled:
            timeout_s = self._timeout_s if timeout is None else timeout
            if self._reader.reads == self._number:
                self._reader.fill(self._out, self._reader.missed(), timeout=timeout_s)
            else:  # what it missed is not known any more
                self._table.lookup_ngrams_into(self._keys, self._out, timeout=timeout_s)
            self._filled = True
        return self._out

    def cancel(self) -> None:
        """Nothing is on its way but what the device was given."""
