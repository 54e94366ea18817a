"""L1 and L2: from guest clusters to entries, and what an entry says."""

from __future__ import annotations

import errno
from collections.abc import Iterator

from .header import Header
from .pages import Pages

COPIED = 1 << 63
COMPRESSED = 1 << 62
ZERO = 1
OFFSET = 0x00FFFFFFFFFFFE00
ALL_SUBCLUSTERS = 0xFFFFFFFF
SUBCLUSTERS = 32


class Tables:
    """The map of one L1 table: the active one, or that of a snapshot.

    Args:
        pages: Of the image.
        header: Its geometry.
        l1_offset: Of the table; the header's if not given.
        l1_entries: Of the table; the header's if not given.
    """

    def __init__(
        self, pages: Pages, header: Header, *, l1_offset: int | None = None, l1_entries: int | None = None
    ) -> None:
        self._pages = pages
        self.l1_offset = header.l1_offset if l1_offset is None else l1_offset
        self.l1_entries = header.l1_entries if l1_entries is None else l1_entries
        self.cluster_bits = header.cluster_bits
        self.l2_bits = header.l2_bits
        self.entry_bits = 4 if header.extended_l2 else 3
        self.extended = header.extended_l2
        # Where the number of sectors begins in the entry of a compressed cluster.
        self._shift = 62 - (header.cluster_bits - 8)
        self._compressed_offset = (1 << self._shift) - 1
        self._index_mask = (1 << header.l2_bits) - 1
        self._in_cluster = header.cluster_size - 1

    def l1(self, index: int, *, wait: bool = True) -> int:
        """An entry of the L1 table."""
        if index >= self.l1_entries:
            return 0
        return self._pages.word(self.l1_offset + index * 8, wait=wait)

    def indices(self) -> Iterator[int]:
        """Those of the L1 table whose entries are not zero. A table may claim to be much larger than its file."""
        per_page = self._pages.size >> 3
        for first in range(0, self.l1_entries, per_page):
            if any(self._pages.read(self.l1_offset + first * 8, self._pages.size)):
                for index in range(first, min(first + per_page, self.l1_entries)):
                    if self.l1(index):
                        yield index

    def table(self, index: int, *, wait: bool = True) -> int:
        """Offset of an L2 table, 0 if there is none.

        Raises:
            OSError: The entry cannot be (EUCLEAN).
        """
        offset = self.l1(index, wait=wait) & OFFSET
        if offset & self._in_cluster:
            raise OSError(errno.EUCLEAN, f"L2 table {index} at {offset} is not at a cluster: the image is damaged")
        return offset

    def entry(self, cluster: int, *, wait: bool = True) -> int:
        """The entry of a guest cluster, 0 if there is no table."""
        index = cluster >> self.l2_bits
        if index >= self.l1_entries:
            return 0
        word = self._pages.word
        table = word(self.l1_offset + (index << 3), wait=wait) & OFFSET
        if not table:
            return 0
        if table & self._in_cluster:
            self.table(index)
        return word(table + ((cluster & self._index_mask) << self.entry_bits), wait=wait)

    def entries(self, cluster: int, count: int, *, wait: bool = True) -> list[int]:
        """The entries of guest clusters that follow each other; not for extended ones.

        Raises:
            OSError: The place of a table cannot be (EUCLEAN).
        """
        found: list[int] = []
        while count:
            step = min(count, self._index_mask + 1 - (cluster & self._index_mask))
            table = self.table(cluster >> self.l2_bits, wait=wait)
            if table:
                found += self._pages.words(table + ((cluster & self._index_mask) << 3), step, wait=wait)
            else:
                found += [0] * step
            cluster += step
            count -= step
        return found

    def bitmap(self, cluster: int, *, wait: bool = True) -> int:
        """The second word of an extended entry: bit n, subcluster n is allocated; bit 32 + n, it is zero."""
        table = self.table(cluster >> self.l2_bits, wait=wait)
        if not table:
            return 0
        return self._pages.word(table + ((cluster & self._index_mask) << 4) + 8, wait=wait)

    def place(self, entry: int) -> tuple[int, int]:
        """Offset and length of a compressed cluster: the length may be up to a sector too long."""
        offset = entry & self._compressed_offset
        sectors = (entry & (COMPRESSED - 1)) >> self._shift
        return offset, (sectors + 1) * 512 - (offset & 511)

    def describe(self, offset: int, length: int) -> int:
        """The entry for a compressed cluster."""
        sectors = ((offset + length - 1) >> 9) - (offset >> 9)
        return COMPRESSED | sectors << self._shift | offset

    def host(self, entry: int) -> int:
        """Offset of a plain cluster, 0 if there is none.

        Raises:
            OSError: It cannot be (EUCLEAN).
        """
        offset = entry & OFFSET
        if offset & self._in_cluster:
            raise OSError(errno.EUCLEAN, f"a cluster at {offset} is not at a multiple of its size: image damaged")
        return offset
