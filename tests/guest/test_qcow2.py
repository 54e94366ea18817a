"""The compressed disk in the use that disks are for, and what QEMU makes of its image afterwards."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tcmu_rs.handlers.qcow2 import create

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

pytestmark = pytest.mark.guest(timeout=600)

MAKE = {**MAKE_FILE_SYSTEM, "btrfs": ("mkfs.btrfs", "-q", "-f")}
CHECK = {**CHECK_FILE_SYSTEM, "btrfs": ("btrfs", "check", "-q")}


class Served:
    """An image that is served now and again; whatever the guest reads from it at the end QEMU has to read, too."""

    def __init__(self, directory: Path, size: int) -> None:
        self.path = directory / "image"
        self.copy = directory / "copy"
        # In this process: to start one takes seconds here.
        create(self.path, size * MIB, cluster_size=8192)
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


def store(disk: Disk, kind: str, root: Path, trees: Sequence[Path]) -> tuple[int, dict[str, str]]:
    """Makes a file system with trees in it; returns how many bytes of files, and their digests."""
    run(*MAKE[kind], disk.path)
    with mounted(disk.path, root):
        made = size_of(root)
        run("cp", "-a", *trees, root)
        stored = size_of(root) - made
        expected = checksums(root)
    run(*CHECK[kind], disk.path)
    return stored, expected


def change(disk: Disk, root: Path, trees: Sequence[Path], expected: dict[str, str]) -> dict[str, str]:
    """Writes some of the first tree again, with something else, and deletes and trims the others."""
    with mounted(disk.path, root):
        assert checksums(root) == expected
        for number, path in enumerate(sorted((root / trees[0].name).rglob("*.py"))):
            path.write_bytes(path.read_bytes()[number:] + os.urandom(number))
        for tree in trees[1:]:
            shutil.rmtree(root / tree.name)
        os.sync()
        run("fstrim", "-v", root)
        expected = checksums(root)
    run(*CHECK["ext4"], disk.path)
    return expected


def use(served: Served, trees: Sequence[Path], root: Path) -> dict[str, str]:
    """Stores and changes, and looks at the space that the closed image takes after each; returns what there is."""
    root.mkdir()
    with served.attached() as disk:
        stored, expected = store(disk, "ext4", root, trees)
    fresh = served.occupied()
    with served.attached() as disk:
        expected = change(disk, root, trees, expected)
    trimmed = served.occupied()
    print(
        f"ext4: {stored >> 10} KiB of files; the image has {served.empty >> 10} KiB, {fresh >> 10} KiB with them, "
        f"{trimmed >> 10} KiB when most were deleted and trimmed"
    )
    assert fresh - served.empty < stored * 0.7
    assert trimmed - served.empty < (fresh - served.empty) * 0.7
    return expected


def test_a_small_tree_is_stored_compressed(tmp_path: Path) -> None:
    use(Served(tmp_path, 24), REAL_TREES[2:] + REAL_TREES[1:2], tmp_path / "mounted")


@pytest.mark.judges
def test_a_tree_is_stored_compressed(tmp_path: Path) -> None:
    served, root = Served(tmp_path, 128), tmp_path / "mounted"
    expected = use(served, REAL_TREES, root)
    with served.attached() as disk, mounted(disk.path, root, "-o", "ro"):
        assert checksums(root) == expected


@pytest.mark.judges
@pytest.mark.parametrize(("kind", "size"), [("xfs", 320), ("btrfs", 192)])
def test_other_file_systems(kind: str, size: int, tmp_path: Path) -> None:
    served = Served(tmp_path, size)
    root = tmp_path / "mounted"
    root.mkdir()
    with served.attached() as disk:
        stored, expected = store(disk, kind, root, REAL_TREES)
        # The disk stays in service.
        run(TCMU_RS, "snapshot", "create", f"zstd:{served.path}", "full")
        assert "file_bytes" in run(TCMU_RS, "stats", disk.traces[0].name, "--json")
    assert served.occupied() - served.empty < stored * 0.7
    assert "full" in run("qemu-img", "snapshot", "-l", served.path)
    with served.attached() as disk, mounted(disk.path, root, "-o", "ro"):
        assert checksums(root) == expected
