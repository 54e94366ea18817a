"""What the tests of the emulation serve, and how."""

from __future__ import annotations

import queue
import re
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import trio

import tcmu_rs
from tcmu_rs._attach import AttachedDevice, attach
from tcmu_rs.handlers.ram import RamHandler


class Everything(RamHandler):
    """A disk with every optional feature: write cache, thin provisioning, extents, atomic writes, a medium to eject."""

    removable = True
    max_in_flight = 8
    physical_block_size = 4096
    max_atomic_write = 1 << 20

    async def open(self) -> None:
        """Begins with an empty disk."""
        await super().open()
        self._mapped = bytearray(self.size // self.block_size)

    def _mark(self, offset: int, length: int, mapped: bytes) -> None:
        first, blocks = offset // self.block_size, length // self.block_size
        self._mapped[first : first + blocks] = mapped * blocks

    def write(self, offset: int, iov: tcmu_rs.IoVec) -> None:
        """Remembers which blocks have storage."""
        self._mark(offset, iov.nbytes, b"\1")
        super().write(offset, iov)

    def discard(self, offset: int, length: int) -> None:
        """Takes the storage back."""
        self._mark(offset, length, b"\0")
        super().discard(offset, length)

    write_zeroes = discard

    async def flush(self) -> None:
        """Has nothing to do, and says so a moment later."""
        await trio.lowlevel.checkpoint()

    def extents(self, offset: int, length: int) -> list[tuple[int, tcmu_rs.ExtentState]]:
        """One run of blocks of one state."""
        first, end = offset // self.block_size, (offset + length) // self.block_size
        mapped = self._mapped[first]
        stop = self._mapped.find(1 - mapped, first, end)
        blocks = (end if stop < 0 else stop) - first
        return [(blocks * self.block_size, tcmu_rs.ExtentState(1 - mapped))]


@contextmanager
def served(handler: tcmu_rs.Handler, **options: Any) -> Iterator[AttachedDevice]:
    """`attach` for tests without trio: a thread serves while the block lasts."""
    ready: queue.SimpleQueue[tuple[AttachedDevice, trio.lowlevel.TrioToken, trio.CancelScope] | None]
    ready = queue.SimpleQueue()

    async def serve() -> None:
        try:
            with trio.CancelScope() as scope:
                async with attach(handler, **options) as device:
                    ready.put((device, trio.lowlevel.current_trio_token(), scope))
                    await trio.sleep_forever()
        finally:
            ready.put(None)

    with ThreadPoolExecutor(1) as pool:
        server = pool.submit(trio.run, serve)
        service = ready.get()
        if service is None:
            server.result()
            raise AssertionError("the server ended without a reason")
        device, token, scope = service
        try:
            yield device
        finally:
            with suppress(trio.RunFinishedError):
                token.run_sync_soon(scope.cancel)
            server.result()


class KernelLog:
    """What the kernel says from now on."""

    def __init__(self) -> None:
        self._seen = len(self._all())

    @staticmethod
    def _all() -> list[str]:
        return subprocess.run(["dmesg", "--notime"], capture_output=True, text=True, check=True).stdout.splitlines()

    def lines(self) -> list[str]:
        """All that was said."""
        return self._all()[self._seen :]

    def complaints(self) -> list[str]:
        """What was said of faults, errors, time-outs and resets."""
        return [line for line in self.lines() if _COMPLAINT.search(line)]


_COMPLAINT = re.compile(
    r"BUG|WARNING|Oops|error|fail|blocked for|stall|abort|reset|time[d ]?out|rejecting|unsupported|illegal"
    r"|tcmu|TARGET_CORE",
    re.IGNORECASE,
)
