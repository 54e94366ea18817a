"""Copies one disk onto another, whatever stores them: plain to encrypted and back, raw to compressed and back.

Parts are copied side by side, each read whole and then written, by as many tasks as the two handlers take calls.
What the source knows to be empty, and what is found to be zero, is not written but left out or zeroed.

**The beginning is written last.** A target that held something gets zeroes there first. So a copy that was killed, or
whose machine lost power, has neither partition table nor file system that anybody would take for the whole: the first
`HEAD` bytes come when all others are durable, and, if asked for, verified; and the first `SIGN` bytes of them, by which
those are found, when the others of them are. A copy that fails while it writes them zeroes them again.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TypeVar

import trio

from ._errors import CopyError
from ._handler import BlockHandler, ExtentState
from ._layers import Lower
from ._native import IoVec

CHUNK = 1 << 20
"""Bytes that are read and written at once."""
HEAD = 4 << 20
"""Bytes of the beginning. LVM, file systems and both headers of LUKS2 are known by what they have there."""
SIGN = 4096
"""Bytes that come last of all, at once. Partition tables and most file systems are looked for here."""
TASKS = 8
"""Chunks on their way at once, if the handlers take so many calls."""
_EMPTY_AT_ONCE = 64 * CHUNK
"""Bytes that one call discards or zeroes."""
_GRAIN = 64 << 10
"""Bytes that are looked at for zeroes. Smaller ones save little and make the target's map longer."""
_ZEROES = bytes(CHUNK)
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a copy is.

    Attributes:
        done: Bytes that have been dealt with; those that are verified count twice.
        total: Bytes to deal with.
        written: Bytes that were written as data; all others are zero.
    """

    done: int
    total: int
    written: int


async def copy(
    source: BlockHandler,
    target: BlockHandler | Callable[[int], Awaitable[BlockHandler]],
    *,
    verify: bool = False,
    progress: Callable[[Progress], None] | None = None,
) -> Progress:
    """Makes the target read as the source; behind the source's end it reads as zeroes.

    Returns when all is durable. If it raises, or is cancelled, or the machine dies, the beginning of the target reads
    as zeroes: it does not look like the copy that it is not.

    Args:
        source: Opened, read and closed. Nobody else may change it meanwhile.
        target: Opened, overwritten and closed; at least as large. Or an `async def` that gets the size of the source,
            and makes a target which was never written to, and so reads as if it were discarded.
        verify: Read everything back and compare, before the beginning is written and afterwards.
        progress: Called in the event loop, before the first change and after every part; not to block.

    Raises:
        ValueError: The target is smaller, or cannot be written.
        CopyError: Reading or writing failed, or the comparison; with offset and cause. In an `ExceptionGroup`, as
            several parts may fail at once.
        Exception: What the handlers raise when they are opened and closed.
    """
    async with Lower(source) as below_source:
        fresh = not isinstance(target, BlockHandler)
        handler = target if isinstance(target, BlockHandler) else await target(below_source.size)
        async with Lower(handler) as below_target:
            return await _Copy(below_source, below_target, fresh, verify, progress).run()


class _Side:
    """A disk whose errors say what was being done, and which gets no more calls at once than it takes."""

    def __init__(self, name: str, lower: Lower) -> None:
        self.name = name
        self.lower = lower
        self.size = lower.size
        self._limit = trio.CapacityLimiter(lower.max_in_flight)

    async def call(
        self, verb: str, offset: int, length: int, method: Callable[..., Awaitable[_T]], *arguments: object
    ) -> _T:
        async with self._limit:
            try:
                return await method(*arguments)
            except Exception as error:
                where = f"{verb} {length} bytes at {offset} of the {self.name}"
                raise CopyError(f"{where}: {str(error) or type(error).__name__}") from error

    async def read(self, offset: int, view: memoryview) -> None:
        iov = IoVec([view])
        if not self.lower.fills_reads:
            iov.zero()
        await self.call("reading", offset, len(view), self.lower.read, offset, iov)

    async def extents(self, offset: int, length: int) -> Sequence[tuple[int, ExtentState]]:
        extents = await self.call("asking for the extents of", offset, length, self.lower.extents, offset, length)
        if not extents or extents[0][0] <= 0:
            raise CopyError(f"the {self.name} says nothing of its extents at {offset}")
        return extents

    async def write(self, offset: int, view: memoryview) -> None:
        iov = IoVec([view.toreadonly()])
        await self.call("writing", offset, len(view), self.lower.write, offset, iov)


class _Copy:
    def __init__(
        self, source: Lower, target: Lower, fresh: bool, verify: bool, progress: Callable[[Progress], None] | None
    ) -> None:
        if not target.writable:
            raise ValueError("the target is write protected")
        if target.size < source.size:
            raise ValueError(f"the target has {target.size} bytes, the source {source.size}: it does not fit")
        self._source, self._target = _Side("source", source), _Side("target", target)
        self._verify = verify
        self._progress = progress
        self._state = Progress(0, source.size * (1 + verify), 0)
        self._unit = max(source.block_size, target.block_size)
        self._knows_empty = target.can_extents and target.discard_zeroes
        self._is_empty = fresh and target.discard_zeroes and not target.can_extents
        self._empty: Callable[[int, int], Awaitable[None]] | None = None
        if target.can_discard and target.discard_zeroes:
            self._empty = target.discard
        elif target.can_write_zeroes:
            self._empty = target.write_zeroes
        self._knows_zeroes = self._knows_empty or self._is_empty or self._empty is not None
        self._finds_extents = source.can_extents and source.discard_zeroes
        self._extents: deque[tuple[int, bool]] = deque()

    # Ctrl-C ends it where it waits, not between any two lines.
    @trio.lowlevel.enable_ki_protection
    async def run(self) -> Progress:
        size = self._source.size
        head = min(HEAD, size)
        self._tell()
        await self._zero(0, self._whole(head))
        await self._flush()
        # Behind the last block that the source has a part of.
        await self._zero(self._whole(size), self._target.size)
        await self._copy_range(head, size)
        try:
            sign = min(SIGN, head)
            await self._copy_range(sign, head)
            # With one write, whatever of it is empty.
            self._finds_extents = False
            await self._copy_range(0, sign)
        except BaseException:
            # What is there of it could be taken for the whole.
            self._is_empty = False
            with trio.CancelScope(shield=True), suppress(CopyError):
                await self._zero(0, self._whole(head))
                await self._flush()
            raise
        return self._state

    async def _copy_range(self, start: int, stop: int) -> None:
        await self._each(start, stop, self._copy_part)
        await self._flush()
        if self._verify:
            await self._each(start, stop, self._verify_part)

    def _whole(self, offset: int) -> int:
        block = self._target.lower.block_size
        return -(-offset // block) * block

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self._state)

    async def _flush(self) -> None:
        await self._target.call("flushing", 0, self._target.size, self._target.lower.flush)

    async def _each(
        self, start: int, stop: int, handle: Callable[[int, int, bool, memoryview], Awaitable[None]]
    ) -> None:
        """Calls `handle` for every part of a range, in some tasks, each with a buffer of its own."""
        at = start
        choosing = trio.Lock()
        self._extents.clear()

        @trio.lowlevel.enable_ki_protection
        async def work() -> None:
            nonlocal at
            with memoryview(bytearray(CHUNK)) as buffer:
                while True:
                    async with choosing:
                        offset = at
                        if offset == stop:
                            return
                        length, empty = await self._next_part(offset, stop)
                        at += length
                    await handle(offset, length, empty, buffer)
                    self._state = replace(self._state, done=self._state.done + length)
                    self._tell()

        async with trio.open_nursery() as nursery:
            for _ in range(min(TASKS, -(-(stop - start) // CHUNK))):
                nursery.start_soon(work)

    async def _next_part(self, offset: int, stop: int) -> tuple[int, bool]:
        """How long the next part is, and whether the source has nothing there."""
        if not self._finds_extents:
            return min(CHUNK, stop - offset), False
        while self._extents and self._extents[0][0] <= offset:
            self._extents.popleft()
        if not self._extents:
            at = offset
            extents = await self._source.extents(offset, stop - offset)
            for length, state in extents:
                at += length
                self._extents.append((at, state != ExtentState.MAPPED))
        end, empty = self._extents[0]
        end = min(end, stop)
        if empty and end < stop:
            # A part of the target's block is not empty.
            end = end // self._unit * self._unit
        if empty and end > offset:
            return min(end - offset, _EMPTY_AT_ONCE), True
        end = max(-(-end // self._unit) * self._unit, offset + self._unit)
        return min(end, stop, offset + CHUNK) - offset, False

    async def _copy_part(self, offset: int, length: int, empty: bool, buffer: memoryview) -> None:
        if empty:
            await self._zero(offset, self._whole(offset + length))
            return
        whole = self._whole(length)
        await self._source.read(offset, buffer[:length])
        buffer[length:whole] = bytes(whole - length)
        if not self._knows_zeroes:
            await self._write(offset, buffer[:whole])
            return
        for start, stop, zero in _runs(buffer[:whole]):
            if zero:
                await self._zero(offset + start, offset + stop)
            else:
                await self._write(offset + start, buffer[start:stop])

    async def _write(self, offset: int, view: memoryview) -> None:
        await self._target.write(offset, view)
        self._state = replace(self._state, written=self._state.written + len(view))

    async def _zero(self, start: int, stop: int) -> None:
        """Makes a range of the target read as zeroes; where it has nothing already, by leaving it alone."""
        if self._is_empty:
            return
        at = start
        while at < stop:
            length = min(_EMPTY_AT_ONCE if self._empty is not None else CHUNK, stop - at)
            if self._knows_empty:
                # A new target need not be empty: an image may have another one behind it.
                first, state = (await self._target.extents(at, stop - at))[0]
                if state != ExtentState.MAPPED:
                    at += first
                    continue
                length = min(length, first)
            if self._empty is None:
                await self._target.write(at, memoryview(_ZEROES)[:length])
            else:
                await self._target.call("zeroing", at, length, self._empty, at, length)
            at += length

    async def _verify_part(self, offset: int, length: int, empty: bool, buffer: memoryview) -> None:
        for at in range(offset, offset + length, CHUNK):
            part = min(CHUNK, offset + length - at)
            expected = memoryview(_ZEROES)
            if not empty:
                await self._source.read(at, buffer[:part])
                expected = buffer
            with memoryview(bytearray(self._whole(part))) as found:
                await self._target.read(at, found)
                if bytes(found[:part]) != bytes(expected[:part]) or any(found[part:]):
                    wrong = next((i for i in range(part) if found[i] != expected[i]), part)
                    raise CopyError(f"the target reads differently from the source at {at + wrong}")


def _runs(view: memoryview) -> list[tuple[int, int, bool]]:
    """Cuts into runs of data and of zeroes: start, stop, and whether it is zero."""
    content, runs = bytes(view), list[tuple[int, int, bool]]()
    if content == _ZEROES[: len(content)]:
        return [(0, len(content), True)]
    for start in range(0, len(content), _GRAIN):
        stop = min(start + _GRAIN, len(content))
        zero = content.startswith(_ZEROES[: stop - start], start)
        if runs and runs[-1][2] is zero:
            runs[-1] = (runs[-1][0], stop, zero)
        else:
            runs.append((start, stop, zero))
    return runs
