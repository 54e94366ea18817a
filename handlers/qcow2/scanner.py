"""Finding what is free in an image that was written before: sectors and clusters without users."""

from __future__ import annotations

from array import array
from collections.abc import Awaitable, Callable, Iterator

import trio

from .changes import Changes
from .image import Image
from .pages import Page
from .snapshots import read_snapshots
from .space import Space
from .tables import COMPRESSED, OFFSET, Tables

_CLUSTERS_AT_ONCE = 2048


class Scanner:
    """Looks through an image once, a little at a time, while others change it. Until it is done only the end grows.

    Args:
        image: What to look through.
        changes: Learn how far it has come.
        space: Learns what is free.
        commit: Makes what was freed until now usable.
    """

    def __init__(self, image: Image, changes: Changes, space: Space, commit: Callable[[], Awaitable[None]]) -> None:
        self._image = image
        self._pages = image.pages
        self._changes = changes
        self._space = space
        self._commit = commit
        self._bits = image.header.cluster_bits
        self._stop = space.end
        space.begin_scan()
        if space.packed:
            changes.scanned, changes.scan_stop = 0, self._stop

    async def scan(self, closing: trio.Event) -> None:
        """Does it; ends early when the image is closed."""
        if self._space.packed:
            header = self._image.header
            maps = [self._image.tables] + [
                Tables(self._pages, header, l1_offset=one.l1_offset, l1_entries=one.l1_entries)
                for one in read_snapshots(self._pages, header)
            ]
            for number, tables in enumerate(maps):
                per_page = self._pages.size >> 3
                for first in range(0, tables.l1_entries, per_page):
                    if closing.is_set():
                        return
                    stop = min(first + per_page, tables.l1_entries)
                    page = await self._pages.fetch((tables.l1_offset + first * 8) // self._pages.size)
                    # A table may claim to be much larger than its file.
                    for index in range(first, stop) if any(page.data) else ():
                        await self._count_table(tables, index)
                        if number == 0:
                            self._changes.scanned = (index + 1) << tables.l2_bits
                    if number == 0:
                        self._changes.scanned = stop << tables.l2_bits
                    if first // per_page % 64 == 0:
                        await trio.lowlevel.checkpoint()
                if number == 0:
                    self._changes.scanned = 1 << 62
        # What was freed before it was counted has to be free for good.
        await self._commit()
        for first in self._ranges():
            if closing.is_set():
                return
            self._walk(first)
            await trio.lowlevel.checkpoint()
        self._space.end_scan()

    async def _count_table(self, tables: Tables, index: int) -> None:
        """Counts the sectors of what an L2 table names."""
        await self._pages.fetch((tables.l1_offset + index * 8) // self._pages.size)
        table = tables.table(index)
        if not table:
            return
        step = 2 if tables.extended else 1
        per_page = self._pages.size // 8 // step
        first = index << tables.l2_bits
        for at in range(0, 1 << self._bits, self._pages.size):
            page = await self._pages.fetch((table + at) // self._pages.size)
            # Since this was read nobody else has done anything.
            if tables.table(index) != table:
                self._count_table_again(tables, index, at, step)
            elif any(page.data):
                self._count_entries(tables, page, step)
            first += per_page
            if tables is self._image.tables:
                self._changes.scanned = first
            await trio.lowlevel.checkpoint()

    def _count_table_again(self, tables: Tables, index: int, at: int, step: int) -> None:
        """The table was copied to another place meanwhile; the rest of it is the same."""
        table = tables.table(index)
        if table:
            self._count_entries(tables, self._pages.get((table + at) // self._pages.size), step)

    def _count_entries(self, tables: Tables, page: Page, step: int) -> None:
        entries = array("Q", bytes(page.data))
        entries.byteswap()
        place, use, stop, size = tables.place, self._space.use, self._stop, 1 << self._bits
        for entry in entries[::step]:
            offset, length = place(entry) if entry & COMPRESSED else (entry & OFFSET, size)
            # What lies behind was written since the scan began, and was counted then.
            if 0 < offset < stop:
                use(offset, length)

    def _ranges(self) -> Iterator[int]:
        return iter(range(0, self._stop >> self._bits, _CLUSTERS_AT_ONCE))

    def _walk(self, first: int) -> None:
        """Looks at the refcounts of some clusters."""
        refcounts, pending = self._changes.refcounts, self._changes.pending
        log = self._image.log_range
        offset, stop = first << self._bits, min(first + _CLUSTERS_AT_ONCE, self._stop >> self._bits) << self._bits
        while (offset := self._space.skip(offset, stop)) < stop:
            used = offset in pending or log[0] <= offset < log[1] or refcounts.get(offset >> self._bits) > 0
            self._space.walk(offset, used=used)
            offset += 1 << self._bits
