"""What a device tells of itself: records of counters, and of where the time of its commands goes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

VERBS = ("read", "write", "flush", "discard", "write_zeroes", "extents", "command")
"""Names of the native module's kinds of calls, in its order."""

LATE = 1.0
"""Seconds after which a command is late."""

_STATUSES = {0x02: "CHECK CONDITION", 0x08: "BUSY", 0x18: "RESERVATION CONFLICT", 0x28: "TASK SET FULL"}
_STATUSES |= {0x30: "ACA ACTIVE", 0x40: "TASK ABORTED", 0x04: "CONDITION MET"}


@dataclass(frozen=True, slots=True)
class Latency:
    """A histogram of times, in seconds, with a precision of 1 %.

    Attributes:
        count: Times in it. Of many commands at once every fifth one is timed, and counts for five.
        total: Their sum.
        least: The shortest.
        most: The longest.
        p50: The median.
        p90: 90 % took no longer.
        p99: 99 %.
        p999: 99.9 %.
        buckets: Counts of times below 1 ns, below 2 ns, below 4 ns and so on, up to the longest.
    """

    count: int = 0
    total: float = 0.0
    least: float = 0.0
    most: float = 0.0
    p50: float = 0.0
    p90: float = 0.0
    p99: float = 0.0
    p999: float = 0.0
    buckets: tuple[int, ...] = ()

    @property
    def mean(self) -> float:
        """The average; 0 of none."""
        return self.total / self.count if self.count else 0.0


@dataclass(frozen=True, slots=True)
class VerbStatistics:
    """How a handler does what it is asked for in one way.

    Attributes:
        calls: Calls that are over.
        bytes: Bytes of those that succeeded.
        handler: From the call to the return, or to the exception.
    """

    calls: int
    bytes: int
    handler: Latency


@dataclass(frozen=True, slots=True)
class LateCommand:
    """A command that waits for its handler for longer than a second.

    Attributes:
        verb: Name of the handler's method.
        offset: In bytes; 0 if it has none.
        length: In bytes.
        age: Seconds since it was fetched from the ring.
        where: What it waits for: file, line and function.
        cancelled: It was told to end, by its deadline or by task management.
    """

    verb: str
    offset: int
    length: int
    age: float
    where: str
    cancelled: bool


@dataclass(frozen=True, slots=True)
class DeviceStatistics:
    """A device at one moment; counters run since it is served.

    The kernel does not say when it put a command into the ring, so the ring wait is a lower bound: it begins when we
    saw the command there, by the event or behind others that filled a batch.

    Attributes:
        commands: Commands taken from the ring.
        emulated: Those answered without the handler.
        doorbells: Times that answers were handed to the kernel.
        wakeups: Times that the kernel's event was taken.
        batches: Times that commands were found in the ring.
        in_flight: Commands that are not answered now.
        running: Those in the handler now.
        pending: Those that wait for their turn now.
        errors: Answers other than GOOD, by status, or sense as `KEY/ASC/ASCQ` in hexadecimal.
        verbs: What the handler was asked for; `command` counts whole commands.
        ring_wait: From when we saw it in the ring to its fetch.
        dispatch: From the fetch to the call of the handler.
        completion: From the handler's return to the doorbell.
        late: Commands that wait for longer than a second now, the oldest first.
        storage: What the handler tells about its storage: see `Handler.statistics`.
    """

    commands: int
    emulated: int
    doorbells: int
    wakeups: int
    batches: int
    in_flight: int
    running: int
    pending: int
    errors: Mapping[str, int]
    verbs: Mapping[str, VerbStatistics]
    ring_wait: Latency
    dispatch: Latency
    completion: Latency
    late: tuple[LateCommand, ...]
    storage: Mapping[str, float]


def _latency(summary: Any) -> Latency:
    if summary is None:
        return Latency()
    count, total, least, most, percentiles, buckets = summary
    p50, p90, p99, p999 = (value / 1e9 for value in percentiles)
    return Latency(count, total / 1e9, least / 1e9, most / 1e9, p50, p90, p99, p999, tuple(buckets))


def _error(status: int, sense: tuple[int, int, int] | None) -> str:
    if sense is not None:
        return "{:X}/{:02X}/{:02X}".format(*sense)
    return _STATUSES.get(status, f"status {status:02X}")


def record(
    counted: Mapping[str, Any],
    *,
    in_flight: int,
    running: int,
    pending: int,
    late: tuple[LateCommand, ...],
    storage: Mapping[str, float],
) -> DeviceStatistics:
    """Makes the record of what the native module has counted."""
    return DeviceStatistics(
        **{name: counted[name] for name in ("commands", "emulated", "doorbells", "wakeups", "batches")},
        in_flight=in_flight,
        running=running,
        pending=pending,
        errors=MappingProxyType({_error(*failure): count for failure, count in counted["failures"]}),
        verbs=MappingProxyType(
            {
                name: VerbStatistics(calls, length, _latency(handler))
                for name, (calls, length, handler) in zip(VERBS, counted["calls"], strict=True)
                if calls
            }
        ),
        ring_wait=_latency(counted["ring_wait"]),
        dispatch=_latency(counted["dispatch"]),
        completion=_latency(counted["completion"]),
        late=late,
        storage=storage,
    )


def numbers(told: Mapping[str, float]) -> Mapping[str, float]:
    """What a handler tells, once it is known to be what it should be.

    Raises:
        TypeError: It is something else.
    """
    for name, value in told.items():
        if not isinstance(name, str) or not isinstance(value, int | float) or not math.isfinite(value):
            raise TypeError(f"{name!r}: {value!r} is no name and number")
    return MappingProxyType(dict(told))


def as_json(value: Any) -> Any:
    """A record, and what is in it, as JSON has it."""
    if hasattr(value, "__dataclass_fields__"):
        return {name: as_json(getattr(value, name)) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {key: as_json(inner) for key, inner in value.items()}
    return [as_json(inner) for inner in value] if isinstance(value, tuple) else value
