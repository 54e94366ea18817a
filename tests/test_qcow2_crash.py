"""What `qcow2:` and `zstd:` have acknowledged survives power cuts, and QEMU finds no fault with what is left."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from tcmu_rs import BlockHandler, IoVec, Lower
from tcmu_rs.handlers.luks import LuksHandler
from tcmu_rs.handlers.qcow2 import Qcow2Handler, scanner, space, upkeep
from tcmu_rs.handlers.qcow2 import log as log_module
from tcmu_rs.handlers.qcow2.changes import Changes
from tcmu_rs.handlers.qcow2.log import Record
from tcmu_rs.handlers.qcow2.offline import change_map, resize
from tcmu_rs.handlers.qcow2.pages import Pages
from tcmu_rs.handlers.qcow2.recorder import Recorder
from tcmu_rs.handlers.qcow2.storage import Storage
from tcmu_rs.testing.crash import Cut, LostWrite, Medium, check_power_cuts, recorded_file

from . import luks, qcow2
from .conftest import Log
from .test_crash import needs_fuse

SIZE = 256 << 10
SEEDS = range(int(os.environ.get("TCMU_SEEDS", "1")))

IMAGES: dict[str, tuple[list[str], dict[str, Any]]] = {
    "plain": (["-o", "cluster_size=4k"], {}),
    "plain, 64 KiB": ([], {}),
    "compressed": (["-o", "cluster_size=8k,compression_type=zstd"], {"compress": True}),
    "compressed, 512": (["-o", "cluster_size=512,compression_type=zstd"], {"compress": True}),
    "deflate": (["-o", "cluster_size=4k,compression_type=zlib"], {"compress": True}),
    "refcounts of 1 bit": (["-o", "cluster_size=4k,refcount_bits=1"], {}),
    "subclusters": (["-o", "cluster_size=16k,extended_l2=on"], {}),
    "version 2": (["-o", "cluster_size=4k,compat=0.10"], {"compress": True}),
}
# So small that all of the log and the cache are used.
SMALL: dict[str, Any] = {"log_size": 192 << 10, "cache_size": 64 << 10, "idle": 0.002}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("kind", IMAGES)
async def test_power_cuts(kind: str, seed: int, tmp_path: Path) -> None:
    create, options = IMAGES[kind]
    image = qcow2.make(tmp_path / "image", SIZE, *create)

    def serve(medium: Medium) -> AbstractContextManager[BlockHandler]:
        return qcow2.on_medium(medium, **SMALL, **options)

    # Where data is overwritten in place, and in sector 0, the format has no remedy.
    garbage = 0.1 if kind.startswith("compressed") else 0.0
    summary = await check_power_cuts(
        serve, image, seed=seed, lives=4, cuts=12, operations=80, garbage=garbage, spared={0}, judge=qcow2.judge
    )
    assert summary.recoveries_cut


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("cluster", ["8k", "32k"])
async def test_power_cuts_in_a_large_image(
    cluster: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Large are images that are looked through while they are changed, and of which not all sectors are counted; large
    # clusters are those of two regions. So what takes gigabytes is made small.
    monkeypatch.setattr(upkeep, "_SMALL", 0)
    monkeypatch.setattr(scanner, "_CLUSTERS_AT_ONCE", 2)
    small = {"_REGION_BITS": 14, "_REGION": 32, "_MAX_REGIONS": 16, "_UNIT": 8, "_FRAGMENTED": 2, "_EXACT": 8}
    for name, value in {**small, "_LARGE": bytes(8)}.items():
        monkeypatch.setattr(space, name, value)
    image = qcow2.make(tmp_path / "image", SIZE, "-o", f"cluster_size={cluster},compression_type=zstd")

    def serve(medium: Medium) -> AbstractContextManager[BlockHandler]:
        return qcow2.on_medium(medium, **{**SMALL, "cache_size": 256 << 10}, compress=True)

    await check_power_cuts(
        serve, image, seed=seed, lives=4, cuts=8, operations=150, garbage=0.1, spared={0}, judge=qcow2.judge
    )


async def test_what_recovery_frees_is_free_once(tmp_path: Path) -> None:
    # What was freed when the clusters in the log were written back was free, and was found to be free when the image
    # was looked through after that. So two got the same place.
    medium = Medium(qcow2.make(tmp_path / "image", SIZE, *IMAGES["compressed"][0]))
    with qcow2.on_medium(medium, compress=True) as handler:
        async with Lower(handler) as lower:
            await lower.write(0, IoVec([Random(1).randbytes(SIZE)]))
    with qcow2.on_medium(medium, compress=True) as handler:
        async with Lower(handler) as lower:
            for cluster in range(0, SIZE, 16384):
                await lower.write(cluster, IoVec([bytes(512)]))
            await lower.flush()
            left = medium.image.copy()
    with qcow2.on_medium(Medium(left), compress=True) as handler:
        async with Lower(handler):
            # This is audited.
            assert isinstance(handler, Qcow2Handler)
            assert handler.was_replayed
            assert handler.statistics()["free_bytes"]


async def test_what_recovery_would_not_read_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    # A snapshot of a disk of many TiB has more tables in its record than are decompressed. The record was written and
    # then the tables in place, and after a power cut some of these were new and others old.
    monkeypatch.setattr(log_module, "_MAX_PAGES", 16 << 10)
    path = tmp_path / "image"
    medium = Medium(qcow2.make(path, 16 << 20, "-o", "cluster_size=4k"))

    def storage(name: Path, *, writable: bool) -> Storage:
        return qcow2.RecordedStorage(medium, path)

    async with Qcow2Handler(path, idle=None, storage=storage) as disk:
        for table in range(8):
            await disk.write(table << 21, IoVec([b"x" * 4096]))
            await disk.flush()
            await disk._writer._commits.checkpoint()  # type: ignore[union-attr]
    start = len(medium.history)
    with pytest.raises(OSError, match="are too many for a record"):
        await change_map(path, lambda branching: branching.create_snapshot("one"), storage=storage)
    for after in range(start, len(medium.history), 4):
        medium.after(Cut(after, "all", 0, 0.0, frozenset({0}))).save(path)
        async with Qcow2Handler(path, idle=None):
            pass
        qcow2.check(path)
    log.records.clear()


@pytest.mark.parametrize("version", ["0.10", "1.1"])
async def test_growing_over_a_larger_backing_file_shows_nothing_of_it(version: str, tmp_path: Path) -> None:
    # The size was changed first, and then what is below was covered. A power cut between left a disk that showed it,
    # and to grow it once more did nothing, as it had that size.
    path, below = tmp_path / "image", tmp_path / "base"
    below.write_bytes(b"below" * SIZE)
    old = 64 << 10
    medium = Medium(qcow2.make(path, old, "-b", below, "-F", "raw", "-o", f"cluster_size=4k,compat={version}"))

    def storage(name: Path, *, writable: bool) -> Storage:
        return qcow2.RecordedStorage(medium, path) if Path(name) == path else Storage(name, writable=writable)

    await resize(path, SIZE, storage=storage)
    events = len(medium.history)
    sizes = set()
    for after in [*range(1, events, max(1, events // 40)), events]:
        medium.after(Cut(after, "all", 0, 0.0, frozenset({0}))).save(path)
        async with Qcow2Handler(path, idle=None) as disk:
            sizes.add(disk.size)
            found = bytearray(disk.size - old)
            await disk.read(old, IoVec([found]))
            assert not any(found)
        qcow2.check(path)
    assert sizes == {old, SIZE}


@pytest.mark.parametrize("kind", ["plain", "compressed"])
async def test_luks_over_qcow2(kind: str, tmp_path: Path) -> None:
    create, options = IMAGES[kind]
    container = luks.container(SIZE, key_size=32)
    medium = Medium(qcow2.make(tmp_path / "image", len(container), *create))
    with qcow2.on_medium(medium, **options) as handler:
        async with Lower(handler) as lower:
            for at in range(0, len(container), 4096):
                if any(container[at : at + 4096]):
                    await lower.write(at, IoVec([container[at : at + 4096]]))

    @contextmanager
    def serve(medium: Medium) -> Iterator[BlockHandler]:
        with qcow2.on_medium(medium, **SMALL, **options) as lower:
            yield LuksHandler(lower, luks.key, block_size=512)

    await check_power_cuts(serve, medium.image, lives=2, cuts=5, operations=40, judge=qcow2.judge)


class Lies(qcow2.RecordedStorage):
    """Says that all is durable, every third time without having seen to it."""

    calls = 0

    def fdatasync(self) -> None:
        self.calls += 1
        if self.calls % 3:
            super().fdatasync()


async def test_an_fdatasync_left_out_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qcow2, "RecordedStorage", Lies)
    image = qcow2.make(tmp_path / "image", SIZE, "-o", "cluster_size=8k,compression_type=zstd")

    def serve(medium: Medium) -> AbstractContextManager[BlockHandler]:
        return qcow2.on_medium(medium, **SMALL, compress=True)

    with pytest.raises(LostWrite):
        await check_power_cuts(serve, image, lives=6, cuts=30, operations=80, judge=qcow2.judge)


@needs_fuse
async def test_a_real_file(tmp_path: Path) -> None:
    """Through FUSE: whatever system calls the engine uses, and its own `Storage` too."""
    image = qcow2.make(tmp_path / "image", SIZE, "-o", "cluster_size=8k,compression_type=zstd")

    @contextmanager
    def serve(medium: Medium) -> Iterator[BlockHandler]:
        with recorded_file(medium) as path:
            yield Qcow2Handler(path, compress=True, **SMALL)

    await check_power_cuts(serve, image, lives=2, cuts=10, operations=60, judge=qcow2.judge)


def forget_the_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    take = Recorder.take

    def without(self: Recorder, **which: bool) -> Any:
        record, *rest = take(self, **which)
        record.pieces = []
        return record, *rest

    monkeypatch.setattr(Recorder, "take", without)


def forget_what_is_settled(monkeypatch: pytest.MonkeyPatch) -> None:
    take = Recorder.take

    def without(self: Recorder, **which: bool) -> Any:
        record, *rest = take(self, **which)
        record.settled = []
        return record, *rest

    monkeypatch.setattr(Recorder, "take", without)


def use_freed_space_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    change = Changes._map

    def early(self: Changes, cluster: int, entry: int, bitmap: int) -> None:
        change(self, cluster, entry, bitmap)
        dropped, self.dropped = self.dropped, []
        for offset, length in dropped:
            self.pending.discard(offset)
            if length:
                self._space.free(offset, length)
            else:
                self._space.free_cluster(offset)

    monkeypatch.setattr(Changes, "_map", early)


def trust_the_last_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_module, "_arrived", lambda *_: True)


def write_no_images(monkeypatch: pytest.MonkeyPatch) -> None:
    take = Pages.take_changes

    def only_changes(self: Pages, *, images: bool = False) -> Any:
        return take(self, images=False)

    monkeypatch.setattr(Pages, "take_changes", only_changes)


def make_the_record_durable_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Record, "needs_data", False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "leave_out",
    [
        forget_the_pieces,
        forget_what_is_settled,
        use_freed_space_at_once,
        trust_the_last_record,
        write_no_images,
        make_the_record_durable_alone,
    ],
)
async def test_a_rule_of_the_real_code_left_out_is_found(
    leave_out: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    leave_out(monkeypatch)
    image = qcow2.make(tmp_path / "image", SIZE, "-o", "cluster_size=8k,compression_type=zstd")

    def serve(medium: Medium) -> AbstractContextManager[BlockHandler]:
        return qcow2.on_medium(medium, **SMALL, compress=True)

    with pytest.raises(LostWrite):
        for seed in range(12):
            await check_power_cuts(
                serve, image, seed=seed, lives=4, cuts=20, operations=80, garbage=0.1, spared={0}, judge=qcow2.judge
            )
    log.records.clear()
