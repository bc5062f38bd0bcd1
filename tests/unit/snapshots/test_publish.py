"""The weights of a committed step as a generation: which bits, addressed how, and what is left on failure."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engram_client import connect
from engram_client.errors import BadRequest, StorageError, StoreLocked
from engram_client.spec import Field, RowLayout
from tests.support.trained_steps import CONFIG, DEMO, PLAIN, ROUNDED, all_rows, made_store, train
from tierstore.catalog import Catalog
from tierstore.cli import main
from tierstore.packing.claim import claim
from tierstore.snapshots import open_step, publish, publish_step, rows
from tierstore.snapshots.weights import Weights
from tierstore.training.store import TrainingStore


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_store(tmp_path_factory.mktemp("trained"))


def weights_of(folder: Path, name: str, step: int | None = None, field: str = "weight") -> np.ndarray:
    """uint8 [rows, field bytes], of a store that nobody has open."""
    with open_step(folder, step) as opened:
        number = next(i for i, spec in enumerate(opened.tables) if spec.name == name)
        layout = opened.tables[number].layout
        start = layout.offset_bytes(field)
        return all_rows(opened, number)[:, start : start + layout.field(field).bytes]


def test_two_steps_are_two_generations(trained: Path, tmp_path: Path) -> None:
    store, chosen = tmp_path / "store", [DEMO[1], PLAIN]
    flags = [flag for name in chosen for flag in ("--table", name)]
    for step in (1, 2):
        assert main(["publish", str(trained), str(store), "--step", str(step), *flags, "--quiet"]) == 0
    wanted = {(name, step): weights_of(trained, name, step) for name in chosen for step in (1, 2)}
    with Catalog.open(store) as catalog:
        assert catalog.tables().keys() == set(chosen) and len(catalog.retired) == 2
        assert catalog.entry(DEMO[1]).spec.addressing == "record"
    assert main(["verify", str(store)]) == 0
    for step in (2, 1):
        with connect(f"local:{store}") as client:
            for name in chosen:
                assert np.array_equal(
                    client.table(name).lookup(np.arange(wanted[name, step].shape[0])), wanted[name, step]
                )
            demo = client.table(DEMO[1])
            keys = np.random.default_rng(3).integers(0, 2**62, (50, 2))
            scheme = demo.spec.scheme
            assert scheme is not None and demo.spec.layer == 15
            sizes, offsets = np.array(scheme.head_sizes), np.array(scheme.head_offsets)
            ids = keys[:, :, None] % sizes + offsets
            found, expected = demo.lookup_ngrams(keys), wanted[DEMO[1], step]
            assert np.array_equal(found.reshape(-1, found.shape[-1]), expected[ids.reshape(-1)])
        for name in chosen:
            assert main(["rollback", str(store), name]) == 0
    assert os.listdir(store / "packing") == []


def test_weights_in_either_precision(trained: Path, tmp_path: Path) -> None:
    """float32 of rounded weights is the master; bfloat16 of float32 is what torch makes of them."""
    with open_step(trained) as opened:
        publish_step(opened, tmp_path, tables=[ROUNDED], dtype="float32", name="masters")
        publish_step(opened, tmp_path, tables=[PLAIN], dtype="bfloat16")
    exact = torch.from_numpy(weights_of(trained, PLAIN).copy().view(np.float32))
    rounded = exact.to(torch.bfloat16).view(torch.uint8).numpy()
    with connect(f"local:{tmp_path}") as client:
        masters = client.table("masters").lookup(np.arange(700))
        assert np.array_equal(masters, weights_of(trained, ROUNDED, field="master"))
        assert np.array_equal(client.table(PLAIN).lookup(np.arange(3001)), rounded)


def test_rounding_and_widening_any_number() -> None:
    rng = np.random.default_rng(8)
    bits = np.concatenate([
        rng.integers(0, 2**32, 20_000, dtype=np.uint32),
        np.array([0x7F800000, 0xFF800000, 0x7F7FFFFF, 0x00008000, 0x00018000, 0x80000001], np.uint32),
    ])  # fmt: skip
    numbers = torch.from_numpy(bits.view(np.float32).reshape(-1, 1))
    layout = RowLayout((Field("weight", "float32", 1),))
    found = Weights(layout, "bfloat16").of(bits.view(np.uint8).reshape(-1, 4)).view(np.uint16).ravel()
    expected = numbers.to(torch.bfloat16).view(torch.uint16).numpy().ravel()
    is_nan = np.isnan(bits.view(np.float32))
    assert is_nan.sum() > 50
    assert np.array_equal(found[~is_nan], expected[~is_nan])
    wide = Weights(RowLayout((Field("weight", "bfloat16", 1),)), "float32").of(
        found.view(np.uint8).reshape(-1, 2)
    )
    assert np.isnan(wide.view(np.float32).ravel()[is_nan]).all()
    assert np.array_equal(wide.view(np.uint32).ravel() >> 16, found)


def test_a_generation_is_published_while_its_step_is_trained_on(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(rows, "BATCH_BYTES", 10_000)
    folder = made_store(tmp_path / "store")
    wanted = weights_of(folder, PLAIN)
    store = TrainingStore.open(folder, CONFIG)
    steps = iter(range(3, 1000))
    try:
        with store.snapshot() as opened:
            read = opened.read

            def train_and_read(*args: Any) -> None:
                step = next(steps)
                train(store, range(step, step + 1))
                read(*args)

            monkeypatch.setattr(opened, "read", train_and_read)
            publish_step(opened, tmp_path / "served", tables=[PLAIN])
    finally:
        store.close()
    assert next(steps) > 10
    with connect(f"local:{tmp_path / 'served'}") as client:
        assert np.array_equal(client.table(PLAIN).lookup(np.arange(3001)), wanted)


def refuse(*_: object) -> None:
    raise StorageError("full")


@pytest.mark.parametrize("moment", ["second table", "catalog"])
def test_a_failure_leaves_nothing(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Whatever happens, a layer of the new step alone is not current."""
    with open_step(trained) as opened:
        publish_step(opened, tmp_path, tables=[PLAIN, ROUNDED])
        with Catalog.open(tmp_path) as catalog:
            before = {name: entry.spec for name, entry in catalog.tables().items()}
        files = sorted(tmp_path.rglob("*.rows"))
        finish: Callable[..., Path] = publish.finish

        def fail_at_second(job: Any, *rest: Any) -> Path:
            if job.spec.name == ROUNDED:
                raise StorageError("the disk is full")
            return finish(job, *rest)

        if moment == "catalog":
            monkeypatch.setattr(Catalog, "publish_together", refuse)
        else:
            monkeypatch.setattr(publish, "finish", fail_at_second)
        with pytest.raises(StorageError, match="full"):
            publish_step(opened, tmp_path, tables=[PLAIN, ROUNDED])
    with Catalog.open(tmp_path) as catalog:
        assert {name: entry.spec for name, entry in catalog.tables().items()} == before
    assert sorted(tmp_path.rglob("*.rows")) == files
    assert os.listdir(tmp_path / "packing") == []


def leftovers(folder: Path) -> list[str]:
    """What lies in a store directory beside its catalog and the generations in it."""
    with Catalog.open(folder) as catalog:
        known = {entry.path for entry in (*catalog.tables().values(), *catalog.retired)}
    found = [path for path in folder.rglob("*") if path.is_file() and "catalog" not in path.parts]
    return sorted(str(path.relative_to(folder)) for path in found if path not in known)


@pytest.mark.parametrize("moment", ["while it writes", "between two tables", "before the catalog"])
def test_what_a_killed_publication_leaves_goes_with_the_next(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    """Of another table even; and row files that lie there for other reasons stay."""
    with open_step(trained) as opened:
        publish_step(opened, tmp_path, tables=[PLAIN])
    stranger = tmp_path / "tables" / PLAIN / ("a" * 32 + ".rows")
    stranger.write_bytes(b"to be adopted")
    pid = os.fork()
    if pid == 0:
        if moment == "before the catalog":
            monkeypatch.setattr(Catalog, "publish_together", lambda *_: os._exit(9))
        write, written = publish.write_rows, list[int]()

        def die(*arguments: Any) -> None:
            if moment == "between two tables" and written:
                os._exit(9)
            write(*arguments)
            written.append(1)
            if moment == "while it writes":
                os._exit(9)

        monkeypatch.setattr(publish, "write_rows", die)
        with open_step(trained) as opened:
            publish_step(opened, tmp_path, tables=[PLAIN, ROUNDED])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    assert len(leftovers(tmp_path)) >= 3
    with open_step(trained) as opened:
        again = publish_step(opened, tmp_path, tables=[ROUNDED])
    assert again.replaced == {}
    assert leftovers(tmp_path) == [str(stranger.relative_to(tmp_path))]
    assert all(not any(path.iterdir()) for path in (tmp_path / "packing").iterdir())
    assert main(["verify", str(tmp_path), "--quiet"]) == 0


def test_a_disk_that_becomes_full_is_said_and_what_is_served_stays(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open_step(trained) as opened:
        before = publish_step(opened, tmp_path, tables=[PLAIN]).tables[0].spec.generation

        def no_room(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", no_room)
        expected = (
            r"the disk became full \(No space left on device\) to publish step \d+ as 'words' "
            r"\(\d+ bytes\): "
            rf"\d+ bytes are wanted, \d+ are free; what had been written was removed, generation {before} of "
            r"'words' is served as before: make room, .* and publish again"
        )
        with pytest.raises(StorageError, match=expected):
            publish_step(opened, tmp_path, tables=[PLAIN])
        assert leftovers(tmp_path) == []
        monkeypatch.undo()
        assert publish_step(opened, tmp_path, tables=[PLAIN]).replaced == {PLAIN: before}


def test_what_is_wrong_is_said(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_step(trained) as opened:
        with pytest.raises(BadRequest, match=r"'one' is for one table, these are 4 \(engram"):
            publish_step(opened, tmp_path, name="one")
        with pytest.raises(BadRequest, match="cannot be a file name"):
            publish_step(opened, tmp_path, tables=[PLAIN], name="../x")
        with pytest.raises(BadRequest, match="float32 or bfloat16, got 'int8'"):
            publish_step(opened, tmp_path, dtype="int8")
        with pytest.raises(BadRequest, match=r"trains a table 'words' itself.*--as NAME"):
            publish_step(opened, trained, tables=[PLAIN])
        with (
            claim(tmp_path / "packing" / PLAIN, "x"),
            pytest.raises(StoreLocked, match="'words' is being packed"),
        ):
            publish_step(opened, tmp_path, tables=[PLAIN])
        monkeypatch.setattr(publish, "_free_bytes", lambda _: 1000)
        little = (
            r"little room to publish step 2 as 'words' \(\d+ bytes\): \d{8} bytes are wanted, 1000 are free; "
            "nothing was written, none of these is served there yet: make room"
        )
        with pytest.raises(StorageError, match=little):
            publish_step(opened, tmp_path, tables=[PLAIN])
    with Catalog.open(tmp_path) as catalog:
        assert not catalog.tables()
