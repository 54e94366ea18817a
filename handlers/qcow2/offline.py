"""What is done to images that are not served: checks, snapshots, another size, and packing them anew."""

from __future__ import annotations

import functools
import os
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

import trio

from tcmu_rs import IoVec, MediumError

from ._errors import Qcow2Error
from .branching import Branching
from .chain import open_image
from .codecs import LEVEL
from .header import CORRUPT, DATA_FILE, DIRTY, LAZY_REFCOUNTS
from .image import Image, Kind
from .payload import Locked
from .refcounts import Refcounts
from .snapshots import read_snapshots
from .tables import COMPRESSED, OFFSET, Tables
from .tools import create
from .writer import Writer

Progress = Callable[[float], None]
"""Called with how much is done, from 0 to 1."""
_MAX_PROBLEMS = 100
_REGION_BITS = 12
_REGION_MASK = (1 << _REGION_BITS) - 1
_COPY = 1 << 20


def describe(image: Image) -> dict[str, Any]:
    """An image for people and programs: what the header says, and what the file takes."""
    header = image.header
    features = {
        "dirty": header.incompatible & DIRTY,
        "corrupt": header.incompatible & CORRUPT,
        "lazy refcounts": header.compatible & LAZY_REFCOUNTS,
        "extended L2": header.extended_l2,
        "external data file": header.incompatible & DATA_FILE,
        "log": header.log is not None,
    }
    return {
        "version": header.version,
        "size": header.size,
        "file size": image.storage.size,
        "allocated": image.storage.allocated,
        "cluster size": header.cluster_size,
        "compression": header.compression_name(),
        "level": header.level or LEVEL[header.compression_type],
        "refcount bits": 1 << header.refcount_order,
        "backing file": header.backing,
        "backing format": header.backing_format,
        "data file": header.data_file,
        "features": ", ".join(name for name, there in features.items() if there),
        "snapshots": {one.id: one.name for one in read_snapshots(image.pages, header)},
    } | _encryption(image)


def _encryption(image: Image) -> dict[str, Any]:
    if not image.header.crypt_method:
        return {}
    from .encryption import describe_encryption

    return {"encryption": describe_encryption(image.storage, image.header)}


class _Check:
    """Counts the users of every host cluster, and reads everything that has a checksum."""

    def __init__(self, image: Image, progress: Progress | None) -> None:
        self.problems: list[str] = []
        self._image = image
        self._header = image.header
        self._progress = progress
        self._bits = image.header.cluster_bits
        self._cluster_size = image.header.cluster_size
        self._refcounts = Refcounts(image.pages, image.header)
        # By regions of host clusters, so that memory goes with the file and not with the disk.
        self._users: dict[int, array[int]] = {}
        self._done = 0.0
        self._told = 0.0

    def run(self) -> None:
        """Does it. Blocks for as long as it takes to read the image."""
        header = self._header
        self._use(0, 1, "the header")
        self._use_range(header.refcount_offset, header.refcount_clusters * self._cluster_size, "the refcount table")
        for index in range(header.refcount_clusters << (self._bits - 3)):
            block = self._block(index)
            if block:
                self._use_range(block, 1, f"refcount block {index}")
        snapshots = read_snapshots(self._image.pages, header)
        if header.crypt_header is not None:
            self._use_range(*header.crypt_header, "the encryption header")
        if snapshots:
            self._use_range(header.snapshots_offset, sum(len(one.pack()) for one in snapshots), "the snapshot table")
        maps = [("", self._image.tables)]
        for one in snapshots:
            tables = Tables(self._image.pages, header, l1_offset=one.l1_offset, l1_entries=one.l1_entries)
            maps.append((f" of snapshot {one.id}", tables))
        for number, (what, tables) in enumerate(maps):
            self._use_range(tables.l1_offset, tables.l1_entries * 8, f"the L1 table{what}")
            for index in tables.indices():
                self._check_table(tables, index, what)
                self._tell((number + (index + 1) / tables.l1_entries) / len(maps))
        self._compare()

    def _block(self, index: int) -> int:
        try:
            return self._refcounts.block(index)
        except OSError as error:
            self._problem(str(error.strerror))
            return 0

    def _tell(self, done: float) -> None:
        now = time.monotonic()
        if self._progress is not None and now - self._told > 0.2:
            self._told = now
            self._progress(done)

    def _problem(self, text: str) -> None:
        if len(self.problems) < _MAX_PROBLEMS:
            self.problems.append(text)
        elif len(self.problems) == _MAX_PROBLEMS:
            self.problems.append("and more")

    def _use(self, first: int, count: int, what: str) -> None:
        if (first + count) << self._bits > 1 << 56:
            self._problem(f"{what} is at {first << self._bits}, where nothing can be")
            return
        for cluster in range(first, first + count):
            region = self._users.get(cluster >> _REGION_BITS)
            if region is None:
                region = self._users[cluster >> _REGION_BITS] = array("I", bytes(4 << _REGION_BITS))
            region[cluster & _REGION_MASK] += 1

    def _use_range(self, offset: int, length: int, what: str) -> None:
        first = offset >> self._bits
        self._use(first, ((offset + max(length, 1) - 1) >> self._bits) - first + 1, what)

    def _check_table(self, tables: Tables, index: int, what: str) -> None:
        try:
            table = tables.table(index)
        except OSError as error:
            self._problem(f"{error.strerror}{what}")
            return
        if not table:
            return
        self._use_range(table, 1, f"L2 table {index}{what}")
        for number in range(1 << tables.l2_bits):
            cluster = (index << tables.l2_bits) + number
            entry = tables.entry(cluster)
            if entry & COMPRESSED:
                offset, length = tables.place(entry)
                self._use_range(offset, length, f"guest cluster {cluster}{what}")
                try:
                    self._image.decompressed(entry, cluster, wait=True)
                except MediumError as error:
                    self._problem(f"{error.args[0]}{what}")
            elif entry & OFFSET and not self._header.incompatible & DATA_FILE:
                try:
                    self._use_range(tables.host(entry), 1, f"guest cluster {cluster}{what}")
                except OSError as error:
                    self._problem(f"guest cluster {cluster}{what}: {error.strerror}")

    def _compare(self) -> None:
        """Whether the refcounts say the same."""
        stop = self._header.refcount_clusters << (self._bits - 3)
        per_block = 1 << self._refcounts.block_bits
        seen = 0
        for index in range(stop):
            if not self._block(index):
                continue
            for cluster in range(index * per_block, (index + 1) * per_block):
                region = self._users.get(cluster >> _REGION_BITS)
                said, found = self._refcounts.get(cluster), region[cluster & _REGION_MASK] if region else 0
                seen += found > 0
                if said < found:
                    self._problem(f"host cluster {cluster} has {found} users, and its refcount is {said}")
                elif said > found:
                    self._problem(f"host cluster {cluster} is leaked: it has {found} users, and its refcount is {said}")
        used = sum(len(region) - region.count(0) for region in self._users.values())
        if seen != used:
            self._problem(f"{used - seen} host clusters in use have no refcount at all")


def check_image(path: str | os.PathLike[str], progress: Progress | None = None, **where: Any) -> list[str]:
    """Looks through all of an image, reading every compressed cluster. Blocks.

    Args:
        path: Of the image.
        progress: Called now and then.
        **where: As for `open_image`.

    Returns:
        What is wrong with it.
    """
    image = open_image(path, writable=False, **where)
    try:
        check = _Check(image, progress)
        check.run()
        return check.problems
    finally:
        image.close()


async def _open(path: str | os.PathLike[str], where: dict[str, Any]) -> Image:
    """Opens an image for writing; one that was not closed is put in order first."""
    image = await trio.to_thread.run_sync(lambda: open_image(path, writable=True, **where))
    if image.chain is None:
        return image
    try:
        writer = Writer(image, compress=False, chain=image.chain, idle=None)
        await writer.recover()
        await writer.close()
    finally:
        image.close()
    return await trio.to_thread.run_sync(lambda: open_image(path, writable=True, **where))


async def change_map(path: str | os.PathLike[str], change: Callable[[Branching], None], **where: Any) -> None:
    """Opens an image, changes its map as a whole, and closes it.

    Raises:
        Qcow2Error: It cannot be changed so.
    """
    image = await _open(path, where)
    try:
        # All of the map may have to be in one record.
        tables = image.header.l1_entries * 8
        for index in image.tables.indices():
            tables += bool(image.tables.table(index)) << image.header.cluster_bits
        snapshots = 1 + image.header.snapshots
        refcounts = (image.storage.size >> image.header.cluster_bits << image.header.refcount_order) >> 3
        log_size = 3 * (tables * snapshots + refcounts) + (8 << 20)
        writer = Writer(image, compress=False, idle=None, log_size=log_size)
        try:
            await writer.branch(change)
        finally:
            await writer.close()
    finally:
        image.close()


async def resize(path: str | os.PathLike[str], size: int, *, shrink: bool = False, **where: Any) -> None:
    """Changes the size of the disk in an image.

    Args:
        path: Of the image.
        size: Bytes.
        shrink: Allow less than there is; what is behind is lost.
        **where: As for `open_image`.

    Raises:
        Qcow2Error: It would be smaller, or it cannot be so large, or snapshots could not be applied any more.
    """
    if size <= 0 or size % 512:
        raise Qcow2Error(f"a disk of {size} bytes cannot be: it has whole blocks of 512 bytes")
    image = await _open(path, where)
    old, below = image.size, 0 if image.backing is None else image.backing.size
    try:
        if size < old and not shrink:
            raise Qcow2Error(f"{path} has {old} bytes: to make it smaller, and lose what is behind, say so (--shrink)")
        if image.header.version < 3 and image.header.snapshots:
            # QEMU refuses this, too, because it does not apply those of another size then.
            raise Qcow2Error(
                f"{path} is of version 2 and has snapshots, so its size cannot change: delete them, or make it version "
                f"3 with `qemu-img amend -f qcow2 -o compat=1.1 {path}`"
            )
        if isinstance(image.payload.cipher, Locked) and (size | old) % image.header.cluster_size:
            # A part of a cluster is zeroed.
            raise image.payload.cipher.error()
        writer = Writer(image, compress=False, idle=None)
        try:
            if size < old:
                await writer.write_zeroes(size, old - size)
            elif size > old and below > old:
                # What is below must not come to light, not even if this ends in the middle.
                await writer.branch(lambda branching: branching.make_room(size))
                await writer.write_zeroes(old, min(size, below) - old)
            await writer.branch(lambda branching: branching.resize(size))
        finally:
            await writer.close()
    finally:
        image.close()


async def compact(path: str | os.PathLike[str], progress: Progress | None = None, **where: Any) -> tuple[int, int]:
    """Writes an image anew, as small as it can be, and puts it in the place of the old one.

    Returns:
        Bytes that the file takes before and after.

    Raises:
        Qcow2Error: It has snapshots or a data file, which would be lost.
    """
    new = Path(f"{os.fspath(path)}.compact")
    image = await _open(path, where)
    try:
        header = image.header
        if header.crypt_method:
            raise Qcow2Error(f"{path} is encrypted: copy it to a new image to make it smaller (tcmu-rs copy)")
        if header.snapshots or header.incompatible & DATA_FILE or header.extended_l2:
            raise Qcow2Error(f"{path} has snapshots, a data file or extended L2 entries: this is not supported")
        make = functools.partial(
            create,
            new,
            image.size,
            cluster_size=header.cluster_size,
            compression=header.compression_name(),
            refcount_bits=max(8, 1 << header.refcount_order),
            backing=header.backing,
            backing_format=header.backing_format,
            level=header.level,
        )
        await trio.to_thread.run_sync(make)
        try:
            await _copy(image, new, progress, where)
            return await trio.to_thread.run_sync(_put_in_place, new, Path(path))
        except BaseException:
            with trio.CancelScope(shield=True):
                await trio.Path(new).unlink(missing_ok=True)
            raise
    finally:
        image.close()


def _put_in_place(new: Path, old: Path) -> tuple[int, int]:
    """Replaces a file durably; returns what the old one and the new one take."""
    before = old.stat()
    new.chmod(before.st_mode & 0o7777)
    after = new.stat()
    new.replace(old)
    _sync_directory(old.parent)
    # There is a hole where the log was.
    return before.st_blocks * 512, after.st_blocks * 512


async def _copy(image: Image, new: Path, progress: Progress | None, where: dict[str, Any]) -> None:
    """Copies what this image has itself, and not what is below it."""
    target = await trio.to_thread.run_sync(lambda: open_image(new, writable=True, **where))
    try:
        writer = Writer(target, compress=True, idle=None)
        try:
            offset = 0
            while offset < image.size:
                for extent in image.extents(offset, min(_COPY, image.size - offset)):
                    if extent.kind == Kind.ZERO:
                        await writer.write_zeroes(offset, extent.length)
                    elif extent.kind != Kind.UNALLOCATED:
                        data = bytearray(extent.length)
                        image.read(offset, IoVec([data]), wait=True)
                        await writer.write(offset, IoVec([data]))
                    offset += extent.length
                if progress is not None:
                    progress(offset / image.size)
                await trio.lowlevel.checkpoint()
        finally:
            await writer.close()
    finally:
        target.close()


def _sync_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
