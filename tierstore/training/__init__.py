"""Tables that learn: rows with their optimizer's state in DRAM over an update log."""

from tierstore.training.budget import change_training_budget
from tierstore.training.registry import open_training
from tierstore.training.store import TrainingStore

__all__ = ["TrainingStore", "change_training_budget", "open_training"]
