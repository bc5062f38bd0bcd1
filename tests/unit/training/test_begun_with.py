"""Training on from a model: every row is as it was, decoded, until it is trained; what is wrong is told."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from engram_client import connect
from engram_client.dequantize import dequantize
from engram_client.errors import (
    BadRequest,
    DataCorrupt,
    FormatError,
    StorageError,
    TierstoreError,
    UnknownTable,
)
from engram_client.spec import Field, RowLayout
from tests.support.trained_steps import CONFIG, DEMO, DIM, PLAIN, made_store
from tests.support.training import push_of
from tests.table_sources import write_safetensors
from tierstore.cli import main
from tierstore.config import Training
from tierstore.format.decode import weights_of
from tierstore.format.geometry import PAGE_BYTES
from tierstore.snapshots import copy_step, export_step, open_step
from tierstore.training.creating import NewTable, Origin, create_training
from tierstore.training.store import TrainingStore
from tierstore.updates import Snapshot, identity

ROWS, RATE = 700, 0.5
V41 = RowLayout((Field("weight", "float8_e4m3fn", 64), Field("scale", "float8_e8m0fnu", 2)))


def float8_checkpoint(folder: Path, rows: int = ROWS) -> np.ndarray:
    """A plain checkpoint as DeepSeek's are laid out; its rows as float32, by torch."""
    rng = np.random.default_rng(5)
    weight = rng.integers(0, 0x7F, (rows, 64), dtype=np.uint8) | rng.choice(np.uint8([0, 0x80]), (rows, 64))
    scale = rng.integers(110, 135, (rows, 2), dtype=np.uint8)
    folder.mkdir(parents=True)
    tensors = {"w": ("F8_E4M3", weight), "s": ("F8_E8M0", scale)}
    write_safetensors(folder / "model.safetensors", tensors)
    (folder / "layout.toml").write_text('[[table]]\nname = "fp8"\nweight = "w"\nscale = "s"\n')
    return by_torch(V41, np.concatenate([weight, scale], axis=1))


def by_torch(layout: RowLayout, rows: np.ndarray) -> np.ndarray:
    import torch

    return dequantize(layout, rows, dtype=torch.float32).numpy()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tables of a demo model and a plain one, packed as bfloat16; those with a scheme served by records."""
    folder = tmp_path_factory.mktemp("from")
    made_store(folder / "trained")
    flags = ["--dtype", "bfloat16", "--table", DEMO[0], "--table", PLAIN, "--quiet"]
    assert main(["publish", str(folder / "trained"), str(folder / "served"), *flags]) == 0
    return folder / "served"


def served_rows(folder: Path, name: str) -> np.ndarray:
    with connect(f"local:{folder}") as client:
        table = client.table(name)
        rows = table.lookup(np.arange(table.spec.rows))
        return by_torch(table.spec.layout, rows)


def rows_of(folder: Path, number: int = 0) -> np.ndarray:
    """Whole rows uint8 of the last step."""
    with open_step(folder) as opened:
        spec = opened.tables[number]
        out = np.full((spec.rows, spec.row_bytes), 0xAA, np.uint8)
        opened.read(number, np.arange(spec.rows), out)
        return out


def trained(folder: Path, name: str, steps: int = 3, fold: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Some rows trained by SGD, perhaps folded: their ids, and what was taken from each."""
    config = Training(dram_bytes=512 << 10, staging_bytes=64 << 10, keep_steps=1, segment_bytes=256 << 10)
    store = TrainingStore.open(folder, config)
    spec = store.tables()[name]
    taken = np.zeros((spec.rows, spec.embedding_dim), np.float32)
    for step in range(steps):
        rng = np.random.default_rng([step, 1])
        ids = np.sort(rng.choice(spec.rows, 20, replace=False))
        gradients = rng.integers(-8, 9, (20, spec.embedding_dim)).astype(np.float32)
        store.update(push_of(store, step, ids, gradients, name, learning_rate=RATE), 30)
        taken[ids] += np.float32(RATE) * gradients
        store.commit(step, 30).wait(30)
        if fold:
            store._storage.fold()
    store.close()
    return np.flatnonzero(taken.any(axis=1)), taken


@pytest.mark.parametrize(
    "layout",
    [
        V41,
        RowLayout((Field("weight", "float8_e4m3fn", 12),), 0.0371),
        RowLayout((Field("weight", "int8", 12), Field("scale", "float32", 3)), 1.7),
        RowLayout((Field("weight", "float16", 6), Field("scale", "bfloat16", 1))),
        RowLayout((Field("weight", "bfloat16", 6),)),
        RowLayout((Field("weight", "float32", 6),), 3.0),
    ],
    ids=lambda layout: "-".join(f.dtype for f in layout.fields),
)
def test_numbers_are_those_that_clients_decode(layout: RowLayout) -> None:
    rows = np.random.default_rng(3).integers(0, 256, (600, layout.row_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        found = weights_of(layout, rows)
    np.testing.assert_array_equal(found, by_torch(layout, rows))


@pytest.mark.parametrize("fold", [False, True])
def test_from_served_tables_and_back(served: Path, tmp_path: Path, fold: bool) -> None:
    before = {name: served_rows(served, name) for name in (DEMO[0], PLAIN)}
    flags = ["--optimizer", "sgd", "--table", "more:100:8"]
    assert main(["create", str(tmp_path / "t"), "--from", str(served), *flags, "--quiet"]) == 0
    ids, taken = trained(tmp_path / "t", DEMO[0], fold=fold)
    for name in (DEMO[0], PLAIN):
        picked = ["--table", name]
        assert main(["publish", str(tmp_path / "t"), str(tmp_path / "new"), *picked, "--quiet"]) == 0
        found = served_rows(tmp_path / "new", name)
        expected = before[name] - (taken if name == DEMO[0] else 0)
        assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))
    assert 20 < ids.size < before[DEMO[0]].shape[0]
    with connect(f"local:{tmp_path / 'new'}") as client, connect(f"local:{served}") as old:
        spec, was = client.table(DEMO[0]).spec, old.table(DEMO[0]).spec
        assert (spec.scheme, spec.layer, spec.model, spec.addressing) == (was.scheme, 1, was.model, "record")


def test_from_a_checkpoint_with_masters_and_state(tmp_path: Path) -> None:
    """FP8 under block scales; training goes on from a copy of the step and of the folder as well."""
    import torch

    expected = float8_checkpoint(tmp_path / "model")
    origin = Origin(tmp_path / "model", layout_file=tmp_path / "model" / "layout.toml", name="mine")
    (spec,) = create_training(tmp_path / "t", [], optimizer="adam", dtype="bfloat16", origin=origin,
                              learning_rate=0.1)  # fmt: skip
    assert sorted(os.listdir(tmp_path / "t" / "training")) == [
        "base", "journal", "log", "owner.lock", "pages", "superblock", "tables.json"
    ]  # fmt: skip
    ids, _ = trained(tmp_path / "t", "mine", fold=True)
    rows = rows_of(tmp_path / "t")
    same = np.setdiff1d(np.arange(ROWS), ids)
    master = rows[:, 128 : 128 + 256].copy().view(np.float32)
    rounded = torch.from_numpy(expected).to(torch.bfloat16).view(torch.uint8).numpy()
    assert np.array_equal(master[same], expected[same]) and np.array_equal(rows[same, :128], rounded[same])
    assert not rows[same, 384:].any() and rows[ids, 384:].any(axis=1).all()  # the optimizer's state
    with open_step(tmp_path / "t") as opened:
        copy_step(opened, tmp_path / "copy")
        touched = opened.touched(0, 0, ROWS)
    os.rename(tmp_path / "t", tmp_path / "moved")
    assert np.array_equal(rows_of(tmp_path / "copy"), rows)
    assert np.array_equal(rows_of(tmp_path / "moved"), rows)
    with open_step(tmp_path / "copy") as opened:
        assert np.array_equal(opened.touched(0, 0, ROWS), touched)
    assert spec.initial.generation is not None


def test_shares_begin_with_their_rows(served: Path, tmp_path: Path) -> None:
    whole = served_rows(served, PLAIN)
    for rank in range(3):
        folder = tmp_path / str(rank)
        create_training(folder, [], optimizer="sgd", origin=Origin(served, (PLAIN,)), share=(rank, 3))
        with connect(f"local:{folder}") as client:
            client.training().commit(0)
        found = rows_of(folder).view(np.float32)
        assert np.array_equal(found, whole[rank::3])
    shares = [str(tmp_path / str(rank)) for rank in range(3)]
    assert main(["snapshot", *shares, str(tmp_path / "together"), "--quiet"]) == 0
    assert np.array_equal(rows_of(tmp_path / "together").view(np.float32), whole)


def test_tables_are_linked_or_else_copied(
    served: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))

    origin = Origin(served, (PLAIN,))
    create_training(tmp_path / "linked", [], optimizer="sgd", origin=origin)
    monkeypatch.setattr(os, "link", refuse)
    with monkeypatch.context() as full:
        full.setattr(os, "fstatvfs", lambda _: SimpleNamespace(f_bavail=3, f_frsize=4096))
        with pytest.raises(StorageError, match=r"No space left on device for \d{5} bytes of .*words"):
            create_training(tmp_path / "copied", [], optimizer="sgd", origin=origin)
    assert not list((tmp_path / "copied").rglob("*.rows"))
    create_training(tmp_path / "copied", [], optimizer="sgd", origin=origin)
    linked, copied = (
        tmp_path / kind / "training" / "base" / f"{PLAIN}.rows" for kind in ("linked", "copied")
    )
    assert linked.stat().st_nlink > 1 and copied.stat().st_nlink == 1
    assert linked.read_bytes() == copied.read_bytes()


def test_what_was_killed_is_no_store_and_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = float8_checkpoint(tmp_path / "model")
    origin = Origin(tmp_path / "model", layout_file=tmp_path / "model" / "layout.toml")
    folder = tmp_path / "t"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    for module, function in ((identity, "write_identity"), (identity, "bring_bases")):
        with monkeypatch.context() as broken:
            broken.setattr(module, function, killed)
            with pytest.raises(KeyboardInterrupt):
                create_training(folder, [NewTable("left", 10, 4)], optimizer="sgd", origin=origin)
        with pytest.raises(FormatError, match="holds no training store"):
            TrainingStore.open(folder, CONFIG)
    (folder / "training" / "base" / "left.rows").write_bytes(b"of a create that was killed")
    create_training(folder, [], optimizer="sgd", origin=origin)
    assert (
        os.listdir(folder / "training" / "pages") == os.listdir(folder / "training" / "base") == ["fp8.rows"]
    )
    ids, _ = trained(folder, "fp8", steps=1)
    found = rows_of(folder).view(np.float32)
    assert np.array_equal(np.delete(found, ids, axis=0), np.delete(expected, ids, axis=0))
    with pytest.raises(BadRequest, match="holds a training store already"):
        create_training(folder, [], optimizer="sgd", origin=origin)


def test_refusals_say_what_there_is(served: Path, tmp_path: Path) -> None:
    def refused(error: type[TierstoreError], says: str, folder: Path = tmp_path / "t", **origin: Any) -> None:
        with pytest.raises(error, match=says):
            create_training(folder, [], optimizer="sgd", origin=Origin(**{"path": served, **origin}))
        assert not (folder / "training" / "tables.json").exists()

    refused(UnknownTable, rf"no table 'word' in .*; there are: {DEMO[0]}, {PLAIN}", tables=("word",))
    refused(BadRequest, "gives 2 .*choose one with --table NAME", name="mine")
    refused(BadRequest, f"there are: {DEMO[0]}, {PLAIN}", layers=(7,))
    refused(BadRequest, "a name means one table", folder=served)
    refused(FormatError, "does not exist; give a store directory", path=tmp_path / "nothing")
    create_training(tmp_path / "learns", [NewTable("words", 9, 4)], optimizer="sgd")
    refused(BadRequest, "tables in training; .*tierstore export", path=tmp_path / "learns")
    opaque = tmp_path / "opaque"
    opaque.mkdir()
    write_safetensors(opaque / "a.safetensors", {"w": ("U8", np.zeros((9, 90), np.uint8))})
    (opaque / "layout.toml").write_text('[[table]]\nname = "nf4"\nweight = "w"\n')
    refused(BadRequest, "uint8, which is opaque", path=opaque, layout_file=opaque / "layout.toml")
    (opaque / "layout.toml").write_text('[[table]]\nname = "nf4"\nweight = "v"\n')
    shutil.rmtree(tmp_path / "t")
    refused(FormatError, "'v'", path=opaque, layout_file=opaque / "layout.toml")
    assert not (tmp_path / "t").exists()


def test_another_base_is_refused_and_a_damaged_page_named(served: Path, tmp_path: Path) -> None:
    create_training(tmp_path, [], optimizer="sgd", origin=Origin(served, (PLAIN,)))
    path = tmp_path / "training" / "base" / f"{PLAIN}.rows"
    whole = path.read_bytes()
    path.unlink()  # the link: the served file must stay
    with pytest.raises(FormatError, match=rf"{PLAIN}.rows is missing.*copy generation [0-9a-f]{{32}} there"):
        TrainingStore.open(tmp_path, CONFIG)
    create_training(tmp_path / "other", [], optimizer="sgd", origin=Origin(served, (DEMO[0],)))
    other = (tmp_path / "other" / "training" / "base" / f"{DEMO[0]}.rows").read_bytes()
    path.write_bytes(other)
    with pytest.raises(FormatError, match=r"is not what table .* expected \('[0-9a-f]{32}', 3001, 8"):
        TrainingStore.open(tmp_path, CONFIG)
    damaged = bytearray(whole)
    damaged[-PAGE_BYTES + 100] ^= 1
    path.write_bytes(damaged)
    store = TrainingStore.open(tmp_path, CONFIG)
    try:
        with store_snapshot(store) as rows:
            out = np.zeros((1, DIM * 4), np.uint8)
            rows.read(0, np.array([0]), out)
            says = r"page \d+ of .*base.*damaged \(rows 2805 to 3000 there\)"
            with pytest.raises(DataCorrupt, match=says):
                rows.read(0, np.array([2900]), out)
    finally:
        store.close()


def store_snapshot(store: TrainingStore) -> Snapshot:
    store.commit(0, 30).wait(30)
    return store.snapshot()


def test_exports_hold_rows_that_were_never_trained(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    expected = float8_checkpoint(tmp_path / "model")
    origin = Origin(tmp_path / "model", layout_file=tmp_path / "model" / "layout.toml")
    create_training(tmp_path / "t", [], optimizer="sgd", origin=origin)
    ids, taken = trained(tmp_path / "t", "fp8")
    with open_step(tmp_path / "t") as opened:
        done = export_step(opened, tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")[done.tables["fp8"]]
    assert np.array_equal(found[np.setdiff1d(np.arange(ROWS), ids)], np.delete(expected, ids, axis=0))
    np.testing.assert_allclose(found[ids], (expected - taken)[ids], rtol=1e-6)
