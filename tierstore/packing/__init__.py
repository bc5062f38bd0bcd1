"""From a checkpoint to published tables: plan, claim, write, publish; resumable at any point."""

from tierstore.packing.plan import PackOptions
from tierstore.packing.run import PackedTable, PackReport, Progress, pack

__all__ = ["PackOptions", "PackReport", "PackedTable", "Progress", "pack"]
