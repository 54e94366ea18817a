"""Compaction in service: what is left in parts of the file that are mostly free moves away, while nobody waits.

Small holes are used again, but not given back to the file system, which has blocks, and takes a call for each. So units
with many of them are emptied. To move a cluster is to write it back once more, unchanged: the log sees nothing else.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Awaitable, Callable, Sequence

import trio

from .image import Image
from .pages import Page
from .space import Space
from .tables import COMPRESSED

RATE = 8 << 20
"""Bytes of clusters that are moved in a second, at most."""
_AT_ONCE = 128 << 10
"""Bytes of clusters that are moved before somebody else is let in, or one cluster."""
_MOST = 1024
"""Units that are emptied in one pass over the map."""


class Compactor:
    """Empties units of the file. It stops as soon as anybody reads or writes.

    Args:
        image: Of compressed clusters.
        space: Knows what is free.
        rewrite: Stores some clusters at another place; returns how many.
        flush: Makes what they had free.
        activity: Counts commands.
        closing: The image is being closed.
        rate: Bytes of clusters in a second; 0 for none at all.

    Attributes:
        moved: Clusters that were moved.
        passes: How often the map was looked through.
    """

    def __init__(
        self,
        image: Image,
        space: Space,
        *,
        rewrite: Callable[[Sequence[int]], Awaitable[int]],
        flush: Callable[[], Awaitable[None]],
        activity: Callable[[], int],
        closing: trio.Event,
        rate: int = RATE,
    ) -> None:
        self._image = image
        self._pages = image.pages
        self._space = space
        self._rewrite = rewrite
        self._flush = flush
        self._activity = activity
        self._closing = closing
        self._rate = rate
        self._bits = image.header.cluster_bits
        self._seen = -1
        self._done_at = -1
        # Those that have something in them that does not move.
        self._tried: set[int] = set()
        self.moved = 0
        self.passes = 0

    async def run(self) -> bool:
        """Makes a pass, if nobody has done anything since the last call; returns whether something was moved.

        Raises:
            OSError: Storing failed, for another reason than want of space.
        """
        before, self._seen = self._seen, self._activity()
        if not self._rate or self._seen != before or self._seen == self._done_at or self._image.header.snapshots:
            return False
        units = await self._choose()
        if not units:
            if not self._is_busy():
                self._done_at = self._seen
            return False
        self.passes += 1
        moved = self.moved
        units = self._space.set_aside(units)
        try:
            if await self._empty(units):
                self._tried |= units
            await self._flush()
        except OSError as error:
            self._done_at = self._seen
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
        finally:
            self._space.put_back()
        return self.moved > moved

    def _is_busy(self) -> bool:
        return self._closing.is_set() or self._activity() != self._seen

    async def _choose(self) -> set[int]:
        """Units that are worth it."""
        found: set[int] = set()
        for units in self._space.sparse_units():
            found |= units - self._tried
            await trio.lowlevel.checkpoint()
            if len(found) >= _MOST or self._is_busy():
                break
        return set() if self._is_busy() else found

    async def _empty(self, units: set[int]) -> bool:
        """Moves what is in some units; returns whether it came to the end."""
        tables = self._image.tables
        step = 2 if tables.extended else 1
        per_page = self._pages.size // 8 // step
        for index in range(tables.l1_entries):
            if index % 64 == 0:
                await trio.lowlevel.checkpoint()
                await self._pages.fetch((tables.l1_offset + index * 8) // self._pages.size)
                if self._is_busy():
                    return False
            table = tables.table(index)
            for at in range(0, 1 << self._bits if table else 0, self._pages.size):
                page = await self._pages.fetch((table + at) // self._pages.size)
                first = (index << tables.l2_bits) + at // self._pages.size * per_page
                if any(page.data):
                    if not await self._empty_page(page, first, step, units):
                        return False
                    await trio.lowlevel.checkpoint()
                if self._is_busy():
                    return False
        return True

    async def _empty_page(self, page: Page, first: int, step: int, units: set[int]) -> bool:
        entries = array("Q", bytes(page.data))
        entries.byteswap()
        place, unit_of = self._image.tables.place, self._space.unit_of
        found = []
        for number, entry in enumerate(entries[::step]):
            if entry & COMPRESSED:
                offset, length = place(entry)
                if unit_of(offset) in units or unit_of(offset + length - 1) in units:
                    found.append(first + number)
        count = max(1, _AT_ONCE >> self._bits)
        for start in range(0, len(found), count):
            if self._is_busy():
                return False
            self.moved += await self._rewrite(found[start : start + count])
            with trio.move_on_after((count << self._bits) / self._rate):
                await self._closing.wait()
        return not self._is_busy()
