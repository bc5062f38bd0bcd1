"""Every key of the configuration: its type, default, bounds and one-line meaning.

This is the only place where a default is written. Sections are frozen and check their own values,
so `Config(dram=Dram(budget_bytes=...))` in embedded mode obeys the same bounds as a file does.
What several keys must fulfil together lies in `rules`.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import msgspec
from msgspec import Meta

from tierstore.config.values import check_value, value_type

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB
GRPC_MESSAGE_BYTES_MAX = 2**31 - 1

ByteSize = Annotated[int, Meta(extra={"unit": "bytes"})]
Seconds = Annotated[float, Meta(extra={"unit": "seconds"})]


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """One table of the TOML file."""

    section: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            check_value(f"{self.section}.{name}", value_type(type(self), name), getattr(self, name))


class Dram(Section, frozen=True):
    section: ClassVar[str] = "dram"
    budget_bytes: Annotated[
        ByteSize, Meta(ge=0, description="DRAM for cached records, their index included; 0 caches nothing")
    ] = GIB
    balance_period_s: Annotated[
        Seconds,
        Meta(ge=0, description="time between moves of DRAM to the record size where it saves most; 0: never"),
    ] = 600.0
    snapshot_period_s: Annotated[
        Seconds,
        Meta(ge=0, description="time between snapshots of the cache for a warm restart; 0 writes none"),
    ] = 600.0
    snapshot_close_timeout_s: Annotated[
        Seconds, Meta(ge=0, le=3600, description="time that the last snapshot may take at shutdown")
    ] = 30.0


class Nvme(Section, frozen=True):
    section: ClassVar[str] = "nvme"
    engine: Annotated[
        Literal["auto", "io_uring", "pread"],
        Meta(description="how pages are read: io_uring, pread threads, or auto (io_uring where allowed)"),
    ] = "auto"
    queue_depth: Annotated[int, Meta(ge=1, le=4096, description="io_uring reads in flight at once")] = 64
    read_threads: Annotated[
        int, Meta(ge=1, le=1024, description="pread threads; as many reads are in flight at once")
    ] = 32
    direct: Annotated[
        Literal["auto", "on", "off"],
        Meta(description="O_DIRECT page reads: on, off, or auto (on where the file system allows it)"),
    ] = "auto"
    coalesce_gap_pages: Annotated[
        int, Meta(ge=0, description="unwanted pages that one read may span to join two wanted ones")
    ] = 3
    run_pages_max: Annotated[
        int, Meta(ge=1, le=4096, description="longest single read, in 4096-byte pages")
    ] = 32
    staging_bytes: Annotated[
        ByteSize, Meta(ge=4 * KIB, description="page buffers of all reads in flight, for the whole store")
    ] = 64 * MIB


class Extent(Section, frozen=True):
    section: ClassVar[str] = "extent"
    budget_bytes: Annotated[
        ByteSize,
        Meta(
            ge=0, description="disk for records kept whole, so that DRAM's misses cost one read; 0 for none"
        ),
    ] = 0
    write_bytes_per_s: Annotated[
        ByteSize, Meta(ge=1, description="bytes written to the extents a second, on average; more is dropped")
    ] = 32 * MIB
    write_buffer_bytes: Annotated[
        ByteSize, Meta(ge=64 * KIB, description="memory for records that wait to be written; more is dropped")
    ] = 8 * MIB
    period_s: Annotated[
        Seconds,
        Meta(ge=1, le=86400, description="time between snapshots of the extents' indices; a crash loses one"),
    ] = 60.0


class Hbm(Section, frozen=True):
    section: ClassVar[str] = "hbm"
    client_budget_bytes: Annotated[
        ByteSize,
        Meta(ge=0, description="device memory for hot records of each client in this process; 0 for none"),
    ] = 0
    budget_bytes: Annotated[
        ByteSize,
        Meta(ge=0, description="device memory for records that are hot in DRAM; 0 for none, and no torch"),
    ] = 0
    device: Annotated[str, Meta(description="of torch: cuda, cuda:1, or cpu for tests")] = "cuda"
    promote_period_s: Annotated[
        Seconds, Meta(ge=0.01, le=3600, description="time between looks for records that have become hot")
    ] = 1.0
    promote_bytes: Annotated[
        ByteSize, Meta(ge=64 * KIB, description="records brought to HBM at one look, at most")
    ] = 64 * MIB
    promote_reads: Annotated[
        int, Meta(ge=1, le=4, description="reads in DRAM that make a record hot; its small queue counts 2")
    ] = 4
    staging_bytes: Annotated[
        ByteSize,
        Meta(ge=64 * KIB, description="pages on their way to a device, on it and once more in pinned memory"),
    ] = 32 * MIB
    fill_gap_pages: Annotated[
        int, Meta(ge=0, description="unwanted pages that one read in bulk may span to join two wanted ones")
    ] = 8
    fill_run_pages_max: Annotated[
        int, Meta(ge=1, le=4096, description="longest single read in bulk, in 4096-byte pages")
    ] = 1024
    gds: Annotated[
        Literal["auto", "off"],
        Meta(description="GPUDirect Storage for reads in bulk: off, or auto (where a probe finds it real)"),
    ] = "auto"
    gds_run_bytes: Annotated[
        ByteSize, Meta(ge=4 * KIB, description="mean length of reads from which GPUDirect Storage is taken")
    ] = MIB
    gds_threads: Annotated[int, Meta(ge=1, le=256, description="threads that read by GPUDirect Storage")] = 8
    gds_probe_timeout_s: Annotated[
        Seconds,
        Meta(ge=0.1, le=3600, description="time that the process that tries GPUDirect Storage may take"),
    ] = 30.0
    gds_timeout_s: Annotated[
        Seconds, Meta(ge=0.1, le=3600, description="time for a read in bulk by it; then it is left for good")
    ] = 60.0


class Limits(Section, frozen=True):
    section: ClassVar[str] = "limits"
    request_ids_max: Annotated[int, Meta(ge=1, description="keys or row ids that one request may hold")] = (
        2**20
    )
    request_reply_bytes_max: Annotated[
        ByteSize, Meta(ge=64 * KIB, le=GRPC_MESSAGE_BYTES_MAX, description="bytes of rows in one RPC's reply")
    ] = 8 * MIB
    lookup_bytes_max: Annotated[
        ByteSize, Meta(ge=64 * KIB, description="bytes of rows of one local look-up")
    ] = 4 * GIB
    prefetch_queue_max: Annotated[
        int, Meta(ge=1, description="prefetch requests that wait; further hints are dropped")
    ] = 64


class Prefetch(Section, frozen=True):
    section: ClassVar[str] = "prefetch"
    workers: Annotated[int, Meta(ge=0, le=1024, description="threads that warm rows; 0 drops every hint")] = 2


class Serve(Section, frozen=True):
    section: ClassVar[str] = "serve"
    unix: Annotated[str, Meta(description="path of the unix socket to serve on; empty for none")] = ""
    tcp: Annotated[str, Meta(description="host:port to serve on, port 0 for any; empty for none")] = ""
    allow_remote: Annotated[
        bool, Meta(description="allow serve.tcp to name an address that other machines can reach")
    ] = False
    workers: Annotated[int, Meta(ge=1, le=1024, description="threads that serve look-ups with misses")] = 4
    concurrent_requests_max: Annotated[
        int, Meta(ge=1, description="requests in work at once; more are refused as overloaded")
    ] = 64
    earlier_generation_s: Annotated[
        Seconds,
        Meta(
            ge=0,
            le=7 * 86400,
            description="time that a replaced generation stays for clients that have it open; 0: none",
        ),
    ] = 300.0
    drain_timeout_s: Annotated[
        Seconds, Meta(ge=0, le=3600, description="time that running requests get to finish at shutdown")
    ] = 10.0


class Shm(Section, frozen=True):
    section: ClassVar[str] = "shm"
    enabled: Annotated[
        bool, Meta(description="let processes of this machine read DRAM in place, beside serve.unix")
    ] = True
    clients_max: Annotated[
        int, Meta(ge=1, le=1024, description="clients attached at once; more go by gRPC")
    ] = 32
    user_clients_percent: Annotated[
        int,
        Meta(ge=1, le=100, description="of clients_max for one user, if not the daemon's; more go by gRPC"),
    ] = 50
    response_bytes: Annotated[
        ByteSize, Meta(ge=64 * KIB, description="memory of each client for what it asks for and its rows")
    ] = 8 * MIB
    touch_ring_bytes: Annotated[
        ByteSize, Meta(ge=4 * KIB, le=GIB, description="memory of each client to tell what it read")
    ] = 64 * KIB
    workers: Annotated[
        int,
        Meta(ge=1, le=1024, description="threads that read what clients miss; half of them for one client"),
    ] = 4


class Training(Section, frozen=True):
    section: ClassVar[str] = "training"
    enabled: Annotated[
        bool, Meta(description="serve the tables in training of the directory: to read, update and commit")
    ] = False
    dram_bytes: Annotated[
        ByteSize, Meta(ge=4 * KIB, description="DRAM for rows in training, their optimizer state included")
    ] = GIB
    staging_bytes: Annotated[
        ByteSize,
        Meta(ge=64 * KIB, description="memory for rows between DRAM and log: for updates, and for reads"),
    ] = 16 * MIB
    not_finite: Annotated[
        Literal["refuse", "skip"],
        Meta(description="an update with infinite or NaN gradients: refuse it, or skip those rows"),
    ] = "refuse"
    world: Annotated[int, Meta(ge=1, le=65536, description="trainers that update the tables together")] = 1
    ahead_steps_max: Annotated[
        int,
        Meta(
            ge=0,
            description="steps that a trainer may be ahead of the slowest; 0: all update each step together",
        ),
    ] = 0
    pending_bytes_max: Annotated[
        ByteSize,
        Meta(ge=MIB, description="memory for gradients that wait for other trainers, or for their rest"),
    ] = 256 * MIB
    queue_bytes: Annotated[
        ByteSize, Meta(ge=64 * KIB, description="memory for rows that wait to be written; more wait for room")
    ] = 256 * MIB
    segment_bytes: Annotated[
        ByteSize, Meta(ge=256 * KIB, le=4 * GIB, description="size of a file of the update log")
    ] = 64 * MIB
    log_bytes_max: Annotated[
        ByteSize, Meta(ge=MIB, description="disk for the update log; beyond it updates wait for folding")
    ] = 8 * GIB
    fold_bytes: Annotated[
        ByteSize, Meta(ge=64 * KIB, description="size of the log from which on it is folded into pages")
    ] = 2 * GIB
    fold_batch_bytes: Annotated[
        ByteSize, Meta(ge=4 * KIB, le=GIB, description="pages that a fold writes at a time, twice each")
    ] = 32 * MIB
    fold_rows_bytes: Annotated[
        ByteSize, Meta(ge=64 * KIB, description="memory for rows on their way from the log to pages")
    ] = 128 * MIB
    keep_steps: Annotated[
        int, Meta(ge=1, le=10_000, description="committed steps that can be gone back to, the last included")
    ] = 2
    snapshots_max: Annotated[
        int, Meta(ge=1, le=64, description="committed steps that clients may read at once, for exports")
    ] = 4
    snapshot_idle_s: Annotated[
        Seconds, Meta(gt=0, le=86400, description="a step that no client reads for so long is closed")
    ] = 600
    read_depth: Annotated[
        int, Meta(ge=1, le=1024, description="reads of rows from log and pages in flight at once")
    ] = 32
    read_buffer_bytes: Annotated[
        ByteSize, Meta(ge=256 * KIB, le=GIB, description="page buffer of one read of rows; four at most")
    ] = 4 * MIB


class Log(Section, frozen=True):
    section: ClassVar[str] = "log"
    level: Annotated[
        Literal["debug", "info", "warning", "error"], Meta(description="least severe message that is written")
    ] = "info"


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The whole configuration; `Config()` holds the defaults."""

    dram: Dram = msgspec.field(default_factory=Dram)
    nvme: Nvme = msgspec.field(default_factory=Nvme)
    extent: Extent = msgspec.field(default_factory=Extent)
    hbm: Hbm = msgspec.field(default_factory=Hbm)
    limits: Limits = msgspec.field(default_factory=Limits)
    prefetch: Prefetch = msgspec.field(default_factory=Prefetch)
    serve: Serve = msgspec.field(default_factory=Serve)
    shm: Shm = msgspec.field(default_factory=Shm)
    training: Training = msgspec.field(default_factory=Training)
    log: Log = msgspec.field(default_factory=Log)


SECTIONS: dict[str, type[Section]] = {
    cls.section: cls for cls in (Dram, Nvme, Extent, Hbm, Limits, Prefetch, Serve, Shm, Training, Log)
}

KEYS: dict[str, type[Section]] = {
    f"{name}.{field}": cls for name, cls in SECTIONS.items() for field in cls.__struct_fields__
}
