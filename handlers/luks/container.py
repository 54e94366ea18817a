"""A container's header on a block handler: found, made, described, mended. No passphrase is needed for most of it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import trio

from tcmu_rs import BlockHandler, IoVec, Lower

from . import luks1, luks2
from ._errors import LuksError
from .kdf import Kdf, Pbkdf2, calibrate, calibrate_pbkdf2
from .keys import Secret
from .volume import NewContainer, Volume


def parse_header(data: bytes) -> Volume:
    """Reads the header of either version.

    Args:
        data: The start of the device, `luks2.MAX_HEADER` bytes if it has so many.

    Raises:
        LuksError: There is none, or it is damaged, or asks for what is not supported.
    """
    if data.startswith(luks2.MAGIC + b"\x00\x01"):
        return luks1.parse(data)
    return luks2.parse(luks2.choose(data))


def plan(
    passphrases: Sequence[Secret], *, version: int = 2, kdf: Kdf | None = None, seconds: float = 1.5, **parameters: Any
) -> NewContainer:
    """Makes the header of a new container of either version. Takes seconds, by design.

    Args:
        passphrases: One keyslot each.
        version: 2 or 1.
        kdf: How to derive keys from them; by default what takes about so many seconds here.
        seconds: See above.
        **parameters: As for `luks2.make` or `luks1.make`.

    Raises:
        LuksError: It would not be supported.
    """
    if version == 2:
        return luks2.make(passphrases, kdf or calibrate(seconds), **parameters)
    if version != 1:
        raise LuksError(f"there is no version {version} of LUKS: 1 or 2")
    kdf = kdf or calibrate_pbkdf2(seconds)
    if not isinstance(kdf, Pbkdf2):
        raise LuksError(f"LUKS1 knows no {kdf.kind}, only pbkdf2")
    return luks1.make(passphrases, kdf, **parameters)


async def format_luks(
    lower: BlockHandler, passphrases: Sequence[Secret], *, header: BlockHandler | None = None, **parameters: Any
) -> Volume:
    """Makes a container on any block handler, over whatever is there.

    Args:
        lower: Opened and closed.
        passphrases: One keyslot each.
        header: Gets the header, which is detached then: the data has all of `lower`. Opened and closed.
        **parameters: `version`, 2 or 1; `kdf`, by default what takes about 1.5 seconds; and as for `luks2.make` or
            `luks1.make`: `key_size`, `uuid`, for LUKS2 also `cipher`, `sector_size`, `label`.

    Raises:
        LuksError: The parameters are not supported, or the storage is too small.
    """
    make = functools.partial(plan, passphrases, detached=header is not None, **parameters)
    container = await trio.to_thread.run_sync(make)
    volume = container.volume
    async with Lower(lower) as below:
        room = below.size - volume.offset
        if room <= 0 or room % volume.sector_size:
            raise LuksError(f"{below.size} bytes are too few, or not {volume.offset} and whole sectors")
        if header is None:
            await write_pieces(below, container.pieces)
        else:
            async with Lower(header) as above:
                if above.size < container.header_size:
                    raise LuksError(f"{above.size} bytes are too few for the header: {container.header_size}")
                await write_pieces(above, container.pieces)
    return volume


async def write_pieces(lower: Lower, pieces: Sequence[tuple[int, bytes]]) -> None:
    """Writes what makes a container, the header last and only when the rest is durable."""
    for number, (offset, piece) in enumerate(pieces):
        if number == len(pieces) - 1:
            await lower.flush()
        whole = -(-len(piece) // lower.block_size) * lower.block_size
        await lower.write(offset, IoVec([piece.ljust(whole, b"\0")]))
    await lower.flush()


async def read_bytes(lower: Lower, offset: int, length: int, *, whole: bool = False) -> bytes:
    """Reads bytes from anywhere; fewer at the end of the storage, if not `whole`.

    Raises:
        LuksError: The storage ends before, and `whole` was asked for.
    """
    start = offset // lower.block_size * lower.block_size
    stop = min(-(-(offset + length) // lower.block_size) * lower.block_size, lower.size)
    if whole and stop < offset + length:
        raise LuksError(f"the container is cut off at {lower.size}")
    buffer = bytearray(max(stop - start, 0))
    if buffer:
        await lower.read(start, IoVec([buffer]))
    return bytes(buffer[offset - start : offset - start + length])


def describe(volume: Volume) -> dict[str, Any]:
    """A volume for people and programs."""
    return {
        "version": volume.version,
        "uuid": volume.uuid,
        "label": volume.label,
        "cipher": volume.cipher,
        "key bits": volume.key_size * 8,
        "sector size": volume.sector_size,
        "data offset": volume.offset,
        "data size": volume.size,
        "keyslots": {
            str(slot.number): slot.kdf.describe() + ("" if slot.priority else " (ignored)") for slot in volume.keyslots
        },
    }


async def info(lower: Lower) -> dict[str, Any]:
    """What the header says.

    Raises:
        LuksError: There is none, or it is damaged, or asks for what is not supported.
    """
    data = await read_bytes(lower, 0, luks2.MAX_HEADER)
    volume = parse_header(data)
    described = describe(volume)
    if volume.size is None and volume.offset:
        described["data size"] = lower.size - volume.offset
    if volume.version == 2:
        names = zip(("primary", "secondary"), luks2.find_copies(data), strict=True)
        described["header"] = {
            which: f"damaged: {copy}" if isinstance(copy, LuksError) else f"in order, sequence {copy.seqid}"
            for which, copy in names
        }
    return described


async def check(lower: Lower, *, repair: bool) -> dict[str, Any]:
    """Looks for damage of the header, and mends one copy from the other on request.

    Returns:
        `ok`, `problems` that were found, and `repaired`: whether they are gone now.

    Raises:
        LuksError: Nothing of it is in order, or the repair has not worked.
    """
    data = await read_bytes(lower, 0, luks2.MAX_HEADER)
    volume = parse_header(data)
    problems = problems_of(data) if volume.version == 2 else []
    repaired = False
    if problems and repair:
        copy = luks2.choose(data)
        await write_pieces(lower, [(copy.twin_offset, copy.twin())])
        if left := problems_of(await read_bytes(lower, 0, luks2.MAX_HEADER)):
            raise LuksError(f"the repair has not worked: {'; '.join(left)}")
        repaired = True
    return {"ok": not problems or repaired, "problems": problems, "repaired": repaired}


def problems_of(data: bytes) -> list[str]:
    """What is wrong with the copies of a LUKS2 header, of which one at least is in order."""
    copies = luks2.find_copies(data)
    problems = [str(copy) for copy in copies if isinstance(copy, LuksError)]
    good = [copy for copy in copies if not isinstance(copy, LuksError)]
    if len(good) == 2 and (good[0].seqid != good[1].seqid or good[0].metadata != good[1].metadata):
        problems.append(f"the copies of the header differ: sequence {good[0].seqid} and {good[1].seqid}")
    return problems
