"""What the tests of LUKS share: storage in memory, and a container that opens in milliseconds."""

from __future__ import annotations

import pytest
import trio

from tcmu_rs import BlockHandler, IoVec
from tcmu_rs.handlers.luks import luks1, luks2
from tcmu_rs.handlers.luks.kdf import Pbkdf2

PASSPHRASE = b"correct horse battery staple"
OFFSET = 16 << 20
CHEAP = Pbkdf2("sha256", 1000, b"replaced")


class Memory(BlockHandler):
    """Storage that outlives its closing, counts its changes, and lets others run in the middle of everything.

    Args:
        data: What is stored.
        block_size: Bytes of a logical block.
    """

    max_in_flight = 16
    fills_reads = True

    def __init__(self, data: bytearray, *, block_size: int = 512) -> None:
        self.data = data
        self.size = len(data)
        self.block_size = block_size
        self.calls: list[str] = []
        self.is_open = False

    async def open(self) -> None:
        assert not self.is_open
        self.is_open = True

    async def aclose(self) -> None:
        self.is_open = False

    def _range(self, offset: int, length: int) -> slice:
        assert self.is_open
        assert length > 0 and offset % self.block_size == length % self.block_size == 0
        assert offset >= 0 and offset + length <= self.size
        return slice(offset, offset + length)

    async def read(self, offset: int, iov: IoVec) -> None:
        where = self._range(offset, iov.nbytes)
        await trio.lowlevel.checkpoint()
        iov.copy_from(self.data[where])
        await trio.lowlevel.checkpoint()

    async def write(self, offset: int, iov: IoVec) -> None:
        where = self._range(offset, iov.nbytes)
        self.calls.append("write")
        await trio.lowlevel.checkpoint()
        self.data[where] = iov.tobytes()
        await trio.lowlevel.checkpoint()

    async def flush(self) -> None:
        self.calls.append("flush")

    async def discard(self, offset: int, length: int) -> None:
        self.calls.append("discard")
        self.data[self._range(offset, length)] = bytes(length)


def container(
    size: int,
    *,
    version: int = 2,
    sector_size: int = 4096,
    key_size: int = 64,
    passphrases: tuple[bytes, ...] = (PASSPHRASE,),
) -> bytearray:
    """Makes a container with so many bytes of data."""
    if version == 1:
        made = luks1.make(passphrases, CHEAP, key_size=key_size)
    else:
        made = luks2.make(passphrases, CHEAP, sector_size=sector_size, key_size=key_size)
    data = bytearray(made.volume.offset + size)
    for offset, piece in made.pieces:
        data[offset : offset + len(piece)] = piece
    return data


def make_cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets new containers derive keys in no time."""
    for name in ("calibrate", "calibrate_pbkdf2"):
        monkeypatch.setattr(f"tcmu_rs.handlers.luks.container.{name}", lambda _: CHEAP)


def key(_: str) -> bytes:
    """Provides the passphrase."""
    return PASSPHRASE
