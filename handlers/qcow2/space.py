"""Free space in the file: holes that may be used again, and growth at the end."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

from .storage import Storage

SECTOR = 512
_REGION_BITS = 20
_REGION = 1 << (_REGION_BITS - 9)
"""Sectors of a region: its users are counted together."""
_MAX_REGIONS = 8192
"""Regions whose sectors are counted: 2 KiB of memory each. In others only whole clusters are used again."""
_EXACT = 64
"""Holes of up to so many sectors are found by their exact length."""
_MAX_HOLES = 50_000
_TRIES = 8
"""Holes of a length that are looked at, for one with the right alignment."""
_STEP = 8 << 20
# Users of a sector; 255 is more than was counted.
_ONE_MORE = bytes(min(count + 1, 255) for count in range(256))
_ONE_LESS = bytes(255 if count == 255 else max(count - 1, 0) for count in range(256))
_UNIT = 128
"""Sectors that compaction empties: so many are worth giving back."""
_FRAGMENTED = _UNIT // 4
"""Free sectors that make it worth to do so."""
_LARGE = bytes(_EXACT)
"""Users of a hole that is worth a system call of its own."""


class Holes:
    """Free runs of sectors, found by length; neighbours are one."""

    def __init__(self) -> None:
        self.sectors = 0
        self._lengths: dict[int, int] = {}
        self._starts: dict[int, int] = {}
        self._classes: list[dict[int, None]] = [{} for _ in range(_EXACT + 64)]
        # Bit n: there are holes of class n.
        self._present = 0

    @staticmethod
    def _class(length: int) -> int:
        return length if length <= _EXACT else _EXACT + length.bit_length()

    def _insert(self, start: int, length: int) -> None:
        self._lengths[start] = length
        self._starts[start + length] = start
        number = self._class(length)
        self._classes[number][start] = None
        self._present |= 1 << number
        self.sectors += length

    def _remove(self, start: int) -> int:
        length = self._lengths.pop(start)
        del self._starts[start + length]
        number = self._class(length)
        del self._classes[number][start]
        if not self._classes[number]:
            self._present &= ~(1 << number)
        self.sectors -= length
        return length

    def add(self, start: int, length: int) -> None:
        """These sectors are free now."""
        before = self._starts.get(start)
        if before is not None:
            length += self._remove(before)
            start = before
        if start + length in self._lengths:
            length += self._remove(start + length)
        # More than can be remembered: small ones are lost until the next open.
        if len(self._lengths) < _MAX_HOLES or length > _EXACT:
            self._insert(start, length)

    def take(self, length: int, alignment: int = 1) -> int | None:
        """The start of so many sectors, at a multiple of `alignment`; None if there is no such hole.

        Args:
            length: In sectors.
            alignment: In sectors.
        """
        least = self._class(length)
        present = self._present >> least
        while present:
            skip = (present & -present).bit_length() - 1
            for tried, start in enumerate(self._classes[least + skip]):
                if tried == _TRIES:
                    break
                first = -(-start // alignment) * alignment
                if first + length <= start + self._lengths[start]:
                    self._cut(start, first, length)
                    return first
            present &= present - 1
        return None

    def count(self, unit: int) -> int:
        """How many pieces of so many sectors there are."""
        return sum(length // unit for length in self._lengths.values() if length >= unit)

    def large(self) -> list[tuple[int, int]]:
        """Start and length of those that are worth a system call."""
        found = [start for number in range(_EXACT + 1, len(self._classes)) for start in self._classes[number]]
        return [(start, self._lengths[start]) for start in found]

    def remove(self, start: int) -> None:
        """Takes out a whole hole."""
        self._remove(start)

    def _cut(self, start: int, first: int, length: int) -> None:
        stop = start + self._remove(start)
        if first > start:
            self._insert(start, first - start)
        if first + length < stop:
            self._insert(first + length, stop - first - length)

    def all(self) -> list[tuple[int, int]]:
        """Start and length of all of them."""
        return list(self._lengths.items())

    def take_last(self, stop: int) -> int | None:
        """Removes the hole that ends at `stop`, and returns its start; None if there is none."""
        start = self._starts.get(stop)
        if start is not None:
            self._remove(start)
        return start


class Space:
    """Decides where new data goes. A place is taken here first, and gets a refcount when it is used.

    Args:
        storage: The image.
        cluster_bits: Of it.
        end: Bytes of it that are in use: what is behind is free.
        packed: Clusters are shared by compressed ones, so sectors have to be counted.
    """

    def __init__(self, storage: Storage, cluster_bits: int, end: int, *, packed: bool) -> None:
        self.holes = Holes()
        self.clusters = Holes()
        self.end = end
        self.packed = packed
        # Free space has to be reserved before it is used again: some of it has no blocks behind it.
        self.punched = storage.allocated < storage.size
        self.freed = False
        self._storage = storage
        self._cluster_size = 1 << cluster_bits
        self._per_cluster = self._cluster_size >> 9
        self._users: dict[int, bytearray] = {}
        self._reserved_end = end
        self._reserved = 0
        self._can_reserve = True
        # Units that are being emptied: nothing gets there.
        self._aside: set[int] = set()
        # While the image is looked through: what is free between these two is found by that, and not yet to be used.
        self._walked = self._unknown = 0

    # Reservations.

    def reserve(self, length: int) -> None:
        """Sees to it that so many bytes more can be written, whatever happens. Blocks for microseconds.

        Raises:
            OSError: There is no more space (ENOSPC, EDQUOT, EFBIG).
        """
        wanted = self._reserved + length
        if self._can_reserve and self.end + wanted > self._reserved_end:
            self._grow(wanted)
        self._reserved = wanted

    def _grow(self, wanted: int) -> None:
        start = max(self._reserved_end, self.end)
        need = self.end + wanted - start
        for step in (max(_STEP, need), need):
            try:
                self._can_reserve = self._storage.allocate(start, step)
            except OSError as error:
                # Behind the limits of the file, or of the file system, there may be holes still.
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
                last = error.errno
                continue
            self._reserved_end = start + step
            return
        if not self.punched and self._usable() >= wanted - max(0, self._reserved_end - self.end):
            return
        raise OSError(last, os.strerror(last))

    def _usable(self) -> int:
        """Bytes of clusters that fit into holes, whatever is stored where first."""
        # A cluster that needs alignment, or is a little longer for not being compressible, and what it cuts off.
        unit = 2 * self._per_cluster + 2
        return self.holes.count(unit) * self._cluster_size + self.clusters.count(self._per_cluster) * self._cluster_size

    def release(self, length: int) -> None:
        """What was reserved is used, or not needed."""
        self._reserved -= length

    @property
    def ahead(self) -> int:
        """Bytes behind the end that the file takes already, for what will be written."""
        return max(0, self._reserved_end - self.end) if self._can_reserve else 0

    # Allocation.

    def take_clusters(self, count: int) -> int:
        """Offset of clusters that nobody uses, and that are used from now on."""
        for holes in (self.clusters, self.holes):
            found = self._take(holes, count * self._per_cluster, self._per_cluster)
            if found is not None:
                at = found
                break
        else:
            self._align()
            at = self._extend(count * self._cluster_size)
        if self._users:
            self.use(at, count * self._cluster_size)
        return at

    def take_sectors(self, length: int) -> int | None:
        """Offset of a hole for `length` bytes; None if there is none."""
        return self._take(self.holes, -(-length // SECTOR))

    def take_run(self, length: int) -> int:
        """Offset of `length` bytes that follow each other, in clusters that are free, or at the end."""
        count = -(-length // self._cluster_size)
        start = self._take(self.clusters, count * self._per_cluster, self._per_cluster)
        if start is not None:
            return start
        if self.knows(self.end) or self.knows(self.end - 1):
            return self._extend(-(-length // SECTOR) * SECTOR)
        # Nobody counts sectors here: a cluster belongs to one run.
        self._align()
        return self._extend(count * self._cluster_size)

    def _align(self) -> None:
        """Makes the end that of a cluster; what is left over is a hole."""
        rest = -self.end % self._cluster_size
        if rest:
            at = self._extend(rest)
            if self.knows(at):
                self.holes.add(at // SECTOR, rest // SECTOR)

    def _extend(self, length: int) -> int:
        at = self.end
        self.end += length
        if self.packed:
            # In one that begins before, or whose cluster does, there may be something that was never counted.
            whole = max(1 << _REGION_BITS, self._cluster_size)
            for region in range(-(-at // whole) * whole >> _REGION_BITS, ((self.end - 1) >> _REGION_BITS) + 1):
                if region not in self._users and len(self._users) < _MAX_REGIONS:
                    self._users[region] = bytearray(_REGION)
        return at

    def _take(self, holes: Holes, sectors: int, alignment: int = 1) -> int | None:
        """Offset of a part of a hole that can be written for certain."""
        start = holes.take(sectors, alignment)
        if start is None or not (self.punched and self._can_reserve):
            return None if start is None else start * SECTOR
        try:
            self._storage.allocate(start * SECTOR, sectors * SECTOR)
        except OSError:
            # It has no space behind it any more; what was reserved at the end has.
            holes.add(start, sectors)
            return None
        return start * SECTOR

    def take_large(self) -> list[tuple[Holes, int, int]]:
        """Takes out holes that are worth to be given back to the file system: what, start and length in sectors."""
        found = []
        for holes in (self.holes, self.clusters):
            for start, length in holes.large():
                holes.remove(start)
                found.append((holes, start, length))
        self.punched = self.punched or bool(found)
        return found

    def give_back(self, found: list[tuple[Holes, int, int]]) -> None:
        """What `take_large` took may be used again."""
        for holes, start, length in found:
            # Holes of before a snapshot are not what they were.
            if holes in (self.holes, self.clusters):
                holes.add(start, length)

    # Users of sectors, where they are counted.

    def use(self, offset: int, length: int) -> None:
        """One more user of each sector that the range touches."""
        first, stop = offset >> 9, ((offset + length - 1) >> 9) + 1
        while first < stop:
            at = first & (_REGION - 1)
            end = min(at + stop - first, _REGION)
            users = self._users.get(first >> (_REGION_BITS - 9))
            if users is not None:
                users[at:end] = users[at:end].translate(_ONE_MORE)
            first += end - at

    def free(self, offset: int, length: int) -> None:
        """One user less; sectors without any are holes, where that is known."""
        self.freed = True
        first, stop = offset >> 9, ((offset + length - 1) >> 9) + 1
        while first < stop:
            at = first & (_REGION - 1)
            end = min(at + stop - first, _REGION)
            users = self._users.get(first >> (_REGION_BITS - 9))
            if users is not None:
                counted = users[at:end]
                users[at:end] = counted.translate(_ONE_LESS)
                start = counted.find(1)
                while start >= 0:
                    count = len(counted) - start - len(counted[start:].lstrip(b"\x01"))
                    self._add_hole(first + start, count)
                    start = counted.find(1, start + count)
            first += end - at

    def _add_hole(self, start: int, count: int) -> None:
        """Sectors are free now, but for those that will be found to be."""
        if not self._unknown and not self._aside:
            self.holes.add(start, count)
            return
        low, high = self._walked // SECTOR, self._unknown // SECTOR
        stop = start + count
        for first, last in ((start, min(stop, low)), (max(start, low, high), stop)):
            if not self._aside and first < last:
                self.holes.add(first, last - first)
            while self._aside and first < last:
                # What is set aside is added when it is put back.
                step = min(last, (first // _UNIT + 1) * _UNIT)
                if first // _UNIT not in self._aside:
                    self.holes.add(first, step - first)
                first = step

    def knows(self, offset: int) -> bool:
        """Whether the sectors there are counted."""
        return offset >> _REGION_BITS in self._users

    def free_cluster(self, offset: int) -> None:
        """Nobody uses this cluster any more."""
        self.freed = True
        found_later = self._walked <= offset < self._unknown
        if offset >> _REGION_BITS not in self._users:
            if not found_later:
                self.clusters.add(offset // SECTOR, self._per_cluster)
            return
        first = offset // SECTOR
        for sector in range(first, first + self._per_cluster):
            users, at = self._users.get(sector >> (_REGION_BITS - 9)), sector & (_REGION - 1)
            # Those without users are holes already.
            if users is not None and users[at]:
                users[at] = 0
                if not found_later and sector // _UNIT not in self._aside:
                    self.holes.add(sector, 1)

    # Looking through an image that others have written.

    def begin_scan(self) -> None:
        """From now on what is below the end is looked through: first all maps, then all clusters in order."""
        self._unknown = self.end
        # What was freed before is found again.
        self.holes, self.clusters, self._users = Holes(), Holes(), {}
        if self.packed:
            for region in range(min(-(-self.end >> _REGION_BITS), _MAX_REGIONS // 2)):
                self._users[region] = bytearray(_REGION)

    def walk(self, offset: int, *, used: bool) -> None:
        """The next cluster: whether it has users, as the refcounts say."""
        first = offset // SECTOR
        if offset >> _REGION_BITS not in self._users:
            if not used:
                self.clusters.add(first, self._per_cluster)
        elif self._per_cluster > _REGION:
            self._count_whole(first, used=used)
        else:
            users, at = self._users[offset >> _REGION_BITS], first & (_REGION - 1)
            counted = users[at : at + self._per_cluster]
            if not any(counted) and used:
                # A table, or something that others keep here.
                users[at : at + self._per_cluster] = b"\xff" * self._per_cluster
            elif not all(counted):
                for index, count in enumerate(counted):
                    if not count:
                        self.holes.add(first + index, 1)
        self._walked = offset + self._cluster_size

    def _count_whole(self, first: int, *, used: bool) -> None:
        """A cluster of several regions: it is used as a whole, or what nobody was counted to use is free."""
        for start in range(first, first + self._per_cluster, _REGION):
            users = self._users.get(start // _REGION)
            if used:
                if users is not None:
                    users[:] = b"\xff" * _REGION
            elif users is None or not any(users):
                self.holes.add(start, _REGION)
            else:
                # It has lost its last user, and the record that says so is on its way.
                for at, count in enumerate(users):
                    if not count:
                        self.holes.add(start + at, 1)

    def skip(self, offset: int, stop: int) -> int:
        """The first cluster from `offset` on that `walk` has to be told of; before it all sectors have users."""
        while offset < stop:
            users = self._users.get(offset >> _REGION_BITS)
            if users is None or self._per_cluster > _REGION:
                break
            at = (offset >> 9) & (_REGION - 1)
            found = users.find(0, at)
            offset += (found - at if found >= 0 else _REGION - at) // self._per_cluster * self._cluster_size
            self._walked = offset
            if found >= 0:
                break
        return offset

    def walk_free(self, offset: int, stop: int) -> None:
        """Clusters that are all free."""
        self.clusters.add(offset // SECTOR, (stop - offset) // SECTOR)
        self._walked = stop

    def end_scan(self) -> None:
        """Everything is known."""
        self._walked = self._unknown = 0

    # Compaction.

    @staticmethod
    def unit_of(offset: int) -> int:
        """The unit that a byte of the file is in."""
        return offset // (_UNIT * SECTOR)

    def sparse_units(self) -> Iterator[set[int]]:
        """Units that have many small holes, and so cannot be given back; some at a time."""
        if not self.packed or self._unknown:
            return
        for region in list(self._users):
            first = region * _REGION // _UNIT
            yield {unit for unit in range(first, first + _REGION // _UNIT) if self._is_sparse(unit)}

    def _is_sparse(self, unit: int) -> bool:
        users = self._users.get(unit * _UNIT // _REGION)
        if users is None or (unit + 1) * _UNIT * SECTOR > self.end:
            return False
        start = unit * _UNIT % _REGION
        stop = start + _UNIT
        return (
            _FRAGMENTED <= users.count(0, start, stop) < _UNIT
            # A table, or what others keep here.
            and users.find(255, start, stop) < 0
            and users.find(_LARGE, start, stop) < 0
        )

    def set_aside(self, units: set[int]) -> set[int]:
        """Lets nothing more get into these units, but for those that are not sparse any more; returns the others."""
        self._aside = {unit for unit in units if self._is_sparse(unit)}
        for start, length in self.holes.all():
            # What lies between these two is free as a whole, and so not sparse.
            first, last = start // _UNIT, (start + length - 1) // _UNIT
            keep = (first + 1) * _UNIT if first in self._aside else start
            stop = last * _UNIT if last in self._aside else start + length
            if (keep, stop) != (start, start + length):
                self.holes.remove(start)
                if stop > keep:
                    self.holes.add(keep, stop - keep)
        return self._aside

    def put_back(self) -> None:
        """What is free in them may be used again."""
        units, self._aside = self._aside, set()
        for unit in units:
            for start, length in self._free_in(unit):
                self.holes.add(start, length)

    def _free_in(self, unit: int) -> Iterator[tuple[int, int]]:
        """Start and length of the runs of sectors without users in a unit."""
        users = self._users.get(unit * _UNIT // _REGION)
        if users is None:
            return
        base = unit * _UNIT // _REGION * _REGION
        at, stop = unit * _UNIT - base, (unit + 1) * _UNIT - base
        while (at := users.find(0, at, stop)) >= 0:
            end = at
            while end < stop and not users[end]:
                end += 1
            yield base + at, end - at
            at = end

    def forget_sectors(self) -> None:
        """From now on only whole clusters are used again: others have become users of sectors, too."""
        self.packed = False
        self._users.clear()
        self.holes = Holes()

    def trim(self, start: int, stop: int) -> int:
        """Where the file may end: behind the last cluster in use; from `start` to `stop` is the log."""
        end = self.end
        while True:
            last = max(
                (h for h in (self.holes.take_last(end >> 9), self.clusters.take_last(end >> 9)) if h is not None),
                default=None,
            )
            if last is not None:
                end = last * SECTOR
            elif end == stop:
                end = start
            else:
                return -(-end // self._cluster_size) * self._cluster_size
