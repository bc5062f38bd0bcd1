"""Measure asking for rows ahead: that it is never slower, what asking costs, whose rows come first.

Per transport: a caller that asks, is busy in Python and waits, beside one that is busy and then looks up,
with all records in DRAM and with none; whole steps of two layers on real text, with equal positions asked for
once and each by itself; and when the rows of each layer of a step arrive.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import numpy as np

from engram_client import Table
from engram_client.errors import BadRequest
from tierbench.ahead.busy_caller import compare_callers, turns_for
from tierbench.ahead.whole_steps import CONTEXT, compare_dedupe, order_of_arrival, steps_in_window
from tierbench.delivery import add_common_arguments, deliver
from tierbench.options import byte_size, count, count_list, not_negative
from tierbench.overlap.setting import Service, Setting, make_setting, running_services

TRANSPORTS = ("local", "unix", "tcp")
STEPS = ((1, 1), (64, 1), (256, 1), (1, 512), (1, 4096))
KEPT_CALLS = 4  # different batches where everything hits
KEPT_TOKENS = 2048
COLUMNS = ("", "ahead", "when needed", "ratio", "spread", "asking", "bar")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_common_arguments(parser, windows=8, window_s=None)
    add = parser.add_argument
    add("--transports", type=_transports, default=TRANSPORTS, metavar="T[,T]", help="default: local,unix,tcp")
    add("--rows-per-head", type=count, default=250_000, metavar="N", help="of both tables")
    add("--dram-bytes", type=byte_size, default=2 << 30, metavar="BYTES", help="default: 2GiB")
    add("--sizes", type=count_list, default=(1, 4, 16, 64, 256, 1024, 4096), metavar="N[,N]",
        help="tokens of a batch")  # fmt: skip
    add("--busy-us", type=not_negative, default=1000.0, metavar="US", help="between asking and using")
    add("--steps", type=_shapes, default=STEPS, metavar="BxT[,BxT]",
        help="sequences x tokens of a step (default: 1x1,64x1,256x1,1x512,1x4096)")  # fmt: skip
    add("--tokens", type=count, default=1_000_000, metavar="N", help="of text")


def _transports(text: str) -> tuple[str, ...]:
    named = tuple(text.split(","))
    if not set(named) <= set(TRANSPORTS):
        raise argparse.ArgumentTypeError(f"{text!r}: known are {', '.join(TRANSPORTS)}")
    return named


def _shapes(text: str) -> tuple[tuple[int, int], ...]:
    found = []
    for part in text.split(","):
        batch, _, length = part.partition("x")
        found.append((count(batch), count(length)))
    return tuple(found)


def run(args: argparse.Namespace) -> int:
    setting = make_setting(args.dir, args.rows_per_head, args.tokens)
    if setting.text.size < 8 * max(batch * length for batch, length in args.steps):
        raise BadRequest(f"{setting.text.size} tokens of text are too few for --steps; give more --tokens")
    turns = turns_for(args.busy_us)
    results: dict[str, Any] = {"busy_turns": turns}
    for transport in args.transports:
        with running_services(setting, transport, (transport,), args.dram_bytes) as services:
            service = services[transport]
            results[transport] = {
                "callers": _callers(args, transport, service, turns),
                **_whole_steps(args, transport, service, setting),
            }
    return deliver("ahead", args, results, _lines(results, args.transports), COLUMNS)


def _callers(
    args: argparse.Namespace, transport: str, service: Service, turns: int
) -> dict[str, dict[str, Any]]:
    table = next(iter(service.tables().values()))
    random = np.random.default_rng(args.seed)
    found: dict[str, dict[str, Any]] = {"hits": {}, "cold": {}}
    for tokens in args.sizes:
        options = {"tokens": tokens, "turns": turns, "windows": args.windows}
        kept = _random_keys(random, table, max(KEPT_CALLS, KEPT_TOKENS // tokens), tokens)
        _read(table, kept)
        label = f"{transport}, {tokens} tokens"
        found["hits"][str(tokens)] = compare_callers(table, lambda _: kept, **options, label=f"{label}, hits")  # noqa: B023
        found["cold"][str(tokens)] = compare_callers(
            table,
            lambda calls: _random_keys(random, table, calls, tokens),  # noqa: B023
            **options,
            label=f"{label}, cold",
        )
    return found


def _random_keys(random: np.random.Generator, table: Table, calls: int, tokens: int) -> np.ndarray:
    assert table.spec.scheme is not None
    return random.integers(0, 2**63 - 1, (calls, tokens, table.spec.scheme.orders), np.int64)


def _read(table: Table, keys: np.ndarray) -> None:
    for part in keys:
        table.lookup_ngrams(part)


def _whole_steps(
    args: argparse.Namespace, transport: str, service: Service, setting: Setting
) -> dict[str, Any]:
    """What is to hit is read first; the other texts are read when a step asks for them."""
    random = np.random.default_rng(args.seed + 1)
    tables = service.tables()
    found: dict[str, dict[str, Any]] = {"dedupe": {}, "order": {}}

    def texts(shape: tuple[int, int], count: int, *, read: bool) -> np.ndarray:
        """Token ids [count, B, CONTEXT + T] from anywhere; with `read`, the service has their rows."""
        length = CONTEXT + shape[1]
        starts = random.integers(0, setting.text.size - length, (count, shape[0]))
        made = setting.text[starts[..., None] + np.arange(length)]
        if read:
            service.read(setting.mapping, made.reshape(-1, length))
        return made

    for shape in args.steps:
        name = f"{shape[0]}x{shape[1]}"
        count = steps_in_window(shape)
        found["order"][name] = {
            state: order_of_arrival(tables, setting.tokenizer, texts(shape, count, read=read))
            for state, read in (("as it comes", False), ("hits", True))
        }
        kept = texts(shape, count, read=True)
        label = f"{transport}, step {name}"
        found["dedupe"][name] = compare_dedupe(tables, setting.tokenizer, kept, args.windows, label)
    return found


def _lines(results: Mapping[str, Any], transports: tuple[str, ...]) -> list[list[str]]:
    lines = []
    for transport in transports:
        told = results[transport]
        lines += _caller_lines(transport, told["callers"])
        lines += _dedupe_lines(transport, told["dedupe"])
        lines += _order_lines(transport, told["order"])
    return lines


def _caller_lines(transport: str, told: Mapping[str, Any]) -> list[list[str]]:
    lines = []
    for state, sizes in told.items():
        for tokens, found in sizes.items():
            pair = [_us(found[name]) for name in ("ahead_us", "when_needed_us")]
            asking = f"{found['asking_us']['p50']:,.1f} us"
            label = f"{transport}, {tokens} tokens, {state}"
            lines.append([label, *pair, *_ratio(found["ratio"]), asking, "<= 1"])
    return lines


def _dedupe_lines(transport: str, told: Mapping[str, Any]) -> list[list[str]]:
    lines = []
    for name, found in told.items():
        for kind in ("numbers", "bytes"):
            pair = [_us(found[kind][side]) for side in ("once_us", "each_us")]
            label = f"{transport}, step {name}, {kind}: {found['distinct_share']:.0%} distinct, once / each"
            search = f"{found['search_us']['p50']:,.1f} us"
            lines.append([label, *pair, *_ratio(found[kind]["ratio"]), search, ""])
    return lines


def _order_lines(transport: str, told: Mapping[str, Any]) -> list[list[str]]:
    lines = []
    for name, states in told.items():
        for state, found in states.items():
            pair = [f"{found[side]['p50']:,.2f} ms" for side in ("first_layer_ms", "last_layer_ms")]
            label = f"{transport}, step {name}, {state}: rows of first, last layer"
            lines.append([label, *pair, f"{found['in_order_share']:.0%} in order", "", "", ""])
    return lines


def _us(found: Mapping[str, float]) -> str:
    return f"{found['p50']:,.0f} us\np99 {found['p99']:,.0f}"


def _ratio(found: Mapping[str, float]) -> tuple[str, str]:
    return f"{found['ratio_median']:.3f}", f"{found['ratio_min']:.2f} to {found['ratio_max']:.2f}"
