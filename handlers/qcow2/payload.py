"""Where plain clusters are: in the image itself or in its external data file, as they are or encrypted."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tcmu_rs import IoVec

from ._errors import Qcow2Error
from .pages import Cold
from .storage import Buffer, Storage

SECTOR = 512


class Cipher(Protocol):
    """Encrypts whole sectors that follow one another, the first of which has a number. Any thread may call it."""

    def encrypt(self, number: int, source: IoVec) -> bytearray:
        """Returns the sectors encrypted."""

    def decrypt(self, number: int, iov: IoVec) -> None:
        """Decrypts in place."""


class Locked:
    """What stands for the cipher of an image whose key nobody has given: the map can be seen, the data cannot."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage

    def encrypt(self, number: int, source: IoVec) -> bytearray:
        """Refuses."""
        raise self.error()

    def decrypt(self, number: int, iov: IoVec) -> None:
        """Refuses."""
        raise self.error()

    def error(self) -> Qcow2Error:
        """What is missing."""
        return Qcow2Error(f"{self._storage.path} is encrypted: say where its passphrase is, such as -o key-file=PATH")


class Payload:
    """The plain clusters of an image. All methods block; any thread may call them.

    Sectors are encrypted under their number in the file that they are in (QEMU docs/interop/qcow2.txt, "Data
    encryption").

    Args:
        storage: What they are in; closed by who opened it.
        cipher: Of an encrypted image.
        external: It is not the image: clusters are where they are on the disk, and nobody counts them.
        raw: The external file has to be the disk, byte for byte, for those who do not read the image.
    """

    def __init__(
        self, storage: Storage, cipher: Cipher | None = None, *, external: bool = False, raw: bool = False
    ) -> None:
        self.storage = storage
        self.cipher = cipher
        self.external = external
        self.raw = raw

    def read(self, offset: int, iov: IoVec, *, wait: bool) -> None:
        """Reads; what is behind the end of the file is zero there.

        Raises:
            Cold: Without `wait`: not all of it is in memory.
        """
        read_plain(self.storage, offset, iov, wait=wait)
        if self.cipher is not None:
            self.cipher.decrypt(offset // SECTOR, iov)

    def write(self, offset: int, data: IoVec) -> None:
        """Writes all of it."""
        self.storage.pwrite(offset, data if self.cipher is None else [self.cipher.encrypt(offset // SECTOR, data)])

    def zero(self, offset: int, length: int) -> bool:
        """Gives space back: the range reads as zeroes. False if the file system cannot, or zeroes would be noise."""
        return self.cipher is None and self.storage.punch(offset, length)

    def finish(self, size: int) -> None:
        """At the end, for a disk of so many bytes: what is external is durable, and as long as it has to be."""
        if not self.external:
            return
        if self.raw and self.storage.size != size:
            self.storage.truncate(size)
        self.storage.fdatasync()

    def write_buffers(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """The same, from several buffers."""
        if self.cipher is None:
            self.storage.pwrite(offset, buffers)
        else:
            self.write(offset, IoVec(buffers))


def read_plain(storage: Storage, offset: int, iov: IoVec, *, wait: bool) -> None:
    """Reads bytes as they are; what is behind the end of the file is zero.

    Raises:
        Cold: Without `wait`: not all of it is in memory.
    """
    total = iov.nbytes
    try:
        done = storage.preadv(offset, iov, wait=wait)
        while done < total:
            step = storage.preadv(offset + done, list(iov.slice(done, total)), wait=wait)
            if not step:
                iov.slice(done, total).zero()
                return
            done += step
    except BlockingIOError:
        raise Cold(storage, offset, total) from None
