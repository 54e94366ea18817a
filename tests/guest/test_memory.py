"""A server whose own machine writes to its disk while memory is short."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import subprocess
import sys
from pathlib import Path

from .pattern import BLOCK, pattern

PF_MEMALLOC_NOIO, PF_LOCAL_THROTTLE = 0x00080000, 0x00100000
LEFT = 96 << 20
WRITTEN = 256 << 20
CHUNK = 256


def available() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) << 10
    raise LookupError("MemAvailable")


def status(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1])
    raise LookupError(field)


def flags_of_threads(pid: int) -> list[int]:
    stats = (thread / "stat" for thread in Path(f"/proc/{pid}/task").iterdir())
    return [int(stat.read_text().rpartition(")")[2].split()[6]) for stat in stats]


def chunk(first: int) -> bytes:
    return b"".join(pattern(block) for block in range(first, first + CHUNK))


def test_dirty_pages_go_out_through_our_disk_when_memory_is_short() -> None:
    """More than twice the memory that is free is written through the page cache, while nothing can be swapped out."""
    handler = "tests.guest.pattern:PatternDisk"
    command = [sys.executable, "-m", "tcmu_rs", "attach", "pattern:", "--lock-memory", "--handler", handler]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        path = server.stdout.readline().rstrip("\n").partition("\t")[2]
        assert path.startswith("/dev/sd")
        assert status(server.pid, "VmLck") > 0
        assert Path(f"/proc/{server.pid}/oom_score_adj").read_text().strip() == "-1000"
        for flags in flags_of_threads(server.pid):
            assert flags & PF_MEMALLOC_NOIO
            assert flags & PF_LOCAL_THROTTLE
        hog = mmap.mmap(-1, max(available() - LEFT, mmap.PAGESIZE))
        address = ctypes.addressof(ctypes.c_char.from_buffer(hog))
        assert ctypes.CDLL(None, use_errno=True).mlock(ctypes.c_void_p(address), ctypes.c_size_t(len(hog))) == 0
        assert available() < 2 * LEFT
        fd = os.open(path, os.O_RDWR)
        try:
            for first in range(0, WRITTEN // BLOCK, CHUNK):
                os.pwrite(fd, chunk(first), first * BLOCK)
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            for first in range(0, WRITTEN // BLOCK, 8 * CHUNK):
                assert os.pread(fd, CHUNK * BLOCK, first * BLOCK) == chunk(first)
        finally:
            os.close(fd)
    finally:
        server.send_signal(signal.SIGTERM)
        server.communicate(timeout=60)
        assert server.returncode == 0
