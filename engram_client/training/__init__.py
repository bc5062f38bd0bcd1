"""Torch modules whose rows are trained in a service, and the optimizer that pushes their gradients."""

from engram_client.training.embedding import EngramEmbedding, PendingRows, TrainedLookup
from engram_client.training.optimizer import EngramOptimizer
from engram_client.training.sharded import ShardedTraining
from engram_client.training.sharded_table import ShardedTable

__all__ = [
    "EngramEmbedding",
    "EngramOptimizer",
    "PendingRows",
    "ShardedTable",
    "ShardedTraining",
    "TrainedLookup",
]
