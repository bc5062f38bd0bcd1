"""A committed step as a checkpoint: every bit of it, packed again, and while training goes on."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from engram_client.errors import BadRequest, DataCorrupt, StorageError, UnknownTable
from tests.support.trained_steps import CONFIG, DEMO, DIM, PLAIN, ROUNDED, all_rows, made_store, train
from tierstore.cli import main
from tierstore.format.rowfile import RowFile
from tierstore.packing import PackOptions, pack
from tierstore.snapshots import export_step, open_step, rows
from tierstore.training.store import TrainingStore
from tierstore.updates import RowStorage

DEMO_WEIGHT = "layers.{}.engram.multi_head_embedding.embedding.weight"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 0 to 2; tests leave it as it is."""
    return made_store(tmp_path_factory.mktemp("trained"))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "BATCH_BYTES", 10_000)


def expected(folder: Path, step: int | None = None) -> dict[str, dict[str, np.ndarray]]:
    """Every field of every table as bytes, by one read each."""
    with open_step(folder, step) as opened:
        found = {}
        for number, spec in enumerate(opened.tables):
            whole, at = all_rows(opened, number), 0
            found[spec.name] = {}
            for field in spec.layout.fields:
                found[spec.name][field.name] = np.ascontiguousarray(whole[:, at : at + field.bytes])
                at += field.bytes
        return found


def raw(path: Path, name: str) -> np.ndarray:
    """A tensor's bytes, uint8 [rows, bytes], by the file's own header."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entry = json.loads(data[8:start])[name]
    first, last = entry["data_offsets"]
    return np.frombuffer(data[start + first : start + last], np.uint8).reshape(entry["shape"][0], -1)


def test_every_field_of_every_row_is_there(trained: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["export", str(trained), str(out), "--with-optimizer", "--quiet"]) == 0
    file = out / "model.safetensors"
    for table, fields in expected(trained).items():
        layer = table.removeprefix("engram.layer")
        weight = DEMO_WEIGHT.format(layer) if table in DEMO else f"{table}.weight"
        assert len(fields) == (4 if table == ROUNDED else 3)
        for name, value in fields.items():
            assert np.array_equal(raw(file, weight.removesuffix("weight") + name), value), (table, name)
    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    assert metadata["step"] == "2"
    assert json.loads(metadata["tables"])[PLAIN]["optimizer"]["optimizer"] == "adam"
    assert all(t["updates"] == 3 for t in json.loads(metadata["state"])["tables"].values())
    assert sorted(os.listdir(tmp_path)) == ["out"]
    assert sorted(os.listdir(out)) == ["config.json", "layout.json", "model.safetensors"]


def test_it_can_be_packed_again(trained: Path, tmp_path: Path) -> None:
    """By the model's own names, and all tables by the layout file."""
    out, weights = tmp_path / "out", expected(trained)
    assert main(["export", str(trained), str(out), "--quiet"]) == 0
    by_name = PackOptions(addressing="row")
    by_layout = PackOptions(addressing="row", model="plain", layout_file=out / "layout.json")
    for options, store, named in ((by_name, "a", "engram-demo.layer{}"), (by_layout, "b", "engram.layer{}")):
        report = pack(out, tmp_path / store, options, notify=lambda _: None, on_progress=lambda _: None)
        packed = {t.spec.name: t for t in report.tables}
        wanted = {named.format(layer): weights[f"engram.layer{layer}"]["weight"] for layer in (1, 15)}
        if store == "b":
            wanted |= {name: weights[name]["weight"] for name in (PLAIN, ROUNDED)}
        assert packed.keys() == wanted.keys()
        with open_step(trained) as opened:
            schemes = {spec.layer: spec.scheme for spec in opened.tables if spec.layer}
        for name, value in wanted.items():
            file = RowFile.open(packed[name].path)
            found = np.fromfile(packed[name].path, np.uint8)
            geometry = file.header.geometry
            starts = np.array([geometry.offset_of_row(row) for row in range(geometry.rows)])
            assert np.array_equal(found[starts[:, None] + np.arange(geometry.row_bytes)], value)
            if file.spec.layer is not None:
                assert file.spec.scheme == schemes[file.spec.layer]


def test_an_export_is_the_committed_step_while_training_goes_on(tmp_path: Path) -> None:
    made_store(tmp_path / "store")
    store = TrainingStore.open(tmp_path / "store", CONFIG)
    try:
        with store.snapshot(1) as before:
            wanted = all_rows(before, 2)
        stop = threading.Event()
        trained: list[int] = []

        def go_on() -> None:
            for step in range(3, 10_000):
                if stop.is_set():
                    return
                train(store, range(step, step + 1))
                trained.append(step)

        thread = threading.Thread(target=go_on)
        seen: list[int] = []
        with store.snapshot(1) as opened:
            thread.start()

            def on_progress(_progress: object) -> None:
                """So that there are steps between any two batches, in spite of the system's scheduler."""
                before = len(trained)
                while len(trained) == before and thread.is_alive() and len(seen) < 5:
                    stop.wait(0.001)
                seen.append(len(trained))

            try:
                export_step(opened, tmp_path / "out", with_optimizer=True, on_progress=on_progress)
            finally:
                stop.set()
                thread.join()
        assert seen[-1] >= 5
        with store.snapshot() as now:
            assert not np.array_equal(all_rows(now, 2), wanted)
    finally:
        store.close()
    found = [
        raw(tmp_path / "out" / "model.safetensors", f"{PLAIN}.{n}") for n in ("weight", "adam_m", "adam_v")
    ]
    assert np.array_equal(np.concatenate(found, axis=1), wanted)
    assert wanted.shape == (3001, 3 * 4 * DIM)


def test_what_is_wrong_is_said(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    with open_step(trained) as opened:
        with pytest.raises(UnknownTable, match=r"no table 'none' .* it trains: engram\.layer1, "):
            export_step(opened, out, tables=["none"])
        with pytest.raises(BadRequest, match="exists already"):
            export_step(opened, trained)
        assert main(["export", str(trained), str(out)]) == 4
        assert f"pid {os.getpid()}" in capsys.readouterr().err
    with (
        pytest.raises(BadRequest, match="step 9 is not kept; steps that can be gone back to: 0, 1, 2"),
        open_step(trained, 9),
    ):
        pass
    assert main(["export", str(tmp_path), str(out)]) == 3
    assert "holds no training store" in capsys.readouterr().err
    assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_nothing(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_space(_fd: int, _offset: int, _count: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", no_space)
    refused = pytest.raises(StorageError, match=r"too little room .*: \d{6,} bytes are wanted, \d+ are free")
    with open_step(trained) as opened, refused:
        export_step(opened, tmp_path / "out")
    assert os.listdir(tmp_path) == []


def test_a_damaged_page_is_named_and_nothing_is_left(tmp_path: Path) -> None:
    folder = made_store(tmp_path / "store", steps=6)
    config = CONFIG.__class__(keep_steps=1, segment_bytes=256 << 10)
    with RowStorage.open(folder / "training", config, background=False) as storage:
        assert storage.fold()
        path = folder / "training" / "pages" / f"{PLAIN}.rows"
        page = (
            int(np.flatnonzero(storage._opened.pages[2].epochs)[0])
            + storage._opened.pages[2].geometry.first_page
        )
    with path.open("r+b") as file:
        file.seek(page * 4096 + 100)
        byte = file.read(1)[0]
        file.seek(page * 4096 + 100)
        file.write(bytes([byte ^ 1]))
    with open_step(folder) as opened, pytest.raises(DataCorrupt, match=rf"page {page} of .*'words', rows"):
        export_step(opened, tmp_path / "out")
    assert os.listdir(tmp_path) == ["store"]
