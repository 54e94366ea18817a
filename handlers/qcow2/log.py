"""The write-ahead log: records, states, and where the next record goes. FORMAT.md has the layout and the argument."""

from __future__ import annotations

import errno
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import zstandard

from tcmu_rs import IoVec

from ._errors import Qcow2Error
from .header import SECTOR, LogPlace
from .payload import Cipher
from .storage import Storage

STATES = 8192
"""Bytes in front of the first half."""
SAVED_SECTOR = 512
"""Where sector 0 of the file is, as it was before the log."""
_STATE_AT = (0, 4096)
_STATE = struct.Struct("<4sIQ16sIIQ")
_RECORD = struct.Struct("<4sIQ16sIIIIIIQ")
_U64 = struct.Struct("<Q")
_EXTENT = struct.Struct("<QII")
_PIECE = struct.Struct("<QI")
_COMPRESSED = 1
_WORTH_COMPRESSING = 4096
_MAX_PAGES = 512 << 20
"""Bytes of the pages of a record that are decompressed, whatever it says."""
_AT_ONCE = 1 << 20

PageChange = tuple[int, int, bytes]
"""Number of a page, mask of words, the words."""


@dataclass(slots=True)
class Record:
    """What one flush makes durable.

    Attributes:
        pages: Changes of metadata.
        settled: Guest clusters whose older pieces count no more.
        extents: Offset, length and crc of data that this record needs.
        pieces: Guest offset and bytes.
        in_place: Data was written in place before, and has to be durable with this.
    """

    pages: list[PageChange] = field(default_factory=list)
    settled: list[int] = field(default_factory=list)
    extents: list[tuple[int, int, int]] = field(default_factory=list)
    pieces: list[tuple[int, bytes]] = field(default_factory=list)
    in_place: bool = False

    @property
    def needs_data(self) -> bool:
        """Whether it needs what was written to the file before."""
        return self.in_place or bool(self.extents)


def encode(
    record: Record, seq: int, session: bytes, page_size: int, *, at: int = 0, cipher: Cipher | None = None
) -> bytes:
    """The bytes of a record: a multiple of a sector.

    Args:
        record: What it says.
        seq: Its number.
        session: That of the log.
        page_size: Of metadata.
        at: Where it will be in the file.
        cipher: For the pieces, whose sectors get the numbers of those that the record is in.

    Raises:
        OSError: There are more pages than recovery would read (EFBIG).
    """
    mask_size = page_size // 64
    parts: list[bytes] = []
    for number, mask, words in record.pages:
        parts += (_U64.pack(number), mask.to_bytes(mask_size, "little"), words)
    pages = b"".join(parts)
    if len(pages) > _MAX_PAGES:
        raise OSError(errno.EFBIG, f"{len(pages)} bytes of tables are too many for a record, {_MAX_PAGES} can be")
    flags = 0
    if len(pages) > _WORTH_COMPRESSING:
        pages = zstandard.ZstdCompressor(level=1).compress(pages)
        flags = _COMPRESSED
    body = b"".join(
        [
            pages,
            b"".join(map(_U64.pack, record.settled)),
            b"".join(_EXTENT.pack(*extent) for extent in record.extents),
            b"".join(_PIECE.pack(offset, len(data)) for offset, data in record.pieces),
            _sealed([data for _, data in record.pieces], at, cipher),
        ]
    )
    length = -(-(_RECORD.size + len(body)) // SECTOR) * SECTOR
    counts = (len(pages), len(record.pages), len(record.settled), len(record.extents), len(record.pieces))
    head = bytearray(_RECORD.pack(b"TCWL", 0, seq, session, flags, *counts, length))
    body = body.ljust(length - len(head), b"\0")
    crc = zlib.crc32(body, zlib.crc32(memoryview(head)[8:]))
    struct.pack_into("<I", head, 4, crc)
    return bytes(head) + body


def _sealed(pieces: Sequence[bytes], at: int, cipher: Cipher | None) -> bytes:
    data = b"".join(pieces)
    # Whoever has the file must not find in the log what is encrypted everywhere else.
    return data if cipher is None or not data else bytes(cipher.encrypt(at // SECTOR, IoVec([data])))


def decode(
    storage: Storage, at: int, stop: int, seq: int, session: bytes, page_size: int, cipher: Cipher | None = None
) -> tuple[Record, int] | None:
    """Reads the record at a place in the file, and how long it is; None if there is none with this number."""
    if at + SECTOR > stop:
        return None
    head = storage.pread(at, _RECORD.size)
    if len(head) < _RECORD.size:
        return None
    magic, crc, found_seq, found_session, flags, page_bytes, n_pages, n_settled, n_extents, n_pieces, length = (
        _RECORD.unpack(head)
    )
    if (magic, found_seq, found_session) != (b"TCWL", seq, session):
        return None
    if length % SECTOR or not SECTOR <= length <= min(stop, storage.size) - at:
        return None
    data = storage.pread(at, length)
    if len(data) < length or zlib.crc32(memoryview(data)[8:]) != crc:
        return None
    record = Record()
    body = memoryview(data)[_RECORD.size :]
    try:
        pages = bytes(body[:page_bytes])
        if flags & _COMPRESSED:
            if zstandard.frame_content_size(pages) > _MAX_PAGES:
                return None
            pages = zstandard.ZstdDecompressor().decompress(pages, max_output_size=_MAX_PAGES)
        record.pages = list(_decode_pages(pages, n_pages, page_size))
        place = page_bytes
        record.settled = [_U64.unpack_from(body, place + 8 * index)[0] for index in range(n_settled)]
        place += 8 * n_settled
        record.extents = [_EXTENT.unpack_from(body, place + 16 * index) for index in range(n_extents)]
        place += 16 * n_extents
        heads = [_PIECE.unpack_from(body, place + 12 * index) for index in range(n_pieces)]
        place += 12 * n_pieces
        total = sum(size for _, size in heads)
        if place + total > len(body) or (cipher is not None and total % SECTOR):
            return None
        content = bytearray(body[place : place + total])
        if cipher is not None and content:
            cipher.decrypt(at // SECTOR, IoVec([content]))
        start = 0
        for offset, size in heads:
            record.pieces.append((offset, bytes(content[start : start + size])))
            start += size
    except (struct.error, zstandard.ZstdError, IndexError):
        return None
    return record, length


def _decode_pages(data: bytes, count: int, page_size: int) -> Sequence[PageChange]:
    mask_size = page_size // 64
    found = []
    at = 0
    for _ in range(count):
        number = _U64.unpack_from(data, at)[0]
        mask = int.from_bytes(data[at + 8 : at + 8 + mask_size], "little")
        at += 8 + mask_size
        length = 8 * mask.bit_count()
        if at + length > len(data):
            raise IndexError
        found.append((number, mask, data[at : at + length]))
        at += length
    return found


class Log:
    """Where records go.

    Args:
        storage: The image.
        place: Of the log in it.
        page_size: Of metadata.
        generation: Of the newest state.
        half: Where records go now: 0 or 1.
        position: In that half, where the next one goes.
        seq: Its number.
        cipher: Of the image, if it is encrypted.
    """

    def __init__(
        self,
        storage: Storage,
        place: LogPlace,
        page_size: int,
        *,
        generation: int = 1,
        half: int = 0,
        position: int = 0,
        seq: int = 1,
        cipher: Cipher | None = None,
    ) -> None:
        self.place = place
        self._cipher = cipher
        self._storage = storage
        self._page_size = page_size
        self._generation = generation
        self._half = half
        self._position = position
        self._seq = seq
        self.half_size = (place.size - STATES) // 2 // SECTOR * SECTOR

    @property
    def room(self) -> int:
        """Bytes that are left in this half."""
        return self.half_size - self._position

    def encode(self, record: Record) -> bytes:
        """The next record, for where it will be."""
        at = self._start(self._half) + self._position
        return encode(record, self._seq, self.place.session, self._page_size, at=at, cipher=self._cipher)

    async def append(self, data: bytes, *, everything: bool) -> None:
        """Writes the next record, which has room, and makes it durable; with `everything` all before it, too."""
        await self._storage.commit(self._start(self._half) + self._position, data, everything=everything)
        self._position += len(data)
        self._seq += 1

    def switch(self) -> int:
        """Turns to the other half, for a record of images; returns its number."""
        self._half ^= 1
        self._position = 0
        return self._seq

    def write_state(self, seq: int) -> None:
        """Makes durable that recovery begins with this half, at the record `seq`. Blocks."""
        self._generation += 1
        write_state(self._storage, self.place, self._generation, self._half, seq)
        self._storage.fdatasync()

    def _start(self, half: int) -> int:
        return self.place.offset + STATES + half * self.half_size

    @staticmethod
    def prepare(storage: Storage, place: LogPlace, sector: bytes) -> None:
        """Writes an empty log, with sector 0 of the file as it is. Blocks, and makes it durable."""
        zeroes = memoryview(bytes(1 << 20))
        for at in range(0, place.size, len(zeroes)):
            storage.pwrite(place.offset + at, [zeroes[: min(len(zeroes), place.size - at)]])
        storage.pwrite(place.offset + SAVED_SECTOR, [sector])
        write_state(storage, place, 1, 0, 1)
        storage.fdatasync()


def write_state(storage: Storage, place: LogPlace, generation: int, half: int, seq: int) -> None:
    """Writes the state that is the older one."""
    head = bytearray(_STATE.pack(b"TCWS", 0, generation, place.session, half, 0, seq)).ljust(SECTOR, b"\0")
    struct.pack_into("<I", head, 4, zlib.crc32(memoryview(head)[8:]))
    storage.pwrite(place.offset + _STATE_AT[generation & 1], [head])


@dataclass(slots=True)
class Chain:
    """What recovery finds.

    Attributes:
        records: In order.
        suspects: Sectors in the file where a record that does not count may begin.
        log: To go on with.
        turned: Number of the record at the start of the other half, if the chain goes there.
    """

    records: list[Record]
    suspects: list[int]
    log: Log
    turned: int | None


def read_chain(storage: Storage, place: LogPlace, page_size: int, cipher: Cipher | None = None) -> Chain:
    """Follows the records, and verifies what the last one needs. Blocks; writes nothing.

    Raises:
        Qcow2Error: Neither state is valid.
    """
    states = []
    for at in _STATE_AT:
        data = storage.pread(place.offset + at, SECTOR)
        if len(data) == SECTOR:
            magic, crc, generation, session, half, _, seq = _STATE.unpack_from(data)
            if (magic, session) == (b"TCWS", place.session) and zlib.crc32(data[8:]) == crc and half < 2:
                states.append((generation, half, seq))
    if not states:
        raise Qcow2Error(f"{storage.path}: the log of the image is damaged: neither of its states is valid")
    generation, half, seq = max(states)
    half_size = (place.size - STATES) // 2 // SECTOR * SECTOR
    starts = [place.offset + STATES + index * half_size for index in (0, 1)]
    records: list[Record] = []
    places: list[tuple[int, int]] = []
    ends: list[tuple[int, int]] = []
    turned: int | None = None
    at = starts[half]
    while True:
        found = decode(storage, at, starts[half] + half_size, seq, place.session, page_size, cipher)
        if found is not None:
            record, length = found
            records.append(record)
            places.append((half, at))
            at += length
            seq += 1
            continue
        ends.append((half, at))
        if turned is not None:
            break
        # A checkpoint may have begun in the other half.
        turned, half = seq, half ^ 1
        at = starts[half]
    end = ends[0] if seq == turned else ends[1]
    if records and not _arrived(storage, records[-1]):
        records.pop()
        seq -= 1
        end = places.pop()
        ends.append(end)
        if seq == turned:
            end = ends[0]
    if seq <= turned:
        # Nothing counts in the other half.
        turned = None
    half, at = end
    log = Log(
        storage, place, page_size, generation=generation, half=half, position=at - starts[half], seq=seq, cipher=cipher
    )
    suspects = [at for half, at in ends if at + SECTOR <= starts[half] + half_size]
    return Chain(records, suspects, log, turned)


def _arrived(storage: Storage, record: Record) -> bool:
    """Whether the data that a record needs is in the file."""
    size = storage.size
    return all(
        offset + length <= size and _crc(storage, offset, length) == crc for offset, length, crc in record.extents
    )


def _crc(storage: Storage, offset: int, length: int) -> int:
    crc = 0
    for at in range(offset, offset + length, _AT_ONCE):
        crc = zlib.crc32(storage.pread(at, min(_AT_ONCE, offset + length - at)), crc)
    return crc
