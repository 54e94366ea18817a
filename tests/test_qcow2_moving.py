"""Compressed clusters that are moved while they are read: never what has got to their place meanwhile."""

from __future__ import annotations

import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio

from tcmu_rs import IoVec
from tcmu_rs.handlers.qcow2 import Qcow2Handler, ZstdHandler, create
from tcmu_rs.handlers.qcow2.codecs import ZLIB
from tcmu_rs.handlers.qcow2.storage import Storage
from tcmu_rs.testing import simulated

from . import qcow2

KIB, MIB = 1 << 10, 1 << 20
CLUSTER = 8 * KIB
RUN = 16 * CLUSTER
"""So much is decompressed in a thread."""


def stamped(cluster: int, version: int) -> bytes:
    """A cluster that says which one it is, and does not compress too well."""
    head = cluster.to_bytes(8, "big") + version.to_bytes(8, "big")
    return (head + random.Random(cluster * 1000 + version).randbytes(CLUSTER // 2)).ljust(CLUSTER, b"x")


class Held(Storage):
    """A file of which a place is read slowly."""

    slow = -1
    waits = threading.Event()
    go_on = threading.Event()

    def preadv(self, offset: int, views: Sequence[Any], *, wait: bool = True) -> int:
        if wait and offset == self.slow:
            self.waits.set()
            assert self.go_on.wait(60)
        return super().preadv(offset, views, wait=wait)


async def test_a_read_that_is_overtaken_finds_what_was_written(tmp_path: Path) -> None:
    """A thread has been told where clusters are, and is slow. Meanwhile they are overwritten, and the old places get
    others. Deflate has no checksum to notice that; and one would be right, of the wrong cluster.
    """
    path = tmp_path / "disk.qcow2"
    qcow2.run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"cluster_size={CLUSTER}", path, 16 * MIB)
    old = b"".join(stamped(cluster, 0) for cluster in range(16))
    options: dict[str, Any] = {"compress": True, "cache_size": RUN, "idle": None, "log_size": 1}
    async with Qcow2Handler(path, **options) as disk:
        assert disk._image is not None and disk._image.header.compression_type == ZLIB
        await disk.write(0, IoVec([old]))
    async with Qcow2Handler(path, storage=Held, **options) as disk:
        image = disk._image
        assert image is not None and isinstance(image.storage, Held)
        places = [image.tables.place(image.tables.entry(cluster)) for cluster in range(16)]
        stored = [image.storage.pread(*place) for place in places]
        target = bytearray(RUN)
        image.storage.slow = places[0][0]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(disk.read, 0, IoVec([target]))
            assert await trio.to_thread.run_sync(image.storage.waits.wait, 60)
            new = b"".join(stamped(cluster, 1) for cluster in range(16))
            await disk.write(0, IoVec([new]))
            await disk.flush()
            at = RUN
            while any(
                image.storage.pread(*place, wait=False) == was for place, was in zip(places, stored, strict=True)
            ):
                assert at < 16 * MIB, "no place was used again"
                await disk.write(at, IoVec([b"".join(stamped(at // CLUSTER + n, 2) for n in range(16))]))
                await disk.flush()
                at += RUN
            assert not any(target)
            image.storage.go_on.set()
        assert target == new
    qcow2.check(path)


@pytest.mark.parametrize("count", [1, 16], ids=["alone", "runs"])
async def test_readers_beside_a_writer_find_their_own_clusters(tmp_path: Path, count: int) -> None:
    """Each cluster says which one it is, and how often it was written: no less than before the read began, no more than
    when it had ended.
    """
    path = tmp_path / "disk.qcow2"
    clusters = 128
    create(path, clusters * CLUSTER, cluster_size=CLUSTER)
    begun = [0] * clusters
    ended = [0] * clusters
    choose = random.Random(count)
    done = False

    async with simulated(ZstdHandler(path, cache_size=RUN, idle=0.001, log_size=1)) as disk:
        await disk.write(0, b"".join(stamped(cluster, 0) for cluster in range(clusters)))

        async def read() -> None:
            while not done:
                first = choose.randrange(clusters - count + 1)
                least = ended[first : first + count]
                found = await disk.read(first * CLUSTER, count * CLUSTER)
                for n in range(count):
                    data = found[n * CLUSTER : (n + 1) * CLUSTER]
                    version = int.from_bytes(data[8:16], "big")
                    assert data == stamped(first + n, version)
                    assert least[n] <= version <= begun[first + n]

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(read)
            for number in range(300):
                cluster = choose.randrange(clusters)
                begun[cluster] += 1
                await disk.write(cluster * CLUSTER, stamped(cluster, begun[cluster]))
                ended[cluster] = begun[cluster]
                if number % 20 == 0:
                    await disk.flush()
            done = True
    qcow2.check(path)
