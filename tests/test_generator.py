"""The load of benchmarks: what it sends is what the handler gets, and what is not GOOD is told."""

from __future__ import annotations

import random

import pytest

from bench import generator
from tcmu_rs import BlockHandler, IoVec, MediumError

from .conftest import Log

SIZE = 1 << 20
BLOCK = 4096


class Disk(BlockHandler):
    size = SIZE

    def __init__(self) -> None:
        self.data = bytearray(SIZE)
        self.flushes = 0

    async def read(self, offset: int, iov: IoVec) -> None:
        if offset == 0:
            raise MediumError("nobody reads the first block")
        iov.copy_from(self.data[offset : offset + iov.nbytes])

    def write(self, offset: int, iov: IoVec) -> None:
        iov.copy_into(memoryview(self.data)[offset : offset + iov.nbytes])

    def flush(self) -> None:
        self.flushes += 1


@pytest.mark.parametrize("depth", [1, 3, 200])
async def test_each_command_is_done_once(depth: int) -> None:
    chosen = random.Random(depth)
    blocks = {number * BLOCK: chosen.randbytes(BLOCK) for number in chosen.sample(range(SIZE // BLOCK), 100)}
    disk = Disk()
    async with generator.served(disk) as kernel:
        requests = [generator.write(offset, data) for offset, data in blocks.items()]
        assert await generator.drive(kernel, [*requests, generator.FLUSH], depth) == 101
    assert disk.flushes >= 1
    wanted = bytearray(SIZE)
    for offset, data in blocks.items():
        wanted[offset : offset + BLOCK] = data
    assert disk.data == wanted


async def test_it_begins_again_until_the_time_is_over() -> None:
    async with generator.served(Disk()) as kernel:
        assert await generator.drive(kernel, [generator.read(BLOCK, BLOCK)], 4, 0.05) > 4
        assert kernel.outstanding == 0


async def test_what_is_not_good_is_told(log: Log) -> None:
    async with generator.served(Disk()) as kernel:
        with pytest.raises(RuntimeError, match=r"status 0x2, sense \[70, 00, 03"):
            await generator.drive(kernel, [generator.read(0, BLOCK)], 1)
    log.expect("nobody reads the first block")
