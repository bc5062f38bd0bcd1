"""What becomes of a committed step: a checkpoint, a generation to serve, another training store.

All three read a `StepRows` in batches: a snapshot of a store that nobody has open, of one that is trained in
this process, or of one that a daemon trains. So training goes on meanwhile, and none of them holds more than
some batches in memory.
"""

from tierstore.snapshots.copying import Copied, copy_step, reshard_step
from tierstore.snapshots.export import Exported, export_step
from tierstore.snapshots.publish import Published, publish_step
from tierstore.snapshots.rows import StepRows, described, open_step, open_storage
from tierstore.snapshots.shares import Source, shares_of, whole_step

__all__ = [
    "Copied",
    "Exported",
    "Published",
    "Source",
    "StepRows",
    "copy_step",
    "described",
    "export_step",
    "open_step",
    "open_storage",
    "publish_step",
    "reshard_step",
    "shares_of",
    "whole_step",
]
