"""LUKS: the arithmetic against published vectors, the header against damage, the disk against a model."""

from __future__ import annotations

import copy
import functools
import itertools
import json
import logging
import os
import random
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner, Result
from cryptography.hazmat.primitives.kdf import argon2
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import run_state_machine_as_test

from tcmu_rs import AesXts, BlockHandler, IoVec, Options, ScsiError, _cli
from tcmu_rs.handlers.file import FileHandler
from tcmu_rs.handlers.luks import LuksError, LuksHandler, WrongPassphraseError, cipher, format_luks, kdf, keys, luks2
from tcmu_rs.handlers.luks.container import parse_header
from tcmu_rs.handlers.luks.handler import STAGE
from tcmu_rs.handlers.luks.volume import Volume
from tcmu_rs.testing import check_block_handler, simulated
from tcmu_rs.testing.model import BlockMachine

from .luks import CHEAP, OFFSET, PASSPHRASE, Memory, container, key, make_cheap

MIB = 1 << 20


@pytest.fixture(autouse=True)
def log() -> None:
    """Damage that these tests do is told in the log, as it has to be: here a warning is no failure."""


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    make_cheap(monkeypatch)


# Arithmetic.

XTS_PLAIN = bytes(range(256)) * 2
XTS = [
    # IEEE 1619-2007, annex B: vectors 4 and 10.
    (
        "2718281828459045235360287471352631415926535897932384626433832795",
        0,
        "27a7479befa1d476489f308cd4cfa6e2a96e4bbe3208ff25287dd3819616e89c",
    ),
    (
        "27182818284590452353602874713526624977572470936999595749669676273141592653589793238462643383279502884197169399375105820974944592",
        0xFF,
        "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b",
    ),
]


@pytest.mark.parametrize("kind", [AesXts, cipher.KeptXts, cipher.FreshXts])
@pytest.mark.parametrize(("key_", "number", "begins"), XTS)
def test_xts_vectors(kind: Callable[..., cipher.SectorCipher], key_: str, number: int, begins: str) -> None:
    sectors = kind(bytearray.fromhex(key_), 512)
    data = bytearray(XTS_PLAIN)
    encrypted = bytearray(512)
    sectors.encrypt(number, IoVec([data]), IoVec([encrypted]))
    assert encrypted.hex().startswith(begins) and data == XTS_PLAIN
    sectors.decrypt(number, IoVec([encrypted]))
    assert encrypted == XTS_PLAIN


def test_contexts_are_kept_with_this_version() -> None:
    assert cipher.keeps_contexts()


def test_the_fastest_way_that_is_right_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    class Processor:
        @staticmethod
        def hardware_accelerated() -> bool:
            return False

    class Broken(cipher.KeptXts):
        def _encrypt(self, number: int, sector: memoryview) -> None:
            super()._encrypt(0, sector)

    def made() -> type:
        return type(cipher.make_cipher("aes-xts-plain64", bytearray(range(64)), 512))

    assert made() is (AesXts if AesXts.hardware_accelerated() else cipher.KeptXts)
    monkeypatch.setattr(cipher, "AesXts", Processor)
    assert made() is cipher.KeptXts
    monkeypatch.setattr(cipher, "KeptXts", Broken)
    cipher.keeps_contexts.cache_clear()
    assert not cipher.keeps_contexts()
    assert made() is cipher.FreshXts
    monkeypatch.undo()
    cipher.keeps_contexts.cache_clear()


@given(
    key_=st.binary(min_size=32, max_size=32) | st.binary(min_size=64, max_size=64),
    sector_size=st.sampled_from(cipher.SECTOR_SIZES),
    number=st.integers(0, 2**64 - 2000),
    count=st.integers(1, 140),
    cuts=st.lists(st.integers(0, 1 << 16), max_size=4),
    seed=st.integers(),
)
@settings(deadline=None)
def test_every_way_of_xts_does_the_same(
    key_: bytes, sector_size: int, number: int, count: int, cuts: list[int], seed: int
) -> None:
    # Halves that are equal are refused: such a key is none.
    key_ = key_[:-1] + bytes([key_[len(key_) // 2 - 1] ^ 1])
    count = min(count, (1 << 16) // sector_size)
    plain = random.Random(seed).randbytes(count * sector_size)
    found = set()
    ends = [0, *sorted(cut % len(plain) for cut in cuts), len(plain)]
    for kind in (AesXts, cipher.KeptXts, cipher.FreshXts):
        sectors = kind(bytearray(key_), sector_size)
        encrypted = bytearray(len(plain))
        sectors.encrypt(number, IoVec([plain[: len(plain) // 3], plain[len(plain) // 3 :]]), IoVec([encrypted]))
        found.add(bytes(encrypted))
        # The memory is in pieces that are no whole sectors.
        view = memoryview(encrypted)
        sectors.decrypt(number, IoVec([view[start:stop] for start, stop in itertools.pairwise(ends)]))
        assert encrypted == plain
    assert len(found) == 1 and found != {plain}


@pytest.mark.parametrize(
    ("key_", "sector_size", "said"),
    [
        (bytes(range(48)), 512, "48 bytes is none"),
        (bytes(range(65)), 512, "more than 64 bytes"),
        (b"", 512, "equal"),
        (bytes(64), 512, "both halves of the key are equal"),
        (bytes(range(64)), 768, "sectors of 768 bytes"),
        (bytes(range(64)), 8192, "sectors of 8192 bytes"),
    ],
)
def test_keys_and_sectors_that_are_none(key_: bytes, sector_size: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        AesXts(key_, sector_size)


def test_only_whole_sectors_are_encrypted() -> None:
    sectors = AesXts(bytes(range(64)), 512)
    data = bytearray(b"x" * 1024)
    with pytest.raises(ValueError, match="1000 bytes are not whole sectors of 512"):
        sectors.decrypt(0, IoVec([data[:1000]]))
    with pytest.raises(ValueError, match="source has 512 bytes, the IoVec 1024"):
        sectors.encrypt(0, IoVec([data[:512]]), IoVec([data]))
    with pytest.raises(ValueError, match="64 bits"):
        sectors.decrypt(2**64 - 1, IoVec([data]))
    with pytest.raises(TypeError, match="read-only"):
        sectors.decrypt(0, IoVec([bytes(data)]))
    with pytest.raises(TypeError, match="read-only"):
        sectors.encrypt(0, IoVec([data]), IoVec([bytes(data)]))
    assert data == b"x" * 1024


async def test_the_memory_of_an_answered_command_is_not_touched() -> None:
    sectors = AesXts(bytes(range(64)), 512)

    class Keeper(BlockHandler):
        size = 4096
        kept: IoVec

        def read(self, offset: int, iov: IoVec) -> None:
            self.kept = iov
            # Whatever the memory held before, what is decrypted is zeroes: nothing was read into it.
            sectors.decrypt(0, iov)

    handler = Keeper()
    expected = bytearray(1024)
    sectors.decrypt(0, IoVec([expected]))
    async with simulated(handler) as disk:
        assert await disk.read(0, 1024) == expected
        with pytest.raises(BufferError, match="the command was answered"):
            sectors.decrypt(0, handler.kept)
        with pytest.raises(BufferError, match="the command was answered"):
            sectors.encrypt(0, handler.kept, IoVec([expected]))


def test_pbkdf2_vectors() -> None:
    # RFC 6070 with SHA-256.
    for iterations, expected in (
        (1, "120fb6cffcf8b32c43e7225256c4f837a86548c92ccc35480805987cb70be17b"),
        (4096, "c5e478d59288c841aa530db6845c4c8d962893a001ce4e11a4963873aa98134a"),
    ):
        assert kdf.Pbkdf2("sha256", iterations, b"salt").derive(b"password", 32).hex() == expected


def test_argon2_vectors() -> None:
    # Of the reference implementation; those of RFC 9106 have a secret, which LUKS has not.
    for kind, expected in (
        ("argon2id", "09316115d5cf24ed5a15a31a3ba326e5cf32edc24702987c02b6566f61913cf7"),
        ("argon2i", "c1628832147d9720c5bd1cfd61367078729f6dfb6f8fea9ff98158e0d7816ed0"),
    ):
        if hasattr(argon2, {"argon2i": "Argon2i", "argon2id": "Argon2id"}[kind]):
            assert kdf.Argon2(kind, 2, 65536, 1, b"somesalt").derive(b"password", 32).hex() == expected


def test_argon2id_of_the_rfc() -> None:
    derived = argon2.Argon2id(
        salt=b"\2" * 16, length=32, iterations=3, lanes=4, memory_cost=32, ad=b"\4" * 12, secret=b"\3" * 8
    ).derive(b"\1" * 32)
    assert derived.hex() == "0d640df58d78766c08c037a34a8b53c9d01ef0452d75b65eb52520e96b01e659"


def test_an_algorithm_that_the_package_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(argon2, "Argon2i", raising=False)
    with pytest.raises(LuksError, match="argon2i is not in this version"):
        kdf.Argon2("argon2i", 1, 64, 1, b"somesalt").derive(b"password", 32)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: kdf.Argon2("argon2id", 4, 1 << 23, 4, bytes(16)), "8388608 KiB of memory is refused"),
        (lambda: kdf.Argon2("argon2id", 1 << 20, 1 << 20, 4, bytes(16)), "too long"),
        (lambda: kdf.Argon2("argon2id", 0, 1 << 20, 4, bytes(16)), "0 iterations"),
        (lambda: kdf.Argon2("argon2id", 4, 31, 4, bytes(16)), "31 KiB"),
        (lambda: kdf.Argon2("argon2id", 4, 1 << 20, 1 << 20, bytes(16)), "1048576 lanes"),
        (lambda: kdf.Argon2("argon2id", 4, 1 << 20, 4, b"x"), "salt of 1 bytes"),
        (lambda: kdf.Pbkdf2("sha256", 1 << 31, bytes(16)), "2147483648 iterations"),
        (lambda: kdf.Pbkdf2("sha256", 0, bytes(16)), "0 iterations"),
        (lambda: kdf.Pbkdf2("whirlpool", 1000, bytes(16)), "hash 'whirlpool' is not supported"),
    ],
)
def test_parameters_that_would_cost_too_much_or_are_none(make: Callable[[], object], said: str) -> None:
    with pytest.raises(LuksError, match=said):
        make()


def test_memory_that_is_not_there_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kdf, "available_memory", lambda: 1000)
    with pytest.raises(LuksError, match="needs 1024 KiB of memory; this machine has 1000 KiB"):
        kdf.Argon2("argon2id", 1, 1024, 1, bytes(16)).derive(b"x", 32)


def test_calibration_bounds_memory_and_meets_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    # A machine on which 64 MiB and one iteration take 0.1 s.
    monkeypatch.setattr(kdf, "_seconds_of", lambda found: found.time * found.memory / (64 << 10) * 0.1)
    monkeypatch.setattr(kdf, "available_memory", lambda: 64 << 20)
    found = kdf.calibrate(1.6)
    assert (found.kind, found.time, found.memory, found.lanes) == ("argon2id", 4, 256 << 10, 4)
    found = kdf.calibrate(16)
    assert (found.time, found.memory) == (10, 1 << 20)
    found = kdf.calibrate(0.001)
    assert (found.time, found.memory) == (4, 64 << 10)
    monkeypatch.setattr(kdf, "available_memory", lambda: 400 << 10)
    found = kdf.calibrate(1.6)
    assert (found.time, found.memory) == (10, 100 << 10)


@given(st.binary(min_size=16, max_size=64), st.sampled_from(["sha1", "sha256", "sha512"]))
@settings(max_examples=10, deadline=None)
def test_the_splitter_is_undone_by_the_merger_alone(secret: bytes, algorithm: str) -> None:
    stripes = kdf.af_split(bytearray(secret), algorithm)
    assert len(stripes) == len(secret) * kdf.STRIPES
    assert kdf.af_merge(stripes, len(secret), algorithm) == secret
    stripes[random.randrange(len(stripes))] ^= 1
    assert kdf.af_merge(stripes, len(secret), algorithm) != secret


# The header.


@functools.cache
def _header() -> bytes:
    return bytes(container(4096)[: 1 << 19])


def resealed(change: Callable[[dict[str, Any]], object]) -> bytes:
    """A header that says something else, with a checksum that is right."""
    header = bytearray(_header())
    for found in luks2.find_copies(_header()):
        assert isinstance(found, luks2.HeaderCopy)
        metadata = copy.deepcopy(found.metadata)
        change(metadata)
        area = json.dumps(metadata).encode().ljust(found.size - 4096, b"\0")
        fields = luks2._BINARY.unpack_from(found.raw)
        header[found.offset : found.offset + found.size] = luks2._seal(fields, area)
    return bytes(header)


def change(*path: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def apply(metadata: dict[str, Any]) -> None:
        for name in path[:-1]:
            metadata = metadata[name]
        metadata[path[-1]] = to

    return apply


SLOT = "keyslots", "0"
SEGMENT = "segments", "0"


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (change("config", "requirements", to={"mandatory": ["online-reencrypt-v2"]}), "requires .*online-reencrypt-v2"),
        (change("config", "requirements", to=["x"]), "requires"),
        (change("config", "json_size", to="4096"), "json_size"),
        (change("config", to=None), "config"),
        (change("segments", to={}), "0 segments"),
        (change("segments", "1", to={"type": "crypt"}), "2 segments"),
        (change(*SEGMENT, "type", to="linear"), "segment of type 'linear'"),
        (change(*SEGMENT, "integrity", to={"type": "hmac(sha256)"}), "integrity"),
        (change(*SEGMENT, "flags", to=["in-reencryption"]), "in-reencryption"),
        (change(*SEGMENT, "encryption", to="serpent-xts-plain64"), "cipher 'serpent-xts-plain64' is not supported"),
        (change(*SEGMENT, "encryption", to="aes-xts-plain"), "cipher 'aes-xts-plain' is not supported"),
        (change(*SEGMENT, "encryption", to="aes-cbc-essiv:sha256"), "key of 512 bits"),
        (change(*SEGMENT, "sector_size", to=8192), "sectors of 8192"),
        (change(*SEGMENT, "sector_size", to=True), "sector_size"),
        (change(*SEGMENT, "offset", to="4096"), "overlap"),
        (change(*SEGMENT, "offset", to="16777217"), "not made of sectors"),
        (change(*SEGMENT, "offset", to=16777216), "offset"),
        (change(*SEGMENT, "offset", to="-1"), "offset"),
        (change(*SEGMENT, "size", to="512"), "not made of sectors"),
        (change(*SEGMENT, "size", to="99999999999999999999"), "size"),
        (change("digests", to={}), "0 digests"),
        (change("digests", "0", "type", to="hmac"), "digest of type 'hmac'"),
        (change("digests", "0", "digest", to="!"), "'digest'"),
        (change("digests", "0", "digest", to="QUFB"), "'digest'"),
        (change("digests", "0", "keyslots", to=["7"]), "no keyslot '7'"),
        (change("digests", "0", "keyslots", to=[]), "no keyslot"),
        (change("digests", "0", "iterations", to=1 << 40), "iterations of pbkdf2 are refused"),
        (change(*SLOT, "type", to="reencrypt"), "keyslot 0 of type 'reencrypt'"),
        (change("keyslots", "x", to={}), "keyslots 'x'"),
        (change(*SLOT, "af", "stripes", to=1), "1 stripes"),
        (change(*SLOT, "af", "type", to="luks9"), "splitter 'luks9'"),
        (change(*SLOT, "af", "hash", to="md5"), "hash 'md5'"),
        (change(*SLOT, "area", "type", to="journal"), "area 'journal'"),
        (change(*SLOT, "area", "offset", to="0"), "outside the keyslots"),
        (change(*SLOT, "area", "size", to="4096"), "too small"),
        (change(*SLOT, "area", "size", to="99999999"), "outside the keyslots"),
        (change(*SLOT, "area", "encryption", to="cipher_null-ecb"), "cipher_null-ecb"),
        (change(*SLOT, "priority", to=9), "priority"),
        (change(*SLOT, "key_size", to=1 << 30), "key_size"),
        (change(*SLOT, "kdf", "type", to="scrypt"), "key derivation 'scrypt'"),
        (
            change(
                *SLOT, "kdf", to={"type": "argon2id", "time": 4, "memory": 1 << 40, "cpus": 4, "salt": "AAAAAAAAAAAA"}
            ),
            "KiB of memory is refused",
        ),
    ],
)
def test_what_is_not_understood_is_refused_by_name(changed: Callable[[dict[str, Any]], None], said: str) -> None:
    with pytest.raises(LuksError, match=said):
        parse_header(resealed(changed))


def test_the_reencoded_header_is_right_by_itself() -> None:
    assert parse_header(resealed(lambda _: None)) == parse_header(_header())


@pytest.mark.parametrize("data", [b"", b"x" * 4096, bytes(MIB), b"LUKS\xba\xbe", b"LUKS\xba\xbe\0\3" + bytes(9000)])
def test_what_is_no_container_is_said(data: bytes) -> None:
    with pytest.raises(LuksError, match=r"no LUKS container|header"):
        parse_header(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.integers().map(str),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def paths(record: Any) -> list[tuple[Any, ...]]:
    if isinstance(record, dict):
        return [(), *((name, *rest) for name, inner in record.items() for rest in paths(inner))]
    if isinstance(record, list):
        return [(), *((number, *rest) for number, inner in enumerate(record) for rest in paths(inner))]
    return [()]


@given(data=st.data())
@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_metadata_is_read_or_refused(data: st.DataObject) -> None:
    def mutate(metadata: dict[str, Any]) -> None:
        path = data.draw(st.sampled_from([path for path in paths(metadata) if path]))
        target: Any = metadata
        for step in path[:-1]:
            target = target[step]
        if data.draw(st.booleans()) and isinstance(target, dict):
            del target[path[-1]]
        else:
            target[path[-1]] = data.draw(JSON)

    found = luks2.choose(_header())
    metadata = copy.deepcopy(found.metadata)
    mutate(metadata)
    try:
        volume = luks2.parse(luks2.HeaderCopy(False, 0, found.size, 1, "", "", b"", metadata))
    except LuksError:
        return
    assert isinstance(volume, Volume)


@given(st.binary(max_size=3000), st.binary(max_size=100), st.integers(0, 1))
@settings(deadline=None)
def test_any_bytes_are_read_or_refused(noise: bytes, json_: bytes, version: int) -> None:
    binary = luks2._BINARY.pack(luks2.MAGIC, 2, 16384, 1, b"", b"sha256", b"", b"", b"", 0, b"")
    candidates = [
        noise,
        luks2.MAGIC + bytes([0, version]) + noise,
        luks2._seal(luks2._BINARY.unpack(binary), json_.ljust(16384 - 4096, b"\0")),
    ]
    for candidate in candidates:
        with pytest.raises(LuksError):
            parse_header(candidate)


def opened(memory: Memory, **arguments: Any) -> bytes:
    """Opens a container and reads its first block."""

    async def read() -> bytes:
        async with LuksHandler(memory, key, **arguments) as disk:
            assert memory.is_open
            block = bytearray(4096)
            await disk.read(0, IoVec([block]))
            return bytes(block)

    return trio.run(read)


@functools.cache
def _written() -> bytes:
    memory = Memory(container(8192))

    async def write() -> None:
        async with LuksHandler(memory, key) as disk:
            await disk.write(0, IoVec([b"A" * 4096]))

    trio.run(write)
    return bytes(memory.data)


@given(
    st.lists(
        st.tuples(st.integers(0, 2 * 16384 + 256000) | st.integers(0, 520), st.integers(1, 255)), min_size=1, max_size=4
    )
)
@settings(max_examples=40, deadline=None)
def test_damage_is_an_error_or_harmless_and_nothing_is_written(flips: list[tuple[int, int]]) -> None:
    memory = Memory(bytearray(_written()))
    for at, mask in flips:
        memory.data[at] ^= mask
    before = bytes(memory.data)
    try:
        assert opened(memory) == b"A" * 4096
    except LuksError as error:
        assert str(error)
    assert memory.data == before
    assert memory.calls == []
    assert not memory.is_open


@pytest.mark.parametrize("size", [0, 512, 4096, 16384, 40960, OFFSET - 512, OFFSET, OFFSET + 512])
def test_a_file_that_was_cut_off(size: int) -> None:
    memory = Memory(bytearray(_written()[: max(size, 512)]))
    with pytest.raises(LuksError, match=r"cut off|no LUKS container"):
        opened(memory)
    assert memory.calls == []


def test_a_wrong_passphrase_is_its_own_error() -> None:
    async def open_() -> None:
        async with LuksHandler(Memory(bytearray(_written())), lambda _: b"wrong"):
            pass

    with pytest.raises(WrongPassphraseError, match="wrong passphrase or key file"):
        trio.run(open_)


def test_the_newer_copy_is_believed_and_the_other_mended(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    data = bytearray(_written())
    found = luks2.choose(bytes(data))
    fields = list(luks2._BINARY.unpack_from(found.raw))
    fields[3], fields[4] = 9, b"newer"
    newer = luks2.parse_copy(luks2._seal(fields, found.raw[4096:]), 0, secondary=False).twin()
    data[16384 : 2 * 16384] = newer
    path = tmp_path / "x.luks"
    path.write_bytes(data)
    assert parse_header(path.read_bytes()).label == "newer"
    assert opened(Memory(bytearray(data))) == b"A" * 4096
    assert "the copies of the header differ: sequence 1 and 9" in caplog.text

    def check(**arguments: Any) -> dict[str, Any]:
        return trio.run(functools.partial(LuksHandler.check, str(path), Options(), **arguments))

    assert check() == {
        "ok": False,
        "problems": ["the copies of the header differ: sequence 1 and 9"],
        "repaired": False,
    }
    assert path.read_bytes() == data
    assert check(repair=True)["repaired"]
    assert check() == {"ok": True, "problems": [], "repaired": False}
    assert path.read_bytes()[32768:] == data[32768:]


@pytest.mark.parametrize("broken", [0, 16384])
@pytest.mark.parametrize("damage", [b"", bytes(4096), os.urandom(16384)])
def test_either_copy_is_enough_and_mends_the_other(tmp_path: Path, broken: int, damage: bytes) -> None:
    path = tmp_path / "x.luks"
    data = bytearray(_written())
    data[broken + 200 : broken + 201] = b"\xff"
    data[broken : broken + len(damage)] = damage
    path.write_bytes(data)
    assert opened(Memory(data)) == b"A" * 4096
    result = run("check", f"luks:{path}")
    assert (result.exit_code, result.stdout.splitlines()[-1]) == (1, "damaged")
    assert path.read_bytes() == data
    assert json.loads(run("check", f"luks:{path}", "--repair", "--json").stdout)["repaired"]
    assert run("check", f"luks:{path}").stdout == "in order\n"
    primary, secondary = luks2.find_copies(path.read_bytes())
    assert isinstance(primary, luks2.HeaderCopy) and isinstance(secondary, luks2.HeaderCopy)
    assert primary.metadata == secondary.metadata
    assert primary.raw[448:480] != secondary.raw[448:480]


def test_with_both_copies_gone_there_is_nothing_to_mend(tmp_path: Path) -> None:
    path = tmp_path / "x.luks"
    data = bytearray(_written())
    data[100] ^= 1
    data[16384 + 100] ^= 1
    path.write_bytes(data)
    result = run("check", f"luks:{path}", "--repair")
    assert result.exit_code == 1
    assert "primary header is damaged: its checksum is wrong, and the secondary header is damaged" in result.stderr
    assert path.read_bytes() == data


def test_luks1_headers() -> None:
    def header(**changed: Any) -> bytes:
        fields = {
            "magic": luks2.MAGIC, "version": 1, "cipher": b"aes", "mode": b"xts-plain64", "hash": b"sha256",
            "payload": 4096, "key_bytes": 64, "digest": bytes(20), "salt": bytes(32), "iterations": 1000, "uuid": b"u",
            "state": 0x00AC71F3, "slot_iterations": 1000, "slot_salt": bytes(32), "material": 8, "stripes": 4000,
        } | changed  # fmt: skip
        values = list(fields.values())
        first = struct.pack(">6sH32s32s32sII20s32sI40s", *values[:11]) + struct.pack(">II32sII", *values[11:])
        return first + struct.pack(">II32sII", 0xDEAD, 0, b"", 0, 4000) * 7 + bytes(4096)

    volume = parse_header(header())
    assert (volume.version, volume.cipher, volume.offset, len(volume.keyslots)) == (1, "aes-xts-plain64", 2 * MIB, 1)
    for changed, said in (
        ({"cipher": b"twofish"}, "twofish-xts-plain64"),
        ({"mode": b"cbc-plain"}, "aes-cbc-plain"),
        ({"hash": b"ripemd160"}, "ripemd160"),
        ({"key_bytes": 65}, "520 bits"),
        ({"state": 1}, "keyslot 0 is damaged"),
        ({"stripes": 1}, "1 stripes"),
        ({"payload": 1}, "inside it"),
        ({"material": 0}, "outside"),
        ({"material": 4095}, "outside"),
        ({"slot_iterations": 0}, "0 iterations"),
        ({"iterations": 0xFFFFFFFF}, "4294967295 iterations"),
    ):
        with pytest.raises(LuksError, match=said):
            parse_header(header(**changed))
    with pytest.raises(LuksError, match="cut off"):
        parse_header(header()[:500])


@given(st.integers(0, 591), st.integers(0, 255))
@settings(deadline=None)
def test_damaged_luks1_headers_are_read_or_refused(at: int, value: int) -> None:
    fields = luks2.MAGIC, 1, b"aes", b"xts-plain64", b"sha256", 4096, 64, bytes(20), bytes(32), 1000, b"uuid"
    header = bytearray(struct.pack(">6sH32s32s32sII20s32sI40s", *fields))
    header += struct.pack(">II32sII", 0x00AC71F3, 1000, bytes(32), 8, 4000)
    header += struct.pack(">II32sII", 0xDEAD, 0, b"", 0, 4000) * 7
    header[at] = value
    try:
        volume = parse_header(bytes(header))
    except LuksError:
        return
    assert volume.version == 1


# The disk.


@given(data=st.data(), sector_size=st.sampled_from(cipher.SECTOR_SIZES), lower_block=st.sampled_from([512, 4096]))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
def test_any_transfers_in_any_pieces_do_as_memory(data: st.DataObject, sector_size: int, lower_block: int) -> None:
    size = 64 << 10
    block_size = data.draw(st.sampled_from([block for block in (512, 1024, 4096) if size % block == 0]))
    memory = Memory(bytearray(_container(size, sector_size)), block_size=lower_block)

    def pieces(length: int, source: bytes | None) -> IoVec:
        cuts = sorted({0, length, *data.draw(st.lists(st.integers(1, length - 1), max_size=4))})
        parts = [bytearray(stop - start) for start, stop in itertools.pairwise(cuts)]
        if source is not None:
            parts = [bytearray(source[start:stop]) for start, stop in itertools.pairwise(cuts)]
        return IoVec(parts)

    async def exercise() -> None:
        model: bytearray | None = None
        async with LuksHandler(memory, key, block_size=block_size) as disk:
            assert (disk.size, disk.block_size) == (size, block_size)
            for _ in range(data.draw(st.integers(1, 12))):
                if model is None:
                    model = bytearray(os.urandom(size))
                    await disk.write(0, IoVec([model]))
                start = data.draw(st.integers(0, size // block_size - 1)) * block_size
                length = data.draw(st.integers(1, min(size - start, 16 << 10) // block_size)) * block_size
                if data.draw(st.booleans()):
                    new = os.urandom(length)
                    iov = pieces(length, new)
                    await disk.write(start, iov, fua=data.draw(st.booleans()))
                    assert iov.tobytes() == new
                    model[start : start + length] = new
                else:
                    iov = pieces(length, None)
                    await disk.read(start, iov)
                    assert iov.tobytes() == model[start : start + length]
        async with LuksHandler(memory, key) as disk:
            whole = bytearray(size)
            await disk.read(0, IoVec([whole]))
            assert whole == model

    trio.run(exercise)


@functools.cache
def _container(size: int, sector_size: int) -> bytes:
    return bytes(container(size, sector_size=sector_size))


def test_the_sectors_are_those_of_the_reference() -> None:
    size = 4 * STAGE + 8192
    secret = bytearray(range(64))
    plain = os.urandom(size)
    for sector_size, block_size in ((4096, 4096), (4096, 512), (512, 512)):
        memory = Memory(bytearray(OFFSET + size))

        async def write(memory: Memory = memory, sector_size: int = sector_size, block_size: int = block_size) -> None:
            await format_luks(memory, [PASSPHRASE], kdf=CHEAP, sector_size=sector_size, volume_key=secret)
            async with LuksHandler(memory, key, block_size=block_size) as disk:
                await disk.write(0, IoVec([plain[: size - 4096]]))
                await disk.write(size - 4096, IoVec([plain[size - 4096 :]]))

        trio.run(write)
        expected = bytearray(plain)
        reference = cipher.FreshXts(secret, sector_size)
        reference.encrypt(0, IoVec([expected]), IoVec([expected]))
        assert memory.data[OFFSET:] == expected


async def test_blocks_smaller_than_sectors_written_at_once_from_many_sides() -> None:
    size = 64 << 10
    memory = Memory(bytearray(_container(size, 4096)))
    expected = bytearray(size)
    source = random.Random(1)
    async with simulated(LuksHandler(memory, key, block_size=512)) as disk:
        await disk.write(0, bytes(size))
        order = list(range(size // 512))
        source.shuffle(order)

        async def write(block: int, count: int) -> None:
            new = source.randbytes(512 * count)
            expected[block * 512 : (block + count) * 512] = new
            await disk.write(block * 512, new)

        async with trio.open_nursery() as nursery:
            for block in order:
                nursery.start_soon(write, block, 1)
        assert await disk.read(0, size) == expected
        # Whole sectors among the parts, and runs over several sectors, none of them overlapping.
        runs = [(start, source.choice((1, 7, 8, 9, 16))) for start in range(0, size // 512, 16)]
        async with trio.open_nursery() as nursery:
            for start, count in runs:
                nursery.start_soon(write, start, count)
                if count < 16:
                    nursery.start_soon(write, start + count, 16 - count)
        assert await disk.read(0, size) == expected
        assert await disk.read(512, 512 * 9) == expected[512 : 512 * 10]


async def test_a_transfer_larger_than_the_buffer() -> None:
    size = 3 * STAGE
    memory = Memory(bytearray(_container(size, 4096)))
    data = os.urandom(size)
    async with LuksHandler(memory, key, block_size=512) as disk:
        await disk.write(0, IoVec([bytes(size)]))
        await disk.write(512, IoVec([data[512:-512]]))
        found = bytearray(size)
        await disk.read(0, IoVec([found]))
        assert found == bytes(512) + data[512:-512] + bytes(512)
        part = bytearray(size - 1024)
        await disk.read(512, IoVec([part]))
        assert part == data[512:-512]


GEOMETRIES = pytest.mark.parametrize(
    ("sector_size", "block_size", "lower_block"),
    [(4096, 4096, 512), (4096, 512, 512), (512, 512, 512), (512, 512, 4096), (2048, 1024, 4096)],
)


@GEOMETRIES
async def test_the_kit_of_obligations(sector_size: int, block_size: int, lower_block: int) -> None:
    memory = Memory(bytearray(_container(MIB, sector_size)), block_size=lower_block)
    make = functools.partial(LuksHandler, memory, key, block_size=block_size, allow_discards=True)
    await check_block_handler(make, persistent=True)


@GEOMETRIES
def test_the_disk_is_like_the_model(sector_size: int, block_size: int, lower_block: int) -> None:
    class Machine(BlockMachine):
        persistent = True

        def __init__(self) -> None:
            super().__init__()
            self.memory = Memory(bytearray(_container(64 * 4096, sector_size)), block_size=lower_block)

        def make_handler(self) -> LuksHandler:
            return LuksHandler(self.memory, key, block_size=block_size)

    run_state_machine_as_test(Machine, settings=settings(max_examples=5, stateful_step_count=20, deadline=None))


async def test_what_the_disk_can_follows_from_what_is_below() -> None:
    size = 64 << 10
    memory = Memory(bytearray(_container(size, 4096)))
    async with simulated(LuksHandler(memory, key)) as disk:
        assert (disk.size, disk.block_size, disk.device.handler.max_in_flight) == (size, 4096, 16)
        assert disk.device.handler.size == size
        await disk.write(0, b"x" * 4096)
        await disk.write(0, b"x" * 4096, fua=True)
        assert memory.calls == ["write", "write", "flush"]
        with pytest.raises(ScsiError):
            await disk.discard(0, 4096)
        # Zeroes have to be encrypted.
        await disk.write_zeroes(0, 4096)
        assert await disk.read(0, 4096) == bytes(4096)
        assert memory.data[OFFSET : OFFSET + 4096] != bytes(4096)
    assert not memory.is_open


async def test_discards_are_passed_down_on_request_and_never_touch_what_is_around() -> None:
    size = 64 << 10
    memory = Memory(bytearray(_container(size, 4096)))
    async with simulated(LuksHandler(memory, key, block_size=512, allow_discards=True)) as disk:
        await disk.write(0, b"x" * size)
        memory.calls.clear()
        await disk.discard(512, 4096)
        assert memory.calls == []
        await disk.discard(512, 3 * 4096)
        assert memory.calls == ["discard"]
        assert memory.data[OFFSET + 4096 : OFFSET + 3 * 4096] == bytes(8192)
        assert await disk.read(0, 4096) == b"x" * 4096
        assert await disk.read(3 * 4096, 4096) == b"x" * 4096
        assert not disk.device.handler.discard_zeroes  # type: ignore[attr-defined]


async def test_read_only() -> None:
    memory = Memory(bytearray(_written()))
    async with simulated(LuksHandler(memory, key, read_only=True)) as disk:
        assert await disk.read(0, 4096) == b"A" * 4096
        with pytest.raises(ScsiError):
            await disk.write(0, bytes(4096))
    assert memory.calls == []


async def test_geometry_that_does_not_fit() -> None:
    size = 64 << 10
    data = bytearray(_container(size, 4096))
    with pytest.raises(ValueError, match="65536 bytes, not the 512"):
        await LuksHandler(Memory(data), key, size=512).open()
    with pytest.raises(LuksError, match="not whole blocks of 4096"):
        await LuksHandler(Memory(data[:-512]), key).open()
    small = bytearray(_container(512 * 9, 512))
    with pytest.raises(ValueError, match="use --block-size 512"):
        await LuksHandler(Memory(small), key, block_size=4096).open()


async def test_a_detached_header() -> None:
    size = 64 << 10
    whole = bytearray(_container(size, 4096))
    header, data = Memory(whole[: 1 << 20]), Memory(bytearray(whole))
    data.data[:OFFSET] = bytes(OFFSET)
    async with LuksHandler(data, key, header=header) as disk:
        await disk.write(0, IoVec([b"y" * 4096]))
    assert header.calls == [] and not header.is_open and not data.is_open
    whole[OFFSET:] = data.data[OFFSET:]
    async with LuksHandler(Memory(whole), key) as disk:
        block = bytearray(4096)
        await disk.read(0, IoVec([block]))
    assert block == b"y" * 4096


async def test_a_detached_header_alone_is_no_disk() -> None:
    header = resealed(change(*SEGMENT, "offset", to="0"))
    memory = Memory(bytearray(header) + bytearray(OFFSET))
    with pytest.raises(LuksError, match="detached header"):
        await LuksHandler(memory, key).open()
    assert memory.calls == []
    # With its data it is one, from the first byte on.
    async with LuksHandler(Memory(bytearray(8192)), key, header=memory) as disk:
        assert disk.size == 8192


async def test_key_providers_of_both_colours_and_what_they_are_told() -> None:
    asked: list[str] = []
    secret = bytearray(PASSPHRASE)

    async def vault(uuid: str) -> bytearray:
        await trio.lowlevel.checkpoint()
        asked.append(uuid)
        return secret

    async with LuksHandler(Memory(bytearray(_written())), vault):
        pass
    assert asked == [parse_header(_written()).uuid]
    assert secret == bytes(len(PASSPHRASE))

    async def refuse(_: str) -> bytes:
        raise PermissionError("the vault is closed")

    memory = Memory(bytearray(_written()))
    with pytest.raises(PermissionError):
        await LuksHandler(memory, refuse).open()
    assert not memory.is_open


async def test_every_passphrase_opens() -> None:
    several = (b"one", b"\x00\xff\n", b"three" * 1000)
    data = container(4096, passphrases=several)
    for passphrase in several:
        async with LuksHandler(Memory(bytearray(data)), lambda _, passphrase=passphrase: passphrase):  # type: ignore[misc]
            pass


# Secrets.


async def test_nothing_shows_the_key(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    secret = bytearray(b"0123456789abcdef" * 4)
    secret[40] = 0
    memory = Memory(bytearray(OFFSET + 8192))
    await format_luks(memory, [PASSPHRASE], kdf=CHEAP, volume_key=secret)
    shown = []
    handler = LuksHandler(memory, key)
    async with simulated(handler) as disk:
        shown += [
            repr(handler),
            str(vars(handler)),
            repr(disk.device),
            repr(handler._cipher),
        ]
        await disk.write(0, bytes(8192))
    shown += [str(vars(handler)), caplog.text]
    with pytest.raises(WrongPassphraseError) as error:
        await LuksHandler(memory, lambda _: b"mine alone").open()
    shown.append(repr(error.value))
    for text in shown:
        for hidden in ("0123456789abcdef", "horse", "mine alone", bytes(secret).hex()):
            assert hidden not in text


def test_the_process_leaves_no_core() -> None:
    code = (
        "import ctypes, resource; from tcmu_rs.handlers.luks import keys; keys.forbid_core_dumps();"
        "print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE)[0])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout == "0 0\n"


# The command line.


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(_cli.main, [str(argument) for argument in arguments])


def attached(config: str, **extra: str) -> LuksHandler:
    return LuksHandler.from_config(
        config, Options(extra={name.replace("_", "-"): text for name, text in extra.items()}, interactive=True)
    )


@pytest.mark.parametrize("short", [True, False])
def test_create_with_several_key_files(tmp_path: Path, short: bool) -> None:
    path, first, second = tmp_path / "x.luks", tmp_path / "one", tmp_path / "two"
    first.write_bytes(b"one\n")
    second.write_bytes(os.urandom(4096))
    keys = ["--key-file", f"{first}", "--key-file", f"{second}"]
    if not short:
        keys = ["-o", f"key-file={first}", "-o", f"key-file-2={second}"]
    create = ["create", f"luks:{path}", "--size", "1M", *keys]
    result = run(*create, "-o", "iter-time=1")
    assert (result.exit_code, result.output) == (0, "")
    assert path.stat().st_size == OFFSET + MIB
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.stat().st_blocks * 512 < 2 * MIB
    found = json.loads(run("info", f"luks:{path}", "--json").stdout)
    assert list(found["keyslots"]) == ["0", "1"]
    assert found["keyslots"]["0"].startswith("argon2id, ")
    assert (found["cipher"], found["key bits"], found["sector size"]) == ("aes-xts-plain64", 512, 4096)
    assert (found["data offset"], found["data size"]) == (OFFSET, MIB)
    assert "keyslots 1: argon2id" in run("info", f"luks:{path}").stdout
    for key_file in (first, second):

        async def open_(key_file: Path = key_file) -> None:
            async with attached(str(path), key_file=str(key_file)) as disk:
                assert disk.size == MIB

        trio.run(open_)
    before = path.read_bytes()
    again = run(*create)
    assert again.exit_code == 1 and "there is such a file already" in again.stderr
    assert path.read_bytes() == before


def filled(tmp_path: Path, config: str, *options: str) -> bytes:
    """Makes a container as `tcmu-rs create` does, and writes all of it."""
    data = random.Random(config).randbytes(MIB)
    key_file = tmp_path / "key"
    key_file.write_bytes(b"k")
    given = [f"key-file={key_file}", *options]
    result = run("create", f"luks:{config}", "--size", "1M", *(word for text in given for word in ("-o", text)))
    assert (result.exit_code, result.output) == (0, "")

    async def write() -> None:
        async with opened_again(tmp_path, config, *options) as disk:
            assert disk.size == MIB
            await disk.write(0, IoVec([data]))

    trio.run(write)
    return data


def opened_again(tmp_path: Path, config: str, *options: str) -> LuksHandler:
    only_create = ("iter-time", "version", "key-size", "label", "sector-size", "cluster-size")
    pairs = [text.split("=", 1) for text in (f"key-file={tmp_path / 'key'}", *options)]
    extra = {name: value for name, value in pairs if name.removeprefix("lower.") not in only_create}
    return LuksHandler.from_config(config, Options(extra=extra))


async def contents(disk: LuksHandler) -> bytes:
    async with disk:
        data = bytearray(disk.size)
        await disk.read(0, IoVec([data]))
        return bytes(data)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["iter-time=1"], (2, 512, 4096, OFFSET)),
        (["iter-time=1", "sector-size=512", "key-size=256", "label=a label"], (2, 256, 512, OFFSET)),
        (["iter-time=1", "version=1"], (1, 512, 512, 2 * MIB)),
        (["iter-time=1", "version=1", "key-size=256"], (1, 256, 512, 2 * MIB)),
    ],
)
def test_what_create_makes(tmp_path: Path, options: list[str], expected: tuple[int, ...], cheap: None) -> None:
    path = tmp_path / "disk"
    data = filled(tmp_path, str(path), *options)
    found = json.loads(run("info", f"luks:{path}", "--json").stdout)
    assert (found["version"], found["key bits"], found["sector size"], found["data offset"]) == expected
    assert found["label"] == ("a label" if "label=a label" in options else "")
    assert trio.run(contents, opened_again(tmp_path, str(path), *options)) == data
    assert run("check", f"luks:{path}").stdout == "in order\n"


@pytest.mark.parametrize("version", ["1", "2"])
def test_a_detached_header_is_made(tmp_path: Path, version: str, cheap: None) -> None:
    path, header = tmp_path / "disk", tmp_path / "header"
    options = [f"header={header}", "iter-time=1", f"version={version}"]
    data = filled(tmp_path, str(path), *options)
    assert path.stat().st_size == MIB and b"LUKS" not in path.read_bytes()[:4096]
    assert trio.run(contents, opened_again(tmp_path, str(path), *options)) == data
    assert "no LUKS container" in run("info", f"luks:{path}").stderr
    assert f"version: {version}" in run("info", f"luks:{path}", "-o", f"header={header}").stdout


def test_on_another_handler(tmp_path: Path, cheap: None) -> None:
    # Encrypted twice: the handler below has options of its own, and is made first.
    path, other = tmp_path / "disk", tmp_path / "other"
    other.write_bytes(b"other")
    options = ["iter-time=1", f"lower.key-file={other}", "lower.iter-time=1", "lower.sector-size=512"]
    data = filled(tmp_path, f"luks:file:{path}", *options)
    assert path.stat().st_size == 2 * OFFSET + MIB
    assert trio.run(contents, opened_again(tmp_path, f"luks:{path}", *options)) == data
    below = opened_again(tmp_path, str(path), f"key-file={other}")
    assert trio.run(contents, below)[:6] == b"LUKS\xba\xbe"
    found = run("info", f"luks:luks:{path}", "-o", f"lower.key-file={other}", "--json")
    assert json.loads(found.stdout)["sector size"] == 4096


@pytest.mark.parametrize("below", ["qcow2", "zstd"])
def test_on_an_image(tmp_path: Path, below: str, cheap: None) -> None:
    config = f"{below}:{tmp_path / 'image'}"
    data = filled(tmp_path, config, "iter-time=1", "lower.cluster-size=16K")
    assert trio.run(contents, opened_again(tmp_path, config)) == data
    assert (tmp_path / "image").read_bytes()[:4] == b"QFI\xfb"
    found = json.loads(run("info", f"luks:{config}", "--json").stdout)
    assert (found["data offset"], found["data size"]) == (OFFSET, MIB)


def test_a_file_that_is_named_like_a_handler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cheap: None) -> None:
    monkeypatch.chdir(tmp_path)
    filled(tmp_path, "./ram:x", "iter-time=1")
    assert (tmp_path / "ram:x").exists()
    assert "version: 2" in run("info", "luks:./ram:x").stdout
    assert "'ram:x' is a file, and could be the handler 'ram': write ./ram:x" in run("info", "luks:ram:x").stderr
    assert "version: 2" in run("info", f"luks:{tmp_path}/ram:x").stdout
    assert "unknown:x: there is no such file" in run("info", "luks:unknown:x").stderr


@pytest.mark.parametrize("broken", ["write", "create"])
def test_create_that_fails_leaves_neither_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    make_cheap(monkeypatch)
    path, header, key_file = tmp_path / "x.luks", tmp_path / "header", tmp_path / "key"
    key_file.write_bytes(b"x")
    if broken == "write":
        monkeypatch.setattr(FileHandler, "write", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")))
    else:
        header = tmp_path / "no" / "header"
    result = run("create", f"luks:{path}", "--size", "1M", "-o", f"key-file={key_file}", "-o", f"header={header}")
    assert result.exit_code == 1 and ("full" in result.stderr or "No such file" in result.stderr)
    assert list(tmp_path.iterdir()) == [key_file]


def test_a_container_that_was_made_opens_without_its_passphrase(tmp_path: Path, cheap: None) -> None:
    path, key_file = tmp_path / "x.luks", tmp_path / "key"
    key_file.write_bytes(b"k")
    options = Options(size=MIB, create=True, extra={"key-file": str(key_file), "iter-time": "1"})

    async def exercise() -> None:
        handler = await LuksHandler.create(str(path), options)
        key_file.unlink()
        for block in (b"x" * 4096, b"y" * 4096):
            async with handler:
                await handler.write(0, IoVec([block]))
        unused = await LuksHandler.create(str(tmp_path / "y"), replace(options, extra={"credential": "k"}))
        # It is another container now: the key is not taken for it.
        path.replace(tmp_path / "y")
        with pytest.raises(LuksError, match="not the container that was made"):
            await unused.open()

    (tmp_path / "k").write_bytes(b"k")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
        trio.run(exercise)


def test_a_daemon_asks_nobody_and_takes_no_descriptor(tmp_path: Path) -> None:
    path = tmp_path / "x.luks"
    path.write_bytes(bytes(4096))
    with pytest.raises(ValueError, match="needs a passphrase: option key-file=PATH or credential=NAME"):
        LuksHandler.from_config(str(path), Options())
    with pytest.raises(ValueError, match="a passphrase-fd is for commands"):
        LuksHandler.from_config(str(path), Options(extra={"passphrase-fd": "0"}))


def test_short_options_mean_the_long_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, str]] = []

    def from_config(config: str, options: Options) -> LuksHandler:
        seen.append(dict(options.extra))
        raise ValueError("seen")

    monkeypatch.setattr(LuksHandler, "from_config", from_config)
    attach = ["attach", f"luks:{tmp_path}/x"]
    assert run(*attach, "--key-file", "k", "--allow-discards").exit_code == 1
    assert run(*attach, "--passphrase-fd", "7").exit_code == 1
    assert seen == [{"key-file": "k", "allow-discards": "on"}, {"passphrase-fd": "7"}]
    assert "-o key-file is given twice" in run(*attach, "--key-file", "k", "-o", "key-file=l").stderr
    assert "knows no option key-file" in run("attach", "file:x", "--key-file", "k").stderr


def test_create_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_cheap(monkeypatch)
    path, key_file = tmp_path / "x.luks", tmp_path / "key"
    key_file.write_bytes(b"x")
    arguments = ["create", f"luks:{path}", "-o", f"key-file={key_file}", "-o", "iter-time=1"]
    assert "not a whole number of encryption sectors" in run(*arguments, "--size", "4097").stderr
    assert "exclude each other" in run(*arguments, "--size", "1M", "-o", "credential=x").stderr
    assert "sectors of 8192" in run(*arguments, "--size", "1M", "-o", "sector-size=8192").stderr
    assert "knows no option what" in run(*arguments, "--size", "1M", "-o", "what=1").stderr
    monkeypatch.setattr(FileHandler, "write", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full")))
    assert "full" in run(*arguments, "--size", "1M").stderr
    assert not path.exists()


async def test_where_passphrases_come_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, key_file = tmp_path / "x.luks", tmp_path / "key"
    path.write_bytes(_written())
    key_file.write_bytes(PASSPHRASE)
    async with attached(str(path), key_file=str(key_file)):
        pass
    for text in (PASSPHRASE, PASSPHRASE + b"\n", PASSPHRASE + b"\nmore"):
        read, write = os.pipe()
        os.write(write, text)
        os.close(write)
        async with attached(str(path), passphrase_fd=str(read)):
            pass
        with pytest.raises(OSError, match="Bad file"):
            os.fstat(read)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    async with attached(str(path), credential="key"):
        pass
    with pytest.raises(ValueError, match="no name of a credential"):
        await attached(str(path), credential="../key").open()
    monkeypatch.setattr("sys.stdin", type("Terminal", (), {"isatty": lambda self: True})())
    monkeypatch.setattr("getpass.getpass", lambda _: PASSPHRASE.decode())
    async with attached(str(path)):
        pass
    # What a wrong one has locked is open again.
    key_file.write_bytes(PASSPHRASE + b"\n")
    with pytest.raises(WrongPassphraseError):
        await attached(str(path), key_file=str(key_file)).open()
    async with attached(str(path)):
        with pytest.raises(BlockingIOError, match="in use"):
            await attached(str(path)).open()


def test_a_new_passphrase_is_asked_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["one", "two", "", "", "same", "same"])
    monkeypatch.setattr("getpass.getpass", lambda _: next(answers))
    with pytest.raises(ValueError, match="differ"):
        keys.prompt("x", twice=True)
    with pytest.raises(ValueError, match="empty"):
        keys.prompt("x", twice=True)
    assert keys.prompt("x", twice=True) == b"same"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["attach", "luks:"], "luks needs a path"),
        (["attach", "luks:/no/such/file", "-o", "key-file=x"], "/no/such/file: No such file"),
        (["attach", "luks:/dev/null"], "needs a passphrase: -o key-file=PATH"),
        (["attach", "luks:/dev/null", "-o", "passphrase-fd=x"], "number of an open descriptor"),
        (["attach", "luks:/dev/null", "-o", "allow-discards=1"], "it is on or off"),
        (["attach", "luks:/x", "--create", "--size", "1M"], "make the container first"),
        (["info", "luks:/dev/null"], "neither a regular file"),
        (["create", "luks:x", "--size", "1M", "--block-size", "512"], "choose -o sector-size"),
        (["create", "luks:x", "--size", "1M", "-o", "iter-time=0"], "positive number"),
        (["create", "luks:x", "--size", "1M", "-o", "key-size=257"], "number of bits, 256 or 512"),
    ],
)
def test_what_the_command_line_refuses(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert said in result.stderr
    assert result.exit_code == 1


def test_keys_that_are_none(tmp_path: Path) -> None:
    empty, large = tmp_path / "empty", tmp_path / "large"
    empty.touch()
    with large.open("wb") as file:
        file.truncate(9 * MIB)
    with pytest.raises(ValueError, match="empty"):
        keys.from_file(empty)
    with pytest.raises(ValueError, match="more than"):
        keys.from_file(large)
