"""The header of LUKS1: 592 bytes, eight keyslots, no checksum."""

from __future__ import annotations

import secrets
import struct
import uuid as uuid_
from collections.abc import Sequence
from dataclasses import replace

from ._errors import LuksError
from .cipher import UNIT
from .kdf import STRIPES, Pbkdf2
from .volume import Digest, Keyslot, NewContainer, Volume, check_passphrases, printable

_HEADER = struct.Struct(">6sH32s32s32sII20s32sI40s")
_KEYSLOT = struct.Struct(">II32sII")
_KEYSLOTS = 8
_ENABLED = 0x00AC71F3
_DISABLED = 0x0000DEAD
SIZE = _HEADER.size + _KEYSLOTS * _KEYSLOT.size


def parse(data: bytes) -> Volume:
    """Reads a header.

    Args:
        data: The start of the device; the magic and the version have been looked at.

    Raises:
        LuksError: It is damaged, or asks for what is not supported.
    """
    if len(data) < SIZE:
        raise LuksError("the LUKS1 header is cut off")
    _, _, name, mode, hash_spec, payload, key_size, digest, digest_salt, iterations, uuid = _HEADER.unpack_from(data)
    cipher = f"{printable(name)}-{printable(mode)}"
    algorithm = printable(hash_spec)
    # None at all is that of a detached header.
    if 0 < payload * UNIT < SIZE:
        raise LuksError("the LUKS1 header is damaged: the data lies inside it")
    slots = []
    for number in range(_KEYSLOTS):
        state, slot_iterations, salt, material, stripes = _KEYSLOT.unpack_from(
            data, _HEADER.size + number * _KEYSLOT.size
        )
        if state == _DISABLED:
            continue
        if state != _ENABLED:
            raise LuksError(f"keyslot {number} is damaged: neither enabled nor disabled")
        if stripes != STRIPES:
            raise LuksError(f"keyslot {number} has {stripes} stripes; only {STRIPES} is supported")
        size = -(-key_size * STRIPES // UNIT) * UNIT
        offset = material * UNIT
        if offset < SIZE or (payload and offset + size > payload * UNIT):
            raise LuksError(f"keyslot {number} lies outside the header")
        slots.append(
            Keyslot(
                number=number,
                priority=1,
                kdf=Pbkdf2(algorithm, slot_iterations, salt),
                key_size=key_size,
                af_hash=algorithm,
                encryption=cipher,
                area_key_size=key_size,
                offset=offset,
                size=size,
            )
        )
    return Volume(
        version=1,
        uuid=printable(uuid),
        label="",
        cipher=cipher,
        key_size=key_size,
        sector_size=UNIT,
        offset=payload * UNIT,
        size=None,
        iv_tweak=0,
        keyslots=tuple(slots),
        digest=Digest(Pbkdf2(algorithm, iterations, digest_salt), digest),
    )


_ALIGNMENT = 4096
_DATA_ALIGNMENT = 1 << 20


def make(
    passphrases: Sequence[bytes | bytearray],
    kdf: Pbkdf2,
    *,
    key_size: int = 64,
    uuid: str | None = None,
    detached: bool = False,
    volume_key: bytearray | None = None,
) -> NewContainer:
    """Makes the header of a new container, with AES-XTS. Takes as long as the derivation, once for each passphrase.

    Args:
        passphrases: One keyslot each.
        kdf: Each keyslot gets a salt of its own.
        key_size: Bytes.
        uuid: Random if there is none.
        detached: The data is on another device, from its start.
        volume_key: Random if there is none. It is not wiped.

    Raises:
        LuksError: It would not be supported.
    """
    check_passphrases(passphrases, _KEYSLOTS)
    key = volume_key if volume_key is not None else bytearray(secrets.token_bytes(key_size))
    room = -(-key_size * STRIPES // _ALIGNMENT) * _ALIGNMENT
    header_size = -(-(_ALIGNMENT + _KEYSLOTS * room) // _DATA_ALIGNMENT) * _DATA_ALIGNMENT
    cipher = "aes-xts-plain64"
    slots = tuple(
        Keyslot(
            number=number,
            priority=1,
            kdf=replace(kdf, salt=secrets.token_bytes(32)),
            key_size=key_size,
            af_hash=kdf.hash,
            encryption=cipher,
            area_key_size=key_size,
            offset=_ALIGNMENT + number * room,
            size=room,
        )
        for number in range(_KEYSLOTS)
    )
    # The volume key is random: nobody can guess it, however fast this is.
    digest_kdf = Pbkdf2(kdf.hash, 100_000, secrets.token_bytes(32))
    try:
        digest = Digest(digest_kdf, bytes(digest_kdf.derive(key, 20)))
        areas = tuple(
            (slot.offset, bytes(slot.seal(key, passphrase)))
            for slot, passphrase in zip(slots, passphrases, strict=False)
        )
    finally:
        if volume_key is None:
            key[:] = bytes(len(key))
    header = _HEADER.pack(
        b"LUKS\xba\xbe",
        1,
        *(part.encode() for part in cipher.split("-", 1)),
        kdf.hash.encode(),
        0 if detached else header_size // UNIT,
        key_size,
        digest.digest,
        digest_kdf.salt,
        digest_kdf.iterations,
        (uuid or str(uuid_.uuid4())).encode(),
    )
    for slot in slots:
        used = slot.number < len(passphrases)
        where = slot.offset // UNIT, STRIPES
        if used:
            header += _KEYSLOT.pack(_ENABLED, kdf.iterations, slot.kdf.salt, *where)
        else:
            header += _KEYSLOT.pack(_DISABLED, 0, b"", *where)
    return NewContainer(parse(header), (*areas, (0, header)), header_size)
