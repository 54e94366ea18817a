"""The shipped handlers: ram and file."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import trio

import tcmu_rs
from tcmu_rs import IoVec, Options
from tcmu_rs.handlers import file as file_module
from tcmu_rs.handlers.file import FileHandler
from tcmu_rs.handlers.ram import RamHandler
from tcmu_rs.testing import check_block_handler, simulated

from .conftest import Log
from .disks import CHECK_CONDITION, GOOD, SYNCHRONIZE_CACHE, read16, write16
from .test_runtime import descriptors

MIB = 1 << 20
MEDIUM_READ, MEDIUM_WRITE = (0x3, 0x11, 0x00), (0x3, 0x0C, 0x00)
NO_SPACE = (0x7, 0x27, 0x07)

pytestmark = pytest.mark.usefixtures("no_descriptor_left")


@pytest.fixture
def no_descriptor_left() -> Iterator[None]:
    before = descriptors()
    yield
    assert {fd for fd in descriptors() - before if "disk" in fd} == set()


@pytest.fixture
def disk_file(tmp_path: Path) -> Path:
    """A sparse file of 1 MiB."""
    path = tmp_path / "disk.img"
    path.touch()
    os.truncate(path, MIB)
    return path


# The kit.


@pytest.mark.parametrize("size", [512, 7 * 512, 4096, MIB, 3 * MIB + 4096])
async def test_ram_is_a_disk(size: int) -> None:
    await check_block_handler(lambda: RamHandler(size))


async def test_ram_with_large_blocks_and_read_only() -> None:
    await check_block_handler(lambda: RamHandler(MIB, block_size=4096))
    await check_block_handler(lambda: RamHandler(MIB, read_only=True))


@pytest.mark.parametrize("block_size", [512, 4096])
async def test_file_is_a_disk(disk_file: Path, block_size: int) -> None:
    await check_block_handler(lambda: FileHandler(disk_file, block_size=block_size), persistent=True)


async def test_file_read_only_is_a_disk(disk_file: Path) -> None:
    disk_file.write_bytes(os.urandom(MIB))
    before = disk_file.read_bytes()
    await check_block_handler(lambda: FileHandler(disk_file, read_only=True), persistent=True)
    assert disk_file.read_bytes() == before


def direct_file(path: Path, block_size: int) -> FileHandler:
    try:
        os.close(os.open(path, os.O_RDWR | os.O_DIRECT))
    except OSError as error:
        pytest.skip(f"O_DIRECT does not work on {path.parent}: {error.strerror}")
    return FileHandler(path, block_size=block_size, direct=True)


@pytest.mark.parametrize("block_size", [512, 4096])
async def test_file_around_the_page_cache_is_a_disk(disk_file: Path, block_size: int) -> None:
    await check_block_handler(lambda: direct_file(disk_file, block_size), persistent=True)


async def test_file_without_holes_is_a_disk(disk_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a file system without fallocate(2) there is no discard, and zeroes are written."""

    async def unsupported(fd: int, mode: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(file_module, "fallocate", unsupported)
    await check_block_handler(lambda: FileHandler(disk_file), persistent=True)
    async with FileHandler(disk_file) as handler:
        assert not handler.can_discard


@pytest.fixture
def loop_device(disk_file: Path) -> Iterator[Path]:
    """A block device over the file."""
    if os.geteuid() != 0:
        pytest.skip("a loop device needs root")
    try:
        found = subprocess.run(
            ["losetup", "--find", "--show", str(disk_file)], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"losetup makes no loop device here: {getattr(error, 'stderr', error)}")
    path = Path(found.stdout.strip())
    try:
        yield path
    finally:
        subprocess.run(["losetup", "--detach", str(path)], check=True)


async def test_a_block_device_is_a_disk(loop_device: Path) -> None:
    await check_block_handler(lambda: FileHandler(loop_device), persistent=True)
    async with FileHandler(loop_device) as handler:
        assert handler.size == MIB


async def test_a_block_device_that_is_mounted_is_only_read(loop_device: Path, tmp_path: Path) -> None:
    """It was served to be written, under the file system that was mounted on it."""
    place = tmp_path / "mounted"
    place.mkdir()
    try:
        subprocess.run(["mkfs.ext4", "-q", str(loop_device)], check=True)
        subprocess.run(["mount", str(loop_device), str(place)], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"nothing can be mounted here: {error}")
    try:
        with pytest.raises(OSError, match="is in use: unmount it"):
            await FileHandler(loop_device).open()
        async with FileHandler(loop_device, read_only=True) as handler:
            assert handler.size == MIB
    finally:
        subprocess.run(["umount", str(place)], check=True)
    async with FileHandler(loop_device):
        assert subprocess.run(["mount", str(loop_device), str(place)], capture_output=True, check=False).returncode


# Opening, locking, creating.


async def test_a_file_has_one_server(disk_file: Path) -> None:
    async with FileHandler(disk_file):
        for read_only in (False, True):
            with pytest.raises(BlockingIOError, match="another server holds its lock") as caught:
                await FileHandler(disk_file, read_only=read_only).open()
            assert caught.value.filename == str(disk_file)
    async with FileHandler(disk_file):
        pass


async def test_readers_share_a_file_and_keep_writers_out(disk_file: Path) -> None:
    async with FileHandler(disk_file, read_only=True), FileHandler(disk_file, read_only=True):
        with pytest.raises(BlockingIOError):
            await FileHandler(disk_file).open()
    with disk_file.open() as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        async with FileHandler(disk_file, read_only=True):
            pass


async def test_sizes_have_to_fit(disk_file: Path) -> None:
    async with FileHandler(disk_file, size=MIB):
        pass
    with pytest.raises(ValueError, match=rf"{disk_file} has 1048576 bytes, not the 4096 that were asked for"):
        await FileHandler(disk_file, size=4096).open()
    with pytest.raises(ValueError, match="not the 2097152 that were asked for"):
        await FileHandler(disk_file, size=2 * MIB, create=True).open()
    assert disk_file.stat().st_size == MIB
    for size in (0, 511, MIB + 1):
        os.truncate(disk_file, size)
        with pytest.raises(ValueError, match=rf"{size} bytes are not a whole number of blocks of 512"):
            await FileHandler(disk_file).open()
    os.truncate(disk_file, 512)
    with pytest.raises(ValueError, match=r"choose another --block-size"):
        await FileHandler(disk_file, block_size=4096).open()


async def test_a_file_is_made_when_asked_for(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with pytest.raises(FileNotFoundError, match="--create makes one"):
        await FileHandler(path).open()
    with pytest.raises(ValueError, match="how large"):
        await FileHandler(path, create=True).open()
    for size in (0, 511, -512):
        with pytest.raises(ValueError, match="not a whole number of blocks"):
            await FileHandler(path, size=size, create=True).open()
    with pytest.raises(OSError, match=r"File too large|Invalid argument"):
        await FileHandler(path, size=1 << 62, create=True).open()
    with pytest.raises(ValueError, match="read-only"):
        await FileHandler(path, size=MIB, create=True, read_only=True).open()
    assert not path.exists()
    async with FileHandler(path, size=MIB, create=True) as handler:
        assert handler.size == MIB
    assert (path.stat().st_size, path.stat().st_blocks, path.stat().st_mode & 0o777) == (MIB, 0, 0o600)


async def test_a_size_above_the_limit_leaves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with limit(resource.RLIMIT_FSIZE, MIB), pytest.raises(OSError, match="File too large"):
        await FileHandler.create(str(path), Options(size=2 * MIB))
    assert not path.exists()


@contextmanager
def limit(what: int, soft: int) -> Iterator[None]:
    before = resource.getrlimit(what)
    resource.setrlimit(what, (soft, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


async def test_create_makes_a_file_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    with pytest.raises(ValueError, match="how large"):
        await FileHandler.create(str(path), Options())
    await FileHandler.create(str(path), Options(size=MIB))
    assert path.stat().st_size == MIB
    path.write_bytes(b"x" * 512)
    with pytest.raises(FileExistsError, match="there is such a file already"):
        await FileHandler.create(str(path), Options(size=MIB))
    assert path.read_bytes() == b"x" * 512


@pytest.mark.parametrize("how", ["fails", "is cancelled"])
async def test_create_that_ends_early_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    """The file stayed when the last step, making it durable, was the one that did not work."""
    path = tmp_path / "disk.img"
    scope = trio.CancelScope()

    async def sync(fd: int) -> None:
        if how == "fails":
            raise OSError(errno.EIO, "Input/output error")
        scope.cancel()
        await trio.lowlevel.checkpoint()

    monkeypatch.setattr("tcmu_rs.handlers.file.fdatasync", sync)
    with scope, suppress(OSError):
        await FileHandler.create(str(path), Options(size=MIB))
        pytest.fail("it was made")
    assert not path.exists()


async def test_create_does_not_take_what_another_has_made_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two that had both looked and found nothing each took the file for its own, to overwrite and to remove."""
    path = tmp_path / "disk.img"
    path.write_bytes(b"x" * MIB)
    monkeypatch.setattr(Path, "exists", lambda _: False)
    with pytest.raises(FileExistsError, match="there is such a file already"):
        await FileHandler.create(str(path), Options(size=MIB))
    assert path.read_bytes() == b"x" * MIB


async def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="neither a regular file nor a block device"):
        await FileHandler(tmp_path, read_only=True).open()
    with pytest.raises(ValueError, match="neither a regular file nor a block device"):
        await FileHandler("/dev/null").open()
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for read_only in (False, True):
        with trio.fail_after(10), pytest.raises(ValueError, match="neither a regular file nor a block device"):
            await FileHandler(fifo, read_only=read_only).open()


def test_configuration() -> None:
    with pytest.raises(ValueError, match="file needs a path"):
        FileHandler.from_config("", Options())
    with pytest.raises(ValueError, match="file knows no option colour"):
        FileHandler.from_config("/x", Options(extra={"colour": "red"}))
    with pytest.raises(ValueError, match="direct is 'maybe'; it is on or off"):
        FileHandler.from_config("/x", Options(extra={"direct": "maybe"}))
    with pytest.raises(ValueError, match="ram has no size of its own"):
        RamHandler.from_config("", Options())
    with pytest.raises(ValueError, match="ram takes nothing behind the colon"):
        RamHandler.from_config("1G", Options(size=512))
    with pytest.raises(ValueError, match="ram knows no option colour"):
        RamHandler.from_config("", Options(size=512, extra={"colour": "red"}))
    handler = RamHandler.from_config("", Options(size=MIB, block_size=4096, read_only=True))
    assert (handler.size, handler.block_size, handler.read_only) == (MIB, 4096, True)


# Space.


async def test_discarded_blocks_are_holes_and_zeroed_ones_are_not(disk_file: Path) -> None:
    async with simulated(FileHandler(disk_file)) as disk:
        await disk.write(0, b"x" * MIB)
        await disk.flush()
        full = disk_file.stat().st_blocks
        assert full * 512 >= MIB
        await disk.write_zeroes(0, MIB // 2)
        await disk.flush()
        assert disk_file.stat().st_blocks >= full
        await disk.discard(0, MIB // 2)
        await disk.flush()
        assert disk_file.stat().st_blocks <= full // 2 + 16
        await disk.write_zeroes(MIB // 2, MIB // 2, unmap=True)
        assert disk_file.stat().st_blocks <= 16
        assert await disk.read(0, MIB) == bytes(MIB)
    assert disk_file.stat().st_size == MIB


async def test_ram_gives_memory_back() -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")

    size = 64 * MIB
    async with RamHandler(size) as handler:
        empty = resident()
        chunk = IoVec([b"x" * MIB])
        for offset in range(0, size, MIB):
            handler.write(offset, chunk)
        assert resident() - empty > size * 3 // 4
        handler.discard(512, size - 1024)
        assert resident() - empty < size // 4


# Transfers.


async def test_more_pieces_than_a_system_call_takes(disk_file: Path) -> None:
    data = os.urandom(3000 * 64)
    async with FileHandler(disk_file) as handler:
        source = IoVec([data[at : at + 64] for at in range(0, len(data), 64)])
        await handler.write(4096, source)
        target = [bytearray(64) for _ in range(3000)]
        await handler.read(4096, IoVec(target))
    assert b"".join(target) == data == disk_file.read_bytes()[4096 : 4096 + len(data)]


# Failures.


async def test_a_file_that_is_truncated_behind_our_back(disk_file: Path, log: Log) -> None:
    async with simulated(FileHandler(disk_file)) as disk:
        await disk.write(0, b"x" * MIB)
        os.truncate(disk_file, 4096 + 256)
        assert await disk.read(0, 4096) == b"x" * 4096
        for block in (8, 9, 2047):
            reply = await disk.scsi(read16(block), data_in=512)
            assert (reply.status, reply.sense_code, reply.data) == (CHECK_CONDITION, MEDIUM_READ, b"")
            log.expect("it was truncated")
        # A write makes the file longer again: what is between is lost, and that is said by no error.
        await disk.write(8 * 512, b"n" * 512)
        assert await disk.read(8 * 512, 512) == b"n" * 512


@contextmanager
def instead_of(fd: int, path: str) -> Iterator[None]:
    """Another file behind a descriptor."""
    saved, other = os.dup(fd), os.open(path, os.O_RDWR)
    os.dup2(other, fd)
    os.close(other)
    try:
        yield
    finally:
        os.dup2(saved, fd)
        os.close(saved)


async def test_errors_of_the_file(disk_file: Path, monkeypatch: pytest.MonkeyPatch, log: Log) -> None:
    async def fail(*args: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    handler = FileHandler(disk_file)
    async with simulated(handler) as disk:
        # The first page of a process is not there: reading and writing it are input/output errors.
        with monkeypatch.context() as broken, instead_of(handler._fd, "/proc/self/mem"):
            broken.setattr(file_module, "fallocate", fail)
            assert (await disk.scsi(read16(0), data_in=512)).sense_code == MEDIUM_READ
            assert (await disk.scsi(write16(0), bytes(512))).sense_code == MEDIUM_WRITE
            for change in (disk.discard, disk.write_zeroes):
                with pytest.raises(tcmu_rs.ScsiError) as caught:
                    await change(0, 512)
                assert (caught.value.key, caught.value.asc, caught.value.ascq) == MEDIUM_WRITE
        with instead_of(handler._fd, "/dev/full"):
            assert (await disk.scsi(write16(0), bytes(512))).sense_code == NO_SPACE
        for method in ("read", "write", "discard", "write_zeroes"):
            log.expect(f"FileHandler.{method}() failed: [Errno 5] Input/output error")
        log.expect("FileHandler.write() failed: [Errno 28] No space left on device")
        assert await disk.read(0, 512) == bytes(512)
        await disk.write(0, bytes(512))


async def test_a_full_file_system(tmp_path: Path, log: Log) -> None:
    mount = tmp_path / "small"
    mount.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(mount)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted: {mounted.stderr.strip()}")
    try:
        async with simulated(FileHandler(mount / "disk.img", size=MIB, create=True)) as disk:
            replies = [await disk.scsi(write16(block, 128), b"x" * 65536) for block in range(0, MIB // 512, 128)]
            refused = [reply.sense_code for reply in replies if reply.status != GOOD]
            assert refused
            assert set(refused) == {NO_SPACE}
            for _ in refused:
                log.expect("No space left on device")
            # Discarding makes room again.
            await disk.discard(0, 65536)
            await disk.write(0, b"y" * 65536)
    finally:
        subprocess.run(["umount", str(mount)], check=True)


async def test_a_file_above_the_limit(disk_file: Path, log: Log) -> None:
    async with simulated(FileHandler(disk_file)) as disk:
        with limit(resource.RLIMIT_FSIZE, 4096):
            reply = await disk.scsi(write16(8), bytes(512))
        assert reply.sense_code == NO_SPACE
    log.expect("File too large")


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
async def test_a_failed_flush_is_never_forgotten(
    disk_file: Path, monkeypatch: pytest.MonkeyPatch, log: Log, number: int
) -> None:
    async def fail(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    sense = {errno.EIO: MEDIUM_WRITE, errno.ENOSPC: NO_SPACE}[number]
    async with simulated(FileHandler(disk_file)) as disk:
        await disk.write(0, b"x" * 512)
        with monkeypatch.context() as broken:
            broken.setattr(file_module, "fdatasync", fail)
            assert (await disk.scsi(SYNCHRONIZE_CACHE)).sense_code == sense
        # fdatasync(2) would say that all is well now.
        for _ in range(2):
            assert (await disk.scsi(SYNCHRONIZE_CACHE)).sense_code == sense
        for _ in range(3):
            log.expect("FileHandler.flush() failed")
        assert await disk.read(0, 512) == b"x" * 512


async def test_a_failed_write_with_fua_is_a_failed_flush(disk_file: Path) -> None:
    """The kernel reports a failed write-back once, to whoever waits for it first."""

    class Failing:
        async def write_to(self, fd: int, offset: int, *, fua: bool) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    memory: Any = Failing()
    async with FileHandler(disk_file) as handler:
        with pytest.raises(OSError, match="Input/output error"):
            await handler.write(0, memory)
        await handler.flush()
        with pytest.raises(OSError, match="Input/output error"):
            await handler.write(0, memory, fua=True)
        with pytest.raises(OSError, match="data was lost by an earlier flush"):
            await handler.flush()


async def test_storage_with_larger_blocks_than_the_disk_is_refused(
    disk_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def large_blocks_only(fd: int, views: Any, offset: int, flags: int = 0) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "preadv", large_blocks_only)
    with pytest.raises(ValueError, match="choose a larger --block-size"):
        await direct_file(disk_file, 512).open()


async def test_closing_makes_durable_and_says_if_it_cannot(disk_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[int] = []

    async def note(fd: int) -> None:
        synced.append(fd)

    monkeypatch.setattr(file_module, "fdatasync", note)
    handler = FileHandler(disk_file)
    async with handler:
        fd = handler._fd
    await handler.aclose()
    assert synced == [fd]

    async def fail(fd: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(file_module, "fdatasync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        async with FileHandler(disk_file):
            pass
    monkeypatch.undo()
    # It is closed and unlocked all the same.
    async with FileHandler(disk_file):
        pass


# What is in use.

MAPPED, FREE = tcmu_rs.ExtentState.MAPPED, tcmu_rs.ExtentState.DEALLOCATED


async def extents_after(handler: tcmu_rs.BlockHandler) -> list[list[tuple[int, tcmu_rs.ExtentState]]]:
    """Writes twice, discards a part, and asks after each."""
    found = []
    async with simulated(handler) as disk:

        async def ask(offset: int, length: int) -> None:
            # Through the emulation, as initiators do: GET LBA STATUS.
            data = (
                await disk.scsi(struct.pack(">BBQLBB", 0x9E, 0x12, offset // 512, 4096, 0, 0), data_in=4096)
            ).check()
            runs, left = [], length
            for at in range(8, len(data), 16):
                _, blocks, state = struct.unpack_from(">QLB", data, at)
                if left > 0:
                    runs.append((min(blocks * 512, left), tcmu_rs.ExtentState(state)))
                    left -= blocks * 512
            found.append(runs)

        await ask(0, MIB)
        await disk.write(64 << 10, b"x" * (128 << 10))
        await disk.write(512 << 10, b"y" * 4096)
        await ask(0, MIB)
        await disk.discard(96 << 10, 32 << 10)
        await ask(64 << 10, 128 << 10)
        await ask(600 << 10, 4096)
    return found


EXTENTS = [
    [(MIB, FREE)],
    [(64 << 10, FREE), (128 << 10, MAPPED), (320 << 10, FREE), (4096, MAPPED), ((512 << 10) - 4096, FREE)],
    [(32 << 10, MAPPED), (32 << 10, FREE), (64 << 10, MAPPED)],
    [(4096, FREE)],
]


async def test_ram_tells_what_is_in_use() -> None:
    assert await extents_after(RamHandler(MIB)) == EXTENTS


async def test_a_file_tells_what_is_in_use(disk_file: Path) -> None:
    with disk_file.open("rb") as file:
        if os.lseek(file.fileno(), 0, os.SEEK_HOLE) != 0:
            pytest.skip("this file system tells of no holes")
    assert await extents_after(FileHandler(disk_file)) == EXTENTS
