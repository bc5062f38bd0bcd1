"""Token ids to n-gram keys on the device, by DeepSeek-V4.1's scheme, beside the compiled kernel on "
"one core."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import torch

from engram_client.errors import DataCorrupt
from engram_client.hashing import NgramHashMapping
from engram_client.hashing.device import HASHING
from tierbench.alternate import alternate
from tierbench.gpu.bars import Bar
from tierbench.gpu.device import bytes_per_s
from tierbench.gpu.filled_hbm import HEADS, ORDERS, host_waits
from tierbench.gpu.scale import Scale
from tierbench.record import compare

TIMEOUT_S = 60
BARS = (
    Bar("hashing on the device, keys/s", "keys_per_s", ">=", 1e9),
    Bar("host synchronisation while hashing", "profile.host_waits", "==", "none"),
)
VOCABULARY = 129_280
COMPRESSED = 99_092


def v41_mapping(seed: int) -> NgramHashMapping:
    """DeepSeek-V4.1's scheme for layer 1, with a made-up fold of its sizes."""
    fold = np.random.default_rng(seed).integers(0, COMPRESSED, VOCABULARY)
    fold[:COMPRESSED] = np.arange(COMPRESSED)
    return NgramHashMapping.engram(
        fold,
        layer_ids=[1],
        vocab_size_per_ngram=[16_000_000] * ORDERS,
        n_head_per_ngram=HEADS,
        max_ngram_size=ORDERS + 1,
        pad_id=2,
        seed=seed,
    )


def run(device: torch.device, scale: Scale) -> dict[str, Any]:
    """Keys/s of each; ids are int64, as tokenizers give them."""
    mapping = v41_mapping(scale.seed)
    twin = mapping.on_device(device)
    random = np.random.default_rng(scale.seed)
    ids = random.integers(0, VOCABULARY, (1, scale.hashed_tokens), np.int64)
    there = torch.from_numpy(ids).to(device)
    if not np.array_equal(twin.ngram_keys(there, 1).cpu().numpy(), mapping.ngram_keys(ids, 1)):
        raise DataCorrupt(f"hashing on {device} gives other keys than the compiled kernel")
    keys, host = scale.hashed_tokens * ORDERS, torch.device("cpu")
    contenders = {
        "ours": partial(bytes_per_s, device, keys, lambda: twin.ngram_keys(there, 1), scale.window_s),
        "one_core": partial(bytes_per_s, host, keys, lambda: mapping.ngram_keys(ids, 1), scale.window_s),
    }
    samples = alternate(scale.windows, contenders, f"hashing on {device}")
    return {
        "tokens": scale.hashed_tokens,
        "by_kernels": HASHING.serves(device),
        "keys_per_s": float(np.median(samples["ours"])),
        "over_one_core": compare(samples["ours"], samples["one_core"]),
        "profile": host_waits(device, lambda: twin.ngram_keys(there, 1)),
    }
