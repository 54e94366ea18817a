"""What happens to one device stays with it."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio

import tcmu_rs
from tcmu_rs import _devices, _lio, _sysfs
from tcmu_rs.handlers.file import FileHandler
from tcmu_rs.handlers.ram import RamHandler

from .test_attach import nothing_left, read
from .test_attach import write as write_at
from .test_cli import run
from .test_daemon import SIZE, backstore, disk, no_replies, wait_for, write
from .test_supervise import is_another, server_of

__all__ = ["no_replies", "nothing_left"]


class Failing(RamHandler):
    """Raises what no handler should, whatever it is asked."""

    def read(self, offset: int, iov: tcmu_rs.IoVec) -> None:
        raise ZeroDivisionError


class Unopenable(RamHandler):
    async def open(self) -> None:
        raise OSError(5, "as told")


async def test_of_devices_in_one_process_each_fails_alone(tmp_path: Path) -> None:
    """`open` raises, a worker raises, a ring is corrupt, a disk is full; a neighbour goes on through all of it."""
    full = tmp_path / "full"
    full.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1M", "none", full], check=True)
    try:
        async with tcmu_rs.attach(RamHandler(SIZE), "neighbour") as neighbour:
            path = neighbour.path
            assert path is not None

            async def neighbour_works() -> None:
                data = os.urandom(4096)
                await trio.to_thread.run_sync(write_at, path, 4096, data)
                assert await trio.to_thread.run_sync(read, path, 4096, 4096) == data

            with pytest.raises(OSError, match="as told"):
                async with tcmu_rs.attach(Unopenable(SIZE), "unopenable"):
                    pass
            await neighbour_works()

            image = full / "disk.img"
            with image.open("wb") as file:
                file.truncate(SIZE)
            async with tcmu_rs.attach(FileHandler(image), "full") as device:
                assert device.path is not None
                with pytest.raises(OSError):
                    await trio.to_thread.run_sync(write_at, device.path, 0, os.urandom(4 << 20))
                await neighbour_works()
                assert await trio.to_thread.run_sync(read, device.path, SIZE - 4096, 4096) == bytes(4096)

            async with tcmu_rs.attach(Failing(SIZE), "failing", fabric="none"):
                await neighbour_works()

            with pytest.RaisesGroup(tcmu_rs.RingCorruptError, flatten_subgroups=True):
                async with tcmu_rs.attach(RamHandler(SIZE), "corrupt") as device:
                    await trio.to_thread.run_sync(corrupt, device.uio)
                    reading = await trio.to_thread.run_sync(poke, device.path)
                    await trio.sleep_forever()
            await trio.to_thread.run_sync(reading.wait, 60)
            await neighbour_works()
    finally:
        subprocess.run(["umount", "-l", full], check=True)


def corrupt(uio: _sysfs.UioDevice) -> None:
    """Writes an impossible head into the mailbox, as a kernel gone mad would."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if line.endswith(uio.path):
            with open("/proc/self/mem", "r+b", buffering=0) as memory:  # noqa: PTH123
                memory.seek(int(line.partition("-")[0], 16) + 12)
                memory.write(struct.pack("=I", 0xFFFFFFF8))
            return
    raise AssertionError(f"{uio.path} is not mapped here")


def poke(path: str | None) -> subprocess.Popen[bytes]:
    """Has the kernel ring once more; the answer comes when the device has gone."""
    return subprocess.Popen(["dd", f"if={path}", "of=/dev/null", "bs=4k", "count=1", "iflag=direct"], stderr=-3)


@contextmanager
def isolating(*options: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tcmu_rs", "daemon", "file", "--isolate", *options]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("serving")
        yield process
    finally:
        process.terminate()
        assert process.communicate(timeout=60)[0] == ""
    assert process.returncode == 0


@pytest.mark.parametrize("replies", [False, True], ids=["no replies", "replies"])
def test_one_process_for_each_device(tmp_path: Path, replies: bool) -> None:
    images = [tmp_path / name for name in ("one.img", "two.img")]
    for image in images:
        with image.open("wb") as file:
            file.truncate(SIZE)
    with isolating(*["--replies"] * replies) as daemon, backstore("one", f"file/{images[0]}") as one:
        wait_for(lambda: server_of("one"))
        with backstore("two", f"file/{images[1]}", hba=701), disk(one) as path:
            wait_for(lambda: server_of("two"))
            pids = server_of("one"), server_of("two")
            assert len({*pids, daemon.pid, None}) == 4
            first, second = pids
            assert first is not None and second is not None
            # The other one is as dead as can be, and then is back.
            os.kill(second, signal.SIGSTOP)
            write(path, b"alone" * 100)
            os.kill(second, signal.SIGKILL)
            wait_for(lambda: is_another("two", second))
            assert server_of("one") == first
            said = run("upgrade", "one")
            third = int(said.split()[1])
            wait_for(lambda: server_of("one") == third)
            assert server_of("two") not in (None, second)
            assert read(path, 1 << 20, 512)[:500] == b"alone" * 100
            os.kill(third, signal.SIGKILL)
            wait_for(lambda: is_another("one", third))
            assert read(path, 1 << 20, 512)[:500] == b"alone" * 100
        # Removed while it was served: its process has gone with it.
        wait_for(lambda: [device.name for device in _devices.devices()] == ["one"] or None)
        time.sleep(0.5)
        assert _lio.find_backstore("two") is None
