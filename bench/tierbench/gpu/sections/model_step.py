"""A model step with rows from a tenth of the tables in HBM and DRAM, beside the tables wholly in HBM.

The model is that of `tierbench overlap` in BF16: plain layers and V4.1's Engram module at two of them, over
real text. Both sources hash on the device and ask when the step's tokens are known. Resident:
`torch.index_select` out of each table as a tensor of the device. A tenth: hot records in HBM (a fifth of the
tenth), in front of a service whose DRAM holds the rest of it and whose files hold everything; each of its
windows reads text that the caches have not seen.

Told for each, by step: the whole of it, how long the host stood in each layer's wait, and how long the
device's stream took from the wait to decoded rows (copies, admission and decoding; on a CPU the host's time
for it). What is left is the model. The bar is 1.03; where it is missed these terms say which is in the way.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engram_client.dequantize import dequantize
from engram_client.errors import DataCorrupt
from engram_client.hbm import HbmTier
from tierbench.alternate import alternate
from tierbench.gpu.bars import Bar
from tierbench.gpu.device import finish
from tierbench.gpu.scale import Scale
from tierbench.overlap.model import Cache, Shape, Transformer
from tierbench.overlap.setting import LAYERS, Service, Setting, make_setting, running_services
from tierbench.record import compare, summarize

TIMEOUT_S = 220
PART, HBM_SHARE = 0.1, 0.2  # of the tables, and of that part
STEPS = {True: 8, False: 2}  # of a window
OVERHEAD_MAX = 1.03
BARS = (
    Bar("decode 1", "decode_1.over_resident.ratio_median", "<=", OVERHEAD_MAX),
    Bar("prefill", "prefill.over_resident.ratio_median", "<=", OVERHEAD_MAX),
)


def run(device: torch.device, scale: Scale) -> dict[str, Any]:
    """Step times in ms of either source and their ratio, for each size of a step."""
    sizes = {f"decode_{batch}": (batch, 1) for batch in scale.decode_batches}
    sizes["prefill"] = (1, scale.prefill_tokens)
    steps, windows = STEPS[device.type == "cuda"], scale.windows
    tokens = sum((windows + 1) * steps * batch * length for batch, length in sizes.values())
    setting = make_setting(scale.scratch, scale.table_rows_per_head, tokens)
    part = PART * setting.table_bytes
    hbm_bytes, dram_bytes = (max(1 << 20, int(part * share)) for share in (HBM_SHARE, 1 - HBM_SHARE))
    shape = Shape(scale.model_hidden, scale.model_layers, _places(scale), _row_width(setting))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # a CPU takes long over BF16
    model = Transformer(shape, scale.seed).to(device, dtype)
    transport = "unix" if device.type == "cuda" else "local"
    with running_services(setting, transport, ("tenth",), dram_bytes) as services:
        sources = {
            "resident": _Resident(setting, device, shape.engram_layers),
            "tenth": _Tenth(setting, services["tenth"], hbm_bytes, device, shape.engram_layers),
        }
        found: dict[str, Any] = {
            "table_bytes": setting.table_bytes,
            "hbm_bytes": hbm_bytes,
            "dram_bytes": dram_bytes,
        }
        begin = 0
        for name, (batch, length) in sizes.items():
            count = (windows + 1) * steps * batch * length
            text = setting.text[begin : begin + count].reshape(windows + 1, batch, steps, length)
            begin += count
            found[name] = _of_size(model, sources, text.swapaxes(1, 2), name)
        found["tier"] = sources["tenth"].stats()
    return found


def _places(scale: Scale) -> tuple[int, ...]:
    """Where in the model the two tables are."""
    return (1, max(2, min(LAYERS[1], scale.model_layers - 1)))


def _row_width(setting: Setting) -> int:
    sizes = setting.mapping.head_sizes[LAYERS[0]]
    return sum(map(len, sizes)) * setting.layout.field("weight").count


class _Source:
    """Rows of step after step for a batch; tells what each layer cost since `begin`."""

    def __init__(self, setting: Setting, device: torch.device, layers: tuple[int, ...]) -> None:
        self.device, self.layout = device, setting.layout
        self.hashing = setting.mapping.on_device(device)
        self.tables = dict(zip(layers, LAYERS, strict=True))  # of the model -> of the setting
        self.waited_ms: list[float] = []
        self.brought: list[Any] = []

    def begin(self, batch: int) -> None:
        self.waited_ms, self.brought = [], []
        self.lookback = self.hashing.lookback(batch)

    def start(self, tokens: Tensor) -> None:
        self.asked = {layer: self.ask(tokens, table) for layer, table in self.tables.items()}
        self.lookback.advance(tokens)

    def ask(self, tokens: Tensor, table: int) -> Any:
        raise NotImplementedError

    def bytes_of(self, layer: int) -> Tensor:
        raise NotImplementedError

    def rows(self, layer: int) -> Tensor:
        first = _mark(self.device)
        before = time.perf_counter()
        found = self.bytes_of(layer)
        self.waited_ms.append((time.perf_counter() - before) * 1e3)
        numbers = dequantize(self.layout, found)
        self.brought.append((first, _mark(self.device)))
        return numbers

    def stats(self) -> dict[str, int]:
        return {}


class _Resident(_Source):
    """Both tables on the device."""

    def __init__(self, setting: Setting, device: torch.device, layers: tuple[int, ...]) -> None:
        super().__init__(setting, device, layers)
        self.rows_of = {
            table: torch.from_numpy(rows.view(np.int64)).to(device)
            for table, rows in setting.resident().items()
        }

    def ask(self, tokens: Tensor, table: int) -> Tensor:
        return self.hashing.row_ids(tokens, table, lookback=self.lookback)

    def bytes_of(self, layer: int) -> Tensor:
        ids = self.asked[layer]
        found = torch.index_select(self.rows_of[self.tables[layer]], 0, ids.reshape(-1))
        return found.view(torch.uint8).view(*ids.shape, -1)


class _Tenth(_Source):
    """Hot records on the device in front of a service."""

    def __init__(
        self, setting: Setting, service: Service, hbm_bytes: int, device: torch.device,
        layers: tuple[int, ...],
    ) -> None:  # fmt: skip
        super().__init__(setting, device, layers)
        tables = service.tables()
        self.tier = HbmTier(tables.values(), budget_bytes=hbm_bytes, device=device)
        self.hot = {table: self.tier.table(tables[table].spec.name) for table in LAYERS}

    def ask(self, tokens: Tensor, table: int) -> Any:
        keys = self.hashing.ngram_keys(tokens, table, lookback=self.lookback)
        return self.hot[table].prefetch_ngrams(keys)

    def bytes_of(self, layer: int) -> Tensor:
        return self.asked[layer].wait()

    def stats(self) -> dict[str, int]:
        return self.tier.stats()


def _mark(device: torch.device) -> Any:
    """A point in the stream's time, or on a CPU the host's."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between_ms(first: Any, last: Any) -> float:
    return (last - first) * 1e3 if isinstance(first, float) else float(first.elapsed_time(last))


def _of_size(
    model: Transformer, sources: Mapping[str, _Source], text: np.ndarray, name: str
) -> dict[str, Any]:
    """text int64 [windows + 1, steps, batch, length]; the first window warms up."""
    turns = {source: iter(text) for source in sources}
    contenders = {which: partial(_window, model, source, turns[which]) for which, source in sources.items()}
    samples = alternate(len(text), contenders, name)
    for ours, theirs in zip(samples["tenth"], samples["resident"], strict=True):
        if not all(torch.equal(a, b) for a, b in zip(ours["outputs"], theirs["outputs"], strict=True)):
            raise DataCorrupt(f"{name}: the model's outputs differ between a tenth and resident tables")
    kept = {which: found[1:] for which, found in samples.items()}
    totals = {which: [sum(w["step_ms"]) for w in found] for which, found in kept.items()}
    terms = ("step_ms", "wait_ms", "rows_ms", "asked_ms")
    return {
        "over_resident": compare(totals["tenth"], totals["resident"]),
        **{
            which: {term: summarize(np.concatenate([w[term] for w in found])) for term in terms}
            for which, found in kept.items()
        },
    }


def _window(model: Transformer, source: _Source, turns: Any) -> dict[str, Any]:
    """One window over token ids [steps, batch, length]: what each step took, and its output."""
    steps: np.ndarray = next(turns)
    count, batch, length = steps.shape
    device = source.device
    cache = Cache(model.shape, batch, count * length, like=model.embedding.weight)
    source.begin(batch)
    step_ms, asked_ms, outputs = [], [], []
    for tokens in torch.from_numpy(np.ascontiguousarray(steps)).to(device):
        finish(device)
        before = time.perf_counter()
        source.start(tokens)
        asked_ms.append((time.perf_counter() - before) * 1e3)
        outputs.append(model(tokens, cache, source.rows))
        finish(device)
        step_ms.append((time.perf_counter() - before) * 1e3)
    rows_ms = [_between_ms(*pair) for pair in source.brought]
    return {
        "step_ms": step_ms,
        "asked_ms": asked_ms,
        "wait_ms": source.waited_ms,
        "rows_ms": rows_ms,
        "outputs": outputs,
    }
