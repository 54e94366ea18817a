"""A disk that lives in memory and is forgotten at the end: `ram:`, with `--size`."""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

from tcmu_rs import BlockHandler, ExtentState, IoVec, Options

if TYPE_CHECKING:
    from typing import Self

_MAX_EXTENTS = 256


class RamHandler(BlockHandler):
    """Memory that is taken as it is written, and given back as it is discarded.

    Args:
        size: Bytes.
        block_size: Bytes of a logical block.
        read_only: Refuse writes.
    """

    fills_reads = True
    discard_zeroes = True

    def __init__(self, size: int, *, block_size: int = 512, read_only: bool = False) -> None:
        self.size = size
        self.block_size = block_size
        self.read_only = read_only

    @classmethod
    def from_config(cls, config: str, options: Options) -> Self:
        """Takes no text; the size is an option."""
        if config:
            raise ValueError(f"ram takes nothing behind the colon, not {config!r}")
        if options.size is None:
            raise ValueError("ram has no size of its own: add --size, such as --size 1G")
        if options.extra:
            raise ValueError(f"ram knows no option {', '.join(options.extra)}")
        return cls(options.size, block_size=options.block_size or 512, read_only=options.read_only)

    async def open(self) -> None:
        """Reserves the address space."""
        self._map = mmap.mmap(-1, self.size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self._data = memoryview(self._map)
        # A byte for each page: whether it was written. Itself memory that is taken as it is written.
        self._taken = mmap.mmap(-1, -(-self.size // mmap.PAGESIZE))

    async def aclose(self) -> None:
        """Gives the memory back."""
        if hasattr(self, "_map"):
            self._data.release()
            self._map.close()
            self._taken.close()

    def set_size(self, size: int) -> None:
        """Takes or gives back address space; what is behind a new end is forgotten first."""
        if size < self.size:
            self.discard(size, self.size - size)
        self._data.release()
        try:
            self._map.resize(size)
            self._taken.resize(-(-size // mmap.PAGESIZE))
            self.size = size
        finally:
            self._data = memoryview(self._map)

    def read(self, offset: int, iov: IoVec) -> None:
        """Copies out."""
        iov.copy_from(self._data[offset : offset + iov.nbytes])

    def write(self, offset: int, iov: IoVec) -> None:
        """Copies in."""
        stop = offset + iov.nbytes
        first, last = offset // mmap.PAGESIZE, (stop - 1) // mmap.PAGESIZE
        # First: a page that is said to be free is free.
        if first == last:
            self._taken[first] = 1
        else:
            self._taken[first : last + 1] = b"\1" * (last + 1 - first)
        iov.copy_into(self._data[offset:stop])

    def discard(self, offset: int, length: int) -> None:
        """Frees whole pages and zeroes the rest."""
        page = mmap.PAGESIZE
        start, stop = -(-offset // page) * page, (offset + length) // page * page
        if start >= stop:
            self._data[offset : offset + length] = bytes(length)
            return
        self._data[offset:start] = bytes(start - offset)
        self._data[stop : offset + length] = bytes(offset + length - stop)
        self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)
        self._taken[start // page : stop // page] = bytes((stop - start) // page)

    write_zeroes = discard

    def extents(self, offset: int, length: int) -> list[tuple[int, ExtentState]]:
        """Pages that were written and not discarded since are in use."""
        page = mmap.PAGESIZE
        found: list[tuple[int, ExtentState]] = []
        end = offset + length
        while offset < end and len(found) < _MAX_EXTENTS:
            taken = self._taken[offset // page]
            next_page = self._taken.find(bytes([1 - taken]), offset // page)
            stop = end if next_page < 0 else min(next_page * page, end)
            found.append((stop - offset, ExtentState.MAPPED if taken else ExtentState.DEALLOCATED))
            offset = stop
        return found
