"""A disk that grows and shrinks in service: who is told when, and that nobody reaches what is not there."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
import trio
from click.testing import CliRunner
from trio.testing import MockClock, wait_all_tasks_blocked

from tcmu_rs import IoVec, Options, _adoption, _cli, _service
from tcmu_rs.handlers.file import FileHandler
from tcmu_rs.handlers.luks import LuksHandler
from tcmu_rs.handlers.qcow2 import Qcow2Error, Qcow2Handler
from tcmu_rs.handlers.ram import RamHandler
from tcmu_rs.testing import SimulatedDisk, simulated
from tcmu_rs.testing.faults import Faulty

from .disks import BLOCK, GOOD, INQUIRY, TEST_UNIT_READY, AsyncDisk, Gated, PlainDisk, read16
from .luks import container, key

MIB = 1 << 20
CAPACITY_DATA_HAS_CHANGED = (0x6, 0x2A, 0x09)
DEVICE_INTERNAL_RESET = (0x6, 0x29, 0x04)
LBA_OUT_OF_RANGE = (0x5, 0x21, 0x00)
READ_CAPACITY = bytes([0x9E, 0x10]) + bytes(11) + bytes([32, 0, 0])


class Resizable(AsyncDisk):
    """Fails where it is told to, and notes what size it was given while how much was running."""

    failure: Exception | None = None
    stops_at: int | None = None
    running = 0

    async def read(self, offset: int, iov: IoVec) -> None:
        self.running += 1
        try:
            await super().read(offset, iov)
        finally:
            self.running -= 1

    async def set_size(self, size: int) -> None:
        assert self.running == 0
        await trio.lowlevel.checkpoint()
        if self.stops_at is not None:
            size = self.stops_at
        elif self.failure is not None:
            raise self.failure
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))
        self.size = size
        if self.failure is not None:
            raise self.failure


async def capacity(disk: SimulatedDisk) -> int:
    last, block_size = struct.unpack_from(">QL", (await disk.scsi(READ_CAPACITY, data_in=32)).check())
    return int((last + 1) * block_size)


async def test_initiators_are_told_once_and_find_the_new_end() -> None:
    handler = Resizable(MIB)
    async with simulated(handler) as disk:
        assert (await disk.scsi(read16(MIB // BLOCK), data_in=BLOCK)).sense_code == LBA_OUT_OF_RANGE
        await disk.device.resize(2 * MIB)
        assert (disk.size, handler.size) == (2 * MIB, 2 * MIB)
        assert (await disk.scsi(INQUIRY, data_in=96)).status == GOOD
        assert (await disk.scsi(TEST_UNIT_READY)).sense_code == CAPACITY_DATA_HAS_CHANGED
        assert await capacity(disk) == 2 * MIB
        await disk.write(2 * MIB - BLOCK, b"e" * BLOCK)
        # To the size that it has: nothing to tell.
        await disk.device.resize(2 * MIB)
        assert (await disk.scsi(TEST_UNIT_READY)).status == GOOD


async def test_what_has_begun_ends_before_and_what_comes_meanwhile_finds_the_new_size(
    autojump_clock: MockClock,
) -> None:
    class Slow(Gated):
        def set_size(self, size: int) -> None:
            assert self.running == 0
            self.data.extend(bytes(size - self.size))
            self.size = size

    handler = Slow(2)
    new_end = handler.size // BLOCK
    async with simulated(handler) as disk, trio.open_nursery() as nursery:
        begun = disk.submit(read16(0), data_in=BLOCK)
        await wait_all_tasks_blocked()
        nursery.start_soon(disk.device.resize, 2 * handler.size)
        await wait_all_tasks_blocked()
        meanwhile = [disk.submit(TEST_UNIT_READY), disk.submit(read16(new_end), data_in=BLOCK)]
        await wait_all_tasks_blocked()
        assert not any(disk.answered(ticket) for ticket in (begun, *meanwhile))
        handler.open_gate(0, new_end)
        assert (await disk.wait(begun)).status == GOOD
        assert (await disk.wait(meanwhile[0])).sense_code == CAPACITY_DATA_HAS_CHANGED
        assert (await disk.wait(meanwhile[1])).status == GOOD


async def test_a_command_that_does_not_end_keeps_the_size(autojump_clock: MockClock) -> None:
    class Slow(Gated):
        def set_size(self, size: int) -> None:
            raise AssertionError

    handler = Slow()
    async with simulated(handler) as disk:
        begun = disk.submit(read16(0), data_in=BLOCK)
        await wait_all_tasks_blocked()
        with pytest.raises(trio.TooSlowError):
            await disk.device.resize(2 * MIB, within=3)
        handler.open_gate(0)
        assert (await disk.wait(begun)).status == GOOD
        assert (await disk.scsi(TEST_UNIT_READY)).status == GOOD


async def test_load_meets_no_end_that_is_not_there() -> None:
    """Random reads run while the disk grows and shrinks: each is whole, or is refused as out of range."""
    handler = Resizable(MIB)
    seen = set()
    async with simulated(handler) as disk, trio.open_nursery() as nursery:

        async def read(first: int) -> None:
            for number in range(60):
                reply = await disk.scsi(read16((first * 977 + number * 131) % 4096), data_in=BLOCK)
                seen.add(reply.sense_code)
                assert reply.status == GOOD or reply.sense_code in (LBA_OUT_OF_RANGE, CAPACITY_DATA_HAS_CHANGED)

        for first in range(8):
            nursery.start_soon(read, first)
        for size in (2 * MIB, MIB, MIB // 2, 2 * MIB, BLOCK, MIB):
            await disk.device.resize(size, shrink=True)
            await trio.lowlevel.checkpoint()
    assert seen == {None, LBA_OUT_OF_RANGE, CAPACITY_DATA_HAS_CHANGED}


@pytest.mark.parametrize("size", [2 * MIB, MIB // 2])
async def test_storage_that_refuses_leaves_the_disk_as_it_was(size: int) -> None:
    handler = Resizable(MIB)
    handler.failure = OSError(28, "No space left on device")
    async with simulated(handler) as disk:
        with pytest.raises(OSError, match="No space"):
            await disk.device.resize(size, shrink=True)
        assert disk.size == MIB
        # One that shrinks was smaller for a moment.
        await disk.scsi(TEST_UNIT_READY)
        assert await capacity(disk) == MIB
        assert await disk.read(MIB - BLOCK, BLOCK) == bytes(BLOCK)


@pytest.mark.parametrize("size", [2 * MIB, MIB // 2])
async def test_storage_that_stops_on_the_way_says_how_far_it_came(size: int) -> None:
    handler = Resizable(MIB)
    handler.stops_at = (size + MIB) // 2
    handler.failure = OSError(5, "Input/output error")
    async with simulated(handler) as disk:
        with pytest.raises(OSError, match="Input/output"):
            await disk.device.resize(size, shrink=True)
        assert disk.size == handler.stops_at
        assert (await disk.scsi(TEST_UNIT_READY)).sense_code == CAPACITY_DATA_HAS_CHANGED
        assert await capacity(disk) == handler.stops_at


async def test_the_kernel_is_told_before_initiators_and_before_storage_goes() -> None:
    """Whenever the process dies, the storage is no smaller than what the kernel knows."""
    handler = Resizable(MIB)
    known = [MIB]

    def set_kernel_size(size: int) -> None:
        known.append(size)
        assert handler.size >= size

    async with simulated(handler) as disk:
        disk.device._set_kernel_size = set_kernel_size
        await disk.device.resize(2 * MIB)
        await disk.device.resize(MIB, shrink=True)
        handler.failure = OSError(5, "Input/output error")
        with pytest.raises(OSError, match="Input/output"):
            await disk.device.resize(BLOCK, shrink=True)
        assert known == [MIB, 2 * MIB, MIB, BLOCK, MIB]

        def refuse(size: int) -> None:
            raise OSError(22, "Invalid argument")

        handler.failure = None
        disk.device._set_kernel_size = refuse
        with pytest.raises(OSError, match="Invalid"):
            await disk.device.resize(BLOCK, shrink=True)
        # Nothing went, for nobody was told.
        assert (handler.size, disk.size) == (MIB, MIB)


async def test_what_cannot_be_is_refused() -> None:
    async with simulated(PlainDisk()) as disk:
        with pytest.raises(TypeError, match=r"PlainDisk has no set_size\(\)"):
            await disk.device.resize(2 * MIB)
    async with simulated(Resizable(MIB)) as disk:
        for size in (0, -BLOCK, 1000, 1 << 63):
            with pytest.raises(ValueError, match="is no size of a disk with blocks of 512"):
                await disk.device.resize(size, shrink=True)
        with pytest.raises(ValueError, match=r"less than the 1048576 of now.*--shrink"):
            await disk.device.resize(MIB // 2)
        assert await capacity(disk) == MIB


async def test_a_resized_disk_can_be_replaced() -> None:
    async with simulated(Resizable(MIB)) as disk:
        await disk.device.resize(2 * MIB)
        with pytest.raises(ValueError, match="initiators know 2097152"):
            await disk.device.replace(Resizable(MIB))
        await disk.device.replace(Resizable(2 * MIB))
        assert disk.size == 2 * MIB


async def test_one_change_at_a_time() -> None:
    begun, go = trio.Event(), trio.Event()

    class Slow(Resizable):
        async def set_size(self, size: int) -> None:
            begun.set()
            await go.wait()
            await super().set_size(size)

    async with simulated(Slow(MIB)) as disk, trio.open_nursery() as nursery:
        nursery.start_soon(disk.device.resize, 2 * MIB)
        await begun.wait()
        for change in (disk.device.resize, disk.device.pause):
            with pytest.raises(trio.BusyResourceError):
                await change(4 * MIB)
        go.set()


# The handlers.


async def test_a_file_grows_with_a_hole_and_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    handler = FileHandler(path, size=MIB, create=True)
    async with simulated(handler) as disk:
        await disk.write(MIB - BLOCK, b"x" * BLOCK)
        await disk.device.resize(1 << 30)
        await disk.scsi(TEST_UNIT_READY)
        assert path.stat().st_blocks * 512 < MIB
        await disk.write((1 << 30) - BLOCK, b"y" * BLOCK)
        await disk.device.resize(MIB // 2, shrink=True)
        assert path.stat().st_size == MIB // 2
        await disk.device.resize(MIB)
        await disk.scsi(TEST_UNIT_READY)
        # What was cut off does not come back.
        assert await disk.read(MIB - BLOCK, BLOCK) == bytes(BLOCK)
        # As `replace` and `upgrade` do when they have to go back.
        await handler.aclose()
        await handler.open()


async def test_a_failed_sync_at_a_resize_is_not_forgotten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(5, "Input/output error")

    handler = FileHandler(tmp_path / "disk", size=MIB, create=True)
    async with handler:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(OSError, match="Input/output"):
                handler.set_size(2 * MIB)
        with pytest.raises(OSError, match="lost by an earlier flush"):
            await handler.flush()


async def test_memory_that_was_given_back_is_zero_when_it_comes_again() -> None:
    async with simulated(RamHandler(MIB)) as disk:
        await disk.write(0, b"s" * MIB)
        await disk.device.resize(MIB // 2 + BLOCK, shrink=True)
        await disk.device.resize(4 * MIB)
        await disk.scsi(TEST_UNIT_READY)
        assert await disk.read(0, 4 * MIB) == b"s" * (MIB // 2 + BLOCK) + bytes(4 * MIB - MIB // 2 - BLOCK)


@pytest.mark.parametrize("size", [6 * MIB, 2 * MIB])
async def test_a_layer_above_storage_that_stops_on_the_way_is_as_large_as_that(size: int) -> None:
    """An encrypted disk said that it had its old size, when what it is stored in had become smaller and then failed."""
    data = container(4 * MIB)

    class Below(RamHandler):
        async def open(self) -> None:
            await super().open()
            self._data[: len(data)] = data

        def set_size(self, size: int) -> None:
            super().set_size((size + self.size) // 2)
            raise OSError(5, "Input/output error")

    below = Below(len(data))
    async with simulated(LuksHandler(Faulty(below, []), key)) as disk:
        with pytest.raises(OSError, match="Input/output"):
            await disk.device.resize(size, shrink=True)
        assert disk.size == (size + 4 * MIB) // 2
        await disk.scsi(TEST_UNIT_READY)
        await disk.write(disk.size - 4096, b"e" * 4096)
        assert await disk.read(disk.size - 4096, 4096) == b"e" * 4096


async def test_layers_pass_it_down_less_what_is_theirs() -> None:
    data = container(4 * MIB)
    size = len(data)

    class Below(RamHandler):
        async def open(self) -> None:
            await super().open()
            self._data[:size] = data

    below = Below(size)
    luks = LuksHandler(Faulty(below, []), key)
    async with simulated(luks) as disk:
        payload = disk.size
        await disk.write(0, b"k" * 4096)
        await disk.device.resize(payload + MIB)
        await disk.scsi(TEST_UNIT_READY)
        assert below.size == size + MIB
        await disk.write(payload + MIB - 4096, b"e" * 4096)
        assert await disk.read(payload + MIB - 4096, 4096) == b"e" * 4096
        assert await disk.read(0, 4096) == b"k" * 4096
        with pytest.raises(ValueError, match=r"is no size|whole blocks"):
            await disk.device.resize(payload + 512)


async def test_an_image_grows_and_shrinks_with_what_it_holds(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    await Qcow2Handler.create(str(path), Options(size=MIB))
    handler = Qcow2Handler(path, size=MIB)
    async with simulated(handler) as disk:
        await disk.write(MIB - BLOCK, b"x" * BLOCK)
        await disk.device.resize(1 << 40)
        await disk.scsi(TEST_UNIT_READY)
        await disk.write((1 << 40) - BLOCK, b"y" * BLOCK)
        assert await disk.read(MIB - BLOCK, 2 * BLOCK) == b"x" * BLOCK + bytes(BLOCK)
        await disk.device.resize(MIB // 2, shrink=True)
        await disk.device.resize(2 * MIB)
        await disk.scsi(TEST_UNIT_READY)
        assert await disk.read(0, 2 * MIB) == bytes(2 * MIB)
        with pytest.raises(Qcow2Error, match="too many"):
            await disk.device.resize(1 << 62)
        await disk.write(0, b"z" * BLOCK)
        assert await disk.read(0, BLOCK) == b"z" * BLOCK
    assert await Qcow2Handler.check(str(path), Options()) == {"ok": True, "problems": [], "repaired": False}


# Servers that come after.


@pytest.mark.parametrize(("was_served", "handed_over", "told"), [(True, False, 1), (True, True, 0), (False, False, 0)])
def test_who_takes_over_from_a_dead_server_tells_that_settings_are_gone(
    was_served: bool, handed_over: bool, told: int
) -> None:
    unit = _service.unit_for(PlainDisk(MIB), serial="s", naa=bytes([0x60]) + bytes(15))
    claim = object.__new__(_adoption.Claim)
    claim.known_size, claim.was_served, claim.was_handed_over = MIB, was_served, handed_over
    claim.settle(MIB, unit)
    assert ("was reset", told) in unit.state()
    assert ("capacity changed", 0) in unit.state()


async def test_what_is_new_about_a_unit_is_told_to_who_asks_next() -> None:
    async with simulated(PlainDisk()) as disk:
        assert disk.device._unit is not None
        disk.device._unit.announce_capacity()
        disk.device._unit.announce_reset()
        assert (await disk.scsi(INQUIRY, data_in=96)).status == GOOD
        assert (await disk.scsi(read16(0), data_in=BLOCK)).sense_code == DEVICE_INTERNAL_RESET
        assert (await disk.scsi(read16(0), data_in=BLOCK)).sense_code == CAPACITY_DATA_HAS_CHANGED
        assert (await disk.scsi(read16(0), data_in=BLOCK)).status == GOOD


def test_a_server_that_comes_after_takes_the_size_of_the_storage_and_makes_nothing(tmp_path: Path) -> None:
    asked = []

    class Sized(PlainDisk):
        @classmethod
        def from_config(cls, config: str, options: Options) -> Sized:
            asked.append(options)
            if options.size is None:
                raise ValueError("no size of its own")
            return cls(options.size)

    handler = _adoption.remade(FileHandler, str(tmp_path / "disk"), Options(size=MIB, create=True), "nobody")
    assert isinstance(handler, FileHandler)
    assert (handler._wanted_size, handler._create) == (None, False)
    with pytest.raises(ValueError, match="no size of its own"):
        # Its size is what the kernel knows; there is no such device here.
        _adoption.remade(Sized, "", Options(size=MIB, create=True), "nobody")
    assert [(options.size, options.create) for options in asked] == [(None, False), (None, False)]


# People.


def test_a_disk_that_is_not_served_is_resized_by_the_command(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    with path.open("wb") as file:
        file.truncate(MIB)

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(_cli.main, ["resize", f"file:{path}", *arguments])
        return result.output

    assert run("--size", "4M") == ""
    assert path.stat().st_size == 4 * MIB
    assert "--shrink" in run("--size", "2M")
    assert "whole blocks of 512" in run("--size", "1000000")
    assert path.stat().st_size == 4 * MIB
    assert run("--size", "2M", "--shrink") == ""
    assert path.stat().st_size == 2 * MIB
