"""What runs out or breaks under a disk, by the real means of the kernel; what users see; that it comes back."""

from __future__ import annotations

import errno
import mmap
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import TypeVar

import pytest
import trio

import tcmu_rs
from tcmu_rs.handlers.file import FileHandler

_T = TypeVar("_T")
PIECE = 64 << 10
LOST = errno.EIO, errno.EREMOTEIO, errno.ENODATA

# No udev is there to make nodes.
DMSETUP = "env", "DM_DISABLE_UDEV=1", "dmsetup"


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@contextmanager
def tmpfs(where: Path, size: str) -> Iterator[Path]:
    where.mkdir()
    run("mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(where))
    try:
        yield where
    finally:
        run("umount", str(where))


@contextmanager
def loop(path: Path, size: int) -> Iterator[str]:
    with path.open("wb") as file:
        file.truncate(size)
    run("modprobe", "loop")
    device = run("losetup", "-f", "--show", str(path)).strip()
    try:
        yield device
    finally:
        run("losetup", "-d", device)


class Initiator:
    """Reads and writes around the page cache, and tells the error number; 0 if there was none."""

    def __init__(self, path: str) -> None:
        self._fd = os.open(path, os.O_RDWR | os.O_DIRECT)
        self._memory = mmap.mmap(-1, PIECE)

    async def _try(self, what: Callable[[], int]) -> int:
        def call() -> int:
            try:
                return 0 if what() in (PIECE, None) else -1
            except OSError as error:
                return error.errno or -1

        return await trio.to_thread.run_sync(call)

    async def write(self, piece: int) -> int:
        self._memory[:] = bytes([piece % 255 + 1]) * PIECE
        return await self._try(lambda: os.pwrite(self._fd, self._memory, piece * PIECE))

    async def read(self, piece: int) -> int:
        return await self._try(lambda: os.preadv(self._fd, [self._memory], piece * PIECE))

    def holds(self, piece: int) -> bool:
        """Whether what was read is what was written there."""
        return self._memory[:] == bytes([piece % 255 + 1]) * PIECE

    def close(self) -> None:
        os.close(self._fd)


@asynccontextmanager
async def attached(handler: FileHandler, name: str) -> AsyncIterator[Initiator]:
    async with tcmu_rs.attach(handler, name) as disk:
        assert disk.path is not None
        initiator = Initiator(disk.path)
        try:
            yield initiator
        finally:
            initiator.close()


async def test_a_file_system_that_is_full(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "full", "8m") as where:
        ballast = where / "ballast"
        ballast.write_bytes(bytes(6 << 20))
        async with attached(FileHandler(where / "disk", size=64 << 20, create=True), "full") as initiator:
            errors = [await initiator.write(piece) for piece in range(64)]
            assert errors[0] == 0
            assert errors[-1] == errno.ENOSPC
            assert set(errors) == {0, errno.ENOSPC}
            # What was stored is there, and the device goes on.
            assert await initiator.read(0) == 0
            assert initiator.holds(0)
            ballast.unlink()
            assert [await initiator.write(piece) for piece in range(64)] == [0] * 64
            assert await initiator.read(63) == 0
            assert initiator.holds(63)


async def test_a_quota_that_is_used_up(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The image belongs to a user whose quota is smaller than the disk: xfs counts what root writes, too."""
    user = "65000"
    with tmpfs(tmp_path / "images", "512m") as images, loop(images / "xfs", 320 << 20) as device:
        run("mkfs.xfs", "-q", device)
        where = tmp_path / "mount"
        where.mkdir()
        run("mount", "-o", "uquota", device, str(where))
        try:
            image = where / "disk"
            with image.open("wb") as file:
                file.truncate(16 << 20)
            os.chown(image, int(user), 0)
            run("xfs_quota", "-x", "-c", f"limit -u bhard=1m {user}", str(where))
            async with attached(FileHandler(image, direct=True, block_size=4096), "quota") as initiator:
                errors = [await initiator.write(piece) for piece in range(32)]
                assert errors[0] == 0
                assert errors[-1] == errno.ENOSPC
                assert set(errors) == {0, errno.ENOSPC}
                assert "Disk quota exceeded" in caplog.text
                # What is stored can be read and written again; and all can, when there is more.
                assert await initiator.write(0) == 0
                assert await initiator.read(0) == 0
                assert initiator.holds(0)
                await trio.to_thread.run_sync(run, "xfs_quota", "-x", "-c", f"limit -u bhard=16m {user}", str(where))
                assert [await initiator.write(piece) for piece in range(32)] == [0] * 32
                assert await initiator.read(31) == 0
                assert initiator.holds(31)
        finally:
            run("umount", str(where))


async def test_a_file_system_that_turns_read_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with tmpfs(tmp_path / "images", "64m") as images, loop(images / "ext4", 32 << 20) as device:
        run("mkfs.ext4", "-q", device)
        where = tmp_path / "mount"
        where.mkdir()
        run("mount", "-o", "errors=remount-ro", device, str(where))
        try:
            handler = FileHandler(where / "disk", size=16 << 20, create=True, direct=True, block_size=4096)
            async with attached(handler, "frozen") as initiator:
                assert await initiator.write(1) == 0
                Path(f"/sys/fs/ext4/{Path(device).name}/trigger_fs_error").write_text("1")
                assert await initiator.write(2) != 0
                assert "Read-only file system" in caplog.text
                assert await initiator.read(1) == 0
                assert initiator.holds(1)
        finally:
            run("umount", str(where))


async def test_a_disk_that_fails_and_comes_back(tmp_path: Path) -> None:
    with tmpfs(tmp_path / "images", "64m") as images, loop(images / "disk", 32 << 20) as device:
        sectors = (32 << 20) // 512

        def table(target: str) -> None:
            run(*DMSETUP, "suspend", "--noflush", "flaky")
            run(*DMSETUP, "load", "flaky", "--table", f"0 {sectors} {target}")
            run(*DMSETUP, "resume", "flaky")

        linear = f"linear {device} 0"
        run(*DMSETUP, "create", "--noudevsync", "flaky", "--table", f"0 {sectors} {linear}")
        try:
            handler = FileHandler("/dev/mapper/flaky", direct=True, block_size=4096)
            async with attached(handler, "flaky") as initiator:
                assert await initiator.write(3) == 0
                await trio.to_thread.run_sync(table, "error")
                assert await initiator.write(4) in LOST
                assert await initiator.read(3) in LOST
                await trio.to_thread.run_sync(table, linear)
                assert await initiator.read(3) == 0
                assert initiator.holds(3)
                assert await initiator.write(4) == 0
        finally:
            run(*DMSETUP, "remove", "--retry", "flaky")


async def test_a_disk_that_vanishes(tmp_path: Path) -> None:
    """Another disk of ours is taken out of the machine under the one that is on it. What was not flushed is lost, and
    nobody is told otherwise: no flush succeeds, no other handler gets the disk, and its end is an error.
    """
    with tmpfs(tmp_path / "images", "64m") as images:
        lower = FileHandler(images / "lower", size=32 << 20, create=True, block_size=4096)
        async with tcmu_rs.attach(lower, "lower") as below:
            assert below.path is not None
            handler = FileHandler(below.path, direct=True, block_size=4096)
            with pytest.RaisesGroup(OSError, allow_unwrapped=True, flatten_subgroups=True):
                async with tcmu_rs.attach(handler, "upper") as disk:
                    assert disk.path is not None
                    initiator = Initiator(disk.path)
                    assert await initiator.write(5) == 0
                    delete = Path("/sys/class/block", Path(below.path).name, "device/delete")
                    await trio.to_thread.run_sync(delete.write_text, "1")
                    assert await initiator.read(5) in LOST
                    assert await initiator.write(6) in LOST
                    fresh = FileHandler(images / "fresh", size=32 << 20, create=True, block_size=4096)
                    with pytest.raises(OSError, match="Input/output error"):
                        await disk.replace(fresh)
                    assert await initiator.write(6) in LOST
                    initiator.close()
