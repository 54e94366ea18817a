"""Commands for a served handler on the simulated kernel, many at a time: what it costs is not the figure.

The initiator and the kernel's side, with its copies, are a thread of the process that needs no interpreter: as with the
real kernel they are not the event loop's work, and they compete with it for the processors.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator, Sequence
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


async def drive(
    kernel: _native.Simulator, requests: Sequence[Request], depth: int, seconds: float | None = None
) -> int:
    """Keeps `depth` commands outstanding until there are no more; returns how many were done, all of them GOOD.

    With `seconds` it begins again with the first until the time is over.
    """
    return await trio.to_thread.run_sync(kernel.drive, requests, depth, seconds)
