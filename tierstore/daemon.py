"""The daemon's life: open the store, serve, drain on the first signal, leave on the second.

SIGHUP has it take up what was packed since; serving goes on meanwhile.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from engram_client.errors import ConfigError, TierstoreError
from tierstore.config import Config
from tierstore.rpc.server import Server
from tierstore.store import Store, open_store
from tierstore.training import TrainingStore, open_training

log = logging.getLogger(__name__)

SWITCH_INTERVAL_S = 0.0005  # the daemon's own: short waits for the GIL between its few threads
FORCED_EXIT = 130
LEAVE_TIMEOUT_S = 2.0  # for reads that outlived the draining


def run_daemon(directory: Path, config: Config, ready: Callable[[list[str]], None]) -> None:
    """Serve `directory` until SIGTERM or SIGINT; `ready` is called with the addresses once serving."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    asyncio.run(_serve(directory, config, ready))


async def _serve(directory: Path, config: Config, ready: Callable[[list[str]], None]) -> None:
    stopping = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, _on_signal, number, stopping)
    news = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, news.set)
    # In a thread, what may take long: the loop stays awake for signals.
    store, release = await asyncio.to_thread(open_store, directory, config)
    training, release_training = await _open_training(store, config, release)
    following = asyncio.create_task(_follow_news(store, news))
    try:
        await asyncio.to_thread(store.warm_up)
        server = Server(store, training)
        await server.start()
        gc.collect()
        gc.freeze()  # what is loaded stays: looking through it again holds the GIL for a tenth of a second
        ready(server.addresses)
        await stopping.wait()
        log.info("draining: running requests get %g s", config.serve.drain_timeout_s)
        await server.stop(config.serve.drain_timeout_s)
    finally:
        following.cancel()
        await _leave(release_training, config.serve.drain_timeout_s + LEAVE_TIMEOUT_S)
        await _leave(release, config.dram.snapshot_close_timeout_s + LEAVE_TIMEOUT_S)
    log.info("stopped")


async def _open_training(
    store: Store, config: Config, release_store: Callable[[], None]
) -> tuple[TrainingStore | None, Callable[[], None]]:
    """The tables in training, where they are wanted. Raises ConfigError for a name that is served as well."""
    if not config.training.enabled:
        return None, lambda: None
    try:
        training, release = await asyncio.to_thread(open_training, store.directory, config)
        if twice := sorted(set(training.tables()) & set(store.tables())):
            release()
            raise ConfigError(
                f"table {twice[0]!r} of {store.directory} is packed and in training: a name means one table; "
                "serve one of them from another directory"
            )
    except BaseException:
        release_store()
        raise
    log.info("training %s, last committed step: %s", ", ".join(training.tables()), training.step())
    return training, release


async def _follow_news(store: Store, news: asyncio.Event) -> None:
    """Take up what was packed since, each time `news` is set."""
    while True:
        await news.wait()
        news.clear()
        try:
            taken = await asyncio.to_thread(store.reload)
            log.info("SIGHUP: taken up: %s", ", ".join(taken) or "nothing new")
        except TierstoreError as error:
            log.error("SIGHUP: the tables stay as they are: %s", error)
        except Exception:
            log.exception("SIGHUP: the tables stay as they are")


async def _leave(release: Callable[[], None], timeout_s: float) -> None:
    """Close the store. A disk that hangs must not keep the process: then it ends as it is."""
    try:
        await asyncio.wait_for(asyncio.to_thread(release), timeout_s)
    except TimeoutError:
        log.error("reads still hang in the disk after %g s; leaving without them", timeout_s)
        os._exit(FORCED_EXIT)


def _on_signal(number: int, stopping: asyncio.Event) -> None:
    if stopping.is_set():
        log.warning("second signal: leaving at once")
        os._exit(FORCED_EXIT)
    log.info("received %s", signal.Signals(number).name)
    stopping.set()
