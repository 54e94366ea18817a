"""Storage with a volatile cache, and the states that a power cut may leave it in."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

import trio

from .._handler import BlockHandler

if TYPE_CHECKING:
    from typing_extensions import Buffer

    from .._native import IoVec

SECTOR = 512
"""Bytes that storage writes whole or not at all."""

_CHUNK = 1 << 14
_EMPTY = bytes(_CHUNK)


class Image:
    """What storage holds: bytes that are mostly zero, cheap to copy and to change.

    Args:
        size: Bytes.

    Attributes:
        size: Bytes; what is written behind it makes it larger, as in a file.
    """

    def __init__(self, size: int = 0) -> None:
        self.size = size
        self._chunks: dict[int, bytes] = {}

    @classmethod
    def load(cls, path: Path) -> Image:
        """Makes one of a file."""
        image = cls()
        with path.open("rb") as file:
            while data := file.read(_CHUNK):
                if any(data):
                    image.write(file.tell() - len(data), data)
            image.size = file.tell()
        return image

    def save(self, path: Path) -> None:
        """Makes a sparse file of it."""
        with path.open("wb") as file:
            file.truncate(self.size)
            for number, chunk in self._chunks.items():
                file.seek(number * _CHUNK)
                file.write(chunk[: max(self.size - number * _CHUNK, 0)])

    def copy(self) -> Image:
        """Makes another one of the same content."""
        image = Image(self.size)
        image._chunks = self._chunks.copy()
        return image

    def read(self, offset: int, length: int) -> bytes:
        """Returns so many bytes, fewer at the end."""
        length = max(min(length, self.size - offset), 0)
        first, start = divmod(offset, _CHUNK)
        if start + length <= _CHUNK:
            return self._chunks.get(first, _EMPTY)[start : start + length]
        last = (offset + length - 1) // _CHUNK
        return b"".join(self._chunks.get(number, _EMPTY) for number in range(first, last + 1))[start : start + length]

    def write(self, offset: int, data: Buffer) -> None:
        """Stores bytes."""
        data = bytes(data)
        at = 0
        while at < len(data):
            number, start = divmod(offset + at, _CHUNK)
            part = data[at : at + _CHUNK - start]
            old = self._chunks.get(number, _EMPTY)
            self._chunks[number] = old[:start] + part + old[start + len(part) :]
            at += len(part)
        self.size = max(self.size, offset + len(data))

    def zero(self, offset: int, length: int) -> None:
        """Stores zeroes, as far as it goes."""
        stop = min(offset + length, self.size)
        if offset >= stop:
            return
        numbers = range(offset // _CHUNK, (stop - 1) // _CHUNK + 1)
        # Of a size that only damage can make there are more chunks than anybody has time for.
        for number in [number for number in self._chunks if number in numbers] if len(numbers) > 64 else numbers:
            first, last = max(offset, number * _CHUNK), min(stop, (number + 1) * _CHUNK)
            if last - first == _CHUNK:
                self._chunks.pop(number, None)
            elif number in self._chunks:
                self.write(first, bytes(last - first))

    def resize(self, size: int) -> None:
        """Cuts it off, or adds zeroes."""
        self.zero(size, self.size - size)
        self.size = size


@dataclass(frozen=True, slots=True)
class Change:
    """Something that a power cut may undo, or leave half done.

    Attributes:
        offset: Of the first byte.
        length: Bytes.
        data: What was written; None for zeroes.
        size: Of the storage afterwards.
    """

    offset: int
    length: int
    data: bytes | None
    size: int


@dataclass(frozen=True, slots=True)
class Sync:
    """What had happened at `begin` is durable: everything before that place in the history, or a range of it.

    Attributes:
        begin: Place in the history.
        offset: Of the first byte of the range.
        length: Bytes of the range; None if it is everything.
    """

    begin: int
    offset: int = 0
    length: int | None = None


@dataclass(frozen=True, slots=True)
class Mark:
    """Something that the storage does not know of, such as that a command was answered."""

    text: str


@dataclass(frozen=True, slots=True)
class Cut:
    """A power cut.

    Attributes:
        after: How many events of the history had happened.
        kept: What of the changes that were not durable has survived: all, none, or some of the sectors.
        seed: Chooses the sectors.
        garbage: Share of the lost sectors that hold neither the old nor the new.
        spared: Sectors that are never garbage.
    """

    after: int
    kept: str = "some"
    seed: int = 0
    garbage: float = 0.0
    spared: frozenset[int] = frozenset()


KEPT = ("none", "all", "some", "most", "few")


class Medium:
    """A file, or a disk, with a volatile cache, that remembers in which order it was changed and synced.

    Its methods are those of a file descriptor, and may be called from any thread.

    Args:
        image: What it holds at the beginning, all of it durable; not changed.

    Attributes:
        image: What is read from it now.
        history: What happened to it, in order.
    """

    def __init__(self, image: Image) -> None:
        self._first = image
        self.image = image.copy()
        self.history: list[Change | Sync | Mark] = []
        self._lock = threading.Lock()

    @property
    def size(self) -> int:
        """Bytes."""
        return self.image.size

    def mark(self, text: str) -> int:
        """Notes that something has happened, and returns its place in the history."""
        with self._lock:
            self.history.append(Mark(text))
            return len(self.history) - 1

    def pread(self, length: int, offset: int) -> bytes:
        """Reads; fewer bytes at the end."""
        with self._lock:
            return self.image.read(offset, length)

    def pwrite(self, data: Buffer, offset: int) -> int:
        """Writes, and returns how many bytes: all of them."""
        with self._lock:
            data = bytes(data)
            self.image.write(offset, data)
            self.history.append(Change(offset, len(data), data, self.image.size))
            return len(data)

    def punch(self, offset: int, length: int) -> None:
        """Makes a hole. The size stays."""
        with self._lock:
            self.image.zero(offset, length)
            self.history.append(Change(offset, length, None, self.image.size))

    def truncate(self, size: int) -> None:
        """Makes it larger, with zeroes, or smaller."""
        with self._lock:
            old = self.image.size
            self.image.resize(size)
            self.history.append(Change(size, max(old - size, 0), None, size))

    def sync_range(self, offset: int, length: int) -> None:
        """Makes durable what was changed before of a range, and nothing else: after a write what RWF_DSYNC does."""
        with self._lock:
            self.history.append(Sync(len(self.history), offset, length))

    def fdatasync(self) -> None:
        """Makes durable what was changed before."""
        self.end_sync(self.begin_sync())

    def begin_sync(self) -> int:
        """Begins what `end_sync` ends; what is changed in between need not become durable."""
        with self._lock:
            return len(self.history)

    def end_sync(self, begin: int) -> None:
        """Makes durable what had been changed at `begin`."""
        with self._lock:
            self.history.append(Sync(begin))

    def after(self, cut: Cut) -> Image:
        """What is there after a power cut.

        Each sector has, independently of all others, what was durable or what any change since then made of it; with
        `garbage` anything. The size is what was durable or what any change since then made of it.
        """
        durable = max(
            (event.begin for event in self.history[: cut.after] if isinstance(event, Sync) and event.length is None),
            default=0,
        )
        base = self._first.copy()
        for event in self.history[:durable]:
            _apply(base, event)
        now = base.copy()
        versions: dict[int, list[bytes]] = {}
        # The place in the history of the change that has made each of them.
        places: dict[int, list[int]] = {}
        sizes = [base.size]
        for place, event in enumerate(self.history[durable : cut.after], durable):
            if isinstance(event, Sync) and event.length is not None:
                for sector in _sectors(event.offset, event.length):
                    count = bisect_left(places.get(sector, ()), event.begin)
                    if count:
                        base.write(sector * SECTOR, versions[sector][count - 1])
                        del versions[sector][:count], places[sector][:count]
                sizes = [max(size, event.offset + event.length) for size in sizes]
            if not isinstance(event, Change):
                continue
            _apply(now, event)
            sizes.append(event.size)
            for sector in _sectors(event.offset, event.length):
                versions.setdefault(sector, []).append(now.read(sector * SECTOR, SECTOR))
                places.setdefault(sector, []).append(place)
        if cut.kept == "all":
            return now
        if cut.kept == "none":
            return base
        random = Random(f"{cut.after} {cut.kept} {cut.seed}")
        share = {"few": 0.1, "some": 0.5, "most": 0.9}[cut.kept]
        for sector, contents in versions.items():
            if not contents:
                continue
            if random.random() < share:
                # The last of them is the likeliest: a cache writes what it has.
                content = contents[-1] if random.random() < 0.7 else random.choice(contents)
                base.write(sector * SECTOR, content)
            elif random.random() < cut.garbage and sector not in cut.spared:
                base.write(sector * SECTOR, random.randbytes(len(contents[-1])))
        base.resize(sizes[-1] if random.random() < share else random.choice(sizes))
        return base


def _apply(image: Image, event: Change | Sync | Mark) -> None:
    if not isinstance(event, Change):
        return
    if event.data is not None:
        image.write(event.offset, event.data)
    else:
        image.zero(event.offset, event.length)
    image.resize(event.size)


def _sectors(offset: int, length: int) -> Iterator[int]:
    return iter(range(offset // SECTOR, -(-(offset + length) // SECTOR)))


class MediumDisk(BlockHandler):
    """A `Medium` as a block handler, for handlers that sit on another. Lets others run in the middle of everything.

    Args:
        medium: Of whole blocks.
        block_size: Bytes of a logical block.
    """

    max_in_flight = 16
    fills_reads = True
    discard_zeroes = True

    def __init__(self, medium: Medium, *, block_size: int = SECTOR) -> None:
        self.medium = medium
        self.size = medium.size
        self.block_size = block_size

    async def aclose(self) -> None:
        """Makes everything durable."""
        self.medium.fdatasync()

    async def read(self, offset: int, iov: IoVec) -> None:
        """Reads."""
        await trio.lowlevel.checkpoint()
        iov.copy_from(self.medium.pread(iov.nbytes, offset))

    async def write(self, offset: int, iov: IoVec) -> None:
        """Writes into the cache."""
        await trio.lowlevel.checkpoint()
        self.medium.pwrite(iov.tobytes(), offset)
        await trio.lowlevel.checkpoint()

    async def flush(self) -> None:
        """Makes durable what was written when it was called."""
        begin = self.medium.begin_sync()
        await trio.lowlevel.checkpoint()
        self.medium.end_sync(begin)

    async def discard(self, offset: int, length: int) -> None:
        """Makes a hole."""
        await trio.lowlevel.checkpoint()
        self.medium.punch(offset, length)

    write_zeroes = discard
