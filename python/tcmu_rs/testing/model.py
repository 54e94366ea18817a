"""A model test for block handlers: Hypothesis against a bytearray. Needs `hypothesis`.

```python
class MyMachine(tcmu_rs.testing.model.BlockMachine):
    def make_handler(self):
        return MyHandler(64 << 10)


TestMyHandler = MyMachine.TestCase
```

Sequences of commands, alone and many at once, are sent to the handler on the simulator; whatever they do is done to a
bytearray, too, and what is read has to be the same. Hypothesis looks for a short sequence where it is not.
"""

from __future__ import annotations

import queue
import struct
import threading
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, ClassVar

import trio
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from .._handler import BlockHandler, has
from ._simulated import SimulatedDisk, simulated

_Call = Callable[[SimulatedDisk], Awaitable[Any]]
_WAIT = 60.0

_STARTS = st.integers(0, 1 << 16)
_LENGTHS = st.one_of(st.integers(1, 9), st.integers(1, 1 << 16))
_RANGES = st.tuples(_STARTS, _LENGTHS)
_FILLS = st.integers(1, 255)


class _Loop:
    """A trio loop in a thread of its own, in which a disk is served and calls are made, one at a time."""

    def __init__(self, handler: BlockHandler, options: dict[str, Any]) -> None:
        self._handler = handler
        self._options = options
        self._calls: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="tcmu_rs.testing.model", daemon=True)
        self._thread.start()
        self._take()

    def call(self, function: _Call) -> Any:
        self._calls.put(function)
        return self._take()

    def stop(self) -> None:
        """Ends the device; raises what it has to say about it, unless it said so before."""
        if self._thread.is_alive():
            self._calls.put(None)
            self._take()
        self._thread.join(_WAIT)

    def _take(self) -> Any:
        result, error = self._results.get(timeout=_WAIT)
        if error is not None:
            raise error
        return result

    def _run(self) -> None:
        try:
            trio.run(self._serve)
        except BaseException as error:
            self._results.put((None, error))
        else:
            self._results.put((None, None))
        # For the thread that waits for the next call.
        self._calls.put(None)

    async def _serve(self) -> None:
        async with simulated(self._handler, **self._options) as disk:
            self._results.put((None, None))
            while function := await trio.to_thread.run_sync(self._calls.get, abandon_on_cancel=True):
                self._results.put((await function(disk), None))


async def _read(offset: int, length: int, disk: SimulatedDisk) -> bytes:
    return await disk.read(offset, length)


class BlockMachine(RuleBasedStateMachine):
    """The rules. Derive from it, say what the handler is, and use `TestCase`.

    Small disks find more: 64 to 1024 blocks.

    Attributes:
        persistent: `make_handler` makes handlers of the same storage, so the disk may be closed and opened.
        options: Keywords for `tcmu_rs.testing.simulated`: a small ring, capabilities.
    """

    persistent = False
    options: ClassVar[dict[str, Any]] = {}

    def make_handler(self) -> BlockHandler:
        """Makes a handler that is not open yet; its disk is empty, or has what was flushed before if `persistent`."""
        raise NotImplementedError

    @initialize()
    def open(self) -> None:
        """Begins with what is on the disk."""
        self._start()
        self._model = bytearray(self._loop.call(lambda disk: disk.read(0, disk.size)))

    def _start(self) -> None:
        self._failed = True
        self._handler = self.make_handler()
        self._loop = _Loop(self._handler, self.options)
        self._block = self._handler.block_size
        self._blocks = self._handler.size // self._block
        self._failed = False

    def teardown(self) -> None:
        """Compares all of the disk at the end."""
        if hasattr(self, "_loop"):
            try:
                if not self._failed:
                    self._expect(0, self._handler.size)
            finally:
                self._loop.stop()

    def _range(self, start: int, length: int) -> tuple[int, int]:
        """A range on this disk, in bytes."""
        first = start % self._blocks
        return first * self._block, min(1 + (length - 1) % self._blocks, self._blocks - first) * self._block

    def _data(self, fill: int, length: int) -> bytes:
        """Bytes that say in which block and where in it they were."""
        pattern = bytes((fill + at) % 255 + 1 for at in range(length // self._block + 7))
        return b"".join((pattern[at : at + 7] * self._block)[: self._block] for at in range(length // self._block))

    def _expect(self, offset: int, length: int) -> None:
        self._compare(offset, self._call(lambda disk: disk.read(offset, length)))

    def _compare(self, offset: int, found: bytes) -> None:
        expected = bytes(self._model[offset : offset + len(found)])
        if found != expected:
            self._failed = True
            at = next(at for at in range(len(found)) if found[at] != expected[at])
            raise AssertionError(f"byte {offset + at} is {found[at]:#04x} instead of {expected[at]:#04x}")

    def _call(self, function: _Call) -> Any:
        # When this fails nothing else is asked of the disk, so that the first failure is what is reported.
        self._failed = True
        result = self._loop.call(function)
        self._failed = False
        return result

    @rule(where=_RANGES)
    def read(self, where: tuple[int, int]) -> None:
        """READ."""
        self._expect(*self._range(*where))

    @rule(where=_RANGES, fill=_FILLS, fua=st.booleans())
    def write(self, where: tuple[int, int], fill: int, fua: bool) -> None:
        """WRITE, with or without FUA."""
        offset, length = self._range(*where)
        data = self._data(fill, length)
        self._call(lambda disk: disk.write(offset, data, fua=fua))
        self._model[offset : offset + length] = data

    @rule(where=_RANGES, unmap=st.booleans())
    def write_zeroes(self, where: tuple[int, int], unmap: bool) -> None:
        """WRITE SAME of zeroes; with UNMAP they may become a hole."""
        offset, length = self._range(*where)
        unmap = unmap and has(self._handler, "discard") and self._handler.discard_zeroes
        self._call(lambda disk: disk.write_zeroes(offset, length, unmap=unmap))
        self._model[offset : offset + length] = bytes(length)

    @rule(where=_RANGES, fill=_FILLS)
    def write_same(self, where: tuple[int, int], fill: int) -> None:
        """WRITE SAME of a block that is not zero."""
        offset, length = self._range(*where)
        block = self._data(fill, self._block)
        cdb = struct.pack(">BBQLBB", 0x93, 0, offset // self._block, length // self._block, 0, 0)
        self._call(lambda disk: disk.scsi(cdb, block)).check()
        self._model[offset : offset + length] = block * (length // self._block)

    @precondition(lambda self: hasattr(self, "_handler") and has(self._handler, "discard"))
    @rule(where=st.lists(_RANGES, min_size=1, max_size=5))
    def discard(self, where: list[tuple[int, int]]) -> None:
        """UNMAP of several ranges, that may overlap."""
        ranges = [self._range(*one) for one in where]
        descriptors = b"".join(
            struct.pack(">QL4x", offset // self._block, length // self._block) for offset, length in ranges
        )
        parameters = struct.pack(">HH4x", len(descriptors) + 6, len(descriptors)) + descriptors
        cdb = struct.pack(">BB4xBHB", 0x42, 0, 0, len(parameters), 0)
        self._call(lambda disk: disk.scsi(cdb, parameters)).check()
        for offset, length in ranges:
            if self._handler.discard_zeroes:
                self._model[offset : offset + length] = bytes(length)
            else:
                # Anything may be there now, but from now on it stays.
                self._model[offset : offset + length] = self._call(partial(_read, offset, length))

    @rule()
    def flush(self) -> None:
        """SYNCHRONIZE CACHE."""
        self._call(lambda disk: disk.flush())

    @rule(pieces=st.lists(st.tuples(_LENGTHS, st.sampled_from("wwzr"), _FILLS), min_size=2, max_size=12))
    def batch(self, pieces: list[tuple[int, str, int]]) -> None:
        """Commands on neighbouring ranges, all at once."""
        offset = 0
        writes: list[tuple[int, bytes]] = []
        zeroes: list[tuple[int, int]] = []
        reads: list[tuple[int, int]] = []
        for length, kind, fill in pieces:
            size = min(1 + length % 9, self._blocks - offset // self._block) * self._block
            if kind == "w" and size:
                writes.append((offset, self._data(fill, size)))
            elif kind == "z" and size:
                zeroes.append((offset, size))
            elif size:
                reads.append((offset, size))
            offset += size
        for start, found in self._call(lambda disk: self._at_once(disk, writes, zeroes, reads)):
            self._compare(start, found)
        for start, data in writes:
            self._model[start : start + len(data)] = data
        for start, size in zeroes:
            self._model[start : start + size] = bytes(size)

    async def _at_once(
        self,
        disk: SimulatedDisk,
        writes: list[tuple[int, bytes]],
        zeroes: list[tuple[int, int]],
        reads: list[tuple[int, int]],
    ) -> list[tuple[int, bytes]]:
        found: list[tuple[int, bytes]] = []

        async def read(offset: int, length: int) -> None:
            found.append((offset, await disk.read(offset, length)))

        async with trio.open_nursery() as nursery:
            for start, data in writes:
                nursery.start_soon(disk.write, start, data)
            for start, size in zeroes:
                nursery.start_soon(disk.write_zeroes, start, size)
            for start, size in reads:
                nursery.start_soon(read, start, size)
        return found

    @precondition(lambda self: self.persistent)
    @rule()
    def reopen(self) -> None:
        """Closes the disk and opens it again, flushed before."""
        self.flush()
        self._loop.stop()
        self._start()
        self._expect(0, self._handler.size)
