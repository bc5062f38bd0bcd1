"""A table of which each rank keeps a share; what `EngramEmbedding` and users see of it."""

from __future__ import annotations

import hashlib
import zlib
from concurrent.futures import Future
from typing import Any

import numpy as np
import torch

from engram_client.arrays import like, to_host
from engram_client.errors import BadRequest, NotFiniteGradient, StepConflict
from engram_client.hashing import NgramHashMapping
from engram_client.ids import check_row_ids
from engram_client.kernels.gradients import as_float32, distinct_ids, mark_not_finite, sum_by_row
from engram_client.table import DEFAULT_TIMEOUT_S
from engram_client.trained import TrainedTable, check_gradients
from engram_client.training.exchange import Exchange, Kind, attempt
from engram_client.transport.training import TrainedDescription


class ShardedTable:
    """Made by `ShardedTraining.table`. Row ids are those of the whole table. Calls are collective.

    For one thread a rank. A rank without rows to read or gradients to push calls with none.
    """

    collective = True
    updates_made = 0  # not counted: what is read anew must be the same on all ranks

    def __init__(
        self,
        share: TrainedTable,
        description: TrainedDescription,
        number: int,
        exchange: Exchange,
        *,
        average: bool,
    ) -> None:
        """`description` is of the whole table; `number` is its place among the training's."""
        assert description.partition is not None
        self.spec, self.description, self.partition = description.spec, description, description.partition
        self.rank, self.world = exchange.rank, exchange.world
        self._share, self._number, self._exchange = share, number, exchange
        self._scale = np.float32(1 / exchange.world if average else 1)

    def __repr__(self) -> str:
        return f"ShardedTable({self.spec.name!r}, rank={self.rank}, world={self.world})"

    @property
    def dim(self) -> int:
        """Elements of a row."""
        return self.spec.embedding_dim

    def mapping(self, compressed_map: Any = None) -> NgramHashMapping:
        """As `Table.mapping`: hashes to row ids of the whole table."""
        if self.spec.scheme is None:
            raise BadRequest(f"table {self.spec.name!r} has no hash scheme: its rows are named by row ids")
        return NgramHashMapping.from_scheme(self.spec.scheme, compressed_map)

    def dequantize(self, rows: Any, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        """As `Table.dequantize`."""
        return self._share.dequantize(rows, dtype=dtype)

    def lookup(self, row_ids: Any, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> Any:
        """Rows of row ids [...], int64 or int32 on the host: uint8 [..., row_bytes]; -1 gives zeros.

        Raises as `TrainedTable.lookup`, on all ranks.
        """
        return like(self.prefetch(row_ids, timeout=timeout).wait(), row_ids)

    def prefetch(self, row_ids: Any, *, timeout: float | None = DEFAULT_TIMEOUT_S) -> PendingExchange:
        """Start `lookup`; it waits its turn behind what was called before."""
        ids = np.array(to_host(row_ids))
        return PendingExchange(self._exchange.submit(lambda: self._fetch(ids, timeout)))

    def _fetch(self, ids: np.ndarray, timeout: float | None) -> np.ndarray:
        checked, error = attempt(lambda: self._checked(ids))
        distinct, inverse = distinct_ids(np.zeros(0, np.int64) if checked is None else checked)
        order, places = self._by_owner(distinct)
        asked, total = self._exchange.swap(Kind.ASK, places, table=self._number, error=error)
        size = self.spec.row_bytes
        out = np.zeros((distinct.size + 1, size), np.uint8)  # the last is for -1
        if total:
            answers, error = attempt(lambda: self._answers(asked, timeout))
            got, _ = self._exchange.swap(Kind.ROWS, answers, table=self._number, error=error)
            out[order] = np.concatenate(got).reshape(-1, size)
        return out[inverse].reshape(*ids.shape, size)

    def _checked(self, ids: np.ndarray) -> np.ndarray:
        """int64 [n]. Raises BadRequest, IdOutOfRange."""
        if ids.dtype not in (np.int64, np.int32):
            raise BadRequest(f"table {self.spec.name!r}: row ids must be int64 or int32, got {ids.dtype}")
        check_row_ids(ids, self.spec.rows, self.spec.name)
        return np.ascontiguousarray(ids.reshape(-1), np.int64)

    def _by_owner(self, ids: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
        """Which ids int64 [n] go to rank 0, 1, ... in turn, and their places in its store, as bytes, for
        each."""
        owners = self.partition.owners(ids)
        order = np.argsort(owners, kind="stable")
        places = np.split(self.partition.places(ids[order]), self._ends(owners))
        return order, [part.view(np.uint8) for part in places]

    def _ends(self, owners: np.ndarray) -> np.ndarray:
        return np.cumsum(np.bincount(owners, minlength=self.world))[:-1]

    def _answers(self, asked: list[np.ndarray], timeout: float | None) -> list[np.ndarray]:
        """Rows of this share for every rank, as bytes."""
        places = [part.view(np.int64) for part in asked]
        with self._exchange.timed("sharded_lookup_us"):
            rows = np.asarray(self._share.lookup(np.concatenate(places), timeout=timeout))
        return [part.reshape(-1) for part in np.split(rows, np.cumsum([p.size for p in places])[:-1])]

    def update(
        self,
        row_ids: Any,
        gradients: Any,
        *,
        step: int,
        learning_rate: float | None = None,
        weight_decay: float | None = None,
        timeout: float | None = DEFAULT_TIMEOUT_S,
    ) -> None:
        """As `TrainedTable.update`, with the gradients of all ranks; returns once all have applied theirs.

        All ranks give the same step, rate and decay. A gradient that is not finite is refused on all ranks,
        before any of them applies anything, or its row is skipped, as training.not_finite says on all of
        them. After DeadlineExceeded or StorageError the same call on all ranks goes on where it stopped.
        """

        def push() -> None:
            rates = {"learning_rate": learning_rate, "weight_decay": weight_decay}
            self._push(row_ids, gradients, step, rates, timeout)

        self._exchange.submit(push).result()

    def _push(
        self, row_ids: Any, gradients: Any, step: int, rates: dict[str, Any], timeout: float | None
    ) -> None:
        mine, error = attempt(lambda: self._sums(row_ids, gradients))
        place: Any = {"table": self._number, "step": step, "check": zlib.crc32(repr(rates).encode())}
        pushed, total = self._exchange.swap(Kind.PUSH, mine, error=error, **place)
        if not total:
            return
        made, error = attempt(lambda: self._put_together(pushed, step))
        self._exchange.swap(Kind.CHECKED, error=error, **place)
        assert made is not None
        _, error = attempt(lambda: self._apply(*made, step=step, timeout=timeout, **rates))
        self._exchange.swap(Kind.APPLIED, error=error, **place)
        self._exchange.half_done.pop(self._number, None)

    def _sums(self, row_ids: Any, gradients: Any) -> list[np.ndarray]:
        """For every rank: places int64 [n], then the summed gradients float32 [n, dim], as bytes."""
        ids, values = check_gradients(self.spec.name, self.dim, row_ids, gradients)
        check_row_ids(ids, self.spec.rows, self.spec.name)
        distinct, sums = sum_by_row(ids, values)
        sums = as_float32(sums)
        order, places = self._by_owner(distinct)
        owned = np.split(sums[order], self._ends(self.partition.owners(distinct)))
        return [np.concatenate([p, s.reshape(-1).view(np.uint8)]) for p, s in zip(places, owned, strict=True)]

    def _put_together(self, pushed: list[np.ndarray], step: int) -> tuple[np.ndarray, np.ndarray, bytes]:
        """Places int64 [d] of this share, their gradients float32 [d, dim], and a digest of both."""
        counts = [part.size // (8 + 4 * self.dim) for part in pushed]
        places = [part[: 8 * n].view(np.int64) for part, n in zip(pushed, counts, strict=True)]
        values = [
            np.ascontiguousarray(part[8 * n :]).view(np.float32)
            for part, n in zip(pushed, counts, strict=True)
        ]
        ids, sums = sum_by_row(np.concatenate(places), np.concatenate(values).reshape(-1, self.dim))
        sums = sums * self._scale
        marks = np.zeros(ids.size, np.bool_)
        if self.description.not_finite == "refuse" and mark_not_finite(sums, marks):
            row = self.partition.row_ids(ids[np.argmax(marks)])
            raise NotFiniteGradient(
                f"table {self.spec.name!r}: the gradient of row {row} is not finite ({marks.sum()} such "
                f"rows of {ids.size} in this share); nothing was applied; lower the loss scale or the "
                "learning rate, or set training.not_finite=skip on all ranks"
            )
        digest = hashlib.blake2b(step.to_bytes(8, "little", signed=True) + ids.tobytes() + sums.tobytes())
        if self._exchange.half_done.get(self._number, digest.digest()) != digest.digest():
            raise StepConflict(
                f"table {self.spec.name!r}: an update failed on some ranks and was applied on others; "
                "repeat it on all to go on, or roll back to a committed step"
            )
        return ids, sums, digest.digest()

    def _apply(self, ids: np.ndarray, sums: np.ndarray, digest: bytes, *, step: int, **options: Any) -> None:
        if self._number not in self._exchange.half_done:
            with self._exchange.timed("sharded_update_us"):
                self._share.update(ids, sums, step=step, **options)
            self._exchange.half_done[self._number] = digest


class PendingExchange:
    """Rows on their way; see `Handle`."""

    def __init__(self, future: Future[np.ndarray]) -> None:
        self._future = future

    def done(self) -> bool:
        return self._future.done()

    def wait(self, timeout: float | None = None) -> np.ndarray:
        """The rows uint8 [..., row_bytes], or what the look-up raised; may be called again.

        `timeout` is not looked at: one rank that gives up alone would leave the others waiting. The
        training's own bounds it.
        """
        return self._future.result()
