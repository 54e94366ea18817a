"""What a handler raises, and what the initiator gets for it."""

from __future__ import annotations

import errno
import pickle
from collections.abc import Callable

import pytest
import trio

import tcmu_rs
from tcmu_rs import IoVec, ScsiError
from tcmu_rs._errors import failure_of
from tcmu_rs.testing import Reply, simulated

from .conftest import Log
from .disks import BLOCK, BUSY, CHECK_CONDITION, GOOD, SYNCHRONIZE_CACHE, TASK_SET_FULL, Storage, read16, write16
from .test_runtime import leaves

READ_ERROR, WRITE_ERROR = (0x3, 0x11, 0x00), (0x3, 0x0C, 0x00)
WRITE_PROTECTED, NO_SPACE = (0x7, 0x27, 0x00), (0x7, 0x27, 0x07)
NO_MEDIUM = (0x2, 0x3A, 0x00)
BUG = (0x4, 0x44, 0x00)
UNIT_FAILED = (0x4, 0x3E, 0x01)

Raise = Callable[[], BaseException]


class Failing(Storage):
    """Every method raises what it is given."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error: Exception | None = error

    def fail(self) -> None:
        if self.error is not None:
            raise self.error

    async def read(self, offset: int, iov: IoVec) -> None:
        self.fail()
        self.load(offset, iov)

    async def write(self, offset: int, iov: IoVec) -> None:
        await trio.lowlevel.checkpoint()
        self.fail()

    @tcmu_rs.blocking
    def flush(self) -> None:
        self.fail()


def errno_table() -> list[tuple[int, int, tuple[int, int, int] | None, int, tuple[int, int, int] | None]]:
    check = CHECK_CONDITION
    return [
        (errno.EIO, check, READ_ERROR, check, WRITE_ERROR),
        (errno.EILSEQ, check, READ_ERROR, check, WRITE_ERROR),
        (errno.EBADMSG, check, READ_ERROR, check, WRITE_ERROR),
        (errno.EUCLEAN, check, READ_ERROR, check, WRITE_ERROR),
        (errno.ENOSPC, check, NO_SPACE, check, NO_SPACE),
        (errno.EDQUOT, check, NO_SPACE, check, NO_SPACE),
        (errno.EFBIG, check, NO_SPACE, check, NO_SPACE),
        (errno.EROFS, check, BUG, check, WRITE_PROTECTED),
        (errno.EACCES, check, BUG, check, WRITE_PROTECTED),
        (errno.EPERM, check, BUG, check, WRITE_PROTECTED),
        (errno.ENOMEDIUM, check, NO_MEDIUM, check, NO_MEDIUM),
        (errno.EAGAIN, BUSY, None, BUSY, None),
        (errno.EBUSY, BUSY, None, BUSY, None),
        (errno.ETIMEDOUT, BUSY, None, BUSY, None),
        (errno.EMFILE, BUSY, None, BUSY, None),
        (errno.ENFILE, BUSY, None, BUSY, None),
        (errno.ENODEV, check, UNIT_FAILED, check, UNIT_FAILED),
        (errno.ENXIO, check, UNIT_FAILED, check, UNIT_FAILED),
        (errno.ESTALE, check, UNIT_FAILED, check, UNIT_FAILED),
        (errno.ENOMEM, TASK_SET_FULL, None, TASK_SET_FULL, None),
        (errno.EBADF, check, BUG, check, BUG),
        (errno.EINVAL, check, BUG, check, BUG),
    ]


def outcome(reply: Reply) -> tuple[int, tuple[int, int, int] | None]:
    return reply.status, reply.sense_code


@pytest.mark.parametrize(("number", "read_status", "read_sense", "write_status", "write_sense"), errno_table())
async def test_errno(
    log: Log,
    number: int,
    read_status: int,
    read_sense: tuple[int, int, int] | None,
    write_status: int,
    write_sense: tuple[int, int, int] | None,
) -> None:
    async with simulated(Failing(OSError(number, "as planned")), strict=False) as disk:
        read = await disk.scsi(read16(0), data_in=BLOCK)
        assert outcome(read) == (read_status, read_sense)
        assert (read.data, read.residual) == (b"", BLOCK)
        assert outcome(await disk.scsi(write16(0), bytes(BLOCK))) == (write_status, write_sense)
        assert outcome(await disk.scsi(SYNCHRONIZE_CACHE)) == (write_status, write_sense)
    for method in ("read", "write", "flush"):
        log.expect(f"Failing.{method}()")


@pytest.mark.parametrize(
    ("error", "status", "read_sense", "write_sense"),
    [
        (tcmu_rs.MediumError(), CHECK_CONDITION, READ_ERROR, WRITE_ERROR),
        (tcmu_rs.WriteProtected(), CHECK_CONDITION, WRITE_PROTECTED, WRITE_PROTECTED),
        (tcmu_rs.OutOfSpace(), CHECK_CONDITION, NO_SPACE, NO_SPACE),
        (tcmu_rs.NotReady(), CHECK_CONDITION, (0x2, 0x04, 0x00), (0x2, 0x04, 0x00)),
        (tcmu_rs.MediumNotPresent(), CHECK_CONDITION, NO_MEDIUM, NO_MEDIUM),
        (tcmu_rs.IllegalRequest(), CHECK_CONDITION, (0x5, 0x24, 0x00), (0x5, 0x24, 0x00)),
        (tcmu_rs.HardwareError(), CHECK_CONDITION, BUG, BUG),
        (tcmu_rs.Miscompare(7), CHECK_CONDITION, (0xE, 0x1D, 0x00), (0xE, 0x1D, 0x00)),
        (tcmu_rs.Busy(), BUSY, None, None),
        (ScsiError("odd", key=0x9, asc=0x80, ascq=0xFF), CHECK_CONDITION, (0x9, 0x80, 0xFF), (0x9, 0x80, 0xFF)),
        (ScsiError("full", status=0x28), TASK_SET_FULL, None, None),
        (ScsiError("reserved", status=0x18), 0x18, None, None),
        (
            ExceptionGroup("two mirrors", [OSError(errno.EIO, "left"), OSError(errno.ENOSPC, "right")]),
            CHECK_CONDITION,
            READ_ERROR,
            WRITE_ERROR,
        ),
    ],
)
async def test_scsi_errors_are_what_they_say(
    log: Log,
    error: Exception,
    status: int,
    read_sense: tuple[int, int, int] | None,
    write_sense: tuple[int, int, int] | None,
) -> None:
    # Strict: none of these is a bug.
    async with simulated(Failing(error)) as disk:
        assert outcome(await disk.scsi(read16(0), data_in=BLOCK)) == (status, read_sense)
        assert outcome(await disk.scsi(write16(0), bytes(BLOCK))) == (status, write_sense)
    log.expect("simulated: Failing.read() failed: ")
    log.expect("simulated: Failing.write() failed: ")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a bug"),
        OSError("without a number"),
        TimeoutError(),
        StopIteration(),
        ScsiError(status=0x99),
        ScsiError(status=0x00),
        ScsiError(key=0xC),
        ScsiError(key=0x10),
        ScsiError(asc=256),
        ScsiError(ascq=-1),
        ScsiError(information=-1),
        ScsiError(information=1 << 64),
        ExceptionGroup("half a bug", [OSError(errno.EIO, "no"), KeyError("bug")]),
    ],
)
async def test_anything_else_is_a_bug_of_the_handler(log: Log, error: Exception) -> None:
    handler = Failing(error)
    async with simulated(handler, strict=False) as disk:
        for _ in range(3):
            assert outcome(await disk.scsi(write16(0), bytes(BLOCK))) == (CHECK_CONDITION, BUG)
        handler.error = None
        assert (await disk.scsi(write16(0), bytes(BLOCK))).status == GOOD
    # Once, with its traceback; an impossible sense must not be an error of the engine.
    assert "in fail\n" in log.expect("simulated: Failing.write() raised what it must not")
    with pytest.raises(ExceptionGroup) as caught:
        async with simulated(handler) as disk:
            handler.error = error
            await disk.scsi(SYNCHRONIZE_CACHE)
    expected = leaves(error) if isinstance(error, ExceptionGroup) else [error]
    found = leaves(caught.value)
    # A StopIteration cannot leave a coroutine.
    assert found == expected or isinstance(error, StopIteration)
    log.expect("Failing.flush() raised what it must not")


async def test_information_reaches_the_initiator(log: Log) -> None:
    for error, information in [
        (tcmu_rs.MediumError(information=0x1234), 0x1234),
        (tcmu_rs.Miscompare(5), 5),
    ]:
        async with simulated(Failing(error)) as disk:
            reply = await disk.scsi(read16(0), data_in=BLOCK)
        assert reply.sense[0] == 0xF0
        assert int.from_bytes(reply.sense[3:7]) == information
        log.expect("Failing.read() failed")


async def test_a_failed_read_shows_nothing_of_what_was_there(log: Log) -> None:
    class Half(Storage):
        def read(self, offset: int, iov: IoVec) -> None:
            next(iter(iov))[:100] = b"s" * 100
            raise tcmu_rs.Busy("in the middle")

    async with simulated(Half()) as disk:
        reply = await disk.scsi(read16(0, 4), data_in=4 * BLOCK)
    assert (reply.status, reply.data) == (BUSY, b"")
    log.expect("in the middle")


def test_errors_are_pickled_with_what_they_carry() -> None:
    for error in (tcmu_rs.MediumError("bad", information=3), tcmu_rs.Miscompare(9, "differs"), tcmu_rs.Busy()):
        copy = pickle.loads(pickle.dumps(error))
        assert type(copy) is type(error)
        assert (str(copy), failure_of(copy, writing=False)) == (str(error), failure_of(error, writing=False))


def test_errors_say_what_they_are() -> None:
    assert str(tcmu_rs.MediumError("sector 5")) == "sector 5 (sense 3/11/00)"
    assert str(tcmu_rs.Busy()) == "Busy (status 0x08)"
