"""Commands that wait for transfers without a task: what others notice of them is what they notice of any."""

from __future__ import annotations

import errno
import os
import random
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

import tcmu_rs
from tcmu_rs import IoVec, TransferCancelled
from tcmu_rs.handlers.file import FileHandler
from tcmu_rs.testing import SimulatedDisk, simulated

from .conftest import Log
from .disks import (
    BLOCK,
    BUSY,
    CHECK_CONDITION,
    GOOD,
    SYNCHRONIZE_CACHE,
    TASK_ABORTED,
    AsyncDisk,
    Storage,
    read16,
    write16,
)
from .test_files import pipe, uring
from .test_runtime import descriptors
from .test_time import COMMAND_TIMEOUT_DURING_PROCESSING
from .test_views import use_all_memory

SIZE = 1 << 20
BLOCKS = SIZE // BLOCK


class Taskless(Storage):
    """Reads do what they are told to; writes are durable."""

    taskless = ("read", "write", "flush")
    max_in_flight = 4

    def __init__(self, fd: int, reads: Callable[[int, IoVec], Awaitable[None]] | None = None) -> None:
        super().__init__(SIZE)
        self.fd = fd
        self.reads = reads
        self.tasks: set[trio.lowlevel.Task] = set()
        self.ended: list[BaseException] = []

    async def read(self, offset: int, iov: IoVec) -> None:
        self.tasks.add(trio.lowlevel.current_task())
        try:
            if self.reads is None:
                await iov.read_from(self.fd, offset)
            else:
                await self.reads(offset, iov)
        except BaseException as error:
            self.ended.append(error)
            raise

    async def write(self, offset: int, iov: IoVec) -> None:
        self.tasks.add(trio.lowlevel.current_task())
        await iov.write_to(self.fd, offset, fua=True)

    async def flush(self) -> None:
        await tcmu_rs.fdatasync(self.fd)


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(bytes(SIZE))
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


@pytest.fixture
def slow() -> Iterator[tuple[int, int]]:
    """Both ends of a pipe: a transfer from the first one waits for what is written to the other."""
    ends = pipe()
    yield ends
    for end in ends:
        os.close(end)


async def in_flight(disk: SimulatedDisk, count: int) -> None:
    await wait_all_tasks_blocked()
    assert disk.device.statistics().running == count


async def test_a_full_queue_of_writes_takes_two_tasks(fd: int) -> None:
    handler = Taskless(fd)
    handler.max_in_flight = 32
    async with simulated(handler) as disk:
        for round_ in range(8):
            blocks = range(32 * round_, 32 * round_ + 32)
            tickets = [disk.submit(write16(block), block.to_bytes(4, "big") * (BLOCK // 4)) for block in blocks]
            assert [(await disk.wait(ticket)).status for ticket in tickets] == [GOOD] * 32
        assert (await disk.scsi(SYNCHRONIZE_CACHE)).status == GOOD
        assert disk.device.statistics().running == 0
    # One that watches the ring, one that goes on with what is over.
    assert len(handler.tasks) <= 2
    stored = os.pread(fd, SIZE, 0)
    for block in range(256):
        assert stored[block * BLOCK : (block + 1) * BLOCK] == block.to_bytes(4, "big") * (BLOCK // 4)


@uring
async def test_no_more_commands_than_the_handler_takes(slow: tuple[int, int]) -> None:
    receiver, sender = slow

    async def reads(_: int, iov: IoVec) -> None:
        await iov.read_from(receiver, 0)

    async with simulated(Taskless(receiver, reads)) as disk:
        tickets = [disk.submit(read16(block), data_in=BLOCK) for block in range(6)]
        await in_flight(disk, 4)
        assert disk.device.statistics().pending == 2
        for _ in tickets:
            os.write(sender, b"x" * BLOCK)
        assert [(await disk.wait(ticket)).data for ticket in tickets] == [b"x" * BLOCK] * 6


@uring
async def test_several_transfers_and_waits_of_other_kinds(fd: int, slow: tuple[int, int]) -> None:
    receiver, sender = slow
    gate = trio.Event()

    async def child(iov: IoVec) -> None:
        await iov.write_to(fd, 0, fua=True)

    async def reads(_: int, iov: IoVec) -> None:
        await iov.read_from(receiver, 0)
        await iov.write_to(fd, BLOCK, fua=True)
        await gate.wait()
        # From here on it has a task, and so may hold what belongs to one.
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(child, iov)
            await tcmu_rs.fdatasync(fd)
        await iov.read_from(fd, BLOCK)

    async with simulated(Taskless(fd, reads)) as disk:
        ticket = disk.submit(read16(0), data_in=BLOCK)
        other = disk.submit(write16(7), b"z" * BLOCK)
        assert (await disk.wait(other)).status == GOOD
        await in_flight(disk, 1)
        os.write(sender, b"y" * BLOCK)
        await in_flight(disk, 1)
        assert not disk.answered(ticket)
        gate.set()
        assert (await disk.wait(ticket)).data == b"y" * BLOCK
    assert os.pread(fd, 2 * BLOCK, 0) == b"y" * 2 * BLOCK


@uring
async def test_errors_are_raised_in_the_handler_and_may_be_dealt_with(fd: int, log: Log) -> None:
    receiver, sender = pipe()
    os.close(sender)

    async def reads(offset: int, iov: IoVec) -> None:
        try:
            await iov.read_from(receiver, 0)
        except OSError as error:
            assert error.errno == errno.EIO
            if offset:
                raise
        await tcmu_rs.fdatasync(fd)
        iov.copy_from(b"r" * BLOCK)

    async with simulated(Taskless(fd, reads)) as disk:
        assert await disk.read(0, BLOCK) == b"r" * BLOCK
        failed = await disk.scsi(read16(1), data_in=BLOCK)
        assert (failed.status, failed.sense_code) == (CHECK_CONDITION, (0x3, 0x11, 0x00))
        log.expect("it was truncated")
    os.close(receiver)


async def test_a_wrong_result_behind_a_transfer_is_refused(fd: int, log: Log) -> None:
    async def reads(_: int, iov: IoVec) -> None:
        await tcmu_rs.fdatasync(fd)

    class Wrong(Taskless):
        async def write(self, offset: int, iov: IoVec) -> int:  # type: ignore[override]
            await iov.write_to(fd, offset, fua=True)
            return iov.nbytes

    async with simulated(Wrong(fd, reads), strict=False) as disk:
        assert (await disk.scsi(read16(0), data_in=BLOCK)).status == CHECK_CONDITION
        log.expect("without filling its IoVec")
        assert (await disk.scsi(write16(0), bytes(BLOCK))).status == CHECK_CONDITION
        log.expect("transfers are whole, return None")


@uring
@uring
async def test_an_aborted_command_ends_and_its_memory_is_free(fd: int, slow: tuple[int, int]) -> None:
    receiver, sender = slow

    async def reads(offset: int, iov: IoVec) -> None:
        await iov.read_from(receiver, 0)

    handler = Taskless(receiver, reads)
    async with simulated(handler, data_size=16 * 4096) as disk:
        tickets = [disk.submit(read16(block), data_in=BLOCK) for block in range(3)]
        await in_flight(disk, 3)
        disk.abort(tickets[1])
        assert (await disk.wait(tickets[1])).status == TASK_ABORTED
        assert [type(error) for error in handler.ended] == [TransferCancelled]
        assert not (disk.answered(tickets[0]) or disk.answered(tickets[2]))
        for _ in range(2):
            os.write(sender, b"x" * BLOCK)
        assert (await disk.wait(tickets[0])).data == (await disk.wait(tickets[2])).data == b"x" * BLOCK
        handler.reads, handler.fd = None, fd
        await use_all_memory(disk)


@uring
@uring
async def test_after_an_abort_no_transfer_is_begun_and_other_waits_are_cancelled(slow: tuple[int, int]) -> None:
    receiver, _ = slow
    seen: list[BaseException] = []

    async def reads(offset: int, iov: IoVec) -> None:
        try:
            await iov.read_from(receiver, 0)
        except TransferCancelled as error:
            seen.append(error)
            try:
                await tcmu_rs.fdatasync(receiver)
            except TransferCancelled as again:
                seen.append(again)
                if offset:
                    await trio.sleep_forever()
                raise

    handler = Taskless(receiver, reads)
    async with simulated(handler) as disk:
        for block in range(2):
            ticket = disk.submit(read16(block), data_in=BLOCK)
            await in_flight(disk, 1)
            disk.abort(ticket)
            assert (await disk.wait(ticket)).status == TASK_ABORTED
    assert len(seen) == 4
    assert [type(error) for error in handler.ended] == [TransferCancelled, trio.Cancelled]


@uring
@uring
async def test_the_deadline_covers_it_and_says_where_it_waits(
    autojump_clock: MockClock, log: Log, slow: tuple[int, int]
) -> None:
    receiver, _ = slow

    async def reads(_: int, iov: IoVec) -> None:
        await iov.read_from(receiver, 0)

    async with simulated(Taskless(receiver, reads), deadline=20) as disk:
        reply = await disk.scsi(read16(0), data_in=BLOCK)
        assert (reply.status, reply.sense_code) == (CHECK_CONDITION, COMMAND_TIMEOUT_DURING_PROCESSING)
        message = log.expect("is cancelled after 20 s")
        assert "Taskless.read() of 512 bytes at 0" in message
        assert "in reads()" in message


@uring
@uring
async def test_a_device_that_stops_waits_for_it_and_then_cancels_it(slow: tuple[int, int]) -> None:
    receiver, sender = slow

    async def reads(_: int, iov: IoVec) -> None:
        await iov.read_from(receiver, 0)

    handler = Taskless(receiver, reads)
    async with simulated(handler, grace=60) as disk:
        ticket = disk.submit(read16(0), data_in=BLOCK)
        await in_flight(disk, 1)
        disk.device.stop()
        await wait_all_tasks_blocked()
        late = disk.submit(read16(1), data_in=BLOCK)
        await wait_all_tasks_blocked()
        os.write(sender, b"x" * BLOCK)
        assert (await disk.wait(ticket)).data == b"x" * BLOCK
        assert (await disk.wait(late)).status == BUSY
    async with simulated(handler, grace=0.01) as disk:
        tickets = [disk.submit(read16(block), data_in=BLOCK) for block in range(4)]
        await in_flight(disk, 4)
    assert [(await disk.wait(ticket)).status for ticket in tickets] == [TASK_ABORTED] * 4
    assert [type(error) for error in handler.ended] == [TransferCancelled] * 4
    assert not any("io_uring" in name for name in descriptors())


@uring
async def test_a_handler_may_need_a_moment_when_it_is_cancelled_at_the_end(slow: tuple[int, int]) -> None:
    receiver, _ = slow
    tidied: list[int] = []

    async def reads(offset: int, iov: IoVec) -> None:
        try:
            await iov.read_from(receiver, 0)
        except TransferCancelled:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(tidied.append, offset)
            raise

    async with simulated(Taskless(receiver, reads), grace=0.01) as disk:
        tickets = [disk.submit(read16(block), data_in=BLOCK) for block in range(3)]
        await in_flight(disk, 3)
    assert [(await disk.wait(ticket)).status for ticket in tickets] == [TASK_ABORTED] * 3
    assert sorted(tidied) == [0, BLOCK, 2 * BLOCK]


@uring
async def test_views_that_are_kept_at_the_end_keep_no_command_from_its_end(slow: tuple[int, int], log: Log) -> None:
    receiver, _ = slow
    kept: list[memoryview] = []

    async def reads(_: int, iov: IoVec) -> None:
        kept.append(iov[0])
        await iov.read_from(receiver, 0)

    async with simulated(Taskless(receiver, reads), grace=0.01) as disk:
        tickets = [disk.submit(read16(block), data_in=BLOCK) for block in range(3)]
        await in_flight(disk, 3)
    assert [(await disk.wait(ticket)).status for ticket in tickets] == [TASK_ABORTED] * 3
    for _ in range(3):
        log.expect("kept 1 views")


@uring
async def test_another_handler_takes_over_when_it_is_over(fd: int, slow: tuple[int, int]) -> None:
    receiver, sender = slow

    async def reads(_: int, iov: IoVec) -> None:
        await iov.read_from(receiver, 0)

    async with simulated(Taskless(fd, reads)) as disk:
        ticket = disk.submit(read16(0), data_in=BLOCK)
        await in_flight(disk, 1)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.device.replace, Taskless(fd))
            await wait_all_tasks_blocked()
            behind = disk.submit(read16(0), data_in=BLOCK)
            await wait_all_tasks_blocked()
            os.write(sender, b"x" * BLOCK)
        assert (await disk.wait(ticket)).data == b"x" * BLOCK
        assert (await disk.wait(behind)).data == bytes(BLOCK)


async def test_commands_that_are_aborted_at_any_moment(tmp_path: Path) -> None:
    """Each is answered once, and a block has what a write stored that was not aborted, or may not have been."""
    generator = random.Random(7)
    path = tmp_path / "disk"
    async with simulated(FileHandler(path, size=SIZE, create=True)) as disk:
        may: list[set[bytes]] = [{bytes(BLOCK)} for _ in range(BLOCKS)]
        for _ in range(60):
            blocks = generator.sample(range(BLOCKS), 24)
            sent = {block: generator.randbytes(BLOCK) for block in blocks}
            tickets = {block: disk.submit(write16(block, fua=True), sent[block]) for block in blocks}
            for _ in range(generator.randrange(4)):
                await trio.lowlevel.checkpoint()
            disk.abort(*(tickets[block] for block in blocks[:6]))
            for block in blocks:
                status = (await disk.wait(tickets[block])).status
                if status == GOOD:
                    may[block] = {sent[block]}
                else:
                    assert (status, block in blocks[:6]) == (TASK_ABORTED, True)
                    may[block].add(sent[block])
        for block in range(BLOCKS):
            assert await disk.read(block * BLOCK, BLOCK) in may[block]


async def test_what_it_can_be_said_of() -> None:
    class Typo(AsyncDisk):
        taskless = ("reed",)

    with pytest.RaisesGroup(
        pytest.RaisesExc(ValueError, match="'reed'; it is about read, write and flush"), flatten_subgroups=True
    ):
        async with simulated(Typo()):
            pass
