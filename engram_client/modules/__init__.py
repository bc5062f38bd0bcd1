"""Torch modules that consume looked-up rows: Engram (demo and paper), DeepSeek-V4.1, Qwen PLE."""

from engram_client.modules.deepseek_v41 import DeepseekV41Engram
from engram_client.modules.engram import Engram
from engram_client.modules.lookup import EngramLayer, EngramLookup, ResidentLookup, StepRows
from engram_client.modules.qwen_ple import QwenPLE
from engram_client.modules.resident import MultiHeadEmbedding
from engram_client.modules.short_conv import ConvState

__all__ = [
    "ConvState",
    "DeepseekV41Engram",
    "Engram",
    "EngramLayer",
    "EngramLookup",
    "MultiHeadEmbedding",
    "QwenPLE",
    "ResidentLookup",
    "StepRows",
]
