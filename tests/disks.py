"""Handlers that tests derive from, and commands to send them."""

from __future__ import annotations

import struct
from collections import defaultdict

import trio

import tcmu_rs
from tcmu_rs import IoVec

BLOCK = 512
GOOD, CHECK_CONDITION, BUSY, TASK_SET_FULL, TASK_ABORTED = 0x00, 0x02, 0x08, 0x28, 0x40

TEST_UNIT_READY = bytes(6)
INQUIRY = bytes([0x12, 0, 0, 0, 96, 0])
SYNCHRONIZE_CACHE = struct.pack(">BBQLBB", 0x91, 0, 0, 0, 0, 0)


def read16(block: int, blocks: int = 1, *, fua: bool = False) -> bytes:
    return struct.pack(">BBQLBB", 0x88, 8 if fua else 0, block, blocks, 0, 0)


def write16(block: int, blocks: int = 1, *, fua: bool = False) -> bytes:
    return struct.pack(">BBQLBB", 0x8A, 8 if fua else 0, block, blocks, 0, 0)


class Storage(tcmu_rs.BlockHandler):
    """Bytes without the methods that would make them a disk."""

    def __init__(self, size: int = 1 << 20) -> None:
        self.size = size
        self.data = bytearray(size)

    def load(self, offset: int, iov: IoVec) -> None:
        iov.copy_from(self.data[offset : offset + iov.nbytes])

    def store(self, offset: int, iov: IoVec) -> None:
        self.data[offset : offset + iov.nbytes] = iov.tobytes()


class PlainDisk(Storage):
    def read(self, offset: int, iov: IoVec) -> None:
        self.load(offset, iov)

    def write(self, offset: int, iov: IoVec) -> None:
        self.store(offset, iov)


class AsyncDisk(Storage):
    max_in_flight = 8

    async def read(self, offset: int, iov: IoVec) -> None:
        await trio.lowlevel.checkpoint()
        self.load(offset, iov)

    async def write(self, offset: int, iov: IoVec) -> None:
        await trio.lowlevel.checkpoint()
        self.store(offset, iov)


class BlockingDisk(Storage):
    max_in_flight = 4

    @tcmu_rs.blocking
    def read(self, offset: int, iov: IoVec) -> None:
        self.load(offset, iov)

    @tcmu_rs.blocking
    def write(self, offset: int, iov: IoVec) -> None:
        self.store(offset, iov)


class Gated(Storage):
    """Each read waits at the gate of its block until the test opens it."""

    def __init__(self, max_in_flight: int = 4) -> None:
        super().__init__()
        self.max_in_flight = max_in_flight
        self.gates: defaultdict[int, trio.Event] = defaultdict(trio.Event)
        self.entered: list[int] = []
        self.cancelled: list[int] = []
        self.running = 0
        self.most = 0

    def open_gate(self, *blocks: int) -> None:
        for block in blocks:
            self.gates[block].set()

    async def read(self, offset: int, iov: IoVec) -> None:
        block = offset // BLOCK
        self.entered.append(block)
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await self.gates[block].wait()
        except trio.Cancelled:
            self.cancelled.append(block)
            raise
        finally:
            self.running -= 1
        self.load(offset, iov)
