"""The header of LUKS1: 592 bytes, eight keyslots, no checksum."""

from __future__ import annotations

import struct

from ._errors import LuksError
from .cipher import UNIT
from .kdf import STRIPES, Pbkdf2
from .volume import Digest, Keyslot, Volume, printable

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
