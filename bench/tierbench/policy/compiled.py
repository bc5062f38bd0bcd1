"""`@simulator`: compilation for the replays, which are not kept on disk.

The product's cache of machine code is keyed by the product's kernels; what is compiled here must
not depend on a digest that leaves it out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def simulator(function: Callable[..., Any]) -> Any:
    """Compile `function` at its first call, without the GIL."""
    return numba.njit(nogil=True, error_model="numpy")(function)
