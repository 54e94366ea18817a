"""Images whose data is in a file of its own: written by us and by QEMU in turn, and read as raw."""

from __future__ import annotations

import errno
import random
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import trio

from tcmu_rs import BlockHandler, IoVec, Options
from tcmu_rs.handlers.qcow2 import Qcow2Error, Qcow2Handler, Storage, ZstdHandler
from tcmu_rs.handlers.qcow2.payload import Payload
from tcmu_rs.testing import check_block_handler
from tcmu_rs.testing.crash import Image, LostWrite, Medium, check_power_cuts

from . import qcow2
from .conftest import Log
from .test_qcow2 import check, contents, qemu, random_writes, raw, work

MIB = 1 << 20
SIZE = 256 << 10

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-utils is not installed")


def make(path: Path, *options: str, size: int = 4 * MIB, below: Sequence[object] = ()) -> Path:
    data = path.with_suffix(".data")
    text = ",".join([f"data_file={data}", *options])
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", text, *below, path, size)
    return data


@pytest.mark.parametrize(
    "options",
    [
        ("cluster_size=4k",),
        ("cluster_size=64k", "extended_l2=on"),
        ("cluster_size=64k", "data_file_raw=on"),
        ("cluster_size=16k", "extended_l2=on", "data_file_raw=on"),
        ("cluster_size=4k", "data_file_raw=on"),
    ],
    ids=" ".join,
)
async def test_both_write(tmp_path: Path, options: tuple[str, ...]) -> None:
    rng = random.Random(str(options))
    path = tmp_path / "disk.qcow2"
    data = make(path, *options)
    model = bytearray(4 * MIB)
    for _ in range(3):
        await work(path, rng, model, 50)
        check(path)
        assert raw(path) == model
        random_writes(path, rng, 4 * MIB, 4096)
        model[:] = raw(path)
        if "data_file_raw=on" in options:
            assert data.read_bytes() == model
            found = qemu("qemu-img", "info", path)
            assert "data file raw: true" in found


@pytest.mark.parametrize("options", [(), ("data_file_raw=on",)])
async def test_obligations(tmp_path: Path, options: tuple[str, ...]) -> None:
    path = tmp_path / "disk.qcow2"
    make(path, *options)
    await check_block_handler(lambda: Qcow2Handler(path), persistent=True)
    check(path)


async def test_over_a_backing_file(tmp_path: Path) -> None:
    rng = random.Random(7)
    base, path = tmp_path / "base", tmp_path / "disk.qcow2"
    base.write_bytes(rng.randbytes(2 * MIB))
    make(path, "cluster_size=4k", below=["-b", "base", "-F", "raw"])
    model = bytearray(base.read_bytes()).ljust(4 * MIB, b"\0")
    for _ in range(2):
        await work(path, rng, model, 40)
        check(path)
        assert raw(path) == model


async def test_discarded_space_is_given_back(tmp_path: Path) -> None:
    for options in ((), ("data_file_raw=on",)):
        path = tmp_path / f"disk{len(options)}.qcow2"
        data = make(path, *options, size=16 * MIB)
        async with Qcow2Handler(path) as disk:
            await disk.write(0, IoVec([random.Random(1).randbytes(8 * MIB)]))
            await disk.flush()
            assert data.stat().st_blocks * 512 >= 8 * MIB
            await disk.discard(0, 8 * MIB)
            await disk.flush()
            assert data.stat().st_blocks * 512 < MIB
        assert raw(path) == bytes(16 * MIB)


async def test_what_a_data_file_cannot_have(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    data = make(path, "data_file_raw=on")
    with pytest.raises(Qcow2Error, match="no compressed clusters: use qcow2:PATH"):
        async with Qcow2Handler(path, compress=True):
            pass
    async with ZstdHandler(path, read_only=True):
        pass
    with pytest.raises(Qcow2Error, match="can have no snapshots"):
        await Qcow2Handler.snapshot(str(path), Options(), action="create", name="x")
    with pytest.raises(Qcow2Error, match="data file"):
        await Qcow2Handler.compact(str(path), Options())
    for size in (8 * MIB, 2 * MIB):
        await Qcow2Handler.resize(str(path), Options(), size=size, shrink=True)
        check(path)
        assert raw(path) == data.read_bytes() == bytes(size)


class Watched(Storage):
    """Tells what happens to which file, in order."""

    events: list[tuple[str, str]]

    def pwrite(self, offset: int, views: Sequence[Any]) -> None:
        super().pwrite(offset, views)
        self.events.append((self.path.suffix, "write"))

    def fdatasync(self) -> None:
        super().fdatasync()
        self.events.append((self.path.suffix, "sync"))

    async def sync(self) -> None:
        self.fdatasync()

    async def commit(self, offset: int, data: bytes, *, everything: bool) -> None:
        self.pwrite(offset, [data])
        self.fdatasync()


async def test_data_is_durable_before_the_record_that_names_it(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    make(path, "cluster_size=4k")
    events: list[tuple[str, str]] = []

    def opener(path: Path, *, writable: bool) -> Storage:
        storage = Watched(path, writable=writable)
        storage.events = events
        return storage

    rng = random.Random(3)
    synced = 0
    async with Qcow2Handler(path, storage=opener, idle=None, cache_size=16 << 10) as disk:
        for _ in range(30):
            for _ in range(rng.randrange(1, 30)):
                await disk.write(rng.randrange(1000) * 4096, IoVec([rng.randbytes(4096)]))
            assert disk._writer is not None
            await disk._writer._destaging.destage()
            events.clear()
            await disk.write(rng.randrange(1000) * 4096, IoVec([rng.randbytes(4096)]))
            await disk.flush()
            # The image's file is written after that of the data is durable, and then made durable itself.
            if (".qcow2", "write") in events:
                first = events.index((".qcow2", "write"))
                assert (".data", "sync") in events[:first]
                assert (".data", "write") not in events[events.index((".data", "sync")) : first]
                synced += 1
            assert events[-1][1] == "sync"
    assert synced
    check(path)


async def test_a_slow_write_of_old_data_never_lands_on_new_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There is one place for each cluster, so what is on its way there has to arrive before anything newer goes."""
    path = tmp_path / "disk.qcow2"
    make(path, "cluster_size=4k")
    first, arrived = threading.Event(), threading.Event()
    write_buffers = Payload.write_buffers
    calls = 0

    def slow(self: Payload, offset: int, buffers: Sequence[bytes]) -> None:
        nonlocal calls
        calls += 1
        if calls == 1:
            arrived.set()
            first.wait(1)
        write_buffers(self, offset, buffers)

    monkeypatch.setattr(Payload, "write_buffers", slow)

    async with Qcow2Handler(path, idle=None) as disk:
        await disk.write(8192, IoVec([b"old!" * 1024]))
        writer = disk._writer
        assert writer is not None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(writer._destaging.destage)
            await trio.to_thread.run_sync(arrived.wait)
            await disk.discard(8192, 4096)
            await disk.write(8192, IoVec([b"new!" * 1024]))
            nursery.start_soon(writer._destaging.destage)
            await trio.sleep(0.01)
            first.set()
        await writer._destaging.destage()
        await disk.flush()
    assert (await contents(path))[8192:12288] == b"new!" * 1024


async def test_no_space_for_data_is_known_before_a_write_is_taken(tmp_path: Path, log: Log) -> None:
    path = tmp_path / "disk.qcow2"
    make(path, "cluster_size=4k")

    class Full(Storage):
        def allocate(self, offset: int, length: int) -> bool:
            if self.path.suffix == ".data" and offset >= MIB:
                raise OSError(errno.ENOSPC, "no space")
            return super().allocate(offset, length)

    async with Qcow2Handler(path, storage=Full, idle=None) as disk:
        await disk.write(0, IoVec([b"here" * 1024]))
        with pytest.raises(OSError, match="no space"):
            await disk.write(2 * MIB, IoVec([b"more" * 1024]))
        await disk.flush()
    check(path)
    assert raw(path)[:4096] == b"here" * 1024


class InPart(qcow2.RecordedStorage):
    """A file that is a part of a medium, behind the data."""

    base = SIZE

    @property
    def size(self) -> int:
        return max(0, self.medium.size - self.base)

    def preadv(self, offset: int, views: Sequence[Any], *, wait: bool = True) -> int:
        return super().preadv(self.base + offset, views, wait=wait)

    def pread(self, offset: int, length: int, *, wait: bool = True) -> bytes:
        return super().pread(self.base + offset, length, wait=wait)

    def pwrite(self, offset: int, views: Sequence[Any]) -> None:
        super().pwrite(self.base + offset, views)

    def sync_range(self, offset: int, length: int) -> None:
        super().sync_range(self.base + offset, length)

    def truncate(self, size: int) -> None:
        self.medium.truncate(self.base + size)

    def punch(self, offset: int, length: int) -> bool:
        return super().punch(self.base + offset, length)


class DataPart(InPart):
    """The data: what is written arrives now, or only when this file is synced; syncing the other one does nothing."""

    base = 0

    def __init__(self, medium: Medium, path: Path, rng: random.Random) -> None:
        super().__init__(medium, path)
        self._rng = rng
        self._late: list[tuple[int, bytes]] = []
        self._turn = threading.Lock()

    @property
    def size(self) -> int:
        return SIZE

    def preadv(self, offset: int, views: Sequence[Any], *, wait: bool = True) -> int:
        with self._turn:
            done = 0
            for view in views:
                with memoryview(view).cast("B") as target:
                    target[:] = self._now(offset + done, len(target))
                    done += len(target)
            return done

    def _now(self, offset: int, length: int) -> bytes:
        found = bytearray(self.medium.pread(length, offset))
        for at, data in self._late:
            start, stop = max(at, offset), min(at + len(data), offset + length)
            if start < stop:
                found[start - offset : stop - offset] = data[start - at : stop - at]
        return bytes(found)

    def pwrite(self, offset: int, views: Sequence[Any]) -> None:
        with self._turn:
            self._late.append((offset, b"".join(bytes(view) for view in views)))
            if self._rng.random() < 0.3:
                self._arrive()

    def punch(self, offset: int, length: int) -> bool:
        self.pwrite(offset, [bytes(length)])
        return True

    def truncate(self, size: int) -> None:
        assert size == SIZE

    def _arrive(self) -> None:
        for offset, data in self._late:
            self.medium.pwrite(data, offset)
        self._late.clear()

    def fdatasync(self) -> None:
        with self._turn:
            self._arrive()
        self.medium.fdatasync()


@pytest.mark.parametrize("raw_file", [False, True])
async def test_power_cuts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raw_file: bool) -> None:
    path = tmp_path / "image"
    options = "data_file=data,cluster_size=4k" + (",data_file_raw=on" if raw_file else "")
    monkeypatch.chdir(tmp_path)
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, path, SIZE)
    image = Image(SIZE)
    image.write(SIZE, path.read_bytes())
    rng = random.Random(5)

    @contextmanager
    def serve(medium: Medium) -> Iterator[BlockHandler]:
        with TemporaryDirectory() as directory:
            (Path(directory) / "image").touch()

            def storage(name: Path, *, writable: bool) -> Storage:
                return InPart(medium, name) if name.name == "image" else DataPart(medium, name, rng)

            sizes: dict[str, Any] = {"log_size": 192 << 10, "cache_size": 64 << 10}
            yield Qcow2Handler(Path(directory) / "image", storage=storage, idle=0.002, **sizes)

    def judge(image: Image) -> None:
        with TemporaryDirectory() as directory:
            (Path(directory) / "data").write_bytes(image.read(0, SIZE))
            # QEMU takes a relative name of a data file as one in its own directory.
            monkeypatch.chdir(directory)
            closed = Path(directory, "image")
            closed.write_bytes(image.read(SIZE, image.size - SIZE))
            check(closed)
            if raw_file:
                assert raw(closed) == image.read(0, SIZE)
            monkeypatch.chdir(tmp_path)

    await check_power_cuts(serve, image, lives=3, cuts=8, operations=70, spared={SIZE // 512}, judge=judge)


async def test_power_cuts_find_a_sync_that_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DataPart, "fdatasync", lambda self: None)
    with pytest.raises(LostWrite):
        await test_power_cuts(tmp_path, monkeypatch, False)
