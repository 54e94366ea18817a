"""LUKS in qcow2: images that QEMU made and ours, read and written by both, and what a thief finds in the file."""

from __future__ import annotations

import random
import shutil
import subprocess
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from click.testing import CliRunner

from tcmu_rs import BlockHandler, IoVec, Options
from tcmu_rs._cli import main
from tcmu_rs.handlers.luks import LuksError, WrongPassphraseError
from tcmu_rs.handlers.qcow2 import Qcow2Error, Qcow2Handler, ZstdHandler, create
from tcmu_rs.handlers.qcow2.encryption import make_encryption
from tcmu_rs.testing import check_block_handler
from tcmu_rs.testing.crash import Image, Medium, check_power_cuts

from . import qcow2
from .luks import CHEAP, PASSPHRASE, key
from .test_qcow2 import contents, qemu, work

MIB = 1 << 20
SECRET = ("--object", f"secret,id=key,data={PASSPHRASE.decode()}", "--image-opts")

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-utils is not installed")


def named(path: Path, below: str = "") -> str:
    """An encrypted image, for QEMU's tools after `SECRET`."""
    return f"driver=qcow2,file.filename={path},encrypt.key-secret=key{below}"


def make(path: Path, size: int | None = 2 * MIB, **arguments: Any) -> None:
    create(path, size, encryption=make_encryption([PASSPHRASE], kdf=CHEAP), **arguments)


def make_by_qemu(path: Path, *options: str) -> None:
    """QEMU measures how fast it is, and fails now and then on a busy machine."""
    text = ",".join(["encrypt.format=luks", "encrypt.key-secret=key", "encrypt.iter-time=10", *options])
    command = ["qemu-img", "create", "-q", *SECRET[:2], "-f", "qcow2", "-o", text, str(path), str(2 * MIB)]
    for _ in range(5):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if "CPU usage" not in done.stderr:
            break
    assert done.returncode == 0, done.stderr


def raw(path: Path) -> bytes:
    """What QEMU reads; `qemu-img check` finds nothing."""
    qemu("qemu-img", "check", "-q", *SECRET, named(path))
    out = path.with_suffix(".raw")
    qemu("qemu-img", "convert", *SECRET, "-O", "raw", named(path), out)
    return out.read_bytes()


def qemu_writes(path: Path, rng: random.Random, model: bytearray) -> None:
    for _ in range(4):
        offset = rng.randrange(0, len(model) - 65536, 512)
        length, fill = rng.randrange(512, 65536, 512), rng.randrange(1, 255)
        qemu("qemu-io", *SECRET, "-c", f"write -P {fill} {offset} {length}", named(path))
        model[offset : offset + length] = bytes([fill]) * length


async def test_what_qemu_encrypted_is_read_and_written(tmp_path: Path) -> None:
    rng = random.Random(1)
    path = tmp_path / "disk.qcow2"
    make_by_qemu(path, "cluster_size=16k", "extended_l2=on", "encrypt.hash-alg=sha512")
    model = bytearray(2 * MIB)
    for _ in range(2):
        qemu_writes(path, rng, model)
        await work(path, rng, model, 20, key_provider=key)
        assert raw(path) == model


@pytest.mark.parametrize("seed", range(4))
async def test_what_we_encrypted_qemu_reads(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path / "disk.qcow2"
    make(path, cluster_size=[512, 4096, 65536, 2 * MIB][seed], refcount_bits=rng.choice([1, 16, 64]))
    model = bytearray(2 * MIB)
    for _ in range(2):
        await work(path, rng, model, 20, key_provider=key)
        assert raw(path) == model
        qemu_writes(path, rng, model)
    assert await contents(path, key_provider=key) == model


async def test_obligations(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    make(path)
    await check_block_handler(lambda: Qcow2Handler(path, key_provider=key), persistent=True)
    raw(path)


async def test_a_thief_finds_nothing_in_the_log_either(tmp_path: Path) -> None:
    path, left = tmp_path / "disk.qcow2", tmp_path / "left.qcow2"
    make(path)
    secret = b"nobody may read this" * 8192
    async with Qcow2Handler(path, key_provider=key, idle=None) as disk:
        await disk.write(4096, IoVec([secret[:65536]]))
        await disk.write(512 * 1001, IoVec([secret[:512]]))
        await disk.flush()
        assert disk.statistics()["dirty_bytes"]
        shutil.copy(path, left)
    for file in (path, left):
        data = file.read_bytes()
        assert b"nobody" not in data
    assert (await Qcow2Handler.info(str(left), Options()))["features"] == "log"
    with pytest.raises(Qcow2Error, match="key-file"):
        await Qcow2Handler.check(str(left), Options(), repair=True)
    found = await contents(left, key_provider=key)
    assert found[4096:69632] == secret[:65536] and found[512512:513024] == secret[:512]
    async with Qcow2Handler(left, key_provider=key):
        pass
    assert raw(left) == found == raw(path)


async def test_keys_that_are_wrong_missing_or_not_needed(tmp_path: Path) -> None:
    path, plain = tmp_path / "disk.qcow2", tmp_path / "plain.qcow2"
    make(path)
    create(plain, MIB)

    async def asked(uuid: str) -> bytes:
        assert len(uuid) == 36
        return b"wrong"

    with pytest.raises(WrongPassphraseError):
        await contents(path, key_provider=asked)
    with pytest.raises(Qcow2Error, match=r"is encrypted: say where .*key-file"):
        await contents(path)
    with pytest.raises(Qcow2Error, match="is not encrypted"):
        await contents(plain, key_provider=key)
    with pytest.raises(Qcow2Error, match=r"compressed clusters would not be: use qcow2:PATH"):
        async with ZstdHandler(path, key_provider=key):
            pass
    found = await Qcow2Handler.info(str(path), Options())
    assert found["encryption"]["cipher"] == "aes-xts-plain64"
    assert (await Qcow2Handler.check(str(path), Options()))["ok"]
    data = bytearray(path.read_bytes())
    data[data.index(b"LUKS\xba\xbe") + 8] ^= 1
    path.write_bytes(data)
    with pytest.raises(LuksError, match="cipher"):
        await contents(path, key_provider=key)


async def test_the_old_encryption_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path, new = tmp_path / "disk.qcow2", tmp_path / "new.qcow2"
    (tmp_path / "secret").write_bytes(PASSPHRASE)
    options = "encrypt.format=aes,encrypt.key-secret=key"
    qemu("qemu-img", "create", "-q", *SECRET[:2], "-f", "qcow2", "-o", options, path, MIB)
    qemu("qemu-io", *SECRET, "-c", "write -P 7 0 64k", named(path))
    with pytest.raises(Qcow2Error, match="old AES encryption") as caught:
        await contents(path, key_provider=key)
    command = str(caught.value).split("`")[1]
    for word, file in (("PASSPHRASE", tmp_path / "secret"), ("IMAGE", path), ("NEW", new)):
        command = command.replace(word, str(file))
    qemu(*command.split())
    assert (await contents(new))[:65536] == b"\7" * 65536


async def test_compressed_clusters_are_not_encrypted(tmp_path: Path) -> None:
    """QEMU's too, which it makes only if told so by `qemu-io`."""
    path = tmp_path / "disk.qcow2"
    make(path, cluster_size=65536)
    qemu("qemu-io", *SECRET, "-c", "write -c -P 8 0 64k", "-c", "write -P 9 64k 64k", named(path))
    found = await contents(path, key_provider=key)
    assert found[:131072] == b"\x08" * 65536 + b"\x09" * 65536


async def test_snapshots_sizes_and_what_is_below(tmp_path: Path) -> None:
    base, path = tmp_path / "base.qcow2", tmp_path / "disk.qcow2"
    make(base, cluster_size=65536)
    async with Qcow2Handler(base, key_provider=key) as disk:
        await disk.write(0, IoVec([b"below" * 4096 * 5]))
    before = base.read_bytes()
    make(path, None, cluster_size=4096, backing=base.name)
    (tmp_path / "key").write_bytes(PASSPHRASE)
    options = Options(extra={"key-file": str(tmp_path / "key")})
    async with Qcow2Handler.from_config(str(path), options) as disk:
        await disk.write(512, IoVec([b"above" * 1024]))
    await Qcow2Handler.snapshot(str(path), Options(), action="create", name="one")
    # The last cluster stays, in part.
    with pytest.raises(Qcow2Error, match="is encrypted"):
        await Qcow2Handler.resize(str(path), Options(), size=MIB + 512, shrink=True)
    await Qcow2Handler.resize(str(path), options, size=MIB + 512, shrink=True)
    expected = bytearray((b"below" * 4096 * 5).ljust(2 * MIB, b"\0"))
    expected[512 : 512 + 5120] = b"above" * 1024
    assert await contents(path, key_provider=key) == expected[: MIB + 512]
    assert await contents(path, key_provider=key, snapshot="one") == expected
    with pytest.raises(Qcow2Error, match="is encrypted: copy it"):
        await Qcow2Handler.compact(str(path), options)
    assert base.read_bytes() == before
    below = ",backing.driver=qcow2,backing.encrypt.key-secret=key"
    out = tmp_path / "out"
    qemu("qemu-img", "convert", *SECRET, "-O", "raw", named(path, below), out)
    assert out.read_bytes() == expected[: MIB + 512]


def test_the_command_makes_one(tmp_path: Path) -> None:
    path, key_file = tmp_path / "disk.qcow2", tmp_path / "key"
    key_file.write_bytes(PASSPHRASE)

    def run(*words: str) -> str:
        result = CliRunner().invoke(main, [*words], standalone_mode=False)
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output

    how = ("-o", "encrypt=on", "-o", f"key-file={key_file}", "-o", "iter-time=1")
    run("create", f"qcow2:{path}", "--size", "1M", *how)
    assert "aes-xts-plain64" in run("info", f"qcow2:{path}")
    source = tmp_path / "source"
    source.write_bytes(random.Random(1).randbytes(MIB))
    run("copy", f"file:{source}", f"qcow2:{path}", "-o", f"key-file={key_file}", "--verify")
    assert raw(path) == source.read_bytes()
    result = CliRunner().invoke(main, ["create", f"zstd:{tmp_path}/x", "--size", "1M", *how])
    assert result.exit_code and "qcow2:PATH" in result.output
    assert not Path(tmp_path, "x").exists()


async def test_power_cuts(tmp_path: Path) -> None:
    path = tmp_path / "image"
    make(path, 256 << 10, cluster_size=4096)

    def serve(medium: Medium) -> AbstractContextManager[BlockHandler]:
        return qcow2.on_medium(medium, key_provider=key, log_size=192 << 10, cache_size=64 << 10, idle=0.002)

    def judge(image: Image) -> None:
        with TemporaryDirectory() as directory:
            closed = Path(directory, "image")
            image.save(closed)
            qemu("qemu-img", "check", "-q", *SECRET, named(closed))

    await check_power_cuts(serve, Image.load(path), lives=2, cuts=6, operations=60, spared={0}, judge=judge)
