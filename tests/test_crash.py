"""What the shipped handlers have acknowledged survives power cuts, and the explorer finds those that lie about it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest

from tcmu_rs import BlockHandler, IoVec
from tcmu_rs.handlers.file import FileHandler
from tcmu_rs.handlers.luks import LuksHandler
from tcmu_rs.testing.crash import (
    Change,
    Cut,
    Image,
    LostWrite,
    Medium,
    MediumDisk,
    Sync,
    check_power_cuts,
    recorded_file,
)
from tcmu_rs.testing.faults import Faulty, Rule, Store

from . import luks

SIZE = 256 << 10

needs_fuse = pytest.mark.skipif(
    (os.geteuid() != 0 or not Path("/dev/fuse").exists()) and os.environ.get("CI") != "true",
    reason="FUSE and root are needed",
)


# The medium.


def test_an_image_is_like_bytes(tmp_path: Path) -> None:
    random = Random(1)
    image, model = Image(100_000), bytearray(100_000)
    for _ in range(300):
        offset, length = random.randrange(len(model) + 5000), random.randrange(40_000)
        match random.choice(["write", "zero", "resize", "read"]):
            case "write":
                data = random.randbytes(length)
                image.write(offset, data)
                model.extend(bytes(max(offset + length - len(model), 0)))
                model[offset : offset + length] = data
            case "zero":
                image.zero(offset, length)
                stop = min(offset + length, len(model))
                model[offset:stop] = bytes(max(stop - offset, 0))
            case "resize" if random.random() < 0.3:
                image.resize(offset)
                model = model[:offset].ljust(offset, b"\0")
        assert image.size == len(model)
        assert image.read(offset, length) == model[offset : offset + length]
    image.save(tmp_path / "image")
    assert (tmp_path / "image").read_bytes() == model
    again = Image.load(tmp_path / "image")
    assert again.read(0, again.size) == model


def test_what_a_power_cut_leaves() -> None:
    medium = Medium(Image(4096))
    medium.pwrite(b"a" * 1024, 0)
    begin = medium.begin_sync()
    # Written while the sync ran: it may have missed it.
    medium.pwrite(b"b" * 1024, 1024)
    medium.end_sync(begin)
    medium.pwrite(b"c" * 1024, 512)
    medium.truncate(8192)
    cuts = [Cut(len(medium.history), kept, seed) for seed in range(60) for kept in ("none", "few", "some", "most")]
    left = [medium.after(cut) for cut in cuts]
    contents = {tuple(image.read(at, 512)[:1] for at in range(0, 2048, 512)) for image in left}
    choices = [{b"a"}, {b"a", b"c"}, {b"\0", b"b", b"c"}, {b"\0", b"b"}]
    assert contents <= {(w, x, y, z) for w in choices[0] for x in choices[1] for y in choices[2] for z in choices[3]}
    assert [{content[at] for content in contents} for at in range(4)] == choices
    assert {image.size for image in left} == {4096, 8192}
    everything = medium.after(Cut(len(medium.history), "all"))
    assert everything.read(0, 8192) == medium.image.read(0, 8192)
    assert medium.after(Cut(2, "none")).read(0, 4096) == bytes(4096)
    garbage = medium.after(Cut(len(medium.history), "few", 1, garbage=1.0))
    assert garbage.read(512, 512)[:2] not in (b"aa", b"bb", b"cc")
    assert garbage.read(0, 512) == b"a" * 512


def test_a_synced_range_survives_and_nothing_else_for_certain() -> None:
    medium = Medium(Image(4096))
    medium.pwrite(b"a" * 2048, 0)
    medium.pwrite(b"b" * 1024, 512)
    medium.sync_range(512, 512)
    medium.pwrite(b"c" * 512, 512)
    medium.pwrite(b"d" * 512, 4096)
    cuts = [Cut(3, "none")] + [Cut(5, kept, seed) for seed in range(60) for kept in ("few", "some", "most")]
    left = [medium.after(cut) for cut in cuts]
    assert left[0].read(0, 4096) == bytes(512) + b"b" * 512 + bytes(3072)
    assert {image.read(512, 1) for image in left} == {b"b", b"c"}
    assert {image.read(1024, 1) for image in left} == {b"\0", b"a", b"b"}
    assert {image.read(0, 1) for image in left} == {b"\0", b"a"}
    medium.sync_range(4096, 512)
    assert {medium.after(Cut(6, "few", seed)).size for seed in range(60)} == {4608}


@needs_fuse
def test_a_recorded_file_is_a_file() -> None:
    medium = Medium(Image(1 << 20))
    with recorded_file(medium) as path:
        fd = os.open(path, os.O_RDWR)
        assert os.pwrite(fd, b"x" * 700, 100) == 700
        os.fdatasync(fd)
        os.pwritev(fd, [b"y" * 512, b"z" * 512], 4096, os.RWF_DSYNC)
        os.ftruncate(fd, 2 << 20)
        assert os.fstat(fd).st_size == 2 << 20
        assert os.pread(fd, 1024, 4096) == b"y" * 512 + b"z" * 512
        os.close(fd)
    assert medium.history == [
        Change(100, 700, b"x" * 700, 1 << 20),
        Sync(1),
        Change(4096, 1024, b"y" * 512 + b"z" * 512, 1 << 20),
        Sync(3),
        Change(2 << 20, 0, None, 2 << 20),
    ]


# The shipped handlers.


@contextmanager
def serve_file(medium: Medium) -> Iterator[BlockHandler]:
    with recorded_file(medium) as path:
        yield FileHandler(path)


def serve_luks(version: int, sector_size: int, block_size: int) -> Callable[[Medium], BlockHandler]:
    header = bytes(luks.container(SIZE, version=version, sector_size=sector_size)[:-SIZE])

    def serve(medium: Medium) -> BlockHandler:
        # The data alone is on the medium: the header is never written.
        return LuksHandler(
            Joined(header, MediumDisk(medium)), luks.key, block_size=block_size, allow_discards=sector_size == 512
        )

    return serve


class Joined(MediumDisk):
    """A header that nobody changes, and a medium behind it."""

    def __init__(self, header: bytes, rest: MediumDisk) -> None:
        super().__init__(rest.medium)
        self.header = header
        self.size = len(header) + rest.size

    async def read(self, offset: int, iov: IoVec) -> None:
        own = max(min(iov.nbytes, len(self.header) - offset), 0)
        if own:
            iov.slice(0, own).copy_from(self.header[offset : offset + own])
        if own < iov.nbytes:
            await super().read(max(offset - len(self.header), 0), iov.slice(own, iov.nbytes))

    async def write(self, offset: int, iov: IoVec) -> None:
        await super().write(offset - len(self.header), iov)

    async def discard(self, offset: int, length: int) -> None:
        await super().discard(offset - len(self.header), length)

    write_zeroes = discard


@needs_fuse
async def test_file() -> None:
    summary = await check_power_cuts(serve_file, Image(SIZE), lives=4, cuts=30, operations=90)
    assert summary.cuts == 120 and summary.flushes > 20


@pytest.mark.parametrize(
    ("version", "sector_size", "block_size"), [(2, 4096, 4096), (2, 4096, 512), (2, 512, 512), (1, 512, 512)]
)
async def test_luks(version: int, sector_size: int, block_size: int) -> None:
    await check_power_cuts(serve_luks(version, sector_size, block_size), Image(SIZE), lives=2, cuts=12, operations=60)


@needs_fuse
async def test_file_around_the_page_cache() -> None:
    @contextmanager
    def serve(medium: Medium) -> Iterator[BlockHandler]:
        with recorded_file(medium) as path:
            yield FileHandler(path, direct=True)

    summary = await check_power_cuts(serve, Image(SIZE), lives=2, cuts=12, operations=60)
    assert summary.flushes > 5


async def test_a_layer_over_another() -> None:
    await check_power_cuts(lambda medium: Faulty(MediumDisk(medium)), Image(SIZE), lives=3, cuts=50)


# Those that lie: the first line of each docstring is what has to be found.


class ForgetsToSync(FileHandler):
    """instead of '<"""

    async def flush(self) -> None: ...


class SyncsTooEarly(MediumDisk):
    """instead of"""

    async def flush(self) -> None:
        self.medium.fdatasync()
        # What it has acknowledged meanwhile belongs to the next flush; but this was acknowledged before.
        for offset, data in self.late:
            self.medium.pwrite(data, offset)
        self.late.clear()

    def __init__(self, medium: Medium) -> None:
        super().__init__(medium)
        self.late: list[tuple[int, bytes]] = []

    async def read(self, offset: int, iov: IoVec) -> None:
        data = bytearray(self.medium.pread(iov.nbytes, offset))
        for at, late in self.late:
            start, stop = max(at, offset), min(at + len(late), offset + iov.nbytes)
            if start < stop:
                data[start - offset : stop - offset] = late[start - at : stop - at]
        iov.copy_from(data)

    async def write(self, offset: int, iov: IoVec) -> None:
        self.late.append((offset, iov.tobytes()))

    async def discard(self, offset: int, length: int) -> None:
        self.late.append((offset, bytes(length)))

    write_zeroes = discard


class IgnoresFua(MediumDisk):
    """instead of '<"""

    native_fua = True

    async def write(self, offset: int, iov: IoVec, *, fua: bool = False) -> None:
        await super().write(offset, iov)


class SaysItHasNoCache(MediumDisk):
    """instead of"""

    can_flush = False


class WritesMoreThanItShould(MediumDisk):
    """instead of"""

    async def write(self, offset: int, iov: IoVec) -> None:
        # The neighbourhood is rewritten as it was, but by way of zeroes.
        start = offset // 4096 * 4096
        length = min(-(-(offset + iov.nbytes - start) // 4096) * 4096, self.size - start)
        around = bytearray(self.medium.pread(length, start))
        self.medium.pwrite(bytes(length), start)
        around[offset - start : offset - start + iov.nbytes] = iov.tobytes()
        self.medium.pwrite(around, start)


class ChangesItsMind(MediumDisk):
    """when it was opened first, and then|instead of"""

    async def open(self) -> None:
        # The first sector that differs from its copy is taken from there, half of the time.
        first, copy = self.medium.pread(512, 0), self.medium.pread(512, self.size - 512)
        if first != copy:
            self.medium.pwrite(copy if first[:1] < copy[:1] else first, 0)


class DoesNotOpenTwice(MediumDisk):
    """is dirty"""

    def __init__(self, medium: Medium) -> None:
        super().__init__(medium)
        self.size -= 512

    async def open(self) -> None:
        if self.medium.pread(1, self.size) == b"\2":
            raise ValueError("it is dirty")
        self.medium.pwrite(b"\2", self.size)

    async def aclose(self) -> None:
        self.medium.pwrite(b"\0", self.size)
        await super().aclose()


@pytest.mark.parametrize(
    "disk_class",
    [SyncsTooEarly, IgnoresFua, SaysItHasNoCache, WritesMoreThanItShould, ChangesItsMind, DoesNotOpenTwice],
)
async def test_those_that_lie_are_caught(disk_class: type[MediumDisk]) -> None:
    with pytest.raises(LostWrite, match=disk_class.__doc__) as caught:
        await check_power_cuts(disk_class, Image(SIZE), lives=6, cuts=40, operations=60)
    # What is needed to look into it.
    assert caught.value.image.size == SIZE
    assert caught.value.history


@needs_fuse
async def test_a_flush_without_fdatasync_is_caught() -> None:
    @contextmanager
    def serve(medium: Medium) -> Iterator[BlockHandler]:
        with recorded_file(medium) as path:
            yield ForgetsToSync(path)

    with pytest.raises(LostWrite, match=ForgetsToSync.__doc__):
        await check_power_cuts(serve, Image(SIZE), lives=6, cuts=40, operations=60)


async def test_a_lost_flush_is_caught() -> None:
    def serve(medium: Medium) -> BlockHandler:
        return Faulty(MediumDisk(medium), [Rule(on="flush", skip=3, store=Store.NONE)])

    with pytest.raises(LostWrite):
        await check_power_cuts(serve, Image(SIZE), lives=6, cuts=40, operations=60)


async def test_a_judge_has_a_say() -> None:
    seen = []

    def judge(image: Image) -> None:
        seen.append(image.size)
        if len(seen) == 5:
            raise ValueError("the judge has found fault")

    with pytest.raises(LostWrite, match="found fault"):
        await check_power_cuts(MediumDisk, Image(SIZE), judge=judge)


async def test_the_same_seed_finds_the_same() -> None:
    found = []
    for _ in range(2):
        with pytest.raises(LostWrite) as caught:
            await check_power_cuts(SyncsTooEarly, Image(SIZE), seed=4, tasks=1, lives=6, cuts=40)
        found.append((str(caught.value), caught.value.image.read(0, SIZE)))
    assert found[0] == found[1]
