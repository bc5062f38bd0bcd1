"""Hashing where the token ids are: `NgramHashMapping` on any device.

On CUDA one kernel makes all keys (`device_kernels.py`), where its trial says that it does; elsewhere, and
where Triton is missing, `hash_tokens` does the same in torch operations.

The same keys and row ids, bit for bit, as the compiled kernels give on the CPU. Products of ids and
multipliers stay below 2^63 (`check_scheme` holds schemes to it), so signed 64-bit arithmetic is
exact, and the remainder of a key, which is never negative, is that of unsigned numbers.

A shift may read an id if nothing between here and there ends the segment. With the ids of a chunk
behind those of its lookback in one line, each shift is a view of that line:

    line        | l l l | t t t t t t |      span = 3 ids of lookback, T = 6 tokens
    shift 0             | t t t t t t |
    shift 1           | l t t t t t |        readable: and not past a dead position or an EOS

No call here waits for the device, reads a value back, or has a shape that depends on values, so all
of it can be captured in a CUDA graph; fold and windows are tensors that stay where they are.

What cannot be done without waiting is to raise for an id outside the vocabulary. Each n-gram that
reads such an id gets the key -2 instead, and rows of -2, which every look-up refuses as IdOutOfRange.

Checked on CPU tensors, by Triton's interpreter, and on meta tensors, which hold no values to read; not yet
run on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_client.errors import BadRequest
from engram_client.gpu.probe import KernelGroup, made_current
from engram_client.hashing.inputs import Int64Array
from engram_client.spec import HashScheme

REFUSED = -2  # the key of an n-gram that reads an id outside the vocabulary
ID_DTYPES = (torch.int64, torch.int32)
BLOCK = 256  # positions of one program


def hash_tokens(
    tokens: Tensor,
    dead: Tensor | None,
    history: Tensor | None,
    fold: Tensor | None,
    limits: Sequence[int],
    multipliers: Sequence[int],
) -> Tensor:
    """N-gram keys int64 [B,T,n-1] of chunks of tokens; the twin of `kernels.hash_tokens`.

    tokens int64 [B,T]; dead bool [B,T]; history int64 [B,L], L >= n-1, raw ids before the chunk, -1
    for none; fold int64 [vocab] or None where raw ids are hashed; limits (raw vocabulary size, filler
    id as hashed, raw EOS or -1); multipliers [n].
    """
    vocab_size, filler, eos = limits
    span, length = len(multipliers) - 1, tokens.shape[1]
    before = tokens.new_full((len(tokens), span), -1) if history is None else history[:, -span:]
    line = torch.cat((before, tokens), dim=1)
    silent = torch.zeros_like(tokens, dtype=torch.bool) if dead is None else dead
    absent = torch.cat((before == -1, silent), dim=1)
    foreign = (line < 0) | (line >= vocab_size)
    ends = absent | (line == eos) if eos >= 0 else absent  # a foreign id may be -1, too
    ids = line.clamp(0, vocab_size - 1)
    hashed = ids if fold is None else fold.index_select(0, ids.reshape(-1)).reshape(ids.shape)
    readable = ~absent[:, span:]
    wrong = readable & foreign[:, span:]
    mixed = torch.where(readable, hashed[:, span:], filler) * multipliers[0]
    keys = []
    for back in range(1, span + 1):
        there = slice(span - back, span - back + length)
        readable = readable & ~ends[:, there]
        wrong = wrong | (readable & foreign[:, there])
        mixed = mixed ^ (torch.where(readable, hashed[:, there], filler) * multipliers[back])
        keys.append(torch.where(wrong, REFUSED, mixed))
    return torch.stack(keys, dim=-1)


def launch_hashing(
    tokens: Tensor,
    dead: Tensor | None,
    history: Tensor | None,
    fold: Tensor | None,
    rules: Tensor,
) -> Tensor:
    """`hash_tokens` by the kernel, for tokens int64 or int32; `rules` as `device_kernels` draws them."""
    from engram_client.hashing.device_kernels import hash_all

    orders, positions = len(rules) - 4, tokens.numel()
    keys = torch.empty((*tokens.shape, orders), dtype=torch.int64, device=tokens.device)
    if positions:
        tokens = tokens.contiguous()
        with made_current(tokens.device):
            hash_all[(-(-positions // BLOCK),)](
                *hash_inputs(tokens, dead, history, fold), rules, keys, positions, tokens.shape[1],
                HAS_DEAD=dead is not None, SPAN=0 if history is None else history.shape[1],
                HAS_FOLD=fold is not None, NGRAM=orders + 1, BLOCK=BLOCK,
            )  # fmt: skip
    return keys


def hash_inputs(
    tokens: Tensor, dead: Tensor | None, history: Tensor | None, fold: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As kernels take them: contiguous, and something where nothing is, which they do not read."""
    return (
        tokens,
        tokens if dead is None else dead.contiguous().view(torch.uint8),
        tokens if history is None else history,
        tokens if fold is None else fold,
    )


def _try_hashing(device: torch.device) -> None:
    """Two sequences with a fold, dead and foreign ids and a lookback, in both dtypes."""
    rules = torch.tensor([5, 1, 3, 3, 5, 7, 11], device=device)
    fold = torch.tensor([0, 1, 1, 2, 3], device=device)
    tokens = torch.tensor([[0, 1, 2, 3, 4, 0, 1], [4, 9, 2, 2, -1, 1, 0]], device=device)
    dead = tokens == 2
    history = torch.tensor([[-1, -1, 3], [0, -2, 1]], device=device)
    for ids in (tokens, tokens.int()):
        for mask, before, folded in ((None, None, None), (dead, history, fold)):
            limits, multipliers = rules[:3].tolist(), rules[3:].tolist()
            expected = hash_tokens(tokens, mask, before, folded, limits, multipliers)
            if not torch.equal(launch_hashing(ids, mask, before, folded, rules), expected):
                raise ValueError("the kernel gave other keys than torch operations do")


HASHING = KernelGroup(
    "hashing of token ids", "some fifty small operations a layer instead of one", _try_hashing
)


def rows_of_keys(keys: Tensor, sizes: Tensor, offsets: Tensor) -> Tensor:
    """Row ids int64 [..., orders*heads] of n-gram keys int64 [..., orders]; negative keys as they are.

    sizes and offsets int64 [orders,heads]. The twin of `kernels.rows_of_keys`.
    """
    each = keys.unsqueeze(-1)
    return torch.where(each < 0, each, each.clamp(min=0) % sizes + offsets).flatten(-2)


@dataclass(frozen=True)
class HashInputs:
    """Tokens [B,T] as they came, int64 or int32, dead bool [B,T], history int64 [B,L], and how to "
    "hash them."""

    tokens: Tensor
    dead: Tensor | None
    history: Tensor | None
    fold: Tensor | None
    rules: Tensor
    layer_id: int


class DeviceHashMapping:
    """An `NgramHashMapping` on a device; made by its `on_device`. Immutable.

    Takes and gives torch tensors of that device, and never waits for it.
    """

    def __init__(
        self,
        schemes: Mapping[int, HashScheme],
        limits: Mapping[int, Sequence[int]],
        fold: Int64Array,
        device: torch.device,
    ) -> None:
        self.device = device
        self.layer_ids = tuple(schemes)
        self.max_ngram_size = max(scheme.max_ngram_size for scheme in schemes.values())
        self._schemes, self._limits = schemes, limits
        self.raw_vocab_size = limits[self.layer_ids[0]][0]
        self._fold = torch.from_numpy(np.array(fold)).to(device) if fold.size else None
        self._rules = {
            layer: torch.tensor([*limits[layer], *map(int, scheme.multipliers)], device=device)
            for layer, scheme in schemes.items()
        }
        self._heads = {
            layer: (torch.tensor(s.head_sizes, device=device), torch.tensor(s.head_offsets, device=device))
            for layer, s in schemes.items()
        }

    def lookback(self, batch: int = 1) -> DeviceLookback:
        """Fresh decode state for `batch` sequences on the device; it serves all layers."""
        return DeviceLookback(batch, self.max_ngram_size - 1, self.raw_vocab_size, self.device)

    def ngram_keys(
        self,
        token_ids: Tensor,
        layer_id: int,
        dead: Tensor | None = None,
        *,
        lookback: DeviceLookback | None = None,
    ) -> Tensor:
        """N-gram keys int64 [B,T,orders] of token ids int64 or int32 [B,T]; [T] gives [T,orders].

        As `NgramHashMapping.ngram_keys`, but that an n-gram that reads an id outside the vocabulary
        gets the key -2. Raises BadRequest for another dtype, shape, device or layer.
        """
        hashed = self.inputs(token_ids, layer_id, dead, lookback=lookback)
        if HASHING.serves(self.device):
            keys = launch_hashing(hashed.tokens, hashed.dead, hashed.history, hashed.fold, hashed.rules)
        else:
            keys = self.hash_plainly(hashed)
        return keys if token_ids.ndim == 2 else keys.squeeze(0)

    def inputs(
        self,
        token_ids: Tensor,
        layer_id: int,
        dead: Tensor | None = None,
        *,
        lookback: DeviceLookback | None = None,
    ) -> HashInputs:
        """What `ngram_keys` is told, checked: for kernels that hash what they look up."""
        if layer_id not in self._schemes:
            raise BadRequest(f"no hash scheme for layer {layer_id}; there are {list(self.layer_ids)}")
        tokens = _as_tokens(token_ids, self.device)
        mask = None if dead is None else _as_dead(dead, token_ids)
        history = None if lookback is None else lookback.window_for(self, len(tokens))
        return HashInputs(tokens, mask, history, self._fold, self._rules[layer_id], layer_id)

    def multipliers(self, layer_id: int) -> tuple[int, ...]:
        """Of a layer's scheme. Raises BadRequest where there is no such layer."""
        if layer_id not in self._schemes:
            raise BadRequest(f"no hash scheme for layer {layer_id}; there are {list(self.layer_ids)}")
        return tuple(map(int, self._schemes[layer_id].multipliers))

    def hash_plainly(self, hashed: HashInputs) -> Tensor:
        """N-gram keys int64 [B,T,orders], in torch operations."""
        layer = hashed.layer_id
        limits, multipliers = self._limits[layer], self._schemes[layer].multipliers
        return hash_tokens(
            hashed.tokens.long(), hashed.dead, hashed.history, hashed.fold, limits, multipliers
        )

    def row_ids(
        self,
        token_ids: Tensor,
        layer_id: int,
        dead: Tensor | None = None,
        *,
        lookback: DeviceLookback | None = None,
    ) -> Tensor:
        """Row ids int64 [B,T,H], order-major, head offsets included; -2 where the key is."""
        keys = self.ngram_keys(token_ids, layer_id, dead, lookback=lookback)
        return rows_of_keys(keys, *self._heads[layer_id])


class DeviceLookback:
    """`Lookback` on a device: the last raw token ids of each of `batch` sequences, in a buffer that stays.

    ids: int64 [batch, span], newest last, -1 for none and -2 for an id outside the vocabulary;
         the buffer itself, whose address a captured graph may keep

    Made by `DeviceHashMapping.lookback`. Its methods change the buffer in place, in the order of the
    stream, and never wait for the device.
    """

    def __init__(self, batch: int, span: int, vocab_size: int, device: torch.device) -> None:
        if batch < 0:
            raise BadRequest(f"a lookback needs a batch of >= 0 sequences, got {batch}")
        with torch.inference_mode(False):  # a tensor of inference mode cannot be written outside of it
            self.ids = torch.full((batch, span), -1, dtype=torch.int64, device=device)
        self._vocab_size = vocab_size
        self._places = torch.arange(span, device=device)

    def advance(self, token_ids: Tensor, dead: Tensor | None = None, lengths: Tensor | None = None) -> None:
        """Step over `token_ids` [batch,T] (or [T] for a batch of one), `dead` bool of that shape.

        `lengths` int [batch] steps over only the first so many tokens of each sequence. A length
        outside 0..T makes all that the sequence looks back on -2, so its next keys are refused.
        """
        tokens = _as_tokens(token_ids, self.ids.device).long()
        self._check_batch(len(tokens))
        foreign = (tokens < 0) | (tokens >= self._vocab_size)
        marked = torch.where(foreign, REFUSED, tokens)
        if dead is not None:
            marked = torch.where(_as_dead(dead, token_ids), -1, marked)
        line, length = torch.cat((self.ids, marked), dim=1), tokens.shape[1]
        if lengths is None:
            self.ids.copy_(line[:, length:])
            return
        counts = _as_lengths(lengths, self.ids).unsqueeze(1)
        moved = line.gather(1, counts.clamp(0, length) + self._places)
        self.ids.copy_(torch.where((counts < 0) | (counts > length), REFUSED, moved))

    def select(self, indices: Tensor) -> None:
        """Reorder or repeat sequences: new sequence i is the old `indices[i]`, int [batch].

        An index that names no sequence makes all that the new one looks back on -2.
        """
        batch = len(self.ids)
        _check(indices, "indices", ID_DTYPES, (batch,), self.ids.device)
        if batch:
            chosen = self.ids.index_select(0, indices.clamp(0, batch - 1))
            self.ids.copy_(torch.where(((indices < 0) | (indices >= batch)).unsqueeze(1), REFUSED, chosen))

    def reset(self, fresh: Tensor) -> None:
        """Let the sequences start afresh where `fresh`, bool [batch], is true."""
        _check(fresh, "fresh", (torch.bool,), (len(self.ids),), self.ids.device)
        self.ids.masked_fill_(fresh.unsqueeze(1), -1)

    def window_for(self, mapping: DeviceHashMapping, batch: int) -> Tensor:
        """The state as `hash_tokens` reads it, checked to fit a mapping and its batch."""
        span, vocab_size = mapping.max_ngram_size - 1, mapping.raw_vocab_size
        if self.ids.shape[1] < span or self._vocab_size != vocab_size:
            raise BadRequest(
                f"the lookback holds {self.ids.shape[1]} tokens of a vocabulary of {self._vocab_size}, the "
                f"hash mapping needs {span} of {vocab_size}; make it with the mapping's own lookback()"
            )
        self._check_batch(batch)
        return self.ids

    def _check_batch(self, batch: int) -> None:
        if batch != len(self.ids):
            raise BadRequest(f"token_ids hold {batch} sequences, the lookback follows {len(self.ids)}")


def _check(
    values: Any, what: str, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], device: torch.device
) -> None:
    """Only what a tensor says of itself is looked at: its values are not here."""
    if not isinstance(values, Tensor):
        raise BadRequest(f"{what} must be a torch tensor on {device}, got {type(values).__name__}")
    if values.device != device or values.dtype not in dtypes or tuple(values.shape) != shape:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise BadRequest(
            f"{what} must be {wanted} of shape {list(shape)} on {device}, got "
            f"{str(values.dtype).removeprefix('torch.')} of shape {list(values.shape)} on {values.device}"
        )


def _as_tokens(token_ids: Any, device: torch.device) -> Tensor:
    """[B,T] or [T] as [B,T]."""
    shape = tuple(getattr(token_ids, "shape", ()))
    if isinstance(token_ids, Tensor) and len(shape) not in (1, 2):
        raise BadRequest(f"token_ids must be [B,T] or [T], got shape {list(shape)}")
    _check(token_ids, "token_ids", ID_DTYPES, shape, device)
    return token_ids if len(shape) == 2 else token_ids.unsqueeze(0)


def _as_dead(dead: Any, token_ids: Tensor) -> Tensor:
    """The mask of tokens that were checked before, as bool [B,T]."""
    _check(dead, "dead", (torch.bool,), tuple(token_ids.shape), token_ids.device)
    return dead if dead.ndim == 2 else dead.unsqueeze(0)


def _as_lengths(lengths: Any, ids: Tensor) -> Tensor:
    _check(lengths, "lengths", ID_DTYPES, (len(ids),), ids.device)
    return lengths.long()
