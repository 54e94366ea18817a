"""How the methods of a handler are called: three colours, and what they must not return."""

from __future__ import annotations

import functools
import threading
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio

import tcmu_rs
from tcmu_rs import IoVec
from tcmu_rs.testing import simulated

from .disks import BLOCK, GOOD, AsyncDisk, BlockingDisk, PlainDisk, Storage, read16, write16
from .test_runtime import leaves


@pytest.mark.parametrize("disk_class", [PlainDisk, AsyncDisk, BlockingDisk])
async def test_every_colour_serves(disk_class: type[Storage]) -> None:
    async with simulated(disk_class()) as disk:
        await disk.write(BLOCK, b"ab" * BLOCK)
        assert await disk.read(0, 4 * BLOCK) == bytes(BLOCK) + b"ab" * BLOCK + bytes(BLOCK)


async def test_where_each_colour_runs() -> None:
    where: dict[str, threading.Thread] = {}

    class Disk(Storage):
        async def read(self, offset: int, iov: IoVec) -> None:
            where["async"] = threading.current_thread()
            self.load(offset, iov)

        @tcmu_rs.blocking
        def write(self, offset: int, iov: IoVec) -> None:
            where["blocking"] = threading.current_thread()

        def flush(self) -> None:
            where["plain"] = threading.current_thread()

    async with simulated(Disk()) as disk:
        await disk.read(0, BLOCK)
        await disk.write(0, bytes(BLOCK))
        await disk.flush()
    assert where["async"] is where["plain"] is threading.current_thread()
    assert where["blocking"] is not threading.current_thread()


def test_blocking_is_for_plain_functions() -> None:
    async def read(self: object, offset: int, iov: IoVec) -> None: ...

    with pytest.raises(TypeError, match=r"read is async already: @blocking is for plain functions"):
        tcmu_rs.blocking(read)


def visible(method: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(method)
    async def wrapper(*args: Any) -> None:
        await method(*args)

    return wrapper


def hidden(method: Callable[..., Awaitable[None]]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(*args: Any) -> Any:
        return method(*args)

    return wrapper


class CallableObject:
    def __init__(self, disk: Storage) -> None:
        self.disk = disk

    async def __call__(self, offset: int, iov: IoVec) -> None:
        await trio.lowlevel.checkpoint()
        self.disk.load(offset, iov)


async def load_of(disk: Storage, offset: int, iov: IoVec) -> None:
    await trio.lowlevel.checkpoint()
    disk.load(offset, iov)


class WrappedDisk(Storage):
    @visible
    async def read(self, offset: int, iov: IoVec) -> None:
        await trio.lowlevel.checkpoint()
        self.load(offset, iov)


class PartialMethodDisk(Storage):
    async def _read(self, kind: str, offset: int, iov: IoVec) -> None:
        await trio.lowlevel.checkpoint()
        self.load(offset, iov)

    read = functools.partialmethod(_read, "kind")


class PartialDisk(Storage):
    def __init__(self) -> None:
        super().__init__()
        self.read = functools.partial(functools.partial(load_of), self)


class CallableDisk(Storage):
    def __init__(self) -> None:
        super().__init__()
        self.read = CallableObject(self)


class AsyncAroundBlockingDisk(Storage):
    """`functools.wraps` copies the mark of the function inside, and the wrapper was sent to a thread."""

    @tcmu_rs.blocking
    def _read(self, offset: int, iov: IoVec) -> None:
        self.load(offset, iov)

    @functools.wraps(_read)
    async def read(self, offset: int, iov: IoVec) -> None:
        await trio.to_thread.run_sync(self._read, offset, iov)


@pytest.mark.parametrize(
    "disk_class", [WrappedDisk, PartialMethodDisk, PartialDisk, CallableDisk, AsyncAroundBlockingDisk]
)
async def test_async_is_seen_through_wrappers(disk_class: Callable[[], Storage]) -> None:
    async with simulated(disk_class()) as disk:
        assert await disk.read(0, BLOCK) == bytes(BLOCK)


class HiddenDisk(Storage):
    @hidden
    async def read(self, offset: int, iov: IoVec) -> None:
        self.load(offset, iov)


class CountingPlainDisk(Storage):
    def read(self, offset: int, iov: IoVec) -> int:
        self.load(offset, iov)
        return iov.nbytes


class CountingAsyncDisk(Storage):
    async def read(self, offset: int, iov: IoVec) -> int:
        self.load(offset, iov)
        return iov.nbytes


class CountingSuspendingDisk(Storage):
    async def read(self, offset: int, iov: IoVec) -> int:
        await trio.lowlevel.checkpoint()
        self.load(offset, iov)
        return iov.nbytes


class CountingBlockingDisk(Storage):
    @tcmu_rs.blocking
    def read(self, offset: int, iov: IoVec) -> int:
        self.load(offset, iov)
        return iov.nbytes


class ArgumentlessDisk(Storage):
    async def read(self) -> None: ...


@pytest.mark.parametrize(
    ("disk_class", "message"),
    [
        (HiddenDisk, "HiddenDisk.read() is a plain function that returned an awaitable: write `async def`"),
        (CountingPlainDisk, "CountingPlainDisk.read() returned 512: transfers are whole, return None"),
        (CountingAsyncDisk, "CountingAsyncDisk.read() returned 512: transfers are whole, return None"),
        (CountingSuspendingDisk, "CountingSuspendingDisk.read() returned 512: transfers are whole, return None"),
        (CountingBlockingDisk, "CountingBlockingDisk.read() returned 512: transfers are whole, return None"),
        (ArgumentlessDisk, "ArgumentlessDisk.read() takes 1 positional argument but 3 were given"),
    ],
)
async def test_a_method_of_the_wrong_shape_is_named(disk_class: Callable[[], Storage], message: str, log: Any) -> None:
    with pytest.raises(ExceptionGroup) as caught:
        async with simulated(disk_class()) as disk:
            await disk.scsi(read16(0), data_in=BLOCK)
            await trio.sleep_forever()
    (error,) = leaves(caught.value)
    assert type(error) is TypeError
    assert str(error) == message
    log.expect(message)


async def test_threads_are_as_many_as_may_run() -> None:
    barrier = threading.Barrier(3, timeout=60)

    class Disk(Storage):
        max_in_flight = 3
        running = most = 0

        @tcmu_rs.blocking
        def read(self, offset: int, iov: IoVec) -> None:
            # Three have to meet here, and no fourth is among them.
            barrier.wait()
            self.load(offset, iov)

    async with simulated(Disk()) as disk, trio.open_nursery() as nursery:
        for block in range(9):
            nursery.start_soon(disk.read, block * BLOCK, BLOCK)
    assert not barrier.broken


class FuaPlainDisk(PlainDisk):
    native_fua = True
    seen: bool | None = None

    def write(self, offset: int, iov: IoVec, *, fua: bool = False) -> None:
        self.seen = fua

    def flush(self) -> None: ...


class FuaAsyncDisk(FuaPlainDisk):
    async def write(self, offset: int, iov: IoVec, *, fua: bool = False) -> None:  # type: ignore[override]
        await trio.lowlevel.checkpoint()
        self.seen = fua


class FuaBlockingDisk(FuaPlainDisk):
    @tcmu_rs.blocking
    def write(self, offset: int, iov: IoVec, *, fua: bool = False) -> None:
        self.seen = fua


@pytest.mark.parametrize("disk_class", [FuaPlainDisk, FuaAsyncDisk, FuaBlockingDisk])
async def test_native_fua_is_a_keyword_of_write(disk_class: type[FuaPlainDisk]) -> None:
    handler = disk_class()
    async with simulated(handler) as disk:
        for fua in (True, False):
            assert (await disk.scsi(write16(0, fua=fua), bytes(BLOCK))).status == GOOD
            assert handler.seen is fua


async def test_fua_without_a_keyword_is_a_flush_before_a_read_and_after_a_write() -> None:
    calls = []

    class Disk(Storage):
        async def read(self, offset: int, iov: IoVec) -> None:
            calls.append("read")
            self.load(offset, iov)

        async def write(self, offset: int, iov: IoVec) -> None:
            calls.append("write")

        @tcmu_rs.blocking
        def flush(self) -> None:
            calls.append("flush")

    async with simulated(Disk()) as disk:
        await disk.scsi(write16(0, fua=True), bytes(BLOCK))
        await disk.scsi(read16(0, fua=True), data_in=BLOCK)
    assert calls == ["write", "flush", "flush", "read"]
