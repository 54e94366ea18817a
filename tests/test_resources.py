"""What runs out under a disk: told precisely, and good again when it is back. More of it in the lab."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tcmu_rs import IoVec
from tcmu_rs.handlers.file import FileHandler
from tcmu_rs.testing import SimulatedDisk, simulated

from .conftest import Log
from .disks import BLOCK, BUSY, CHECK_CONDITION, GOOD, Storage, read16, write16

SIZE = 1 << 20
UNRECOVERED_READ_ERROR = (0x3, 0x11, 0x00)
SPACE_ALLOCATION_FAILED = (0x7, 0x27, 0x07)


@contextmanager
def limited(what: int, limit: int) -> Iterator[None]:
    """Lowers a limit of this process."""
    soft, hard = resource.getrlimit(what)
    resource.setrlimit(what, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(what, (soft, hard))


def file_of(path: Path) -> FileHandler:
    return FileHandler(path, size=SIZE, create=True)


async def write(disk: SimulatedDisk, block: int) -> tuple[int, tuple[int, int, int] | None]:
    reply = await disk.scsi(write16(block), bytes([block % 256]) * BLOCK)
    return reply.status, reply.sense_code


async def test_a_file_that_may_not_grow(tmp_path: Path, log: Log) -> None:
    async with simulated(file_of(tmp_path / "disk")) as disk:
        with limited(resource.RLIMIT_FSIZE, SIZE // 2):
            assert await write(disk, 0) == (GOOD, None)
            assert await write(disk, 2 * SIZE // 3 // BLOCK) == (CHECK_CONDITION, SPACE_ALLOCATION_FAILED)
        log.expect("File too large")
        assert await write(disk, 2 * SIZE // 3 // BLOCK) == (GOOD, None)
        assert await disk.read(0, BLOCK) == bytes(BLOCK)


async def test_a_file_that_is_cut_off_below(tmp_path: Path, log: Log) -> None:
    """Nothing of it is mapped, so that nothing can be hit by a SIGBUS."""
    path = tmp_path / "disk"
    async with simulated(file_of(path)) as disk:
        await disk.write(0, b"x" * SIZE)
        os.truncate(path, SIZE // 2)
        assert await disk.read(0, SIZE // 2) == b"x" * (SIZE // 2)
        for block in (SIZE // 2 // BLOCK, SIZE // BLOCK - 1):
            reply = await disk.scsi(read16(block), data_in=BLOCK)
            assert (reply.status, reply.sense_code) == (CHECK_CONDITION, UNRECOVERED_READ_ERROR)
            log.expect("read() failed")
        # Half of it is there, and half an answer is none.
        reply = await disk.scsi(read16(SIZE // 2 // BLOCK - 1, 2), data_in=2 * BLOCK)
        assert reply.sense_code == UNRECOVERED_READ_ERROR
        log.expect("read() failed")
        os.truncate(path, SIZE)
        assert await disk.read(SIZE // 2, BLOCK) == bytes(BLOCK)
        await disk.write(SIZE // 2, b"y" * BLOCK)
    assert path.read_bytes() == b"x" * (SIZE // 2) + b"y" * BLOCK + bytes(SIZE // 2 - BLOCK)


async def test_no_descriptors_are_left(tmp_path: Path, log: Log) -> None:
    class Opens(Storage):
        async def read(self, offset: int, iov: IoVec) -> None:
            with (tmp_path / "block").open("rb") as file:
                iov.copy_from(file.read(BLOCK))

    (tmp_path / "block").write_bytes(b"z" * BLOCK)
    async with simulated(Opens()) as disk:
        used = len(list(Path("/proc/self/fd").iterdir()))
        with limited(resource.RLIMIT_NOFILE, used - 1):
            hoard = []
            try:
                while True:
                    hoard.append(os.dup(0))
            except OSError:
                pass
            assert (await disk.scsi(read16(0), data_in=BLOCK)).status == BUSY
            for fd in hoard:
                os.close(fd)
        log.expect("Too many open files")
        assert (await disk.scsi(read16(0), data_in=BLOCK)).data == b"z" * BLOCK


async def test_storage_that_is_gone(log: Log) -> None:
    class Gone(Storage):
        there = False

        async def read(self, offset: int, iov: IoVec) -> None:
            if not self.there:
                raise OSError(19, "No such device")
            self.load(offset, iov)

    handler = Gone()
    async with simulated(handler) as disk:
        assert (await disk.scsi(read16(0), data_in=BLOCK)).sense_code == (0x4, 0x3E, 0x01)
        log.expect("No such device")
        handler.there = True
        assert (await disk.scsi(read16(0), data_in=BLOCK)).status == GOOD


def test_memory_is_protected_or_it_is_said_what_is_not() -> None:
    """In a process of its own: nothing of it can be taken back."""
    program = """
import pathlib, tcmu_rs
problems = tcmu_rs.protect_memory()
status = pathlib.Path("/proc/self/status").read_text()
locked = int(next(line for line in status.splitlines() if line.startswith("VmLck:")).split()[1])
flags = int(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[6])
score = pathlib.Path("/proc/self/oom_score_adj").read_text().strip()
done = {"mlockall": locked > 0, "PR_SET_IO_FLUSHER": bool(flags & 0x80000), "oom_score_adj": score == "-1000"}
failed = {problem.partition(":")[0] for problem in problems}
assert failed == {name for name, ok in done.items() if not ok}, (problems, done)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
