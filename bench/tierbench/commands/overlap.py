"""Measure what rows cost a model's step: tables in memory, rows asked for ahead, rows asked for in the layer.

An eight-layer transformer in PyTorch on the CPU, with Engram modules at layers 1 and 5, decodes and
prefills real text. (a) has both tables in memory; (b) asks tierstore for a step's rows as soon as its
tokens are known, (c) only when a layer needs them; b and c each have a service of their own, with a
tenth of the tables in DRAM and the rest on the disk, and then with all of it in DRAM. The outputs of all
must be equal. The model has as many threads as --threads says in every variant; with as many as there
are cores, a daemon has none of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from engram_client import StepPrefetcher
from engram_client.errors import BadRequest
from tierbench.delivery import add_common_arguments, deliver
from tierbench.options import byte_size, count, count_list, fraction
from tierbench.overlap.figures import (
    AGAIN,
    IN_THE_LAYER,
    PREFETCHED,
    RESIDENT,
    crossings,
    figures,
)
from tierbench.overlap.model import HEAD_WIDTH, Shape, Transformer
from tierbench.overlap.setting import LAYERS, Service, Setting, make_setting, running_services
from tierbench.overlap.sources import InTheLayer, Prefetched, Resident, Source
from tierbench.overlap.windows import run_windows
from tierbench.progress import stage
from tierbench.record import summarize

MODEL_LAYERS = 8
COLUMNS = (
    "",
    "a layer / a read",
    "a resident",
    "b ahead",
    "c in the layer",
    "b / a",
    "c / a",
    "a / a",
    "b waits",
)


@dataclass(frozen=True)
class Size:
    """One kind of step; `length` is 1 for decoding, the chunk for prefilling."""

    kind: str
    hidden: int
    batch: int
    length: int
    threads: int

    @property
    def label(self) -> str:
        step = f"{self.batch} sequences" if self.kind == "decode" else f"chunks of {self.length}"
        return f"{self.kind} {step}, hidden {self.hidden}, {self.threads} threads"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, windows=5, window_s=None)
    add = parser.add_argument
    add("--transport", choices=("unix", "tcp", "local"), default="unix", help="default: %(default)s")
    add("--rows-per-head", type=count, default=250_000, metavar="N", help="of both tables")
    add("--dram-share", type=fraction, default=0.1, help="of the tables in DRAM (default: %(default)s)")
    add("--hit-dram-bytes", type=byte_size, default=2 << 30, metavar="BYTES",
        help="of DRAM where everything shall hit (default: 2GiB)")  # fmt: skip
    add("--hidden", type=count_list, default=(256, 512, 768), metavar="N[,N]", help="sizes of the model")
    add("--batches", type=count_list, default=(1, 16, 64), metavar="N[,N]", help="sequences decoded at once")
    add("--chunks", type=count_list, default=(256,), metavar="N[,N]", help="tokens of a prefilled chunk")
    add("--steps", type=count, default=12, metavar="N", help="decoded in a window; half as many chunks")
    add("--threads", type=count_list, default=(1, 2), metavar="N[,N]", help="of the model (default: 1,2)")
    add("--tokens", type=count, default=1_000_000, metavar="N", help="of text")
    add("--warm-tokens", type=count, default=50_000, metavar="N", help="read by the services beforehand")


def run(args: argparse.Namespace) -> int:
    if any(hidden % HEAD_WIDTH for hidden in args.hidden):
        raise BadRequest(f"--hidden takes multiples of {HEAD_WIDTH}, got {args.hidden}")
    setting = make_setting(args.dir, args.rows_per_head, args.tokens)
    resident = setting.resident()
    dram_bytes = int(setting.table_bytes * args.dram_share)
    threads_before = torch.get_num_threads()
    try:
        with running_services(setting, args.transport, ("ahead", "in-layer"), dram_bytes) as services:
            with stage("filling DRAM"):
                for service in services.values():
                    service.read(setting.mapping, setting.text[: args.warm_tokens].reshape(1, -1))
            sizes = [_measure(args, setting, resident, services, size, dram_bytes) for size in _sizes(args)]
    finally:
        torch.set_num_threads(threads_before)
    results = {
        "table_bytes": setting.table_bytes,
        "dram_bytes": dram_bytes,
        "sizes": sizes,
        "crossings": crossings(sizes),
    }
    return deliver("overlap", args, results, _lines(results), COLUMNS)


def _sizes(args: argparse.Namespace) -> Iterator[Size]:
    for threads in args.threads:
        for hidden in args.hidden:
            for batch in args.batches:
                yield Size("decode", hidden, batch, 1, threads)
            for chunk in args.chunks:
                yield Size("prefill", hidden, 1, chunk, threads)


def _measure(
    args: argparse.Namespace,
    setting: Setting,
    resident: Mapping[int, np.ndarray],
    services: Mapping[str, Service],
    size: Size,
    dram_bytes: int,
) -> dict[str, Any]:
    """With a tenth of the tables in DRAM, and with everything that is asked for there."""
    torch.set_num_threads(size.threads)
    shape = Shape(size.hidden, MODEL_LAYERS, LAYERS, _row_width(setting))
    model = Transformer(shape, args.seed).eval()
    texts = _texts(args, setting.text, size)
    found = {**vars(size), "tenth": _run(model, setting, resident, services, texts, size, "tenth in DRAM")}
    try:
        for service in services.values():
            service.control.set_dram_budget(args.hit_dram_bytes)
            for window in texts:
                service.read(setting.mapping, window.transpose(1, 0, 2).reshape(size.batch, -1))
        found["hits"] = _run(model, setting, resident, services, texts, size, "all in DRAM")
    finally:
        for service in services.values():
            service.control.set_dram_budget(dram_bytes)
    return found


def _lead(size: Size) -> int:
    """Steps at the start of a window that stand apart: a prefill's first chunk had nothing to hide behind."""
    return int(size.kind == "prefill")


def _row_width(setting: Setting) -> int:
    scheme = setting.mapping.scheme(LAYERS[0])
    return scheme.orders * scheme.heads * setting.layout.embedding_dim


def _texts(args: argparse.Namespace, text: np.ndarray, size: Size) -> np.ndarray:
    """Token ids [windows, steps, B, T] from seeded places behind the warm text; one more warms the model."""
    steps = args.steps if size.kind == "decode" else max(2, args.steps // 2)
    span = steps * size.length
    random = np.random.default_rng([args.seed, size.hidden, size.batch, size.length, size.threads])
    if text.size - span <= args.warm_tokens:
        raise BadRequest(f"{text.size} tokens of text leave none to measure with; give more --tokens")
    starts = random.integers(args.warm_tokens, text.size - span, (args.windows + 1, size.batch))
    lines = text[starts[..., None] + np.arange(span)]  # [windows, B, span]
    return np.ascontiguousarray(lines.reshape(*starts.shape, steps, size.length).transpose(0, 2, 1, 3))


def _run(
    model: Transformer,
    setting: Setting,
    resident: Mapping[int, np.ndarray],
    services: Mapping[str, Service],
    texts: np.ndarray,
    size: Size,
    label: str,
) -> dict[str, Any]:
    ahead, in_layer = services["ahead"], services["in-layer"]
    tables = (setting.mapping, resident, setting.layout)
    sources: dict[str, Source] = {
        RESIDENT: Resident(*tables),
        PREFETCHED: Prefetched(StepPrefetcher(ahead.tables(), setting.tokenizer)),
        IN_THE_LAYER: InTheLayer(setting.mapping, in_layer.tables()),
        AGAIN: Resident(*tables),
    }
    before = {name: service.counts() for name, service in services.items()}
    windows = run_windows(model, sources, texts, ahead=size.kind == "prefill", label=f"{size.label}, {label}")
    told = figures(
        {name: [w.after(_lead(size)) for w in found[1:]] for name, found in windows.items()}, MODEL_LAYERS
    )
    if _lead(size):
        firsts = {name: [w.step_s[0] * 1e3 for w in found[1:]] for name, found in windows.items()}
        told["first_chunk_ms"] = {name: summarize(taken) for name, taken in firsts.items()}
    return {**told, "hit_rate": {n: _hit_rate(before[n], s.counts()) for n, s in services.items()}}


def _hit_rate(before: tuple[int, int], after: tuple[int, int]) -> float:
    hits, misses = (b - a for a, b in zip(before, after, strict=True))
    return hits / max(1, hits + misses)


def _lines(results: Mapping[str, Any]) -> list[list[str]]:
    lines = []
    for size in results["sizes"]:
        label = Size(**{name: size[name] for name in Size.__dataclass_fields__}).label.replace(", ", "\n")
        for kind in ("tenth", "hits"):
            lines.append(_line(f"{label}\n{size[kind]['hit_rate']['ahead']:.0%} hits", size[kind]))
    return lines


def _line(label: str, found: Mapping[str, Any]) -> list[str]:
    """Times in milliseconds; of steps p50, p90 and p99."""

    def steps(name: str) -> str:
        return "\n".join(f"{found[name]['step_ms'][p]:.2f}" for p in ("p50", "p90", "p99"))

    def ratio(name: str) -> str:
        over = found[name]["over_resident"]
        return f"{over['ratio_median']:.3f}\n{over['ratio_min']:.2f} to\n{over['ratio_max']:.2f}"

    waits = "\n".join(f"{share:.1%}" for share in found[PREFETCHED]["waited_share"].values())
    beside = [f"{found[name]:.2f}" for name in ("compute_ms_a_layer", "read_ms_a_layer")]
    ratios = [ratio(name) for name in (PREFETCHED, IN_THE_LAYER, AGAIN)]
    return [label, *beside, *(steps(n) for n in (RESIDENT, PREFETCHED, IN_THE_LAYER)), *ratios, waits]
