"""LUKS against dm-crypt itself: what one of them writes the other reads, under a file system."""

from __future__ import annotations

import functools
import hashlib
import os
import random
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import trio

from tcmu_rs import IoVec, Options, attach
from tcmu_rs.handlers.file import FileHandler
from tcmu_rs.handlers.luks import LuksHandler, format_luks, kdf

from . import test_daemon as daemons

KEY = b"the key\n"
OFFSET = 16 << 20
SIZE = 48 << 20
FAST = ["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"]
T = TypeVar("T")
CHEAP = kdf.Pbkdf2("sha256", 1000, b"replaced")


# Nobody runs udev here: the device mapper's library has to make its nodes by itself.
ENVIRONMENT = {**os.environ, "DM_DISABLE_UDEV": "1"}


def run(*command: str | Path) -> str:
    words = [str(word) for word in command]
    result = subprocess.run(words, capture_output=True, text=True, check=False, env=ENVIRONMENT)
    assert result.returncode == 0, f"{words}: {result.stdout}{result.stderr}"
    return result.stdout


@pytest.fixture
def directory() -> Iterator[Path]:
    run("modprobe", "-a", "loop", "dm_crypt")
    with tempfile.TemporaryDirectory() as name:
        Path(name, "key").write_bytes(KEY)
        yield Path(name)


@contextmanager
def mounted(device: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        run("mount", device, name)
        try:
            yield Path(name)
        finally:
            run("umount", name)


def plant(device: str) -> dict[str, str]:
    """Makes a file system with a tree in it, and returns the checksums."""
    # Blocks of 4096 bytes, which dm-crypt's disk has: smaller ones, as on a small disk of 512, would not mount there.
    run("mkfs.ext4", "-q", "-b", "4096", device)
    source = random.Random(11)
    with mounted(device) as root:
        for number in range(60):
            path = root / f"{number % 7}" / f"{number}"
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(source.randbytes(source.randrange(300_000)))
    return harvest(device)


def harvest(device: str) -> dict[str, str]:
    run("e2fsck", "-f", "-n", device)
    with mounted(device) as root:
        return {
            str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(root.rglob("*"))
            if path.is_file()
        }


@contextmanager
def dm_crypt(path: Path, key: Path, *options: str | Path) -> Iterator[str]:
    """The container, opened by cryptsetup and the kernel."""
    name = f"tcmu-{os.getpid()}"
    run("cryptsetup", "open", "--key-file", key, *options, path, name)
    try:
        yield f"/dev/mapper/{name}"
    finally:
        run("cryptsetup", "close", name)


def sectors(device: str) -> str:
    """Every byte, as read around the page cache."""
    run("blockdev", "--flushbufs", device)
    return hashlib.sha256(Path(device).read_bytes()).hexdigest()


async def in_thread(function: Callable[..., T], *arguments: object) -> T:
    return await trio.to_thread.run_sync(functools.partial(function, *arguments))


@pytest.mark.parametrize(("sector_size", "block_size"), [(4096, None), (4096, 512), (512, None)])
async def test_what_we_write_dm_crypt_reads(directory: Path, sector_size: int, block_size: int | None) -> None:
    path = directory / "disk"
    path.touch()
    os.truncate(path, OFFSET + SIZE)
    await format_luks(FileHandler(path), [KEY], kdf=CHEAP, sector_size=sector_size)
    options = Options(block_size=block_size, extra={"key-file": str(directory / "key")})
    async with attach(LuksHandler.from_config(str(path), options), spec=f"luks:{path}") as device:
        assert device.path is not None and device.size == SIZE
        planted = await in_thread(plant, device.path)
        expected = await in_thread(sectors, device.path)
    assert planted

    def judge() -> None:
        with dm_crypt(path, directory / "key") as theirs:
            assert sectors(theirs) == expected
            assert harvest(theirs) == planted

    await in_thread(judge)


@pytest.mark.parametrize(
    "options",
    [
        ["--type", "luks2", "--sector-size", "4096"],
        ["--type", "luks2", "--sector-size", "512", "--key-size", "256"],
        ["--type", "luks2", "--sector-size", "2048"],
        ["--type", "luks1"],
    ],
)
async def test_what_dm_crypt_writes_we_read(directory: Path, options: list[str]) -> None:
    path = directory / "disk"
    path.touch()
    os.truncate(path, OFFSET + SIZE)

    def make() -> tuple[dict[str, str], str]:
        run("cryptsetup", "luksFormat", "-q", *options, *FAST, path, directory / "key")
        with dm_crypt(path, directory / "key") as theirs:
            return plant(theirs), sectors(theirs)

    planted, expected = await in_thread(make)
    handler = LuksHandler(FileHandler(path), lambda _: KEY)
    async with attach(handler, spec=f"luks:{path}") as device:
        assert device.path is not None
        assert await in_thread(sectors, device.path) == expected
        assert await in_thread(harvest, device.path) == planted


async def test_aes_cbc_essiv_of_dm_crypt_is_read(directory: Path) -> None:
    path = directory / "disk"
    path.touch()
    os.truncate(path, OFFSET + SIZE)
    options = ["--type", "luks1", "--cipher", "aes-cbc-essiv:sha256", "--key-size", "256"]

    def make() -> tuple[dict[str, str], str]:
        run("cryptsetup", "luksFormat", "-q", *options, *FAST, path, directory / "key")
        with dm_crypt(path, directory / "key") as theirs:
            return plant(theirs), sectors(theirs)

    _, expected = await in_thread(make)
    handler = LuksHandler(FileHandler(path, read_only=True), lambda _: KEY, read_only=True)
    async with attach(handler, spec=f"luks:{path}") as device:
        assert device.path is not None
        assert await in_thread(sectors, device.path) == expected


async def test_a_detached_header_of_ours_is_good_for_dm_crypt(directory: Path) -> None:
    path, header = directory / "disk", directory / "header"
    extra = {"key-file": str(directory / "key"), "header": str(header), "iter-time": "1"}
    data = random.Random(5).randbytes(8 << 20)
    async with await LuksHandler.create(str(path), Options(size=len(data), create=True, extra=extra)) as disk:
        await disk.write(0, IoVec([data]))

    def judge() -> None:
        with dm_crypt(path, directory / "key", "--header", header) as theirs:
            assert sectors(theirs) == hashlib.sha256(data).hexdigest()

    await in_thread(judge)


@pytest.mark.parametrize("option", ["key-file", "credential"])
def test_a_daemon_finds_the_key_by_the_configuration(
    directory: Path, option: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Made by another program, with nothing in configfs but where the key is."""
    path = directory / "disk"
    path.touch()
    os.truncate(path, OFFSET + daemons.SIZE)
    trio.run(functools.partial(format_luks, FileHandler(path), [KEY], kdf=CHEAP))
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(directory))
    where = directory / "key" if option == "key-file" else "key"
    config = f"luks/{path};{option}={where}"
    with daemons.daemon("luks"), daemons.backstore("luks", config) as store, daemons.disk(store) as device:
        daemons.write(device, b"through the daemon")
    with dm_crypt(path, directory / "key") as theirs, open(theirs, "rb") as file:  # noqa: PTH123
        file.seek(1 << 20)
        assert file.read(18) == b"through the daemon"


def test_xts_has_no_keys_of_128_bits(directory: Path) -> None:
    """What FORMAT.md says of them: cryptsetup refuses, for half of them is no AES key."""
    path = directory / "disk"
    path.touch()
    os.truncate(path, OFFSET + SIZE)
    words = ["cryptsetup", "luksFormat", "-q", "--key-size", "128", "--cipher", "aes-xts-plain64", *FAST]
    result = subprocess.run([*words, path, directory / "key"], capture_output=True, text=True, env=ENVIRONMENT)
    assert result.returncode != 0
    assert "Key size in XTS mode must be 256 or 512 bits" in result.stderr
