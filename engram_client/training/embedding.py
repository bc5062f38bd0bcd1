"""`EngramEmbedding`: rows of a trained table as a differentiable tensor.

A batch names the same rows again and again, so its *distinct* rows are read, once, into a leaf tensor
float32 [d, dim], and gathered from there. Backward sums the gradients of each distinct row, in the order of
the batch, and leaves them on the leaf as torch does with a parameter: so gradient scaling, clipping and
accumulation see nothing unusual, and `EngramOptimizer.step` finds what to push.

Rows of a batch are remembered until the optimizer steps. When activation checkpointing runs a forward again,
it gets the very leaf of the first time: the gradient arrives once, and the rows are those that were
computed with, also where another trainer has updated them meanwhile. A graph keeps its leaf alive; what was
read without one, by a forward under `no_grad`, is remembered for the last `REMEMBERED_MAX` batches.

Rows may be asked for ahead with `start`. Those among them that an optimizer step has changed meanwhile are
looked up once more, which finds them in DRAM: a trainer never computes with rows older than its own updates.
Where ranks train together a step changes rows that this rank does not know of, so all are looked up again.

A sharded table is read by all ranks together. So every forward takes part in an exchange, with nothing to ask
where its rows are remembered: ranks remember different things.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict, deque
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engram_client.arrays import to_host
from engram_client.errors import BadRequest
from engram_client.kernels.gradients import add_rows, distinct_ids
from engram_client.prefetch import Handle
from engram_client.table import DEFAULT_TIMEOUT_S
from engram_client.trained import TrainedTable
from engram_client.training.sharded_table import PendingExchange, ShardedTable

REMEMBERED_MAX = 64  # batches read without a graph
STEPS_KEPT = 4  # optimizer steps whose rows are known; who asks further ahead reads everything again
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


Reading = Handle | PendingExchange


class PendingRows:
    """Rows on their way; made by `EngramEmbedding.start`, for `EngramEmbedding.forward`."""

    def __init__(
        self,
        ids: np.ndarray,
        inverse: np.ndarray,
        shape: tuple[int, ...],
        handle: Reading | None,
        window: int,
        updates: int,
    ) -> None:
        self.ids, self.inverse, self.shape = ids, inverse, shape
        self.handle, self.window, self.updates = handle, window, updates
        self.key = hashlib.blake2b(ids.tobytes(), digest_size=16).digest()


class Gradients:
    """Leaves that have a gradient, and the rows they are of. What the optimizer pushes."""

    def __init__(self) -> None:
        self.leaves: list[Tensor] = []  # the optimizer's `params`: the same list, always
        self._ids: dict[int, np.ndarray] = {}

    def note(self, leaf: Tensor, ids: np.ndarray) -> None:
        if id(leaf) not in self._ids:
            self.leaves.append(leaf)
            self._ids[id(leaf)] = ids

    def take(self, dim: int) -> tuple[np.ndarray, Tensor]:
        """Row ids int64 [n] and gradients float32 [n, dim] of all, in the order they came."""
        told = [leaf for leaf in self.leaves if leaf.grad is not None]
        if not told:
            return np.zeros(0, np.int64), torch.zeros((0, dim))
        ids = np.concatenate([self._ids[id(leaf)] for leaf in told])
        return ids, torch.cat([_dense(leaf.grad) for leaf in told])

    def clear(self) -> None:
        for leaf in self.leaves:
            leaf.grad = None
        self.leaves.clear()
        self._ids.clear()


def _dense(gradient: Any) -> Tensor:
    host: Tensor = gradient.detach().cpu()
    return host


class EngramEmbedding(nn.Module):
    """Rows [..., dim] of a table in training, for row ids [...] (int64, int32; -1 gives zeros).

    `dtype` is that of the result, by default the table's; gradients are summed in float32. `concatenated`
    joins the last two axes: [..., H] gives [..., H * dim]. In eval mode nothing is remembered and nothing
    learns.
    `timeout` in seconds is for reading.
    """

    def __init__(
        self,
        table: TrainedTable | ShardedTable,
        *,
        dtype: torch.dtype | None = None,
        concatenated: bool = False,
        timeout: float | None = DEFAULT_TIMEOUT_S,
    ) -> None:
        super().__init__()
        self.table = table
        self.dtype = dtype or DTYPES[table.spec.layout.field("weight").dtype]
        self.concatenated, self.timeout = concatenated, timeout
        self.gradients = Gradients()
        self._window = 0  # how often the optimizer has stepped
        self._changed: deque[np.ndarray] = deque(maxlen=STEPS_KEPT)  # rows of the last steps
        self._leaves: weakref.WeakValueDictionary[bytes, Tensor] = weakref.WeakValueDictionary()
        self._without_graph: OrderedDict[bytes, Tensor] = OrderedDict()

    def extra_repr(self) -> str:
        return (
            f"{self.table.spec.name!r}, rows={self.table.spec.rows}, dim={self.table.dim}, dtype={self.dtype}"
        )

    @torch.compiler.disable
    def start(self, row_ids: Any) -> PendingRows:
        """Begin to read the rows of a batch; hand the result to `forward`. Raises Overloaded, and as
        look-ups."""
        pending = self._pending(row_ids)
        if self.table.collective or self._remembered(pending.key) is None:
            pending.handle = self.table.prefetch(pending.ids, timeout=self.timeout)
        return pending

    def _pending(self, row_ids: Any) -> PendingRows:
        """The distinct rows of a batch, not asked for yet."""
        ids = np.asarray(to_host(row_ids))
        if ids.dtype not in (np.int64, np.int32):
            raise BadRequest(f"row ids must be int64 or int32, got {ids.dtype}")
        distinct, inverse = distinct_ids(np.ascontiguousarray(ids.reshape(-1), np.int64))
        return PendingRows(distinct, inverse, ids.shape, None, self._window, self.table.updates_made)

    @torch.compiler.disable
    def forward(self, rows: Any, device: torch.device | None = None) -> Tensor:
        """Row ids [...], or what `start` gave for them, to rows [..., dim] on `device` (None: where the ids
        are)."""
        if device is None:
            device = rows.device if isinstance(rows, Tensor) else torch.device("cpu")
        pending = rows if isinstance(rows, PendingRows) else self._pending(rows)
        leaf = self._leaf(pending, device)
        out = _Gather.apply(leaf, torch.from_numpy(pending.inverse).to(device))
        shape = (*pending.shape, self.table.dim)
        if self.concatenated:
            shape = (*pending.shape[:-1], pending.shape[-1] * self.table.dim)
        return out.reshape(shape).to(self.dtype)

    def _remembered(self, key: bytes) -> Tensor | None:
        return self._leaves.get(key, self._without_graph.get(key))

    def _leaf(self, pending: PendingRows, device: torch.device) -> Tensor:
        """The distinct rows float32 [d, dim] as a leaf."""
        leaf = self._remembered(pending.key) if self.training else None
        if leaf is not None and leaf.device == device:
            if self.table.collective:  # ranks that do not remember their rows read now
                self._read(pending, pending.ids[:0])
            return leaf
        rows = self._read(pending, pending.ids)
        leaf = self.table.dequantize(torch.from_numpy(rows)).to(device=device, dtype=torch.float32)
        if not self.training:
            return leaf
        ids, gradients = pending.ids, self.gradients
        leaf = leaf.detach().requires_grad_()
        leaf.register_post_accumulate_grad_hook(lambda leaf: gradients.note(leaf, ids))
        self._leaves[pending.key] = leaf
        if not torch.is_grad_enabled():
            self._without_graph[pending.key] = leaf
            if len(self._without_graph) > REMEMBERED_MAX:
                self._without_graph.popitem(last=False)
        return leaf

    def _read(self, pending: PendingRows, ids: np.ndarray) -> np.ndarray:
        """Bytes of the rows asked for ahead, or else of `ids`, no older than this trainer's own updates."""
        handle, pending.handle = pending.handle, None
        if handle is not None:
            rows = np.asarray(handle.wait(timeout=self.timeout))
            steps = self._window - pending.window
            made = self.table.updates_made - pending.updates  # more than steps: by others in this process
            if steps == made == 0:
                return rows
            if (
                steps == made
                and steps <= len(self._changed)
                and self.table.world == 1
                and not self.table.collective
            ):
                changed = _common(ids, list(self._changed)[-steps:])
                if changed.size:
                    rows = np.require(rows, requirements="W")
                    rows[changed] = np.asarray(self.table.lookup(ids[changed], timeout=self.timeout))
                return rows
        return np.asarray(self.table.lookup(ids, timeout=self.timeout))

    def forget(self, changed: np.ndarray) -> None:
        """Rows `changed` int64 [n] have: read them anew from here on. The optimizer calls this when it has
        stepped."""
        self._window += 1
        self._changed.append(changed)
        self._leaves.clear()
        self._without_graph.clear()


def _common(ids: np.ndarray, others: list[np.ndarray]) -> np.ndarray:
    """Positions of those of distinct `ids` that occur in `others`, int64 all."""
    known = np.concatenate(others)
    _, places = distinct_ids(np.concatenate([known, ids]))  # numbered in order of first appearance
    return np.flatnonzero(places[known.size :] <= places[: known.size].max(initial=-1))


class _Gather(torch.autograd.Function):
    """rows[inverse], zeros for -1; backward sums in the order of the batch, in float32, on the CPU."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        ctx.rows = rows.shape
        if not rows.shape[0]:
            return rows.new_zeros((inverse.numel(), rows.shape[1]))
        out = rows[inverse.clamp(min=0)]
        return out.masked_fill_((inverse < 0).unsqueeze(-1), 0)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (inverse,) = ctx.saved_tensors
        (gradient,) = gradients
        sums = np.zeros(tuple(ctx.rows), np.float32)
        values = gradient.detach().to(device="cpu", dtype=torch.float32).contiguous()
        add_rows(values.numpy(), inverse.cpu().numpy(), sums)
        return torch.from_numpy(sums).to(gradient.device), None


class TrainedLookup:
    """Embeddings of an `EngramLayer` from a table in training: token ids are hashed to its rows."""

    def __init__(self, mapping: Any, embedding: EngramEmbedding, layer_id: int) -> None:
        self.mapping, self.embedding, self.layer_id = mapping, embedding, layer_id

    def start(self, token_ids: Any, dead: Any = None, *, lookback: Any = None) -> _PendingEmbeddings:
        """Hash token ids [B,T] and begin to read their rows; none at positions of `dead`, bool [B,T]."""
        row_ids = np.asarray(to_host(self.mapping.row_ids(token_ids, self.layer_id, dead, lookback=lookback)))
        if dead is not None:
            row_ids = np.where(np.asarray(to_host(dead))[..., None], np.int64(-1), row_ids)
        return _PendingEmbeddings(self.embedding, self.embedding.start(row_ids), dead)


class _PendingEmbeddings:
    """What an `EngramLayer` waits for."""

    def __init__(self, embedding: EngramEmbedding, pending: PendingRows, dead: Any) -> None:
        self.embedding, self.pending, self.dead = embedding, pending, dead

    def wait(self, *, timeout: float | None = None, device: torch.device | None = None) -> Tensor:
        """Embeddings [B,T,H,dim], differentiable."""
        embeddings: Tensor = self.embedding(self.pending, device)
        return embeddings
