"""What a command costs, and a device that has none: counted in calls, doorbells and wake-ups, and not in time."""

from __future__ import annotations

import gc
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tcmu_rs import IoVec, _files
from tcmu_rs.handlers.file import FileHandler
from tcmu_rs.testing import SimulatedDisk, simulated

from .disks import BLOCK, Storage, read16, write16

BATCH = 32


class Async(Storage):
    fills_reads = True
    max_in_flight = BATCH

    async def read(self, offset: int, iov: IoVec) -> None:
        iov.copy_from(self.data[offset : offset + iov.nbytes])

    async def write(self, offset: int, iov: IoVec) -> None:
        iov.copy_into(memoryview(self.data)[offset : offset + iov.nbytes])


class Plain(Storage):
    fills_reads = True

    def read(self, offset: int, iov: IoVec) -> None:
        iov.copy_from(self.data[offset : offset + iov.nbytes])

    def write(self, offset: int, iov: IoVec) -> None:
        iov.copy_into(memoryview(self.data)[offset : offset + iov.nbytes])


class Calls:
    """Counts calls of Python functions and of built-in ones, by who makes them, while it is entered."""

    def __init__(self) -> None:
        self.python: Counter[str] = Counter()
        self.native: Counter[str] = Counter()

    def __enter__(self) -> Calls:
        def count(frame: FrameType, event: str, argument: Any) -> None:
            if event == "call":
                self.python[frame.f_code.co_qualname] += 1
            elif event == "c_call" and "tcmu_rs" in str(frame.f_globals.get("__name__")):
                self.native[argument.__qualname__] += 1

        sys.setprofile(count)
        return self

    def __exit__(self, *_: object) -> None:
        sys.setprofile(None)


async def batch(disk: SimulatedDisk, *, write: bool) -> None:
    """A batch of commands with one event."""
    disk.kernel.plug()
    tickets = [
        disk.submit(write16(0), bytes(BLOCK)) if write else disk.submit(read16(0), data_in=BLOCK) for _ in range(BATCH)
    ]
    disk.kernel.unplug()
    for ticket in tickets:
        (await disk.wait(ticket)).check()


@pytest.mark.parametrize("make", [Async, Plain])
@pytest.mark.parametrize("write", [False, True])
async def test_a_command_that_does_not_suspend_is_a_few_calls(make: type[Storage], write: bool) -> None:
    async with simulated(make()) as disk:
        await batch(disk, write=write)
        before = disk.device.statistics()
        with Calls() as calls:
            await batch(disk, write=write)
        after = disk.device.statistics()
    # One native call runs the handler's method; around a plain one there is nothing either.
    ours = {name: count for name, count in calls.python.items() if name.startswith(("Engine.", "Calls.", "Workers."))}
    assert "Engine._run_at_once" in ours
    assert not [name for name, count in ours.items() if count >= BATCH]
    native = {name: count for name, count in calls.native.items() if count >= BATCH and name.startswith("Command.")}
    # Attributes are not among them.
    assert native == {"Command.run": BATCH}
    assert after.doorbells - before.doorbells == 1
    assert after.wakeups - before.wakeups == 1


async def test_commands_leave_nothing_for_the_collector() -> None:
    """A batch that leaves garbage in circles would stop the loop for the collector now and again."""
    async with simulated(Async()) as disk:
        await batch(disk, write=False)
        gc.collect()
        gc.disable()
        try:
            for _ in range(10):
                await batch(disk, write=False)
                await batch(disk, write=True)
            assert gc.collect() == 0
        finally:
            gc.enable()


@pytest.mark.skipif(_files.obstacle() is not None, reason="no io_uring")
async def test_a_file_takes_no_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def no_thread(*_: object, **__: object) -> None:
        raise AssertionError("a thread")

    path = tmp_path / "disk"
    async with simulated(FileHandler(path, size=1 << 20, create=True)) as disk:
        with monkeypatch.context() as patch:
            patch.setattr(trio.to_thread, "run_sync", no_thread)
            for write in (True, False):
                await batch(disk, write=write)
            await disk.write(0, b"x" * BLOCK, fua=True)
            await disk.flush()
            await disk.write_zeroes(0, BLOCK)
            await disk.discard(0, BLOCK)


class WakeUps(trio.abc.Instrument):
    """Counts passes of the loop."""

    def __init__(self) -> None:
        self.count = 0

    def after_io_wait(self, timeout: float) -> None:
        self.count += 1


async def test_idle_devices_do_nothing() -> None:
    """No timer, no polling: with 200 devices the loop sleeps until somebody else wakes it up."""
    instrument = WakeUps()
    async with trio.open_nursery() as nursery:
        stop = trio.Event()

        async def serve(task_status: trio.TaskStatus[SimulatedDisk]) -> None:
            async with simulated(Async()) as disk:
                task_status.started(disk)
                await stop.wait()

        disks = [await nursery.start(serve) for _ in range(200)]
        await disks[0].read(0, BLOCK)
        await wait_all_tasks_blocked()
        before = [disk.device.statistics() for disk in disks]
        trio.lowlevel.add_instrument(instrument)
        await trio.sleep(0.3)
        trio.lowlevel.remove_instrument(instrument)
        after = [disk.device.statistics() for disk in disks]
        assert before == after
        # The end of the sleep, and what wakes up a loop now and again: a signal, a child.
        assert instrument.count <= 5
        stop.set()


async def test_a_ring_that_is_never_empty_leaves_turns_to_others() -> None:
    """Not after each small batch, which would cost more than the batch, but often enough."""
    count = 400

    class Chain(Async):
        async def read(self, offset: int, iov: IoVec) -> None:
            await super().read(offset, iov)
            if len(tickets) < count:
                tickets.append(disk.submit(read16(0), data_in=BLOCK))
            else:
                last.set()

    last, instrument = trio.Event(), WakeUps()
    async with simulated(Chain()) as disk:
        tickets: list[int] = []
        tickets.append(disk.submit(read16(0), data_in=BLOCK))
        trio.lowlevel.add_instrument(instrument)
        await last.wait()
        trio.lowlevel.remove_instrument(instrument)
        for ticket in tickets:
            (await disk.wait(ticket)).check()
        assert disk.device.statistics().batches >= count
    # One command at a time, and 64 of them at the very most between two passes.
    assert count / 64 <= instrument.count <= count / 4
