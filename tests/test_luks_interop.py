"""LUKS against the programs of others: cryptsetup and QEMU, both ways, without root's device mapper.

`cryptsetup reencrypt` encrypts and decrypts data in its own process if it may not use the kernel: that is the oracle
for LUKS2. For LUKS1 it is qemu-io. dm-crypt itself judges in tests/guest/test_luks.py.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio
from cryptography.hazmat.primitives.kdf import argon2

from tcmu_rs import IoVec, Options
from tcmu_rs.handlers.file import FileHandler
from tcmu_rs.handlers.luks import LuksError, LuksHandler, WrongPassphraseError, format_luks, kdf

from .luks import CHEAP, OFFSET, make_cheap

MIB = 1 << 20
KEY = b"\x00binary\nkey\xff"
FAST = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]


def needs(program: str, package: str) -> pytest.MarkDecorator:
    """Skips without a program of others, and fails where nothing may be missing."""
    missing = shutil.which(program, path=f"{os.environ['PATH']}:/sbin:/usr/sbin") is None
    if missing and os.environ.get("CI") == "true":
        return pytest.mark.usefixtures("not_installed")
    return pytest.mark.skipif(missing, reason=f"{program} is not installed (apt-get install {package})")


@pytest.fixture
def not_installed() -> None:
    pytest.fail("a program of others is not installed (apt-get install cryptsetup-bin qemu-utils)")


cryptsetup_tests = needs("cryptsetup", "cryptsetup-bin")
qemu_tests = needs("qemu-io", "qemu-utils")


def run(*command: str | Path, code: int = 0, text: bytes | None = None) -> str:
    path = f"{os.environ['PATH']}:/sbin:/usr/sbin"
    result = subprocess.run(
        [str(word) for word in command], capture_output=True, env={**os.environ, "PATH": path}, input=text, check=False
    )
    assert result.returncode == code, result.stderr.decode()
    return result.stdout.decode(errors="replace")


def cryptsetup(*arguments: str | Path, code: int = 0) -> str:
    return run("cryptsetup", "-q", *arguments, code=code)


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory where `nobody` may work too."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o777)
        yield Path(name)


@pytest.fixture
def key_file(shared: Path) -> Path:
    path = shared / "key"
    path.write_bytes(KEY)
    return path


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    make_cheap(monkeypatch)


@pytest.fixture
def plain() -> bytes:
    return random.Random(7).randbytes(4 * MIB)


def reencrypt(shared: Path, *arguments: str | Path) -> None:
    """`cryptsetup reencrypt` as nobody: as root it would insist on the kernel."""
    if os.geteuid() != 0:
        pytest.skip("root is needed to become nobody in a mount namespace of its own")
    for path in shared.iterdir():
        path.chmod(0o666)
    script = (
        "mount -t tmpfs tmpfs /run && mkdir -m 777 /run/cryptsetup && "
        'cd "$0" && exec setpriv --reuid 65534 --clear-groups cryptsetup -q reencrypt "$@"'
    )
    try:
        run("unshare", "--mount", "true")
    except AssertionError:
        pytest.skip("mount namespaces are not allowed here")
    run("unshare", "--mount", "sh", "-c", script, shared, *arguments)


async def contents(path: Path, *, key: bytes = KEY, **arguments: Any) -> bytes:
    async with LuksHandler(FileHandler(path, read_only=True), lambda _: key, read_only=True, **arguments) as disk:
        data = bytearray(disk.size)
        await disk.read(0, IoVec([data]))
        return bytes(data)


# Theirs, read by us.

ARGON2I = pytest.param(
    ["--pbkdf", "argon2i", "--pbkdf-memory", "1024", "--pbkdf-force-iterations", "4"],
    marks=pytest.mark.skipif(not hasattr(argon2, "Argon2i"), reason="this version of cryptography has no argon2i"),
    id="argon2i",
)


@cryptsetup_tests
@pytest.mark.parametrize(
    "derivation",
    [
        pytest.param(
            ["--pbkdf", "argon2id", "--pbkdf-memory", "65536", "--pbkdf-force-iterations", "4"], id="argon2id"
        ),
        ARGON2I,
        pytest.param(FAST, id="pbkdf2"),
        pytest.param([*FAST, "--hash", "sha512"], id="pbkdf2-sha512"),
        pytest.param([*FAST, "--hash", "sha1"], id="pbkdf2-sha1"),
        pytest.param([*FAST, "--luks2-metadata-size", "64k", "--luks2-keyslots-size", "2m"], id="other sizes"),
        pytest.param([*FAST, "--key-size", "256"], id="128-bit AES"),
        pytest.param([*FAST, "--label", "a label", "--subsystem", "x"], id="label"),
        pytest.param([*FAST, "--type", "luks1", "--hash", "sha1"], id="LUKS1 sha1"),
        pytest.param([*FAST, "--type", "luks1", "--hash", "sha512", "--key-size", "256"], id="LUKS1 sha512"),
    ],
)
async def test_what_cryptsetup_formats_opens(shared: Path, key_file: Path, derivation: list[str]) -> None:
    path = shared / "disk"
    with path.open("wb") as file:
        file.truncate(32 * MIB)
    cryptsetup("luksFormat", "--type", "luks2", *derivation, path, key_file)
    before = path.read_bytes()
    async with LuksHandler(FileHandler(path), lambda _: KEY) as disk:
        assert 0 < disk.size < 32 * MIB
    with pytest.raises(WrongPassphraseError):
        await LuksHandler(FileHandler(path), lambda _: KEY[:-1]).open()
    found = await LuksHandler.info(str(path), Options())
    assert found["uuid"] == cryptsetup("luksUUID", path).strip()
    assert path.read_bytes() == before


@cryptsetup_tests
@pytest.mark.parametrize("sector_size", [512, 1024, 2048, 4096])
@pytest.mark.parametrize("cipher", ["aes-xts-plain64 256", "aes-xts-plain64 512", "aes-cbc-essiv:sha256 256"])
async def test_what_cryptsetup_encrypts_is_read(
    shared: Path, key_file: Path, plain: bytes, sector_size: int, cipher: str
) -> None:
    path = shared / "disk"
    path.write_bytes(plain + bytes(32 * MIB))
    name, bits = cipher.split()
    options = ["--sector-size", str(sector_size), "--cipher", name, "--key-size", bits, *FAST]
    size = ["--reduce-device-size", "32M"]
    reencrypt(shared, "--encrypt", "--type", "luks2", *size, *options, "--key-file", key_file, path)
    assert (await contents(path))[: len(plain)] == plain
    if name.startswith("aes-cbc"):
        with pytest.raises(LuksError, match="only read"):
            await LuksHandler(FileHandler(path), lambda _: KEY).open()


@cryptsetup_tests
async def test_a_detached_header_of_cryptsetup(shared: Path, key_file: Path, plain: bytes) -> None:
    path, header = shared / "disk", shared / "header"
    path.write_bytes(plain)
    with header.open("wb") as file:
        file.truncate(16 * MIB)
    options = ["--encrypt", "--type", "luks2", "--sector-size", "4096", *FAST]
    reencrypt(shared, *options, "--header", header, "--key-file", key_file, path)
    assert path.read_bytes() != plain
    assert await contents(path, header=FileHandler(header, read_only=True)) == plain


@cryptsetup_tests
async def test_keyslots_are_the_business_of_cryptsetup(shared: Path, key_file: Path) -> None:
    path, other, third = shared / "disk", shared / "other", shared / "third"
    other.write_bytes(b"another")
    third.write_bytes(b"a third")
    extra = {"key-file": str(key_file), "iter-time": "1"}
    await LuksHandler.create(str(path), Options(size=MIB, create=True, extra=extra))
    async with LuksHandler(FileHandler(path), lambda _: KEY) as disk:
        await disk.write(0, IoVec([b"x" * MIB]))
    await trio.to_thread.run_sync(
        lambda: [
            cryptsetup("luksAddKey", *FAST, "--key-file", key_file, path, other),
            cryptsetup("luksAddKey", *FAST, "--unbound", "--key-size", "256", "--key-file", other, path, third),
            cryptsetup("config", "--priority", "ignore", "--key-slot", "0", path),
        ]
    )
    assert await contents(path, key=b"another") == b"x" * MIB
    # A keyslot that cryptsetup is told to ignore is ignored here; one of another key is none of this volume's.
    for passphrase in (KEY, b"a third"):
        with pytest.raises(WrongPassphraseError):
            await contents(path, key=passphrase)
    backup = shared / "backup"
    cryptsetup("luksHeaderBackup", path, "--header-backup-file", backup)
    cryptsetup("luksKillSlot", "--key-file", other, path, "0")
    cryptsetup("luksChangeKey", *FAST, "--key-file", other, path, third)
    assert await contents(path, key=b"a third") == b"x" * MIB
    with pytest.raises(WrongPassphraseError):
        await contents(path, key=b"another")
    cryptsetup("luksHeaderRestore", path, "--header-backup-file", backup)
    assert await contents(path, key=b"another") == b"x" * MIB
    assert (await LuksHandler.check(str(path), Options()))["ok"]


# Ours, read by others.


@cryptsetup_tests
@pytest.mark.parametrize("sector_size", [512, 1024, 2048, 4096])
@pytest.mark.parametrize("key_size", [32, 64])
async def test_what_we_write_cryptsetup_decrypts(
    shared: Path, key_file: Path, plain: bytes, sector_size: int, key_size: int
) -> None:
    path = shared / "disk"
    with path.open("wb") as file:
        file.truncate(OFFSET + len(plain))
    await format_luks(FileHandler(path), [b"other", KEY], kdf=CHEAP, sector_size=sector_size, key_size=key_size)
    async with LuksHandler(FileHandler(path), lambda _: KEY) as disk:
        await disk.write(0, IoVec([plain]))
        await disk.flush()
    dump = cryptsetup("luksDump", path)
    assert f"sector: {sector_size} [bytes]" in dump and f"Key:        {key_size * 8} bits" in dump
    cryptsetup("open", "--test-passphrase", "--key-file", key_file, path)
    reencrypt(
        shared, "--decrypt", "--force-offline-reencrypt", "--key-file", key_file, "--header", shared / "header", path
    )
    assert path.read_bytes()[: len(plain)] == plain


@cryptsetup_tests
async def test_argon2id_of_ours(shared: Path, key_file: Path) -> None:
    path = shared / "disk"
    with path.open("wb") as file:
        file.truncate(OFFSET + MIB)
    derivation = kdf.Argon2("argon2id", 4, 65536, 4, b"replaced")
    await format_luks(FileHandler(path), [KEY], kdf=derivation, label="ours")
    cryptsetup("open", "--test-passphrase", "--key-file", key_file, path)
    wrong = shared / "wrong"
    wrong.write_bytes(b"wrong")
    cryptsetup("open", "--test-passphrase", "--key-file", wrong, path, code=2)
    assert "Label:         \tours" in cryptsetup("luksDump", path)


@cryptsetup_tests
async def test_a_repaired_header_is_good_for_cryptsetup(shared: Path, key_file: Path) -> None:
    path = shared / "disk"
    with path.open("wb") as file:
        file.truncate(OFFSET + MIB)
    await format_luks(FileHandler(path), [KEY], kdf=CHEAP)
    for at in (0, 16384):
        with path.open("r+b") as file:
            file.seek(at)
            file.write(bytes(4096))
        assert (await LuksHandler.check(str(path), Options(), repair=True))["repaired"]
        before = path.read_bytes()
        cryptsetup("open", "--test-passphrase", "--key-file", key_file, path)
        cryptsetup("luksDump", path)
        # It found nothing to recover.
        assert path.read_bytes() == before


@cryptsetup_tests
@pytest.mark.parametrize("options", [["version=1"], ["version=1", "key-size=256"], []])
@pytest.mark.parametrize("detached", [False, True])
async def test_what_create_makes_is_good_for_cryptsetup(
    shared: Path, key_file: Path, options: list[str], detached: bool, cheap: None
) -> None:
    path, header, other = shared / "disk", shared / "header", shared / "other"
    other.write_bytes(b"other")
    extra = {"key-file": str(key_file), "key-file-2": str(other), "iter-time": "1"}
    extra |= dict(option.split("=", 1) for option in options) | ({"header": str(header)} if detached else {})
    await LuksHandler.create(str(path), Options(size=MIB, create=True, extra=extra))
    where = header if detached else path
    for key in (key_file, other):
        cryptsetup("open", "--test-passphrase", "--key-file", key, where)
    dump = cryptsetup("luksDump", where)
    assert ("Version:       \t1" in dump) is ("version=1" in options)
    assert f"{extra.get('key-size', 512)}" in dump
    # It goes on with what we have made: the other keyslots are where it expects them.
    cryptsetup("luksAddKey", *FAST, "--key-file", key_file, where, key_file)
    cryptsetup("luksKillSlot", "--key-file", other, where, "0")
    data = bytearray(MIB)
    above = FileHandler(header, read_only=True) if detached else None
    async with LuksHandler(FileHandler(path), lambda _: KEY, header=above) as disk:
        assert disk.size == MIB
        await disk.read(0, IoVec([data]))


# Conversion.


def tcmu_rs(*arguments: str) -> str:
    return run(sys.executable, "-m", "tcmu_rs", *arguments)


@cryptsetup_tests
def test_a_copy_encrypts_what_cryptsetup_decrypts(shared: Path, key_file: Path, plain: bytes) -> None:
    raw, path = shared / "raw", shared / "disk"
    raw.write_bytes(plain[:MIB] + bytes(MIB) + plain[2 * MIB :])
    options = "--create", "-o", f"key-file={key_file}", "-o", "iter-time=1", "--verify"
    tcmu_rs("copy", f"file:{raw}", f"luks:{path}", *options)
    reencrypt(
        shared, "--decrypt", "--force-offline-reencrypt", "--key-file", key_file, "--header", shared / "header", path
    )
    assert path.read_bytes()[: len(plain)] == raw.read_bytes()


@cryptsetup_tests
def test_a_copy_decrypts_what_cryptsetup_encrypts(shared: Path, key_file: Path, plain: bytes) -> None:
    raw, path = shared / "raw", shared / "disk"
    path.write_bytes(plain + bytes(32 * MIB))
    options = ["--encrypt", "--type", "luks2", "--reduce-device-size", "32M", "--sector-size", "4096", *FAST]
    reencrypt(shared, *options, "--key-file", key_file, path)
    tcmu_rs("copy", f"luks:{path}", f"file:{raw}", "--create", "-i", f"key-file={key_file}")
    assert raw.read_bytes()[: len(plain)] == plain


@qemu_tests
def test_copies_and_qemu_img_convert_agree(tmp_path: Path, plain: bytes) -> None:
    raw, ours, theirs, back = (tmp_path / name for name in ("raw", "ours", "theirs", "back"))
    secret = tmp_path / "secret"
    secret.write_bytes(b"qemu")
    raw.write_bytes(plain + bytes(MIB))
    objects = ["--object", f"secret,id=s,file={secret}"]

    def image(path: Path) -> str:
        return f"driver=luks,key-secret=s,file.filename={path}"

    options = "-o", "version=1", "-o", f"key-file={secret}", "-o", "iter-time=1"
    tcmu_rs("copy", f"file:{raw}", f"luks:{ours}", "--create", *options)
    run("qemu-img", "convert", *objects, "--image-opts", image(ours), "-O", "raw", back)
    assert back.read_bytes() == raw.read_bytes()
    qemu_img_create(*objects, "-f", "luks", "-o", "key-secret=s,iter-time=10", theirs, str(len(plain) + MIB))
    run("qemu-img", "convert", *objects, "-n", "--target-image-opts", "-f", "raw", raw, image(theirs))
    tcmu_rs("copy", f"luks:{theirs}", f"file:{back}", "-i", f"key-file={secret}")
    assert back.read_bytes() == raw.read_bytes()


# QEMU, which knows LUKS1.


def qemu_img_create(*arguments: str | Path) -> None:
    for _ in range(9):
        with contextlib.suppress(AssertionError):
            # On a busy machine QEMU now and then cannot measure how fast it derives keys, and gives up.
            run("qemu-img", "create", "-q", *arguments)
            return
    run("qemu-img", "create", "-q", *arguments)


@qemu_tests
@pytest.mark.parametrize(
    "options",
    [
        "cipher-alg=aes-256,cipher-mode=xts,ivgen-alg=plain64,hash-alg=sha256",
        "cipher-alg=aes-128,cipher-mode=xts,ivgen-alg=plain64,hash-alg=sha1",
        "cipher-alg=aes-256,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256,hash-alg=sha256",
        "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256,hash-alg=sha512",
    ],
)
async def test_luks1_of_qemu_both_ways(tmp_path: Path, plain: bytes, options: str) -> None:
    path, pattern, secret = tmp_path / "disk", tmp_path / "pattern", tmp_path / "secret"
    secret.write_bytes(b"qemu")
    pattern.write_bytes(plain)
    size = len(plain) + MIB
    objects = ["--object", f"secret,id=s,file={secret}"]
    qemu_img_create("-f", "luks", *objects, "-o", f"key-secret=s,iter-time=10,{options}", path, str(size))
    opts = f"driver=luks,key-secret=s,file.filename={path}"
    run("qemu-io", *objects, "--image-opts", opts, "-c", f"write -s {pattern} 512 {len(plain)}")
    found = await contents(path, key=b"qemu")
    assert len(found) == size
    assert found[512 : 512 + len(plain)] == plain
    if "cbc" in options:
        return
    async with LuksHandler(FileHandler(path), lambda _: b"qemu") as disk:
        assert (disk.block_size, disk.size) == (512, size)
        await disk.write(size - len(plain), IoVec([plain]))
    raw = tmp_path / "raw"
    run("qemu-img", "convert", *objects, "--image-opts", opts, "-O", "raw", raw)
    assert raw.read_bytes() == found[: size - len(plain)] + plain
