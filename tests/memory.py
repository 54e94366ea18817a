"""What lends memory to Python, all of it, as a program for `rust/check-memory valgrind`; pytest is too slow there."""

from __future__ import annotations

import gc
import logging

import trio

import tcmu_rs
from tcmu_rs import testing

ALL = testing.CAP_OOOC | testing.CAP_READ_LEN | testing.CAP_TMR | testing.CAP_KEEP_BUF


class Disk(tcmu_rs.BlockHandler):
    """Uses an `IoVec` in every way, and keeps views longer than it may."""

    size = 1 << 20
    max_in_flight = 4

    def __init__(self) -> None:
        self.data = memoryview(bytearray(self.size))
        self.kept: list[memoryview] = []
        self.keep = False

    async def read(self, offset: int, iov: tcmu_rs.IoVec) -> None:
        for at, view in zip(range(iov.nbytes), iov, strict=False):
            view[:] = bytes([at]) * len(view)
        iov.copy_from(self.data[offset : offset + iov.nbytes])
        iov.slice(1, 9).zero()
        iov.slice(1, 9).copy_from(self.data[offset + 1 : offset + 9])
        assert bytes(iov) == self.data[offset : offset + iov.nbytes]
        if self.keep:
            self.kept += [iov[0][3:5], memoryview(iov[len(iov) - 1]).cast("H")]

    async def write(self, offset: int, iov: tcmu_rs.IoVec) -> None:
        await trio.lowlevel.checkpoint()
        iov.copy_into(self.data[offset : offset + iov.nbytes])
        tcmu_rs.IoVec([bytearray(10), bytearray(iov.nbytes)]).slice(5, 20).zero()


async def serve(capabilities: int) -> None:
    handler, image = Disk(), bytes(range(256)) * 128
    async with testing.simulated(handler, capabilities=capabilities, ring_size=4096, data_size=256 << 10) as disk:
        await disk.write(0, image)
        async with trio.open_nursery() as nursery:
            for at in range(0, 8192, 512):
                nursery.start_soon(disk.read, at, 8192)
        handler.keep = True
        replies: list[bytes] = []

        async def read() -> None:
            replies.append(await disk.read(4096, 8192))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            # Where buffers cannot be kept the answer waits for the views.
            while len(handler.kept) < 2:
                await trio.lowlevel.checkpoint()
            assert handler.kept[0] == image[4099:4101]
            handler.kept.clear()
        assert replies == [image[4096:12288]]
    gc.collect()


if __name__ == "__main__":
    # That views are kept is the point here.
    logging.getLogger("tcmu_rs").setLevel(logging.ERROR)
    for offered in (ALL, ALL & ~testing.CAP_KEEP_BUF, 0):
        trio.run(serve, offered)
    print("every view was in its place")
