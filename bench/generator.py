"""Commands for a served handler on the simulated kernel, many at a time: what it costs is not the figure.

Everything is one process and one thread: the handler, the runtime, and the kernel's side with its copies. No command
has a task of its own on this side; what is due is sent at once.
"""

from __future__ import annotations

import itertools
import struct
import time
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager

import trio

from tcmu_rs import BlockHandler, _native
from tcmu_rs._runtime import Device

from .micro import serve

Request = tuple[bytes, bytes | None, int]
"""CDB, Data-Out, and bytes of Data-In."""

FLUSH: Request = (bytes([0x91]).ljust(16, b"\0"), None, 0)
"""SYNCHRONIZE CACHE (16) of everything."""


def read(offset: int, length: int, block_size: int = 512) -> Request:
    """READ (16)."""
    return struct.pack(">BBQLBB", 0x88, 0, offset // block_size, length // block_size, 0, 0), None, length


def write(offset: int, data: bytes, block_size: int = 512) -> Request:
    """WRITE (16)."""
    return struct.pack(">BBQLBB", 0x8A, 0, offset // block_size, len(data) // block_size, 0, 0), data, 0


@asynccontextmanager
async def served(handler: BlockHandler) -> AsyncIterator[_native.Simulator]:
    """Opens a handler and serves it; at the end it is closed."""
    kernel = _native.Simulator(checks=False)
    async with handler, trio.open_nursery() as nursery:
        device: Device = await nursery.start(serve, handler, kernel)
        yield kernel
        device.stop()
    assert not kernel.violations, kernel.violations


async def drive(kernel: _native.Simulator, requests: Iterable[Request], depth: int) -> int:
    """Keeps `depth` commands outstanding until there are no more; returns how many were done, all of them GOOD."""
    rest: Iterator[Request] = iter(requests)
    outstanding = done = 0
    while True:
        due = list(itertools.islice(rest, depth - outstanding))
        if due:
            kernel.plug()
            for request in due:
                kernel.submit(*request)
            kernel.unplug()
            outstanding += len(due)
        if not outstanding:
            return done
        await trio.lowlevel.wait_readable(kernel.fileno())
        finished = kernel.process_batch()
        outstanding -= finished
        done += finished


def until(seconds: float, requests: Iterable[Request]) -> Iterator[Request]:
    """As many of the requests as fit into some time."""
    end = time.perf_counter() + seconds
    for request in requests:
        if time.perf_counter() >= end:
            return
        yield request
