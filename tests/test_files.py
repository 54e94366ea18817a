"""Transfers between files and an IoVec: at once, through io_uring, and in threads."""

from __future__ import annotations

import errno
import fcntl
import gc
import itertools
import os
import signal
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import tcmu_rs
from tcmu_rs import IoVec, _files
from tcmu_rs._doctor import examine
from tcmu_rs.testing import simulated

from .conftest import Log
from .disks import BLOCK, GOOD, TASK_ABORTED, Storage, read16
from .test_runtime import descriptors
from .test_views import ALL, WITHOUT_KEEP_BUF, use_all_memory

SIZE = 1 << 20
UNUSED = 1000  # a descriptor that no other test has: nothing was learnt of a file under that number

uring = pytest.mark.skipif(
    _files.obstacle() is not None and "CI" not in os.environ, reason=f"no io_uring: {_files.obstacle()}"
)


@pytest.fixture(params=[pytest.param("io_uring", marks=uring), "threads"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the page cache cannot do is done this way."""
    if request.param == "threads":
        monkeypatch.setenv(_files.VARIABLE, "off")
    return str(request.param)


@pytest.fixture
def content() -> bytes:
    return os.urandom(SIZE)


@pytest.fixture
def fd(tmp_path: Path, content: bytes) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(content)
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


def cold(fd: int) -> None:
    """Has the page cache forget a file; where it cannot (tmpfs) nothing is tested but correctness."""
    os.fsync(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)


def pipe() -> tuple[int, int]:
    """A file that is slow: a transfer from it waits until something is written.

    With O_DIRECT (packets) it is taken for a file without page cache, and not asked for what is there at once.
    """
    receiver, sender = os.pipe2(os.O_DIRECT)
    fcntl.fcntl(receiver, fcntl.F_SETFL, os.O_DIRECT)
    return receiver, sender


def suspends(coroutine: Coroutine[Any, Any, None]) -> bool:
    """Runs a coroutine up to its first suspension, if there is one."""
    try:
        coroutine.send(None)
    except StopIteration:
        return False
    coroutine.close()
    return True


def memory_at(number: int) -> int:
    """A file in memory, with the first free descriptor from a number on."""
    made = os.memfd_create("memory")
    fd = fcntl.fcntl(made, fcntl.F_DUPFD, number)
    os.close(made)
    return fd


async def read(fd: int, offset: int, iov: IoVec) -> None:
    await iov.read_from(fd, offset)


async def write(fd: int, offset: int, iov: IoVec) -> None:
    await iov.write_to(fd, offset)


# What is moved.


@pytest.mark.parametrize("sizes", [[4096], [1, 4095, 0, 8192, 5], [64] * 3000, [SIZE // 2], []])
async def test_round_trip(way: str, fd: int, content: bytes, sizes: list[int]) -> None:
    total = sum(sizes)
    for offset in (0, 513):
        target = [bytearray(size) for size in sizes]
        cold(fd)
        await IoVec(target).read_from(fd, offset)
        assert b"".join(target) == content[offset : offset + total]
        for fua in (False, True):
            new = [os.urandom(size) for size in sizes]
            await IoVec(new).write_to(fd, offset, fua=fua)
            assert os.pread(fd, total, offset) == b"".join(new)
        os.pwrite(fd, content, 0)


async def test_what_the_page_cache_has_does_not_suspend(fd: int, content: bytes) -> None:
    os.pread(fd, SIZE, 0)
    target = bytearray(SIZE)
    for start in range(0, SIZE, SIZE // 4):
        assert not suspends(read(fd, start, IoVec([memoryview(target)[start : start + SIZE // 4]])))
    assert target == content


async def test_files_in_memory_have_nothing_to_wait_for() -> None:
    """tmpfs does not know RWF_NOWAIT, which once sent every transfer through a thread of the kernel."""
    fd = memory_at(UNUSED)
    try:
        assert not suspends(write(fd, 100, IoVec([b"abc", b"def"])))
        target = bytearray(6)
        assert not suspends(read(fd, 100, IoVec([target])))
        assert target == b"abcdef"
    finally:
        os.close(fd)


async def test_what_was_learnt_of_a_file_ends_with_its_descriptor(fd: int) -> None:
    """The next file may have the number of a closed one: what was known of that is soon asked again."""
    number = fcntl.fcntl(fd, fcntl.F_DUPFD, UNUSED)
    await IoVec([b"wait"]).write_to(number, 0)
    os.close(number)
    assert memory_at(number) == number
    try:
        for place in range(256):
            await IoVec([bytes([place])]).write_to(number, place)
        assert os.pread(number, 300, 0) == bytes(range(256))
        assert not suspends(write(number, 0, IoVec([b"at once"])))
    finally:
        os.close(number)


@uring
async def test_a_mixture_of_cold_and_warm(fd: int, content: bytes) -> None:
    cold(fd)
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
    os.pread(fd, 4096, 8192)
    targets = [bytearray(16384) for _ in range(SIZE // 16384)]
    async with trio.open_nursery() as nursery:
        for index, target in enumerate(targets):
            nursery.start_soon(read, fd, index * 16384, IoVec([target]))
    assert b"".join(targets) == content


async def test_the_end_of_the_file_is_an_error(way: str, fd: int) -> None:
    for offset, end in ((SIZE - 10, SIZE), (SIZE, SIZE), (SIZE + 99, SIZE + 99)):
        for forget in (True, False):
            if forget:
                cold(fd)
            with pytest.raises(OSError, match=rf"the file ends at {end}: it was truncated") as caught:
                await IoVec([bytearray(20)]).read_from(fd, offset)
            assert caught.value.errno == errno.EIO


async def test_errors_have_their_class_and_number(way: str, fd: int, tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"^\[Errno 9\] Bad file descriptor$"):
        await IoVec([b"x"]).write_to(1 << 20, 0)
    reading = os.open(tmp_path / "file", os.O_RDONLY)
    for fua in (False, True):
        with pytest.raises(OSError, match="Bad file descriptor"):
            await IoVec([b"x"]).write_to(reading, 0, fua=fua)
    os.close(reading)
    for call in (tcmu_rs.fdatasync(1 << 20), tcmu_rs.fallocate(1 << 20, 0, 0, 1)):
        with pytest.raises(OSError, match="Bad file descriptor"):
            await call
    full = os.open("/dev/full", os.O_RDWR)
    with pytest.raises(OSError, match="No space left on device") as caught:
        await IoVec([b"x"]).write_to(full, 0)
    assert caught.value.errno == errno.ENOSPC
    os.close(full)
    with pytest.raises(OverflowError):
        IoVec([b"x"]).write_to(fd, -1)


async def test_memory_for_writing_is_not_read_into(fd: int) -> None:
    with pytest.raises(TypeError, match="this IoVec is read-only"):
        IoVec([b"x"]).read_from(fd, 0)


async def test_memory_of_any_alignment_around_the_page_cache(way: str, fd: int, content: bytes, tmp_path: Path) -> None:
    try:
        direct = os.open(tmp_path / "file", os.O_RDWR | os.O_DIRECT)
    except OSError as error:
        pytest.skip(f"O_DIRECT does not work on {tmp_path}: {error.strerror}")
    try:
        for sizes in ([8192], [1, 4095, 4096], [16, 8176]):
            # One byte into an allocation that begins at a page: never aligned.
            target = [memoryview(bytearray(size + 1))[1:] for size in sizes]
            await IoVec(target).read_from(direct, 4096)
            assert b"".join(target) == content[4096 : 4096 + 8192]
            new = os.urandom(8192)
            at = 0
            for view in target:
                view[:] = new[at : at + len(view)]
                at += len(view)
            for fua in (False, True):
                await IoVec(target).write_to(direct, 4096, fua=fua)
                assert os.pread(fd, 8192, 4096) == new
            os.pwrite(fd, content, 0)
        # What no memory can mend.
        with pytest.raises(OSError, match="Invalid argument"):
            await IoVec([bytearray(100)]).read_from(direct, 7)
    finally:
        os.close(direct)


async def test_holes_and_durability(way: str, fd: int, content: bytes) -> None:
    punch_hole_and_keep_size = 3
    try:
        await tcmu_rs.fallocate(fd, punch_hole_and_keep_size, 4096, 8192)
    except OSError as error:
        assert error.errno == errno.EOPNOTSUPP
        pytest.skip("no holes in this file system")
    assert os.pread(fd, SIZE, 0) == content[:4096] + bytes(8192) + content[12288:]
    await tcmu_rs.fdatasync(fd)


# Whose memory it is, and how long.


@uring
async def test_memory_is_held_until_the_transfer_is_over() -> None:
    receiver, sender = pipe()
    target = bytearray(8)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(read, receiver, 0, IoVec([target]))
        await wait_all_tasks_blocked()
        with pytest.raises(BufferError):
            target.append(0)
        os.write(sender, b"one")
        await wait_all_tasks_blocked()
        with pytest.raises(BufferError):
            target.append(0)
        os.write(sender, b"two34")
    assert target == b"onetwo34"
    target.append(0)
    os.close(receiver)
    os.close(sender)


@uring
async def test_a_cancelled_transfer_ends_before_its_call_does() -> None:
    receiver, sender = pipe()
    target = bytearray(8)
    with trio.move_on_after(0.01) as scope:
        await IoVec([target]).read_from(receiver, 0)
    assert scope.cancelled_caught
    target.append(0)
    # Nobody takes it any more.
    os.write(sender, b"12345678")
    await IoVec([memoryview(target)[:8]]).read_from(receiver, 0)
    assert target == b"12345678\0"
    os.close(receiver)
    os.close(sender)


async def test_what_is_cancelled_before_it_begins_is_not_done(way: str, fd: int, content: bytes) -> None:
    source = bytearray(b"x" * 4096)
    with trio.CancelScope() as scope:
        scope.cancel()
        await IoVec([source]).write_to(fd, 0, fua=True)
    assert scope.cancelled_caught
    source.append(0)
    assert os.pread(fd, SIZE, 0) == content


async def test_writes_of_many_at_the_same_place_are_whole(way: str, fd: int) -> None:
    """One after the other: never a mixture."""
    pieces = [bytes([number]) * 65536 for number in range(1, 40)]
    done = []

    async def replace(piece: bytes) -> None:
        await write(fd, 0, IoVec([piece]))
        done.append(piece)

    async with trio.open_nursery() as nursery:
        for number, piece in enumerate(pieces):
            nursery.start_soon(replace, piece)
            if number % 10 == 0:
                await trio.lowlevel.checkpoint()
    assert len(done) == len(pieces)
    assert os.pread(fd, 65536, 0) in pieces


@uring
async def test_whoever_watches_the_queue_may_go_first_or_last() -> None:
    """One of the tasks that wait looks after the queue for all of them: its own end or cancellation is not theirs."""
    for first in range(4):
        for cancel in (True, False):
            pipes = [pipe() for _ in range(4)]
            targets = [bytearray(3) for _ in pipes]
            scopes = [trio.CancelScope() for _ in pipes]
            ends = [trio.Event() for _ in pipes]
            over = []

            async def run(index: int) -> None:
                with scopes[index]:  # noqa: B023
                    await IoVec([targets[index]]).read_from(pipes[index][0], 0)  # noqa: B023
                over.append(index)  # noqa: B023
                ends[index].set()  # noqa: B023

            with trio.fail_after(10):
                async with trio.open_nursery() as nursery:
                    for index in range(4):
                        nursery.start_soon(run, index)
                    await wait_all_tasks_blocked()
                    for index in [first, *(number for number in range(4) if number != first)]:
                        if cancel and index == first:
                            scopes[index].cancel()
                        else:
                            os.write(pipes[index][1], b"abc")
                        await ends[index].wait()
            assert over[0] == first
            assert targets == [bytes(3) if cancel and index == first else b"abc" for index in range(4)]
            for descriptor in sum(pipes, ()):
                os.close(descriptor)


@uring
async def test_many_more_than_the_queue_takes_at_once() -> None:
    receiver, sender = pipe()
    many = 700
    targets = [bytearray(1) for _ in range(many)]
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            for target in targets:
                nursery.start_soon(read, receiver, 0, IoVec([target]))
            await wait_all_tasks_blocked()
            for number in range(many):
                os.write(sender, bytes([number % 255 + 1]))
                if number % 10 == 0:
                    await trio.lowlevel.checkpoint()
    assert sorted(bytes(target)[0] for target in targets) == sorted(number % 255 + 1 for number in range(many))
    os.close(receiver)
    os.close(sender)


@uring
async def test_cancelling_all_of_many() -> None:
    receiver, sender = pipe()
    targets = [bytearray(1) for _ in range(400)]
    with trio.fail_after(20), trio.move_on_after(0.05):
        async with trio.open_nursery() as nursery:
            for target in targets:
                nursery.start_soon(read, receiver, 0, IoVec([target]))
    # The tracebacks of the cancellations have the frames.
    gc.collect()
    for target in targets:
        target.append(0)
    os.close(receiver)
    os.close(sender)


class Slow(Storage):
    """Reads of block 0 come from a pipe; `begin` does them."""

    def __init__(self, fd: int, begin: Callable[[int, IoVec], Coroutine[Any, Any, None]]) -> None:
        super().__init__()
        self.fd = fd
        self.begin = begin

    async def read(self, offset: int, iov: IoVec) -> None:
        if offset == 0:
            await self.begin(self.fd, iov)
        else:
            self.load(offset, iov)

    def write(self, offset: int, iov: IoVec) -> None:
        self.store(offset, iov)


@uring
async def test_a_command_is_aborted_and_its_memory_is_nobody_elses() -> None:
    receiver, sender = pipe()

    async def begin(fd: int, iov: IoVec) -> None:
        await iov.read_from(fd, 0)

    async with simulated(Slow(receiver, begin), data_size=16 * 4096) as disk:
        ticket = disk.submit(read16(0), data_in=BLOCK)
        await wait_all_tasks_blocked()
        disk.abort(ticket)
        assert (await disk.wait(ticket)).status == TASK_ABORTED
        os.write(sender, b"x" * BLOCK)
        await use_all_memory(disk)
        assert (await disk.scsi(read16(0), data_in=BLOCK)).data == b"x" * BLOCK
    os.close(receiver)
    os.close(sender)


@uring
@pytest.mark.parametrize("capabilities", [ALL, WITHOUT_KEEP_BUF])
async def test_a_handler_that_does_not_wait_for_its_transfer(log: Log, capabilities: int) -> None:
    """The command is answered while the kernel still has the addresses: the memory stays out of use."""
    receiver, sender = pipe()
    with trio.fail_after(20):
        async with trio.open_nursery() as background:

            async def begin(fd: int, iov: IoVec) -> None:
                iov.zero()
                background.start_soon(read, fd, 0, iov)
                for _ in range(5):
                    await trio.lowlevel.checkpoint()

            async with simulated(Slow(receiver, begin), data_size=16 * 4096, capabilities=capabilities) as disk:
                ticket = disk.submit(read16(0), data_in=BLOCK)
                await wait_all_tasks_blocked()
                log.expect("Slow.read() kept 1 views of a command's data after it returned")
                assert disk.answered(ticket) == (capabilities == ALL)
                await use_all_memory(disk)
                os.write(sender, b"x" * BLOCK)
                assert (await disk.wait(ticket)).status == GOOD
                await wait_all_tasks_blocked()
                assert disk.kernel.kept() == []
                await use_all_memory(disk)
    os.close(receiver)
    os.close(sender)


@uring
async def test_a_device_that_stops_does_not_leave_its_transfers_behind() -> None:
    receiver, sender = pipe()

    async def begin(fd: int, iov: IoVec) -> None:
        await iov.read_from(fd, 0)

    async with simulated(Slow(receiver, begin), grace=0.01) as disk:
        ticket = disk.submit(read16(0), data_in=BLOCK)
        await wait_all_tasks_blocked()
        assert any("io_uring" in name for name in descriptors())
    assert (await disk.wait(ticket)).status == TASK_ABORTED
    assert not any("io_uring" in name for name in descriptors())
    os.close(receiver)
    os.close(sender)


async def test_a_failed_read_that_is_ignored_leaks_nothing(log: Log, fd: int) -> None:
    """The memory held another command's data; half of it is overwritten, and nobody says so."""

    class Careless(Storage):
        async def read(self, offset: int, iov: IoVec) -> None:
            try:
                await iov.read_from(fd, SIZE - 100)
            except OSError:
                iov.slice(0, 10).copy_from(b"x" * 10)

        def write(self, offset: int, iov: IoVec) -> None:
            self.store(offset, iov)

    async with simulated(Careless()) as disk:
        await disk.write(0, os.urandom(BLOCK))
        assert await disk.read(0, BLOCK) == b"x" * 10 + bytes(BLOCK - 10)


# How it is used.


async def test_what_is_never_awaited_is_reported(fd: int, content: bytes) -> None:
    with pytest.warns(RuntimeWarning, match=r"IoVec\.write_to was never awaited"):
        IoVec([b"lost"]).write_to(fd, 0)
        gc.collect()
    with pytest.warns(RuntimeWarning, match="fdatasync was never awaited"):
        tcmu_rs.fdatasync(fd)
        gc.collect()
    assert os.pread(fd, 4, 0) == content[:4]


async def test_a_transfer_is_awaited_once(fd: int) -> None:
    transfer = IoVec([b"once"]).write_to(fd, 0)
    await transfer
    with pytest.raises(RuntimeError, match="awaited once"):
        await transfer


async def test_an_answered_command_has_no_memory_to_transfer(fd: int) -> None:
    class Keeper(Storage):
        kept: IoVec

        async def read(self, offset: int, iov: IoVec) -> None:
            await iov.read_from(fd, 0)
            self.kept = iov

    handler = Keeper()
    async with simulated(handler) as disk:
        await disk.read(0, BLOCK)
        with pytest.raises(BufferError, match="the command was answered"):
            handler.kept.read_from(fd, 0)


async def test_each_run_has_a_queue_of_its_own_and_leaves_nothing(fd: int, content: bytes) -> None:
    found = []

    async def load() -> None:
        for _ in range(20):
            await tcmu_rs.fdatasync(fd)
            await IoVec([content[:4096]]).write_to(fd, 0, fua=True)
        found.append(os.pread(fd, 4096, 0))

    before = descriptors()
    threads = [threading.Thread(target=trio.run, args=(load,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        await trio.to_thread.run_sync(thread.join)
    assert found == [content[:4096]] * 3
    assert {name for name in descriptors() - before if "io_uring" in name} == set()


@uring
def test_an_interrupt_between_any_two_lines(fd: int) -> None:
    """A copy that was interrupted never ended: Ctrl-C came when completions were taken and not handed on yet."""
    lines = interrupted = 0

    async def load() -> None:
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(write_durably, fd)
            await write_durably(fd)
        # If it was not delivered to the main task yet.
        await trio.lowlevel.checkpoint()

    async def bounded() -> None:
        with trio.fail_after(10):
            await load()

    for stop_at in itertools.count(1):
        lines = 0

        def trace(frame: FrameType, event: str, _: object) -> Any:
            nonlocal lines
            if frame.f_code.co_filename == _files.__file__ and event == "line":
                lines += 1
                if lines == stop_at:  # noqa: B023
                    signal.raise_signal(signal.SIGINT)
            return trace

        sys.settrace(trace)
        try:
            trio.run(bounded)
        except BaseException as error:
            group = error.split(KeyboardInterrupt)[1] if isinstance(error, BaseExceptionGroup) else None
            assert isinstance(error, KeyboardInterrupt | BaseExceptionGroup), error
            assert group is None, group
            interrupted += 1
        finally:
            sys.settrace(None)
        assert not any("io_uring" in name for name in descriptors()), stop_at
        if lines < stop_at:
            break
    assert interrupted > 50


async def write_durably(fd: int) -> None:
    await IoVec([b"x" * 512]).write_to(fd, 0, fua=True)


def test_the_doctor_says_which_way_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    def check() -> Any:
        return next(check for check in examine() if check.name == "file I/O")

    monkeypatch.setenv(_files.VARIABLE, "off")
    assert not check().ok
    assert not check().needed
    assert check().remedy == f"unset {_files.VARIABLE}"
    monkeypatch.delenv(_files.VARIABLE)
    assert check().ok == (_files.obstacle() is None)
