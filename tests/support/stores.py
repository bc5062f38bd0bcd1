"""Small packed stores with every kind of table, and what their rows must be."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file
from tierbench.checkpoint import make_checkpoint
from tokenizers import Tokenizer, models

from tests.support.oracle import Oracle, demo_oracle, ple_oracle, tensor_bytes, v41_oracle
from tierstore.catalog import Catalog
from tierstore.config import Config, Dram, Nvme, Prefetch
from tierstore.packing import PackOptions, pack
from tierstore.store import Store, open_store
from tierstore.store.store import configured_reader
from tierstore.testing.device import Faults, SimulatedDevice

V41 = "v41"  # records of 8 rows of 264 bytes, 3 orders
V41_14 = "v41-14"  # another of these: their records share an arena
V41_ROWS = "v41-rows"  # the same rows, addressed by rows
PLE = "ple"  # records of 8 rows of 160 bytes, 2 orders; padded
DEMO = "demo"  # heads so small that row ids do not determine a key: addressed by rows
PLAIN = "plain"  # no hash scheme, rows of 24 bytes
LARGE = "large"  # rows of 10,000 bytes, three pages each
RECORD_TABLES = (V41, V41_14, PLE)
SCHEME_TABLES = (V41, V41_14, V41_ROWS, PLE, DEMO)
ROW_TABLES = (V41_ROWS, DEMO, PLAIN, LARGE)
ALL_TABLES = (V41, V41_14, V41_ROWS, PLE, DEMO, PLAIN, LARGE)
WORDS = {"[UNK]": 0, "apple": 1, "Apple": 2, "pear": 3}  # folds to 3


@dataclass(frozen=True)
class PackedStore:
    """A store directory that tests copy and never open, and the oracle of each of its tables."""

    directory: Path
    oracles: dict[str, Oracle]

    def copy_to(self, folder: Path, own: tuple[str, ...] = ()) -> Path:
        """A store of one's own; row files are shared with the original but for the tables in `own`."""
        copy = Path(shutil.copytree(self.directory, folder / "store", copy_function=_link_rows))
        for name in own:
            path = row_file(copy, name)
            shutil.copyfile(path, path.with_suffix(".own"))
            path.with_suffix(".own").replace(path)
        return copy


def _link_rows(source: str, target: str) -> str:
    (os.link if source.endswith(".rows") else shutil.copyfile)(source, target)
    return target


def row_file(directory: Path, table: str) -> Path:
    """Where the rows of a table lie."""
    with Catalog.open(directory) as catalog:
        return catalog.entry(table).path


@pytest.fixture(scope="session")
def packed(tmp_path_factory: pytest.TempPathFactory) -> PackedStore:
    """Every kind of table in one store, packed by the product from checkpoints with the real names."""
    folder = tmp_path_factory.mktemp("packed")
    store = folder / "store"
    tokenizer = folder / "tokenizer.json"
    Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]")).save(str(tokenizer))

    def checkpoint(model: str, rows: int, **options: Any) -> Path:
        return make_checkpoint(model, rows, folder / model, seed=5, hidden_size=32, **options).path

    v41 = checkpoint("deepseek-v4.1", 600, tokenizer=tokenizer)
    ple, demo = checkpoint("qwen-ple", 700), checkpoint("engram-demo", 50, tokenizer=tokenizer)
    layout = _plain_checkpoint(folder)
    for source, options in (
        (v41, PackOptions(name=V41, layers=(1,))),
        (v41, PackOptions(name=V41_14, layers=(14,))),
        (v41, PackOptions(name=V41_ROWS, layers=(14,), addressing="row")),
        (ple, PackOptions(name=PLE)),
        (demo, PackOptions(name=DEMO, layers=(15,))),
        (layout.parent, PackOptions(layout_file=layout)),
    ):
        pack(source, store, options, notify=lambda text: None, on_progress=lambda progress: None)
    oracles = {
        V41: v41_oracle(v41, 1),
        V41_14: v41_oracle(v41, 14),
        V41_ROWS: v41_oracle(v41, 14),
        PLE: ple_oracle(ple, 1),
        DEMO: demo_oracle(demo, 15),
        PLAIN: Oracle(tensor_bytes(layout.parent, "plain.weight")),
        LARGE: Oracle(tensor_bytes(layout.parent, "large.weight")),
    }
    return PackedStore(store, oracles)


def repacked_v41(folder: Path, store: Path, seed: int = 6) -> Oracle:
    """Pack other rows as the next generation of V41; the oracle of what it holds now."""
    path = make_checkpoint("deepseek-v4.1", 600, folder / "v41-anew", seed=seed, hidden_size=32).path
    options = PackOptions(name=V41, layers=(1,), replace=True)
    pack(path, store, options, notify=lambda text: None, on_progress=lambda progress: None)
    return v41_oracle(path, 1)


def _plain_checkpoint(folder: Path) -> Path:
    """Two tensors without a model, and the layout file that describes them."""
    random = np.random.default_rng(9)
    (folder / "plain").mkdir()
    tensors = {
        "plain.weight": random.integers(-128, 128, (3001, 24), np.int8),
        "large.weight": random.random((61, 2500), np.float32),
    }
    save_file(tensors, folder / "plain" / "x.safetensors")
    layout = folder / "plain" / "layout.toml"
    layout.write_text(
        "".join(f'[[table]]\nname = "{name}"\nweight = "{name}.weight"\n' for name in (PLAIN, LARGE))
    )
    return layout


def small_config(dram_bytes: int = 4 << 20, **sections: Any) -> Config:
    """Little memory, few threads; `sections` as in Config."""
    return Config(
        dram=Dram(budget_bytes=dram_bytes),
        **{"nvme": Nvme(read_threads=4, staging_bytes=2 << 20), "prefetch": Prefetch(workers=1), **sections},
    )


@dataclass
class Device:
    """A store whose reads go through a simulated device, and that device."""

    store: Store
    device: SimulatedDevice
    directory: Path


@contextmanager
def opened(directory: Path, config: Config | None = None, faults: Faults | None = None) -> Iterator[Device]:
    """Open a store over a simulated device; `connect("local:...")` meanwhile shares it."""
    config = config or small_config()
    device, release = open_simulated(directory, config, faults)
    store, release_too = open_store(directory, config)
    try:
        yield Device(store, device, directory)
    finally:
        device.heal()
        release()
        release_too()


def open_simulated(
    directory: Path, config: Config, faults: Faults | None = None
) -> tuple[SimulatedDevice, Callable[[], None]]:
    """Have the store of `directory` read through a simulated device, for whoever opens it until released."""
    made: list[SimulatedDevice] = []

    def make_reader(config: Config) -> SimulatedDevice:
        made.append(SimulatedDevice(configured_reader(config), faults, seed=1))
        return made[0]

    _, release = open_store(directory, config, make_reader=make_reader)
    return made[0], release


@pytest.fixture
def opened_store(packed: PackedStore, tmp_path: Path) -> Iterator[Device]:
    """A store of the test's own over a simulated device that does nothing wrong until told to."""
    with opened(packed.copy_to(tmp_path)) as device:
        yield device


def random_keys(oracle: Oracle, count: int, seed: int = 0, masked: float = 0.0) -> np.ndarray:
    """N-gram keys int64 [count, orders] from the whole range of keys."""
    random = np.random.default_rng(seed)
    keys = random.integers(0, 2**63 - 1, (count, oracle.orders), dtype=np.int64, endpoint=True)
    keys[random.random(keys.shape) < masked] = -1
    return keys


def random_rows(oracle: Oracle, count: int, seed: int = 0, masked: float = 0.0) -> np.ndarray:
    """Row ids int64 [count]."""
    random = np.random.default_rng(seed)
    ids = random.integers(0, oracle.rows.shape[0], count, dtype=np.int64)
    ids[random.random(count) < masked] = -1
    return ids


def eventually(condition: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    """Whether the condition comes true in time; asks again and again without a pause of its own."""
    import time

    end = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > end:
            return False
        os.sched_yield()
    return True
