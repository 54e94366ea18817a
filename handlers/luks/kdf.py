"""From a passphrase to a key: PBKDF2 and Argon2, and the splitter that spreads a key over its keyslot (AF)."""

from __future__ import annotations

import hashlib
import os
import secrets
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf import argon2, pbkdf2

from ._errors import LuksError

HASHES: dict[str, type[hashes.HashAlgorithm]] = {
    "sha1": hashes.SHA1,
    "sha224": hashes.SHA224,
    "sha256": hashes.SHA256,
    "sha384": hashes.SHA384,
    "sha512": hashes.SHA512,
}
STRIPES = 4000
"""Into how many stripes the splitter makes a key; cryptsetup knows no other number either."""

# A header is a stranger's until its passphrase has been proved: it may not cost what it likes. These are far above what
# cryptsetup makes of itself (1 GiB, a few seconds), and LUKS2 itself allows no more than 4 GiB.
MAX_MEMORY = 4 << 20
"""KiB of memory for Argon2."""
MAX_MEMORY_PASSES = 64 << 20
"""KiB of memory times iterations of Argon2: some minutes."""
MAX_LANES = 16
MAX_ITERATIONS = 500_000_000
"""Iterations of PBKDF2: some minutes."""


def check_hash(name: str) -> None:
    """Refuses an unknown hash by name.

    Raises:
        LuksError: It is not supported.
    """
    if name not in HASHES:
        raise LuksError(f"hash {name!r} is not supported; supported: {', '.join(HASHES)}")


@dataclass(frozen=True, slots=True)
class Pbkdf2:
    """PBKDF2 with HMAC.

    Raises:
        LuksError: The parameters are none, or cost too much.
    """

    hash: str
    iterations: int
    salt: bytes

    def __post_init__(self) -> None:
        """Refuses what is not supported."""
        check_hash(self.hash)
        if not 1 <= self.iterations <= MAX_ITERATIONS:
            raise LuksError(f"{self.iterations} iterations of pbkdf2 are refused; the limit is {MAX_ITERATIONS}")

    def derive(self, passphrase: bytes | bytearray, length: int) -> bytearray:
        """Derives a key of so many bytes."""
        return _derive(pbkdf2.PBKDF2HMAC(HASHES[self.hash](), length, self.salt, self.iterations), passphrase, length)

    def describe(self) -> str:
        """For people: what, and how much of it."""
        return f"pbkdf2-{self.hash}, {self.iterations} iterations"


@dataclass(frozen=True, slots=True)
class Argon2:
    """Argon2id or Argon2i.

    Attributes:
        kind: `argon2id` or `argon2i`.
        time: Iterations.
        memory: KiB.
        lanes: What could run at once.
        salt: Random bytes.

    Raises:
        LuksError: The parameters are none, or cost too much.
    """

    kind: str
    time: int
    memory: int
    lanes: int
    salt: bytes

    def __post_init__(self) -> None:
        """Refuses what is not supported."""
        if not 1 <= self.lanes <= MAX_LANES:
            raise LuksError(f"{self.kind} with {self.lanes} lanes is refused; the limit is {MAX_LANES}")
        if not 8 * self.lanes <= self.memory <= MAX_MEMORY:
            raise LuksError(f"{self.kind} with {self.memory} KiB of memory is refused; the limit is {MAX_MEMORY} KiB")
        if not 1 <= self.time <= MAX_MEMORY_PASSES // self.memory:
            raise LuksError(f"{self.time} iterations of {self.kind} over {self.memory} KiB are refused: too long")
        if len(self.salt) < 8:
            raise LuksError(f"{self.kind} with a salt of {len(self.salt)} bytes is refused; it needs 8")

    def derive(self, passphrase: bytes | bytearray, length: int) -> bytearray:
        """Derives a key of so many bytes.

        Raises:
            LuksError: This machine lacks the memory, or its `cryptography` the algorithm.
        """
        available = available_memory()
        if self.memory > available:
            raise LuksError(f"{self.kind} needs {self.memory} KiB of memory; this machine has {available} KiB to spare")
        algorithm: Any = getattr(argon2, {"argon2id": "Argon2id", "argon2i": "Argon2i"}[self.kind], None)
        try:
            if algorithm is None:
                raise UnsupportedAlgorithm(self.kind)
            kdf = algorithm(
                salt=self.salt, length=length, iterations=self.time, lanes=self.lanes, memory_cost=self.memory
            )
        except UnsupportedAlgorithm:
            raise LuksError(f"{self.kind} is not in this version of the package cryptography, or its OpenSSL") from None
        return _derive(kdf, passphrase, length)

    def describe(self) -> str:
        """For people: what, and how much of it."""
        return f"{self.kind}, {self.memory} KiB, {self.time} iterations, {self.lanes} lanes"


Kdf = Pbkdf2 | Argon2


def _derive(kdf: Any, passphrase: bytes | bytearray, length: int) -> bytearray:
    key = bytearray(length)
    # Straight into memory that can be wiped, where this version of the package does that.
    if hasattr(kdf, "derive_into"):
        kdf.derive_into(passphrase, key)
    else:
        key[:] = kdf.derive(bytes(passphrase))
    return key


def available_memory() -> int:
    """KiB that can be had without swapping."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 10


def calibrate(seconds: float = 1.5) -> Argon2:
    """Finds parameters of Argon2id that take about this long here.

    Memory comes first, as it is what makes guessing expensive: up to 1 GiB and a quarter of what is free. Never below
    64 MiB (or that quarter) and 4 iterations, however slow the machine.
    """
    most = max(min(1 << 20, available_memory() // 4), 64)
    kdf = Argon2("argon2id", 4, min(64 << 10, most), 4, secrets.token_bytes(32))
    # The fastest of three: what else the machine does now shall not make the container weaker for ever.
    factor = seconds / min(_seconds_of(kdf) for _ in range(3))
    memory = max(kdf.memory, min(most, int(kdf.memory * factor)))
    passes = max(4, round(4 * factor * kdf.memory / memory))
    return replace(kdf, memory=memory, time=min(passes, MAX_MEMORY_PASSES // memory))


def calibrate_pbkdf2(seconds: float = 1.5) -> Pbkdf2:
    """Finds how many iterations of PBKDF2 take about this long here, but never fewer than 100,000."""
    kdf = Pbkdf2("sha256", 100_000, secrets.token_bytes(32))
    factor = seconds / min(_seconds_of(kdf) for _ in range(3))
    return replace(kdf, iterations=min(max(kdf.iterations, int(kdf.iterations * factor)), MAX_ITERATIONS))


def _seconds_of(kdf: Kdf) -> float:
    start = time.perf_counter()
    kdf.derive(b"calibration", 32)
    return time.perf_counter() - start


def _xor(one: bytes | bytearray, other: bytes | bytearray) -> bytes:
    return (int.from_bytes(one) ^ int.from_bytes(other)).to_bytes(len(one))


def _diffuse(block: bytes, algorithm: str) -> bytes:
    size = hashlib.new(algorithm).digest_size
    pieces = []
    for number, at in enumerate(range(0, len(block), size)):
        piece = block[at : at + size]
        digest = hashlib.new(algorithm, number.to_bytes(4) + piece, usedforsecurity=True).digest()
        pieces.append(digest[: len(piece)])
    return b"".join(pieces)


def af_merge(stripes: bytes | bytearray | memoryview, key_size: int, algorithm: str) -> bytearray:
    """Gets the key back from its stripes; all of them are needed, so wiping any of them destroys it."""
    state = bytes(key_size)
    for at in range(0, key_size * (STRIPES - 1), key_size):
        state = _diffuse(_xor(state, bytes(stripes[at : at + key_size])), algorithm)
    last = key_size * (STRIPES - 1)
    return bytearray(_xor(state, bytes(stripes[last : last + key_size])))


def af_split(key: bytearray, algorithm: str) -> bytearray:
    """Spreads a key over random stripes."""
    size = len(key)
    stripes = bytearray(secrets.token_bytes(size * (STRIPES - 1)))
    state = bytes(size)
    for at in range(0, len(stripes), size):
        state = _diffuse(_xor(state, stripes[at : at + size]), algorithm)
    return stripes + _xor(state, key)


class VolumeKey(bytearray):
    """A key that is overwritten when the object goes."""

    def __del__(self) -> None:
        """Overwrites it."""
        wipe(self)


def wipe(*secrets_: bytearray) -> None:
    """Overwrites keys that are not needed any more."""
    for secret in secrets_:
        secret[:] = bytes(len(secret))
