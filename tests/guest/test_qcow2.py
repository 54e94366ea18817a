"""The compressed disk in the use that disks are for, and what QEMU makes of its image afterwards."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from .disks import (
    CHECK_FILE_SYSTEM,
    MAKE_FILE_SYSTEM,
    MIB,
    REAL_TREES,
    TCMU_RS,
    Disk,
    attached,
    checksums,
    mounted,
    run,
)

pytestmark = [pytest.mark.guest(timeout=600), pytest.mark.judges]

MAKE = {**MAKE_FILE_SYSTEM, "btrfs": ("mkfs.btrfs", "-q", "-f")}
CHECK = {**CHECK_FILE_SYSTEM, "btrfs": ("btrfs", "check", "-q")}
SIZE = {"ext4": 128, "xfs": 320, "btrfs": 192}


class Served:
    """An image that is served now and again; whatever the guest reads from it at the end QEMU has to read, too."""

    def __init__(self, directory: Path, size: int) -> None:
        self.path = directory / "image"
        self.copy = directory / "copy"
        run(TCMU_RS, "create", f"zstd:{self.path}", "--size", f"{size}M")
        self.empty = self.occupied()

    def occupied(self) -> int:
        """Bytes that the closed image takes."""
        return self.path.stat().st_blocks * 512

    @contextmanager
    def attached(self) -> Iterator[Disk]:
        with attached(f"zstd:{self.path}") as disk:
            yield disk
            self.keep(disk)
        self.judge()

    def keep(self, disk: Disk) -> None:
        """Keeps what the guest reads."""
        zeroes = bytes(MIB)
        with self.copy.open("wb") as file:
            file.truncate(disk.size)
            for offset in range(0, disk.size, MIB):
                data = disk.read(offset, min(MIB, disk.size - offset))
                if data != zeroes:
                    file.seek(offset)
                    file.write(data)

    def judge(self) -> None:
        assert "No errors" in run("qemu-img", "check", "-f", "qcow2", self.path)
        run("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", self.copy, self.path)


def size_of(tree: Path) -> int:
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in tree.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", ["ext4", "xfs", "btrfs"])
def test_a_tree_is_stored_compressed(kind: str, tmp_path: Path) -> None:
    served = Served(tmp_path, SIZE[kind])
    root = tmp_path / "mounted"
    root.mkdir()
    with served.attached() as disk:
        run(*MAKE[kind], disk.path)
        with mounted(disk.path, root):
            made = size_of(root)
            run("cp", "-a", *REAL_TREES, root)
            stored = size_of(root) - made
            expected = checksums(root)
        run(*CHECK[kind], disk.path)
    fresh = served.occupied()
    if kind != "ext4":
        return
    with served.attached() as disk:
        with mounted(disk.path, root):
            assert checksums(root) == expected
            # Some of it is written again, with something else; most of it goes.
            for number, path in enumerate(sorted((root / REAL_TREES[0].name).rglob("*.py"))):
                path.write_bytes(path.read_bytes()[number:] + os.urandom(number))
            for tree in REAL_TREES[1:]:
                shutil.rmtree(root / tree.name)
            os.sync()
            run("fstrim", "-v", root)
            expected = checksums(root)
        run(*CHECK[kind], disk.path)
    trimmed = served.occupied()
    with served.attached() as disk, mounted(disk.path, root, "-o", "ro"):
        assert checksums(root) == expected
    print(
        f"{kind}: {stored >> 10} KiB of files; the image has {served.empty >> 10} KiB, {fresh >> 10} KiB with them, "
        f"{trimmed >> 10} KiB when most were deleted and trimmed"
    )
    assert fresh - served.empty < stored * 0.7
    assert trimmed - served.empty < (fresh - served.empty) * 0.7
