"""The header of LUKS2: two copies of a binary part and a JSON area, each with a checksum.

Reading and building work on bytes alone. FORMAT.md says what of the specification is understood.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
import struct
import uuid as uuid_
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from ._errors import LuksError
from .cipher import SECTOR_SIZES, UNIT
from .kdf import STRIPES, Argon2, Kdf, Pbkdf2
from .volume import Digest, Keyslot, NewContainer, Volume, check_passphrases, printable

MAGIC = b"LUKS\xba\xbe"
SECONDARY_MAGIC = b"SKUL\xba\xbe"
_BINARY = struct.Struct(">6sHQQ48s32s64s40s48sQ184x64s")
_BINARY_SIZE = 4096
_CHECKSUM = slice(448, 512)
_SIZES = tuple(0x4000 << shift for shift in range(9))
"""Of one copy, binary part and JSON area; so also the places where the second copy may be."""
MAX_HEADER = 2 * _SIZES[-1]

_KEYSLOTS = 32
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class HeaderCopy:
    """One of the two copies of the header, which has been found in order.

    Attributes:
        secondary: Which.
        offset: Where it is.
        size: Bytes of it; the other is as large.
        seqid: Counts the changes.
        uuid: As text.
        label: For people.
        raw: All of its bytes.
        metadata: What the JSON area says.
    """

    secondary: bool
    offset: int
    size: int
    seqid: int
    uuid: str
    label: str
    raw: bytes
    metadata: dict[str, Any]

    @property
    def twin_offset(self) -> int:
        """Where the other copy belongs."""
        return 0 if self.secondary else self.size

    def twin(self) -> bytes:
        """The bytes of the other copy, with the same content."""
        magic = MAGIC if self.secondary else SECONDARY_MAGIC
        fields = list(_BINARY.unpack_from(self.raw))
        # A salt of its own, so that the copies do not have the same checksum.
        fields[0], fields[6], fields[9] = magic, secrets.token_bytes(64), self.twin_offset
        return _seal(fields, self.raw[_BINARY_SIZE:])


def _seal(fields: Sequence[Any], area: bytes) -> bytes:
    raw = bytearray(_BINARY_SIZE + len(area))
    _BINARY.pack_into(raw, 0, *fields[:-1], bytes(64))
    raw[_BINARY_SIZE:] = area
    raw[_CHECKSUM] = hashlib.sha256(raw).digest().ljust(64, b"\0")
    return bytes(raw)


def parse_copy(data: bytes, offset: int, *, secondary: bool) -> HeaderCopy:
    """Reads and verifies one copy.

    Args:
        data: The start of the device.
        offset: Where the copy is.
        secondary: Which it is.

    Raises:
        LuksError: It is not there, or damaged.
    """
    which = "secondary" if secondary else "primary"
    if len(data) < offset + _BINARY_SIZE:
        raise LuksError(f"the {which} header is cut off")
    magic, version, size, seqid, label, algorithm, _, uuid, _, own_offset, checksum = _BINARY.unpack_from(data, offset)
    if magic != (SECONDARY_MAGIC if secondary else MAGIC):
        raise LuksError(f"there is no {which} header")
    if version != 2:
        raise LuksError(f"the {which} header has version {version}; supported: 1 and 2")
    if size not in _SIZES:
        raise LuksError(f"the {which} header is damaged: a size of {size}")
    if own_offset != offset or (secondary and size != offset):
        raise LuksError(f"the {which} header is damaged: at {offset}, it says that it is at {own_offset}")
    if printable(algorithm) != "sha256":
        raise LuksError(f"the {which} header has a checksum {printable(algorithm)!r}; supported: sha256")
    raw = data[offset : offset + size]
    if len(raw) < size:
        raise LuksError(f"the {which} header is cut off")
    unsealed = bytearray(raw)
    unsealed[_CHECKSUM] = bytes(64)
    if not hmac.compare_digest(hashlib.sha256(unsealed).digest(), checksum[:32]):
        raise LuksError(f"the {which} header is damaged: its checksum is wrong")
    text, zero, _ = raw[_BINARY_SIZE:].partition(b"\0")
    try:
        metadata = json.loads(text) if zero else None
    except (ValueError, RecursionError):
        metadata = None
    if not isinstance(metadata, dict):
        raise LuksError(f"the {which} header is damaged: its JSON area is none")
    return HeaderCopy(secondary, offset, size, seqid, printable(uuid), printable(label), raw, metadata)


def find_copies(data: bytes) -> tuple[HeaderCopy | LuksError, HeaderCopy | LuksError]:
    """Reads both copies; one that cannot be used is given as the reason why.

    Args:
        data: The start of the device, `MAX_HEADER` bytes if it has so many.
    """
    primary: HeaderCopy | LuksError
    secondary: HeaderCopy | LuksError = LuksError("there is no secondary header")
    try:
        primary = parse_copy(data, 0, secondary=False)
    except LuksError as error:
        primary = error
    # If the first copy is gone, the second may be in any of few places.
    for offset in (primary.size,) if isinstance(primary, HeaderCopy) else _SIZES:
        if data[offset : offset + len(SECONDARY_MAGIC)] == SECONDARY_MAGIC:
            try:
                secondary = parse_copy(data, offset, secondary=True)
                break
            except LuksError as error:
                secondary = error
    return primary, secondary


def choose(data: bytes) -> HeaderCopy:
    """Returns the copy to believe: the newer one of those in order.

    Raises:
        LuksError: Neither is; or the start of the device looks like no container at all.
    """
    primary, secondary = find_copies(data)
    if isinstance(primary, HeaderCopy):
        if isinstance(secondary, HeaderCopy) and secondary.seqid > primary.seqid:
            return secondary
        return primary
    if isinstance(secondary, HeaderCopy):
        return secondary
    if not data.startswith(MAGIC) and str(secondary).startswith("there is no"):
        raise LuksError("this is no LUKS container")
    raise LuksError(f"{primary}, and {secondary}")


def _field(record: dict[str, Any], name: str, kind: type[_T], where: str) -> _T:
    value = record.get(name)
    # A bool is an int to Python, and not to JSON.
    if not isinstance(value, kind) or isinstance(value, bool):
        raise LuksError(f"the header is damaged: {where} has no valid {name!r}")
    return value


def _number(record: dict[str, Any], name: str, where: str) -> int:
    """A 64-bit number, which LUKS2 writes as a string."""
    text = _field(record, name, str, where)
    if not re.fullmatch("[0-9]{1,20}", text, re.ASCII) or int(text) >> 64:
        raise LuksError(f"the header is damaged: {where} has no valid {name!r}")
    return int(text)


def _bytes(record: dict[str, Any], name: str, where: str) -> bytes:
    try:
        raw = base64.b64decode(_field(record, name, str, where), validate=True)
    except ValueError:
        raw = b""
    if not raw:
        raise LuksError(f"the header is damaged: {where} has no valid {name!r}")
    return raw


def _objects(metadata: dict[str, Any], name: str) -> dict[str, dict[str, Any]]:
    found = _field(metadata, name, dict, "it")
    for key, value in found.items():
        if not re.fullmatch("[0-9]{1,4}", key, re.ASCII) or not isinstance(value, dict):
            raise LuksError(f"the header is damaged: there is no {name} {key!r}")
    return found


def _names(record: dict[str, Any], name: str, where: str) -> list[str]:
    names = record.get(name, [])
    if not isinstance(names, list) or not all(isinstance(one, str) for one in names):
        raise LuksError(f"the header is damaged: {where} has no valid {name!r}")
    return names


def parse(copy: HeaderCopy) -> Volume:
    """Reads the metadata.

    Raises:
        LuksError: It is damaged, or asks for what is not supported.
    """
    metadata = copy.metadata
    config = _field(metadata, "config", dict, "it")
    if _number(config, "json_size", "config") != copy.size - _BINARY_SIZE:
        raise LuksError("the header is damaged: config has no valid 'json_size'")
    if requirements := config.get("requirements", {}):
        mandatory = requirements.get("mandatory") if isinstance(requirements, dict) else requirements
        if mandatory != []:
            raise LuksError(f"the container requires {mandatory}, which is not supported")
    keyslots_end = 2 * copy.size + _number(config, "keyslots_size", "config")

    segments = _objects(metadata, "segments")
    if list(segments) != ["0"]:
        raise LuksError(f"the container has {len(segments)} segments; exactly one is supported")
    segment = segments["0"]
    if segment.get("type") != "crypt":
        raise LuksError(f"a segment of type {segment.get('type')!r} is not supported; supported: crypt")
    for name in ("integrity", "flags"):
        if segment.get(name):
            raise LuksError(f"a segment with {name} {segment[name]!r} is not supported")
    sector_size = _field(segment, "sector_size", int, "the segment")
    offset = _number(segment, "offset", "the segment")
    iv_tweak = _number(segment, "iv_tweak", "the segment")
    size = None if segment.get("size") == "dynamic" else _number(segment, "size", "the segment")
    if offset % UNIT or size == 0 or (sector_size in SECTOR_SIZES and (size or 0) % sector_size):
        raise LuksError("the header is damaged: the segment is not made of sectors")
    # A container with its data behind it has its keyslots before; a detached one has its data elsewhere.
    if 0 < offset < keyslots_end:
        raise LuksError("the header is damaged: the segment and the keyslots overlap")

    digests = [
        digest for digest in _objects(metadata, "digests").values() if "0" in _names(digest, "segments", "a digest")
    ]
    if len(digests) != 1:
        raise LuksError(f"the header is damaged: {len(digests)} digests tell the key of the segment")
    digest = digests[0]
    if digest.get("type") != "pbkdf2":
        raise LuksError(f"a digest of type {digest.get('type')!r} is not supported; supported: pbkdf2")
    keyslots = _objects(metadata, "keyslots")
    for key, slot in keyslots.items():
        if slot.get("type") != "luks2" or int(key) >= _KEYSLOTS:
            raise LuksError(f"keyslot {key} of type {slot.get('type')!r} is not supported; supported: luks2")
    expected = _bytes(digest, "digest", "the digest")
    if not 16 <= len(expected) <= 64:
        raise LuksError("the header is damaged: the digest has no valid 'digest'")
    numbers = _names(digest, "keyslots", "a digest")
    if missing := [number for number in numbers if number not in keyslots]:
        raise LuksError(f"the header is damaged: there is no keyslot {missing[0]!r}")
    slots = tuple(_keyslot(int(key), slot, 2 * copy.size, keyslots_end) for key, slot in keyslots.items())
    return Volume(
        version=2,
        uuid=copy.uuid,
        label=copy.label,
        cipher=_field(segment, "encryption", str, "the segment"),
        key_size=_volume_key_size([slot for slot in slots if str(slot.number) in numbers]),
        sector_size=sector_size,
        offset=offset,
        size=size,
        iv_tweak=iv_tweak,
        # The others hold keys of something else (`cryptsetup luksAddKey --unbound`).
        keyslots=tuple(slot for slot in slots if str(slot.number) in numbers),
        digest=Digest(
            Pbkdf2(
                _field(digest, "hash", str, "the digest"),
                _field(digest, "iterations", int, "the digest"),
                _bytes(digest, "salt", "the digest"),
            ),
            expected,
        ),
    )


def _volume_key_size(slots: Sequence[Keyslot]) -> int:
    if not slots:
        raise LuksError("the container has no keyslot: nothing can open it")
    return slots[0].key_size


def _keyslot(number: int, slot: dict[str, Any], start: int, end: int) -> Keyslot:
    where = f"keyslot {number}"
    af = _field(slot, "af", dict, where)
    if af.get("type") != "luks1":
        raise LuksError(f"{where} with a splitter {af.get('type')!r} is not supported; supported: luks1")
    if af.get("stripes") != STRIPES:
        raise LuksError(f"{where} has {af.get('stripes')!r} stripes; only {STRIPES} is supported")
    area = _field(slot, "area", dict, where)
    if area.get("type") != "raw":
        raise LuksError(f"{where} in an area {area.get('type')!r} is not supported; supported: raw")
    offset, size = _number(area, "offset", where), _number(area, "size", where)
    if offset < start or offset + size > end or offset % UNIT:
        raise LuksError(f"the header is damaged: {where} lies outside the keyslots")
    priority = slot.get("priority", 1)
    if isinstance(priority, bool) or priority not in (0, 1, 2):
        raise LuksError(f"the header is damaged: {where} has no valid 'priority'")
    key_size = _field(slot, "key_size", int, where)
    if not 0 < key_size <= 1024:
        raise LuksError(f"the header is damaged: {where} has no valid 'key_size'")
    return Keyslot(
        number=number,
        priority=priority,
        kdf=_kdf(_field(slot, "kdf", dict, where), where),
        key_size=key_size,
        af_hash=_field(af, "hash", str, where),
        encryption=_field(area, "encryption", str, where),
        area_key_size=_field(area, "key_size", int, where),
        offset=offset,
        size=size,
    )


def _kdf(kdf: dict[str, Any], where: str) -> Kdf:
    kind = kdf.get("type")
    salt = _bytes(kdf, "salt", where)
    if kind == "pbkdf2":
        return Pbkdf2(_field(kdf, "hash", str, where), _field(kdf, "iterations", int, where), salt)
    if kind in ("argon2i", "argon2id"):
        time, memory, lanes = (_field(kdf, name, int, where) for name in ("time", "memory", "cpus"))
        return Argon2(kind, time, memory, lanes, salt)
    raise LuksError(f"{where} with key derivation {kind!r} is not supported; supported: argon2id, argon2i, pbkdf2")


_HEADER_SIZE = 16384
_DATA_OFFSET = 16 << 20
_AREA_ALIGNMENT = 4096


def make(
    passphrases: Sequence[bytes | bytearray],
    kdf: Kdf,
    *,
    cipher: str = "aes-xts-plain64",
    key_size: int = 64,
    sector_size: int = 4096,
    label: str = "",
    uuid: str | None = None,
    detached: bool = False,
    volume_key: bytearray | None = None,
) -> NewContainer:
    """Makes the header of a new container. Takes as long as the derivation, once for each passphrase.

    Args:
        passphrases: One keyslot each.
        kdf: Each keyslot gets a salt of its own.
        cipher: Of data and keyslots.
        key_size: Bytes.
        sector_size: Bytes that are encrypted as one.
        label: For people, at most 47 bytes.
        uuid: Random if there is none.
        detached: The data is on another device, from its start.
        volume_key: Random if there is none. It is not wiped.

    Raises:
        LuksError: It would not be supported.
    """
    check_passphrases(passphrases, _KEYSLOTS)
    if len(label.encode()) > 47:
        raise LuksError(f"the label {label!r} is too long: 47 bytes at most")
    key = volume_key if volume_key is not None else bytearray(secrets.token_bytes(key_size))
    area_size = -(-key_size * STRIPES // _AREA_ALIGNMENT) * _AREA_ALIGNMENT
    slots = tuple(
        Keyslot(
            number=number,
            priority=1,
            kdf=replace(kdf, salt=secrets.token_bytes(32)),
            key_size=key_size,
            af_hash="sha256",
            encryption=cipher,
            area_key_size=key_size,
            offset=2 * _HEADER_SIZE + number * area_size,
            size=area_size,
        )
        for number in range(len(passphrases))
    )
    # The volume key is random: nobody can guess it, however fast this is.
    digest_kdf = Pbkdf2("sha256", 100_000, secrets.token_bytes(32))
    try:
        volume = Volume(
            version=2,
            uuid=uuid or str(uuid_.uuid4()),
            label=label,
            cipher=cipher,
            key_size=key_size,
            sector_size=sector_size,
            offset=0 if detached else _DATA_OFFSET,
            size=None,
            iv_tweak=0,
            keyslots=slots,
            digest=Digest(digest_kdf, bytes(digest_kdf.derive(key, 32))),
        )
        areas = tuple(
            (slot.offset, bytes(slot.seal(key, passphrase)))
            for slot, passphrase in zip(slots, passphrases, strict=True)
        )
    finally:
        if volume_key is None:
            key[:] = bytes(len(key))
    text = json.dumps(_metadata(volume), separators=(",", ":")).encode()
    if len(text) >= _HEADER_SIZE - _BINARY_SIZE:
        raise LuksError(f"{len(slots)} keyslots do not fit into the header")
    area = text.ljust(_HEADER_SIZE - _BINARY_SIZE, b"\0")
    fields = [
        MAGIC,
        2,
        _HEADER_SIZE,
        1,
        label.encode(),
        b"sha256",
        secrets.token_bytes(64),
        volume.uuid.encode(),
        b"",
        0,
        b"",
    ]
    primary = _seal(fields, area)
    secondary = parse_copy(primary, 0, secondary=False).twin()
    return NewContainer(volume, (*areas, (_HEADER_SIZE, secondary), (0, primary)), _DATA_OFFSET)


def _metadata(volume: Volume) -> dict[str, Any]:
    """The JSON area of a volume that `make` has made."""
    numbers = [str(slot.number) for slot in volume.keyslots]
    digest = volume.digest
    return {
        "keyslots": {str(slot.number): _keyslot_metadata(slot) for slot in volume.keyslots},
        "tokens": {},
        "segments": {
            "0": {
                "type": "crypt",
                "offset": str(volume.offset),
                "size": "dynamic",
                "iv_tweak": str(volume.iv_tweak),
                "encryption": volume.cipher,
                "sector_size": volume.sector_size,
            }
        },
        "digests": {
            "0": {
                "type": "pbkdf2",
                "keyslots": numbers,
                "segments": ["0"],
                "hash": digest.kdf.hash,
                "iterations": digest.kdf.iterations,
                "salt": _base64(digest.kdf.salt),
                "digest": _base64(digest.digest),
            }
        },
        "config": {
            "json_size": str(_HEADER_SIZE - _BINARY_SIZE),
            "keyslots_size": str(_DATA_OFFSET - 2 * _HEADER_SIZE),
        },
    }


def _keyslot_metadata(slot: Keyslot) -> dict[str, Any]:
    kdf = slot.kdf
    if isinstance(kdf, Pbkdf2):
        derivation: dict[str, Any] = {"type": "pbkdf2", "hash": kdf.hash, "iterations": kdf.iterations}
    else:
        derivation = {"type": kdf.kind, "time": kdf.time, "memory": kdf.memory, "cpus": kdf.lanes}
    return {
        "type": "luks2",
        "key_size": slot.key_size,
        "af": {"type": "luks1", "stripes": STRIPES, "hash": slot.af_hash},
        "area": {
            "type": "raw",
            "offset": str(slot.offset),
            "size": str(slot.size),
            "encryption": slot.encryption,
            "key_size": slot.area_key_size,
        },
        "kdf": {**derivation, "salt": _base64(kdf.salt)},
    }


def _base64(raw: bytes) -> str:
    return base64.b64encode(raw).decode()
