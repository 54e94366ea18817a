"""Writing an initramfs: the cpio archive that Linux unpacks into its first root file system.

The kernel accepts several archives in a row, so the part that is the same for each boot is built once and
the job of one boot is appended to it.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from typing import NamedTuple


class Entry(NamedTuple):
    """A file in an initramfs. Directories have to come before what they contain."""

    name: str
    mode: int
    data: bytes = b""

    @classmethod
    def directory(cls, name: str) -> Entry:
        """An empty directory."""
        return cls(name, stat.S_IFDIR | 0o755)

    @classmethod
    def file(cls, name: str, data: bytes, *, executable: bool = False) -> Entry:
        """A regular file."""
        return cls(name, stat.S_IFREG | (0o755 if executable else 0o644), data)

    @classmethod
    def link(cls, name: str, target: str) -> Entry:
        """A symbolic link."""
        return cls(name, stat.S_IFLNK | 0o777, target.encode())


def archive(entries: Iterable[Entry]) -> bytes:
    """Pack `entries` in cpio's "newc" format (Documentation/driver-api/early-userspace/buffer-format.rst)."""
    packed = bytearray()
    for inode, entry in enumerate([*entries, Entry("TRAILER!!!", 0)], start=1):
        name = entry.name.encode() + b"\0"
        links = 2 if stat.S_ISDIR(entry.mode) else 1
        # inode, mode, uid, gid, links, mtime, size, two numbers each of dev and rdev, name's size, checksum
        fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, 0, 0, len(name), 0)
        packed += b"070701" + b"".join(b"%08x" % field for field in fields) + name
        packed += bytes(-len(packed) % 4)
        packed += entry.data
        packed += bytes(-len(packed) % 4)
    return bytes(packed)
