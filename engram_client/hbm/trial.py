"""The HBM tier's kernels beside their twins on a small index: what decides whether they serve on a device."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from engram_client.hbm import operations
from engram_client.hbm.index import Index
from engram_client.hbm.operations import COUNTERS, DECODED_TYPE, Decoding, Keys
from engram_client.hbm.replacement import Newcomers
from engram_client.spec import Field, RowLayout

ROWS, DIM, SETS, WIDTH = 2, 64, 2, 3
KEYS, BATCH = 48, 12  # few, as they are interpreted in tests
LAYOUT = RowLayout((Field("weight", "float8_e4m3fn", DIM), Field("scale", "float8_e8m0fnu", 2)), None)
RECORD_BYTES = ROWS * LAYOUT.row_bytes


@dataclass(frozen=True)
class _Side:
    """An index and its records, worked on by one of the two forms."""

    index: Index
    records: Tensor
    counters: Tensor
    kernels: bool

    @classmethod
    def empty(cls, device: torch.device, kernels: bool) -> _Side:
        unit = operations.unit_of(RECORD_BYTES)
        records = torch.zeros((SETS * 16 + 1, RECORD_BYTES // unit.itemsize), dtype=unit, device=device)
        counters = torch.zeros(len(COUNTERS), dtype=torch.int64, device=device)
        return cls(Index.empty(SETS, device), records, counters, kernels)

    def admit(self, keys: Tensor, owners: Tensor, records: Tensor, pinned: bool) -> None:
        new = Newcomers.of(keys, owners, records.view(self.records.dtype), SETS)
        operations.admit(self.index, self.records, new, self.counters, pinned=pinned, kernels=self.kernels)

    def look_up(self, keys: Tensor, decoding: Decoding | None) -> tuple[Tensor, Tensor]:
        found = torch.zeros(3 + 2 * len(keys), dtype=torch.int64, device=keys.device)
        shape = (len(keys), *self.records.shape[1:]) if decoding is None else (len(keys), ROWS, DIM)
        dtype = self.records.dtype if decoding is None else DECODED_TYPE
        out = torch.full(shape, 7, dtype=dtype, device=keys.device)
        form = operations.look_up if self.kernels else operations.look_up_plainly
        form(self.index, self.records, Keys(keys, 0, WIDTH), out, found, self.counters, decoding)
        return out, found


def try_kernels(device: torch.device) -> None:
    """Raises ValueError where a kernel does not what its twin does."""
    sides = [_Side.empty(device, kernels) for kernels in (False, True)]
    sequence = torch.arange(KEYS, device=device)
    keys = torch.where(sequence % 9 == 0, -1 - sequence % 2, sequence * 7919 % 40)
    owners = (sequence % WIDTH).short()
    names = keys * WIDTH + owners
    records = (names.unsqueeze(1) * 31 + torch.arange(RECORD_BYTES, device=device)).to(torch.uint8)
    records.view(KEYS, ROWS, -1)[:, :, DIM:].clamp_(min=64)  # Triton's interpreter is wrong below 2^-126
    for start in range(0, KEYS, BATCH):
        part = slice(start, start + BATCH)
        for side in sides:
            side.admit(keys[part], owners[part], records[part], pinned=start == BATCH)
        half = slice(0, KEYS // 2) if start else slice(KEYS // 2, None)
        _compare(*(side.look_up(keys[half], None) for side in sides))
    _compare(*(side.look_up(keys, Decoding(LAYOUT, ROWS)) for side in sides))
    plain, launched = sides
    _same("records", plain.records, launched.records)
    _same("counters", plain.counters, launched.counters)
    for field in fields(Index):
        wanted, got = (getattr(side.index, field.name)[:SETS] for side in sides)
        if field.name != "sequences":
            _same(field.name, wanted, got)
        elif (got % 2).any():  # they are the kernels' alone
            raise ValueError("a sequence was left odd")


def _compare(plain: tuple[Tensor, Tensor], launched: tuple[Tensor, Tensor]) -> None:
    bits = [out.view(torch.int16) if out.dtype == DECODED_TYPE else out for out, _ in (plain, launched)]
    if plain[0].dtype == DECODED_TYPE:  # one NaN is as good as another
        bits = [
            torch.where(out.isnan(), 1, view) for view, (out, _) in zip(bits, (plain, launched), strict=True)
        ]
    _same("rows", *bits)
    count = int(plain[1][0])
    _same("misses", plain[1][:1], launched[1][:1])
    lists = [found[1 : 1 + 2 * count].view(-1, 2) for _, found in (plain, launched)]
    _same("misses", *(each[each[:, 0].argsort()] for each in lists))


def _same(what: str, wanted: Tensor, got: Tensor) -> None:
    if not torch.equal(wanted, got):
        raise ValueError(f"the kernels gave other {what} than torch operations do")
