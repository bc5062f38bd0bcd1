"""Clients in processes of their own, told over a pipe what to measure."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from engram_client import connect
from engram_client.errors import Unavailable
from tierbench.alternate import latencies_us, rate
from tierbench.remote_calls import RemoteCalls

START_S = 0.05  # between an order and its beginning, so that several begin together
STRANGERS = 64  # n-grams that nobody has asked for yet, in one look-up


class ClientProcess:
    """One client. `token` and `batch` are numbers of n-grams in a call."""

    def __init__(self, target: str, token: int, batch: int, different: int, seed: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_obey, args=(theirs, target, token, batch, different, seed), daemon=True
        )
        self._process.start()
        theirs.close()
        self.answer()

    def order(self, what: str, *arguments: Any) -> None:
        self._pipe.send((what, *arguments))

    def answer(self) -> Any:
        """What came of the last order. Raises Unavailable where the process has died."""
        try:
            return self._pipe.recv()
        except EOFError:
            raise Unavailable("a client process has died; see above") from None

    def ask(self, what: str, *arguments: Any) -> Any:
        self.order(what, *arguments)
        return self.answer()

    def close(self) -> None:
        self._pipe.close()
        self._process.join()


@contextmanager
def client_process(*arguments: Any) -> Iterator[ClientProcess]:
    """A ClientProcess for the time of a `with` block."""
    client = ClientProcess(*arguments)
    try:
        yield client
    finally:
        client.close()


def rates_together(clients: list[ClientProcess], window_s: float) -> list[float]:
    """Rows a second of each, all at the same time, in calls of `batch` n-grams."""
    begin = time.monotonic() + START_S
    for client in clients:
        client.order("rate", begin, window_s)
    return [client.answer() for client in clients]


def _obey(pipe: Connection, target: str, token: int, batch: int, different: int, seed: int) -> None:
    """The process: connect, warm its records, then do what is ordered until the pipe ends."""
    with connect(target) as client:
        tokens = RemoteCalls(client, token, different, seed)
        batches = RemoteCalls(client, batch, max(1, different // 64), seed + 1)
        steps = {"token": tokens.step(), "batch": batches.step()}
        random = np.random.default_rng(seed + 2)
        pipe.send(True)
        while True:
            try:
                what, *arguments = pipe.recv()
            except EOFError:
                return
            if what == "latency":
                pipe.send(latencies_us(steps["token"], *arguments))
            elif what == "rate":
                begin, window_s = arguments
                time.sleep(max(0.0, begin - time.monotonic()))
                pipe.send(rate(steps["batch"], window_s))
            elif what == "read strangers":
                pipe.send(_read_strangers(pipe, tokens, random))
            elif what == "misses":
                pipe.send(client.stats()["dram_misses"])


def _read_strangers(pipe: Connection, calls: RemoteCalls, random: np.random.Generator) -> int:
    """Look up what is nowhere in DRAM until the next order, which is swallowed; how many n-grams."""
    read, orders = 0, calls.keys.shape[-1]
    while not pipe.poll():
        calls.table.lookup_ngrams(random.integers(0, 2**63 - 1, (STRANGERS, orders), np.int64))
        read += STRANGERS
    pipe.recv()
    return read
