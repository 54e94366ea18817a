"""An image that is read: its map, what it names, and what is below it."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from tcmu_rs import DamagedFrameError, IoVec, MediumError

from .cache import Entry
from .codecs import Codec, damage
from .header import DATA_FILE, Header
from .log import Chain
from .pages import Cold, Pages
from .payload import Cipher, Payload, read_plain
from .storage import Buffer, Storage
from .tables import COMPRESSED, SUBCLUSTERS, ZERO, Tables

_HOT = 1 << 20
"""Bytes of decompressed clusters that are kept for readers of parts."""


class Kind(IntEnum):
    """What a guest cluster, or a part of one, is."""

    UNALLOCATED = 0
    """What is below shines through; zeroes if nothing is."""
    ZERO = 1
    PLAIN = 2
    COMPRESSED = 3
    CACHED = 4
    """In memory, newer than the file."""


@dataclass(slots=True)
class Extent:
    """A range of the disk of one kind.

    Attributes:
        kind: Of it.
        length: In bytes.
        place: Offset in the file of plain data, or the entry of a compressed cluster.
    """

    kind: Kind
    length: int
    place: int = 0


class Source(Protocol):
    """What can be below an image."""

    size: int

    def read(self, offset: int, iov: IoVec, *, wait: bool) -> None:
        """Fills the `IoVec`; raises `Cold` if not `wait`, and it would have to."""

    def close(self) -> None:
        """Lets go of it."""


class RawSource:
    """A raw file."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self.size = storage.size

    def read(self, offset: int, iov: IoVec, *, wait: bool) -> None:
        """Reads; what is behind the end is zero."""
        read_plain(self._storage, offset, iov, wait=wait)

    def close(self) -> None:
        """Closes the file."""
        self._storage.close()


class Reading:
    """Compressed clusters that follow each other on the disk, on their way out of the file.

    Args:
        image: What they are in.
        cluster: The first one.
        within: Its first byte that is wanted.
        iov: Where they go.
        entries: Of each, as they are in the map.

    Attributes:
        moved: One of them has been moved meanwhile, or is gone.
    """

    __slots__ = ("cluster", "entries", "image", "iov", "moved", "within")

    def __init__(self, image: Image, cluster: int, within: int, iov: IoVec, entries: Sequence[int]) -> None:
        self.image = image
        self.cluster = cluster
        self.within = within
        self.iov = iov
        self.entries = entries
        self.moved = False


class Image:
    """The data of a disk, or of one of its snapshots.

    Args:
        storage: The image; closed with this.
        header: Of it.
        tables: The map, if it is not the active one.
        size: Bytes of the disk, if they are not those of the active one.
        backing: What is below; closed with this.
        payload: Where plain clusters are; its file is closed with this.
        pages: Metadata; shared with who writes it.

    Attributes:
        cache: Clusters that are newer in memory than in the file.
        block_size: Bytes of a logical block, for the LBA in errors.
        reads: Commands that have read, so that those who should not be in the way know.
        chain: What was found in the log, if there is one.
        log_range: Where the log is, from and to.
    """

    def __init__(
        self,
        storage: Storage,
        header: Header,
        pages: Pages,
        *,
        tables: Tables | None = None,
        size: int | None = None,
        backing: Source | None = None,
        payload: Payload | None = None,
    ) -> None:
        self.storage = storage
        self.header = header
        self.pages = pages
        self.size = header.size if size is None else size
        self.tables = tables or Tables(pages, header)
        self.backing = backing
        self.payload = payload or Payload(storage)
        self.block_size = 512
        self.reads = 0
        self.chain: Chain | None = None
        self.log_range = (0, 0)
        self.cache: dict[int, Entry] = {}
        self.codec = Codec(header.compression_type, header.cluster_size, header.level)
        self._hot: dict[int, bytes] = {}
        self._readings: set[Reading] = set()
        self._scratch = memoryview(bytearray(2 * header.cluster_size + 512))
        # Where a read begins that goes on with the last one.
        self._next = 0
        self._hot_limit = max(2, _HOT >> header.cluster_bits)
        self._bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self._in_cluster = header.cluster_size - 1
        self._extended = header.extended_l2

    @property
    def is_encrypted(self) -> bool:
        """Whether this image, or one below it, is encrypted."""
        below = self.backing
        return self.payload.cipher is not None or (isinstance(below, Image) and below.is_encrypted)

    def ciphers(self) -> dict[str, Cipher]:
        """Those of this image and of the ones below it, by path."""
        found = self.backing.ciphers() if isinstance(self.backing, Image) else {}
        if self.payload.cipher is not None:
            found[str(self.storage.path)] = self.payload.cipher
        return found

    def close(self) -> None:
        """Closes all files."""
        try:
            self.storage.close()
        finally:
            try:
                if self.payload.storage is not self.storage:
                    self.payload.storage.close()
            finally:
                if self.backing is not None:
                    self.backing.close()

    def read(self, offset: int, iov: IoVec, *, wait: bool) -> None:
        """Fills the `IoVec`; what is behind the end of the disk is zero.

        Raises:
            Cold: Without `wait`: something is not in memory. Nothing has been changed but the `IoVec`.
            MediumError: A cluster is damaged.
        """
        total = iov.nbytes
        within = offset & self._in_cluster
        if within + total <= self._cluster_size and not self._extended and offset + total <= self.size:
            cluster = offset >> self._bits
            cached = self.cache.get(cluster)
            if cached is not None:
                iov.copy_from(memoryview(cached.data)[within : within + total])
                return
            entry = self._entry(cluster, wait)
            if entry & COMPRESSED:
                self._read_part(entry, cluster, within, iov, wait)
                return
        if offset + total > self.size:
            inside = max(0, self.size - offset)
            iov.slice(inside, total).zero()
            if not inside:
                return
            iov = iov.slice(0, inside)
            total = inside
        at = 0
        for extent in self.extents(offset, total, wait=wait):
            part = iov if extent.length == total else iov.slice(at, at + extent.length)
            self._read_extent(extent, offset + at, part, wait)
            at += extent.length

    def _read_extent(self, extent: Extent, offset: int, part: IoVec, wait: bool) -> None:
        kind = extent.kind
        if kind == Kind.PLAIN:
            self.payload.read(extent.place, part, wait=wait)
        elif kind == Kind.ZERO or (kind == Kind.UNALLOCATED and self.backing is None):
            part.zero()
        elif kind == Kind.UNALLOCATED:
            assert self.backing is not None
            inside = min(extent.length, max(0, self.backing.size - offset))
            if inside < extent.length:
                part.slice(inside, extent.length).zero()
            if inside:
                self.backing.read(offset, part.slice(0, inside), wait=wait)
        else:
            cluster, within = offset >> self._bits, offset & self._in_cluster
            data = self.cache[cluster].data if kind == Kind.CACHED else self.decompressed(extent.place, cluster, wait)
            part.copy_from(memoryview(data)[within : within + extent.length])

    def extents(self, offset: int, length: int, *, wait: bool = True) -> Iterator[Extent]:
        """What a range is made of, neighbours of one kind together."""
        stop = offset + length
        last: Extent | None = None
        while offset < stop:
            within = offset & self._in_cluster
            step = min(self._cluster_size - within, stop - offset)
            for extent in self._cluster_extents(offset >> self._bits, within, step, wait):
                if last is None:
                    last = extent
                elif extent.kind == last.kind and (
                    extent.kind <= Kind.ZERO or (extent.kind == Kind.PLAIN and extent.place == last.place + last.length)
                ):
                    last.length += extent.length
                else:
                    yield last
                    last = extent
            offset += step
        if last is not None:
            yield last

    def _entry(self, cluster: int, wait: bool) -> int:
        try:
            return self.tables.entry(cluster, wait=wait)
        except OSError as error:
            if error.errno != errno.EUCLEAN:
                raise
            raise self._medium_error(cluster, error) from None

    def _cluster_extents(self, cluster: int, within: int, length: int, wait: bool) -> Iterator[Extent]:
        if cluster in self.cache:
            yield Extent(Kind.CACHED, length)
            return
        entry = self._entry(cluster, wait)
        if entry & COMPRESSED:
            yield Extent(Kind.COMPRESSED, length, entry)
            return
        try:
            host = self.tables.host(entry)
        except OSError as error:
            raise self._medium_error(cluster, error) from None
        if not self._extended:
            if entry & ZERO and self.header.version > 2:
                yield Extent(Kind.ZERO, length)
            elif host or (self.header.incompatible & DATA_FILE and entry):
                # In a data file a cluster may be at 0.
                yield Extent(Kind.PLAIN, length, host + within)
            else:
                yield Extent(Kind.UNALLOCATED, length)
            return
        bitmap = self.tables.bitmap(cluster, wait=wait)
        size = self._cluster_size // SUBCLUSTERS
        stop = within + length
        while within < stop:
            number = within // size
            step = min((number + 1) * size, stop) - within
            allocated, zero = bitmap >> number & 1, bitmap >> (32 + number) & 1
            if allocated and zero:
                raise self._medium_error(cluster, OSError(errno.EUCLEAN, "a subcluster is both zero and allocated"))
            kind = Kind.PLAIN if allocated else Kind.ZERO if zero else Kind.UNALLOCATED
            yield Extent(kind, step, host + within if allocated else 0)
            within += step

    def _read_part(self, entry: int, cluster: int, within: int, iov: IoVec, wait: bool) -> None:
        """Reads a part of a compressed cluster; one that is read part after part is decompressed once."""
        offset = (cluster << self._bits) + within
        if entry in self._hot or (offset == self._next and iov.nbytes < self._cluster_size):
            data = self.decompressed(entry, cluster, wait)
            iov.copy_from(memoryview(data)[within : within + iov.nbytes])
        else:
            stored = self._stored(entry, wait)
            if not self.codec.decompress(stored, ((0, len(stored)),), iov, within):
                raise self._medium_error(cluster, damage())
        self._next = offset + iov.nbytes

    def _stored(self, entry: int, wait: bool) -> Buffer:
        """What the file has for a compressed cluster; good until the next call."""
        offset, length = self.tables.place(entry)
        try:
            stored = self._scratch[:length]
            done = self.storage.preadv(offset, (stored,), wait=wait)
            # The end of the file, or of what is in memory.
            return stored if done == length else self.storage.pread(offset, length, wait=wait)
        except BlockingIOError:
            raise Cold(self.storage, offset, length) from None

    def decompressed(self, entry: int, cluster: int, wait: bool) -> bytes:
        """The data of a compressed cluster.

        Args:
            entry: Of it.
            cluster: The guest cluster, for the error.
            wait: Or raise `Cold`.
        """
        data = self._hot.get(entry)
        if data is not None:
            return data
        try:
            data = self.codec.whole(self._stored(entry, wait))
        except OSError as error:
            raise self._medium_error(cluster, error) from None
        if len(self._hot) >= self._hot_limit:
            del self._hot[next(iter(self._hot))]
        self._hot[entry] = data
        return data

    def begin(self, offset: int, iov: IoVec) -> Sequence[Reading]:
        """Fills what is not compressed of a read, and returns the rest, to be finished before anything else is done.

        Raises:
            Cold: Something is not in memory.
            MediumError: The map is damaged.
        """
        total = iov.nbytes
        first, within = offset >> self._bits, offset & self._in_cluster
        if self._extended or offset >= self.size:
            self.read(offset, iov, wait=False)
            return ()
        if offset + total > self.size:
            iov.slice(self.size - offset, total).zero()
            total = self.size - offset
            iov = iov.slice(0, total)
        if within + total <= self._cluster_size:
            if first not in self.cache:
                entry = self._entry(first, False)
                if entry & COMPRESSED:
                    if entry not in self._hot and (offset != self._next or total == self._cluster_size):
                        self._next = offset + total
                        return (Reading(self, first, within, iov, (entry,)),)
                elif not entry and isinstance(self.backing, Image):
                    return self.backing.begin(offset, iov)
            self.read(offset, iov, wait=False)
            return ()
        try:
            entries = self.tables.entries(first, ((offset + total - 1) >> self._bits) - first + 1, wait=False)
        except OSError as error:
            if error.errno != errno.EUCLEAN:
                raise
            raise self._medium_error(first, error) from None
        found: list[Reading] = []
        cache, shines = self.cache, isinstance(self.backing, Image)
        ours, below, others = Kind.COMPRESSED, Kind.UNALLOCATED, Kind.PLAIN
        compressed: list[int] = []
        last = others
        start = 0
        at = -within
        for cluster, entry in enumerate(entries, first):
            if entry & COMPRESSED and cluster not in cache:
                kind = ours
            else:
                kind = below if shines and not entry and cluster not in cache else others
            here = max(at, 0)
            if kind is not last:
                if here > start:
                    found += self._begin_run(last, offset + start, iov.slice(start, here), compressed)
                    start, compressed = here, []
                last = kind
            if kind is ours:
                compressed.append(entry)
            at += self._cluster_size
        found += self._begin_run(last, offset + start, iov.slice(start, total) if start else iov, compressed)
        return found

    def _begin_run(self, kind: Kind, offset: int, iov: IoVec, entries: Sequence[int]) -> Sequence[Reading]:
        """The same for clusters of one kind."""
        if kind == Kind.COMPRESSED:
            return (Reading(self, offset >> self._bits, offset & self._in_cluster, iov, entries),)
        if kind == Kind.UNALLOCATED:
            assert isinstance(self.backing, Image)
            return self.backing.begin(offset, iov)
        self.read(offset, iov, wait=False)
        return ()

    async def finish(self, readings: Sequence[Reading]) -> bool:
        """Reads and decompresses clusters; waits, if it has to, and others run meanwhile.

        A place in the file is what the map has said when the reading began. If it is given up meanwhile, a frame of
        another cluster may get there, complete and with the right checksum, or it may be punched. So whoever gives it
        up says so to all readings that are under way (`forget`), and these do not count, whatever they have found. It
        is given up before anything else can get there, and both is done in the loop, as is the look at it here.

        Returns:
            False if a cluster is elsewhere by now: then what is in the `IoVec` is not known.

        Raises:
            MediumError: A cluster is damaged.
            OSError: The file cannot be read.
        """
        for reading in readings:
            reading.image._readings.add(reading)
        try:
            for reading in readings:
                image = reading.image
                places = [*map(image.tables.place, reading.entries)]
                try:
                    await image.codec.read(image.storage, places, reading.iov, reading.within)
                except DamagedFrameError as error:
                    if not reading.moved:
                        raise image._medium_error(reading.cluster + error.number, damage()) from None
                except OSError:
                    if not reading.moved:
                        raise
                if reading.moved:
                    return False
        finally:
            for reading in readings:
                reading.image._readings.discard(reading)
        return True

    def forget(self, entry: int) -> None:
        """The place of a compressed cluster is given up: another one may get it."""
        self._hot.pop(entry, None)
        for reading in self._readings:
            if entry in reading.entries:
                reading.moved = True

    def _medium_error(self, cluster: int, error: OSError) -> MediumError:
        return MediumError(
            f"{self.storage.path}: guest cluster {cluster} (byte {cluster << self._bits}): {error.strerror}",
            information=(cluster << self._bits) // self.block_size,
        )
