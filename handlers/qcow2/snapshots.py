"""QEMU's internal snapshots: the table of them."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ._errors import Qcow2Error
from .header import Header
from .pages import Pages

_FIXED = struct.Struct(">QIHHIIQII")
_MAX_TABLE = 64 << 20


@dataclass(slots=True)
class Snapshot:
    """A state of the disk that was kept.

    Attributes:
        id: Unique in the image.
        name: For people; not necessarily unique.
        l1_offset: Of its L1 table.
        l1_entries: Of its L1 table.
        seconds: Since 1970, when it was made.
        nanoseconds: The same.
        vm_clock: Nanoseconds that the machine had run.
        vm_state_size: Bytes of the state of a machine that are stored behind the disk.
        disk_size: Bytes.
        extra: More fields, as they are.
    """

    id: str
    name: str
    l1_offset: int
    l1_entries: int
    seconds: int
    nanoseconds: int
    vm_clock: int
    vm_state_size: int
    disk_size: int
    extra: bytes = b""

    def pack(self) -> bytes:
        """Its entry in the table, padded to 8 bytes."""
        # VM state size and disk size in 64 bits: QEMU wants both in version 3.
        extra = struct.pack(">QQ", self.vm_state_size, self.disk_size) + self.extra[16:]
        name, number = (text.encode("utf-8", "surrogateescape") for text in (self.name, self.id))
        small = self.vm_state_size if self.vm_state_size < 1 << 32 else 0
        lengths = (len(number), len(name))
        fixed = _FIXED.pack(
            self.l1_offset, self.l1_entries, *lengths, self.seconds, self.nanoseconds, self.vm_clock, small, len(extra)
        )
        entry = fixed + extra + number + name
        return entry.ljust(-(-len(entry) // 8) * 8, b"\0")


def read_snapshots(pages: Pages, header: Header) -> list[Snapshot]:
    """The snapshots of an image, oldest first.

    Raises:
        Qcow2Error: The table is damaged.
    """
    found = []
    at = header.snapshots_offset
    for _ in range(header.snapshots):
        l1_offset, l1_entries, id_length, name_length, seconds, nanoseconds, clock, small, extra_length = _FIXED.unpack(
            pages.read(at, _FIXED.size)
        )
        total = _FIXED.size + extra_length + id_length + name_length
        if extra_length > 1024 or at + total - header.snapshots_offset > _MAX_TABLE:
            raise Qcow2Error("the snapshot table is damaged")
        rest = pages.read(at + _FIXED.size, total - _FIXED.size)
        extra, number = rest[:extra_length], rest[extra_length : extra_length + id_length]
        name = rest[extra_length + id_length :]
        state_size = struct.unpack_from(">Q", extra)[0] if extra_length >= 8 else small
        disk_size = struct.unpack_from(">Q", extra, 8)[0] if extra_length >= 16 else header.size
        if l1_offset % header.cluster_size or l1_entries < header.l1_needed(disk_size) or l1_entries > 4 << 20:
            raise Qcow2Error(f"the L1 table of snapshot {number!r} cannot be")
        found.append(
            Snapshot(
                number.decode("utf-8", "surrogateescape"),
                name.decode("utf-8", "surrogateescape"),
                l1_offset,
                l1_entries,
                seconds,
                nanoseconds,
                clock,
                state_size,
                disk_size,
                extra,
            )
        )
        at += -(-total // 8) * 8
    return found


def find_snapshot(snapshots: list[Snapshot], which: str) -> Snapshot:
    """The snapshot with an ID, or else a name, as QEMU looks for it.

    Raises:
        Qcow2Error: There is none; the message says which there are.
    """
    for found in snapshots:
        if found.id == which:
            return found
    for found in snapshots:
        if found.name == which:
            return found
    names = ", ".join(f"{one.id} ({one.name})" for one in snapshots) or "none"
    raise Qcow2Error(f"there is no snapshot {which!r}; there are: {names}")
