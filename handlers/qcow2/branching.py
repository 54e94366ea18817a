"""Changes of whole maps: snapshots that are made, applied and deleted, and the size of the disk.

Each of them changes memory alone, as a change of one cluster does; the next record has all of it, or none.
"""

from __future__ import annotations

import struct
import time
from array import array

from ._errors import Qcow2Error
from .changes import Changes
from .header import Header
from .image import Image
from .snapshots import Snapshot, find_snapshot, read_snapshots
from .space import Space
from .tables import COMPRESSED, COPIED, OFFSET, Tables

_MAX_L1 = 4 << 20


class Branching:
    """Works on an image that nobody writes to meanwhile, and whose cache is empty.

    Args:
        image: What to change.
        changes: Of its map.
        space: Forgets what it knew of sectors, for these have other users afterwards.
    """

    def __init__(self, image: Image, changes: Changes, space: Space) -> None:
        self._image = image
        self._header = image.header
        self._pages = image.pages
        self._changes = changes
        self._space = space
        self._bits = image.header.cluster_bits

    def create_snapshot(self, name: str) -> None:
        """Keeps the state of the disk.

        Raises:
            Qcow2Error: There is one of this name, or the image cannot count so many users.
        """
        if self._image.payload.external:
            raise Qcow2Error("an image with an external data file can have no snapshots: its clusters are not counted")
        snapshots = read_snapshots(self._pages, self._header)
        if any(name in (one.name, one.id) for one in snapshots):
            raise Qcow2Error(f"there is a snapshot {name!r} already")
        numbers = [int(one.id) for one in snapshots if one.id.isascii() and one.id.isdigit()]
        tables = self._image.tables
        self._check_users(tables)
        self._begin()
        self._count(tables, 1)
        self._mark_copied(tables)
        l1_offset = self._copy_l1(tables, tables.l1_entries)
        now = time.time_ns()
        fields = (now // 10**9, now % 10**9, 0, 0, self._header.size)
        number = str(max(numbers, default=0) + 1)
        self._write_table([*snapshots, Snapshot(number, name, l1_offset, tables.l1_entries, *fields)])

    def delete_snapshot(self, which: str) -> None:
        """Forgets a state, and frees what only it had."""
        snapshots = read_snapshots(self._pages, self._header)
        found = find_snapshot(snapshots, which)
        self._begin()
        self._count(self._tables_of(found), -1)
        self._drop_clusters(found.l1_offset, found.l1_entries * 8)
        self._mark_copied(self._image.tables)
        self._write_table([one for one in snapshots if one is not found])

    def apply_snapshot(self, which: str) -> None:
        """Makes a state that was kept that of the disk; what the disk had is lost."""
        found = find_snapshot(read_snapshots(self._pages, self._header), which)
        tables = self._image.tables
        kept = self._tables_of(found)
        self._check_users(kept)
        self._begin()
        self._count(kept, 1)
        self._count(tables, -1)
        old, old_entries = tables.l1_offset, tables.l1_entries
        self._set_l1(self._copy_l1(kept, found.l1_entries), found.l1_entries)
        self._drop_clusters(old, old_entries * 8)
        self._set_size(found.disk_size)
        self._mark_copied(tables)

    def resize(self, size: int) -> None:
        """Changes the size of the disk; what is behind a smaller one is zero already."""
        self.make_room(size)
        self._set_size(size)

    def make_room(self, size: int) -> None:
        """Has a map for a disk of this size, which can be written from now on, and is not seen before `resize`."""
        entries = self._header.l1_needed(size)
        if entries > _MAX_L1:
            raise Qcow2Error(f"{size} bytes are too many for clusters of {1 << self._bits}")
        tables = self._image.tables
        if entries > tables.l1_entries:
            old, old_entries = tables.l1_offset, tables.l1_entries
            self._set_l1(self._copy_l1(tables, entries), entries)
            self._drop_clusters(old, old_entries * 8)
        self._image.size = max(self._image.size, size)

    def _begin(self) -> None:
        self._space.forget_sectors()

    def _tables_of(self, snapshot: Snapshot) -> Tables:
        return Tables(self._pages, self._header, l1_offset=snapshot.l1_offset, l1_entries=snapshot.l1_entries)

    def _entries(self, table: int, tables: Tables) -> array[int]:
        entries = array("Q", self._pages.read(table, 1 << self._bits))
        entries.byteswap()
        return entries[::2] if tables.extended else entries

    def _hosts(self, entry: int, tables: Tables) -> range:
        """The host clusters that an entry names."""
        if entry & COMPRESSED:
            offset, length = tables.place(entry)
            return range(offset >> self._bits, ((offset + length - 1) >> self._bits) + 1)
        host = tables.host(entry) >> self._bits
        return range(host, host + 1) if host else range(0)

    def _check_users(self, tables: Tables) -> None:
        """Refuses what would make more users of something in a map than can be counted."""
        if self._most_users(tables) * 2 > self._changes.refcounts.max:
            raise Qcow2Error(f"the refcounts of the image cannot count more than {self._changes.refcounts.max} users")

    def _most_users(self, tables: Tables) -> int:
        """The highest refcount of anything in a map."""
        most = 0
        get = self._changes.refcounts.get
        for index in range(tables.l1_entries):
            table = tables.table(index)
            if table:
                most = max(most, get(table >> self._bits))
                for entry in self._entries(table, tables):
                    if entry:
                        most = max(most, *map(get, self._hosts(entry, tables)), 0)
        return most

    def _count(self, tables: Tables, delta: int) -> None:
        """One user more, or less, of everything in a map but its L1 table."""
        for index in range(tables.l1_entries):
            table = tables.table(index)
            if not table:
                continue
            for entry in self._entries(table, tables):
                if entry & (OFFSET | COMPRESSED):
                    for host in self._hosts(entry, tables):
                        if not self._changes.refcounts.add(host, delta):
                            self._changes.drop_cluster(host << self._bits)
                    if entry & COMPRESSED and delta < 0:
                        self._image.forget(entry)
            if delta > 0:
                self._changes.refcounts.add(table >> self._bits, delta)
            else:
                self._changes.drop_metadata(table)

    def _mark_copied(self, tables: Tables) -> None:
        """Says of each entry whether it is the only one: then what it names may be written in place."""
        get = self._changes.refcounts.get
        step = 16 if tables.extended else 8
        for index in range(tables.l1_entries):
            table = tables.table(index)
            if not table:
                continue
            alone = get(table >> self._bits) == 1
            self._set_flag(tables.l1_offset + index * 8, tables.l1(index), alone)
            for number, entry in enumerate(self._entries(table, tables)):
                host = 0 if entry & COMPRESSED else tables.host(entry)
                if host:
                    self._set_flag(table + number * step, entry, get(host >> self._bits) == 1)

    def _set_flag(self, at: int, entry: int, copied: bool) -> None:
        wanted = entry | COPIED if copied else entry & ~COPIED
        if wanted != entry:
            self._pages.set_word(at, wanted)

    def _copy_l1(self, tables: Tables, entries: int) -> int:
        """Offset of a new L1 table with the content of another."""
        count = max(1, -(-entries * 8 >> self._bits))
        new = self._changes.make_metadata(count)
        self._pages.write(new, self._pages.read(tables.l1_offset, min(entries, tables.l1_entries) * 8))
        return new

    def _set_l1(self, offset: int, entries: int) -> None:
        header, tables = self._header, self._image.tables
        header.l1_offset = tables.l1_offset = offset
        header.l1_entries = tables.l1_entries = entries
        self._changes.write_fields(Header.L1_ENTRIES, struct.pack(">IQ", entries, offset))

    def _set_size(self, size: int) -> None:
        self._header.size = self._image.size = size
        self._changes.write_fields(Header.SIZE, struct.pack(">Q", size))

    def _drop_clusters(self, offset: int, length: int) -> None:
        for at in range(offset, offset + length, 1 << self._bits):
            self._changes.drop_metadata(at)

    def _write_table(self, snapshots: list[Snapshot]) -> None:
        """Writes a new snapshot table, and drops the old one."""
        header = self._header
        old, length = header.snapshots_offset, 0
        for one in read_snapshots(self._pages, header):
            length += len(one.pack())
        content = b"".join(one.pack() for one in snapshots)
        new = 0
        if content:
            new = self._changes.make_metadata(-(-len(content) >> self._bits))
            self._pages.write(new, content)
        if header.snapshots:
            self._drop_clusters(old, max(length, 1))
        header.snapshots, header.snapshots_offset = len(snapshots), new
        self._changes.write_fields(Header.SNAPSHOTS, struct.pack(">IQ", len(snapshots), new))
