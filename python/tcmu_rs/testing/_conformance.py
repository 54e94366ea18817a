"""The conformance kit: every obligation of a block handler, checked against a handler."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from enum import Enum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from .. import _errors
from .._handler import Colour, ExtentState, check, colour_of, has
from .._native import IoVec
from .._service import naa_of, unit_for
from ._simulated import SimulatedDisk, simulated

if TYPE_CHECKING:
    from .._handler import BlockHandler

_RUBBISH = 0x5A
"""Fills memory before it is read into."""
_MARGIN = 128 << 10
"""Bytes on each side of a change that must not change: more than handlers like to write at once."""

_GROWTH = 1 << 20
"""Bytes that a disk grows by: whole blocks and sectors of whatever is below."""


class Obligation(Enum):
    """What a block handler owes to its callers; the values are for people."""

    ATTRIBUTES = "its attributes describe a disk that can be, and stay what they are"
    LIFE = "open() and aclose() work, for each object that the factory makes"
    RESULT = "methods return None"
    FILL = "read() fills every byte of its IoVec"
    STABLE = "reads return the same bytes until somebody writes"
    WRITE = "a read returns what the last write stored"
    NEIGHBOURS = "a command changes its range and nothing else"
    SCATTER = "IoVecs are transferred whole, whatever pieces they are of"
    FLUSH = "flush() makes durable, and succeeds"
    FUA = "with native_fua, write() has a keyword fua"
    WRITE_ZEROES = "zeroes are what is read after write_zeroes()"
    DISCARD = "a discarded range can be read and written, and is zero if discard_zeroes says so"
    EXTENTS = "extents() speaks of whole blocks from the offset on, and knows what was written"
    RESIZE = "set_size() moves the end of the disk, and what was cut off does not come back"
    CONCURRENCY = "as many commands as max_in_flight says may run at once"
    CANCEL = "a cancelled command leaves a disk that works"
    DURABLE = "what was flushed is there when the storage is opened again"
    DESCRIPTORS = "no file is left open after aclose()"
    SERVED = "it works as a SCSI disk"
    VIEWS = "no view of an IoVec is kept after the method has returned"
    READ_ONLY = "a read-only disk refuses to be written"


class BrokenObligation(AssertionError):
    """A handler does not do what it owes.

    Attributes:
        obligation: Which one.
        detail: What it did instead.
    """

    def __init__(self, obligation: Obligation, detail: str) -> None:
        super().__init__(f"{obligation.name} ({obligation.value}): {detail}")
        self.obligation = obligation
        self.detail = detail


async def check_block_handler(
    factory: Callable[[], BlockHandler], *, persistent: bool = False, patience: float = 60.0
) -> None:
    """Checks a block handler against every obligation of its interface.

    The storage is overwritten. 1 MiB of it is enough to check everything; of a larger disk the ends, the middle and
    usual boundaries are used.

    ```python
    async def test_my_handler(tmp_path):
        await tcmu_rs.testing.check_block_handler(lambda: MyHandler(tmp_path / "disk"), persistent=True)
    ```

    Args:
        factory: Makes a handler that is not open yet; called several times, one handler is closed before the next.
        persistent: The handlers that `factory` makes are of the same storage: what was flushed is still there.
        patience: Seconds that one call of a method may take. Do not jump clocks if the handler uses threads.

    Raises:
        BrokenObligation: The first obligation that is broken.
    """
    before = _descriptors()
    async with _opened(factory, patience) as disk:
        await _check_reads(disk)
        if disk.writable:
            for check_something in (
                _check_fua,
                _check_writes,
                _check_scattered,
                _check_flush,
                _check_zeroes,
                _check_discard,
                _check_extents,
                _check_resize,
                _check_concurrency,
                _check_cancel,
            ):
                await check_something(disk)
        stored = await _store(disk) if disk.writable else []
    if persistent:
        async with _opened(factory, patience) as disk:
            for offset, data in stored:
                disk.expect(Obligation.DURABLE, "after opening again", offset, await disk.read(offset, len(data)), data)
    leaked = _descriptors() - before
    if leaked:
        raise BrokenObligation(Obligation.DESCRIPTORS, f"still open: {', '.join(sorted(leaked))}")
    await _check_served(factory)


def _descriptors() -> set[str]:
    # The one that lists them is gone when its turn comes.
    return {f"{fd.name} -> {fd.readlink()}" for fd in Path("/proc/self/fd").iterdir() if fd.is_symlink()}


def _bytes(seed: int, length: int) -> bytes:
    return random.Random(seed).randbytes(length)


class _Subject:
    """An open handler, its methods as functions of any colour."""

    def __init__(self, handler: BlockHandler, patience: float) -> None:
        self.handler = handler
        self.size: int = handler.size
        self.block: int = handler.block_size
        self.writable = has(handler, "write") and not handler.read_only
        self._patience = patience

    def has(self, method: str) -> bool:
        return has(self.handler, method)

    async def call(self, obligation: Obligation, method: str, *args: Any, **keywords: Any) -> None:
        """Calls a method as the runtime does; what it raises breaks `obligation`."""
        result = await self.ask(obligation, method, *args, **keywords)
        if result is not None:
            raise BrokenObligation(Obligation.RESULT, f"{method}() returned {result!r}")

    async def ask(self, obligation: Obligation, method: str, *args: Any, **keywords: Any) -> Any:
        """The same for a method that has something to say."""
        function: Callable[..., Any] = getattr(self.handler, method)
        if method == "write" and self.handler.native_fua:
            keywords.setdefault("fua", False)
        arguments = ", ".join([*map(repr, args), *(f"{key}={value!r}" for key, value in keywords.items())])
        what = f"{method}({arguments})"
        bound = partial(function, *args, **keywords)
        with trio.move_on_after(self._patience) as scope:
            try:
                match colour_of(function):
                    case Colour.ASYNC:
                        return await bound()
                    case Colour.BLOCKING:
                        return await trio.to_thread.run_sync(bound)
                    case Colour.PLAIN:
                        return bound()
            except Exception as error:
                raise BrokenObligation(obligation, f"{what} raised {error!r}") from error
        # Only a call that took too long comes here.
        assert scope.cancelled_caught
        raise BrokenObligation(obligation, f"{what} did not return in {self._patience} seconds")

    async def read(self, offset: int, length: int, obligation: Obligation = Obligation.FILL) -> bytes:
        data = bytearray([_RUBBISH]) * length
        await self.call(obligation, "read", offset, IoVec([data]))
        return bytes(data)

    async def write(self, offset: int, data: bytes, obligation: Obligation = Obligation.WRITE) -> None:
        await self.call(obligation, "write", offset, IoVec([data]))

    async def change(
        self, obligation: Obligation, method: str, offset: int, length: int, new: bytes | None, *args: Any, **keys: Any
    ) -> bytes:
        """Calls a method that turns a range into `new`, or nobody knows what, and leaves the rest alone."""
        start, stop = max(0, offset - _MARGIN), min(self.size, offset + length + _MARGIN)
        before = await self.read(start, stop - start)
        await self.call(obligation, method, offset, *args, **keys)
        after = await self.read(start, stop - start, obligation)
        what = f"after {method} of {length} bytes at {offset}"
        at, end = offset - start, offset - start + length
        if new is not None:
            self.expect(obligation, what, offset, after[at:end], new)
        self.expect(Obligation.NEIGHBOURS, what, start, after[:at], before[:at])
        self.expect(Obligation.NEIGHBOURS, what, offset + length, after[end:], before[end:])
        return after[at:end]

    def expect(self, obligation: Obligation, when: str, offset: int, found: bytes, expected: bytes) -> None:
        if found != expected:
            at = next(index for index, (one, other) in enumerate(zip(found, expected, strict=True)) if one != other)
            raise BrokenObligation(
                obligation, f"{when}, byte {offset + at} is {found[at]:#04x} instead of {expected[at]:#04x}"
            )

    def ranges(self, unit: int = 0) -> Iterable[tuple[int, int]]:
        """Ranges of whole units (blocks) at both ends, in the middle and across usual boundaries."""
        unit = unit or self.block
        units = self.size // unit
        boundaries = [at // unit for at in (0, 4096, 64 << 10, 1 << 20, self.size // 2, self.size)]
        found = dict.fromkeys(
            (first * unit, (last - first) * unit)
            for boundary in boundaries
            for before, after in ((0, 1), (1, 0), (0, 7), (7, 0), (1, 2), (3, 130))
            if 0 <= (first := boundary - before) < (last := boundary + after) <= units
        )
        return found or {(0, units * unit): None} if units else {}


@asynccontextmanager
async def _opened(factory: Callable[[], BlockHandler], patience: float) -> AsyncIterator[_Subject]:
    handler = factory()
    try:
        await handler.open()
    except Exception as error:
        raise BrokenObligation(Obligation.LIFE, f"open() raised {error!r}") from error
    closed = False
    try:
        try:
            check(handler)
            unit_for(handler, serial="0", naa=naa_of("0"))
        except (TypeError, ValueError) as error:
            raise BrokenObligation(Obligation.ATTRIBUTES, str(error)) from error
        attributes = _attributes(handler)
        yield _Subject(handler, patience)
        if _attributes(handler) != attributes:
            raise BrokenObligation(
                Obligation.ATTRIBUTES, f"they changed from {attributes} to {_attributes(handler)} while it was open"
            )
        closed = True
        try:
            await handler.aclose()
        except Exception as error:
            raise BrokenObligation(Obligation.LIFE, f"aclose() raised {error!r}") from error
    finally:
        if not closed:
            with trio.CancelScope(shield=True), suppress(Exception):
                await handler.aclose()


def _attributes(handler: BlockHandler) -> dict[str, object]:
    names = ("size", "block_size", "physical_block_size", "read_only", "native_fua", "fills_reads", "max_in_flight")
    more = ("can_discard", "can_write_zeroes", "discard_zeroes", "discard_granularity", "rotational", "identity")
    return {name: getattr(handler, name) for name in names + more}


async def _check_reads(disk: _Subject) -> None:
    for offset, length in disk.ranges():
        found = await disk.read(offset, length)
        # Once more over other rubbish: bytes that were not written differ in just that.
        again = bytearray(length)
        await disk.call(Obligation.FILL, "read", offset, IoVec([again]))
        differences = {at: pair for at, pair in enumerate(zip(found, again, strict=True)) if pair[0] != pair[1]}
        if differences and set(differences.values()) == {(_RUBBISH, 0)}:
            raise BrokenObligation(
                Obligation.FILL,
                f"read of {length} bytes at {offset} did not write byte {min(differences)} of its IoVec",
            )
        disk.expect(Obligation.STABLE, "at the second read", offset, bytes(again), found)


async def _check_writes(disk: _Subject) -> None:
    for seed, (offset, length) in enumerate(disk.ranges()):
        data = _bytes(seed, length)
        await disk.change(Obligation.WRITE, "write", offset, length, data, IoVec([data]))
    # All at once, over what the small ones left.
    length = min(disk.size, 1 << 20)
    data = _bytes(-1, length)
    await disk.change(Obligation.WRITE, "write", 0, length, data, IoVec([data]))


async def _check_scattered(disk: _Subject) -> None:
    block = disk.block
    # The first and the last have more pieces than a system call takes (IOV_MAX).
    shapes = [([3], 4096), ([1, 0, 510], 4096), ([block - 1], 8 * block), ([block, 4096], 64 << 10), ([64], 1100 * 64)]
    for pieces, about in shapes:
        length = min(-(-about // block) * block, disk.size)
        data = _bytes(length, length)
        cut = _cut(length, pieces)
        what = f"in {len(cut)} pieces of {' and '.join(map(str, pieces))} bytes"
        # Memory that could be written, as that of other layers: being read-only is not what makes it a write.
        source = [bytearray(data[start : start + size]) for start, size in cut]
        await disk.call(Obligation.SCATTER, "write", 0, IoVec(source))
        disk.expect(Obligation.SCATTER, f"in the IoVec of a write {what}", 0, b"".join(source), data)
        disk.expect(Obligation.SCATTER, f"after a write {what}", 0, await disk.read(0, length), data)
        targets = [bytearray(size) for _, size in cut]
        await disk.call(Obligation.SCATTER, "read", 0, IoVec(targets))
        disk.expect(Obligation.SCATTER, f"in a read {what}", 0, b"".join(targets), data)


def _cut(length: int, pieces: list[int]) -> list[tuple[int, int]]:
    """Positions and sizes of pieces that make up `length` bytes."""
    cut: list[tuple[int, int]] = []
    start = 0
    while start < length:
        size = min(pieces[len(cut) % len(pieces)], length - start)
        cut.append((start, size))
        start += size
    return cut


async def _check_fua(disk: _Subject) -> None:
    if disk.handler.native_fua:
        for fua in (True, False):
            await disk.call(Obligation.FUA, "write", 0, IoVec([_bytes(fua, disk.block)]), fua=fua)


async def _check_flush(disk: _Subject) -> None:
    if not disk.has("flush"):
        return
    data = _bytes(7, disk.block)
    await disk.call(Obligation.FLUSH, "flush")
    await disk.write(0, data)
    await disk.call(Obligation.FLUSH, "flush")
    await disk.call(Obligation.FLUSH, "flush")
    disk.expect(Obligation.FLUSH, "after a flush", 0, await disk.read(0, disk.block), data)


async def _check_zeroes(disk: _Subject) -> None:
    if not disk.has("write_zeroes"):
        return
    for seed, (offset, length) in enumerate(disk.ranges()):
        await disk.write(offset, _bytes(seed, length))
        await disk.change(Obligation.WRITE_ZEROES, "write_zeroes", offset, length, bytes(length), length)
        await disk.change(Obligation.WRITE_ZEROES, "write_zeroes", offset, length, bytes(length), length)
        data = _bytes(seed, disk.block)
        await disk.change(Obligation.WRITE_ZEROES, "write", offset, disk.block, data, IoVec([data]))


async def _check_discard(disk: _Subject) -> None:
    if not disk.has("discard"):
        return
    # As the runtime calls it: whole granules, and up to the end of the disk.
    unit = max(disk.block, disk.handler.discard_granularity)
    ranges = list(disk.ranges(unit))
    if disk.size % unit:
        ranges.append((disk.size // unit * unit, disk.size % unit))
    for seed, (offset, length) in enumerate(ranges):
        await disk.write(offset, _bytes(seed, length))
        zero = bytes(length) if disk.handler.discard_zeroes else None
        found = await disk.change(Obligation.DISCARD, "discard", offset, length, zero, length)
        again = await disk.read(offset, length, Obligation.DISCARD)
        disk.expect(Obligation.DISCARD, f"at the second read of what was discarded at {offset}", offset, again, found)
        await disk.change(Obligation.DISCARD, "discard", offset, length, zero, length)
        data = _bytes(seed, disk.block)
        await disk.change(Obligation.DISCARD, "write", offset, disk.block, data, IoVec([data]))


async def _check_extents(disk: _Subject) -> None:
    if not disk.has("extents"):
        return
    unit = max(disk.block, disk.handler.discard_granularity)
    for seed, (offset, length) in enumerate(disk.ranges(unit)):
        await disk.write(offset, _bytes(seed, length))
        for at, _, state in await _extents(disk, offset, length):
            if state is not ExtentState.MAPPED:
                raise BrokenObligation(Obligation.EXTENTS, f"what was written at {at} is {state.name}")
        if disk.has("discard"):
            await disk.call(Obligation.DISCARD, "discard", offset, length)
            for at, size, state in await _extents(disk, offset, length):
                if state is not ExtentState.MAPPED and disk.handler.discard_zeroes:
                    found = await disk.read(at, size)
                    disk.expect(Obligation.EXTENTS, f"in what is {state.name} at {at}", at, found, bytes(size))


async def _extents(disk: _Subject, offset: int, length: int) -> list[tuple[int, int, ExtentState]]:
    """Position, length and state of each part of a range."""
    found: list[tuple[int, int, ExtentState]] = []
    at = offset
    while at < offset + length:
        answer = await disk.ask(Obligation.EXTENTS, "extents", at, offset + length - at)
        start = at
        try:
            for size, state in answer:
                if size <= 0 or size % disk.block:
                    raise ValueError(f"{size} bytes are not blocks")
                size = min(size, offset + length - at)
                found.append((at, size, ExtentState(state)))
                at += size
        except (TypeError, ValueError) as error:
            raise BrokenObligation(Obligation.EXTENTS, f"extents() at {start} returned {answer!r}: {error}") from error
        if at == start:
            raise BrokenObligation(Obligation.EXTENTS, f"extents() says nothing of the block at {start}")
    return found


async def _check_resize(disk: _Subject) -> None:
    if not disk.has("set_size"):
        return
    small, large = disk.size, disk.size + _GROWTH
    keeps = _bytes(1, disk.block)
    await disk.write(small - disk.block, keeps)

    async def resize(size: int) -> None:
        await disk.call(Obligation.RESIZE, "set_size", size)
        if disk.handler.size != size:
            raise BrokenObligation(Obligation.RESIZE, f"size is {disk.handler.size} after set_size({size})")
        found = await disk.read(small - disk.block, disk.block, Obligation.RESIZE)
        disk.expect(Obligation.RESIZE, f"after set_size({size})", small - disk.block, found, keeps)

    for _ in range(2):
        try:
            await resize(large)
        except BrokenObligation as error:
            if isinstance(error.__cause__, ValueError) and disk.handler.size == small:
                # Others decide how large its storage is.
                return
            raise
        new = await disk.read(small, _GROWTH, Obligation.RESIZE)
        if disk.handler.discard_zeroes:
            disk.expect(Obligation.RESIZE, f"in what is new after set_size({large})", small, new, bytes(_GROWTH))
        data = _bytes(2, _GROWTH)
        await disk.write(small, data, Obligation.RESIZE)
        found = await disk.read(small, _GROWTH, Obligation.RESIZE)
        disk.expect(Obligation.RESIZE, "after a write behind the old end", small, found, data)
        await resize(small)


async def _check_concurrency(disk: _Subject) -> None:
    depth = disk.handler.max_in_flight
    running = trio.CapacityLimiter(depth)
    obligation = Obligation.CONCURRENCY

    async def write(offset: int, data: bytes) -> None:
        async with running:
            await disk.write(offset, data, obligation)

    async def read(offset: int, length: int) -> None:
        async with running:
            await disk.read(offset, length, obligation)

    # Next to each other: whoever writes larger pieces than blocks reads, changes and writes them.
    blocks = min(disk.size // disk.block, max(16, min(2 * depth, 256)))
    data = _bytes(blocks, blocks * disk.block)
    async with _group(obligation) as nursery:
        for start in range(0, len(data), disk.block):
            nursery.start_soon(write, start, data[start : start + disk.block])
            nursery.start_soon(read, start, disk.block)
    disk.expect(obligation, "after writes of neighbouring blocks at once", 0, await disk.read(0, len(data)), data)

    # On top of each other: nobody knows whose blocks stay, but each is of one writer.
    length = 4 * disk.block if disk.size >= 4 * disk.block else disk.block
    writers = [_bytes(seed, length) for seed in range(min(max(2, depth), 64))]
    async with _group(obligation) as nursery:
        for data in writers:
            nursery.start_soon(write, 0, data)
            nursery.start_soon(read, 0, length)
    found = await disk.read(0, length)
    for start in range(0, length, disk.block):
        stop = start + disk.block
        if found[start:stop] not in [data[start:stop] for data in writers]:
            raise BrokenObligation(
                obligation, f"after writes of the same blocks at once, the block at {start} is what nobody wrote"
            )


@asynccontextmanager
async def _group(obligation: Obligation) -> AsyncIterator[trio.Nursery]:
    """A nursery from which the first broken obligation comes as it is."""
    with _one_broken(obligation):
        async with trio.open_nursery() as nursery:
            yield nursery


@contextmanager
def _one_broken(obligation: Obligation) -> Iterator[None]:
    """Makes one broken obligation of whatever goes wrong: one that was found already, or else this one."""
    try:
        yield
    except Exception as error:
        errors = list(_leaves(error))
        for broken in errors:
            if isinstance(broken, BrokenObligation):
                raise broken from None
        raise BrokenObligation(obligation, f"{type(errors[0]).__name__}: {errors[0]}") from error


def _leaves(error: BaseException) -> Iterator[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        for part in error.exceptions:
            yield from _leaves(part)
    else:
        yield error


async def _check_cancel(disk: _Subject) -> None:
    length = min(4 * disk.block, disk.size)
    calls: list[tuple[Any, ...]] = [("write", 0, IoVec([_bytes(1, length)])), ("read", 0, IoVec([bytearray(length)]))]
    calls += [("flush",)] if disk.has("flush") else []
    calls += [("write_zeroes", 0, length)] if disk.has("write_zeroes") else []
    count = min(disk.handler.max_in_flight, 8)
    for after in range(4):
        for call in calls:
            async with _group(Obligation.CANCEL) as nursery:
                for _ in range(count):
                    nursery.start_soon(partial(disk.call, Obligation.CANCEL, *call))
                for _ in range(after):
                    await trio.lowlevel.checkpoint()
                nursery.cancel_scope.cancel()
            # Whatever the cancelled command has done, the next one finds everything in order.
            data = _bytes(after, length)
            await disk.write(0, data, Obligation.CANCEL)
            found = await disk.read(0, length, Obligation.CANCEL)
            disk.expect(Obligation.CANCEL, f"after a cancelled {call[0]} and a write", 0, found, data)


async def _store(disk: _Subject) -> list[tuple[int, bytes]]:
    """Makes something durable in all ways that there are."""
    stored: dict[int, bytes] = {}
    for seed, (offset, length) in enumerate(disk.ranges()):
        await disk.write(offset, _bytes(1000 + seed, length))
    if disk.has("write_zeroes") and disk.size >= 32 * disk.block:
        await disk.call(Obligation.WRITE_ZEROES, "write_zeroes", 24 * disk.block, 2 * disk.block)
    for offset, length in disk.ranges():
        stored[offset] = await disk.read(offset, length)
    if disk.has("flush"):
        await disk.call(Obligation.FLUSH, "flush")
    return list(stored.items())


async def _check_served(factory: Callable[[], BlockHandler]) -> None:
    """Once more, as a disk: through the ring, the emulation and the runtime."""
    with _one_broken(Obligation.SERVED):
        handler = factory()
        async with simulated(handler, name="conformance") as disk:
            if has(handler, "write") and not handler.read_only:
                await _check_disk(handler, disk)
            else:
                await _check_read_only(disk)


async def _check_disk(handler: BlockHandler, disk: SimulatedDisk) -> None:
    length = min(64 * disk.block_size, disk.size)
    data = _bytes(3, length)

    async def check_after(what: str, expected: bytes | None) -> None:
        found = await disk.read(0, length)
        if disk.kernel.kept():
            raise BrokenObligation(Obligation.VIEWS, f"up to the read after {what}; the log names the method")
        if expected not in (None, found):
            raise BrokenObligation(Obligation.SERVED, f"wrong data after {what}")

    await check_after("opening", None)
    await disk.write(0, data)
    await check_after("WRITE", data)
    await disk.write(0, data[::-1], fua=True)
    await check_after("WRITE with FUA", data[::-1])
    await disk.write_zeroes(0, length)
    await check_after("WRITE SAME", bytes(length))
    await disk.write(0, data)
    await disk.flush()
    await check_after("SYNCHRONIZE CACHE", data)
    if has(handler, "discard"):
        await disk.discard(0, length)
        await check_after("UNMAP", bytes(length) if handler.discard_zeroes else None)
    async with trio.open_nursery() as nursery:
        for start in range(0, length, disk.block_size):
            nursery.start_soon(disk.write, start, data[start : start + disk.block_size])
    await check_after("a WRITE of each block", data)


async def _check_read_only(disk: SimulatedDisk) -> None:
    block = disk.block_size
    before = await disk.read(0, block)
    changes: dict[str, Callable[[], Awaitable[None]]] = {
        "WRITE": lambda: disk.write(0, bytes(block)),
        "WRITE SAME": lambda: disk.write_zeroes(0, block),
    }
    for name, change in changes.items():
        try:
            await change()
        except _errors.ScsiError as error:
            if (error.key, error.asc, error.ascq) != (0x7, 0x27, 0x00):
                raise BrokenObligation(
                    Obligation.READ_ONLY, f"{name} did not fail with WRITE PROTECTED: {error}"
                ) from None
        else:
            raise BrokenObligation(Obligation.READ_ONLY, f"{name} succeeded")
    if await disk.read(0, block) != before:
        raise BrokenObligation(Obligation.READ_ONLY, "a WRITE that was refused changed the disk")
