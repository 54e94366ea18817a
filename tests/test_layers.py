"""A handler on a handler: one way to call it, whatever its colours."""

from __future__ import annotations

import threading
from typing import Any

import pytest

import tcmu_rs
from tcmu_rs import BlockHandler, IoVec, Lower, blocking
from tcmu_rs.handlers.ram import RamHandler

SIZE = 1 << 16


class Recording(BlockHandler):
    """Tells what was called, and in which thread."""

    size = SIZE

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.threads: set[int] = set()

    def note(self, *call: Any) -> None:
        self.calls.append(call)
        self.threads.add(threading.get_ident())

    async def aclose(self) -> None:
        self.calls.append(("close",))


class Async(Recording):
    native_fua = True

    async def read(self, offset: int, iov: IoVec) -> None:
        iov.copy_from(b"a" * iov.nbytes)
        self.note("read", offset)

    async def write(self, offset: int, iov: IoVec, *, fua: bool = False) -> None:
        self.note("write", offset, bytes(iov), fua)

    async def flush(self) -> None:
        self.note("flush")

    async def discard(self, offset: int, length: int) -> None:
        self.note("discard", offset, length)


class Plain(Recording):
    def read(self, offset: int, iov: IoVec) -> None:
        iov.copy_from(b"a" * iov.nbytes)
        self.note("read", offset)

    def write(self, offset: int, iov: IoVec) -> None:
        self.note("write", offset, bytes(iov))

    def flush(self) -> None:
        self.note("flush")

    def discard(self, offset: int, length: int) -> None:
        self.note("discard", offset, length)


class Blocking(Recording):
    @blocking
    def read(self, offset: int, iov: IoVec) -> None:
        iov.copy_from(b"a" * iov.nbytes)
        self.note("read", offset)

    @blocking
    def write(self, offset: int, iov: IoVec) -> None:
        self.note("write", offset, bytes(iov))

    @blocking
    def flush(self) -> None:
        self.note("flush")

    @blocking
    def discard(self, offset: int, length: int) -> None:
        self.note("discard", offset, length)


@pytest.mark.parametrize("kind", [Async, Plain, Blocking])
async def test_every_colour_is_awaited(kind: type[Async | Plain | Blocking]) -> None:
    handler = kind()
    lower = Lower(handler)
    await lower.open()
    buffer = bytearray(512)
    await lower.read(512, IoVec([buffer]))
    assert buffer == b"a" * 512
    await lower.write(0, IoVec([b"x" * 512]))
    await lower.write(0, IoVec([b"y" * 512]), fua=True)
    await lower.flush()
    await lower.discard(0, 512)
    await lower.aclose()
    writes: list[tuple[Any, ...]]
    if kind is Async:
        writes = [("write", 0, b"x" * 512, False), ("write", 0, b"y" * 512, True)]
    else:
        writes = [("write", 0, b"x" * 512), ("write", 0, b"y" * 512), ("flush",)]
    assert handler.calls == [("read", 512), *writes, ("flush",), ("discard", 0, 512), ("close",)]
    assert (threading.get_ident() in handler.threads) is (kind is not Blocking)


async def test_what_the_handler_can_is_known() -> None:
    lower = Lower(RamHandler(SIZE, block_size=4096))
    await lower.open()
    assert (lower.size, lower.block_size, lower.physical_block_size, lower.max_in_flight) == (SIZE, 4096, 4096, 1)
    assert lower.writable and lower.can_discard and lower.can_write_zeroes and lower.discard_zeroes
    assert lower.fills_reads and not lower.has_cache
    await lower.flush()
    await lower.write(0, IoVec([b"x" * 4096]), fua=True)
    await lower.aclose()
    lower = Lower(RamHandler(SIZE, read_only=True))
    await lower.open()
    assert not (lower.writable or lower.can_discard or lower.can_write_zeroes)
    await lower.aclose()


async def test_what_the_handler_lacks_is_said() -> None:
    class ReadOnly(BlockHandler):
        size = SIZE

        def read(self, offset: int, iov: IoVec) -> None:
            iov.zero()

    lower = Lower(ReadOnly())
    await lower.open()
    with pytest.raises(NotImplementedError, match="ReadOnly cannot write"):
        await lower.write(0, IoVec([b"x" * 512]))


async def test_a_handler_that_does_not_open_is_closed() -> None:
    class Broken(Plain):
        async def open(self) -> None:
            raise OSError("as told")

    handler = Broken()
    with pytest.raises(OSError, match="as told"):
        await Lower(handler).open()
    assert handler.calls == [("close",)]

    sizeless = Plain()
    sizeless.size = 100
    with pytest.raises(ValueError, match="positive multiple of the block size"):
        await Lower(sizeless).open()
    assert sizeless.calls == [("close",)]


async def test_nothing_but_a_block_handler_can_be_sat_on() -> None:
    with pytest.raises(TypeError, match="nothing can sit on it"):
        await Lower(tcmu_rs.Handler()).open()  # type: ignore[arg-type]


async def test_a_plain_method_that_returns_an_awaitable_is_an_error() -> None:
    class Wrapped(BlockHandler):
        size = SIZE

        def read(self, offset: int, iov: IoVec) -> Any:
            return Async().read(offset, iov)

    lower = Lower(Wrapped())
    await lower.open()
    with pytest.raises(TypeError, match="write `async def`"), pytest.warns(RuntimeWarning, match="never awaited"):
        await lower.read(0, IoVec([bytearray(512)]))
