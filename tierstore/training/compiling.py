"""Kernels of training compiled by two processes, where nobody has on this machine yet.

The first opening compiles some forty kernels; numba holds the GIL for most of that time. So while the
storage's kernels are compiled in here, those of arena and gradients are in a child, into the cache that both
share. A file in the cache tells that all is there, for every later opening.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import numpy as np

from engram_client.jit import cache_folder
from tierstore.tiers.trained import TrainedArena
from tierstore.training.gradients import not_finite, summed

log = logging.getLogger(__name__)
DONE = "training.compiled"  # a file in the folder of kernels
CHILD = "from tierstore.training.compiling import compile_kernels; compile_kernels()"
LONGEST_S = 600.0


def compile_kernels() -> None:
    """Call the kernels of arena and gradients with nothing."""
    none = np.zeros(0, np.int64)
    not_finite(summed([(none, np.zeros((0, 1), np.float32))])[1])
    arena = TrainedArena(TrainedArena.least_bytes(8), 8)
    arena.warm_up(0)
    arena.close()


@contextmanager
def compiled_beside() -> Iterator[None]:
    """Compile in a child what the block does not; the child has ended, one way or another, behind it."""
    folder = cache_folder()
    if folder is None or (folder / DONE).exists() or len(os.sched_getaffinity(0)) < 2:
        yield
        return
    log.warning(
        "kernels of training are compiled for this machine: about half a minute, once; kept in %s", folder
    )
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        yield
        with suppress(
            subprocess.TimeoutExpired, OSError
        ):  # else what is missing is compiled where it is called
            if child.wait(LONGEST_S) == 0:
                (folder / DONE).touch()
    finally:
        child.kill()
        child.wait()
