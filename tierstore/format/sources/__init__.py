"""Readers of checkpoints: each turns one model's tensors into `TableSource`s, from headers alone.

`open_checkpoint` picks the reader; `uncovered_tensors` says what else a file holds. One reader a file:

    deepseek_v41   layers.{L}.engram.embed.weight and .scale
    qwen_ple       ...ple.ple_embedding.ngram_embedding.shard_{i}.weight, and its hash buffers
    engram_demo    ...multi_head_embedding.embedding.weight
    plain          any [N, D] tensor, described by a layout file
"""

from tierstore.format.sources.opening import MODELS, open_checkpoint, uncovered_tensors

__all__ = ["MODELS", "open_checkpoint", "uncovered_tensors"]
