"""What compaction gives back while a disk is in service, when it stops, and that no power cut can tell."""

from __future__ import annotations

import random
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import trio

from tcmu_rs import BlockHandler, IoVec, MediumError
from tcmu_rs.handlers.qcow2 import Qcow2Handler, ZstdHandler, create
from tcmu_rs.handlers.qcow2.compaction import Compactor
from tcmu_rs.testing.crash import Image, Medium, check_power_cuts

from . import qcow2
from .test_qcow2 import check, raw

MIB = 1 << 20
CLUSTER = 8192

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-utils is not installed")


def data_of(number: int) -> bytes:
    """A cluster of which about half is left when it is compressed."""
    return random.Random(number).randbytes(CLUSTER // 2).ljust(CLUSTER, b"x")


async def fragment(disk: Qcow2Handler, size: int = 16 * MIB) -> bytearray:
    """Fills a disk, and discards single clusters all over it: no hole is large."""
    model = bytearray(size)
    for number in range(size // CLUSTER):
        await disk.write(number * CLUSTER, IoVec([data_of(number)]))
        model[number * CLUSTER : (number + 1) * CLUSTER] = data_of(number)
    await disk.flush()
    for number in range(size // CLUSTER):
        if number % 8 not in (0, 5):
            await disk.discard(number * CLUSTER, CLUSTER)
            model[number * CLUSTER : (number + 1) * CLUSTER] = bytes(CLUSTER)
    await disk.flush()
    return model


async def read_all(disk: Qcow2Handler) -> bytearray:
    found = bytearray(disk.size)
    await disk.read(0, IoVec([found]))
    return found


async def test_fragmented_space_is_given_back_while_the_disk_is_idle(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, 16 * MIB, cluster_size=CLUSTER)
    async with ZstdHandler(path, idle=0.01, compaction=1 << 40) as disk:
        model = await fragment(disk)
        for _ in range(3000):
            found = disk.statistics()
            if found["file_bytes"] - 2 * found["log_bytes"] < 3 * MIB:
                break
            await trio.sleep(0.01)
        else:
            pytest.fail(f"it is not given back: {found}")
        assert found["compactions"] and found["moved"]
        assert await read_all(disk) == model
    check(path)
    assert raw(path) == model


async def test_nothing_is_moved_without_need_or_against_the_will(tmp_path: Path) -> None:
    for number, rate in enumerate((0, 1 << 40)):
        path = tmp_path / f"disk{number}.qcow2"
        create(path, 2 * MIB, cluster_size=CLUSTER)
        async with ZstdHandler(path, idle=0.001, compaction=rate) as disk:
            if rate:
                for at in range(0, 2 * MIB, CLUSTER):
                    await disk.write(at, IoVec([data_of(at)]))
            else:
                await fragment(disk, 2 * MIB)
            await disk.flush()
            for _ in range(20):
                await trio.sleep(0.005)
            assert disk.statistics()["moved"] == 0


async def test_it_stops_as_soon_as_somebody_reads(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, 4 * MIB, cluster_size=CLUSTER)
    async with ZstdHandler(path, idle=None) as disk:
        model = await fragment(disk, 4 * MIB)
        writer = disk._writer
        assert writer is not None
        commands = 1
        calls = []

        async def rewrite(clusters: Sequence[int]) -> int:
            nonlocal commands
            calls.append(list(clusters))
            commands += len(calls) == 3
            return await writer._destaging.rewrite(clusters)

        compactor = Compactor(
            writer._image,
            writer._space,
            rewrite=rewrite,
            flush=writer.flush,
            activity=lambda: commands,
            closing=trio.Event(),
            rate=1 << 40,
        )
        await writer._destaging.destage()
        await writer.flush()
        free = writer._space.holes.sectors
        assert not await compactor.run(), "the disk was busy a moment ago"
        assert await compactor.run()
        assert len(calls) == 3
        assert writer._space.holes.sectors >= free, "what was set aside is there again"
        assert not await compactor.run()
        for _ in range(10):
            if not await compactor.run():
                break
        else:
            pytest.fail("it never has enough")
        assert len(calls) > 3
        assert await read_all(disk) == model
    check(path)


async def test_a_damaged_cluster_stays_where_it_is(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, 2 * MIB, cluster_size=CLUSTER)
    async with ZstdHandler(path, idle=None) as disk:
        model = await fragment(disk, 2 * MIB)
    content = bytearray(path.read_bytes())
    wound = content.index(data_of(40)[100:200])
    content[wound] ^= 1
    path.write_bytes(content)
    async with ZstdHandler(path, idle=0.001, compaction=1 << 40) as disk:
        await disk.write(0, IoVec([data_of(0)]))
        await disk.flush()
        for _ in range(3000):
            if disk.statistics()["moved"]:
                break
            await trio.sleep(0.005)
        with pytest.raises(MediumError, match="guest cluster 40 "):
            await disk.read(40 * CLUSTER, IoVec([bytearray(CLUSTER)]))
        found = bytearray(CLUSTER)
        for number in range(2 * MIB // CLUSTER):
            if number != 40:
                await disk.read(number * CLUSTER, IoVec([found]))
                assert found == model[number * CLUSTER : (number + 1) * CLUSTER]


class Eager(qcow2.Audited):
    """Compacts at every flush, whoever is there."""

    moved = 0

    async def flush(self) -> None:
        await super().flush()
        writer = self._writer
        if writer is not None and writer._session is not None and (compactor := writer._upkeep.compactor) is not None:
            compactor._seen, compactor._done_at = compactor._activity(), -1
            compactor._tried.clear()
            before = compactor.moved
            await writer._upkeep.compact()
            Eager.moved += compactor.moved - before


async def test_power_cuts(tmp_path: Path) -> None:
    path = tmp_path / "image"
    create(path, MIB, cluster_size=CLUSTER)
    async with ZstdHandler(path, idle=None) as disk:
        await fragment(disk, MIB)
    image = Image.load(path)

    def serve(medium: Medium) -> AbstractContextManager[BlockHandler]:
        sizes = {"log_size": 192 << 10, "cache_size": 64 << 10}
        return qcow2.on_medium(medium, Eager, compress=True, idle=0.002, compaction=1 << 40, **sizes)

    for seed in range(2):
        await check_power_cuts(
            serve, image, seed=seed, lives=2, cuts=8, operations=50, garbage=0.1, spared={0}, judge=qcow2.judge
        )
    assert Eager.moved > 30
