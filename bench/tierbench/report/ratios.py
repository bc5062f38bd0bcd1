"""Each path beside its yardstick: the ratio of pairs of runs, window by window, and how far they spread."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from engram_client.errors import FormatError
from tierbench.records import Node, Record
from tierbench.report.bars import latest
from tierbench.report.charts import Ratio, RatioChart
from tierbench.report.section import Figure, Section
from tierbench.report.svg import ratio_told

Source = Callable[[Node, str], Iterator[Ratio]]


def _ratio(
    node: Node | None, label: str, against: str, source: str, bar: float | None = None, *, larger: bool = True
) -> Iterator[Ratio]:
    """Nothing where the comparison is not in the record."""
    if node is None:
        return
    median, low, high = (node.number(name) for name in ("ratio_median", "ratio_min", "ratio_max"))
    named = node.text("yardstick_name")
    against = named if named and named != "empty" else against
    if median is not None and low is not None and high is not None and min(median, low, high) > 0:
        yield Ratio(label, against, median, low, high, bar, larger, source)


def _lookup(node: Node, source: str) -> Iterator[Ratio]:
    for part, label, bar in (("records", "records in DRAM", 1.8), ("rows", "single rows in DRAM", 0.9)):
        for threads in (1, 2):
            words = f"{label}, {threads} thread{'s' if threads > 1 else ''}"
            yield from _ratio(
                node.at(part, "batch", f"threads_{threads}"), words, "torch.index_select", source, bar
            )


def _cold(node: Node, source: str) -> Iterator[Ratio]:
    for engine in ("io_uring", "pread"):
        found = node.at(engine, "callers_1", "beside_fio")
        yield from _ratio(found, f"cold rows, {engine}", "fio, random 4 KiB reads", source, 0.9)


def _shm(node: Node, source: str) -> Iterator[Ratio]:
    yield from _ratio(node.at("batch"), "another process, batches", "the same in one process", source, 0.9)
    yield from _ratio(node.at("clients", "total"), "four processes together", "one client", source, 1.0)


def _remote(node: Node, source: str) -> Iterator[Ratio]:
    for way, name in (("tcp", "gRPC over TCP"), ("unix", "gRPC over a unix socket")):
        for kind in ("batch", "token"):
            found = node.at(way, kind, "rows_per_s")
            yield from _ratio(
                found, f"{name}, {kind}", "an empty gRPC service", source, 0.9 if way == "tcp" else None
            )


def _mixed(node: Node, source: str) -> Iterator[Ratio]:
    found = node.at("trace", "mixed_over_separate")
    yield from _ratio(found, "time for hits and misses in one call", "the same one after another", source,
                      1.15, larger=False)  # fmt: skip


def _extent(node: Node, source: str) -> Iterator[Ratio]:
    ours, without = (node.number(part, "reads_per_seen_record") for part in ("with_extent", "without"))
    if ours and without:
        ratio = ours / without
        yield Ratio(
            "reads for a record seen before", "no record extent", ratio, ratio, ratio, None, False, source
        )


def _overlap(node: Node, source: str) -> Iterator[Ratio]:
    for size in node.items("sizes"):
        hidden, batch, length = (size.number(name) or 0 for name in ("hidden", "batch", "length"))
        label = f"{size.text('kind')} step, {batch:.0f} × {length:.0f} tokens, hidden {hidden:.0f}"
        found = size.at("tenth", "prefetched", "over_resident")
        yield from _ratio(found, label, "the table resident", source, 1.03, larger=False)


def _optimizer(node: Node, source: str) -> Iterator[Ratio]:
    for name, found in node.members():
        for what, words in (("kernel", "rows in DRAM"), ("store", "all of an update")):
            bar = 1.0 if (name, what) == ("adam", "kernel") else None
            label = f"{name.replace('_', ' ')}, {words}"
            yield from _ratio(found.at(f"{what}_beside_torch"), label, "torch, resident", source, bar)


def _commit(node: Node, source: str) -> Iterator[Ratio]:
    yield from _ratio(node.at("durable"), "durable commit", "writing as many bytes", source, 0.67)


def _train_rate(node: Node, source: str) -> Iterator[Ratio]:
    resident = node.at("store_beside_resident")
    yield from _ratio(resident, "training, a tenth in DRAM", "the table resident", source, 0.9)
    beside = node.at("steps_beside_commits")
    yield from _ratio(beside, "training beside a commit", "training", source, 0.9)


def _sharded(node: Node, source: str) -> Iterator[Ratio]:
    found = node.at("ranks_beside_one_process")
    yield from _ratio(found, "ranks with a share each", "one process, no model", source)


def _gpu(node: Node, source: str) -> Iterator[Ratio]:
    """Every comparison in a GPU section's results, wherever it stands; on a CPU they say nothing."""
    if node.text("device", "type") in (None, "cpu"):
        return
    yield from _walk(node.at("results"), source.removeprefix("gpu-"), source)


def _walk(node: Node | None, label: str, source: str, depth: int = 0) -> Iterator[Ratio]:
    if node is None or depth > 6 or not isinstance(node.value, dict):
        return
    if "ratio_median" in node.value:
        yield from _ratio(node, label, "its yardstick", source)
        return
    for name, member in node.members():
        yield from _walk(member, f"{label}, {name.replace('_', ' ')}", source, depth + 1)


def _peers(node: Node, source: str) -> Iterator[Ratio]:
    for name, found in node.members("peers"):
        yield from _ratio(found.at("rows_per_s"), "gRPC over TCP, a batch", name, source)


def _embedded_peers(node: Node, source: str) -> Iterator[Ratio]:
    """Others' medians of the same run, where no pairs are kept."""
    medians = node.at("records", "batch", "threads_1", "medians")
    ours = sorted(node.numbers("records", "batch", "threads_1", "ours"))
    for name, other in medians.members() if medians and ours else ():
        value = other.number()
        if value and not name.startswith("torch."):
            ratio = ours[len(ours) // 2] / value
            yield Ratio("records in DRAM, 1 thread", name, ratio, ratio, ratio, None, True, source)


def _cold_peers(node: Node, source: str) -> Iterator[Ratio]:
    ours = node.number("other_ways", "rows_per_s", "tierstore")
    for name, other in node.members("other_ways", "rows_per_s") if ours else ():
        value = other.number()
        if name != "tierstore" and value and ours:
            ratio = ours / value
            yield Ratio("cold rows", name.replace("_", " "), ratio, ratio, ratio, None, True, source)


PATHS: tuple[tuple[str, Source], ...] = (
    ("lookup", _lookup), ("shm", _shm), ("cold", _cold), ("remote", _remote),
    ("mixed", _mixed), ("extent", _extent), ("overlap", _overlap),
    ("optimizer", _optimizer), ("commit", _commit), ("train-rate", _train_rate), ("train-sharded", _sharded),
)  # fmt: skip
PEERS: tuple[tuple[str, Source], ...] = (
    ("remote", _peers),
    ("lookup", _embedded_peers),
    ("cold", _cold_peers),
)
MARKS = {"remote": ("tcp",)}  # what tells a benchmark's records from another's of the same old name
COMMANDS = {name: f"tierbench {name} --record bench/results" for name, _ in PATHS}


def path_section(records: Sequence[Record]) -> Section:
    rows, used, refused = _gather(records, PATHS)
    gpu = {record.name: record for record in records if record.name.startswith("gpu-")}
    gpu_rows, gpu_used, more = _gather(list(gpu.values()), [(name, _gpu) for name in gpu])
    peers, peers_used, _ = _gather(records, PEERS)
    parts = [
        _figure("yardsticks", "Each path beside its yardstick", rows, used,
                "The bar begins at 1, where both are equal; the whisker spans the least and the greatest of "
                "the pairs, the dashed line is what is asked. Of times and counts, less is better."),
        _figure("gpu-yardsticks", "On the GPU", gpu_rows, gpu_used, "As above."),
        _figure("peers", "Beside other services and stores", peers, peers_used,
                "In the same run, with the same rows. Without a whisker the record keeps medians alone."),
    ]  # fmt: skip
    missing = [(name, command) for name, command in COMMANDS.items() if _latest(records, name) is None]
    if not gpu:
        missing.append(("GPU paths", "make bench-gpu"))
    kept = [part for part in parts if part is not None]
    return Section(
        "paths", "Each path beside its yardstick", _finding(rows), kept, missing, [*refused, *more]
    )


def _latest(records: Sequence[Record], name: str) -> Record | None:
    return latest(records, name, *MARKS.get(name, ()))


def _gather(
    records: Sequence[Record], sources: Sequence[tuple[str, Source]]
) -> tuple[list[Ratio], list[Record], list[str]]:
    """Of each benchmark's latest record. A record of an unexpected shape loses its own lines only."""
    rows, used, refused = [], [], []
    for name, source in sources:
        record = _latest(records, name)
        if record is None:
            continue
        try:
            found = list(source(record.node, name))
        except FormatError as error:
            refused.append(str(error))
            continue
        rows += found
        used += [record] if found else []
    return rows, used, refused


def _figure(name: str, title: str, rows: list[Ratio], used: list[Record], note: str) -> Figure | None:
    if not rows:
        return None
    described = f"{len(rows)} ratios of ours over a yardstick's, with the spread of their runs."
    return Figure(RatioChart(name, title, described, rows), used, note)


def _finding(rows: Sequence[Ratio]) -> str:
    judged = [row for row in rows if row.met is not None]
    if not judged:
        return ""
    missed = [row for row in judged if not row.met]
    words = f"{len(judged) - len(missed)} of {len(judged)} ratios reach their bar"
    if not missed:
        return words + "."
    worst = min(
        missed, key=lambda r: r.median / (r.bar or 1) if r.larger_is_better else (r.bar or 1) / r.median
    )
    words += f"; the farthest from it is {worst.label}, "
    return words + f"{ratio_told(worst.median)} where {worst.bar:g} is asked."
