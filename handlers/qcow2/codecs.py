"""Compression: what is stored of clusters, and back."""

from __future__ import annotations

import errno
import zlib
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from functools import partial

import trio

from tcmu_rs import DamagedFrameError, IoVec, ZstdFrames

from .storage import Buffer, Storage

ZLIB, ZSTD = 0, 1
LEVEL = {ZLIB: 1, ZSTD: 2}
"""What is used if nobody says."""
_LARGE = 128 << 10
"""Bytes to inflate that are worth a thread."""

Place = tuple[int, int]
"""First byte, and how many there are."""


class Codec:
    """Compresses and decompresses clusters; may be used from several threads.

    Args:
        kind: The compression type of the image: `ZLIB` or `ZSTD`.
        cluster_size: Bytes of a cluster.
        level: Of compression, if it is not the usual one.
    """

    def __init__(self, kind: int, cluster_size: int, level: int | None = None) -> None:
        self.kind = kind
        self._level = LEVEL[kind] if level is None else level
        self._size = cluster_size
        self._frames = ZstdFrames(cluster_size, self._level if kind == ZSTD else 1)

    def at_level(self, level: int) -> Codec:
        """The same for another level."""
        return Codec(self.kind, self._size, level)

    def read(self, storage: Storage, places: Sequence[Place], iov: IoVec, within: int) -> Awaitable[None]:
        """Reads clusters that follow each other on the disk out of the file: to be awaited.

        Others run meanwhile: the clusters have to stay where they are, or what is read is not known.

        Args:
            storage: The file.
            places: Where each cluster is in it; there may be up to a sector more than its compressed form.
            iov: Where they go.
            within: First byte of the first cluster that is wanted.

        Raises:
            DamagedFrameError: A cluster is damaged.
            OSError: The file cannot be read.
        """
        if self.kind == ZSTD:
            return self._frames.read_from(storage.fileno(), places, iov, within)
        return self._inflate_all(storage, places, iov, within)

    async def _inflate_all(self, storage: Storage, places: Sequence[Place], iov: IoVec, within: int) -> None:
        if len(places) * self._size < _LARGE:
            with suppress(BlockingIOError):
                self._inflate(storage, places, iov, within, wait=False)
                return
        # Of several large reads one is decompressed beside the other.
        await trio.to_thread.run_sync(partial(self._inflate, wait=True), storage, places, iov, within)

    def _inflate(self, storage: Storage, places: Sequence[Place], iov: IoVec, within: int, *, wait: bool) -> None:
        at = 0
        for number, (offset, length) in enumerate(places):
            step = min(self._size - within, iov.nbytes - at)
            stored = storage.pread(offset, length, wait=wait)
            if not wait and len(stored) < length:
                # The end of the file, or of what is in memory.
                stored += storage.pread(offset + len(stored), length - len(stored), wait=False)
            if not self.decompress(stored, ((0, len(stored)),), iov.slice(at, at + step), within):
                raise DamagedFrameError(f"cluster {number}, at byte {offset} of the file, is damaged", number)
            at += step
            within = 0

    def decompress(self, stored: Buffer, places: Sequence[Place], iov: IoVec, within: int) -> int:
        """Decompresses clusters that follow each other on the disk; what follows their compressed form is ignored.

        Args:
            stored: What was read of the file.
            places: Where each cluster is in that.
            iov: Where they go.
            within: First byte of the first cluster that is wanted.

        Returns:
            How many were right. If it is less than there are, the next one is damaged.
        """
        if self.kind == ZSTD:
            return self._frames.decompress(stored, places, iov, within)
        view = memoryview(stored)
        at = 0
        for number, (start, length) in enumerate(places):
            try:
                # The window is that of QEMU, 2^12, or larger.
                found = zlib.decompressobj(-15).decompress(view[start : start + length], self._size)
            except zlib.error:
                return number
            if len(found) != self._size:
                return number
            step = min(self._size - within, iov.nbytes - at)
            iov.slice(at, at + step).copy_from(memoryview(found)[within : within + step])
            at += step
            within = 0
        return len(places)

    def whole(self, stored: Buffer) -> bytes:
        """A cluster; what follows its compressed form is ignored.

        Raises:
            OSError: It is damaged (EIO).
        """
        data = bytearray(self._size)
        if not self.decompress(stored, [(0, len(stored))], IoVec([data]), 0):
            raise damage()
        return bytes(data)

    def compress(self, clusters: Sequence[Buffer]) -> list[tuple[Buffer | None, int]]:
        """What to store of each, and its CRC-32: nothing (`b""`) of zeroes, and None if a plain cluster is better."""
        if self.kind == ZSTD:
            # What cannot be compressed becomes raw blocks, a little longer than the cluster, but with a checksum.
            stored, frames = self._frames.compress(b"".join(clusters))
            view = memoryview(stored)
            found: list[tuple[Buffer | None, int]] = []
            at = 0
            for length, crc in frames:
                found.append((view[at : at + length] if length else b"", crc))
                at += length
            return found
        zeroes = bytes(self._size)
        return [(b"", 0) if cluster == zeroes else self._deflate(cluster) for cluster in clusters]

    def _deflate(self, cluster: Buffer) -> tuple[bytes | None, int]:
        deflate = zlib.compressobj(self._level, zlib.DEFLATED, -12)
        stored = deflate.compress(cluster) + deflate.flush()
        return (stored, zlib.crc32(stored)) if len(stored) <= self._size - 512 else (None, 0)


def damage() -> OSError:
    """What is raised for a cluster that cannot be decompressed."""
    return OSError(errno.EIO, "a compressed cluster is damaged")
