"""A worker that reads claimed runs with pread(2), one at a time."""

from __future__ import annotations

import numpy as np

from engram_client.jit import inline_kernel, kernel
from tierstore.kernels.claim import (
    ADDRESS,
    CLAIM_WORDS,
    DESCRIPTOR,
    FIRST_PAGE,
    PAGE_BYTES,
    PAGES,
    PLACE,
    end_claim,
    wait_for_run,
)
from tierstore.kernels.libc import EINTR, EIO, pread


@inline_kernel
def read_run(claim):
    """Read one run whole: (errno or 0, the page it failed at). A file that ends too early counts as EIO."""
    first, wanted, done = claim[FIRST_PAGE], claim[PAGES] * PAGE_BYTES, 0
    while done < wanted:
        got = pread(claim[DESCRIPTOR], claim[ADDRESS] + done, wanted - done, first * PAGE_BYTES + done)
        if got > 0:
            done += got
        elif got != -EINTR:
            return -got if got < 0 else EIO, first + done // PAGE_BYTES
    return 0, first


@kernel
def read_until_stopped(table, places, start):
    """Serve the job table until it stops; `start` spreads the workers over it."""
    claim = np.zeros(CLAIM_WORDS, np.int64)
    while wait_for_run(table, places, start, claim):
        errno, page = read_run(claim)
        end_claim(table, claim, errno, page)
        start = claim[PLACE] + 1
