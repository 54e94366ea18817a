"""A flush that is given up in the middle: what it was writing is seen through, and nothing else may come before."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import trio
import trio.testing

from tcmu_rs import IoVec
from tcmu_rs.handlers.qcow2 import Qcow2Handler, Storage, create
from tcmu_rs.handlers.qcow2.branching import Branching
from tcmu_rs.handlers.qcow2.cache import Cache
from tcmu_rs.handlers.qcow2.log import Log as Records
from tcmu_rs.handlers.qcow2.packing import Packer
from tcmu_rs.handlers.qcow2.pages import Pages
from tcmu_rs.testing import simulated

from .conftest import Log
from .disks import BLOCK, GOOD, SYNCHRONIZE_CACHE, TASK_ABORTED, write16
from .qcow2 import check
from .test_files import pipe, uring

MIB = 1 << 20


class Interrupted(Storage):
    """Its next record waits for a pipe, and gets there only when it is written again."""

    receiver = -1
    waits = False

    async def commit(self, offset: int, data: bytes, *, everything: bool) -> None:
        if self.waits:
            self.waits = False
            await IoVec([bytearray(1)]).read_from(self.receiver, 0)
        await super().commit(offset, data, everything=everything)

    async def sync(self) -> None:
        if self.waits:
            self.waits = False
            await IoVec([bytearray(1)]).read_from(self.receiver, 0)
        await super().sync()


@pytest.fixture
def receiver() -> Iterator[int]:
    ends = pipe()
    yield ends[0]
    for end in ends:
        os.close(end)


class Disk:
    """An image, and the storage that it is in."""

    def __init__(self, path: Path, receiver: int, *, compress: bool) -> None:
        create(path, MIB, cluster_size=8192)
        self.path = path
        self.receiver = receiver
        self.handler = Qcow2Handler(path, compress=compress, idle=None, storage=self.open)

    def open(self, path: Path, *, writable: bool) -> Storage:
        self.storage = Interrupted(path, writable=writable)
        self.storage.receiver = self.receiver
        return self.storage

    async def left(self) -> bytes:
        """What is found if the server ends now."""
        copy = self.path.with_suffix(".copy")
        shutil.copy(self.path, copy)
        found = bytearray(3 * BLOCK)
        async with Qcow2Handler(copy, idle=None) as disk:
            await disk.read(0, IoVec([found]))
        check(copy)
        return bytes(found)


@uring
async def test_the_record_of_an_aborted_flush_is_whole(tmp_path: Path, receiver: int) -> None:
    image = Disk(tmp_path / "image", receiver, compress=True)
    async with simulated(image.handler) as disk:
        await disk.write(0, b"a" * BLOCK)
        await disk.flush()
        await disk.write(BLOCK, b"b" * BLOCK)
        image.storage.waits = True
        aborted = disk.submit(SYNCHRONIZE_CACHE)
        await trio.testing.wait_all_tasks_blocked()
        disk.abort(aborted)
        assert (await disk.wait(aborted)).status == TASK_ABORTED
        assert await image.left() == b"a" * BLOCK + b"b" * BLOCK + bytes(BLOCK)
        assert (await disk.wait(disk.submit(write16(2), data_out=b"c" * BLOCK))).status == GOOD
        assert (await disk.wait(disk.submit(SYNCHRONIZE_CACHE))).status == GOOD
        assert await image.left() == b"a" * BLOCK + b"b" * BLOCK + b"c" * BLOCK
    check(image.path)


@uring
@pytest.mark.parametrize("compress", [True, False])
async def test_a_cancelled_flush_is_seen_through(tmp_path: Path, receiver: int, compress: bool) -> None:
    image = Disk(tmp_path / "image", receiver, compress=compress)
    async with image.handler as disk:
        await disk.write(0, IoVec([b"a" * BLOCK]))
        await disk.flush()
        for number in range(1, 3):
            await disk.write(number * BLOCK, IoVec([b"bc"[number - 1 : number] * BLOCK]))
            image.storage.waits = True
            async with trio.open_nursery() as nursery:
                nursery.start_soon(disk.flush)
                await trio.testing.wait_all_tasks_blocked()
                # Another one, that has to wait for it, and then has nothing to do.
                nursery.start_soon(disk.flush)
                await trio.testing.wait_all_tasks_blocked()
                nursery.cancel_scope.cancel()
            assert not image.storage.waits
            await disk.flush()
            expected = b"a" * BLOCK + b"b" * BLOCK + (b"c" * BLOCK if number == 2 else bytes(BLOCK))
            assert await image.left() == expected
    check(image.path)


@pytest.mark.parametrize("part", [(Records, "encode"), (Pages, "take_changes"), (Cache, "take_pieces")])
@pytest.mark.parametrize("clusters", [1, 60], ids=["at once", "in a thread"])
async def test_a_record_that_cannot_be_made_is_not_left_out(
    tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch, clusters: int, part: tuple[type, str]
) -> None:
    """What was taken for it would be in no record: the next flush must not say that all is durable."""
    path = tmp_path / "image"
    create(path, MIB, cluster_size=8192)
    disk = Qcow2Handler(path, compress=True, idle=None)
    await disk.open()
    await disk.write(0, IoVec([b"a" * BLOCK]))
    await disk.flush()
    for number in range(clusters):
        await disk.write(number * 8192, IoVec([b"b" * BLOCK]))
    with monkeypatch.context() as patch:
        patch.setattr(*part, no_memory)
        with pytest.raises(MemoryError):
            await disk.flush()
    for change in (disk.flush, disk.aclose):
        with pytest.raises(OSError, match="an earlier flush failed"):
            await change()
    async with Qcow2Handler(path, idle=None) as disk:
        found = bytearray(BLOCK)
        await disk.read(0, IoVec([found]))
        assert found == b"a" * BLOCK
    check(path)
    log.records.clear()


def no_memory(*_: object, **__: object) -> bytes:
    raise MemoryError


async def test_an_error_that_is_over_is_not_told(tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that was full, and is not any more when somebody has to wait for room in the cache."""
    path = tmp_path / "image"
    create(path, MIB, cluster_size=8192)

    async def write(disk: Qcow2Handler, clusters: range) -> None:
        for number in clusters:
            await disk.write(number * 8192, IoVec([bytes([number]) * 8192]))

    async with Qcow2Handler(path, compress=True, cache_size=64 << 10, idle=None) as disk:
        with monkeypatch.context() as patch:
            patch.setattr(Packer, "write_out", no_space)
            await write(disk, range(5))
            await until(lambda: bool(log.records))
        await write(disk, range(5, 6))
        await until(lambda: disk.statistics()["destaged"] > 0)
        await write(disk, range(6, 60))
        await disk.flush()
        log.expect("what is dirty cannot be written back: [Errno 28] No space left on device")
        log.records.clear()
        found = bytearray(8192)
        for number in range(60):
            await disk.read(number * 8192, IoVec([found]))
            assert found == bytes([number]) * 8192
    check(path)


async def test_an_idle_disk_tries_again_to_write_back(
    tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was left as it was until somebody wrote again."""
    path = tmp_path / "image"
    create(path, MIB, cluster_size=8192)
    async with Qcow2Handler(path, compress=True, idle=0.01) as disk:
        with monkeypatch.context() as patch:
            patch.setattr(Packer, "write_out", no_space)
            await disk.write(0, IoVec([b"a" * BLOCK]))
            await until(lambda: bool(log.records))
        await until(lambda: not disk.statistics()["dirty_bytes"])
        log.expect("what is dirty cannot be written back: [Errno 28] No space left on device")
        log.records.clear()
    check(path)


async def test_what_comes_while_clusters_are_made_durable_has_room_in_the_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was written while a flush waited for an fdatasync was in its record, too: up to a whole half of the log. The
    next record of images had no room for that beside the tables, the disk was dead, and could not be opened again.
    """
    path = tmp_path / "image"
    create(path, 16 * MIB, cluster_size=8192)
    go_on = trio.Event()
    sync = Storage.sync

    async def slow(storage: Storage) -> None:
        await go_on.wait()
        await sync(storage)

    async with Qcow2Handler(path, idle=None, log_size=MIB) as disk:
        await disk.write(0, IoVec([b"a" * 8192]))
        writer = disk._writer
        assert writer is not None and writer._session is not None
        await writer._destaging.destage()
        monkeypatch.setattr(Storage, "sync", slow)
        written = 0

        async def write() -> None:
            nonlocal written
            for number in range(1, 100):
                await disk.write(number * 8192, IoVec([bytes([number]) * 8192]))
                written = number

        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.flush)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(write)
            await trio.testing.wait_all_tasks_blocked()
            before, unlogged = written, writer._cache.unlogged
            go_on.set()
        assert before > 10 and unlogged <= writer._session.log.half_size * 3 // 8
        assert written == 99
        await disk.flush()
        found = bytearray(8192)
        for number in range(1, 100):
            await disk.read(number * 8192, IoVec([found]))
            assert found == bytes([number]) * 8192
    check(path)


async def test_a_flush_waits_for_nobody_who_is_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Others wrote as fast as it wrote back, to have less for the log. While it made room for the last resort, to do it
    alone, everything was written back in the background. Then it waited for those who had done it, for ever.
    """
    path = tmp_path / "image"
    create(path, MIB, cluster_size=8192)
    async with Qcow2Handler(path, compress=True, idle=None, log_size=256 << 10) as disk:
        for number in range(20):
            await disk.write(number * 8192, IoVec([bytes([number]) * 8192]))
        writer = disk._writer
        assert writer is not None
        destaging, recorder = writer._destaging, writer._recorder
        destage, afford = destaging.destage, recorder.afford

        async def as_if_others_wrote(*, locked: bool) -> None:
            """There is as much as before."""

        async def in_the_background(worst: int, *, locked: bool = False) -> None:
            recorder.afford = afford  # type: ignore[method-assign]
            await destage()

        done = trio.Event()

        async def flush() -> None:
            await disk.flush()
            done.set()

        with monkeypatch.context() as patch:
            patch.setattr(destaging, "destage", as_if_others_wrote)
            patch.setattr(recorder, "afford", in_the_background)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(flush)
                with trio.move_on_after(5):
                    await done.wait()
                in_time = done.is_set()
                writer._room.unpark_all()
        assert in_time
        assert not disk.statistics()["dirty_bytes"]
    check(path)


async def test_a_checkpoint_that_fails_is_no_success(tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last part goes on behind, and a snapshot was said to be there when that had failed."""
    path = tmp_path / "image"
    create(path, MIB, cluster_size=8192)
    disk = Qcow2Handler(path, compress=True, idle=None)
    await disk.open()
    await disk.write(0, IoVec([b"a" * BLOCK]))
    writer = disk._writer
    assert writer is not None
    with monkeypatch.context() as patch:

        def change(branching: Branching) -> None:
            branching.create_snapshot("before")
            patch.setattr(Records, "write_state", no_space)

        with pytest.raises(OSError, match="No space left on device"):
            await writer.branch(change)
    with pytest.raises(OSError, match="an earlier flush failed"):
        await disk.aclose()
    log.expect("nothing is written any more")


@pytest.mark.parametrize("fails", [False, True])
async def test_a_checkpoint_under_way_keeps_the_file_open(
    tmp_path: Path, log: Log, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """Nothing was dirty any more, so nobody waited for it: it wrote to a descriptor that was closed, or another's."""
    path = tmp_path / "image"
    create(path, MIB, cluster_size=8192)
    go_on = threading.Event()
    write_state = Records.write_state

    def slow(records: Records, seq: int) -> None:
        assert go_on.wait(60)
        if fails:
            no_space()
        write_state(records, seq)

    monkeypatch.setattr(Records, "write_state", slow)
    disk = Qcow2Handler(path, compress=True, idle=None)
    await disk.open()
    await disk.write(0, IoVec([b"a" * BLOCK]))
    writer = disk._writer
    assert writer is not None
    storage = writer._storage
    await writer._destaging.destage()
    await disk.flush()
    async with writer._recorder.turn:
        await writer._recorder.checkpoint()
    assert not (writer._cache or writer._image.pages.dirty or writer._recorder.pending())
    closed: list[Exception | None] = []

    async def close() -> None:
        try:
            await disk.aclose()
        except OSError as error:
            closed.append(error)
        else:
            closed.append(None)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(close)
        for _ in range(10):
            await trio.sleep(0.01)
        assert not closed
        assert os.fstat(storage.fileno()).st_size
        go_on.set()
    if fails:
        assert isinstance(closed[0], OSError)
        log.expect("nothing is written any more")
        log.records.clear()
    else:
        assert closed == [None]
        check(path)
    monkeypatch.undo()
    async with Qcow2Handler(path) as disk:
        found = bytearray(BLOCK)
        await disk.read(0, IoVec([found]))
        assert found == b"a" * BLOCK
    check(path)


def no_space(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


async def until(condition: Callable[[], bool]) -> None:
    with trio.fail_after(20):
        while not condition():  # noqa: ASYNC110 - what it waits for tells nobody
            await trio.sleep(0.01)
