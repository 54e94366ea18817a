"""The header of a LUKS1 or LUKS2 container, opened with the right passphrase.

An input is a byte of flags and a header: 592 bytes of LUKS1; for LUKS2 512 bytes of the binary part and then the JSON
area. The keyslots and the data behind it are those of a container of ours. By the flags the checksum of LUKS2 is made
right, and a second copy of the header, in order, lies behind the first.

The container opens, or it is refused with a `LuksError`. A header of LUKS2 that has lost its checksum is never
believed; if there is a second copy, the data is what it was.
"""

from __future__ import annotations

import functools
import hashlib
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import trio

from tcmu_rs import IoVec
from tcmu_rs.handlers.luks import LuksError, LuksHandler, container, luks1, luks2
from tcmu_rs.handlers.luks.kdf import Argon2, Pbkdf2

from ..luks import PASSPHRASE, Memory

SEAL, SECOND = 1, 2
"""Flags: the checksum is right; there is a second copy."""
OFFSET = 256 << 10
SIZE = 16 << 10
KEY_SIZE = 32
BINARY, COPY = 512, 16 << 10
DEAR = 2000
"""Iterations, or KiB: the documented limits of what a stranger's header may cost are for other tests."""


class DearError(LuksError):
    """Deriving would take longer than the rest of the input."""


def _cheap(derive: Callable[..., bytearray]) -> Callable[..., bytearray]:
    def limited(self: Pbkdf2 | Argon2, passphrase: bytes | bytearray, length: int) -> bytearray:
        if (self.iterations if isinstance(self, Pbkdf2) else self.time * self.memory) > DEAR:
            raise DearError("too dear")
        return derive(self, passphrase, length)

    return limited


for _kind in (Pbkdf2, Argon2):
    setattr(_kind, "derive", _cheap(_kind.derive))  # noqa: B010 - mypy knows it for a method


class Fewer(Pbkdf2):
    """Few iterations for digests too."""

    def __init__(self, hash: str, iterations: int, salt: bytes) -> None:
        super().__init__(hash, min(iterations, 1000), salt)


@functools.cache
def base(version: int) -> tuple[bytes, bytes]:
    """A container of ours that is always the same, and what is stored in it."""
    cheap = Fewer("sha256", 1000, b"replaced")
    counter = iter(range(1 << 16))

    def not_random(length: int) -> bytes:
        return hashlib.shake_128(bytes([version, next(counter)])).digest(length)

    where = f"{luks1.__package__}.luks{version}"
    uuid = "00000000-0000-0000-0000-000000000000"
    with (
        mock.patch("secrets.token_bytes", not_random),
        mock.patch(f"{where}.Pbkdf2", Fewer),
        mock.patch.object(luks1, "_DATA_ALIGNMENT", 4096),
        mock.patch.object(luks2, "_DATA_OFFSET", OFFSET),
    ):
        made = (luks1.make if version == 1 else luks2.make)([PASSPHRASE], cheap, uuid=uuid, key_size=KEY_SIZE)
    data = bytearray(made.header_size + SIZE)
    for offset, piece in made.pieces:
        data[offset : offset + len(piece)] = piece
    memory = Memory(data)

    async def fill() -> None:
        async with LuksHandler(memory, _key) as handler:
            await handler.write(0, IoVec([b"the data" * (SIZE // 8)]))

    trio.run(fill)
    return bytes(memory.data), b"the data" * (SIZE // 8)


def _key(_: str) -> bytes:
    return PASSPHRASE


def compose(data: bytes) -> tuple[bytearray, int, bool]:
    """The container that an input stands for, the version it claims, and whether its first header is as it was."""
    flags, header = data[0], data[1:]
    version = 1 if header[6:8] == b"\0\1" or flags & 4 else 2
    whole = bytearray(base(version)[0])
    if version == 1:
        header = header[: luks1.SIZE]
        whole[: len(header)] = header
        return whole, 1, bytes(whole) == base(1)[0]
    copy = bytearray(COPY)
    copy[: len(header[:BINARY])] = header[:BINARY]
    text = header[BINARY:][: COPY - 4096]
    copy[4096 : 4096 + len(text)] = text
    if flags & SEAL:
        copy[448:512] = bytes(64)
        copy[448:480] = hashlib.sha256(copy).digest()
    whole[:COPY] = copy
    if not flags & SECOND:
        whole[COPY : 2 * COPY] = bytes(COPY)
    return whole, 2, bytes(copy) == base(2)[0][:COPY]


def one_input(data: bytes) -> None:
    if len(data) < 9:
        return
    flags = data[0]
    whole, version, untouched = compose(data)
    sealed = bool(flags & SEAL) or untouched
    opened, found = trio.run(use, Memory(bytearray(whole)))
    if untouched or (version == 2 and not sealed and flags & SECOND and DearError not in (opened,)):
        assert opened is None and found == base(version)[1], f"a good header, and yet: {opened}"
    elif version == 2 and not sealed:
        assert opened is not None, "a header with a wrong checksum was believed"
    described = trio.run(describe, Memory(bytearray(whole)))
    assert described or opened is not None, "what opens can be described"


async def use(memory: Memory) -> tuple[type[Exception] | None, bytes | None]:
    """Opens and reads; the kind of error if it does not open."""
    for read_only in (False, True):
        handler = LuksHandler(memory, _key, read_only=read_only)
        try:
            await handler.open()
            break
        except LuksError as error:
            assert str(error)
            failure = type(error)
    else:
        assert not memory.is_open
        return failure, None
    before = bytes(memory.data)
    try:
        length = min(SIZE, handler.size)
        found = bytearray(length)
        await handler.read(0, IoVec([found]))
        if not handler.read_only:
            # What is written is there, and nothing outside of it has changed.
            unit = handler.block_size
            at = (handler.size // unit - 1) * unit
            await handler.write(at, IoVec([b"\xa5" * unit]))
            again = bytearray(unit)
            await handler.read(at, IoVec([again]))
            assert again == b"\xa5" * unit
            changed = [n for n in range(0, len(before), 4096) if before[n : n + 4096] != memory.data[n : n + 4096]]
            assert len(changed) <= 2 and all(n >= luks1.SIZE // 4096 * 4096 for n in changed)
    finally:
        await handler.aclose()
    assert not memory.is_open
    return None, bytes(found)


async def describe(memory: Memory) -> bool:
    """What needs no passphrase."""
    from tcmu_rs import Lower

    async with Lower(memory) as lower:
        try:
            found = await container.info(lower)
            json.dumps(found)
            checked = await container.check(lower, repair=True)
        except LuksError as error:
            assert str(error)
            return False
        if checked["repaired"]:
            again = await container.check(lower, repair=False)
            assert again["ok"] and not again["problems"]
    return True


def seeds() -> Iterator[bytes]:
    """Headers of ours and of cryptsetup's."""
    for flags in (0, SEAL, SECOND, SEAL | SECOND):
        yield bytes([flags]) + _short(base(2)[0])
    yield b"\0" + base(1)[0][: luks1.SIZE]
    with tempfile.TemporaryDirectory() as directory:
        image, key = Path(directory, "image"), Path(directory, "key")
        key.write_bytes(PASSPHRASE)
        for options in (
            "--type luks1",
            "--type luks1 --cipher aes-cbc-essiv:sha256 --key-size 256 --hash sha512",
            "--type luks2 --sector-size 512 --label name",
            "--type luks2 --sector-size 4096 --cipher aes-xts-plain64",
            "--type luks2 --integrity hmac-sha256",
        ):
            image.write_bytes(b"")
            with image.open("r+b") as file:
                file.truncate(4 << 20)
            derivation = "" if "luks1" in options else "--pbkdf pbkdf2 --luks2-keyslots-size 128k --offset 512"
            words = f"--batch-mode {options} {derivation} --pbkdf-force-iterations 1000".split()
            done = subprocess.run(["cryptsetup", "luksFormat", *words, image, key], check=False, capture_output=True)
            if done.returncode == 0:
                head = image.read_bytes()
                yield b"\1" + (head[: luks1.SIZE] if "luks1" in options else _short(head))


def _short(whole: bytes) -> bytes:
    return whole[:BINARY] + whole[4096:COPY].rstrip(b"\0") + b"\0"
