"""Statistics of other processes' devices, for people: `tcmu-rs stats` and `tcmu-rs top`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import trio

from . import _control, _lio, _sysfs
from ._text import printable

if TYPE_CHECKING:
    from rich.console import RenderableType

ANSWER_WITHIN = 2.0
"""Seconds for a process to answer; one whose event loop stands still does not."""

_Record = Mapping[str, Any]


class _Unanswered(Exception):
    """A process does not answer. The text says which, and why."""


async def _ask(pid: int, name: str | None) -> list[_Record]:
    found: list[_Record] = []
    paths = _control.sockets(pid)
    if not paths:
        raise _Unanswered(f"process {pid} has no control socket")
    for path in paths:
        with trio.move_on_after(ANSWER_WITHIN) as patience:
            async with _control.connect(path) as channel:
                try:
                    found += (await channel.ask("statistics", name=name)).body["devices"]
                except _control.ControlError as error:
                    # Another socket of the process is for upgrades, and knows of nothing else.
                    if "no verb" not in str(error):
                        raise
        if patience.cancelled_caught:
            raise _Unanswered(f"process {pid} does not answer within {ANSWER_WITHIN:g} s: its log may say why")
    return found


def statistics(name: str) -> _Record:
    """Asks the process that serves a device for its statistics.

    Args:
        name: Name of the backstore.

    Raises:
        LioError: There is no such device, nobody serves it, or the process does not answer.
    """
    backstore = _lio.find_backstore(name)
    if backstore is None:
        raise _lio.LioError(f"no device {name}", "`tcmu-rs list` shows the devices")
    uio = _sysfs.find(backstore.hba, name)
    pid = _sysfs.serving_pids([uio]).get(uio.minor) if uio is not None else None
    if pid is None:
        raise _lio.LioError(f"nobody serves device {name}", "`tcmu-rs list` shows its state; only root sees all")
    try:
        for record in trio.run(_ask, pid, name):
            return record
    except (_Unanswered, _control.ControlError) as error:
        raise _lio.LioError(f"no statistics of {name}: {error}", "only tcmu-rs gives them") from error
    raise _lio.LioError(f"process {pid} does not know of {name}", "ask again: it may just be starting")


def describe(record: _Record) -> Iterator[str]:
    """The statistics of a device, line by line."""
    yield f"device: {record['name']}, served by {record['handler']}"
    yield (
        f"commands: {record['commands']}, of which {record['emulated']} without the handler; in {record['batches']} "
        f"batches, with {record['doorbells']} doorbells"
    )
    yield (
        f"now: {record['in_flight']} in flight, {record['running']} in the handler, "
        f"{record['pending']} that wait for it"
    )
    for verb, counted in record["verbs"].items():
        yield f"{verb}: {counted['calls']} calls, {_bytes(counted['bytes'])}"
        yield f"{verb}, handler: {_latency(counted['handler'])}"
    for stage in ("ring_wait", "dispatch", "completion"):
        if record[stage]["count"]:
            yield f"{stage.replace('_', ' ')}: {_latency(record[stage])}"
    for error, count in record["errors"].items():
        yield f"answered {error}: {count}"
    # A server of an older version has none.
    for number in record.get("storage", {}).items():
        yield f"storage, {_number(*number)}"
    for late in record["late"]:
        yield _late(late)


def _late(late: _Record) -> str:
    cancelled = ", cancelled" if late["cancelled"] else ""
    what = f"{late['verb']} of {late['length']} bytes at {late['offset']}"
    return f"late: {what} for {late['age']:.0f} s{cancelled}, at {late['where']}"


def _latency(latency: _Record) -> str:
    parts = (("half", "p50"), ("90 %", "p90"), ("99 %", "p99"), ("99.9 %", "p999"), ("all", "most"))
    return ", ".join(f"{word} within {_seconds(latency[key])}" for word, key in parts)


def _seconds(seconds: float) -> str:
    for unit, factor in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * factor >= 1:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def _number(name: str, value: float) -> str:
    """What a handler tells, for people."""
    text = _bytes(value) if name.endswith("_bytes") else f"{value:.12g}" if value == int(value) else f"{value:.2f}"
    return f"{printable(name).removesuffix('_bytes').replace('_', ' ')}: {text}"


def _bytes(count: float) -> str:
    if count < 1024:
        return f"{count:.0f} B"
    power = min(int(math.log2(count) // 10), 5)
    return f"{count / (1 << 10 * power):.1f} {' KMGTP'[power]}iB"


async def top(interval: float, rounds: int | None = None) -> None:
    """Shows all devices of this machine, and what they do, until cancelled.

    Args:
        interval: Seconds between two looks.
        rounds: How many times to look; None for ever.
    """
    from rich.live import Live

    before: dict[tuple[int, str], tuple[float, _Record]] = {}
    with Live(screen=rounds is None, auto_refresh=False) as live:
        while rounds is None or rounds > 0:
            now = trio.current_time()
            records, problems = await _all()
            live.update(_table(records, problems, before, now), refresh=True)
            before = {(pid, str(record["name"])): (now, record) for pid, record in records}
            if rounds is not None:
                rounds -= 1
            if rounds != 0:
                await trio.sleep(interval)


async def _all() -> tuple[list[tuple[int, _Record]], list[str]]:
    records: list[tuple[int, _Record]] = []
    problems: list[str] = []

    async def of_one(pid: int) -> None:
        try:
            records.extend((pid, record) for record in await _ask(pid, None))
        except (_Unanswered, _control.ControlError) as error:
            problems.append(str(error))

    pids = await trio.to_thread.run_sync(lambda: set(_sysfs.serving_pids(_sysfs.scan()).values()))
    async with trio.open_nursery() as nursery:
        for pid in pids:
            nursery.start_soon(of_one, pid)
    return sorted(records, key=lambda item: str(item[1]["name"])), problems


def _table(
    records: Sequence[tuple[int, _Record]],
    problems: Sequence[str],
    before: Mapping[tuple[int, str], tuple[float, _Record]],
    now: float,
) -> RenderableType:
    from rich.console import Group
    from rich.markup import escape
    from rich.table import Table

    table = Table("NAME", "HANDLER", "PID", box=None, pad_edge=False)
    for column in ("READ/S", "WRITE/S", "READ", "WRITTEN", "WAIT", "HANDLER P50", "P99", "IN FLIGHT", "ERRORS", "LATE"):
        table.add_column(column, justify="right")
    notes: list[str] = []
    for pid, record in records:
        since, old = before.get((pid, str(record["name"])), (now, record))
        table.add_row(
            escape(printable(str(record["name"]))),
            escape(str(record["handler"])),
            str(pid),
            *_rates(record, old, now - since),
            _seconds(record["dispatch"]["p50"]) if record["dispatch"]["count"] else "-",
            *_handler(record),
            str(record["in_flight"]),
            str(sum(record["errors"].values())),
            str(len(record["late"])),
        )
        told = [_number(*number) for number in record.get("storage", {}).items()]
        below = [_late(late) for late in record["late"]] + ([", ".join(told)] if told else [])
        notes += [escape(printable(f"{record['name']}: {line}")) for line in below]
    return Group(table, *notes, *map(escape, problems))


def _rates(record: _Record, old: _Record, seconds: float) -> Iterator[str]:
    def rate(verb: str, what: str) -> float:
        grown = record["verbs"].get(verb, {}).get(what, 0) - old["verbs"].get(verb, {}).get(what, 0)
        return grown / seconds if seconds else 0.0

    for verb in ("read", "write"):
        yield f"{rate(verb, 'calls'):.0f}"
    for verb in ("read", "write"):
        yield f"{_bytes(rate(verb, 'bytes'))}/s"


def _handler(record: _Record) -> Iterator[str]:
    """The handler's times of whatever it does most."""
    verbs: list[_Record] = sorted(record["verbs"].values(), key=lambda counted: int(counted["calls"]))
    for key in ("p50", "p99"):
        yield _seconds(verbs[-1]["handler"][key]) if verbs else "-"
