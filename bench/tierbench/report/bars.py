"""The bars that every path is held to, and what the latest records say of each.

A bar names the record that holds its figure, where the figure stands, and what it has to reach. A figure
that was measured at a smaller size than the bar asks for is shown, and not judged. Nothing is estimated: a
bar without a record says which command makes one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from engram_client.errors import FormatError
from tierbench.records import Node, Record
from tierbench.report.shown import NBSP, percent, size, three_digits, tidy, time_us

MET, MISSED, NOT_JUDGED, NOT_MEASURED = "met", "missed", "not judged", "not measured"
GIB = 1 << 30
BARS_MAX = 60  # of one GPU section
Show = Callable[[float], str]


def share(value: float) -> str:
    return f"{three_digits(value)}{NBSP}×"


def of_payload(share_of_arena: float) -> float:
    """What is no payload, as a share of the payload."""
    return share_of_arena / max(1 - share_of_arena, 1e-9)


def cores(value: float) -> str:
    return f"{three_digits(value)}{NBSP}cores"


def millions(value: float) -> str:
    return f"{three_digits(value / 1e6)}{NBSP}M"


def milliseconds(value: float) -> str:
    return time_us(1e3 * value)


def nats(value: float) -> str:
    return f"{three_digits(value)}{NBSP}nats"


@dataclass(frozen=True)
class Bar:
    """`place` is the figure's in results; `bound` in its unit; `sign` is ">=" or "<="."""

    group: str
    what: str
    benchmark: str
    place: tuple[str, ...]
    sign: str
    bound: float
    show: Show
    spread: bool = False  # the figure is `ratio_median` of a comparison
    condition: Callable[[Record], str | None] | None = None  # why it cannot be judged
    turned: Callable[[float], float] = float  # from what the record says to what the bar asks

    @property
    def asked(self) -> str:
        return f"{'≥' if self.sign == '>=' else '≤'}{NBSP}{tidy(self.show(self.bound))}"


@dataclass(frozen=True)
class Judged:
    """A bar with its figure; `words` say why it could not be judged, or what makes its record."""

    group: str
    what: str
    asked: str
    status: str
    figure: str = ""
    spread: str = ""
    words: str = ""
    record: Record | None = None
    command: str = ""


def _arena(part: str) -> Callable[[Record], str | None]:
    def check(record: Record) -> str | None:
        found = record.node.number(part, "arena_bytes")
        if found is not None and found < 0.99 * 4 * GIB:
            return f"measured with an arena of {size(found)}; the bar is for 4 GiB and more"
        return None

    return check


def _lookup_bars() -> Iterable[Bar]:
    for part, label, bound in (
        ("records", "records of 8 × 264 B", 1.8),
        ("rows", "single rows of 264 B", 0.9),
    ):
        for threads in (1, 2):
            what = f"{label}, {threads} thread{'s' if threads > 1 else ''}, beside torch.index_select"
            place = (part, "batch", f"threads_{threads}", "ratio_median")
            yield Bar("DRAM hit, in process", what, "lookup", place, ">=", bound, share, True, _arena(part))
        if part == "records":
            yield Bar("DRAM hit, in process", "one token of 48 rows, p50", "lookup",
                      (part, "token", "ours", "p50"), "<=", 5.0, time_us, False, _arena(part))  # fmt: skip


def _cold_bars() -> Iterable[Bar]:
    for engine in ("io_uring", "pread"):
        at = (engine, "callers_1")
        group = f"Cold rows, {engine}"
        yield Bar(group, "rows a second beside fio's 4 KiB reads", "cold",
                  (*at, "beside_fio", "ratio_median"), ">=", 0.9, share, True)  # fmt: skip
        yield Bar(group, "processor", "cold", (*at, "cores", "p50"), "<=", 0.5, cores)
        yield Bar(group, "read from disk for each wanted row", "cold",
                  (*at, "bytes_per_row", "p50"), "<=", 4.2 * 1024, size)  # fmt: skip


def _other_bars() -> Iterable[Bar]:
    group = "DRAM hit, another process"
    yield Bar(group, "one token, p50, quiet", "shm", ("token", "shm", "p50"), "<=", 6, time_us)
    yield Bar(group, "one token, p99, quiet", "shm", ("token", "shm", "p99"), "<=", 20, time_us)
    yield Bar(group, "one token, p99, while the daemon writes", "shm",
              ("token_beside_evictions", "p99"), "<=", 56, time_us)  # fmt: skip
    yield Bar(group, "large batches beside the same in process", "shm",
              ("batch", "ratio_median"), ">=", 0.9, share, True)  # fmt: skip
    for kind, label in (("batch", "a batch of 4,104 rows"), ("token", "one token of 48 rows")):
        yield Bar("gRPC over TCP", f"{label} beside an empty service", "remote",
                  ("tcp", kind, "rows_per_s", "ratio_median"), ">=", 0.9, share, True)  # fmt: skip
    for part, label in (("records", "records of 2,112 B"), ("rows", "single rows of 264 B")):
        yield Bar("Memory for index and slots", label, "lookup", (part, "index_and_slot_overhead"),
                  "<=", 0.08, percent, False, _arena(part), of_payload)  # fmt: skip


def _training_bars() -> Iterable[Bar]:
    group, update = "Training", ("adam", "kernel_beside_torch", "ratio_median")
    yield Bar(group, "updated rows a second, Adam, one core", "optimizer",
              ("adam", "kernel", "p50"), ">=", 2e6, millions)  # fmt: skip
    yield Bar(group, "Adam beside torch.optim.SparseAdam", "optimizer", update, ">=", 1.0, share, True)
    yield Bar(group, "a durable commit beside the fastest way to write as many bytes", "commit",
              ("durable", "ratio_median"), ">=", 0.67, share, True)  # fmt: skip
    yield Bar(group, "small model, a tenth in DRAM, beside a resident table", "train-rate",
              ("store_beside_resident", "ratio_median"), ">=", 0.9, share, True)  # fmt: skip
    yield Bar(group, "its steps beside a commit", "train-rate",
              ("steps_beside_commits", "ratio_median"), ">=", 0.9, share, True)  # fmt: skip
    yield Bar(group, "longest look-up while a generation is published", "publish",
              ("longest_ms",), "<=", 100.0, milliseconds)  # fmt: skip
    yield Bar(group, "validation loss that a table saves, mean of seeds", "learn",
              ("loss_saved",), ">=", 0.0, nats)  # fmt: skip


BARS: tuple[Bar, ...] = (*_cold_bars(), *_lookup_bars(), *_other_bars(), *_training_bars())


OLD_NAMES = {"remote": "serve"}  # until 2026-11-29 the closed loop over gRPC was called serve


def latest(records: Sequence[Record], benchmark: str, *place: str) -> Record | None:
    """The latest record of a benchmark that holds something at `place`."""
    names = (benchmark, OLD_NAMES.get(benchmark))
    for record in reversed(records):
        if record.name in names:
            try:
                if record.node.at(*place) is not None:
                    return record
            except FormatError:
                continue
    return None


def judge_all(records: Sequence[Record]) -> list[Judged]:
    """Every bar of the product, then those of GPU sections that have been measured."""
    return [
        *(_judge(bar, records) for bar in BARS),
        *_model_steps(records),
        *_simulation(records),
        *_gpu(records),
    ]


def _judge(bar: Bar, records: Sequence[Record]) -> Judged:
    record = latest(records, bar.benchmark, *bar.place)
    command = f"tierbench {bar.benchmark} --record bench/results"
    if record is None:
        return Judged(bar.group, bar.what, bar.asked, NOT_MEASURED, command=command)
    try:
        found = record.node.number(*bar.place)
        refused = bar.condition(record) if bar.condition else None
        spread = _spread(record.node.at(*bar.place[:-1]), bar.show) if bar.spread else ""
    except FormatError as error:
        return Judged(bar.group, bar.what, bar.asked, NOT_JUDGED, words=str(error), record=record)
    assert found is not None  # `latest` has found it
    found = bar.turned(found)
    met = found >= bar.bound if bar.sign == ">=" else found <= bar.bound
    status = NOT_JUDGED if refused else MET if met else MISSED
    return Judged(bar.group, bar.what, bar.asked, status, bar.show(found), spread, refused or "", record)


def _spread(compared: Node | None, show: Show) -> str:
    low = compared.number("ratio_min") if compared else None
    high = compared.number("ratio_max") if compared else None
    return "" if low is None or high is None else f"{show(low)[:-2]} to {show(high)}"


def _model_steps(records: Sequence[Record]) -> list[Judged]:
    """What a tenth of the table in DRAM costs a model's step, for the largest model of each kind of step."""
    group, asked = "Model step, 10 % of the table in DRAM, beside it resident", f"≤{NBSP}1.03{NBSP}×"
    record = latest(records, "overlap", "sizes")
    if record is None:
        return [Judged(group, "a step beside the table resident", asked, NOT_MEASURED,
                       command="tierbench overlap --record bench/results")]  # fmt: skip
    steps: dict[str, tuple[float, Judged]] = {}
    try:
        for found in record.node.items("sizes"):
            hidden, batch, length = (found.number(n) or 0 for n in ("hidden", "batch", "length"))
            kind = f"{found.text('kind')}, {batch:.0f} × {length:.0f} tokens"
            ratio = found.at("tenth", "prefetched", "over_resident")
            median = ratio.number("ratio_median") if ratio else None
            if median is None or (kind in steps and steps[kind][0] > hidden):
                continue
            what = f"{kind}, hidden size {hidden:.0f}"
            status = MET if median <= 1.03 else MISSED
            steps[kind] = (hidden, Judged(group, what, asked, status, share(median), _spread(ratio, share),
                                          record=record))  # fmt: skip
    except FormatError as error:
        return [Judged(group, "a step", asked, NOT_JUDGED, words=str(error), record=record)]
    return [judged for _, judged in steps.values()]


def _simulation(records: Sequence[Record]) -> list[Judged]:
    """How far `tierbench hitrate` is to be trusted."""
    group, found = "Simulation of hit rates", []
    record = latest(records, "hitrate", "budgets")
    speed = "row accesses a second, one core"
    try:
        budgets = record.node.items("budgets") if record else []
        rates = [r for b in budgets if (r := b.number("simulation", "rows_per_s")) is not None]
        if rates:
            status = MET if min(rates) >= 20e6 else MISSED
            figure = f"{three_digits(min(rates) / 1e6)} M"
            found.append(Judged(group, speed, "≥ 20 M", status, figure, record=record))
        live = latest(records, "hitrate", "live", "difference_points")
        points = live.node.number("live", "difference_points") if live else None
        if points is not None:
            status = MET if abs(points) <= 0.5 else MISSED
            found.append(Judged(group, "hit rate beside a running daemon", "≤ 0.5 points", status,
                                f"{abs(points):.2f} points", record=live))  # fmt: skip
        else:
            found.append(Judged(group, "hit rate beside a running daemon", "≤ 0.5 points", NOT_MEASURED,
                                command="tierbench hitrate TEXT --live unix:PATH --record DIR"))  # fmt: skip
    except FormatError as error:
        found.append(Judged(group, speed, "≥ 20 M", NOT_JUDGED, words=str(error), record=record))
    return found


def _gpu(records: Sequence[Record]) -> list[Judged]:
    """The bars that sections of `tierbench gpu` have judged themselves."""
    latest_of = {record.name: record for record in records if record.name.startswith("gpu-")}
    if not latest_of:
        return [Judged("GPU", "hot records in HBM, the bus, the model step", "", NOT_MEASURED,
                       command="make bench-gpu")]  # fmt: skip
    found = []
    for name, record in latest_of.items():
        group = f"GPU, {name.removeprefix('gpu-').replace('-', ' ')}"
        try:
            for bar in record.node.items("bars")[:BARS_MAX]:
                value = bar.at("figure")
                figure = three_digits(value.value) if value and isinstance(value.value, int | float) else ""
                verdict = bar.text("verdict") or ""
                status = (
                    verdict
                    if verdict in (MET, MISSED)
                    else MISSED
                    if verdict.startswith(MISSED)
                    else NOT_JUDGED
                )
                asked = (bar.text("bar") or "").replace(">=", "≥").replace("<=", "≤")
                words = "" if verdict in (MET, MISSED) else verdict
                found.append(Judged(group, bar.text("what") or "", asked, status, figure, "", words, record))
        except FormatError as error:
            found.append(Judged(group, "bars", "", NOT_JUDGED, words=str(error), record=record))
    return found
