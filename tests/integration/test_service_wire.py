"""The daemon as a stranger's gRPC client sees it, and what it does with bytes that make no sense."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any
from urllib.parse import urlsplit

import grpc
import numpy as np
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from engram_client import connect, errors
from engram_client.wire import memory_pb2 as pb
from tests.support.daemon import Daemon
from tests.support.stores import ALL_TABLES, PLAIN, PLE, V41, PackedStore, random_keys, random_rows

SERVICE = "tierstore.v1.MemoryService"
Call = Callable[[str, Any], Any]


@pytest.fixture(scope="module")
def channel(daemon: Daemon) -> Iterator[grpc.Channel]:
    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(daemon.tcp.removeprefix("tcp://"), options) as channel:
        yield channel


@pytest.fixture
def call(channel: grpc.Channel) -> Call:
    """`call("Lookup", message)`: the reply by protobuf alone."""
    replies = {"Lookup": pb.LookupResponse, "Prefetch": pb.PrefetchResponse, "Stats": pb.StatsResponse}

    def do(method: str, message: Any) -> Any:
        reply = replies.get(method) or getattr(pb, f"{method}Response")
        serialize = bytes if isinstance(message, bytes) else lambda m: m.SerializeToString()
        stub = channel.unary_unary(f"/{SERVICE}/{method}", serialize, reply.FromString)
        return stub(message, timeout=30)

    return do


def request(call: Call, table: str = PLAIN, **fields: Any) -> pb.LookupRequest:
    generation = call("DescribeTable", pb.DescribeTableRequest(table=table)).table.generation
    return pb.LookupRequest(**{"table": table, "generation": generation, **fields})


def refused(call: Call, method: str, message: Any, status: grpc.StatusCode, code: str, what: str) -> None:
    with pytest.raises(grpc.RpcError, match=what) as caught:
        call(method, message)
    assert caught.value.code() == status
    assert dict(caught.value.trailing_metadata())["tierstore-error"] == code


def packed_ids(ids: Any) -> bytes:
    return np.asarray(ids, "<i8").tobytes()


def test_rows_by_protobuf_alone(call: Call, packed: PackedStore) -> None:
    ids = random_rows(packed.oracles[PLAIN], 100, masked=0.2)
    reply = call("Lookup", request(call, row_ids=packed_ids(ids)))
    assert reply.rows == packed.oracles[PLAIN].lookup(ids).tobytes()
    oracle, keys = packed.oracles[PLE], random_keys(packed.oracles[PLE], 50, masked=0.2)
    heads = pb.HeadRange(start=2, stop=5)
    reply = call("Lookup", request(call, PLE, ngram_keys=packed_ids(keys), heads=heads))
    assert reply.rows == oracle.lookup_ngrams(keys, slice(2, 5)).tobytes()


@pytest.mark.parametrize("table", ALL_TABLES)
def test_no_ids_no_rows(call: Call, table: str) -> None:
    assert call("Lookup", request(call, table, row_ids=b"")).rows == b""


def test_requests_over_the_limits(call: Call) -> None:
    too_many = np.full(2**17 + 1, -1)
    what = r"131073 ids.*131072 \(limits.request_ids_max\)"
    status = grpc.StatusCode.INVALID_ARGUMENT
    for method in ("Lookup", "Prefetch"):
        message = request(call, row_ids=packed_ids(too_many))
        refused(call, method, message, status, "batch_too_large", what)
    message = request(call, row_ids=packed_ids(too_many[:-1]))
    what = rf"131072 ids ask for {131072 * 24} bytes.*{2 << 20} \(limits.request_reply_bytes_max\)"
    refused(call, "Lookup", message, status, "batch_too_large", what)
    assert len(call("Lookup", request(call, row_ids=packed_ids(too_many[: (2 << 20) // 24]))).rows) > 2e6


@pytest.mark.parametrize(("fields", "code", "what"), [
    ({}, "bad_request", "neither ngram_keys nor row_ids"),
    ({"row_ids": b"1234567"}, "bad_request", "7 bytes, not a multiple of 8"),
    ({"generation": b"", "row_ids": bytes(8)}, "bad_request", "generation must be 16 bytes, got 0"),
    ({"generation": bytes(17), "row_ids": bytes(8)}, "bad_request", "got 17"),
    ({"row_ids": packed_ids([0, -2])}, "id_out_of_range", r"row id -2 at position \[1\]"),
    ({"row_ids": packed_ids([3001])}, "id_out_of_range", r"\[0, 3000\]"),
    ({"ngram_keys": bytes(8)}, "bad_request", "addressed by row ids"),
    ({"row_ids": bytes(8), "heads": pb.HeadRange(start=0, stop=1)}, "bad_request", "heads= goes with"),
])  # fmt: skip
def test_messages_that_make_no_sense(call: Call, fields: dict[str, Any], code: str, what: str) -> None:
    status = grpc.StatusCode.OUT_OF_RANGE if code == "id_out_of_range" else grpc.StatusCode.INVALID_ARGUMENT
    for method in ("Lookup", "Prefetch"):
        refused(call, method, request(call, **fields), status, code, what)


@pytest.mark.parametrize("heads", [(0, 0), (3, 2), (0, 9), (8, 9), (2**32 - 1, 0)])
def test_heads_outside_the_table(call: Call, heads: tuple[int, int]) -> None:
    head_range = pb.HeadRange(start=heads[0], stop=heads[1])
    message = request(call, V41, ngram_keys=bytes(24), heads=head_range)
    refused(call, "Lookup", message, grpc.StatusCode.INVALID_ARGUMENT, "bad_request", "8 heads an order")


def test_keys_of_another_width_and_rows_that_are_not_cached(call: Call) -> None:
    invalid = grpc.StatusCode.INVALID_ARGUMENT
    refused(
        call, "Lookup", request(call, V41, ngram_keys=bytes(16)), invalid, "bad_request", "multiple of 24"
    )
    refused(
        call, "Prefetch", request(call, V41, row_ids=bytes(8)), invalid, "bad_request", "n-gram keys inst"
    )


def test_tables_and_generations_that_are_not_there(call: Call) -> None:
    message = pb.DescribeTableRequest(table="nosuch")
    refused(call, "DescribeTable", message, grpc.StatusCode.NOT_FOUND, "unknown_table", "no table 'nosuch'")
    message = pb.LookupRequest(table="nosuch", generation=bytes(16), row_ids=bytes(8))
    refused(call, "Lookup", message, grpc.StatusCode.NOT_FOUND, "unknown_table", "no table 'nosuch'")
    message = request(call, generation=bytes(16), row_ids=bytes(8))
    status = grpc.StatusCode.FAILED_PRECONDITION
    refused(call, "Lookup", message, status, "generation_mismatch", f"{'0' * 32}.*served is")


def test_an_error_fits_its_metadata_however_long_the_name(call: Call) -> None:
    for name in ("x" * 100_000, "ü" * 20_000, "\n" * 5000):
        message = pb.DescribeTableRequest(table=name)
        refused(call, "DescribeTable", message, grpc.StatusCode.NOT_FOUND, "unknown_table", "no table")


def test_bytes_that_are_no_message_and_methods_that_are_not_there(call: Call, channel: grpc.Channel) -> None:
    for method in ("Lookup", "Prefetch", "DescribeTable"):
        with pytest.raises(grpc.RpcError):
            call(method, b"\xff\xff\xff\xff")
    with pytest.raises(grpc.RpcError) as caught:
        channel.unary_unary(f"/{SERVICE}/Nosuch")(b"", timeout=30)
    assert caught.value.code() == grpc.StatusCode.UNIMPLEMENTED
    with pytest.raises(grpc.RpcError) as caught:
        call("Lookup", pb.LookupRequest(table=PLAIN, row_ids=bytes(17 << 20)))
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED


@pytest.mark.parametrize("data", [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500),
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\xff" * 4096, bytes(100_000), b"",
])  # fmt: skip
def test_bytes_that_are_not_grpc(daemon: Daemon, packed: PackedStore, data: bytes) -> None:
    parts = urlsplit(daemon.tcp)
    with socket.create_connection((parts.hostname, parts.port), timeout=30) as stranger:
        with suppress(OSError):  # the daemon may have hung up on it
            stranger.sendall(data)
            stranger.shutdown(socket.SHUT_WR)
        with connect(daemon.tcp) as client:  # while the stranger hangs on
            assert np.array_equal(client.table(PLAIN).lookup(np.arange(9)), packed.oracles[PLAIN].rows[:9])


def test_health_answers_standard_clients(channel: grpc.Channel) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    for service in ("", SERVICE):
        reply = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=30)
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
    with pytest.raises(grpc.RpcError) as caught:
        stub.Check(health_pb2.HealthCheckRequest(service="nosuch"), timeout=30)
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


def test_reflection_tells_standard_clients_the_contract(channel: grpc.Channel) -> None:
    database = ProtoReflectionDescriptorDatabase(channel)
    assert SERVICE in database.get_services()
    file = database.FindFileContainingSymbol(SERVICE)
    assert [m.name for m in file.service[0].method] == [
        "ListTables", "DescribeTable", "Lookup", "Prefetch", "Stats", "SetBudgets",
    ]  # fmt: skip


def test_the_daemon_listens_where_it_says_and_nowhere_else(daemon: Daemon) -> None:
    own = psutil.Process(daemon.process.pid).net_connections()
    listening = [c.laddr for c in own if c.status == psutil.CONN_LISTEN]
    assert [address.ip.removeprefix("::ffff:") for address in listening] == ["127.0.0.1"]
    assert listening[0].port == urlsplit(daemon.tcp).port


def test_many_callers_at_once_get_their_own_rows(daemon: Daemon, packed: PackedStore) -> None:
    oracle = packed.oracles[V41]

    def one(seed: int) -> bool:
        with connect(daemon.unix) as client:
            keys = random_keys(oracle, 150, seed=seed, masked=0.1)
            return np.array_equal(client.table(V41).lookup_ngrams(keys), oracle.lookup_ngrams(keys))

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(one, range(24)))


def test_nothing_here_was_an_internal_error(daemon: Daemon) -> None:
    assert "failed unexpectedly" not in daemon.log


def test_errors_keep_their_class_on_the_way(daemon: Daemon) -> None:
    with connect(daemon.unix) as client, pytest.raises(errors.UnknownTable):
        client.table("nosuch")
