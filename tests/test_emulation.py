"""The SCSI emulation with real handlers on the simulator: what takes the runtime to work."""

from __future__ import annotations

import struct

import pytest
import trio
import trio.testing

from tcmu_rs import BlockHandler, Command, ExtentState, IoVec
from tcmu_rs.testing import LUN_RESET, SimulatedDisk, simulated

from .conftest import Log
from .disks import BUSY, TASK_ABORTED

BLOCK = 512
BLOCKS = 16384
TEST_UNIT_READY = bytes(6)
FORMAT_IMMED = bytes([0x04, 0x10, 0, 0, 0, 0]), bytes([0, 0x02, 0, 0])


class Memory(BlockHandler):
    """A disk in memory whose every call may wait, and does so as often as it is told."""

    size = BLOCK * BLOCKS
    max_in_flight = 8

    def __init__(self) -> None:
        self.data = bytearray(b"\x01" * self.size)
        self.calls: list[str] = []
        self.gate: trio.Event | None = None
        self.fail_after: int | None = None

    async def _call(self, name: str) -> None:
        self.calls.append(name)
        if self.fail_after is not None and len(self.calls) > self.fail_after:
            raise OSError(5, "broken")
        await trio.lowlevel.checkpoint()
        if self.gate is not None:
            await self.gate.wait()

    async def read(self, offset: int, iov: IoVec) -> None:
        await self._call("read")
        iov.copy_from(memoryview(self.data)[offset : offset + iov.nbytes])

    async def write(self, offset: int, iov: IoVec) -> None:
        await self._call("write")
        iov.copy_into(memoryview(self.data)[offset : offset + iov.nbytes])

    async def flush(self) -> None:
        await self._call("flush")


class Plain(BlockHandler):
    """A disk whose calls never wait, and which knows its extents."""

    size = BLOCK * BLOCKS

    def __init__(self) -> None:
        self.data = bytearray(b"\x01" * self.size)

    def read(self, offset: int, iov: IoVec) -> None:
        iov.copy_from(memoryview(self.data)[offset : offset + iov.nbytes])

    def write(self, offset: int, iov: IoVec) -> None:
        iov.copy_into(memoryview(self.data)[offset : offset + iov.nbytes])

    def extents(self, offset: int, length: int) -> list[tuple[int, ExtentState]]:
        return [(BLOCK * 3, ExtentState.MAPPED), (length, ExtentState.DEALLOCATED)]


def compare_and_write(lba: int) -> bytes:
    return struct.pack(">BBQ3xBBB", 0x89, 0, lba, 1, 0, 0)


async def wait_until_ready(disk: SimulatedDisk) -> list[tuple[int, int, int] | None]:
    seen: list[tuple[int, int, int] | None] = []
    while True:
        reply = await disk.scsi(TEST_UNIT_READY)
        if reply.status == 0:
            return seen
        seen.append(reply.sense_code)


async def test_format_goes_on_after_its_answer() -> None:
    handler = Memory()
    async with simulated(handler) as disk:
        (await disk.scsi(*FORMAT_IMMED)).check()
        seen = await wait_until_ready(disk)
        assert seen
        assert set(seen) == {(0x2, 0x04, 0x04)}
        assert not any(handler.data)
        assert await disk.read(0, BLOCK) == bytes(BLOCK)


async def test_format_lets_others_run_even_if_the_handler_never_waits() -> None:
    handler = Plain()
    handler.size = 64 << 20
    handler.data = bytearray(b"\x01" * handler.size)
    async with simulated(handler) as disk:
        (await disk.scsi(*FORMAT_IMMED)).check()
        assert await wait_until_ready(disk)
        assert not any(handler.data[::4096])


async def test_a_format_that_comes_at_the_end_is_not_said_to_be_under_way() -> None:
    """With IMMED the emulation answers GOOD before the first step, which nobody does any more."""
    handler = Memory()
    async with simulated(handler) as disk:
        disk.device.stop()
        # In the same pass of the loop it might come before that is heard of.
        disk.device._engine.stop()
        late = disk.submit(*FORMAT_IMMED)
    assert (await disk.wait(late)).status == BUSY
    assert not handler.calls


async def test_the_id_of_an_answered_format_is_another_commands() -> None:
    """An abort that names the id must not end the format, which nobody waits for any more."""
    handler = Memory()
    handler.gate = trio.Event()
    async with simulated(handler) as disk:
        (await disk.scsi(*FORMAT_IMMED)).check()
        await trio.testing.wait_all_tasks_blocked()
        ticket = disk.submit(TEST_UNIT_READY)
        disk.abort(ticket)
        await disk.wait(ticket)
        handler.gate.set()
        assert set(await wait_until_ready(disk)) <= {(0x2, 0x04, 0x04)}
        assert not any(handler.data)


async def test_a_failed_format_is_told(log: Log) -> None:
    handler = Memory()
    handler.fail_after = 2
    async with simulated(handler) as disk:
        (await disk.scsi(*FORMAT_IMMED)).check()
        await trio.testing.wait_all_tasks_blocked()
        assert (await disk.scsi(TEST_UNIT_READY)).sense_code == (0x3, 0x31, 0x01)
        log.expect("broken")
        handler.fail_after = None
        (await disk.scsi(FORMAT_IMMED[0][:1] + bytes(5))).check()
        (await disk.scsi(TEST_UNIT_READY)).check()


async def test_compare_and_write_reads_into_memory_of_its_own() -> None:
    for handler in (Memory(), Plain()):
        async with simulated(handler) as disk:
            (await disk.scsi(compare_and_write(3), b"\x01" * BLOCK + b"\x02" * BLOCK)).check()
            reply = await disk.scsi(compare_and_write(3), b"\x02" * 7 + b"\x01" * 505 + b"\x02" * BLOCK)
            assert reply.sense_code == (0xE, 0x1D, 0x00)
            assert reply.sense[0] == 0xF0
            assert int.from_bytes(reply.sense[3:7], "big") == 7
        assert handler.data[3 * BLOCK : 4 * BLOCK] == b"\x02" * BLOCK


async def test_extents() -> None:
    async with simulated(Plain()) as disk:
        cdb = struct.pack(">BBQLBB", 0x9E, 0x12, 5, 255, 0, 0)
        data = (await disk.scsi(cdb, data_in=255)).check()
        descriptors = [struct.unpack_from(">QLB", data, at) for at in range(8, len(data), 16)]
        assert descriptors == [(5, 3, 0), (8, BLOCKS - 8, 1)]


async def test_a_read_that_ignores_its_memory_compares_zeroes() -> None:
    class Lazy(Plain):
        def read(self, offset: int, iov: IoVec) -> None:
            pass

    async with simulated(Lazy(), strict=False) as disk:
        reply = await disk.scsi(compare_and_write(0), bytes(2 * BLOCK))
        # The memory is zeroed first: what is compared is never what it held before.
        assert reply.sense_code in {None, (0x4, 0x44, 0x00)}


async def test_compare_and_write_is_a_lock() -> None:
    """Many initiators count in one block; each adds one only to what it has seen."""
    handler = Memory()
    handler.data[:] = bytes(handler.size)

    async def count(disk: SimulatedDisk) -> None:
        for _ in range(10):
            while True:
                old = await disk.read(0, BLOCK)
                new = (int.from_bytes(old, "big") + 1).to_bytes(BLOCK, "big")
                reply = await disk.scsi(compare_and_write(0), old + new)
                if reply.status == 0:
                    break
                assert reply.sense_code == (0xE, 0x1D, 0x00)

    async with simulated(handler) as disk, trio.open_nursery() as nursery:
        for _ in range(8):
            nursery.start_soon(count, disk)
    assert int.from_bytes(handler.data[:BLOCK], "big") == 80


async def test_a_waiting_command_is_aborted_and_those_behind_it_go_on() -> None:
    handler = Memory()
    handler.gate = trio.Event()
    async with simulated(handler) as disk:
        first = disk.submit(compare_and_write(0), b"\x01" * BLOCK + b"\x02" * BLOCK)
        await trio.testing.wait_all_tasks_blocked()
        second = disk.submit(compare_and_write(0), b"\x01" * BLOCK + b"\x03" * BLOCK)
        read = disk.submit(bytes([0x08, 0, 0, 0, 1, 0]), data_in=BLOCK)
        await trio.testing.wait_all_tasks_blocked()
        assert handler.calls == ["read"]
        disk.abort(second)
        await disk.wait(second)
        handler.gate.set()
        assert (await disk.wait(first)).status == 0
        assert (await disk.wait(read)).check() == b"\x02" * BLOCK


async def test_the_end_of_a_device_answers_those_who_wait() -> None:
    handler = Memory()
    handler.gate = trio.Event()
    async with simulated(handler, grace=0) as disk:
        for _ in range(5):
            disk.submit(compare_and_write(0), bytes(2 * BLOCK))
        await trio.testing.wait_all_tasks_blocked()
    # That none is left without an answer is what `simulated` checks.
    assert handler.calls == ["read"]


async def test_commands_that_a_handler_has_seen_wait_too() -> None:
    class Watching(Memory):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[int] = []

        def scsi_command(self, cmd: Command) -> object:
            self.seen.append(cmd.cdb[0])
            return NotImplemented

    handler = Watching()
    handler.gate = trio.Event()
    async with simulated(handler) as disk:
        tickets = [disk.submit(compare_and_write(0), b"\x01" * (2 * BLOCK)) for _ in range(4)]
        await trio.testing.wait_all_tasks_blocked()
        assert handler.seen == [0x89] * 4
        assert handler.calls == ["read"]
        handler.gate.set()
        for ticket in tickets:
            assert (await disk.wait(ticket)).status == 0
        assert handler.seen == [0x89] * 4


async def test_a_format_waits_for_writes_that_have_begun() -> None:
    handler = Memory()
    handler.gate = trio.Event()
    async with simulated(handler) as disk:
        write = disk.submit(bytes([0x0A, 0, 0, 0, 1, 0]), b"\x07" * BLOCK)
        await trio.testing.wait_all_tasks_blocked()
        (await disk.scsi(*FORMAT_IMMED)).check()
        await trio.testing.wait_all_tasks_blocked()
        assert handler.calls == ["write"]
        handler.gate.set()
        (await disk.wait(write)).check()
        await wait_until_ready(disk)
        assert not any(handler.data)


async def test_a_reset_lets_the_medium_be_removed_again() -> None:
    prevent, eject = bytes([0x1E, 0, 0, 0, 1, 0]), bytes([0x1B, 0, 0, 0, 2, 0])
    handler = Plain()
    handler.removable = True
    async with simulated(handler) as disk:
        (await disk.scsi(prevent)).check()
        assert (await disk.scsi(eject)).sense_code == (0x5, 0x53, 0x02)
        disk.abort(kind=LUN_RESET)
        (await disk.scsi(eject)).check()


@pytest.mark.parametrize("waits", [False, True])
async def test_a_sanitize_goes_on_when_it_is_aborted(waits: bool) -> None:
    """It did not, as SBC-4 wants it to: the abort left a disk that took nothing but another SANITIZE."""
    sanitize = struct.pack(">BB5xHB", 0x48, 0x01, 8, 0), struct.pack(">BBHL", 1, 0, 4, 0)
    handler = Memory()
    handler.gate = trio.Event()
    async with simulated(handler) as disk:
        write = disk.submit(bytes([0x0A, 0, 0, 0, 1, 0]), b"\x07" * BLOCK) if waits else None
        await trio.testing.wait_all_tasks_blocked()
        ticket = disk.submit(*sanitize)
        await trio.testing.wait_all_tasks_blocked()
        disk.abort(ticket)
        assert (await disk.wait(ticket)).status == TASK_ABORTED
        # Its id is another command's now, whose abort is none of its business.
        other = disk.submit(TEST_UNIT_READY)
        disk.abort(other)
        await disk.wait(other)
        assert (await disk.scsi(TEST_UNIT_READY)).sense_code == (0x2, 0x04, 0x1B)
        handler.gate.set()
        if write is not None:
            (await disk.wait(write)).check()
        assert set(await wait_until_ready(disk)) <= {(0x2, 0x04, 0x1B)}
        assert not any(handler.data)
