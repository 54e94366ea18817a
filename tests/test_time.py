"""Commands that take too long, handlers that do not listen, loops that stand still; and what is counted of all this."""

from __future__ import annotations

import dataclasses
import json
import math
import threading
import time
from contextlib import suppress
from typing import Any, ClassVar

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

import tcmu_rs
from tcmu_rs import IoVec, _statistics, _top, _watchdog, _where
from tcmu_rs.testing import SimulatedDisk, simulated

from .conftest import Log
from .disks import (
    BLOCK,
    BUSY,
    CHECK_CONDITION,
    GOOD,
    TASK_ABORTED,
    TEST_UNIT_READY,
    AsyncDisk,
    Gated,
    PlainDisk,
    Storage,
    read16,
    write16,
)

COMMAND_TIMEOUT_DURING_PROCESSING = (0xB, 0x2E, 0x02)


def line_of(text: str) -> int:
    """Where this file has a line."""
    with open(__file__) as file:  # noqa: PTH123
        return next(number for number, line in enumerate(file, 1) if line.strip() == text)


# Deadlines.


async def test_a_command_is_cancelled_and_answered_at_its_deadline(autojump_clock: MockClock, log: Log) -> None:
    handler = Gated(2)
    async with simulated(handler, deadline=20) as disk:
        hung, fine = (disk.submit(read16(block), data_in=BLOCK) for block in (0, 1))
        handler.open_gate(1)
        assert (await disk.wait(fine)).status == GOOD
        reply = await disk.wait(hung)
        assert 19 <= trio.current_time() <= 20
        assert (reply.status, reply.sense_code) == (CHECK_CONDITION, COMMAND_TIMEOUT_DURING_PROCESSING)
        assert handler.cancelled == [0]
        message = log.expect("is cancelled after 20 s")
        assert "Gated.read() of 512 bytes at 0" in message
        assert "disks.py:" in message
        assert "in read(), which awaits trio's wait()" in message
        assert disk.device.statistics().errors == {"B/2E/02": 1}
        handler.open_gate(0)
        assert (await disk.scsi(read16(0), data_in=BLOCK)).status == GOOD


async def test_a_command_without_a_turn_is_sent_away_at_the_deadline(autojump_clock: MockClock, log: Log) -> None:
    handler = Gated(1)
    async with simulated(handler, deadline=20) as disk:
        tickets = [disk.submit(read16(0), data_in=BLOCK) for _ in range(3)]
        replies = [await disk.wait(ticket) for ticket in tickets]
        assert trio.current_time() <= 20
        assert {reply.status for reply in replies[1:]} == {BUSY}
        log.expect("is cancelled")
        log.expect("2 commands had no turn within 20 s")
    assert handler.entered == [0]


async def test_a_slow_device_that_gets_on_keeps_to_the_deadline(autojump_clock: MockClock, log: Log) -> None:
    class Slow(Storage):
        async def read(self, offset: int, iov: IoVec) -> None:
            await trio.sleep(3)
            self.load(offset, iov)

    async with simulated(Slow(), deadline=20) as disk:
        tickets = [disk.submit(read16(0), data_in=BLOCK) for _ in range(10)]
        statuses = [(await disk.wait(ticket)).status for ticket in tickets]
        assert trio.current_time() <= 24
    assert statuses[:6] == [GOOD] * 6
    assert set(statuses[7:]) == {BUSY}
    log.expect("had no turn")
    log.records.clear()


async def test_the_deadline_covers_all_steps_of_a_command(autojump_clock: MockClock, log: Log) -> None:
    class SlowFlush(AsyncDisk):
        async def flush(self) -> None:
            await trio.sleep_forever()

    async with simulated(SlowFlush(), deadline=10) as disk:
        reply = await disk.scsi(write16(0, fua=True), b"x" * BLOCK)
        assert reply.sense_code == COMMAND_TIMEOUT_DURING_PROCESSING
        assert "SlowFlush.flush()" in log.expect("is cancelled")


async def test_nobody_looks_at_commands_that_do_not_wait() -> None:
    async with simulated(PlainDisk(), deadline=10) as disk:
        await disk.read(0, 1 << 16)
        assert not disk.device._engine._overseer.running


async def test_an_idle_device_is_left_alone(autojump_clock: MockClock) -> None:
    async with simulated(AsyncDisk(), deadline=10) as disk:
        await disk.read(0, BLOCK)
        await trio.sleep(100)
        assert not disk.device._engine._overseer.running
        await disk.read(0, BLOCK)


async def test_a_handler_that_ignores_the_cancellation_is_named(autojump_clock: MockClock, log: Log) -> None:
    class Deaf(Storage):
        max_in_flight = 4

        async def read(self, offset: int, iov: IoVec) -> None:
            if offset == 0:
                with trio.CancelScope(shield=True):
                    await trio.sleep(60)
            self.load(offset, iov)

    async with simulated(Deaf(), deadline=20) as disk:
        ticket = disk.submit(read16(0), data_in=BLOCK)
        # Others go on meanwhile.
        for block in range(1, 4):
            await disk.read(block * BLOCK, BLOCK)
            await trio.sleep(10)
        reply = await disk.wait(ticket)
        # What it did in the end, it did: the answer is not false because it is late.
        assert reply.status == GOOD
        log.expect("is cancelled after 20 s")
        message = log.expect("was cancelled and goes on")
        assert f"test_time.py:{line_of('await trio.sleep(60)')} in read()" in message


async def test_an_aborted_command_that_goes_on_is_named_too(autojump_clock: MockClock, log: Log) -> None:
    class Stubborn(Storage):
        async def read(self, offset: int, iov: IoVec) -> None:
            with trio.CancelScope(shield=True):
                await trio.sleep(30)
            self.load(offset, iov)

    async with simulated(Stubborn()) as disk:
        ticket = disk.submit(read16(0), data_in=BLOCK)
        await wait_all_tasks_blocked()
        disk.abort(ticket)
        assert (await disk.wait(ticket)).status == GOOD
        log.expect("Stubborn.read() of 512 bytes at 0 was cancelled and goes on")
        assert not log.records


@pytest.mark.parametrize("kind", [1, 5])
async def test_task_management_cancels_what_it_means_and_no_more(kind: int) -> None:
    handler = Gated(4)
    async with simulated(handler) as disk:
        tickets = [disk.submit(read16(block), data_in=BLOCK) for block in range(6)]
        await wait_all_tasks_blocked()
        meant = [1, 2, 5] if kind == 1 else list(range(6))
        disk.abort(*(tickets[block] for block in meant), kind=kind)
        for block in meant:
            assert (await disk.wait(tickets[block])).status == TASK_ABORTED
        handler.open_gate(*range(6))
        for block in set(range(6)) - set(meant):
            assert (await disk.wait(tickets[block])).status == GOOD


# Where something waits.


async def test_the_line_at_which_a_coroutine_waits() -> None:
    event = trio.Event()

    async def inner() -> None:
        await event.wait()

    async def outer() -> None:
        await inner()

    coroutine = outer()
    coroutine.send(None)
    place = f"{__file__}:{line_of('await event.wait()')} in inner(), which awaits trio's wait()"
    assert _where.await_point(coroutine) == place
    with suppress(trio.Cancelled, RuntimeError):
        coroutine.close()
    assert _where.await_point(coroutine) == "unknown"
    assert _where.await_point(None) == "unknown"


async def test_late_commands_say_what_they_wait_for() -> None:
    entered, go = threading.Event(), threading.Event()

    class Slow(Storage):
        max_in_flight = 2

        @tcmu_rs.blocking
        def read(self, offset: int, iov: IoVec) -> None:
            entered.set()
            assert go.wait(60)
            self.load(offset, iov)

    def late(disk: SimulatedDisk) -> tuple[_statistics.LateCommand, ...]:
        return disk.device.statistics().late

    async with simulated(Slow()) as disk:
        ticket = disk.submit(read16(3), data_in=BLOCK)
        await trio.to_thread.run_sync(entered.wait)
        assert late(disk) == ()
        with trio.fail_after(60):
            while not late(disk):  # noqa: ASYNC110 - nothing happens when a command becomes late
                await trio.sleep(0.1)
        (command,) = late(disk)
        assert (command.verb, command.offset, command.length, command.cancelled) == ("read", 3 * BLOCK, BLOCK, False)
        assert command.age > 1
        assert command.where.endswith("in a thread")
        go.set()
        await disk.wait(ticket)
        assert late(disk) == ()


# Loops that stand still.


async def test_a_handler_that_blocks_the_loop_is_named(log: Log) -> None:
    class Blocks(Storage):
        def read(self, offset: int, iov: IoVec) -> None:
            until = time.monotonic() + 60
            while not log.records and time.monotonic() < until:
                time.sleep(0.01)
            self.load(offset, iov)

    with _watchdog.watching(0.05):
        async with simulated(Blocks()) as disk:
            await disk.read(0, BLOCK)
            message = log.expect("the event loop stands still")
            assert f"test_time.py:{line_of('time.sleep(0.01)')} in read()" in message
            with trio.fail_after(60):
                while not log.records:  # noqa: ASYNC110 - another thread logs
                    await trio.sleep(0.01)
            log.expect("the event loop goes on")


async def test_a_watch_is_shared_and_ends_with_the_last() -> None:
    before = threading.active_count()
    async with simulated(PlainDisk(), name="a"):
        async with simulated(PlainDisk(), name="b"):
            assert threading.active_count() == before + 1
        assert threading.active_count() == before + 1
    assert threading.active_count() == before
    async with simulated(PlainDisk()):
        assert threading.active_count() == before + 1


# Statistics.


class Failing(AsyncDisk):
    async def read(self, offset: int, iov: IoVec) -> None:
        if offset == BLOCK:
            raise tcmu_rs.MediumError("worn out")
        await super().read(offset, iov)


async def test_what_is_counted(log: Log) -> None:
    async with simulated(Failing()) as disk:
        idle = disk.device.statistics()
        assert (idle.commands, idle.verbs, idle.ring_wait.count) == (0, {}, 0)
        for block in (0, 2, 4):
            await disk.read(block * BLOCK, 2 * BLOCK)
        await disk.write(0, bytes(8 * BLOCK))
        await disk.scsi(TEST_UNIT_READY)
        await disk.scsi(read16(1), data_in=BLOCK)
        await disk.scsi(bytes([0xFF, 0, 0, 0, 0, 0, 0, 0, 0, 0]))
        await wait_all_tasks_blocked()
        found = disk.device.statistics()
    log.expect("worn out")
    assert (found.commands, found.emulated, found.in_flight, found.running, found.pending) == (7, 2, 0, 0, 0)
    assert {name: (verb.calls, verb.bytes) for name, verb in found.verbs.items()} == {
        "read": (4, 6 * BLOCK),
        "write": (1, 8 * BLOCK),
    }
    assert found.errors == {"3/11/00": 1, "5/20/00": 1}
    assert (found.ring_wait.count, found.dispatch.count, found.completion.count) == (7, 5, 5)
    read = found.verbs["read"].handler
    assert read.count == sum(read.buckets) == 4
    assert 0 < read.least <= read.p50 <= read.p90 <= read.p99 <= read.p999 <= read.most * 1.01
    assert read.mean == pytest.approx(read.total / 4)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.commands = 1  # type: ignore[misc]
    assert json.loads(json.dumps(_statistics.as_json(found)))["verbs"]["write"]["bytes"] == 8 * BLOCK


class Telling(PlainDisk):
    told: ClassVar[dict[str, Any]] = {"ratio": 2.125, "dirty_bytes": 3 << 20, "moves": 4}

    def statistics(self) -> dict[str, Any]:
        return self.told


async def test_what_a_handler_tells_of_its_storage(log: Log) -> None:
    async with simulated(Telling()) as disk:
        found = disk.device.statistics()
        assert found.storage == Telling.told
        record = {"name": "disk", "handler": "Telling"} | json.loads(json.dumps(_statistics.as_json(found)))
        assert [line for line in _top.describe(record) if line.startswith("storage")] == [
            "storage, ratio: 2.12",
            "storage, dirty: 3.0 MiB",
            "storage, moves: 4",
        ]
    for told in ({"x": "much"}, {1: 2}, {"x": math.nan}, None):
        handler = Telling()
        handler.told = told  # type: ignore[misc,assignment]
        async with simulated(handler) as disk:
            assert disk.device.statistics().storage == {}
        log.expect("Telling.statistics() failed")


async def test_all_commands_of_a_full_batch_are_counted_though_some_are_timed() -> None:
    async with simulated(PlainDisk()) as disk:
        disk.kernel.plug()
        tickets = [disk.submit(read16(block), data_in=BLOCK) for block in range(100)]
        disk.kernel.unplug()
        for ticket in tickets:
            await disk.wait(ticket)
        found = disk.device.statistics()
    assert found.verbs["read"].calls == 100
    assert found.verbs["read"].bytes == 100 * BLOCK
    # One batch of 64 and one of 36, and every fifth command counts for five.
    assert (found.batches, found.verbs["read"].handler.count) == (2, 100)
    # The second batch was seen when the first one was taken.
    assert found.ring_wait.count == 100
    assert found.ring_wait.least == 0
    assert found.ring_wait.p50 < 1e-7
    assert found.ring_wait.p90 > 1e-7
