"""Encryption of sectors, as dm-crypt does it: each one alone, tweaked by its number.

Numbers count units of 512 bytes whatever the size of the sectors (`plain64`), so neighbours among sectors of 4096 bytes
are 8 apart.

`tcmu_rs.AesXts` does it for all sectors of a command in one call. On a processor without AES, and as the reference that
tests compare with, there is OpenSSL by way of the package `cryptography`. Its contract has one context per message,
which costs 3 µs per sector, most of it the two key schedules. Its `reset_nonce` starts a kept context over with another
tweak, in a quarter of that, and is documented for other modes. Whether it does the right thing for XTS is tested before
it is used, against the published vectors; if not, there is a new context for each sector.

A context may not be used by two threads at once: one `SectorCipher` belongs to one event loop.
"""

from __future__ import annotations

import functools
import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Protocol

from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from tcmu_rs import AesXts, IoVec

from ._errors import LuksError

KEY_SIZES = {"aes-xts-plain64": (32, 64), "aes-cbc-essiv:sha256": (16, 32)}
"""Bytes of the keys that go with each cipher; of XTS half of them is the tweak's."""
SECTOR_SIZES = (512, 1024, 2048, 4096)
UNIT = 512


class SectorCipher(Protocol):
    """Encrypts and decrypts whole sectors that follow one another; the first has the number that is given.

    The key is overwritten when the object goes.
    """

    def encrypt(self, number: int, source: IoVec, target: IoVec, /) -> None:
        """Encrypts out of one memory into another, which may be the same."""

    def decrypt(self, number: int, iov: IoVec, /) -> None:
        """Decrypts in place."""


class _BySector(ABC):
    """Goes through the memory sector by sector."""

    def __init__(self, sector_size: int) -> None:
        self._sector_size = sector_size

    @abstractmethod
    def _encrypt(self, number: int, sector: memoryview) -> None:
        """Encrypts one in place."""

    @abstractmethod
    def _decrypt(self, number: int, sector: memoryview) -> None:
        """Decrypts one in place."""

    def encrypt(self, number: int, source: IoVec, target: IoVec, /) -> None:
        """Copies, and encrypts there."""
        (view,) = target
        source.copy_into(view)
        for at, sector in self._sectors(view):
            self._encrypt(number + at // UNIT, sector)

    def decrypt(self, number: int, iov: IoVec, /) -> None:
        """Decrypts in place, or by way of a buffer if sectors are in several pieces of memory."""
        views = list(iov)
        if any(len(view) % self._sector_size for view in views):
            views = [memoryview(bytearray(iov.nbytes))]
            iov.copy_into(views[0])
        for view in views:
            for at, sector in self._sectors(view):
                self._decrypt(number + at // UNIT, sector)
            number += len(view) // UNIT
        if len(views) != len(iov):
            iov.copy_from(views[0])

    def _sectors(self, view: memoryview) -> Iterator[tuple[int, memoryview]]:
        for at in range(0, len(view), self._sector_size):
            yield at, view[at : at + self._sector_size]


class KeptXts(_BySector):
    """AES-XTS with one context for each direction; OpenSSL clears their memory when they go."""

    def __init__(self, key: bytearray, sector_size: int) -> None:
        super().__init__(sector_size)
        modes.ModeWithNonce.register(modes.XTS)
        cipher = Cipher(algorithms.AES(key), modes.XTS(bytes(16)))
        self._encryptor = cipher.encryptor()
        self._decryptor = cipher.decryptor()

    def _encrypt(self, number: int, sector: memoryview) -> None:
        self._restart(self._encryptor, number, sector)

    def _decrypt(self, number: int, sector: memoryview) -> None:
        self._restart(self._decryptor, number, sector)

    def _restart(self, context: CipherContext, number: int, sector: memoryview) -> None:
        context.reset_nonce(number.to_bytes(16, "little"))
        context.update_into(sector, sector)


class FreshXts(_BySector):
    """AES-XTS with a context for each sector."""

    def __init__(self, key: bytearray, sector_size: int) -> None:
        super().__init__(sector_size)
        self._key = bytearray(key)

    def _encrypt(self, number: int, sector: memoryview) -> None:
        self._cipher(number).encryptor().update_into(sector, sector)

    def _decrypt(self, number: int, sector: memoryview) -> None:
        self._cipher(number).decryptor().update_into(sector, sector)

    def _cipher(self, number: int) -> Cipher[modes.XTS]:
        return Cipher(algorithms.AES(self._key), modes.XTS(number.to_bytes(16, "little")))

    def __del__(self) -> None:
        """Overwrites the key."""
        self._key[:] = bytes(len(self._key))


class CbcEssiv(_BySector):
    """AES-CBC whose initialisation vector is the number, encrypted under a hash of the key. For old containers."""

    writable = False

    def __init__(self, key: bytearray, sector_size: int) -> None:
        super().__init__(sector_size)
        self._key = bytearray(key)
        # Of single blocks, each its own message: ECB keeps no state between them.
        hashed = hashlib.sha256(key).digest()
        self._essiv = Cipher(algorithms.AES(hashed), modes.ECB()).encryptor()

    def _encrypt(self, number: int, sector: memoryview) -> None:
        raise NotImplementedError("aes-cbc-essiv:sha256 is read, not written")

    def _decrypt(self, number: int, sector: memoryview) -> None:
        vector = self._essiv.update(number.to_bytes(16, "little"))
        decryptor = Cipher(algorithms.AES(self._key), modes.CBC(vector)).decryptor()
        sector[:] = decryptor.update(sector)

    def __del__(self) -> None:
        """Overwrites the key."""
        self._key[:] = bytes(len(self._key))


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


@functools.cache
def keeps_contexts() -> bool:
    """Whether a kept context does XTS right with this version of `cryptography`."""
    try:
        for key, number, plain, encrypted in _VECTORS:
            cipher = KeptXts(bytearray.fromhex(key), UNIT)
            # The answer of a context must not depend on what it did before.
            for other in (0, number, number ^ 0xFF << 64):
                sector = bytearray.fromhex(plain)
                cipher._encrypt(other, memoryview(sector))
                if (sector.hex() == encrypted) is not (other == number):
                    return False
                cipher._decrypt(other, memoryview(sector))
                if sector.hex() != plain:
                    return False
    # An undocumented use may fail in any way there is.
    except Exception:
        return False
    return True


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
    if name != "aes-xts-plain64":
        return CbcEssiv(key, sector_size)
    if AesXts.hardware_accelerated():
        return AesXts(key, sector_size)
    return KeptXts(key, sector_size) if keeps_contexts() else FreshXts(key, sector_size)
