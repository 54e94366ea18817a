"""Clusters that are newer in memory than in the file."""

from __future__ import annotations

from collections.abc import Iterator

UNIT = 512
"""Bytes of what is kept track of."""


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
