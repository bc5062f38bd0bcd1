"""Look-ups, admissions and scattering: by kernels where they serve, else by torch operations alike.

Every operation has one signature and two forms. What the forms have in common is told here: which arguments
a kernel takes, and how records are copied or decoded. `KERNELS` tries all three kernels at once, on a small
index.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engram_client.dequantize import dequantize
from engram_client.gpu.probe import KernelGroup
from engram_client.hashing.device import HashInputs, hash_inputs
from engram_client.hbm.index import Index
from engram_client.hbm.replacement import Newcomers, admissions_of, admit_plainly
from engram_client.spec import Field, RowLayout

ASKED, MISSES, MASKED, ADMITTED = range(4)
COUNTERS = ("asked", "misses", "masked", "admitted", "evicted", "left_out")
UNITS = (torch.int64, torch.int32, torch.int16)
DECODED_TYPE = torch.bfloat16
REGISTER_BYTES = 8 << 10  # of records that one program of four warps holds: 64 bytes a thread
WARPS = 4


def unit_of(record_bytes: int) -> torch.dtype:
    """The widest integer that divides a record."""
    return next((unit for unit in UNITS if record_bytes % unit.itemsize == 0), torch.uint8)


def power_of_two(number: int) -> int:
    """The least one that is not below."""
    return 1 << (number - 1).bit_length()


@dataclass(frozen=True)
class Copying:
    """How records of one size are copied: words of `unit`, and how many a program takes at once."""

    record_bytes: int

    @property
    def unit(self) -> torch.dtype:
        return unit_of(self.record_bytes)

    @property
    def constants(self) -> dict[str, Any]:
        words = self.record_bytes // self.unit.itemsize
        head = power_of_two(words + 1) // 2
        tail = power_of_two(words - head) if words > head else 0
        records = max(1, min(16, REGISTER_BYTES // (head * self.unit.itemsize)))
        return {"RECORDS": records, "WORDS": words, "HEAD": head, "TAIL": tail}


@dataclass(frozen=True)
class Decoding:
    """How the rows of a table become BF16 on their way. Made by `decoding_of`."""

    layout: RowLayout
    rows: int  # of a record

    @property
    def constants(self) -> dict[str, Any]:
        weight, scale = self.layout.field("weight"), _scale(self.layout)
        blocks = 1 if scale is None else scale.count
        return {
            "DECODED": True, "ROWS": self.rows, "ROWS_2": power_of_two(self.rows),
            "ROW_BYTES": self.layout.row_bytes, "WEIGHT_AT": self.layout.offset_bytes("weight"),
            "DIM": weight.count, "BLOCKS": blocks, "BLOCK": power_of_two(weight.count // blocks),
            "SCALE_AT": 0 if scale is None else self.layout.offset_bytes("scale"),
            "HAS_GLOBAL": self.layout.global_scale is not None,
        }  # fmt: skip

    @property
    def global_scale(self) -> float:
        return 1.0 if self.layout.global_scale is None else self.layout.global_scale


NOT_DECODED: dict[str, Any] = {
    "DECODED": False, "ROWS": 1, "ROWS_2": 1, "ROW_BYTES": 1, "WEIGHT_AT": 0, "DIM": 1, "BLOCKS": 1,
    "BLOCK": 1, "SCALE_AT": 0, "HAS_GLOBAL": False,
}  # fmt: skip


def _scale(layout: RowLayout) -> Field | None:
    return next((field for field in layout.fields if field.name == "scale"), None)


def decoding_of(layout: RowLayout, rows: int) -> Decoding | None:
    """How a kernel decodes such rows; None where it cannot, and `dequantize` has to."""
    weight = next((field for field in layout.fields if field.name == "weight"), None)
    scale = _scale(layout)
    if weight is None or weight.dtype != "float8_e4m3fn":
        return None
    if scale is not None:
        block, rest = divmod(weight.count, scale.count)
        plain = layout.offset_bytes("scale") > 0 and not rest
        powers = power_of_two(scale.count) == scale.count and power_of_two(block) == block
        if scale.dtype != "float8_e8m0fnu" or not plain or not powers:
            return None
    return Decoding(layout, rows)


@dataclass(frozen=True)
class Keys:
    """What a look-up asks for: record i is that of keys[i] and owner first_owner + i % width.

    keys int64 [n], contiguous; where they are `hashed` by the look-up, it writes them there.
    """

    keys: Tensor
    first_owner: int
    width: int
    hashed: HashInputs | None = None

    def owners(self) -> Tensor:
        count = torch.arange(len(self.keys), device=self.keys.device)
        return (count % self.width + self.first_owner).short()


def look_up(
    index: Index, records: Tensor, asked: Keys, out: Tensor, found: Tensor, counters: Tensor,
    decoding: Decoding | None, *, checked: bool = True,
) -> None:  # fmt: skip
    """Launch the kernel. records [slots, words], out as long, or bfloat16 [n, rows, dim] where decoded."""
    from engram_client.hbm.kernels import look_up as kernel

    copying = Copying(records.shape[1] * records.itemsize).constants
    hashed, n = asked.hashed, len(asked.keys)
    tokens = (asked.keys,) * 5 if hashed is None else _hashing_of(hashed)
    if decoding is not None:
        copying["RECORDS"] = max(1, copying["RECORDS"] // 2)  # a decoded tile takes twice the registers
    kernel[(-(-n // copying["RECORDS"]),)](
        asked.keys, *tokens, index.keys, index.owners, index.touched, index.sequences,
        records, records.view(torch.uint8), out, found, counters,
        1.0 if decoding is None else decoding.global_scale, asked.first_owner, index.sets, n,
        1 if hashed is None else hashed.tokens.shape[1],
        WIDTH=asked.width, CHECKED=checked, HASHED=hashed is not None,
        HAS_DEAD=hashed is not None and hashed.dead is not None,
        SPAN=0 if hashed is None or hashed.history is None else hashed.history.shape[1],
        HAS_FOLD=hashed is not None and hashed.fold is not None,
        **copying, **(NOT_DECODED if decoding is None else decoding.constants), num_warps=WARPS,
    )  # fmt: skip


def _hashing_of(hashed: HashInputs) -> tuple[Tensor, ...]:
    tokens = hashed.tokens.contiguous()
    return (*hash_inputs(tokens, hashed.dead, hashed.history, hashed.fold), hashed.rules)


def look_up_plainly(
    index: Index, records: Tensor, asked: Keys, out: Tensor, found: Tensor, counters: Tensor,
    decoding: Decoding | None,
) -> None:  # fmt: skip
    """The twin of the kernel for keys that are hashed already; it lists what is missing in "
    "ascending order."""
    keys = asked.keys
    slots, here = index.find(keys, asked.owners())
    rows = records.index_select(0, slots)
    zeros = torch.zeros((), dtype=records.dtype, device=records.device)
    write_records(torch.where(here.unsqueeze(1), rows, zeros), out, None, decoding, ~here)
    touched = index.touched.view(-1)
    touched.index_copy_(0, slots, torch.ones_like(slots, dtype=torch.uint8))
    missing = ~here & (keys != -1)
    count = missing.sum()
    place = torch.where(missing, missing.cumsum(0) - 1, len(keys))  # the last pair takes what is not missing
    pairs = torch.stack((torch.arange(len(keys), device=keys.device), keys), 1)
    found[1:].view(-1, 2).index_copy_(0, place, pairs)
    found[0] += count
    masked = (keys == -1).sum()
    counters[:3] += torch.stack((torch.full_like(count, len(keys)), count, masked))


def write_records(
    rows: Tensor, out: Tensor, places: Tensor | None, decoding: Decoding | None, absent: Tensor | None = None
) -> None:
    """Records [m, words] to `out`, all of it or at places int64 [m]; decoded, zeros where they are absent."""
    if decoding is not None:
        data = rows.view(torch.uint8).view(len(rows), decoding.rows, -1)
        rows = dequantize(decoding.layout, data, dtype=DECODED_TYPE)
        if absent is not None:
            rows = rows.masked_fill(absent.view(-1, 1, 1), 0)
    rows = rows.view(out.dtype).view(len(rows), *out.shape[1:])
    if places is None:
        out.copy_(rows)
    else:
        out.index_copy_(0, places, rows)


def scatter(
    source: Tensor, lines: Tensor, out: Tensor, places: Tensor, decoding: Decoding | None, kernels: bool
) -> None:
    """Record lines[i] of the source [l, words] to out[places[i]]; both int64 [m]."""
    if not kernels:
        write_records(source.index_select(0, lines), out, places, decoding)
        return
    from engram_client.hbm.kernels import scatter as kernel

    copying = Copying(source.shape[1] * source.itemsize).constants
    if decoding is not None:
        copying["RECORDS"] = max(1, copying["RECORDS"] // 2)
    kernel[(-(-len(lines) // copying["RECORDS"]),)](
        source, source.view(torch.uint8), lines, out, places,
        1.0 if decoding is None else decoding.global_scale, len(lines),
        **copying, **(NOT_DECODED if decoding is None else decoding.constants), num_warps=WARPS,
    )  # fmt: skip


def admit(
    index: Index, records: Tensor, new: Newcomers, counters: Tensor, *, pinned: bool, kernels: bool
) -> None:
    """Take newcomers in; counts them behind counters[ADMITTED]."""
    if not kernels:
        admit_plainly(index, records, new, counters[ADMITTED:], pinned)
        return
    from engram_client.hbm.admission import admit as kernel

    copying = Copying(records.shape[1] * records.itemsize).constants
    kernel[(len(new.lines),)](
        new.lines, new.order, new.keys, new.owners, new.records,
        index.keys, index.owners, index.states, index.touched, index.ghosts, index.hands, index.sequences,
        records, counters[ADMITTED:], index.sets, len(new.lines),
        **{name: copying[name] for name in ("WORDS", "HEAD", "TAIL")},
        PER_SET=admissions_of(pinned), PINS=pinned, num_warps=WARPS,
    )  # fmt: skip


def _try_kernels(device: torch.device) -> None:
    from engram_client.hbm.trial import try_kernels

    try_kernels(device)


KERNELS = KernelGroup(
    "the HBM tier",
    "several passes over memory a look-up instead of one, admissions that make the host wait, no "
    "captured graphs",
    _try_kernels,
)
