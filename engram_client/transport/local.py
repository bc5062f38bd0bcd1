"""The store in this very process. The service is found by name, so the client does not need it."""

from __future__ import annotations

import importlib
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from engram_client.errors import Cancelled, Unavailable
from engram_client.spec import TableSpec
from engram_client.transport.base import HitPath, LookupRequest
from engram_client.transport.landing import Landing
from engram_client.transport.training import OpenStep, TrainedDescription, UpdateRequest


class LocalTransport:
    """See `Transport`."""

    def __init__(self, directory: str) -> None:
        try:
            store_package: Any = importlib.import_module("tierstore.store")
        except ImportError as error:
            raise Unavailable(
                f'connect("local:{directory}") needs the service in this process, and it cannot be imported '
                f'({error}); install tierstore, or connect to a daemon with "unix:PATH" or "tcp://HOST:PORT"'
            ) from error
        self._directory = directory
        self._opened, self._release = store_package.open_store(directory)
        self._training: LocalTraining | None = None
        self._opening = threading.Lock()
        self._closed = False

    @property
    def _store(self) -> Any:
        """The store, which may be shared and so outlive this client."""
        if self._closed:
            raise Cancelled(f"the client of local:{self._directory} is closed")
        return self._opened

    def list_tables(self) -> dict[str, TableSpec]:
        training = self._training.store.tables() if self._training else {}
        return {**self._store.tables(), **training}

    def describe_table(self, name: str) -> TableSpec:
        training = self._trains(name)
        spec: TableSpec = training.store.tables()[name] if training else self._store.describe(name)
        return spec

    def lookup(self, request: LookupRequest, out: np.ndarray, timeout_s: float | None) -> None:
        training = self._trains(request.table)
        (training.store if training else self._store).lookup(request, out, timeout_s)

    def fetch(self, request: LookupRequest, entry_bytes: int, timeout_s: float | None) -> np.ndarray:
        out = np.empty((request.ids.shape[0], entry_bytes), np.uint8)
        self.lookup(request, out, timeout_s)
        return out

    def shared_view(self, spec: TableSpec, heads: tuple[int, int] | None = None) -> None:
        return None

    def hit_path(self, spec: TableSpec, heads: tuple[int, int] | None = None) -> HitPath | None:
        if heads is not None or self._trains(spec.name):
            return None
        path: HitPath | None = self._store.hit_path(spec.name, spec.generation)
        if path is None:
            return None
        return lambda keys, out: None if self._closed else path(keys, out)

    def start_lookup(self, request: LookupRequest, entry_bytes: int, timeout_s: float | None) -> None:
        """A look-up takes a thread."""

    def prepare_filling(self) -> None:
        """There is nothing to prepare."""

    def start_filling(self, request: LookupRequest, landing: Landing, timeout_s: float | None) -> None:
        """As `start_lookup`."""

    def prefetch(self, request: LookupRequest) -> bool:
        return bool(self._store.prefetch(request))

    def hbm_settings(self) -> tuple[int, str]:
        """Budget in bytes and device of the HBM tier that the configuration gives each client."""
        hbm = self._store.config.hbm
        return hbm.client_budget_bytes, hbm.device

    def fill_device(
        self, spec: TableSpec, entries: np.ndarray, orders: np.ndarray, out: Any, timeout_s: float | None
    ) -> str:
        """See `FillsDevices`."""
        way: str = self._store.bulk.read(spec.name, spec.generation, entries, orders, out, timeout_s)
        return way

    def stats(self) -> dict[str, int]:
        training = self._training.store.stats() if self._training else {}
        return {**self._store.stats(), **training}

    def set_dram_budget(self, budget_bytes: int) -> int:
        self._store.set_dram_budget(budget_bytes)
        return int(self._store.stats()["dram_budget_bytes"])

    def set_hbm_budget(self, budget_bytes: int) -> int:
        self._store.promotion.resize(budget_bytes)
        return int(self._store.stats()["hbm_budget_bytes"])

    def set_training_budget(self, budget_bytes: int, timeout_s: float | None) -> int:
        package: Any = importlib.import_module("tierstore.training")
        training = self.training().store
        package.change_training_budget(self._store, training, budget_bytes, timeout_s)
        return int(training.stats()["training_dram_bytes"])

    def training(self) -> LocalTraining:
        """Opens the training store of the directory, which stays open until this client is closed."""
        with self._opening:
            if self._training is None:
                directory = self._store.directory
                self._training = LocalTraining(
                    *importlib.import_module("tierstore.training").open_training(directory)
                )
            return self._training

    def _trains(self, name: str) -> LocalTraining | None:
        """The training store, if it is open and has this table."""
        training = self._training
        return training if training is not None and training.store.knows(name) else None

    def close(self) -> None:
        self._closed = True
        if self._training is not None:
            self._training.release()
        self._release()


class LocalTraining:
    """See `TrainingTransport`; a training store in this process."""

    def __init__(self, store: Any, release: Callable[[], None]) -> None:
        self.store, self.release = store, release

    def describe(self) -> list[TrainedDescription]:
        return list(self.store.describe())

    def update(self, request: UpdateRequest, timeout_s: float | None) -> None:
        self.store.update(request, timeout_s)

    def commit(self, step: int, timeout_s: float | None, training: str = "") -> None:
        self.store.commit(step, timeout_s, training)

    def wait_durable(self, step: int, timeout_s: float | None) -> None:
        self.store.wait_durable(step, timeout_s)

    def rollback(self, step: int, timeout_s: float | None) -> None:
        self.store.rollback(step, timeout_s)

    def steps(self) -> list[int]:
        return list(self.store.steps())

    def open_step(self, step: int | None) -> OpenStep:
        opened: OpenStep = self.store.snapshot(step)
        return opened
