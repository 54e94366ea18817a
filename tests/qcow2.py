"""What the tests of qcow2 share: images on a recorded medium, and QEMU's tools as judges."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import trio

from tcmu_rs import BlockHandler
from tcmu_rs.handlers.qcow2 import space as space_module
from tcmu_rs.handlers.qcow2.cache import UNIT
from tcmu_rs.handlers.qcow2.handler import Qcow2Handler
from tcmu_rs.handlers.qcow2.header import SECTOR
from tcmu_rs.handlers.qcow2.snapshots import read_snapshots
from tcmu_rs.handlers.qcow2.storage import Storage
from tcmu_rs.handlers.qcow2.tables import COMPRESSED, OFFSET, Tables
from tcmu_rs.handlers.qcow2.writer import _SLACK
from tcmu_rs.testing.crash import Image, Medium


def run(*command: object) -> str:
    """Runs a program, and shows what it said if it fails. Returns what it said."""
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{words} ended with {done.returncode}: {done.stdout}{done.stderr}"
    return done.stdout


def check(path: Path) -> dict[str, Any]:
    """Asserts that `qemu-img check` finds nothing at all, not even a leak."""
    done = subprocess.run(
        ["qemu-img", "check", "--output=json", "-f", "qcow2", str(path)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"qemu-img check: {done.stdout}{done.stderr}"
    found: dict[str, Any] = json.loads(done.stdout)
    return found


class RecordedStorage(Storage):
    """A `Storage` whose file is a `Medium`; and a copy of that, for who reads from a descriptor."""

    def __init__(self, medium: Medium, path: Path) -> None:
        self.medium = medium
        self.path = path
        self.writable = True
        self._fd = -1
        self._guard = threading.Lock()

    def close(self) -> None:
        """Leaves the medium as it is: what was not synced is not durable."""
        if self._fd >= 0:
            os.close(self._fd)

    def fileno(self) -> int:
        with self._guard:
            if self._fd < 0:
                self._fd = os.memfd_create("copy of a medium")
                self.medium.image.save(Path(f"/proc/self/fd/{self._fd}"))
            return self._fd

    @property
    def size(self) -> int:
        return self.medium.size

    @property
    def allocated(self) -> int:
        return self.medium.size

    def preadv(self, offset: int, views: Sequence[Any], *, wait: bool = True) -> int:
        done = 0
        for view in views:
            with memoryview(view).cast("B") as target:
                data = self.medium.pread(len(target), offset + done)
                target[: len(data)] = data
                done += len(data)
        return done

    def pread(self, offset: int, length: int, *, wait: bool = True) -> bytes:
        return self.medium.pread(length, offset)

    def pwrite(self, offset: int, views: Sequence[Any]) -> None:
        # As a kernel does it, in pieces: another thread may see, or sync, the first of them.
        for view in views:
            with self._guard:
                if self._fd >= 0:
                    os.pwrite(self._fd, view, offset)
                offset += self.medium.pwrite(view, offset)

    def fdatasync(self) -> None:
        self.medium.fdatasync()

    async def sync(self) -> None:
        await trio.lowlevel.checkpoint()
        self.fdatasync()
        await trio.lowlevel.checkpoint()

    async def commit(self, offset: int, data: bytes, *, everything: bool) -> None:
        await trio.lowlevel.checkpoint()
        self.pwrite(offset, [data])
        if everything:
            await self.sync()
        else:
            self.sync_range(offset, len(data))
            await trio.lowlevel.checkpoint()

    def sync_range(self, offset: int, length: int) -> None:
        """Makes this durable, and nothing else."""
        self.medium.sync_range(offset, length)

    def truncate(self, size: int) -> None:
        with self._guard:
            if self._fd >= 0:
                os.ftruncate(self._fd, size)
            self.medium.truncate(size)

    def punch(self, offset: int, length: int) -> bool:
        with self._guard:
            self.medium.punch(offset, length)
            if self._fd >= 0:
                assert super().punch(offset, length)
        return True

    def allocate(self, offset: int, length: int) -> bool:
        return True


def audit(disk: Qcow2Handler) -> None:
    """Asserts that what is free for new data is free once, that nothing in use is, and that all counts are right.

    Who takes a place that is in use, or one that somebody else has got too, loses data, but only if the rest of the
    test happens to be unlucky; this needs no luck.
    """
    writer = disk._writer
    if writer is None or writer._session is None:
        return
    image, space, changes = writer._image, writer._space, writer._changes
    header, pages = image.header, image.pages
    size = header.cluster_size
    free = [
        sector
        for holes in (space.holes, space.clusters)
        for start, length in holes.all()
        for sector in range(start, start + length)
    ]
    assert len(free) == len(set(free)), f"free twice: sector {sorted(free)[[*map(sorted(free).count, free)].index(2)]}"
    # Where sectors are not counted, the last cluster may be free as a whole, and the file end in the middle of it.
    end = -(-space.end // size) * size
    used = {sector: "what is not in the file" for sector in free if sector * SECTOR >= end}
    clusters: Counter[int] = Counter()
    sectors: Counter[int] = Counter()

    def keep(offset: int, length: int, what: str) -> range:
        found = range(offset // SECTOR, -(-(offset + length) // SECTOR))
        used.update(dict.fromkeys(found, what))
        return found

    def use(offset: int, length: int, what: str) -> None:
        sectors.update(keep(offset, length, what))
        clusters.update(range(offset // size, -(-(offset + max(length, 1)) // size)))

    def words(offset: int, length: int) -> list[tuple[int, int]]:
        """Those that are not 0, and their numbers."""
        found = array("Q", pages.read(offset, length))
        found.byteswap()
        return [(number, word) for number, word in enumerate(found) if word]

    use(0, size, "the header")
    keep(image.log_range[0], image.log_range[1] - image.log_range[0], "the log")
    if header.crypt_header is not None:
        use(*header.crypt_header, "the encryption header")
    use(header.refcount_offset, header.refcount_clusters * size, "the refcount table")
    for index, offset in words(header.refcount_offset, header.refcount_clusters * size):
        use(offset, size, f"refcount block {index}")
    snapshots = read_snapshots(pages, header)
    if snapshots:
        use(header.snapshots_offset, sum(len(one.pack()) for one in snapshots), "the snapshot table")
    maps = [image.tables] + [
        Tables(pages, header, l1_offset=one.l1_offset, l1_entries=one.l1_entries) for one in snapshots
    ]
    for tables in maps:
        use(tables.l1_offset, tables.l1_entries * 8, "an L1 table")
        for index, _ in words(tables.l1_offset, tables.l1_entries * 8):
            use(tables.table(index), size, f"L2 table {index}")
            for number, entry in words(tables.table(index), size):
                what = f"entry {number} of L2 table {index}"
                if tables.extended and number % 2:
                    continue
                if entry & COMPRESSED:
                    use(*tables.place(entry), what)
                elif entry & OFFSET and not image.payload.external:
                    use(tables.host(entry), size, what)
    for offset, length in changes.dropped:
        keep(offset, length or size, "what a record on its way still names")
    for offset in changes.dropped_metadata:
        keep(offset, size, "metadata that the file still names")
    taken = sorted(used.keys() & set(free))
    assert not taken, f"sector {taken[0]} is free, and belongs to {used[taken[0]]}"
    for cluster in range(max(max(clusters) + 1, end // size)):
        count = changes.refcounts.get(cluster)
        assert count == clusters[cluster], f"host cluster {cluster}: {clusters[cluster]} users, its refcount is {count}"
    for sector, count in sectors.items() if not space._unknown else ():
        if space.knows(sector * SECTOR):
            users = space._users[sector * SECTOR >> space_module._REGION_BITS][sector % space_module._REGION]
            assert users >= min(count, 255), f"sector {sector}: {count} users, {users} are counted"
    cache = writer._cache
    for mask, count in (("logged", cache.logged), ("unlogged", cache.unlogged)):
        assert count == UNIT * sum(getattr(entry, mask).bit_count() for entry in cache.entries.values()), mask
    assert space._reserved == _SLACK * size + sum(entry.cost for entry in cache.entries.values())


class Audited(Qcow2Handler):
    """Is audited when it is opened, and before and after each flush."""

    async def open(self) -> None:
        await super().open()
        audit(self)

    async def flush(self) -> None:
        audit(self)
        await super().flush()
        audit(self)


@contextmanager
def on_medium(medium: Medium, handler_class: type[Qcow2Handler] = Audited, **options: Any) -> Iterator[BlockHandler]:
    """A handler whose image is the medium; what is below it is in files."""
    with TemporaryDirectory() as directory:
        path = Path(options.pop("path", None) or Path(directory, "image"))
        path.touch()

        def storage(name: Path, *, writable: bool) -> Storage:
            return RecordedStorage(medium, path) if Path(name) == path else Storage(name, writable=writable)

        yield handler_class(path, storage=storage, **options)


def judge(image: Image) -> None:
    """Asserts that a closed image is one that QEMU finds no fault with."""
    with TemporaryDirectory() as directory:
        path = Path(directory, "image")
        image.save(path)
        check(path)


def make(path: Path, size: int, *options: object) -> Image:
    """An empty image of qemu-img's."""
    run("qemu-img", "create", "-q", "-f", "qcow2", *options, path, size)
    return Image.load(path)
