"""Changes of the map: entries, refcounts and free space together, and what the next record has to say about them."""

from __future__ import annotations

import struct

from .header import Header
from .image import Image
from .refcounts import Refcounts
from .space import Space
from .tables import ALL_SUBCLUSTERS, COMPRESSED, COPIED, OFFSET, ZERO

_TABLE_STEP = 64
"""Entries by which a refcount table grows at least."""


class Changes:
    """All of it happens at once, in memory: what is changed between two records is in the later one, or nowhere.

    Args:
        image: What is changed.
        space: Where new places come from.

    Attributes:
        settled: Guest clusters whose map changed since the last record.
        extents: Compressed data that the map of the next record names: length and crc, by offset.
        fresh: The map names plain clusters whose data may not be durable.
        dropped: Places that are free when the next record is durable: offset, and length or 0 for a whole cluster.
        dropped_metadata: Clusters that are free after the next checkpoint.
        pending: Host clusters without users that must not be used yet.
        scanned: Guest clusters before this one have been counted, if the image is being looked through.
        scan_stop: What lies from here on in the file has always been counted.
    """

    def __init__(self, image: Image, space: Space) -> None:
        self._image = image
        self._pages = image.pages
        self._tables = image.tables
        self._header = image.header
        self._space = space
        self._bits = image.header.cluster_bits
        self._cluster_size = image.header.cluster_size
        self._extended = image.header.extended_l2
        # In a data file nobody counts.
        self._external = image.payload.external
        self.refcounts = Refcounts(image.pages, image.header)
        self.settled: set[int] = set()
        self.extents: dict[int, tuple[int, int]] = {}
        self.fresh = False
        self.dropped: list[tuple[int, int]] = []
        self.dropped_metadata: list[int] = []
        self.pending: set[int] = set()
        self.scanned = 1 << 62
        self.scan_stop = 0

    # The map.

    def map_frame(self, cluster: int, offset: int, length: int, crc: int) -> None:
        """A guest cluster is compressed data that was written to a place taken from the free space."""
        for host in range(offset >> self._bits, ((offset + length - 1) >> self._bits) + 1):
            self._count(host)
        self.extents[offset] = (length, crc)
        self._map(cluster, self._tables.describe(offset, length), 0)

    def map_plain(self, cluster: int, host: int) -> None:
        """A guest cluster is what was written to a host cluster taken from the free space, or to the data file."""
        if not self._external:
            self._count(host >> self._bits)
        self.fresh = True
        self._map(cluster, host | COPIED, ALL_SUBCLUSTERS)

    def map_zero(self, cluster: int) -> bool:
        """A guest cluster is zero and needs no place; False if the format cannot say so."""
        entry, bitmap = 0, 0
        if self.shines_through(cluster):
            if self._header.version < 3:
                return False
            entry, bitmap = (0, ALL_SUBCLUSTERS << 32) if self._extended else (ZERO, 0)
        old = self._tables.entry(cluster)
        if old == entry and (not self._extended or self._tables.bitmap(cluster) == bitmap):
            self.settled.add(cluster)
        else:
            self._map(cluster, entry, bitmap)
        return True

    def shines_through(self, cluster: int) -> bool:
        """Whether something is below a guest cluster."""
        backing = self._image.backing
        return backing is not None and cluster << self._bits < backing.size

    def _map(self, cluster: int, entry: int, bitmap: int) -> None:
        table = self._table(cluster >> self._tables.l2_bits)
        at = table + ((cluster & ((1 << self._tables.l2_bits) - 1)) << self._tables.entry_bits)
        old = self._pages.word(at)
        self._pages.set_word(at, entry)
        if self._extended:
            self._pages.set_word(at + 8, bitmap)
        self.settled.add(cluster)
        self._drop(cluster, old)

    def _table(self, index: int) -> int:
        """Offset of an L2 table that nobody else has."""
        entry = self._tables.l1(index)
        if entry & COPIED:
            offset = entry & OFFSET
            return self._tables.table(index) if offset & (self._cluster_size - 1) else offset
        old = self._tables.table(index)
        new = self.make_metadata(1)
        if old:
            # A snapshot has it, too.
            self._pages.write(new, self._pages.read(old, self._cluster_size))
            self.drop_metadata(old)
        self._pages.set_word(self._tables.l1_offset + index * 8, new | COPIED)
        return new

    def needs_table(self, cluster: int) -> bool:
        """Whether a change of this guest cluster makes an L2 table."""
        return not self._tables.l1(cluster >> self._tables.l2_bits) & COPIED

    def _drop(self, cluster: int, entry: int) -> None:
        """A guest cluster had this entry."""
        if entry & COMPRESSED:
            offset, length = self._tables.place(entry)
            self._image.forget(entry)
            self.extents.pop(offset, None)
            for host in range(offset >> self._bits, ((offset + length - 1) >> self._bits) + 1):
                if not self.refcounts.add(host, -1) and not self._space.knows(host << self._bits):
                    self.drop_cluster(host << self._bits)
            if cluster < self.scanned or offset >= self.scan_stop:
                self.dropped.append((offset, length))
        elif entry & OFFSET and not self._external:
            host = self._tables.host(entry)
            if not self.refcounts.add(host >> self._bits, -1):
                self.drop_cluster(host)

    def drop_cluster(self, offset: int) -> None:
        """A host cluster has no users any more."""
        self.dropped.append((offset, 0))
        self.pending.add(offset)

    # Refcounts and metadata.

    def make_metadata(self, count: int) -> int:
        """Offset of new clusters for tables, with zeroes."""
        offset = self._space.take_clusters(count)
        self._pages.make(offset, count * self._cluster_size)
        for host in range(offset >> self._bits, (offset >> self._bits) + count):
            self._count(host)
        return offset

    def drop_metadata(self, offset: int) -> None:
        """One user less of a cluster with a table."""
        if not self.refcounts.add(offset >> self._bits, -1):
            self._pages.forget(offset, self._cluster_size)
            self.dropped_metadata.append(offset)
            self.pending.add(offset)

    def _count(self, host: int) -> None:
        """One user more of a host cluster."""
        self._make_block(host >> self.refcounts.block_bits)
        self.refcounts.add(host, 1)

    def _make_block(self, index: int) -> None:
        """Sees to it that there is a refcount block."""
        if self.refcounts.has(index):
            return
        if index >= self._table_entries:
            self._grow_table(index)
            if self.refcounts.block(index):
                return
        offset = self._space.take_clusters(1)
        self._pages.make(offset, self._cluster_size)
        self.refcounts.set_block(index, offset)
        # Perhaps in the block itself.
        self._count(offset >> self._bits)

    @property
    def _table_entries(self) -> int:
        return self._header.refcount_clusters << (self._bits - 3)

    def _grow_table(self, index: int) -> None:
        header = self._header
        entries = max(index + _TABLE_STEP, self._table_entries * 3 // 2)
        count = -(-entries * 8 >> self._bits)
        old, old_count = header.refcount_offset, header.refcount_clusters
        content = self._pages.read(old, old_count << self._bits)
        new = self._space.take_clusters(count)
        self._pages.make(new, count << self._bits)
        self._pages.write(new, content)
        header.refcount_offset, header.refcount_clusters = new, count
        self.write_fields(Header.REFCOUNT_OFFSET, struct.pack(">QI", new, count))
        for host in range(new >> self._bits, (new >> self._bits) + count):
            self._count(host)
        for offset in range(old, old + (old_count << self._bits), self._cluster_size):
            self.drop_metadata(offset)

    def write_fields(self, at: int, fields: bytes) -> None:
        """Changes the header."""
        self._pages.write(at, fields)
