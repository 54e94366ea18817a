"""A file that says it is a qcow2 image: its header, its tables, its snapshots, its compressed clusters.

An input is the file, so `qemu-img info FINDING` has something to say to it. It is opened, read, looked through, and
written to. All of that ends in a documented exception, or works; and if the check finds nothing wrong with the image,
everything has to work, and what was written has to be there.
"""

from __future__ import annotations

import errno
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from random import Random
from typing import Any

import trio

from tcmu_rs import IoVec, ScsiError
from tcmu_rs.handlers.qcow2 import Qcow2Error
from tcmu_rs.handlers.qcow2.chain import open_image
from tcmu_rs.handlers.qcow2.handler import Qcow2Handler
from tcmu_rs.handlers.qcow2.offline import check_image, describe
from tcmu_rs.handlers.qcow2.storage import Storage

SIZE = 64 << 10
"""Bytes of a disk that are looked at."""
ROOM = 8 << 20
"""Bytes of the file system."""
DOCUMENTED = (Qcow2Error, OSError, ScsiError)

_directory = tempfile.TemporaryDirectory()
PATH = Path(_directory.name, "image")
PATH.touch()


class File(Storage):
    """A `Storage` in memory, on a file system that is soon full."""

    def __init__(self, data: bytearray) -> None:
        self.data = data
        self.path = PATH
        self.writable = True

    def close(self) -> None:
        pass

    @property
    def size(self) -> int:
        return len(self.data)

    @property
    def allocated(self) -> int:
        return len(self.data)

    def preadv(self, offset: int, views: Sequence[Any], *, wait: bool = True) -> int:
        _check(offset)
        done = 0
        for view in views:
            with memoryview(view).cast("B") as target:
                data = self.data[offset + done : offset + done + len(target)]
                target[: len(data)] = data
                done += len(data)
        return done

    def pread(self, offset: int, length: int, *, wait: bool = True) -> bytes:
        _check(offset)
        return bytes(self.data[offset : offset + length])

    def pwrite(self, offset: int, views: Sequence[Any]) -> None:
        data = b"".join(bytes(view) for view in views)
        self._make_room(offset + len(data))
        self.data.extend(bytes(max(0, offset - len(self.data))))
        self.data[offset : offset + len(data)] = data

    def fdatasync(self) -> None:
        pass

    def truncate(self, size: int) -> None:
        self._make_room(size)
        del self.data[size:]
        self.data.extend(bytes(size - len(self.data)))

    def punch(self, offset: int, length: int) -> bool:
        stop = min(offset + length, len(self.data))
        if offset < stop:
            self.data[offset:stop] = bytes(stop - offset)
        return True

    def allocate(self, offset: int, length: int) -> bool:
        self._make_room(offset + length)
        return True

    def _make_room(self, size: int) -> None:
        if size > ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))


def _check(offset: int) -> None:
    # As pread(2) does.
    if not 0 <= offset < 1 << 63:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def opener(data: bytearray) -> Callable[..., Storage]:
    """What opens the image; there are no other files."""

    def storage(path: Path, *, writable: bool) -> Storage:
        if Path(path) != PATH:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
        return File(data)

    return storage


def look(data: bytearray) -> bool:
    """Describes the image and looks through it; returns whether it opens, and nothing is wrong with it."""
    try:
        image = open_image(PATH, writable=False, storage=opener(data))
    except DOCUMENTED:
        return False
    try:
        found = describe(image)
    except DOCUMENTED:
        return False
    finally:
        image.close()
    for number in list(found["snapshots"])[:2]:
        trio.run(read_all, Qcow2Handler(PATH, storage=opener(data), snapshot=number))
    try:
        return not check_image(PATH, storage=opener(data))
    except DOCUMENTED:
        return False


async def read_all(handler: Qcow2Handler) -> dict[int, bytes | None]:
    """What the start of the disk has, by 4 KiB; None where it cannot be read."""
    found: dict[int, bytes | None] = {}
    try:
        await handler.open()
    except DOCUMENTED:
        return found
    try:
        for offset in range(0, min(handler.size, SIZE), 4096):
            data = bytearray(min(4096, handler.size - offset))
            try:
                await handler.read(offset, IoVec([data]))
                found[offset] = bytes(data)
            except DOCUMENTED:
                found[offset] = None
        await handler.extents(0, min(handler.size, SIZE) or 512)
    except DOCUMENTED:
        pass
    finally:
        await handler.aclose()
    return found


async def change(handler: Qcow2Handler) -> dict[int, bytes] | None:
    """Writes, discards, and flushes; returns by sector what has to be there, None if something did not work."""
    random = Random(1)
    written: dict[int, bytes] = {}
    try:
        async with handler:
            sectors = min(handler.size, SIZE) // 512
            if not sectors:
                return None
            for number in range(8):
                first = random.randrange(sectors)
                count = min(random.choice([1, 1, 2, 9]), sectors - first)
                if number % 4 == 3:
                    await handler.discard(first * 512, count * 512)
                    data = bytes(count * 512)
                else:
                    data = random.randbytes(256) * (2 * count)
                    await handler.write(first * 512, IoVec([data]))
                for at in range(count):
                    written[first + at] = data[at * 512 : at * 512 + 512]
                if number % 3 == 2:
                    await handler.flush()
    except DOCUMENTED:
        return None
    return written


def one_input(data: bytes) -> None:
    good = look(bytearray(data))
    before = trio.run(read_all, Qcow2Handler(PATH, storage=opener(bytearray(data)), read_only=True))
    for compress in (False, True):
        changed = bytearray(data)
        handler = Qcow2Handler(PATH, storage=opener(changed), compress=compress, idle=None, log_size=1)
        written = trio.run(change, handler)
        if not good or written is None or len(changed) >= ROOM:
            continue
        # Nothing was wrong with it, and nothing went wrong.
        assert look(changed), check_image(PATH, storage=opener(changed))
        after = trio.run(read_all, Qcow2Handler(PATH, storage=opener(changed), read_only=True))
        assert after.keys() == before.keys()
        for offset, found in after.items():
            expected = before[offset]
            assert found is not None and expected is not None, f"byte {offset} cannot be read"
            for at in range(0, len(found), 512):
                wanted = written.get((offset + at) // 512, expected[at : at + 512])
                assert found[at : at + 512] == wanted, f"byte {offset + at} is not what was there or was written"


def seeds() -> Iterator[bytes]:
    """Images of qemu-img's and of ours, as small as they can be."""
    random = Random(2)
    raw = b"".join(random.choice([bytes(512), b"text" * 128, random.randbytes(512)]) for _ in range(16))
    with tempfile.TemporaryDirectory() as directory:
        source, image, backed = (Path(directory, name) for name in ("raw", "image", "backed"))
        source.write_bytes(raw)
        for options in (
            "cluster_size=512",
            "cluster_size=512,compat=0.10",
            "cluster_size=512,refcount_bits=1",
            "cluster_size=512,refcount_bits=64",
            "cluster_size=512,lazy_refcounts=on",
            "cluster_size=512,compression_type=zstd",
            "cluster_size=1024,compression_type=zstd",
            "cluster_size=2048",
        ):
            for flags in ((), ("-c",)):
                convert: list[str | Path] = [
                    "qemu-img",
                    "convert",
                    *flags,
                    "-f",
                    "raw",
                    "-O",
                    "qcow2",
                    "-o",
                    options,
                    source,
                    image,
                ]
                subprocess.run(convert, check=True)
                yield image.read_bytes()
                if not flags and "=1," not in options and "bits=1" not in options:
                    subprocess.run(["qemu-img", "snapshot", "-c", "name", image], check=True)
                    subprocess.run(["qemu-io", "-c", "write -P 1 512 2048", image], check=True, capture_output=True)
                    yield image.read_bytes()
        create: list[str | Path] = [
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "cluster_size=512",
            "-b",
            image,
            "-F",
            "qcow2",
        ]
        subprocess.run([*create, backed], check=True)
        yield backed.read_bytes()
