"""Encryption of sectors, as dm-crypt does it: each one alone, tweaked by its number.

Numbers count units of 512 bytes whatever the size of the sectors (`plain64`), so neighbours among sectors of 4096 bytes
are 8 apart.

The contract of the `cryptography` package has one context per message, which costs 3 µs per sector, most of it the two
key schedules. Its `reset_nonce` starts a kept context over with another tweak, in a quarter of that, and is documented
for other modes. Whether it does the right thing for XTS is tested when this module is imported, against the published
vectors; if not, there is a new context for each sector. That path stays the reference which tests compare with.

A context may not be used by two threads at once: one `SectorCipher` belongs to one event loop.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable

from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from ._errors import LuksError

KEY_SIZES = {"aes-xts-plain64": (32, 64), "aes-cbc-essiv:sha256": (16, 32)}
"""Bytes of the keys that go with each cipher; of XTS half of them is the tweak's."""
SECTOR_SIZES = (512, 1024, 2048, 4096)
UNIT = 512


class SectorCipher(ABC):
    """Encrypts and decrypts sectors in place.

    Attributes:
        writable: It encrypts too.
    """

    writable = True

    @abstractmethod
    def encrypt(self, number: int, sectors: Iterable[memoryview]) -> None:
        """Encrypts sectors that follow one another; the first has this number."""

    @abstractmethod
    def decrypt(self, number: int, sectors: Iterable[memoryview]) -> None:
        """Decrypts sectors that follow one another; the first has this number."""

    @abstractmethod
    def wipe(self) -> None:
        """Forgets the key; nothing works afterwards."""


class KeptXts(SectorCipher):
    """AES-XTS with one context for each direction."""

    def __init__(self, key: bytearray, sector_size: int) -> None:
        cipher = Cipher(algorithms.AES(key), modes.XTS(bytes(16)))
        self._encryptor = cipher.encryptor()
        self._decryptor = cipher.decryptor()
        self._step = sector_size // UNIT

    def encrypt(self, number: int, sectors: Iterable[memoryview]) -> None:
        """Encrypts in place."""
        reset, update, step = self._encryptor.reset_nonce, self._encryptor.update_into, self._step
        for sector in sectors:
            reset(number.to_bytes(16, "little"))
            update(sector, sector)
            number += step

    def decrypt(self, number: int, sectors: Iterable[memoryview]) -> None:
        """Decrypts in place."""
        reset, update, step = self._decryptor.reset_nonce, self._decryptor.update_into, self._step
        for sector in sectors:
            reset(number.to_bytes(16, "little"))
            update(sector, sector)
            number += step

    def wipe(self) -> None:
        """Frees the contexts; OpenSSL clears their memory."""
        del self._encryptor, self._decryptor


class FreshXts(SectorCipher):
    """AES-XTS with a context for each sector."""

    def __init__(self, key: bytearray, sector_size: int) -> None:
        self._key = bytearray(key)
        self._step = sector_size // UNIT

    def encrypt(self, number: int, sectors: Iterable[memoryview]) -> None:
        """Encrypts in place."""
        for sector in sectors:
            self._cipher(number).encryptor().update_into(sector, sector)
            number += self._step

    def decrypt(self, number: int, sectors: Iterable[memoryview]) -> None:
        """Decrypts in place."""
        for sector in sectors:
            self._cipher(number).decryptor().update_into(sector, sector)
            number += self._step

    def wipe(self) -> None:
        """Overwrites the key."""
        self._key[:] = bytes(len(self._key))

    def _cipher(self, number: int) -> Cipher[modes.XTS]:
        return Cipher(algorithms.AES(self._key), modes.XTS(number.to_bytes(16, "little")))


class CbcEssiv(SectorCipher):
    """AES-CBC whose initialisation vector is the number, encrypted under a hash of the key. For old containers."""

    writable = False

    def __init__(self, key: bytearray, sector_size: int) -> None:
        self._key = bytearray(key)
        self._step = sector_size // UNIT
        # Of single blocks, each its own message: ECB keeps no state between them.
        hashed = hashlib.sha256(key).digest()
        self._essiv = Cipher(algorithms.AES(hashed), modes.ECB()).encryptor()

    def encrypt(self, number: int, sectors: Iterable[memoryview]) -> None:
        """Refuses."""
        raise NotImplementedError("aes-cbc-essiv:sha256 is read, not written")

    def decrypt(self, number: int, sectors: Iterable[memoryview]) -> None:
        """Decrypts in place."""
        for sector in sectors:
            vector = self._essiv.update(number.to_bytes(16, "little"))
            decryptor = Cipher(algorithms.AES(self._key), modes.CBC(vector)).decryptor()
            sector[:] = decryptor.update(sector)
            number += self._step

    def wipe(self) -> None:
        """Overwrites the key."""
        self._key[:] = bytes(len(self._key))
        del self._essiv


_VECTORS = (
    # IEEE 1619-2007, annex B: vectors 2 and 3. Key, number of the data unit, plain text, cipher text.
    (
        "11" * 16 + "22" * 16,
        0x3333333333,
        "44" * 32,
        "c454185e6a16936e39334038acef838bfb186fff7480adc4289382ecd6d394f0",
    ),
    (
        "fffefdfcfbfaf9f8f7f6f5f4f3f2f1f0" + "22" * 16,
        0x3333333333,
        "44" * 32,
        "af85336b597afc1a900b2eb21ec949d292df4c047e0b21532186a5971a227a89",
    ),
)


def keeps_contexts() -> bool:
    """Whether a kept context does XTS right with this version of `cryptography`."""
    try:
        modes.ModeWithNonce.register(modes.XTS)
        for key, number, plain, encrypted in _VECTORS:
            cipher = KeptXts(bytearray.fromhex(key), UNIT)
            # The answer of a context must not depend on what it did before.
            for other in (0, number, number ^ 0xFF << 64):
                sector = bytearray.fromhex(plain)
                cipher.encrypt(other, [memoryview(sector)])
                if (sector.hex() == encrypted) is not (other == number):
                    return False
                cipher.decrypt(other, [memoryview(sector)])
                if sector.hex() != plain:
                    return False
    # An undocumented use may fail in any way there is.
    except Exception:
        return False
    return True


KEEPS_CONTEXTS = keeps_contexts()


def check_cipher(name: str, key_size: int, sector_size: int) -> None:
    """Refuses by name what is not supported.

    Args:
        name: As the header has it, `aes-xts-plain64`.
        key_size: Bytes.
        sector_size: Bytes.

    Raises:
        LuksError: Another cipher, or another size of key or sector.
    """
    sizes = KEY_SIZES.get(name)
    if sizes is None:
        raise LuksError(f"cipher {name!r} is not supported; supported: {', '.join(KEY_SIZES)}")
    if key_size not in sizes:
        bits = " or ".join(str(size * 8) for size in sizes)
        raise LuksError(f"{name} with a key of {key_size * 8} bits is not supported; supported: {bits}")
    if sector_size not in SECTOR_SIZES:
        raise LuksError(f"encryption sectors of {sector_size} bytes are not supported; supported: {SECTOR_SIZES}")


def make_cipher(name: str, key: bytearray, sector_size: int) -> SectorCipher:
    """Makes a cipher. The key may be wiped afterwards.

    Raises:
        LuksError: It is not supported.
    """
    check_cipher(name, len(key), sector_size)
    if name == "aes-xts-plain64":
        return KeptXts(key, sector_size) if KEEPS_CONTEXTS else FreshXts(key, sector_size)
    return CbcEssiv(key, sector_size)


def split(buffer: memoryview, sector_size: int) -> list[memoryview]:
    """Cuts a buffer into sectors."""
    return [buffer[at : at + sector_size] for at in range(0, len(buffer), sector_size)]
