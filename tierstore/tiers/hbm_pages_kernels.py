"""Triton kernels of hbm_pages.py; imported only where its group is tried or serves."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from engram_client.gpu.probe import made_current

PAGES_A_PROGRAM, ROWS_A_PROGRAM = 32, 8

PRIME1: tl.constexpr = tl.constexpr(0x9E3779B185EBCA87)
PRIME2: tl.constexpr = tl.constexpr(0xC2B2AE3D27D4EB4F)
PRIME3: tl.constexpr = tl.constexpr(0x165667B19E3779F9)
PRIME4: tl.constexpr = tl.constexpr(0x85EBCA77C2B2AE63)
PRIME5_AND_24: tl.constexpr = tl.constexpr(0x27D4EB2F165667C5 + 24)
PAYLOAD_WORDS: tl.constexpr = tl.constexpr(511)
STRIPED_WORDS: tl.constexpr = tl.constexpr(508)


@triton.jit
def _number(value: tl.constexpr, like):
    """A constant as uint64 of the shape of `like`: all arithmetic is of one type."""
    return tl.full(like.shape, value, tl.uint64)


@triton.jit
def _rotate(x, bits: tl.constexpr):
    return (x << bits) | (x >> (64 - bits))


@triton.jit
def _lane(accumulator, word):
    return _rotate(accumulator + word * _number(PRIME2, word), 31) * _number(PRIME1, word)


@triton.jit
def _merge(hashed, lane):
    merged = hashed ^ _lane(_number(0, lane), lane)
    return merged * _number(PRIME1, lane) + _number(PRIME4, lane)


@triton.jit
def _absorb(hashed, word):
    mixed = _rotate(hashed ^ _lane(_number(0, word), word), 27)
    return mixed * _number(PRIME1, word) + _number(PRIME4, word)


@triton.jit
def _avalanche(hashed):
    hashed = (hashed ^ (hashed >> 33)) * _number(PRIME2, hashed)
    hashed = (hashed ^ (hashed >> 29)) * _number(PRIME3, hashed)
    return hashed ^ (hashed >> 32)


@triton.jit
def _word(pointers, mask):
    return tl.load(pointers, mask=mask, other=0).to(tl.uint64, bitcast=True)


@triton.jit
def bad_pages_kernel(pages, slots, numbers, uuid, bad, count, BLOCK: tl.constexpr):
    """One page a lane; see `hbm_pages.bad_pages`."""
    page = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = page < count
    everywhere = page >= 0
    number = _word(numbers + page, there)
    seed = _absorb(_number(PRIME5_AND_24, number), _word(uuid + page * 0, everywhere))
    seed = _absorb(seed, _word(uuid + 1 + page * 0, everywhere))
    seed = _avalanche(_absorb(seed, number))
    first = pages + tl.load(slots + page, mask=there, other=0) * 512
    a = seed + _number(PRIME1, seed) + _number(PRIME2, seed)
    b = seed + _number(PRIME2, seed)
    c = seed
    d = seed - _number(PRIME1, seed)
    for at in range(0, STRIPED_WORDS, 4):
        a = _lane(a, _word(first + at, there))
        b = _lane(b, _word(first + at + 1, there))
        c = _lane(c, _word(first + at + 2, there))
        d = _lane(d, _word(first + at + 3, there))
    hashed = _rotate(a, 1) + _rotate(b, 7) + _rotate(c, 12) + _rotate(d, 18)
    hashed = _merge(_merge(_merge(_merge(hashed, a), b), c), d)
    hashed += _number(PAYLOAD_WORDS * 8, hashed)
    for at in range(STRIPED_WORDS, PAYLOAD_WORDS):
        hashed = _absorb(hashed, _word(first + at, there))
    wrong = _avalanche(hashed) != _word(first + PAYLOAD_WORDS, there)
    tl.store(bad + page, wrong.to(tl.int8), mask=there)


@triton.jit
def gather_rows_kernel(words, starts, targets, rows, count, width, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """ROWS rows a program; see `hbm_pages.gather_rows`."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = tl.arange(0, WIDTH)
    there = row < count
    start = tl.load(starts + row, mask=there, other=0)
    target = tl.load(targets + row, mask=there, other=0)
    mask = there[:, None] & (inside < width)[None, :]
    values = tl.load(words + start[:, None] + inside[None, :], mask=mask)
    tl.store(rows + target[:, None] * width + inside[None, :], values, mask=mask)


def launch_bad_pages(pages: Tensor, slots: Tensor, numbers: Tensor, uuid: Tensor) -> Tensor:
    count = len(slots)
    bad = torch.empty(count, dtype=torch.int8, device=pages.device)
    grid = (triton.cdiv(count, PAGES_A_PROGRAM),)
    with made_current(pages.device):
        bad_pages_kernel[grid](pages, slots, numbers, uuid, bad, count, BLOCK=PAGES_A_PROGRAM, num_warps=1)
    return bad.view(torch.bool)


def launch_gather_rows(words: Tensor, starts: Tensor, targets: Tensor, rows: Tensor) -> None:
    count, width = len(starts), rows.shape[1]
    grid = (triton.cdiv(count, ROWS_A_PROGRAM),)
    padded = triton.next_power_of_2(width)
    with made_current(words.device):
        gather_rows_kernel[grid](
            words, starts, targets, rows, count, width, ROWS=ROWS_A_PROGRAM, WIDTH=padded
        )
