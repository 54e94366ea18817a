"""Refcounts: two levels of tables, from 1 to 64 bits each."""

from __future__ import annotations

import errno

from .header import Header
from .pages import Pages

_OFFSET = 0xFFFFFFFFFFFFFE00


class Refcounts:
    """Counts the users of each host cluster, as the tables say.

    Args:
        pages: Of the image.
        header: Where the table is.
    """

    def __init__(self, pages: Pages, header: Header) -> None:
        self._pages = pages
        self._header = header
        self._order = header.refcount_order
        self._cluster_bits = header.cluster_bits
        self.block_bits = header.cluster_bits + 3 - header.refcount_order
        self.max = (1 << (1 << self._order)) - 1
        self._index_mask = (1 << self.block_bits) - 1
        # The block that was used last, and where it is: blocks never move.
        self._last = (-1, 0)

    @property
    def covered(self) -> int:
        """Clusters that the table has room for."""
        return self._header.refcount_clusters << (self._cluster_bits - 3) << self.block_bits

    def block(self, index: int) -> int:
        """Offset of a refcount block, 0 if there is none.

        Raises:
            OSError: The entry cannot be (EUCLEAN).
        """
        if index >= self._header.refcount_clusters << (self._cluster_bits - 3):
            return 0
        offset = self._pages.word(self._header.refcount_offset + index * 8) & _OFFSET
        if offset & ((1 << self._cluster_bits) - 1) or offset >> 56:
            raise OSError(errno.EUCLEAN, f"refcount block {index} at {offset} is not at a cluster: damaged image")
        return offset

    def has(self, index: int) -> bool:
        """Whether there is a refcount block."""
        return self._block_of(index) != 0

    def _block_of(self, index: int) -> int:
        if self._last[0] != index:
            self._last = (index, self.block(index))
        return self._last[1]

    def set_block(self, index: int, offset: int) -> None:
        """Enters a block into the table."""
        self._last = (-1, 0)
        self._pages.set_word(self._header.refcount_offset + index * 8, offset)

    def get(self, cluster: int) -> int:
        """Users of a host cluster."""
        block = self.block(cluster >> self.block_bits)
        if not block:
            return 0
        index = cluster & ((1 << self.block_bits) - 1)
        order = self._order
        if order >= 3:
            size = 1 << (order - 3)
            at = block + index * size
            word = self._pages.word(at & ~7)
            return word >> (64 - 8 * ((at & 7) + size)) & self.max
        at, shift = block + (index << order >> 3), (index << order) & 7
        byte = self._pages.word(at & ~7) >> (56 - 8 * (at & 7)) & 0xFF
        return byte >> shift & self.max

    def set(self, cluster: int, value: int) -> None:
        """Sets the users of a host cluster, whose block is there."""
        block = self.block(cluster >> self.block_bits)
        index = cluster & ((1 << self.block_bits) - 1)
        order = self._order
        if order >= 3:
            size = 1 << (order - 3)
            data, at = self._pages.touch(block + index * size)
            data[at : at + size] = value.to_bytes(size, "big")
        else:
            data, at = self._pages.touch(block + (index << order >> 3))
            shift = (index << order) & 7
            data[at] = data[at] & ~(self.max << shift) & 0xFF | value << shift

    def add(self, cluster: int, delta: int) -> int:
        """Changes the users of a host cluster whose block is there, and returns how many there are now.

        Raises:
            OSError: It would be less than none, which only a damaged image has (EUCLEAN).
            OverflowError: More than the image can count.
        """
        block = self._block_of(cluster >> self.block_bits)
        if block and self._order == 4:
            data, index = self._pages.touch(block + ((cluster & self._index_mask) << 1))
            value = (data[index] << 8 | data[index + 1]) + delta
            if 0 <= value <= 0xFFFF:
                data[index], data[index + 1] = value >> 8, value & 0xFF
                return value
        value = self.get(cluster) + delta
        if value < 0:
            raise OSError(errno.EUCLEAN, f"the refcount of cluster {cluster} is too low: the image is damaged")
        if value > self.max:
            raise OverflowError(f"cluster {cluster} would have {value} users, the image can count {self.max}")
        self.set(cluster, value)
        return value

    def last_used(self, start: int) -> int:
        """The last host cluster with users, from `start` on; -1 if there is none. Waits."""
        entries = self._header.refcount_clusters << (self._cluster_bits - 3)
        for index in range(entries - 1, (start >> self.block_bits) - 1, -1):
            offset = self.block(index)
            if not offset:
                continue
            content = self._pages.read(offset, 1 << self._cluster_bits).rstrip(b"\0")
            if content:
                last = (index << self.block_bits) + ((len(content) * 8 - 1) >> self._order)
                while not self.get(last):
                    last -= 1
                return last if last >= start else -1
        return -1
