"""Durable state of training: rows that are written, a log of commits, and pages they are folded into."""

from tierstore.updates.log import Commit
from tierstore.updates.snapshot import Snapshot
from tierstore.updates.spec import Initial, TrainedSpec
from tierstore.updates.storage import RowStorage

__all__ = ["Commit", "Initial", "RowStorage", "Snapshot", "TrainedSpec"]
