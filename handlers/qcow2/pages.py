"""Metadata in memory: pages of the file, the words in them that the log does not have yet, and a limit."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence

import trio

from .storage import Storage

PAGE = 4096
_WORD = struct.Struct(">Q")


class Cold(Exception):
    """What is to be read is not in memory: read it in a thread, then try again.

    Args:
        storage: Where it is.
        offset: In the file.
        length: In bytes.
    """

    def __init__(self, storage: Storage, offset: int, length: int) -> None:
        super().__init__(storage.path, offset, length)
        self.storage = storage
        self.offset = offset
        self.length = length

    def warm(self) -> None:
        """Brings it into the page cache; blocks."""
        self.storage.pread(self.offset, self.length)


class Page:
    """A page.

    Attributes:
        data: Its bytes.
        mask: Bit n: word n changed since the last record.
        dirty: The file has something else.
        flying: A checkpoint is writing an older state of it.
        used: Since the clock's hand was here.
    """

    __slots__ = ("data", "dirty", "flying", "mask", "used")

    def __init__(self, data: bytearray) -> None:
        self.data = data
        self.mask = 0
        self.dirty = False
        self.flying = False
        self.used = False


class Pages:
    """A cache of pages, by number. Clean ones leave when there are too many; changed ones stay until `settle`.

    Args:
        storage: The image.
        cluster_size: A page is no larger, for what is beside it is somebody else's.
        limit: Bytes of clean pages to keep.
    """

    def __init__(self, storage: Storage, cluster_size: int, *, limit: int = 8 << 20) -> None:
        self.storage = storage
        self.size = min(PAGE, cluster_size)
        self.full = (1 << self.size // 8) - 1
        self.changed: dict[int, Page] = {}
        self.dirty: dict[int, Page] = {}
        self._limit = max(64, limit // self.size)
        self._pages: dict[int, Page] = {}
        self._flying = 0
        self._words = 0
        self._mask = self.size - 1
        self._bits = self.size.bit_length() - 1

    def get(self, number: int, *, wait: bool = True) -> Page:
        """The page with a number.

        Raises:
            Cold: With `wait` False: it has to be read.
        """
        page = self._pages.get(number)
        if page is None:
            offset = number << self._bits
            try:
                data = bytearray(self.storage.pread(offset, self.size, wait=wait))
            except BlockingIOError:
                raise Cold(self.storage, offset, self.size) from None
            if len(data) < self.size:
                data.extend(bytes(self.size - len(data)))
            # Two for one: those that a checkpoint has made clean leave in the end.
            for _ in range(min(2, len(self._pages) + 1 - self._limit - len(self.dirty) - self._flying)):
                self._evict()
            page = self._pages[number] = Page(data)
        page.used = True
        return page

    async def fetch(self, number: int) -> Page:
        """The page with a number; waits for it, if it has to be read."""
        while True:
            try:
                return self.get(number, wait=False)
            except Cold as cold:
                await trio.to_thread.run_sync(cold.warm)

    def _evict(self) -> None:
        for _ in range(2 * len(self._pages)):
            number = next(iter(self._pages))
            page = self._pages.pop(number)
            if not (page.used or page.dirty or page.flying):
                return
            page.used = False
            self._pages[number] = page

    def word(self, offset: int, *, wait: bool = True) -> int:
        """The big-endian number of 64 bits at a multiple of 8."""
        page = self._pages.get(offset >> self._bits)
        if page is None:
            page = self.get(offset >> self._bits, wait=wait)
        page.used = True
        value: int = _WORD.unpack_from(page.data, offset & self._mask)[0]
        return value

    def words(self, offset: int, count: int, *, wait: bool = True) -> list[int]:
        """Numbers that follow each other."""
        found: list[int] = []
        while count:
            at = offset & self._mask
            step = min(count, (self.size - at) >> 3)
            page = self.get(offset >> self._bits, wait=wait)
            found += struct.unpack_from(f">{step}Q", page.data, at)
            offset += step << 3
            count -= step
        return found

    def read(self, offset: int, length: int) -> bytes:
        """Bytes from anywhere; waits."""
        parts = []
        stop = offset + length
        while offset < stop:
            start = offset & self._mask
            step = min(self.size - start, stop - offset)
            parts.append(self.get(offset >> self._bits).data[start : start + step])
            offset += step
        return b"".join(parts)

    def set_word(self, offset: int, value: int) -> None:
        """Changes the number at a multiple of 8."""
        number = offset >> self._bits
        page = self.get(number)
        _WORD.pack_into(page.data, offset & self._mask, value)
        self._note(number, page, 1 << ((offset & self._mask) >> 3))

    def touch(self, offset: int) -> tuple[bytearray, int]:
        """For changing a part of the word that holds byte `offset`: the page's bytes and the place in them."""
        number = offset >> self._bits
        page = self.get(number)
        self._note(number, page, 1 << ((offset & self._mask) >> 3))
        return page.data, offset & self._mask

    def write(self, offset: int, data: bytes) -> None:
        """Changes bytes anywhere."""
        at = 0
        while at < len(data):
            number, start = (offset + at) >> self._bits, (offset + at) & self._mask
            step = min(self.size - start, len(data) - at)
            page = self.get(number)
            page.data[start : start + step] = data[at : at + step]
            first, last = start >> 3, (start + step - 1) >> 3
            self._note(number, page, (1 << (last + 1)) - (1 << first))
            at += step

    def make(self, offset: int, length: int) -> None:
        """Begins with zeroes, whatever the file has there. Offset and length are those of clusters."""
        for number in range(offset >> self._bits, (offset + length) >> self._bits):
            page = self._pages[number] = Page(bytearray(self.size))
            self._note(number, page, self.full)

    def forget(self, offset: int, length: int) -> None:
        """This is no metadata any more, and not to be written."""
        for number in range(offset >> self._bits, -(-(offset + length) >> self._bits)):
            self._pages.pop(number, None)
            self.changed.pop(number, None)
            self.dirty.pop(number, None)

    def put(self, number: int, mask: int, words: bytes) -> None:
        """Applies what a record says about a page."""
        if mask == self.full:
            page = self._pages[number] = Page(bytearray(words))
        else:
            page = self.get(number)
            for at, word in enumerate(bits(mask)):
                page.data[word * 8 : word * 8 + 8] = words[at * 8 : at * 8 + 8]
        page.dirty = True
        self.dirty[number] = page

    def _note(self, number: int, page: Page, mask: int) -> None:
        new = mask & ~page.mask
        if not new and page.dirty:
            return
        self._words += new.bit_count()
        page.mask |= mask
        page.dirty = True
        self.changed[number] = page
        self.dirty[number] = page

    @property
    def weight(self) -> int:
        """Bytes that a record needs for the changes since the last call of `take_changes`, at most."""
        return 8 * self._words + len(self.changed) * (8 + self.size // 64)

    def take_changes(self, *, images: bool = False) -> list[tuple[int, int, bytes]]:
        """Number, mask and words of what changed since the last call; with `images`, all that is dirty, whole."""
        found = []
        for number, page in sorted((self.dirty if images else self.changed).items()):
            mask = self.full if images else page.mask
            if mask == self.full:
                words = bytes(page.data)
            else:
                words = b"".join(page.data[word * 8 : word * 8 + 8] for word in bits(mask))
            found.append((number, mask, words))
        for page in self.changed.values():
            page.mask = 0
        self.changed.clear()
        self._words = 0
        return found

    def take_off(self) -> list[Page]:
        """All that is dirty is being written from copies now: what changes from here on is dirty again."""
        flying = list(self.dirty.values())
        for page in flying:
            page.dirty, page.flying = False, True
        self.dirty.clear()
        self._flying = len(flying)
        return flying

    def land(self, flying: Sequence[Page]) -> None:
        """What was taken off is in the file."""
        for page in flying:
            page.flying = False
        self._flying = 0
        # There are many clean ones now, and nobody may ask for others soon.
        for _ in range(len(self._pages) - self._limit - len(self.dirty)):
            self._evict()


def bits(mask: int) -> Iterator[int]:
    """The numbers of the bits that are set."""
    while mask:
        low = mask & -mask
        yield low.bit_length() - 1
        mask ^= low
