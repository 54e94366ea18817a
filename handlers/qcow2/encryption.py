"""LUKS inside an image: its header is in the file, and what it says of data is not used (QEMU docs/interop/qcow2.txt).

Metadata is never encrypted, nor are compressed clusters, which QEMU cannot make with encryption, though `qemu-io` does.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Sequence
from typing import Any, cast

import trio

from tcmu_rs import IoVec
from tcmu_rs.handlers.luks import keys, luks1
from tcmu_rs.handlers.luks.cipher import UNIT, make_cipher
from tcmu_rs.handlers.luks.container import describe, parse_header, plan
from tcmu_rs.handlers.luks.kdf import Kdf, wipe
from tcmu_rs.handlers.luks.keys import KeyProvider, Secret
from tcmu_rs.handlers.luks.volume import NewContainer, Volume

from ._errors import Qcow2Error
from .header import Header
from .storage import Storage

_WRITABLE = "aes-xts-plain64"


class SharedCipher:
    """A cipher that threads take turns with."""

    def __init__(self, name: str, key: bytearray) -> None:
        self._cipher = make_cipher(name, key, UNIT)
        # Not every cipher of LUKS may be used by two threads at once.
        self._lock = threading.Lock()

    def encrypt(self, number: int, source: IoVec) -> bytearray:
        """Returns sectors encrypted, the first of which has this number."""
        target = bytearray(source.nbytes)
        with self._lock:
            self._cipher.encrypt(number, source, IoVec([target]))
        return target

    def decrypt(self, number: int, iov: IoVec) -> None:
        """Decrypts sectors in place."""
        with self._lock:
            self._cipher.decrypt(number, iov)


def read_volume(storage: Storage, header: Header) -> Volume:
    """What the LUKS header in an image says.

    Raises:
        LuksError: It is damaged, or asks for what is not supported.
    """
    assert header.crypt_header is not None
    offset, _ = header.crypt_header
    return parse_header(storage.pread(offset, luks1.SIZE))


def unlock(storage: Storage, header: Header, provider: KeyProvider, *, writable: bool) -> SharedCipher:
    """Finds the key of an image. In a thread of trio's; takes seconds, by design.

    Raises:
        WrongPassphraseError: The passphrase opens no keyslot.
        LuksError: The LUKS header is damaged, or asks for what is not supported.
        Qcow2Error: The image cannot be used so.
    """
    volume = read_volume(storage, header)
    if writable and volume.cipher != _WRITABLE:
        raise Qcow2Error(f"{storage.path} is encrypted with {volume.cipher}, which is only read: attach it read-only")
    if header.size % UNIT:
        raise Qcow2Error(f"{storage.path} is encrypted, and its {header.size} bytes are no whole sectors")
    assert header.crypt_header is not None
    offset, length = header.crypt_header
    areas = {}
    for slot in volume.keyslots:
        areas[slot.number] = storage.pread(offset + slot.offset, slot.material_size)
        if slot.offset + slot.material_size > length or len(areas[slot.number]) < slot.material_size:
            raise Qcow2Error(f"{storage.path}: keyslot {slot.number} lies outside of the encryption header")
    keys.forbid_core_dumps()
    secret: Secret
    if inspect.iscoroutinefunction(provider):
        secret = trio.from_thread.run(provider, volume.uuid)
    else:
        secret = cast(Any, provider)(volume.uuid)
    try:
        key = volume.unlock(areas, secret)
    finally:
        if isinstance(secret, bytearray):
            wipe(secret)
    try:
        return SharedCipher(volume.cipher, key)
    finally:
        wipe(key)


def describe_encryption(storage: Storage, header: Header) -> dict[str, Any]:
    """The encryption of an image, for people and programs."""
    described = describe(read_volume(storage, header))
    return {name: described[name] for name in ("uuid", "cipher", "key bits", "keyslots")}


def make_encryption(passphrases: Sequence[Secret], *, seconds: float = 1.5, kdf: Kdf | None = None) -> NewContainer:
    """Makes the LUKS header of a new image, which QEMU opens too: LUKS1, AES-256 in XTS. Takes seconds, by design."""
    return plan(passphrases, version=1, kdf=kdf, seconds=seconds)
