"""What both versions of the header describe, and how a passphrase opens it."""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tcmu_rs import IoVec

from ._errors import LuksError, WrongPassphraseError
from .cipher import UNIT, check_cipher, make_cipher
from .kdf import STRIPES, Kdf, Pbkdf2, af_merge, af_split, check_hash, wipe


@dataclass(frozen=True, slots=True)
class Keyslot:
    """Where a passphrase finds the volume key.

    Attributes:
        number: As cryptsetup counts them.
        priority: 2 is tried first, 1 then, 0 never.
        kdf: Makes the key of the area out of the passphrase.
        key_size: Bytes of the volume key.
        af_hash: Hash of the splitter.
        encryption: Cipher of the area.
        area_key_size: Bytes of the area's key.
        offset: Of the area, from the start of the header.
        size: Bytes of the area.

    Raises:
        LuksError: It asks for what is not supported.
    """

    number: int
    priority: int
    kdf: Kdf
    key_size: int
    af_hash: str
    encryption: str
    area_key_size: int
    offset: int
    size: int

    def __post_init__(self) -> None:
        """Refuses what is not supported."""
        check_cipher(self.encryption, self.area_key_size, UNIT)
        check_hash(self.af_hash)
        if self.size < self.material_size:
            raise LuksError(f"keyslot {self.number} is too small for its key: {self.size} bytes")

    @property
    def material_size(self) -> int:
        """Bytes of the area that are used: the stripes, in whole sectors."""
        return -(-self.key_size * STRIPES // UNIT) * UNIT

    def open(self, area: bytes, passphrase: bytes | bytearray) -> bytearray:
        """Returns what the passphrase makes of the area: the volume key, if it was the right one."""
        key = self.kdf.derive(passphrase, self.area_key_size)
        material = bytearray(area[: self.material_size])
        cipher = make_cipher(self.encryption, key, UNIT)
        try:
            cipher.decrypt(0, IoVec([material]))
            return af_merge(material, self.key_size, self.af_hash)
        finally:
            wipe(key, material)

    def seal(self, volume_key: bytearray, passphrase: bytes | bytearray) -> bytearray:
        """Returns the area that opens with the passphrase."""
        key = self.kdf.derive(passphrase, self.area_key_size)
        material = af_split(volume_key, self.af_hash)
        material += bytes(self.material_size - len(material))
        cipher = make_cipher(self.encryption, key, UNIT)
        wipe(key)
        iov = IoVec([material])
        cipher.encrypt(0, iov, iov)
        return material


@dataclass(frozen=True, slots=True)
class Digest:
    """How the right volume key is known."""

    kdf: Pbkdf2
    digest: bytes

    def fits(self, volume_key: bytearray) -> bool:
        """Whether this is the volume key."""
        return hmac.compare_digest(self.kdf.derive(volume_key, len(self.digest)), self.digest)


@dataclass(frozen=True, slots=True)
class NewContainer:
    """What is to be written to make a container.

    Attributes:
        volume: What it will be.
        pieces: Offset and bytes, in the order to write them: the header that makes it valid comes last.
        header_size: Bytes of the header and all keyslots: where the data begins if they are on the same device.
    """

    volume: Volume
    pieces: tuple[tuple[int, bytes], ...]
    header_size: int


@dataclass(frozen=True, slots=True)
class Volume:
    """A container, as its header describes it.

    Attributes:
        version: 1 or 2.
        uuid: As text.
        label: For people; may be empty.
        cipher: Name, such as aes-xts-plain64.
        key_size: Bytes.
        sector_size: Bytes that are encrypted as one.
        offset: Of the data, from the start of the device.
        size: Bytes of the data, or None for all that there are.
        iv_tweak: Number of the first sector, in units of 512 bytes.
        keyslots: Those that hold the key of the data.
        digest: Tells whether a key is right.

    Raises:
        LuksError: It asks for what is not supported.
    """

    version: int
    uuid: str
    label: str
    cipher: str
    key_size: int
    sector_size: int
    offset: int
    size: int | None
    iv_tweak: int
    keyslots: tuple[Keyslot, ...]
    digest: Digest

    def __post_init__(self) -> None:
        """Refuses what is not supported."""
        check_cipher(self.cipher, self.key_size, self.sector_size)
        for slot in self.keyslots:
            if slot.key_size != self.key_size:
                raise LuksError(f"keyslot {slot.number} holds {slot.key_size} bytes; the key has {self.key_size}")

    def unlock(self, areas: Mapping[int, bytes], passphrase: bytes | bytearray) -> bytearray:
        """Finds the volume key. Takes seconds, by design.

        Args:
            areas: Of the keyslots, by number.
            passphrase: Or the content of a key file.

        Raises:
            WrongPassphraseError: It opens no keyslot.
            LuksError: There is none, or one needs what this machine has not.
        """
        slots = [slot for slot in self.keyslots if slot.priority]
        if not slots:
            raise LuksError("the container has no keyslot: nothing can open it")
        for slot in sorted(slots, key=lambda slot: -slot.priority):
            key = slot.open(areas[slot.number], passphrase)
            if self.digest.fits(key):
                return key
            wipe(key)
        raise WrongPassphraseError("wrong passphrase or key file: no keyslot opens with it")


def printable(raw: bytes) -> str:
    """Text of a header, which may be anything, for people to see."""
    text = raw.split(b"\0", 1)[0].decode("utf-8", "replace")
    return "".join(character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text)


def check_passphrases(passphrases: Sequence[bytes | bytearray], keyslots: int) -> None:
    """Raises `LuksError` unless each of some passphrases gets one of so many keyslots."""
    if not 0 < len(passphrases) <= keyslots or not all(passphrases):
        raise LuksError(f"{len(passphrases)} passphrases cannot be: 1 to {keyslots}, and none of them empty")
