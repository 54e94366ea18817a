"""Views of a command's data that outlive the command: they delay or waste, and never see another command's data."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import tcmu_rs
from tcmu_rs import IoVec
from tcmu_rs._kept import Kept
from tcmu_rs.testing import CAP_KEEP_BUF, CAP_OOOC, CAP_READ_LEN, CAP_TMR, SimulatedDisk, simulated

from .conftest import Log
from .disks import BLOCK, CHECK_CONDITION, GOOD, TASK_ABORTED, PlainDisk, Storage, read16, write16

WITHOUT_KEEP_BUF = CAP_OOOC | CAP_READ_LEN | CAP_TMR
ALL = WITHOUT_KEEP_BUF | CAP_KEEP_BUF
SCRIBBLE = 0xDB

MANY = 64
"""More commands than the data area in these tests has blocks: memory that is given out again is hit."""


class Keeper(Storage):
    """Reads of block 0 keep what `keep` makes of their IoVec."""

    def __init__(self, keep: Callable[[IoVec], Any]) -> None:
        super().__init__()
        self.keep = keep
        self.kept: Any = None

    def read(self, offset: int, iov: IoVec) -> None:
        self.load(offset, iov)
        if offset == 0 and self.kept is None:
            self.kept = self.keep(iov)

    def write(self, offset: int, iov: IoVec) -> None:
        self.store(offset, iov)


async def use_all_memory(disk: SimulatedDisk) -> None:
    for number in range(MANY):
        data = bytes([number + 1]) * BLOCK
        await disk.write(BLOCK, data)
        assert await disk.read(BLOCK, BLOCK) == data


def a_thread_that_fills(iov: IoVec) -> tuple[int, threading.Thread]:
    """A thread inside readv(2), which has the addresses and cannot be called off."""
    receiver, sender = os.pipe()
    started = threading.Event()

    def fill() -> None:
        views = list(iov)
        started.set()
        os.readv(receiver, views)
        os.close(receiver)

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    started.wait()
    return sender, thread


def finish_thread(kept: tuple[int, threading.Thread]) -> None:
    sender, thread = kept
    os.write(sender, b"T" * BLOCK)
    thread.join()
    os.close(sender)


def exception_with_view(iov: IoVec) -> Exception:
    def fail(view: memoryview) -> None:
        raise ValueError("caught and stored")

    try:
        fail(iov[0])
    except ValueError as error:
        return error
    raise AssertionError


KEEPERS = [
    pytest.param(lambda iov: iov[0], None, id="view"),
    pytest.param(lambda iov: list(iov), None, id="all views"),
    pytest.param(lambda iov: iov[0][10:20][2:4], None, id="slice of a slice"),
    pytest.param(lambda iov: iov[0].cast("I"), None, id="cast"),
    pytest.param(lambda iov: (ctypes.c_char * 16).from_buffer(iov[0]), None, id="ctypes"),
    pytest.param(exception_with_view, None, id="traceback"),
    pytest.param(a_thread_that_fills, finish_thread, id="thread in readv"),
]


@pytest.mark.parametrize(("keep", "release"), KEEPERS)
async def test_where_the_kernel_keeps_buffers_the_answer_comes_at_once(
    log: Log, keep: Callable[[IoVec], Any], release: Callable[[Any], None] | None
) -> None:
    handler = Keeper(keep)
    async with simulated(handler, data_size=16 * 4096, capabilities=ALL) as disk:
        assert await disk.read(0, BLOCK) == bytes(BLOCK)
        log.expect("simulated: Keeper.read() kept 1 views of a command's data after it returned")
        assert len(disk.kernel.kept()) == 1
        await use_all_memory(disk)
        if isinstance(handler.kept, memoryview):
            assert bytes(handler.kept) == bytes(handler.kept.nbytes)
        if release is not None:
            release(handler.kept)
        handler.kept = ()
        await wait_all_tasks_blocked()
        assert disk.kernel.kept() == []
        await use_all_memory(disk)


@pytest.mark.parametrize(("keep", "release"), KEEPERS)
async def test_elsewhere_the_answer_waits_for_the_last_view(
    log: Log, keep: Callable[[IoVec], Any], release: Callable[[Any], None] | None
) -> None:
    handler = Keeper(keep)
    async with simulated(handler, data_size=16 * 4096, capabilities=WITHOUT_KEEP_BUF) as disk:
        ticket = disk.submit(read16(0), data_in=BLOCK)
        await wait_all_tasks_blocked()
        log.expect("simulated: Keeper.read() kept 1 views")
        await use_all_memory(disk)
        assert not disk.answered(ticket)
        if release is not None:
            release(handler.kept)
        handler.kept = ()
        reply = await disk.wait(ticket)
        # A thread may have written until the very last moment.
        assert (reply.status, reply.data) == (GOOD, (b"T" if release is finish_thread else b"\0") * BLOCK)
        assert disk.kernel.kept() == []


async def test_views_of_written_data_are_kept_too(log: Log) -> None:
    class Hoarder(Storage):
        kept: memoryview | None = None

        async def write(self, offset: int, iov: IoVec) -> None:
            await trio.lowlevel.checkpoint()
            self.kept = iov[0]

        async def read(self, offset: int, iov: IoVec) -> None: ...

    handler = Hoarder()
    async with simulated(handler) as disk:
        await disk.write(0, b"w" * BLOCK)
        log.expect("Hoarder.write() kept 1 views")
        assert handler.kept is not None
        assert handler.kept.readonly
        assert handler.kept.tobytes() == b"w" * BLOCK
        handler.kept = None
        await wait_all_tasks_blocked()
        assert disk.kernel.kept() == []


async def test_a_view_that_goes_just_before_it_is_first_waited_for(log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """As in another thread, after the look at what has gone."""
    handler = Keeper(lambda iov: iov[0])
    wait = Kept.wait

    async def late(self: Kept) -> None:
        handler.kept = ()
        await wait(self)

    monkeypatch.setattr(Kept, "wait", late)
    async with simulated(handler) as disk:
        await disk.read(0, BLOCK)
        log.expect("kept 1 views")
        await wait_all_tasks_blocked()
        assert disk.kernel.kept() == []


async def test_many_kept_views_in_any_order(log: Log) -> None:
    class Hoarder(PlainDisk):
        max_in_flight = 4

        def __init__(self) -> None:
            super().__init__()
            self.kept: dict[int, list[memoryview]] = {}

        async def read(self, offset: int, iov: IoVec) -> None:  # type: ignore[override]
            await trio.lowlevel.checkpoint()
            self.load(offset, iov)
            self.kept[offset // BLOCK] = list(iov)

    for capabilities in (ALL, WITHOUT_KEEP_BUF, CAP_READ_LEN):
        handler = Hoarder()
        async with simulated(handler, capabilities=capabilities) as disk:
            tickets = [disk.submit(read16(block), data_in=BLOCK) for block in range(12)]
            await wait_all_tasks_blocked()
            assert len(handler.kept) == 12
            for block in (5, 0, 11, 1, 2, 3, 4, 10, 9, 8, 7, 6):
                del handler.kept[block]
            for ticket in tickets:
                assert (await disk.wait(ticket)).status == GOOD
            await wait_all_tasks_blocked()
            assert disk.kernel.kept() == []
        for _ in range(12):
            log.expect("kept 1 views")


@pytest.mark.parametrize("capabilities", [ALL, WITHOUT_KEEP_BUF])
async def test_a_view_is_safe_after_its_device_is_gone(log: Log, capabilities: int) -> None:
    handler = Keeper(lambda iov: list(iov))
    # Without KEEP_BUF the answer waits for the view, and the device does not wait for the answer.
    with pytest.raises(AssertionError) if capabilities == WITHOUT_KEEP_BUF else nullcontext():
        async with simulated(handler, capabilities=capabilities) as disk:
            disk.submit(read16(0), data_in=BLOCK)
            await wait_all_tasks_blocked()
    log.expect("kept 1 views")
    del disk
    gc.collect()
    (view,) = handler.kept
    view[:] = b"z" * BLOCK
    assert bytes(view) == b"z" * BLOCK
    with pytest.raises(ValueError, match="released"):
        view.release()
        view[0]
    handler.kept.clear()


async def test_an_iovec_that_is_kept_gives_nothing_out_any_more() -> None:
    handler = Keeper(lambda iov: iov)
    async with simulated(handler) as disk:
        await disk.read(0, BLOCK)
        iov: IoVec = handler.kept
        assert (iov.nbytes, len(iov), iov.readonly) == (BLOCK, 1, False)
        uses: list[Callable[[], object]] = [
            lambda: iov[0],
            lambda: list(iov),
            iov.tobytes,
            lambda: iov.copy_from(bytes(BLOCK)),
            lambda: iov.copy_into(bytearray(BLOCK)),
            iov.zero,
            lambda: iov.slice(0, 4).tobytes(),
        ]
        for use in uses:
            with pytest.raises(BufferError, match="the command was answered"):
                use()
        assert disk.kernel.kept() == []


async def test_an_iovec_of_a_read_that_wrote_nothing_does_not_touch_the_memory_either(log: Log) -> None:
    """What a partial use leaves out is zeroed before; but by then another command may have the memory."""

    class Failing(PlainDisk):
        kept: IoVec

        def read(self, offset: int, iov: IoVec) -> None:
            self.kept = iov
            raise OSError(5, "broken")

        async def write(self, offset: int, iov: IoVec) -> None:  # type: ignore[override]
            for use in (
                lambda: self.kept[0],
                self.kept.tobytes,
                lambda: self.kept.slice(0, 4).copy_from(b"late"),
                lambda: self.kept.slice(0, 4).zero(),
                lambda: self.kept.read_from(0, 0),
                lambda: self.kept.slice(0, 4).read_from(0, 0),
            ):
                with pytest.raises(BufferError, match="the command was answered"):
                    use()
            self.store(offset, iov)

    handler = Failing()
    async with simulated(handler) as disk:
        assert (await disk.scsi(read16(0), data_in=BLOCK)).status == CHECK_CONDITION
        log.expect("broken")
        await disk.write(0, b"x" * BLOCK)
    assert handler.data[:BLOCK] == b"x" * BLOCK


async def test_transfers_in_many_pieces() -> None:
    seen: list[int] = []

    class Scattered(Storage):
        max_in_flight = 32

        def __init__(self) -> None:
            super().__init__()
            self.gates = [trio.Event() for _ in range(32)]

        async def read(self, offset: int, iov: IoVec) -> None:
            if iov.nbytes == 4096:
                await self.gates[offset // 4096].wait()
            seen.append(len(iov))
            self.load(offset, iov)

        def write(self, offset: int, iov: IoVec) -> None:
            seen.append(len(iov))
            self.store(offset, iov)

    handler = Scattered()
    data = os.urandom(20 * 4096)
    async with simulated(handler, data_size=48 * 4096) as disk:
        tickets = [disk.submit(read16(8 * number, 8), data_in=4096) for number in range(32)]
        await wait_all_tasks_blocked()
        for number in range(0, 32, 2):
            handler.gates[number].set()
            await disk.wait(tickets[number])
        await disk.write(0, data)
        assert await disk.read(0, len(data)) == data
        for gate in handler.gates:
            gate.set()
    assert max(seen) >= 16


# Failures and cancellations are no reason to say that views were kept.


@pytest.mark.parametrize("capabilities", [ALL, WITHOUT_KEEP_BUF])
async def test_a_cancelled_handler_has_kept_nothing(capabilities: int) -> None:
    """The traceback of Cancelled holds the handler's frames, and the answer was given while it was on its way."""

    class Slow(Storage):
        async def read(self, offset: int, iov: IoVec) -> None:
            views = list(iov)
            await trio.sleep_forever()
            del views

    handler = Slow()
    async with simulated(handler, capabilities=capabilities, grace=0) as disk:
        ticket = disk.submit(read16(0), data_in=BLOCK)
        await wait_all_tasks_blocked()
        disk.abort(ticket)
        assert (await disk.wait(ticket)).status == TASK_ABORTED
        last = disk.submit(read16(0), data_in=BLOCK)
        await wait_all_tasks_blocked()
    # Nor when the device ends.
    assert (await disk.wait(last)).status == TASK_ABORTED
    assert disk.kernel.kept() == []


@pytest.mark.parametrize("error", [OSError(5, "as planned"), ValueError("a bug")])
@pytest.mark.parametrize("colour", ["plain", "async", "blocking"])
async def test_a_failed_handler_has_kept_nothing(log: Log, error: Exception, colour: str) -> None:
    """Whoever kept the records of the log kept the exception, its frames and their views."""

    class Plain(Storage):
        def read(self, offset: int, iov: IoVec) -> None:
            views = list(iov)
            raise type(error)(*error.args) from LookupError(views[0].nbytes)

    class Async(Storage):
        async def read(self, offset: int, iov: IoVec) -> None:
            views = list(iov)
            await trio.lowlevel.checkpoint()
            raise type(error)(*error.args) from LookupError(views[0].nbytes)

    class Blocking(Storage):
        @tcmu_rs.blocking
        def read(self, offset: int, iov: IoVec) -> None:
            views = list(iov)
            raise type(error)(*error.args) from LookupError(views[0].nbytes)

    handler = {"plain": Plain, "async": Async, "blocking": Blocking}[colour]()
    async with simulated(handler, strict=False) as disk:
        reply = await disk.scsi(read16(0), data_in=BLOCK)
        assert reply.status != GOOD
        assert disk.kernel.kept() == []
        log.expect(str(error))


# What a handler forgets to fill.


async def test_a_read_that_fills_nothing_is_an_error(log: Log) -> None:
    class Forgetful(Storage):
        def read(self, offset: int, iov: IoVec) -> None: ...

    async with simulated(Forgetful(), strict=False) as disk:
        reply = await disk.scsi(read16(0), data_in=BLOCK)
    assert reply.sense_code == (0x4, 0x44, 0x00)
    log.expect("read() returned without filling its IoVec")


async def test_what_a_read_leaves_out_is_zero_and_nothing_else() -> None:
    class Half(Storage):
        def read(self, offset: int, iov: IoVec) -> None:
            iov.slice(0, 100).copy_from(b"h" * 100)

    async with simulated(Half()) as disk:
        assert await disk.read(0, BLOCK) == b"h" * 100 + bytes(BLOCK - 100)


async def test_a_broken_promise_to_fill_is_found_by_the_simulator() -> None:
    class Liar(Storage):
        fills_reads = True

        def read(self, offset: int, iov: IoVec) -> None:
            iov.slice(0, 100).copy_from(b"h" * 100)

    with pytest.raises(AssertionError, match="was never written"):
        async with simulated(Liar()) as disk:
            await disk.read(0, BLOCK)


async def test_the_data_of_a_write_cannot_be_changed(log: Log) -> None:
    class Vandal(Storage):
        def read(self, offset: int, iov: IoVec) -> None: ...

        def write(self, offset: int, iov: IoVec) -> None:
            iov.zero()

    async with simulated(Vandal(), strict=False) as disk:
        reply = await disk.scsi(write16(0), bytes(BLOCK))
    assert reply.sense_code == (0x4, 0x44, 0x00)
    log.expect("this IoVec is read-only")


async def test_memory_is_scribbled_over_after_the_answer(log: Log) -> None:
    """The simulator's own promise: a late reader reads rubbish, where nothing protects it."""
    handler = Keeper(lambda iov: iov[0])
    async with simulated(handler) as disk:
        await disk.read(0, BLOCK)
        log.expect("kept 1 views")
        (kept,) = disk.kernel.kept()
        assert disk.kernel.free_kept(kept)
        assert bytes(handler.kept) == bytes([SCRIBBLE]) * BLOCK
        # There was nothing to be freed when the view went, which must not end the device.
        disk.device._engine._kept._tell = raise_oserror
        handler.kept = ()
        await wait_all_tasks_blocked()
        log.expect(f"simulated: the buffer of command {kept} cannot be freed: no such buffer")
        await disk.read(0, BLOCK)


def raise_oserror(cmd_id: int) -> None:
    raise OSError("no such buffer")
