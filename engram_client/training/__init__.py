"""Torch modules whose rows are trained in a service, and the optimizer that pushes their gradients."""

from engram_client.training.embedding import EngramEmbedding, PendingRows, TrainedLookup
from engram_client.training.optimizer import EngramOptimizer

__all__ = ["EngramEmbedding", "EngramOptimizer", "PendingRows", "TrainedLookup"]
