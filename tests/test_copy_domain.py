"""EXTENDED COPY with real handlers: between devices, against other commands, aborts and ends."""

from __future__ import annotations

import struct
from contextlib import AsyncExitStack

import pytest
import trio
import trio.testing

import tcmu_rs
from tcmu_rs import CopyDomain
from tcmu_rs.handlers.ram import RamHandler
from tcmu_rs.testing import SimulatedDisk, simulated

from .conftest import Log
from .disks import BLOCK, BUSY, TASK_ABORTED
from .test_emulation import Memory, compare_and_write

MIB = 1 << 20
NOT_REACHABLE, DEVICE_FAILURE = (0xA, 0x0D, 0x02), (0xA, 0x0D, 0x01)


def extended_copy(
    source: SimulatedDisk, destination: SimulatedDisk, from_: int, to: int, blocks: int, *, identifier: int = 1
) -> tuple[bytes, bytes]:
    """CDB and parameter list; addresses in blocks."""
    cscds = b"".join(
        struct.pack(">B3xBBxB16s4xxBH", 0xE4, 1, 3, 16, disk.naa, 0, disk.block_size) for disk in (source, destination)
    )
    segment = struct.pack(">BxHHH2xHQQ", 0x02, 0x18, 0, 1, blocks, from_, to)
    parameters = struct.pack(">BxH4xL4x", identifier, len(cscds), len(segment)) + cscds + segment
    return struct.pack(">B9xLxx", 0x83, len(parameters)), parameters


def copy_status(identifier: int = 1) -> bytes:
    return struct.pack(">BBB7xLxx", 0x84, 0, identifier, 12)


class Coloured(Memory):
    """In a thread."""

    @tcmu_rs.blocking
    def read(self, offset: int, iov: tcmu_rs.IoVec) -> None:  # type: ignore[override]
        iov.copy_from(memoryview(self.data)[offset : offset + iov.nbytes])


async def test_from_one_disk_to_another_and_within_one() -> None:
    domain = CopyDomain()
    source, target = RamHandler(8 * MIB), Coloured()
    target.max_in_flight = 1
    async with (
        simulated(source, name="source", copy_domain=domain) as one,
        simulated(target, name="target", copy_domain=domain) as other,
    ):
        data = bytes(range(256)) * (3 * MIB // 256)
        await one.write(MIB, data)
        (await one.scsi(*extended_copy(one, other, 2048, 5, 6144))).check()
        assert await other.read(5 * BLOCK, len(data)) == data
        assert (await one.scsi(copy_status(), data_in=12)).check() == struct.pack(">LBHBL", 8, 1, 1, 0, len(data))
        # To a unit that is not even asked.
        (await one.scsi(*extended_copy(other, other, 5, 8192, 6144))).check()
        assert await other.read(8192 * BLOCK, len(data)) == data
        (await other.scsi(*extended_copy(other, one, 8192, 0, 6144))).check()
        assert await one.read(0, len(data)) == data


async def test_a_domain_is_a_permission() -> None:
    async with (
        simulated(RamHandler(MIB), name="a") as one,
        simulated(RamHandler(MIB), name="b", copy_domain=CopyDomain()) as two,
        simulated(RamHandler(MIB), name="c", copy_domain=CopyDomain()) as three,
    ):
        for asked in (one, two, three):
            for source, destination in ((one, two), (two, one), (two, three), (one, three)):
                assert (await asked.scsi(*extended_copy(source, destination, 0, 8, 1))).sense_code == NOT_REACHABLE
            (await asked.scsi(*extended_copy(asked, asked, 0, 8, 1))).check()


async def test_two_disks_of_one_name_are_refused() -> None:
    domain = CopyDomain()
    async with simulated(RamHandler(MIB), copy_domain=domain) as disk:
        with pytest.RaisesGroup(pytest.RaisesExc(ValueError, match="copy domain"), flatten_subgroups=True):
            async with simulated(RamHandler(MIB), copy_domain=domain):
                pass
        (await disk.scsi(*extended_copy(disk, disk, 0, 8, 1))).check()
    async with simulated(RamHandler(MIB), copy_domain=domain):
        pass


async def test_many_copies_of_two_disks_onto_each_other_come_to_an_end() -> None:
    """Each disk has one place; a copy that kept one while it waits for the other's would wait for ever."""
    domain = CopyDomain()
    handlers = [Memory(), Memory()]
    for handler in handlers:
        handler.max_in_flight = 1
    async with AsyncExitStack() as stack:
        disks = [
            await stack.enter_async_context(simulated(handler, name=str(number), copy_domain=domain))
            for number, handler in enumerate(handlers)
        ]
        async with trio.open_nursery() as nursery:
            for number in range(8):
                for source, destination in (disks, disks[::-1]):

                    async def copy(source: SimulatedDisk, destination: SimulatedDisk, lba: int) -> None:
                        (await source.scsi(*extended_copy(source, destination, lba, lba + 64, 4))).check()

                    nursery.start_soon(copy, source, destination, 8 * number)


async def test_a_copy_does_not_come_between_compare_and_write() -> None:
    domain = CopyDomain()
    source, target = Memory(), Memory()
    target.gate = trio.Event()
    async with (
        simulated(source, name="source", copy_domain=domain) as one,
        simulated(target, name="target", copy_domain=domain) as other,
    ):
        source.data[:BLOCK] = b"\x03" * BLOCK
        swap = other.submit(compare_and_write(0), b"\x01" * BLOCK + b"\x02" * BLOCK)
        await trio.testing.wait_all_tasks_blocked()
        copy = one.submit(*extended_copy(one, other, 0, 0, 1))
        await trio.testing.wait_all_tasks_blocked()
        assert (source.calls, target.calls) == (["read"], ["read"])
        target.gate.set()
        (await other.wait(swap)).check()
        (await one.wait(copy)).check()
        assert target.calls == ["read", "write", "write"]
        assert target.data[:BLOCK] == b"\x03" * BLOCK


async def test_compare_and_write_waits_for_the_piece_only() -> None:
    handler = Memory()
    handler.gate = trio.Event()
    async with simulated(handler) as disk:
        copy = disk.submit(*extended_copy(disk, disk, 0, 8192, 4096))
        await trio.testing.wait_all_tasks_blocked()
        # Among the blocks that will be copied, and written later.
        elsewhere = disk.submit(compare_and_write(9000), b"\x01" * BLOCK + b"\x02" * BLOCK)
        within = disk.submit(compare_and_write(1), b"\x01" * BLOCK + b"\x02" * BLOCK)
        await trio.testing.wait_all_tasks_blocked()
        assert handler.calls == ["read", "read"]
        handler.gate.set()
        for ticket in (copy, elsewhere, within):
            (await disk.wait(ticket)).check()


async def test_a_failure_of_the_other_disk_is_told(log: Log) -> None:
    domain = CopyDomain()
    source, target = Memory(), Memory()
    target.fail_after = 1
    async with (
        simulated(source, name="source", copy_domain=domain) as one,
        simulated(target, name="target", copy_domain=domain) as other,
    ):
        reply = await one.scsi(*extended_copy(one, other, 0, 0, 4096))
        log.expect("broken")
        assert reply.sense_code == DEVICE_FAILURE
        # One MiB of two is missing; segment 0; the destination's status and sense data, a write error.
        assert reply.sense[3:7] == (MIB).to_bytes(4, "big")
        assert reply.sense[8:12] == bytes([0, 18, 0, 0])
        assert (reply.sense[18], reply.sense[21], reply.sense[31]) == (2, 3, 0x0C)
        assert (await one.scsi(copy_status(), data_in=12)).check() == struct.pack(">LBHBL", 8, 2, 0, 0, MIB)
        assert target.data[:MIB] == source.data[:MIB]


@pytest.mark.parametrize("where", ["source", "target"])
async def test_an_aborted_copy_goes_no_further(where: str) -> None:
    domain = CopyDomain()
    source, target = Memory(), Memory()
    {"source": source, "target": target}[where].gate = trio.Event()
    async with (
        simulated(source, name="source", copy_domain=domain) as one,
        simulated(target, name="target", copy_domain=domain) as other,
    ):
        ticket = one.submit(*extended_copy(one, other, 0, 0, 4096))
        await trio.testing.wait_all_tasks_blocked()
        one.abort(ticket)
        reply = await one.wait(ticket)
        assert reply.status == TASK_ABORTED or reply.sense_code == DEVICE_FAILURE
        await trio.testing.wait_all_tasks_blocked()
        assert (source.calls, target.calls) == (["read"], ["write"] if where == "target" else [])
        assert (await one.scsi(copy_status(), data_in=12)).check()[4] == 2
        # Both go on.
        for handler, disk in ((source, one), (target, other)):
            handler.gate = None
            await disk.read(0, BLOCK)


async def test_a_copy_that_waits_for_others_is_aborted_and_they_go_on() -> None:
    domain = CopyDomain()
    source, target = Memory(), Memory()
    target.gate = trio.Event()
    async with (
        simulated(source, name="source", copy_domain=domain) as one,
        simulated(target, name="target", copy_domain=domain) as other,
    ):
        swap = other.submit(compare_and_write(0), b"\x01" * BLOCK + b"\x02" * BLOCK)
        await trio.testing.wait_all_tasks_blocked()
        copy = one.submit(*extended_copy(one, other, 0, 0, 1))
        await trio.testing.wait_all_tasks_blocked()
        behind = other.submit(compare_and_write(0), b"\x02" * BLOCK + b"\x04" * BLOCK)
        await trio.testing.wait_all_tasks_blocked()
        one.abort(copy)
        await one.wait(copy)
        target.gate.set()
        (await other.wait(swap)).check()
        (await other.wait(behind)).check()
        assert target.data[:BLOCK] == b"\x04" * BLOCK


async def test_a_copy_ends_with_either_disk() -> None:
    for ends in ("source", "target"):
        domain = CopyDomain()
        source, target = Memory(), Memory()
        target.gate = trio.Event()
        async with AsyncExitStack() as stack:
            names = ["source", "target"] if ends == "target" else ["target", "source"]
            disks = {}
            for name in names:
                handler = {"source": source, "target": target}[name]
                disks[name] = await stack.enter_async_context(
                    simulated(handler, name=name, copy_domain=domain, grace=0)
                )
            ticket = disks["source"].submit(*extended_copy(disks["source"], disks["target"], 0, 0, 4096))
            await trio.testing.wait_all_tasks_blocked()
            assert target.calls == ["write"]
            if ends == "target":
                disks["target"].device.stop()
                reply = await disks["source"].wait(ticket)
                assert reply.sense_code in {DEVICE_FAILURE, NOT_REACHABLE}
                reply = await disks["source"].scsi(*extended_copy(disks["source"], disks["target"], 0, 0, 1))
                assert reply.sense_code == NOT_REACHABLE
        assert target.calls == ["write"]


async def test_a_busy_source_is_asked_again_by_the_initiator(log: Log) -> None:
    class Sluggish(Memory):
        async def read(self, offset: int, iov: tcmu_rs.IoVec) -> None:
            raise tcmu_rs.Busy("later")

    async with simulated(Sluggish()) as disk:
        assert (await disk.scsi(*extended_copy(disk, disk, 0, 8, 1))).status == BUSY
        log.expect("later")


async def test_a_handler_that_looks_at_commands_first() -> None:
    class Watching(Memory):
        def scsi_command(self, cmd: tcmu_rs.Command) -> object:
            return NotImplemented

    handler = Watching()
    async with simulated(handler) as disk:
        handler.data[:BLOCK] = b"\x07" * BLOCK
        (await disk.scsi(*extended_copy(disk, disk, 0, 8, 1))).check()
        assert handler.data[8 * BLOCK : 9 * BLOCK] == b"\x07" * BLOCK


async def test_a_handler_that_takes_its_time_to_look_at_commands() -> None:
    class Watching(Memory):
        async def scsi_command(self, cmd: tcmu_rs.Command) -> object:
            await trio.lowlevel.checkpoint()
            return NotImplemented

    handler = Watching()
    async with simulated(handler) as disk:
        for _ in range(2):
            (await disk.scsi(*extended_copy(disk, disk, 0, 8, 1))).check()
        handler.gate = trio.Event()
        ticket = disk.submit(*extended_copy(disk, disk, 0, 8, 1))
        await trio.testing.wait_all_tasks_blocked()
        disk.abort(ticket)
        reply = await disk.wait(ticket)
        assert reply.status == TASK_ABORTED or reply.sense_code == DEVICE_FAILURE


async def test_a_copy_waits_for_one_exchange_after_the_other() -> None:
    """The second one begins in the very pass of the loop in which the copy could go on after the first."""

    class Closable(Memory):
        is_open = False

        async def open(self) -> None:
            self.is_open = True

        async def aclose(self) -> None:
            self.is_open = False
            await trio.testing.wait_all_tasks_blocked()

        async def write(self, offset: int, iov: tcmu_rs.IoVec) -> None:
            assert self.is_open
            await super().write(offset, iov)

    domain = CopyDomain()
    async with (
        simulated(Memory(), name="source", copy_domain=domain) as one,
        simulated(Closable(), name="target", copy_domain=domain) as other,
        trio.open_nursery() as nursery,
    ):

        async def replace_twice() -> None:
            for _ in range(2):
                await other.device.replace(Closable())

        nursery.start_soon(replace_twice)
        (await one.scsi(*extended_copy(one, other, 0, 0, 1))).check()


async def test_two_disks_that_copy_to_each_other_are_exchanged_at_once(autojump_clock: trio.testing.MockClock) -> None:
    """Each waits for its own copy to end, which needs the other disk."""
    domain = CopyDomain()
    handlers = [Memory(), Memory()]
    gate = trio.Event()
    for handler in handlers:
        handler.gate = gate
    async with (
        simulated(handlers[0], name="one", copy_domain=domain) as one,
        simulated(handlers[1], name="other", copy_domain=domain) as other,
    ):
        there = one.submit(*extended_copy(one, other, 0, 0, 1))
        back = other.submit(*extended_copy(other, one, 8, 8, 1))
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:
            for disk in (one, other):
                nursery.start_soon(disk.device.replace, Memory())
            await trio.testing.wait_all_tasks_blocked()
            gate.set()
        (await one.wait(there)).check()
        (await other.wait(back)).check()


async def test_statistics_show_a_piece_that_takes_long() -> None:
    domain = CopyDomain()
    source, target = Memory(), Memory()
    target.gate = trio.Event()
    async with (
        simulated(source, name="source", copy_domain=domain) as one,
        simulated(target, name="target", copy_domain=domain) as other,
    ):
        ticket = one.submit(*extended_copy(one, other, 0, 0, 1))
        await trio.testing.wait_all_tasks_blocked()
        for disk in (one, other):
            assert disk.device.statistics() is not None
        target.gate.set()
        (await one.wait(ticket)).check()
