"""Handlers that see commands: raw ones, and `scsi_command` of block handlers."""

from __future__ import annotations

import errno
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import tcmu_rs
from tcmu_rs import Command, IoVec, ScsiError
from tcmu_rs.testing import CAP_OOOC, simulated

from .conftest import Log
from .disks import BLOCK, BUSY, CHECK_CONDITION, GOOD, INQUIRY, TASK_ABORTED, TEST_UNIT_READY, PlainDisk, read16
from .test_runtime import leaves

VENDOR_IN = bytes([0xC1, 0, 0, 0, 0, 0, 0, 0, 64, 0])
VENDOR_OUT = bytes([0xC2, 0, 0, 0, 0, 0, 0, 0, 64, 0])


class Raw(tcmu_rs.Handler):
    """Answers with what `answer` is; writes so many bytes of Data-In before."""

    size = 1 << 20
    max_in_flight = 4

    def __init__(self, writes: int = 0, answer: Any = None) -> None:
        self.writes = writes
        self.answer = answer
        self.seen: list[bytes] = []

    async def command(self, cmd: Command) -> Any:
        self.seen.append(cmd.cdb)
        await trio.lowlevel.checkpoint()
        if self.writes:
            cmd.data_in.slice(0, self.writes).copy_from(b"i" * self.writes)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("writes", "answer", "data"),
    [
        (0, None, b""),
        (64, None, b"i" * 64),
        (10, None, b"i" * 10 + bytes(54)),
        (10, 10, b"i" * 10),
        (10, 5, b"i" * 5),
        (64, 64, b"i" * 64),
        (64, 1000, b"i" * 64),
        (10, 0, b""),
        (0, 20, bytes(20)),
    ],
)
async def test_data_in_is_what_was_written_or_as_long_as_the_handler_says(
    writes: int, answer: int | None, data: bytes
) -> None:
    async with simulated(Raw(writes, answer)) as disk:
        reply = await disk.scsi(VENDOR_IN, data_in=64)
    # The kernel takes a length of zero for no length at all: then everything goes out, as zeroes.
    expected = (data, 64 - len(data)) if data else (bytes(64), 0)
    assert (reply.status, reply.data, reply.residual) == (GOOD, *expected)


async def test_without_short_reads_the_rest_is_zero() -> None:
    async with simulated(Raw(10, 5), capabilities=CAP_OOOC) as disk:
        reply = await disk.scsi(VENDOR_IN, data_in=64)
    assert (reply.data, reply.residual) == (b"i" * 5 + bytes(59), 0)


async def test_a_command_has_its_cdb_and_its_data() -> None:
    class Echo(tcmu_rs.Handler):
        size = 1 << 20

        def command(self, cmd: Command) -> int:
            assert len(cmd.cdb) == 10
            assert (cmd.verb, cmd.offset, cmd.length, cmd.fua) == (None, 0, 0, False)
            assert cmd.data_out.readonly
            assert not cmd.data_in.readonly
            data = cmd.data_out.tobytes()[::-1]
            cmd.data_in.slice(0, len(data)).copy_from(data)
            return len(data)

    async with simulated(Echo()) as disk:
        reply = await disk.scsi(VENDOR_OUT, b"there", data_in=5)
    assert reply.data == b"ereht"


@pytest.mark.parametrize("opcode", [0x00, 0x20, 0x5F, 0x80, 0xA0, 0xC0, 0xFF])
async def test_cdbs_come_as_long_as_their_group(opcode: int) -> None:
    handler = Raw()
    async with simulated(handler) as disk:
        await disk.scsi(bytes([opcode, *range(1, 20)]))
    length = {0: 6, 1: 10, 2: 10, 4: 16, 5: 12}.get(opcode >> 5, len(handler.seen[0]))
    assert handler.seen == [bytes([opcode, *range(1, length)])]


@pytest.mark.parametrize(
    ("error", "status", "sense", "logged"),
    [
        (ScsiError("no", key=5, asc=0x20, ascq=0), CHECK_CONDITION, (5, 0x20, 0), "Raw.command() failed: no"),
        (OSError(errno.EIO, "bad"), CHECK_CONDITION, (3, 0x11, 0), "Raw.command() failed: [Errno 5] bad"),
        (tcmu_rs.Busy(), BUSY, None, "Raw.command() failed: Busy"),
        (KeyError("bug"), CHECK_CONDITION, (4, 0x44, 0), "Raw.command() raised what it must not"),
    ],
)
async def test_what_a_raw_handler_raises(
    log: Log, error: Exception, status: int, sense: tuple[int, int, int] | None, logged: str
) -> None:
    async with simulated(Raw(10, error), strict=False) as disk:
        reply = await disk.scsi(VENDOR_IN, data_in=64)
    assert (reply.status, reply.sense_code, reply.data) == (status, sense, b"")
    log.expect(logged)


@pytest.mark.parametrize("answer", ["text", b"bytes", 1.5, NotImplemented, -1])
async def test_a_raw_handler_returns_a_number_or_nothing(log: Log, answer: object) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with simulated(Raw(0, answer)) as disk:
            await disk.scsi(TEST_UNIT_READY)
            await trio.sleep_forever()
    (error,) = leaves(caught.value)
    assert isinstance(error, (TypeError, OverflowError))
    log.expect("Raw.command() raised what it must not")


async def test_a_raw_command_is_aborted() -> None:
    class Hanging(Raw):
        async def command(self, cmd: Command) -> None:
            await trio.sleep_forever()

    async with simulated(Hanging()) as disk:
        ticket = disk.submit(TEST_UNIT_READY)
        await wait_all_tasks_blocked()
        disk.abort(ticket)
        assert (await disk.wait(ticket)).status == TASK_ABORTED


async def test_a_command_that_is_kept_is_worth_nothing() -> None:
    class Keeper(Raw):
        kept: Command

        async def command(self, cmd: Command) -> None:
            self.kept = cmd

    handler = Keeper()
    async with simulated(handler) as disk:
        await disk.scsi(VENDOR_IN, data_in=64)
        cmd = handler.kept
        assert cmd.answered
        assert cmd.cdb == VENDOR_IN
        for iov in (cmd.data_in, cmd.data_out):
            with pytest.raises(BufferError, match="the command was answered"):
                iov.tobytes()
        with pytest.raises(RuntimeError, match="the command has no step"):
            _ = cmd.iov
        # An answer after the answer goes nowhere.
        cmd.fail(BUSY)
        cmd.succeed()
        assert (await disk.scsi(TEST_UNIT_READY)).status == GOOD


# scsi_command.


class Intercepting(PlainDisk):
    def __init__(self, answer: Any) -> None:
        super().__init__()
        self.answer = answer
        self.seen: list[int] = []

    def intercept(self, cmd: Command) -> Any:
        self.seen.append(cmd.cdb[0])
        if cmd.cdb[0] in (0x88, 0x8A):
            return NotImplemented
        if isinstance(self.answer, Exception):
            raise self.answer
        if self.answer is None or isinstance(self.answer, int):
            cmd.data_in.zero()
        return self.answer


class PlainIntercepting(Intercepting):
    def scsi_command(self, cmd: Command) -> Any:
        return self.intercept(cmd)


class AsyncIntercepting(Intercepting):
    async def scsi_command(self, cmd: Command) -> Any:
        await trio.lowlevel.checkpoint()
        return self.intercept(cmd)


class BlockingIntercepting(Intercepting):
    @tcmu_rs.blocking
    def scsi_command(self, cmd: Command) -> Any:
        return self.intercept(cmd)


COLOURS = [PlainIntercepting, AsyncIntercepting, BlockingIntercepting]


@pytest.mark.parametrize("disk_class", COLOURS)
async def test_notimplemented_leaves_a_command_to_the_emulation(disk_class: type[Intercepting]) -> None:
    handler = disk_class(NotImplemented)
    async with simulated(PlainDisk()) as plain, simulated(handler) as disk:
        assert await disk.scsi(TEST_UNIT_READY) == await plain.scsi(TEST_UNIT_READY)
        assert await disk.scsi(INQUIRY, data_in=96) == await plain.scsi(INQUIRY, data_in=96)
        assert await disk.scsi(VENDOR_IN, data_in=64) == await plain.scsi(VENDOR_IN, data_in=64)
        await disk.write(0, b"x" * BLOCK)
        assert await disk.read(0, BLOCK) == b"x" * BLOCK
    assert handler.seen == [0x00, 0x12, 0xC1, 0x8A, 0x88]


@pytest.mark.parametrize("disk_class", COLOURS)
async def test_an_intercepted_command_is_answered(disk_class: type[Intercepting]) -> None:
    async with simulated(disk_class(8)) as disk:
        reply = await disk.scsi(INQUIRY, data_in=96)
        assert (reply.status, reply.data, reply.residual) == (GOOD, bytes(8), 88)
        await disk.write(0, b"x" * BLOCK)
        assert await disk.read(0, BLOCK) == b"x" * BLOCK


@pytest.mark.parametrize("disk_class", COLOURS)
async def test_an_intercepted_command_fails(log: Log, disk_class: type[Intercepting]) -> None:
    async with simulated(disk_class(tcmu_rs.NotReady("later"))) as disk:
        reply = await disk.scsi(TEST_UNIT_READY)
        assert (reply.status, reply.sense_code) == (CHECK_CONDITION, (2, 4, 0))
        await disk.read(0, BLOCK)
    log.expect(f"{disk_class.__name__}.scsi_command() failed: later")


async def test_views_of_an_intercepted_command_do_not_hinder_its_emulation() -> None:
    class Looking(PlainDisk):
        def scsi_command(self, cmd: Command) -> Any:
            assert len(list(cmd.data_out)) == 1
            return NotImplemented

    async with simulated(Looking()) as disk:
        await disk.write(0, b"x" * BLOCK)
        assert await disk.read(0, BLOCK) == b"x" * BLOCK


async def test_an_intercepted_command_is_aborted_in_either_half() -> None:
    class Slow(PlainDisk):
        max_in_flight = 2

        async def scsi_command(self, cmd: Command) -> Any:
            if cmd.cdb[0] == 0:
                await trio.sleep_forever()
            await trio.lowlevel.checkpoint()
            return NotImplemented

        async def read(self, offset: int, iov: IoVec) -> None:  # type: ignore[override]
            await trio.sleep_forever()

    async with simulated(Slow()) as disk:
        tickets = [disk.submit(TEST_UNIT_READY), disk.submit(read16(0), data_in=BLOCK)]
        await wait_all_tasks_blocked()
        disk.abort(*tickets)
        for ticket in tickets:
            assert (await disk.wait(ticket)).status == TASK_ABORTED
