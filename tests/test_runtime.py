"""The engine: depth, aborts, the end of a device, devices that break."""

from __future__ import annotations

import gc
import struct
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

import tcmu_rs
from tcmu_rs import IoVec, RingCorruptError, _native
from tcmu_rs._runtime import Device
from tcmu_rs._service import serve_ring
from tcmu_rs._workers import Workers
from tcmu_rs.testing import CAP_KEEP_BUF, CAP_OOOC, CAP_READ_LEN, CAP_TMR, SimulatedDisk, simulated

from .conftest import Log
from .disks import (
    BLOCK,
    BUSY,
    GOOD,
    SYNCHRONIZE_CACHE,
    TASK_ABORTED,
    TEST_UNIT_READY,
    AsyncDisk,
    BlockingDisk,
    Gated,
    PlainDisk,
    Storage,
    compare_and_write,
    read16,
    write16,
)

HEAD = 12
"""Where the mailbox has `cmd_head`."""


def submit_reads(disk: SimulatedDisk, *blocks: int) -> list[int]:
    return [disk.submit(read16(block), data_in=BLOCK) for block in blocks]


# Depth.


@pytest.mark.parametrize("depth", [1, 2, 5, 32])
async def test_max_in_flight_is_reached_and_never_passed(depth: int) -> None:
    handler = Gated(depth)
    async with simulated(handler) as disk:
        tickets = submit_reads(disk, *range(3 * depth))
        for done in range(0, 3 * depth, depth):
            await wait_all_tasks_blocked()
            assert handler.running == depth
            handler.open_gate(*range(done, done + depth))
        for ticket in tickets:
            assert (await disk.wait(ticket)).status == GOOD
    assert handler.most == depth
    assert handler.entered == sorted(handler.entered)


async def test_workers_do_not_multiply() -> None:
    """All workers of a batch suspended in one pass of the loop, each called for another, and all of them came."""
    handler = Gated(8)
    async with simulated(handler) as disk:
        tickets = submit_reads(disk, *range(64))
        for block in range(64):
            await wait_all_tasks_blocked()
            assert disk.device._engine._workers.count <= handler.max_in_flight + 2
            handler.open_gate(block)
        for ticket in tickets:
            await disk.wait(ticket)


async def test_nobody_is_hired_when_all_have_left() -> None:
    """A transfer may end between the end of the last worker and that of the nursery, which is closed by then."""

    async def work() -> None:
        workers.leave()

    workers = Workers(work, "worker")
    workers.limit = 2
    async with trio.open_nursery() as workers.nursery:
        workers.hire()
    workers.call(1)
    assert workers.count == 0


@pytest.mark.parametrize("depth", [1, 3])
async def test_emulated_commands_are_answered_while_every_worker_hangs(depth: int) -> None:
    handler = Gated(depth)
    async with simulated(handler) as disk:
        tickets = submit_reads(disk, *range(2 * depth))
        await wait_all_tasks_blocked()
        assert (await disk.scsi(TEST_UNIT_READY)).status == GOOD
        handler.open_gate(*range(2 * depth))
        for ticket in tickets:
            await disk.wait(ticket)


@pytest.mark.parametrize("depth", [1, 3])
async def test_a_finished_command_does_not_wait_for_the_one_that_takes_its_place(depth: int) -> None:
    """A worker that went on to a waiting command kept the answer to the last one until the ring had news.

    With all workers busy and the ring watched, nobody was called who would have handed it back.
    """
    handler = Gated(depth)
    async with simulated(handler) as disk:
        tickets = submit_reads(disk, *range(2 * depth))
        await wait_all_tasks_blocked()
        for block in range(depth):
            handler.open_gate(block)
            await wait_all_tasks_blocked()
            assert disk.answered(tickets[block])
            assert handler.running == depth
        handler.open_gate(*range(2 * depth))


async def test_answers_of_one_pass_share_a_doorbell() -> None:
    handler = Gated(16)
    async with simulated(handler) as disk:
        tickets = submit_reads(disk, *range(32))
        await wait_all_tasks_blocked()
        before = disk.device.statistics().doorbells
        handler.open_gate(*range(16))
        await wait_all_tasks_blocked()
        assert all(map(disk.answered, tickets[:16]))
        assert disk.device.statistics().doorbells - before <= 2
        handler.open_gate(*range(16, 32))


async def test_a_handler_that_never_suspends_needs_one_doorbell_for_a_batch() -> None:
    async with simulated(PlainDisk()) as disk:
        disk.kernel.plug()
        tickets = submit_reads(disk, *range(32))
        disk.kernel.unplug()
        for ticket in tickets:
            await disk.wait(ticket)
        counted = disk.device.statistics()
    assert counted.commands == 32
    assert counted.doorbells == 1
    assert counted.wakeups == 1


@pytest.mark.parametrize("disk_class", [PlainDisk, AsyncDisk, BlockingDisk])
@pytest.mark.parametrize("capabilities", [CAP_OOOC | CAP_READ_LEN | CAP_TMR | CAP_KEEP_BUF, CAP_TMR, 0])
@pytest.mark.parametrize(("ring_size", "data_size"), [(4096, 16384), (8192, 1 << 20), (1 << 20, 1 << 20)])
async def test_tiny_rings_and_data_areas_under_load(
    disk_class: type[Storage], capabilities: int, ring_size: int, data_size: int
) -> None:
    handler = disk_class(256 * BLOCK)
    async with simulated(handler, ring_size=ring_size, data_size=data_size, capabilities=capabilities) as disk:

        async def write_and_read(block: int) -> None:
            data = bytes([block]) * 4 * BLOCK
            await disk.write(4 * block * BLOCK, data)
            assert await disk.read(4 * block * BLOCK, 4 * BLOCK) == data

        async with trio.open_nursery() as nursery:
            for block in range(64):
                nursery.start_soon(write_and_read, block)
    assert handler.data == b"".join(bytes([block]) * 4 * BLOCK for block in range(64))


async def test_answers_out_of_order_overtake_and_in_order_wait() -> None:
    for capabilities, overtakes in (CAP_OOOC, True), (0, False):
        handler = Gated(2)
        async with simulated(handler, capabilities=capabilities) as disk:
            slow, fast = submit_reads(disk, 0, 1)
            handler.open_gate(1)
            await wait_all_tasks_blocked()
            assert disk.answered(fast) is overtakes
            handler.open_gate(0)
            assert (await disk.wait(slow)).status == (await disk.wait(fast)).status == GOOD


# Aborts.


async def test_an_abort_ends_that_command_and_no_other() -> None:
    handler = Gated(4)
    async with simulated(handler) as disk:
        tickets = submit_reads(disk, 0, 1, 2)
        await wait_all_tasks_blocked()
        disk.abort(tickets[1])
        assert (await disk.wait(tickets[1])).status == TASK_ABORTED
        assert handler.cancelled == [1]
        handler.open_gate(0, 2)
        assert (await disk.wait(tickets[0])).status == (await disk.wait(tickets[2])).status == GOOD
    assert handler.cancelled == [1]


async def test_a_hung_command_is_aborted_where_only_one_may_run() -> None:
    handler = Gated(1)
    async with simulated(handler) as disk:
        hung, waiting = submit_reads(disk, 0, 1)
        await wait_all_tasks_blocked()
        disk.abort(hung)
        assert (await disk.wait(hung)).status == TASK_ABORTED
        handler.open_gate(1)
        assert (await disk.wait(waiting)).status == GOOD


async def test_a_command_that_has_not_begun_is_aborted_without_its_handler() -> None:
    handler = Gated(1)
    async with simulated(handler) as disk:
        hung, waiting = submit_reads(disk, 0, 1)
        await wait_all_tasks_blocked()
        disk.abort(waiting)
        assert (await disk.wait(waiting)).status == TASK_ABORTED
        handler.open_gate(0)
        assert (await disk.wait(hung)).status == GOOD
    assert handler.entered == [0]


async def test_an_abort_is_heard_behind_thousands_of_commands() -> None:
    """With 1024 commands waiting the ring was not looked at any more, and the abort lay in it behind them."""
    handler = Gated(1)
    async with simulated(handler) as disk:
        tickets = submit_reads(disk, *range(1500))
        await wait_all_tasks_blocked()
        disk.abort(tickets[0])
        assert (await disk.wait(tickets[0])).status == TASK_ABORTED
        handler.open_gate(*range(1500))
        for ticket in tickets[1:]:
            await disk.wait(ticket)


async def test_an_abort_of_a_command_that_is_over_harms_nobody() -> None:
    handler = Gated(2)
    async with simulated(handler) as disk:
        (first,) = submit_reads(disk, 0)
        await wait_all_tasks_blocked()
        handler.open_gate(0)
        disk.abort(first)
        await disk.wait(first)
        (second,) = submit_reads(disk, 1)
        handler.open_gate(1)
        assert (await disk.wait(second)).status == GOOD


async def test_a_late_abort_does_not_reach_the_next_command_of_the_same_id() -> None:
    """The kernel has announced it, and the command ends before that is looked at; its id is the next one's at once."""
    handler = Gated(2)
    async with simulated(handler) as disk, trio.open_nursery() as nursery:
        (first,) = submit_reads(disk, 0)
        await wait_all_tasks_blocked()

        async def end_after_its_abort() -> None:
            await wait_all_tasks_blocked()
            disk.abort(first)
            handler.open_gate(0)

        nursery.start_soon(end_after_its_abort)
        await disk.device.pause(10)
        assert (await disk.wait(first)).status == GOOD
        (second,) = submit_reads(disk, 0)
        disk.device.resume()
        assert (await disk.wait(second)).status == GOOD


async def test_workers_survive_any_number_of_aborts() -> None:
    handler = Gated(2)
    async with simulated(handler) as disk:
        for _ in range(50):
            tickets = submit_reads(disk, 0, 1, 2)
            await wait_all_tasks_blocked()
            disk.abort(*tickets)
            for ticket in tickets:
                assert (await disk.wait(ticket)).status == TASK_ABORTED
        assert disk.device._engine._workers.count <= 4
        handler.open_gate(0)
        await disk.read(0, BLOCK)


async def test_a_handler_that_swallows_cancellation_has_its_way() -> None:
    class Stubborn(Storage):
        async def read(self, offset: int, iov: IoVec) -> None:
            with suppress(trio.Cancelled):
                await trio.sleep_forever()
            self.load(offset, iov)

    async with simulated(Stubborn()) as disk:
        for _ in range(3):
            (ticket,) = submit_reads(disk, 0)
            await wait_all_tasks_blocked()
            disk.abort(ticket)
            reply = await disk.wait(ticket)
            assert (reply.status, reply.data) == (GOOD, bytes(BLOCK))


async def test_an_abort_reaches_the_later_steps_of_a_command() -> None:
    class SlowFlush(PlainDisk):
        async def flush(self) -> None:
            await trio.sleep_forever()

    handler = SlowFlush()
    async with simulated(handler) as disk:
        ticket = disk.submit(write16(1, fua=True), b"a" * BLOCK)
        await wait_all_tasks_blocked()
        disk.abort(ticket)
        assert (await disk.wait(ticket)).status == TASK_ABORTED
    assert handler.data[BLOCK : 2 * BLOCK] == b"a" * BLOCK


async def test_a_thread_is_waited_for_although_its_command_is_aborted() -> None:
    entered, go = threading.Event(), threading.Event()

    class Slow(Storage):
        @tcmu_rs.blocking
        def read(self, offset: int, iov: IoVec) -> None:
            entered.set()
            assert go.wait(60)
            self.load(offset, iov)

    async with simulated(Slow()) as disk:
        (ticket,) = submit_reads(disk, 0)
        await trio.to_thread.run_sync(entered.wait)
        disk.abort(ticket)
        await wait_all_tasks_blocked()
        assert not disk.answered(ticket)
        go.set()
        await disk.wait(ticket)


async def test_a_second_failure_during_an_abort_does_not_end_the_device(log: Log) -> None:
    """A handler with a nursery ends in a group of Cancelled and its own error; that error ended the device."""

    class Mirror(Storage):
        async def read(self, offset: int, iov: IoVec) -> None:
            if offset:
                return self.load(offset, iov)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.sleep_forever)
                nursery.start_soon(self.fail_in_the_end)
            return None

        async def fail_in_the_end(self) -> None:
            try:
                await trio.sleep_forever()
            finally:
                raise ValueError("while cleaning up")

    async with simulated(Mirror(), strict=False) as disk:
        (ticket,) = submit_reads(disk, 0)
        await wait_all_tasks_blocked()
        disk.abort(ticket)
        assert (await disk.wait(ticket)).status == TASK_ABORTED
        log.expect("while cleaning up")
        await disk.read(BLOCK, BLOCK)


# The end of a device.


async def test_commands_in_flight_get_a_grace_period(autojump_clock: MockClock) -> None:
    handler = Gated(2)
    tickets = []

    async def finish_late() -> None:
        await trio.sleep(5)
        handler.open_gate(0, 1)

    async with trio.open_nursery() as nursery:
        async with simulated(handler, grace=6) as disk:
            tickets = submit_reads(disk, 0, 1)
            await wait_all_tasks_blocked()
            nursery.start_soon(finish_late)
        for ticket in tickets:
            assert (await disk.wait(ticket)).status == GOOD
    assert trio.current_time() == pytest.approx(5)


async def test_what_does_not_finish_in_the_grace_period_is_aborted(autojump_clock: MockClock) -> None:
    handler = Gated(2)
    async with simulated(handler, grace=6) as disk:
        hung, finishing, waiting = submit_reads(disk, 0, 1, 2)
        await wait_all_tasks_blocked()
        disk.device.stop()
        disk.device.stop()
        await wait_all_tasks_blocked()
        handler.open_gate(1)
        await wait_all_tasks_blocked()
        # Not at the end of the grace period: nobody who is done waits for others.
        assert disk.answered(finishing)
        assert not disk.answered(hung)
        late = disk.submit(read16(3), data_in=BLOCK)
        emulated = disk.submit(TEST_UNIT_READY)
    assert trio.current_time() == pytest.approx(6)
    statuses = [(await disk.wait(ticket)).status for ticket in (hung, finishing, waiting, late, emulated)]
    assert statuses == [TASK_ABORTED, GOOD, BUSY, BUSY, BUSY]
    assert handler.entered == [0, 1]


@pytest.mark.parametrize("count", [2, 3, 100])
async def test_commands_that_exclude_each_other_are_turned_away_at_the_end(count: int) -> None:
    """Those that came last waited for one that was turned away, and were not seen again."""

    class Gatekeeper(Gated):
        def write(self, offset: int, iov: IoVec) -> None:
            self.store(offset, iov)

    handler = Gatekeeper()
    async with simulated(handler) as disk:
        (running,) = submit_reads(disk, 0)
        await wait_all_tasks_blocked()
        disk.device.stop()
        await wait_all_tasks_blocked()
        late = [disk.submit(compare_and_write(1), bytes(2 * BLOCK)) for _ in range(count)]
        handler.open_gate(0)
    assert (await disk.wait(running)).status == GOOD
    assert {(await disk.wait(ticket)).status for ticket in late} == {BUSY}


async def test_the_grace_period_can_be_changed_while_it_runs(autojump_clock: MockClock) -> None:
    for grace in (0.0, 2.0):
        async with simulated(Gated(1), grace=1000) as disk:
            start = trio.current_time()
            (hung,) = submit_reads(disk, 0)
            await wait_all_tasks_blocked()
            disk.device.stop()
            await wait_all_tasks_blocked()
            disk.device.shorten_grace(grace)
        assert trio.current_time() - start == pytest.approx(grace)
        assert (await disk.wait(hung)).status == TASK_ABORTED


async def test_cancelling_the_server_answers_everything(autojump_clock: MockClock) -> None:
    handler = Gated(1)
    with trio.CancelScope() as scope:
        async with simulated(handler, grace=3) as disk:
            hung, waiting = submit_reads(disk, 0, 1)
            await wait_all_tasks_blocked()
            scope.cancel()
    assert scope.cancelled_caught
    assert trio.current_time() == pytest.approx(3)
    disk._collect()
    assert disk.kernel.outstanding == 0
    assert (await disk.wait(hung)).status == TASK_ABORTED
    assert (await disk.wait(waiting)).status == BUSY
    assert not disk.kernel.violations


async def serve_directly(handler: Storage, kernel: _native.Simulator, **options: Any) -> None:
    await serve_ring(
        handler,
        memory=kernel.memory_fileno(),
        event=kernel.consumer_fileno(),
        map_size=kernel.size,
        name="direct",
        serial="0",
        naa=b"\x60" + bytes(15),
        **options,
    )


async def test_a_failure_before_the_stop_does_not_keep_the_device_for_ever() -> None:
    """The workers are shielded from the cancellation that the failure causes; nobody lifted the shield."""

    def before_stop() -> None:
        raise OSError("no such attribute")

    async def serve(task_status: trio.TaskStatus[Device]) -> None:
        await serve_directly(PlainDisk(), _native.Simulator(), before_stop=before_stop, task_status=task_status)

    with trio.fail_after(10), pytest.raises(ExceptionGroup) as caught:
        async with trio.open_nursery() as nursery:
            device = await nursery.start(serve)
            device.stop()
    assert caught.group_contains(OSError, match="no such attribute")


async def test_what_comes_before_the_stop_comes_even_without_a_grace_period() -> None:
    called = []

    async def serve(task_status: trio.TaskStatus[Device]) -> None:
        await serve_directly(
            PlainDisk(),
            _native.Simulator(),
            grace=0,
            before_stop=lambda: called.append(True),
            task_status=task_status,
        )

    async with trio.open_nursery() as nursery:
        device = await nursery.start(serve)
        device.stop()
    assert called == [True]


# Devices that break.


def corrupt(disk: SimulatedDisk) -> None:
    """A head that no kernel writes, and the event that makes the server look."""
    disk.kernel.plug()
    disk.submit(TEST_UNIT_READY)
    disk.kernel.poke(HEAD, struct.pack("=I", 3))
    disk.kernel.unplug()


async def test_a_corrupt_ring_ends_its_device_and_no_other() -> None:
    broken, sound = Gated(4), Gated(4)
    async with simulated(sound, name="sound") as other:
        with pytest.raises(ExceptionGroup) as caught:
            async with simulated(broken, name="broken") as disk:
                submit_reads(disk, 0, 1)
                await wait_all_tasks_blocked()
                corrupt(disk)
                await trio.sleep_forever()
        errors = leaves(caught.value)
        assert [type(error) for error in errors] == [RingCorruptError]
        assert "the head cannot be at 3" in str(errors[0])
        assert broken.cancelled == [0, 1] or broken.cancelled == [1, 0]
        sound.open_gate(0)
        assert await other.read(0, BLOCK) == bytes(BLOCK)


def leaves(group: BaseExceptionGroup[BaseException]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


async def test_a_device_that_the_kernel_removes() -> None:
    handler = Gated(2)
    kernel = _native.Simulator()
    kernel.submit(read16(0), None, BLOCK)
    # As numbers: whoever has the simulator keeps the kernel's end of the doorbell open.
    memory, event, size = kernel.memory_fileno(), kernel.consumer_fileno(), kernel.size

    async def serve(task_status: trio.TaskStatus[Device]) -> None:
        await serve_ring(
            handler,
            memory=memory,
            event=event,
            map_size=size,
            name="removed",
            serial="0",
            naa=b"\x60" + bytes(15),
            task_status=task_status,
        )

    with pytest.raises(ExceptionGroup) as caught:
        async with trio.open_nursery() as nursery:
            await nursery.start(serve)
            await wait_all_tasks_blocked()
            assert handler.running == 1
            del kernel
    assert [type(error) for error in leaves(caught.value)] == [tcmu_rs.DeviceRemovedError]
    assert handler.cancelled == [0]


async def test_a_thread_that_ends_after_the_ring_broke_says_nothing_more() -> None:
    entered, go = threading.Event(), threading.Event()

    class Slow(Storage):
        @tcmu_rs.blocking
        def read(self, offset: int, iov: IoVec) -> None:
            entered.set()
            assert go.wait(60)
            self.load(offset, iov)

    with pytest.raises(ExceptionGroup) as caught:
        async with simulated(Slow()) as disk:
            submit_reads(disk, 0)
            await trio.to_thread.run_sync(entered.wait)
            corrupt(disk)
            await wait_all_tasks_blocked()
            go.set()
            await trio.sleep_forever()
    assert [type(error) for error in leaves(caught.value)] == [RingCorruptError]


def test_two_runs_in_two_threads_share_nothing() -> None:
    barrier = threading.Barrier(2, timeout=60)
    failures: list[BaseException] = []

    async def main(fill: bytes) -> None:
        async with simulated(AsyncDisk()) as disk:
            barrier.wait()
            for block in range(64):
                await disk.write(block * BLOCK, fill * BLOCK)
            assert await disk.read(0, 64 * BLOCK) == fill * 64 * BLOCK
            barrier.wait()

    def run(fill: bytes) -> None:
        try:
            trio.run(main, fill)
        except BaseException as error:
            failures.append(error)
            barrier.abort()

    threads = [threading.Thread(target=run, args=(fill,)) for fill in (b"a", b"b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# Leaks.


def alive(*types: type) -> int:
    gc.collect()
    return sum(isinstance(thing, types) for thing in gc.get_objects())


def descriptors() -> set[str]:
    # The one that lists them is gone when its turn comes.
    return {f"{fd.name} {fd.readlink()}" for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()}


def mappings() -> int:
    return Path("/proc/self/maps").read_text().count("tcmu-simulated")


@pytest.mark.parametrize("disk_class", [PlainDisk, AsyncDisk, BlockingDisk])
async def test_nothing_is_left_of_a_device(disk_class: type[Storage]) -> None:
    before = alive(Device, SimulatedDisk), descriptors(), mappings()

    async def use() -> None:
        async with simulated(disk_class()) as disk, trio.open_nursery() as nursery:
            for block in range(32):
                nursery.start_soon(disk.write, block * BLOCK, b"x" * BLOCK)
            nursery.start_soon(disk.scsi, SYNCHRONIZE_CACHE)

    await use()
    # Rings and commands are not known to the garbage collector, but each of them holds the mapping.
    assert (alive(Device, SimulatedDisk), descriptors(), mappings()) == before


async def test_an_ended_device_does_not_keep_the_memory_though_somebody_keeps_the_device() -> None:
    """The kernel lets no successor open a device while it is mapped, and an exception may hold all that served it."""

    def mapped() -> int:
        return sum("tcmu-simulated" in line for line in Path("/proc/self/maps").read_text().splitlines())

    async with simulated(PlainDisk()) as disk:
        kept = disk.device
        served = mapped()
    gc.collect()
    assert kept.name
    # The kernel's side is left.
    assert mapped() == served - 1
