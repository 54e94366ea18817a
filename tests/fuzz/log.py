"""A qcow2 image that was not closed: the replay of its write-ahead log.

An input says how one of two images of ours (`images/`) was damaged: a byte of flags, and then changes. A change has a
byte that says what it is, three bytes where (in a record or state, in the log, or in the file), and what it needs. By
the flags the checksums of the log are made right again, as an attacker would.

The image opens or is refused, and everything ends in a documented exception. If the checksums were left alone and the
damage is the log's, each block of the compressed image has what was written to it at some time; compressed clusters and
records are all covered.
"""

from __future__ import annotations

import functools
import struct
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import trio
import zstandard

from tcmu_rs import IoVec
from tcmu_rs.handlers.qcow2 import header as header_module
from tcmu_rs.handlers.qcow2.handler import Qcow2Handler
from tcmu_rs.handlers.qcow2.tools import create

from .qcow2 import PATH, SIZE, change, look, put, read_all

IMAGES = Path(__file__).with_name("images")
NAMES = ("packed", "plain")
PLAIN, SEAL, WRITE = 1, 2, 4
"""Flags: the second image; checksums are made right; the image is written to."""
BLOCK = 512


@functools.cache
def image(name: str) -> tuple[bytes, int, int, list[int]]:
    """An image, where its log is, from and to, and where in the file the log has states and records."""
    data = zstandard.ZstdDecompressor().decompress((IMAGES / f"{name}.zst").read_bytes())
    log = header_module.parse(data).log
    assert log is not None
    stop = log.offset + log.size
    return data, log.offset, stop, [at for at in range(log.offset, stop, BLOCK) if data[at : at + 3] == b"TCW"]


def damage(data: bytes) -> tuple[bytearray, bool]:
    """The image that an input stands for, and whether nothing outside of its log has changed."""
    flags = data[0]
    whole, start, stop, heads = image(NAMES[flags & PLAIN])
    found = bytearray(whole)
    at = 1
    while at + 5 <= len(data):
        kind, length = data[at] & 7, data[at] >> 3 & 7
        place = int.from_bytes(data[at + 1 : at + 4], "big")
        at += 4
        if data[at - 4] & 0x80:
            place = heads[(place >> 8) % len(heads)] + (place & 0xFF)
        elif data[at - 4] & 0x40:
            place = start + place % (stop - start)
        if kind <= 2:
            new = data[at : at + 1 + length]
            at += 1 + length
            if kind:
                new = bytes(a ^ b for a, b in zip(new, found[place : place + len(new)], strict=False))
            if place + len(new) <= len(found):
                found[place : place + len(new)] = new
        elif kind == 3:
            # A sector of another place: what was there before, or what was to go elsewhere.
            source = int.from_bytes(data[at : at + 2], "big") * BLOCK % len(found)
            at += 2
            place = place // BLOCK * BLOCK % len(found)
            found[place : place + BLOCK] = found[source : source + BLOCK]
        elif kind == 4:
            count = min((length + 1) * BLOCK, max(0, len(found) - place))
            found[place : place + count] = bytes(count)
        else:
            del found[place % len(found) :]
            break
    if flags & SEAL:
        seal(found, start, min(stop, len(found)))
    untouched = found[:start] == whole[:start] and found[stop:] == whole[stop:]
    return found, untouched


def seal(data: bytearray, start: int, stop: int) -> None:
    """Gives all states and records of the log the checksums that they should have."""
    for at in range(start, stop - BLOCK + 1, BLOCK):
        if data[at : at + 4] == b"TCWS":
            struct.pack_into("<I", data, at + 4, zlib.crc32(data[at + 8 : at + BLOCK]))
        elif data[at : at + 4] == b"TCWL":
            length = struct.unpack_from("<Q", data, at + 56)[0]
            if length <= stop - at:
                struct.pack_into("<I", data, at + 4, zlib.crc32(data[at + 8 : at + length]))


def one_input(data: bytes) -> None:
    if not data:
        return
    flags = data[0]
    whole, only_log = damage(data)
    put(bytes(whole))
    trio.run(read_all, Qcow2Handler(PATH, read_only=True))
    good = look()
    if flags & WRITE:
        trio.run(change, Qcow2Handler(PATH, compress=True, idle=None, log_size=1))
        return
    # Recovery, and the end of the log.
    found = trio.run(read_all, Qcow2Handler(PATH, idle=None))
    if found and not flags & SEAL and only_log and not flags & PLAIN:
        for offset, block in found.items():
            assert block is not None, f"byte {offset} cannot be read"
            for at in range(0, len(block), BLOCK):
                piece = block[at : at + BLOCK]
                assert not any(piece) or piece == stamp((offset + at) // BLOCK, piece[12]), f"byte {offset + at}"
        assert not good or look()


def stamp(number: int, version: int) -> bytes:
    """What is written to a block: it says where and when."""
    return struct.pack("<QIB", number, 0x5441424C, version) + Random(number << 8 | version).randbytes(51) + bytes(448)


def seeds() -> Iterator[bytes]:
    for flags in range(8):
        yield bytes([flags])
        yield bytes([flags]) + b"\xb8\0\3\x28\1\0\0\0\0\0\0\0" + b"\x44\0\x30\0\0" + b"\xc3\0\x40\0\0\x10"


def make(name: str, **options: Any) -> bytes:
    """An image as a power cut leaves it, with records in both halves of the log."""
    from tcmu_rs.testing.crash import Change, Cut, Image, Medium

    from ..qcow2 import on_medium

    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "image")
        create(path, SIZE, cluster_size=2048)
        medium = Medium(Image.load(path))

    async def fill() -> None:
        with on_medium(medium, log_size=1, cache_size=16 << 10, idle=None, **options) as handler:
            await handler.open()
            random = Random(name)
            for version in range(1, 120):
                first = random.randrange(SIZE // BLOCK)
                count = min(random.choice([1, 1, 2, 4, 8]), SIZE // BLOCK - first)
                data = b"".join(stamp(first + at, version) for at in range(count))
                await handler.write(first * BLOCK, IoVec([data]))  # type: ignore[attr-defined]
                if version % 5 == 4:
                    await handler.flush()  # type: ignore[attr-defined]
            await handler.flush()  # type: ignore[attr-defined]
            medium.history.append(Change(0, 0, None, medium.size))
            left = medium.after(Cut(len(medium.history), "all"))
            await handler.aclose()
            medium.image = left

    trio.run(fill)
    return bytes(medium.image.read(0, medium.image.size))


if __name__ == "__main__":
    # Makes the images anew; the kept inputs say nothing any more then.
    IMAGES.mkdir(exist_ok=True)
    for each in NAMES:
        made = zstandard.ZstdCompressor(level=19).compress(make(each, compress=each == "packed"))
        (IMAGES / f"{each}.zst").write_bytes(made)
