"""The life of a log: it is put into the file, found again after a crash, and taken out. All of it blocks."""

from __future__ import annotations

import secrets
from dataclasses import dataclass

from .header import SECTOR, LogPlace, with_log, without_log
from .image import Image
from .log import SAVED_SECTOR, Chain, Log
from .refcounts import Refcounts


@dataclass(frozen=True, slots=True)
class Session:
    """An image with a log in it.

    Attributes:
        log: To write to.
        sector: Sector 0 of the file as it was without.
    """

    log: Log
    sector: bytes


def check_room(image: Image) -> None:
    """Whether the header can announce a log.

    Raises:
        Qcow2Error: It has no room for that.
    """
    cluster = image.storage.pread(0, image.header.cluster_size)
    with_log(image.header, cluster, LogPlace(0, 0, bytes(16)))


def place_log(image: Image, size: int) -> LogPlace:
    """Where a log of so many bytes goes: behind everything that is in use."""
    size = _round_up(size, image.header.cluster_size)
    return LogPlace(_end(image, image.storage.size), size, secrets.token_bytes(16))


def lay_log(image: Image, place: LogPlace) -> bytes:
    """Makes an empty log, and what the header will say of it; nobody sees it yet.

    Returns:
        Sector 0, for `announce`.

    Raises:
        OSError: It cannot be made, and is not there.
    """
    storage = image.storage
    cluster = storage.pread(0, image.header.cluster_size)
    at, extensions, opened = with_log(image.header, cluster, place)
    try:
        storage.allocate(place.offset, place.size)
        Log.prepare(storage, place, cluster[:SECTOR])
        if extensions:
            storage.pwrite(at, [extensions])
            storage.fdatasync()
    except OSError:
        storage.truncate(place.offset)
        raise
    return opened


def announce(image: Image, place: LogPlace, opened: bytes) -> Session:
    """Says in the header that the log is there.

    Raises:
        OSError: Whether it says so is not certain: the image has to be opened again.
    """
    storage = image.storage
    sector = storage.pread(0, SECTOR)
    storage.pwrite(0, [opened])
    storage.fdatasync()
    image.pages.forget(0, image.pages.size)
    image.log_range = (place.offset, place.offset + place.size)
    return Session(Log(storage, place, image.pages.size, cipher=image.payload.cipher), sector)


def resume(image: Image, chain: Chain) -> tuple[Session, int]:
    """Goes on behind a chain of records; what does not count of it will never count.

    Returns:
        The session, and the end of what is in use.
    """
    storage, log = image.storage, chain.log
    for at in chain.suspects:
        storage.pwrite(at, [bytes(SECTOR)])
    storage.fdatasync()
    if chain.turned is not None:
        log.write_state(chain.turned)
    stop = log.place.offset + log.place.size
    image.log_range = (log.place.offset, stop)
    sector = storage.pread(log.place.offset + SAVED_SECTOR, SECTOR)
    return Session(log, sector), _end(image, max(storage.size, stop))


def renounce(image: Image, session: Session, end: int) -> None:
    """Makes the image plain qcow2 again, when nothing in the log is needed any more.

    Args:
        image: What it is in.
        session: The log.
        end: Of the file.
    """
    storage, place = image.storage, session.log.place
    storage.pwrite(0, [without_log(session.sector, image.pages.read(0, SECTOR))])
    storage.fdatasync()
    if end > place.offset:
        storage.punch(place.offset, place.size)
    storage.truncate(end)
    # Once more: what is reserved behind the end is given back when the size does not change.
    storage.truncate(end)
    storage.fdatasync()


def _end(image: Image, size: int) -> int:
    """Behind everything that is in use: there may be clusters that nobody has written to yet."""
    bits = image.header.cluster_bits
    end = _round_up(max(size, image.header.cluster_size), image.header.cluster_size)
    return max(end, (Refcounts(image.pages, image.header).last_used(end >> bits) + 1) << bits)


def _round_up(size: int, unit: int) -> int:
    return -(-size // unit) * unit
