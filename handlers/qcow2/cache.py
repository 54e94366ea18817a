"""Clusters that are newer in memory than in the file."""

from __future__ import annotations

from collections.abc import Iterator

UNIT = 512
"""Bytes of what is kept track of."""

Pieces = list[tuple[int, bytes]]
"""Byte offset on the disk, and what is there."""


class Entry:
    """A dirty cluster.

    Attributes:
        data: All of it.
        unlogged: Bit n: unit n is in no record yet.
        logged: Bit n: unit n is in a record.
        version: Counts the changes.
        busy: It is being destaged.
        touched: It was changed since the destager looked at it.
        cost: Bytes of space that are reserved for it.
    """

    __slots__ = ("busy", "cost", "data", "logged", "touched", "unlogged", "version")

    def __init__(self, data: bytearray, cost: int) -> None:
        self.data = data
        self.cost = cost
        self.unlogged = 0
        self.logged = 0
        self.version = 0
        self.busy = False
        self.touched = False

    def mark(self, start: int, length: int) -> int:
        """These bytes have changed; returns how many of them no record would have had to hold before."""
        mask = (1 << ((start + length + UNIT - 1) // UNIT)) - (1 << (start // UNIT))
        new = mask & ~self.unlogged
        self.unlogged |= mask
        self.version += 1
        self.touched = True
        return new.bit_count() * UNIT

    def pieces(self, cluster: int, mask: int) -> Pieces:
        """The units that a mask names."""
        base = cluster * len(self.data)
        return [(base + start, bytes(self.data[start : start + length])) for start, length in runs(mask)]


class Cache:
    """The dirty clusters of an image, the oldest first, and how much of them the log has.

    Args:
        entries: By guest cluster: those that there are, and from now on this one's.
        limit: Of clusters.

    Attributes:
        unlogged: Bytes of pieces that no record has.
        logged: Bytes of those that one has.
    """

    def __init__(self, entries: dict[int, Entry], limit: int) -> None:
        self.entries = entries
        self.limit = limit
        self.unlogged = 0
        self.logged = sum(entry.logged.bit_count() * UNIT for entry in entries.values())
        self._unlogged_entries: dict[int, Entry] = {}

    def __len__(self) -> int:
        """Dirty clusters."""
        return len(self.entries)

    @property
    def has_room(self) -> bool:
        """Whether another cluster may come."""
        return len(self.entries) < self.limit

    def mark(self, cluster: int, entry: Entry, start: int, length: int) -> None:
        """Bytes of a cluster have changed."""
        if not entry.unlogged:
            self._unlogged_entries[cluster] = entry
        self.unlogged += entry.mark(start, length)

    def remove(self, cluster: int) -> Entry | None:
        """Takes a cluster out, which is what the file says now. Whoever destages it sees that it is not what it was."""
        entry = self.entries.pop(cluster, None)
        if entry is not None:
            self._unlogged_entries.pop(cluster, None)
            self.logged -= entry.logged.bit_count() * UNIT
            self.unlogged -= entry.unlogged.bit_count() * UNIT
            entry.version += 1
        return entry

    def pick(self, room: int, keep: int) -> list[tuple[int, Entry]]:
        """Entries to destage, the oldest first; those that were changed lately get another turn.

        Args:
            room: How many at most.
            keep: How many are to stay.
        """
        found: list[tuple[int, Entry]] = []
        wanted = min(len(self.entries) - keep, room)
        if wanted <= 0:
            return found
        later = []
        for cluster, entry in self.entries.items():
            if entry.busy:
                continue
            if entry.touched and keep:
                entry.touched = False
                later.append(cluster)
                if len(later) > 4 * room:
                    break
                continue
            found.append((cluster, entry))
            if len(found) == wanted:
                break
        if not found and later:
            found = [(cluster, self.entries[cluster]) for cluster in later[:wanted]]
        for cluster in later:
            self.entries[cluster] = self.entries.pop(cluster)
        found.sort(key=lambda pair: pair[0])
        return found

    def take_pieces(self) -> Pieces:
        """What no record has, for the next one."""
        found: Pieces = []
        for cluster, entry in self._unlogged_entries.items():
            found += entry.pieces(cluster, entry.unlogged)
            self.logged += (entry.unlogged & ~entry.logged).bit_count() * UNIT
            entry.logged |= entry.unlogged
            entry.unlogged = 0
        self.unlogged = 0
        self._unlogged_entries.clear()
        return found

    def logged_pieces(self) -> Pieces:
        """What records have, as it is now."""
        return [piece for cluster, entry in self.entries.items() for piece in entry.pieces(cluster, entry.logged)]


def runs(mask: int) -> Iterator[tuple[int, int]]:
    """Start and length in bytes of the runs of units that are set."""
    start = 0
    while mask:
        skip = (mask & -mask).bit_length() - 1
        mask >>= skip
        start += skip
        length = (~mask & (mask + 1)).bit_length() - 1
        yield start * UNIT, length * UNIT
        mask >>= length
        start += length
