"""Another handler under a disk that is written and read on the real kernel."""

from __future__ import annotations

import subprocess
from pathlib import Path

import trio

import tcmu_rs
from tcmu_rs.handlers.file import FileHandler

from .disks import KernelLog

SIZE = 64 << 20


async def test_a_file_system_notices_nothing(tmp_path: Path) -> None:
    """Verified writes at depth 16 while the handler is exchanged again and again, then fsck."""
    image = tmp_path / "disk"

    def handler(*, create: bool = False) -> FileHandler:
        return FileHandler.from_config(str(image), tcmu_rs.Options(size=SIZE, create=create))

    def run(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True, text=True)

    log = KernelLog()
    async with tcmu_rs.attach(handler(create=True), "swap") as disk:
        assert disk.path is not None
        mount = tmp_path / "mount"
        mount.mkdir()
        await trio.to_thread.run_sync(run, "mkfs.ext4", "-q", disk.path)
        # An error ends the file system, and so the test.
        await trio.to_thread.run_sync(run, "mount", "-o", "errors=remount-ro", disk.path, str(mount))
        finished = trio.Event()

        async def write() -> None:
            job = ("--name=swap", f"--directory={mount}", "--size=16M", "--rw=randwrite", "--bs=4k", "--iodepth=16")
            engine = ("--ioengine=libaio", "--direct=1", "--verify=crc32c", "--fsync=64", "--randrepeat=1")
            await trio.to_thread.run_sync(run, "fio", *job, *engine)
            finished.set()

        swaps = 0
        with trio.fail_after(120):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(write)
                while not finished.is_set():
                    await disk.replace(handler(), within=60)
                    swaps += 1
                    await trio.sleep(0.3)
        assert swaps >= 3
        await trio.to_thread.run_sync(run, "umount", str(mount))
        await trio.to_thread.run_sync(run, "fsck.ext4", "-fn", disk.path)
        assert [line for line in log.complaints() if "I/O error" in line] == []
    log.close()
    assert image.stat().st_size == SIZE
