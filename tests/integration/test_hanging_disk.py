"""A disk that answers nothing: nobody sleeps beyond his deadline."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engram_client.errors import DeadlineExceeded
from engram_client.transport.base import LookupRequest
from tests.support.idle_reader import IdleReader
from tests.support.stores import PLAIN, PackedStore, small_config
from tierstore.kernels.stream import DOZES_MAX, take_landed
from tierstore.store import open_store
from tierstore.tiers import nvme


def test_no_sleep_reaches_over_the_deadline(
    packed: PackedStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel dozes a few times before anybody looks at the clock."""
    timeout_s, dozes_ns = 0.25, []

    def noting(*arguments: Any) -> Any:
        dozes_ns.append(arguments[-1])
        return take_landed(*arguments)

    monkeypatch.setattr(nvme, "take_landed", noting)
    folder = packed.copy_to(tmp_path)
    store, release = open_store(folder, small_config(), make_reader=lambda config: IdleReader())
    dozes_ns.clear()  # of warming up
    spec = store.table(PLAIN).spec
    request = LookupRequest(PLAIN, spec.generation, "row", np.arange(4))
    with pytest.raises(DeadlineExceeded):
        store.lookup(request, np.empty(4 * spec.row_bytes, np.uint8), timeout_s)
    assert 0 < DOZES_MAX * max(dozes_ns) <= timeout_s * 1e9
    release()
