"""`@simulator`: compilation for the replays, kept on disk apart from the product's kernels.

The product's cache of machine code is keyed by the product's kernels; what is compiled here depends on these
files as well, so it has a folder of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from engram_client.jit import cache_root, compiled, kernel_sources, sources_digest, usable_folder


@cache
def simulator_folder() -> Path | None:
    """The folder for this set of sources, created; None where it cannot be written."""
    sources = [*kernel_sources(), *sorted(Path(__file__).parent.glob("*.py"))]
    return usable_folder(cache_root() / f"simulators-{sources_digest(sources)}")


def simulator(function: Callable[..., Any]) -> Any:
    """Compile `function` at its first call, without the GIL; keep the machine code on disk."""
    return compiled(function, simulator_folder())
