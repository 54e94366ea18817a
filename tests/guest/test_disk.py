"""Disks of several kinds in the use that disks are for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from .disks import MAKE_FILE_SYSTEM, MIB, Disk, attached, mounted, run, use

pytestmark = pytest.mark.guest(timeout=600)


@pytest.fixture(scope="module")
def ext4_directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file system on a loop device: unlike a tmpfs it has O_DIRECT, and zeroes ranges by itself."""
    image = tmp_path_factory.mktemp("ext4") / "image"
    directory = tmp_path_factory.mktemp("mounted")
    with image.open("wb") as file:
        file.truncate(600 * MIB)
    run("mkfs.ext4", "-q", image)
    run("modprobe", "loop")
    with mounted(str(image), directory, "-o", "loop"):
        yield directory


@pytest.fixture(scope="module", params=["ram", "file", "file, direct, blocks of 4096"])
def disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    if request.param == "ram":
        spec, options = "ram:", []
    elif request.param == "file":
        spec, options = f"file:{tmp_path_factory.mktemp('file')}/disk.img", ["--create"]
    else:
        spec = f"file:{request.getfixturevalue('ext4_directory')}/disk.img"
        options = ["--create", "--block-size", "4096", "-o", "direct=on"]
    with attached(spec, "--size", "512M", *options) as disk:
        yield disk


@pytest.mark.parametrize("kind", MAKE_FILE_SYSTEM)
def test_a_real_tree_in_a_file_system(disk: Disk, kind: str, tmp_path: Path) -> None:
    use(disk.path, kind, tmp_path)


def test_fio_reads_what_it_wrote(disk: Disk) -> None:
    run(
        *("fio", "--name=mixed", f"--filename={disk.path}", "--direct=1", "--ioengine=libaio", "--iodepth=32"),
        *("--rw=randwrite", f"--bsrange={disk.block_size}-256k", "--size=128M", "--io_size=32M", "--randseed=1"),
        *("--verify=crc32c", "--verify_fatal=1", "--verify_state_save=0"),
    )


def test_large_direct_transfers(disk: Disk) -> None:
    """Larger than what the kernel asks for in one command, and from a block that is no multiple of anything."""
    data = os.urandom(MIB + disk.block_size) * 7
    disk.write(3 * disk.block_size, data)
    assert disk.read(3 * disk.block_size, len(data)) == data
    assert disk.read(0, 3 * disk.block_size + len(data))[3 * disk.block_size :] == data


def test_what_is_discarded_is_freed_and_reads_as_zeroes(disk: Disk) -> None:
    run("blkdiscard", "-f", disk.path)
    data = os.urandom(MIB) * 48
    disk.write(0, data)
    full = disk.occupied()
    run("blkdiscard", "-o", str(16 * MIB), "-l", str(16 * MIB), disk.path)
    assert full - disk.occupied() == pytest.approx(16 * MIB, abs=MIB)
    assert disk.read(0, 48 * MIB) == data[: 16 * MIB] + bytes(16 * MIB) + data[32 * MIB :]


def test_what_is_zeroed_reads_as_zeroes(disk: Disk) -> None:
    data = os.urandom(MIB) * 8
    disk.write(0, data)
    run("blkdiscard", "-f", "-z", "-o", str(2 * MIB), "-l", str(4 * MIB), disk.path)
    assert disk.read(0, 8 * MIB) == data[: 2 * MIB] + bytes(4 * MIB) + data[6 * MIB :]


def test_space_of_deleted_files_is_freed(disk: Disk, tmp_path: Path) -> None:
    run(*MAKE_FILE_SYSTEM["ext4"], disk.path)
    with mounted(disk.path, tmp_path):
        (tmp_path / "large").write_bytes(os.urandom(MIB) * 32)
        os.sync()
        full = disk.occupied()
        (tmp_path / "large").unlink()
        # The file system trims what its journal knows to be free.
        os.sync()
        run("fstrim", "-v", tmp_path)
        assert full - disk.occupied() >= 30 * MIB
