"""Tables packed while a daemon serves: taken up without a restart, and never a row of another generation."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from tierbench.checkpoint import make_checkpoint

from engram_client import Client, Table, connect, errors
from tests.support.daemon import Daemon, running, serve_command
from tests.support.oracle import Oracle, v41_oracle
from tests.support.shared_memory import SMALL, attached, grown, mailbox_of
from tests.support.stores import (
    PLAIN,
    V41,
    V41_14,
    PackedStore,
    eventually,
    opened,
    random_keys,
    repacked_v41,
    row_file,
    small_config,
)
from tierstore.cli import main
from tierstore.config import Extent, Serve
from tierstore.packing import PackOptions, pack

LATE = "packed-late"


@pytest.fixture
def live(packed: PackedStore, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Daemon]:
    """A daemon whose store, at tmp_path / "store", tests pack into; earlier generations go at once."""
    folder = packed.copy_to(tmp_path, own=(V41,))
    command = serve_command(
        folder,
        serve_unix=tmp_path / "s",
        serve_tcp="127.0.0.1:0",
        extent_budget_bytes="4MiB",
        serve_earlier_generation_s=getattr(request, "param", 0),
        **SMALL,
    )
    with running(command, tmp_path) as daemon:
        yield daemon


in_time = pytest.mark.parametrize("live", [3600], indirect=True)  # for clients to move over


def packed_late(folder: Path, store: Path) -> Oracle:
    path = make_checkpoint("deepseek-v4.1", 600, folder / LATE, seed=8, hidden_size=32).path
    options = PackOptions(name=LATE, layers=(1,))
    pack(path, store, options, notify=lambda text: None, on_progress=lambda progress: None)
    return v41_oracle(path, 1)


def generation_of(client: Client) -> str:
    return client.table(V41).spec.generation


def is_over(table: Table, keys: np.ndarray) -> bool:
    try:
        table.lookup_ngrams(keys)
    except errors.GenerationMismatch:
        return True
    return False


def opened_files(daemon: Daemon) -> list[str]:
    root = Path(f"/proc/{daemon.process.pid}/fd")
    return [os.readlink(root / fd) for fd in os.listdir(root) if (root / fd).is_symlink()]


def test_a_table_packed_while_serving_is_there_when_asked_for(
    packed: PackedStore, live: Daemon, tmp_path: Path
) -> None:
    oracle = packed.oracles[V41]
    with connect(live.unix) as client, connect(live.tcp) as remote:
        table, keys = client.table(V41), random_keys(oracle, 40, seed=1)
        assert np.array_equal(table.lookup_ngrams(keys), oracle.lookup_ngrams(keys))
        with pytest.raises(errors.UnknownTable, match="packed since"):
            client.table(LATE)
        late, mailbox = packed_late(tmp_path, tmp_path / "store"), mailbox_of(client)
        assert LATE not in client.tables()
        new = client.table(LATE)
        assert LATE in remote.tables()
        known = (LATE, new.spec.generation)
        assert eventually(lambda: known in client._transport._link.attachment._tables)  # type: ignore[attr-defined]
        before = client.stats()
        for found in (new, remote.table(LATE), new):
            assert np.array_equal(found.lookup_ngrams(keys), late.lookup_ngrams(keys))
        counted = grown(client, before, "shm_requests", "records_read", "dram_hits", "tables_served")
        assert counted == {
            "shm_requests": 1, "records_read": keys.size, "dram_hits": 2 * keys.size, "tables_served": 0,
        }  # fmt: skip
        assert np.array_equal(table.lookup_ngrams(keys), oracle.lookup_ngrams(keys))
        assert mailbox_of(client) is mailbox, "nobody was disturbed"


def test_a_new_generation_takes_over_on_sighup(packed: PackedStore, live: Daemon, tmp_path: Path) -> None:
    """Who reads meanwhile gets the rows of the generation he asked for, or GenerationMismatch."""
    oracle, store = packed.oracles[V41], tmp_path / "store"
    keys = random_keys(oracle, 60, seed=2)
    expected = oracle.lookup_ngrams(keys)
    old_file = str(row_file(store, V41))

    def read_until_it_is_gone(table: Table) -> str:
        try:
            while True:
                assert np.array_equal(table.lookup_ngrams(keys), expected)
        except errors.GenerationMismatch as error:
            return str(error)

    with connect(live.unix) as client, connect(live.tcp) as remote, ThreadPoolExecutor(2) as threads:
        tables = [client.table(V41), remote.table(V41)]
        before, old = client.stats(), generation_of(client)
        reading = [threads.submit(read_until_it_is_gone, table) for table in tables]
        anew = repacked_v41(tmp_path, store)
        assert generation_of(client) == old, "only when told to"
        assert not any(each.done() for each in reading)
        live.signal(signal.SIGHUP)
        for each in reading:
            assert "packed again" in each.result(60)
        for _ in range(2):
            for each in (client, remote):
                assert np.array_equal(each.table(V41).lookup_ngrams(keys), anew.lookup_ngrams(keys))
        with pytest.raises(errors.GenerationMismatch):
            tables[0].lookup_ngrams(keys[:1])
        other = client.table(V41_14).lookup_ngrams(keys)
        assert np.array_equal(other, packed.oracles[V41_14].lookup_ngrams(keys))
        assert grown(client, before, "shm_clients") == {"shm_clients": 0}
        assert attached(client)
        assert eventually(lambda: old_file not in opened_files(live))


@in_time
def test_both_generations_answer_until_clients_have_moved_over(
    packed: PackedStore, live: Daemon, tmp_path: Path
) -> None:
    """In shared memory and over gRPC, hits and misses; and a rollback has them change places, warm."""
    oracle, store = packed.oracles[V41], tmp_path / "store"
    keys = random_keys(oracle, 60, seed=12)
    old_rows = oracle.lookup_ngrams(keys)
    with connect(live.unix) as client, connect(live.tcp) as remote:
        old = [client.table(V41), remote.table(V41)]
        assert np.array_equal(old[0].lookup_ngrams(keys[:30]), old_rows[:30])
        anew = repacked_v41(tmp_path, store)
        new_rows = anew.lookup_ngrams(keys)
        live.signal(signal.SIGHUP)
        assert eventually(lambda: generation_of(client) != old[0].spec.generation)
        new = [client.table(V41), remote.table(V41)]

        def both_are_right() -> bool:
            return all(
                np.array_equal(table.lookup_ngrams(keys), rows)
                for tables, rows in ((old, old_rows), (new, new_rows))
                for table in tables
            )

        assert both_are_right()
        assert client.stats()["tables_earlier"] == 1

        assert main(["rollback", str(store), V41, "--to", old[0].spec.generation[:8]]) == 0
        live.signal(signal.SIGHUP)
        assert eventually(lambda: generation_of(client) == old[0].spec.generation)
        before = client.stats()
        assert both_are_right()
        assert np.array_equal(remote.table(V41).lookup_ngrams(keys), old_rows)
        assert grown(client, before, "records_read") == {"records_read": 0}, "nothing was forgotten"

        anew_again = repacked_v41(tmp_path / "again", store, seed=78)
        live.signal(signal.SIGHUP)
        assert eventually(lambda: generation_of(client) not in {t.spec.generation for t in (*old, *new)})
        for table in new:  # of the two earlier ones, the elder
            assert eventually(lambda table=table: is_over(table, keys))
        assert np.array_equal(old[1].lookup_ngrams(keys), old_rows)
        assert np.array_equal(client.table(V41).lookup_ngrams(keys), anew_again.lookup_ngrams(keys))


def test_an_earlier_generation_has_its_time(packed: PackedStore, tmp_path: Path) -> None:
    folder, keys = packed.copy_to(tmp_path, own=(V41,)), random_keys(packed.oracles[V41], 30, seed=13)
    config = small_config(serve=Serve(earlier_generation_s=0.2))
    with opened(folder, config) as device, connect(f"local:{folder}") as client:
        table = client.table(V41)
        for _ in range(2):
            assert np.array_equal(table.lookup_ngrams(keys), packed.oracles[V41].lookup_ngrams(keys))
        repacked_v41(tmp_path, folder)
        assert device.store.reload() == [V41]
        assert eventually(lambda: device.store.stats()["tables_earlier"] == 0)
        with pytest.raises(errors.GenerationMismatch):
            table.lookup_ngrams(keys)  # though DRAM still holds them


def test_rolling_back_what_is_not_there(
    packed: PackedStore, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = packed.copy_to(tmp_path, own=(V41,))
    assert main(["rollback", str(folder), "nothing"]) == 2
    assert main(["rollback", str(folder), V41]) == 2
    told = capsys.readouterr().err
    assert "no table 'nothing'" in told
    assert "no earlier generation is kept; kept: none" in told
    old = row_file(folder, V41)
    repacked_v41(tmp_path, folder)
    old.write_bytes(b"nonsense")
    assert main(["rollback", str(folder), V41]) == 3
    assert "is not a row file" in capsys.readouterr().err


def test_a_request_ends_with_the_generation_it_began_with(
    packed: PackedStore, obedient: Daemon, tmp_path: Path
) -> None:
    oracle, store = packed.oracles[V41], tmp_path / "store"
    keys = random_keys(oracle, 10, seed=3)
    with connect(obedient.unix) as client, ThreadPoolExecutor(1) as threads:
        table, old = client.table(V41), generation_of(client)
        obedient.ask("hold")
        reading = threads.submit(table.lookup_ngrams, keys, timeout=None)
        obedient.ask("wait 1")
        anew = repacked_v41(tmp_path, store)
        obedient.signal(signal.SIGHUP)
        assert eventually(lambda: generation_of(client) != old)
        obedient.ask("release")
        assert np.array_equal(reading.result(30), oracle.lookup_ngrams(keys))
        assert np.array_equal(client.table(V41).lookup_ngrams(keys), anew.lookup_ngrams(keys))


def test_a_damaged_generation_changes_nothing(packed: PackedStore, live: Daemon, tmp_path: Path) -> None:
    oracle, store = packed.oracles[V41], tmp_path / "store"
    keys = random_keys(oracle, 10, seed=4)
    with connect(live.unix) as client:
        table = client.table(V41)
        repacked_v41(tmp_path, store)
        with row_file(store, V41).open("r+b") as file:
            file.write(b"nonsense")
        live.signal(signal.SIGHUP)
        assert eventually(lambda: "taken up: nothing new" in live.log)
        assert "table 'v41' is not served" in live.log
        assert np.array_equal(table.lookup_ngrams(keys), oracle.lookup_ngrams(keys))
        assert client.stats()["tables_damaged"] == 0


def test_records_of_a_size_without_an_arena_are_read(tmp_path: Path, packed: PackedStore) -> None:
    """The same in this process; DRAM is shared out at the start, so they are not cached before the next."""
    layout = packed.directory.parent / "plain" / "layout.toml"
    options = PackOptions(layout_file=layout)
    store = tmp_path / "store"
    pack(layout.parent, store, options, notify=lambda text: None, on_progress=lambda progress: None)
    with opened(store) as device, connect(f"local:{store}") as client:
        assert np.array_equal(client.table(PLAIN).lookup([5]), packed.oracles[PLAIN].rows[[5]])
        late = packed_late(tmp_path, store)
        keys = random_keys(late, 20, seed=5)
        table = client.table(LATE)
        for _ in range(2):
            assert np.array_equal(table.lookup_ngrams(keys), late.lookup_ngrams(keys))
        assert device.store.stats()["records_read"] >= 2 * keys.size


def test_a_restart_finds_the_cache_of_what_was_taken_up(packed: PackedStore, tmp_path: Path) -> None:
    """Warm, under the generation that the records are of; in this process, where handles end as well."""
    folder, keys = packed.copy_to(tmp_path, own=(V41,)), random_keys(packed.oracles[V41], 30, seed=6)
    config = small_config(extent=Extent(budget_bytes=4 << 20), serve=Serve(earlier_generation_s=0))
    with opened(folder, config) as device, connect(f"local:{folder}") as client:
        table = client.table(V41)
        assert np.array_equal(table.lookup_ngrams(keys), packed.oracles[V41].lookup_ngrams(keys))
        anew = repacked_v41(tmp_path, folder)
        assert device.store.reload() == [V41]
        assert device.store.reload() == []
        with pytest.raises(errors.GenerationMismatch):
            table.lookup_ngrams(keys)
        for _ in range(2):
            assert np.array_equal(client.table(V41).lookup_ngrams(keys), anew.lookup_ngrams(keys))
    with opened(folder, config) as device, connect(f"local:{folder}") as client:
        assert device.store.wait_warm(30)
        assert np.array_equal(client.table(V41).lookup_ngrams(keys), anew.lookup_ngrams(keys))
        assert device.store.stats()["records_restored"] == keys.size
        assert device.store.stats()["dram_misses"] == 0
