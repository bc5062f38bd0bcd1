"""Triton: waiting on the device for a completion word of the host, and seeing whether it stayed.

Checked under Triton's interpreter and by compiling for sm_90; never run on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from engram_client.gpu.system_memory import acquire_at, again_at, fence


@triton.jit
def await_word(word, expected, found, polls, INTERPRETED: tl.constexpr):
    """Look at `word` until it is what `expected` says, `polls` times at most; `found` becomes that, or -1.

    All are int64 [1]; word and expected in pinned memory. What is read behind this was there before the word.
    """
    wanted = acquire_at(expected.to(tl.int64), INTERPRETED)
    seen = acquire_at(word.to(tl.int64), INTERPRETED)
    left = polls
    while (seen != wanted) & (left > 0):
        seen = acquire_at(word.to(tl.int64), INTERPRETED)
        left -= 1
    tl.store(found, tl.where((seen == wanted) & (wanted >= 0), wanted, -1))


@triton.jit
def confirm_word(word, found, late, INTERPRETED: tl.constexpr):
    """After the copy: unless `word` is still what was found, `found` becomes -1, and `late` bool [1] True."""
    first = fence(tl.load(found), INTERPRETED)
    seen = again_at(word.to(tl.int64), INTERPRETED)
    there = (first >= 0) & (seen == first)
    tl.store(found, tl.where(there, first, -1))
    tl.store(late, there == 0)
