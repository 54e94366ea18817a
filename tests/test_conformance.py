"""The conformance kit finds what is wrong, and says which obligation is broken."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import trio

import tcmu_rs
from tcmu_rs import Command, ExtentState, IoVec
from tcmu_rs.testing import BrokenObligation, Obligation, check_block_handler

from .conftest import Log
from .disks import AsyncDisk, BlockingDisk, PlainDisk, Storage

SIZE = 1 << 20


class Whole(PlainDisk):
    """Everything a block handler can have, done right: what the broken ones are derived from."""

    discard_zeroes = True
    fills_reads = True

    def __init__(self, size: int = SIZE) -> None:
        super().__init__(size)

    def flush(self) -> None: ...

    def discard(self, offset: int, length: int) -> None:
        self.data[offset : offset + length] = bytes(length)

    def extents(self, offset: int, length: int) -> list[tuple[int, ExtentState]]:
        # One block at a time: whoever asks has to ask again.
        used = any(self.data[offset : offset + self.block_size])
        return [(self.block_size, ExtentState.MAPPED if used else ExtentState.DEALLOCATED)]

    def write_zeroes(self, offset: int, length: int) -> None:
        self.data[offset : offset + length] = bytes(length)

    def set_size(self, size: int) -> None:
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))
        self.size = size


@pytest.mark.parametrize("disk_class", [Whole, PlainDisk, AsyncDisk, BlockingDisk])
async def test_good_handlers_pass(disk_class: type[Storage]) -> None:
    await check_block_handler(disk_class)


@pytest.mark.parametrize("size", [512, 1024, 4096, 4096 + 512, 70_000 // 512 * 512, 3 << 20])
async def test_disks_of_any_size_pass(size: int) -> None:
    await check_block_handler(lambda: Whole(size))


async def test_large_blocks_and_granules_pass() -> None:
    class Large(Whole):
        block_size = 4096
        physical_block_size = 65536
        discard_granularity = 65536

        def discard(self, offset: int, length: int) -> None:
            assert offset % 65536 == 0
            assert length % 65536 == 0 or offset + length == self.size
            super().discard(offset, length)

    await check_block_handler(lambda: Large(SIZE + 3 * 4096))


async def test_read_only_handlers_pass() -> None:
    class Flagged(Whole):
        read_only = True

    class Lacking(Storage):
        def read(self, offset: int, iov: IoVec) -> None:
            self.load(offset, iov)

    await check_block_handler(Flagged)
    await check_block_handler(Lacking)


async def test_persistent_handlers_pass() -> None:
    stored = bytearray(SIZE)

    class Persistent(Whole):
        async def open(self) -> None:
            self.data[:] = stored

        def flush(self) -> None:
            stored[:] = self.data

    await check_block_handler(Persistent, persistent=True)


# Broken handlers: the obligation that each violates is the first line of its docstring.


class NoRead(Storage):
    """ATTRIBUTES: has no method read()"""


class OddSize(Whole):
    """ATTRIBUTES: size is 1000; it must be a positive multiple"""

    def __init__(self) -> None:
        super().__init__(1000)


class LongVendor(Whole):
    """ATTRIBUTES: the vendor has 12 characters"""

    identity = tcmu_rs.Identity(vendor="far too long")


class Growing(Whole):
    """ATTRIBUTES: they changed"""

    def write(self, offset: int, iov: IoVec) -> None:
        super().write(offset, iov)
        self.size = SIZE + 512


class DoesNotOpen(Whole):
    """LIFE: open() raised FileNotFoundError"""

    async def open(self) -> None:
        raise FileNotFoundError(2, "not there")


class DoesNotClose(Whole):
    """LIFE: aclose() raised RuntimeError"""

    async def aclose(self) -> None:
        raise RuntimeError("busy")


class Counting(Whole):
    """RESULT: returned 512"""

    def read(self, offset: int, iov: IoVec) -> Any:
        super().read(offset, iov)
        return iov.nbytes


class ForgetsTheLastByte(Whole):
    """FILL: did not write byte 511"""

    def read(self, offset: int, iov: IoVec) -> None:
        self.load(offset, iov.slice(0, iov.nbytes - 1))


class FailsToRead(Whole):
    """FILL: raised OSError(5"""

    def read(self, offset: int, iov: IoVec) -> None:
        raise OSError(5, "no")


class Rolling(Whole):
    """STABLE: at the second read, byte"""

    def read(self, offset: int, iov: IoVec) -> None:
        iov.copy_from(random.randbytes(iov.nbytes))


class ForgetsWhatIsOdd(Whole):
    """WRITE: after write of 3584 bytes at 0, byte 3072"""

    def write(self, offset: int, iov: IoVec) -> None:
        self.store(offset, iov.slice(0, iov.nbytes // 1024 * 1024) if iov.nbytes > 512 else iov)


class ForgetsTheEnd(Whole):
    """WRITE: at 1048064, byte 1048064"""

    def write(self, offset: int, iov: IoVec) -> None:
        if offset + iov.nbytes < self.size:
            self.store(offset, iov)


class WritesPages(Whole):
    """NEIGHBOURS: after write of 512 bytes at 0, byte 512"""

    def __init__(self) -> None:
        super().__init__()
        self.data[:] = b"x" * SIZE

    def write(self, offset: int, iov: IoVec) -> None:
        start = offset // 4096 * 4096
        self.data[start : start + 4096] = bytes(4096)
        self.store(offset, iov)


class ReadsOnePiece(Whole):
    """SCATTER: in a read in"""

    def read(self, offset: int, iov: IoVec) -> None:
        self.load(offset, iov.slice(0, iov[0].nbytes))


class WritesOnePiece(Whole):
    """SCATTER: after a write in"""

    def write(self, offset: int, iov: IoVec) -> None:
        self.store(offset, iov.slice(0, iov[0].nbytes))


class WritesIntoItsSource(Whole):
    """SCATTER: in the IoVec of a write in"""

    def write(self, offset: int, iov: IoVec) -> None:
        super().write(offset, iov)
        if not iov.readonly:
            iov.zero()


class TooManyPieces(Whole):
    """SCATTER: raised OSError(22, 'Invalid argument')"""

    def write(self, offset: int, iov: IoVec) -> None:
        if len(iov) > 1024:
            raise OSError(22, "Invalid argument")
        self.store(offset, iov)


class CannotFlush(Whole):
    """FLUSH: flush() raised OSError"""

    def flush(self) -> None:
        raise OSError(5, "no")


class FlushThrowsAway(Whole):
    """FLUSH: after a flush, byte 0"""

    def flush(self) -> None:
        self.data[:] = bytes(self.size)


class LacksFua(Whole):
    """FUA: unexpected keyword argument 'fua'"""

    native_fua = True


class ZeroesTooLittle(Whole):
    """WRITE_ZEROES: after write_zeroes of 3584 bytes at 0, byte 3072"""

    def write_zeroes(self, offset: int, length: int) -> None:
        super().write_zeroes(offset, length // 1024 * 1024 or 512)


class ZeroesTooMuch(Whole):
    """NEIGHBOURS: after write_zeroes of 512 bytes at 0, byte 512"""

    def write_zeroes(self, offset: int, length: int) -> None:
        super().write_zeroes(offset, min(length + 512, self.size - offset))


class PromisesZeroes(Whole):
    """DISCARD: after discard of 512 bytes at 0, byte 0"""

    def discard(self, offset: int, length: int) -> None: ...


class DiscardsTooMuch(Whole):
    """NEIGHBOURS: after discard of"""

    def discard(self, offset: int, length: int) -> None:
        start = offset // 4096 * 4096
        stop = min(-(-(offset + length) // 4096) * 4096, self.size)
        self.data[start:stop] = bytes(stop - start)


class CannotReadWhatWasDiscarded(Whole):
    """DISCARD: raised LookupError"""

    gone = False

    def discard(self, offset: int, length: int) -> None:
        self.gone = True

    def read(self, offset: int, iov: IoVec) -> None:
        if self.gone:
            raise LookupError("no such block")
        super().read(offset, iov)


class Discarded(Whole):
    """DISCARD: at the second read of what was discarded"""

    discard_zeroes = False
    gone = range(0)

    def discard(self, offset: int, length: int) -> None:
        self.gone = range(offset, offset + length)

    def read(self, offset: int, iov: IoVec) -> None:
        self.data[self.gone.start : self.gone.stop] = random.randbytes(len(self.gone))
        super().read(offset, iov)


class KeepsItsSize(Whole):
    """RESIZE: size is 1048576 after set_size(2097152)"""

    def set_size(self, size: int) -> None:
        pass


class MovesToEmptyMemory(Whole):
    """RESIZE: after set_size(2097152), byte 1048064"""

    def set_size(self, size: int) -> None:
        self.size = size
        self.data = bytearray(size)


class RemembersWhatWasCutOff(Whole):
    """RESIZE: in what is new after set_size(2097152), byte 1048576"""

    def set_size(self, size: int) -> None:
        self.data.extend(bytes(max(size - len(self.data), 0)))
        self.size = size


class CannotGrow(Whole):
    """RESIZE: set_size(2097152) raised OSError"""

    def set_size(self, size: int) -> None:
        raise OSError(28, "No space left on device")


class SaysNothing(Whole):
    """EXTENTS: says nothing of the block at 0"""

    def extents(self, offset: int, length: int) -> list[tuple[int, ExtentState]]:
        return []


class SaysBytes(Whole):
    """EXTENTS: 100 bytes are not blocks"""

    def extents(self, offset: int, length: int) -> list[tuple[int, ExtentState]]:
        return [(100, ExtentState.MAPPED)]


class SaysNumbers(Whole):
    """EXTENTS: returned [512]"""

    def extents(self, offset: int, length: int) -> Any:
        return [512]


class SaysThereIsNothing(Whole):
    """EXTENTS: what was written at 0 is DEALLOCATED"""

    def extents(self, offset: int, length: int) -> list[tuple[int, ExtentState]]:
        return [(length, ExtentState.DEALLOCATED)]


class LosesUpdates(AsyncDisk):
    """CONCURRENCY: after writes of neighbouring blocks at once"""

    async def write(self, offset: int, iov: IoVec) -> None:
        start = offset // 4096 * 4096
        stop = min(-(-(offset + iov.nbytes) // 4096) * 4096, self.size)
        chunk = self.data[start:stop]
        await trio.lowlevel.checkpoint()
        chunk[offset - start : offset - start + iov.nbytes] = iov.tobytes()
        self.data[start:stop] = chunk


class MixesBlocks(AsyncDisk):
    """CONCURRENCY: after writes of the same blocks at once, the block at 0 is what nobody wrote"""

    turn = 0

    async def write(self, offset: int, iov: IoVec) -> None:
        self.turn ^= 256
        for first in (self.turn, 256 - self.turn):
            for at in range(first, iov.nbytes, 512):
                self.store(offset + at, iov.slice(at, at + 256))
            # Long enough for all of the others to have begun.
            for _ in range(100):
                await trio.lowlevel.checkpoint()


class OnePosition(AsyncDisk):
    """CONCURRENCY: after writes of neighbouring blocks at once"""

    position = 0

    async def write(self, offset: int, iov: IoVec) -> None:
        self.position = offset
        await trio.lowlevel.checkpoint()
        self.store(self.position, iov)


class FailsAtDepth(AsyncDisk):
    """CONCURRENCY: raised RuntimeError('busy')"""

    running = 0

    async def write(self, offset: int, iov: IoVec) -> None:
        if self.running == 4:
            raise RuntimeError("busy")
        self.running += 1
        await trio.lowlevel.checkpoint()
        self.running -= 1
        self.store(offset, iov)


class NeverUnlocks(AsyncDisk):
    """CANCEL: did not return in"""

    max_in_flight = 1

    def __init__(self) -> None:
        super().__init__()
        self.lock = trio.Semaphore(1)

    async def write(self, offset: int, iov: IoVec) -> None:
        await self.lock.acquire()
        await trio.lowlevel.checkpoint()
        self.store(offset, iov)
        self.lock.release()


class ForgetsAtTheEnd(Whole):
    """DURABLE: after opening again, byte"""


class LeavesFilesOpen(Whole):
    """DESCRIPTORS: /dev/null"""

    async def open(self) -> None:
        os.open("/dev/null", os.O_RDONLY)


class KeepsViews(Whole):
    """VIEWS: the log names the method"""

    def write(self, offset: int, iov: IoVec) -> None:
        super().write(offset, iov)
        self.kept = list(iov)


class Intercepts(Whole):
    """SERVED: ScsiError: the command failed (sense 5/24/00)"""

    def scsi_command(self, cmd: Command) -> Any:
        if cmd.cdb[0] == 0x93:
            raise tcmu_rs.IllegalRequest
        return NotImplemented


class OnlyPretends(Whole):
    """SERVED: wrong data after WRITE"""

    def scsi_command(self, cmd: Command) -> Any:
        return None if cmd.cdb[0] == 0x8A else NotImplemented


class WritesInSpite(Whole):
    """READ_ONLY: WRITE succeeded"""

    read_only = True

    def scsi_command(self, cmd: Command) -> Any:
        return None if cmd.cdb[0] == 0x8A else NotImplemented


BROKEN = [
    NoRead,
    OddSize,
    LongVendor,
    Growing,
    DoesNotOpen,
    DoesNotClose,
    Counting,
    ForgetsTheLastByte,
    FailsToRead,
    Rolling,
    ForgetsWhatIsOdd,
    ForgetsTheEnd,
    WritesPages,
    ReadsOnePiece,
    WritesOnePiece,
    WritesIntoItsSource,
    TooManyPieces,
    CannotFlush,
    FlushThrowsAway,
    LacksFua,
    ZeroesTooLittle,
    ZeroesTooMuch,
    PromisesZeroes,
    DiscardsTooMuch,
    CannotReadWhatWasDiscarded,
    Discarded,
    KeepsItsSize,
    MovesToEmptyMemory,
    RemembersWhatWasCutOff,
    CannotGrow,
    SaysNothing,
    SaysBytes,
    SaysNumbers,
    SaysThereIsNothing,
    LosesUpdates,
    MixesBlocks,
    OnePosition,
    FailsAtDepth,
    NeverUnlocks,
    ForgetsAtTheEnd,
    LeavesFilesOpen,
    KeepsViews,
    Intercepts,
    OnlyPretends,
    WritesInSpite,
]


@pytest.mark.parametrize("disk_class", BROKEN)
async def test_broken_handlers_are_told_what_they_owe(disk_class: Callable[[], Storage], log: Log) -> None:
    assert disk_class.__doc__ is not None
    name, _, detail = disk_class.__doc__.partition(": ")
    with pytest.raises(BrokenObligation) as caught:
        await check_block_handler(disk_class, persistent=disk_class is ForgetsAtTheEnd, patience=0.3)
    assert caught.value.obligation is Obligation[name]
    assert detail in caught.value.detail
    # The runtime's own words about it are no surprise.
    log.records.clear()


def test_every_obligation_is_broken_by_somebody() -> None:
    assert {name for disk in BROKEN if disk.__doc__ for name in [disk.__doc__.partition(":")[0]]} == {
        obligation.name for obligation in Obligation
    }
