"""Triton: loads of memory that somebody outside of the device writes at the same time.

The loads that the compiler would choose may come out of the first-level cache, and its volatile loads are
not joined: two neighbours in one thread ask for one sector of the bus twice. So these are PTX: relaxed or
acquire, at system scope. Triton's interpreter, which has one thread and no PTX, loads plainly.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def acquire_at(address, INTERPRETED: tl.constexpr):
    """int64 at an address, before everything that this thread loads later."""
    if INTERPRETED:
        return tl.load(address.to(tl.pointer_type(tl.int64)))
    else:
        return tl.inline_asm_elementwise(
            "ld.acquire.sys.global.b64 $0, [$1];", "=l,l", [address], dtype=tl.int64, is_pure=False, pack=1
        )


@triton.jit
def again_at(address, INTERPRETED: tl.constexpr):
    """int64 at an address, as it is in memory now."""
    if INTERPRETED:
        return tl.load(address.to(tl.pointer_type(tl.int64)))
    else:
        return tl.inline_asm_elementwise(
            "ld.relaxed.sys.global.b64 $0, [$1];", "=l,l", [address], dtype=tl.int64, is_pure=False, pack=1
        )


@triton.jit
def fence(value, INTERPRETED: tl.constexpr):
    """`value`, once all that this thread has loaded is loaded; later loads come after it."""
    if INTERPRETED:
        return value
    else:
        return tl.inline_asm_elementwise(
            "fence.acq_rel.sys; mov.b64 $0, $1;", "=l,l", [value], dtype=tl.int64, is_pure=False, pack=1
        )


@triton.jit
def words_at(address, wanted, INTERPRETED: tl.constexpr):
    """int64 at each wanted address, 0 elsewhere."""
    if INTERPRETED:
        return tl.load(address.to(tl.pointer_type(tl.int64)), mask=wanted, other=0)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b64 $0, 0; @p ld.relaxed.sys.global.b64 $0, [$1]; }",
            "=&l,l,r", [address, wanted.to(tl.int32)], dtype=tl.int64, is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def ints_at(address, wanted, INTERPRETED: tl.constexpr):
    """uint32 at each wanted address as int64, 0 elsewhere."""
    if INTERPRETED:
        return tl.load(address.to(tl.pointer_type(tl.uint32)), mask=wanted, other=0).to(tl.int64)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0; @p ld.relaxed.sys.global.u32 $0, [$1]; }",
            "=&r,l,r", [address, wanted.to(tl.int32)], dtype=tl.uint32, is_pure=False, pack=1,
        ).to(tl.int64)  # fmt: skip


@triton.jit
def halves_at(address, wanted, INTERPRETED: tl.constexpr):
    """uint16 at each wanted address as int64, 0 elsewhere."""
    if INTERPRETED:
        return tl.load(address.to(tl.pointer_type(tl.uint16)), mask=wanted, other=0).to(tl.int64)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0; @p ld.relaxed.sys.global.u16 $0, [$1]; }",
            "=&r,l,r", [address, wanted.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        ).to(tl.int64)  # fmt: skip


@triton.jit
def bytes_at(address, wanted, INTERPRETED: tl.constexpr):
    """uint8 at each wanted address as int64, 0 elsewhere."""
    if INTERPRETED:
        return tl.load(address.to(tl.pointer_type(tl.uint8)), mask=wanted, other=0).to(tl.int64)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $2, 0; mov.b32 $0, 0; @p ld.relaxed.sys.global.u8 $0, [$1]; }",
            "=&r,l,r", [address, wanted.to(tl.int32)], dtype=tl.int32, is_pure=False, pack=1,
        ).to(tl.int64)  # fmt: skip


@triton.jit
def pairs_at(address, wanted, INTERPRETED: tl.constexpr):
    """Two int64 at each wanted address, a multiple of 16; zeros elsewhere."""
    if INTERPRETED:
        first = address.to(tl.pointer_type(tl.int64))
        return tl.load(first, mask=wanted, other=0), tl.load(first + 1, mask=wanted, other=0)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .pred p; setp.ne.s32 p, $3, 0; mov.b64 $0, 0; mov.b64 $1, 0; "
            "@p ld.relaxed.sys.global.v2.b64 {$0, $1}, [$2]; }",
            "=&l,=&l,l,r", [address, wanted.to(tl.int32)], dtype=(tl.int64, tl.int64), is_pure=False, pack=1,
        )  # fmt: skip


@triton.jit
def units_at(address, wanted, UNIT: tl.constexpr, INTERPRETED: tl.constexpr):
    """Units of so many bytes at the wanted addresses, two int64 tensors of them where UNIT is 16."""
    if UNIT == 16:
        first, second = pairs_at(address, wanted, INTERPRETED)
    elif UNIT == 8:
        first = words_at(address, wanted, INTERPRETED)
        second = first
    elif UNIT == 4:
        first = ints_at(address, wanted, INTERPRETED)
        second = first
    elif UNIT == 2:
        first = halves_at(address, wanted, INTERPRETED)
        second = first
    else:
        first = bytes_at(address, wanted, INTERPRETED)
        second = first
    return first, second
