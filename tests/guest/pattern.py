"""A disk of any size that takes no memory: it knows what each block should be, and remembers only what is not so."""

from __future__ import annotations

import struct

import tcmu_rs
from tcmu_rs import IoVec

BLOCK = 4096


def pattern(block: int) -> bytes:
    """What is written to a block by tests."""
    return struct.pack("<Q", (block + 1) * 0x9E3779B97F4A7C15 % 2**64) * (BLOCK // 8)


class PatternDisk(tcmu_rs.BlockHandler):
    """Keeps a bit for each block: whether its pattern was written. Anything else is refused."""

    size = 1 << 30
    block_size = BLOCK
    max_in_flight = 16

    def __init__(self) -> None:
        self.written = bytearray(self.size // BLOCK)

    async def read(self, offset: int, iov: IoVec) -> None:
        first, count = offset // BLOCK, iov.nbytes // BLOCK
        data = b"".join(pattern(n) if self.written[n] else bytes(BLOCK) for n in range(first, first + count))
        iov.copy_from(data)

    async def write(self, offset: int, iov: IoVec) -> None:
        data = iov.tobytes()
        for at in range(0, len(data), BLOCK):
            block = (offset + at) // BLOCK
            if data[at : at + BLOCK] != pattern(block):
                raise tcmu_rs.MediumError(f"block {block} is not what was written")
            self.written[block] = 1

    async def flush(self) -> None:
        pass
