"""SCSI commands of the tests' own making, sent through SG_IO."""

from __future__ import annotations

import ctypes
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_SG_IO = 0x2285
_TO_DEVICE, _FROM_DEVICE, _NO_DATA = -2, -3, -1
_SENSE_BYTES = 96

GOOD, CHECK_CONDITION = 0x00, 0x02

CONTROL_PAGE = bytes([0x0A, 10, 0x02, 0x10, 0, 0x40, 0, 0, 0xFF, 0xFF, 0, 0])
"""The control mode page of an emulated disk with its defaults."""

Triple = tuple[int, int, int]


class _Header(ctypes.Structure):
    _fields_ = [
        ("interface_id", ctypes.c_int),
        ("direction", ctypes.c_int),
        ("cmd_len", ctypes.c_ubyte),
        ("mx_sb_len", ctypes.c_ubyte),
        ("iovec_count", ctypes.c_ushort),
        ("dxfer_len", ctypes.c_uint),
        ("dxferp", ctypes.c_void_p),
        ("cmdp", ctypes.c_void_p),
        ("sbp", ctypes.c_void_p),
        ("timeout", ctypes.c_uint),
        ("flags", ctypes.c_uint),
        ("pack_id", ctypes.c_int),
        ("usr_ptr", ctypes.c_void_p),
        ("status", ctypes.c_ubyte),
        ("masked_status", ctypes.c_ubyte),
        ("msg_status", ctypes.c_ubyte),
        ("sb_len_wr", ctypes.c_ubyte),
        ("host_status", ctypes.c_ushort),
        ("driver_status", ctypes.c_ushort),
        ("resid", ctypes.c_int),
        ("duration", ctypes.c_uint),
        ("info", ctypes.c_uint),
    ]


@dataclass(frozen=True)
class Answer:
    """What came back.

    Attributes:
        status: SCSI status.
        sense: Sense data, empty without a CHECK CONDITION.
        data: The Data-In, without what the residual says is missing.
        memory: All of the Data-In buffer as it was found afterwards.
        residual: Bytes of the buffer that were not transferred.
        host: The host's and driver's own status: 0 if the transport did its work.
    """

    status: int
    sense: bytes
    data: bytes
    memory: bytes
    residual: int
    host: int

    @property
    def triple(self) -> Triple:
        """Sense key, ASC and ASCQ; zeroes without sense data."""
        if not self.sense:
            return 0, 0, 0
        if self.sense[0] & 0x7F >= 0x72:
            return self.sense[1] & 0x0F, self.sense[2], self.sense[3]
        return self.sense[2] & 0x0F, self.sense[12], self.sense[13]

    def __str__(self) -> str:
        if self.host:
            return f"host {self.host:#x}"
        if self.status == GOOD:
            return f"GOOD, {len(self.data)} bytes"
        return f"status {self.status:#04x}, {'{:x}/{:02x}/{:02x}'.format(*self.triple)}, {len(self.data)} bytes"


class Unit:
    """A SCSI device that is open for commands."""

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def send(
        self, cdb: bytes, *, data_in: int = 0, data_out: bytes = b"", fill: int = 0, timeout: float = 60.0
    ) -> Answer:
        """Sends a command and waits for its answer.

        Args:
            cdb: The command.
            data_in: Size of the buffer for Data-In.
            data_out: The Data-Out; a command has one of both.
            fill: What the buffer for Data-In is filled with before.
            timeout: Seconds after which the host gives up and resets the unit.
        """
        size = data_in or len(data_out)
        # Bounced by the kernel if it is not aligned; a buffer of its own each time, so that nothing is left in it.
        buffer: Any = ctypes.create_string_buffer(data_out or bytes([fill]) * size, size or 1)
        command: Any = ctypes.create_string_buffer(cdb, len(cdb))
        sense: Any = ctypes.create_string_buffer(_SENSE_BYTES)
        header = _Header(
            interface_id=ord("S"),
            direction=_TO_DEVICE if data_out else _FROM_DEVICE if data_in else _NO_DATA,
            cmd_len=len(cdb),
            mx_sb_len=_SENSE_BYTES,
            dxfer_len=size,
            dxferp=ctypes.addressof(buffer) if size else None,
            cmdp=ctypes.addressof(command),
            sbp=ctypes.addressof(sense),
            timeout=int(timeout * 1000),
        )
        fcntl.ioctl(self.fd, _SG_IO, header)
        memory = buffer.raw if data_in else b""
        return Answer(
            status=header.status,
            sense=sense.raw[: header.sb_len_wr],
            data=memory[: max(0, len(memory) - header.resid)],
            memory=memory,
            residual=header.resid,
            # A "driver status" of 8 only says that there is sense data.
            host=header.host_status | (header.driver_status & ~0x08) << 16,
        )

    def good(self, cdb: bytes, *, data_in: int = 0, data_out: bytes = b"") -> bytes:
        """Sends a command that has to end with GOOD, and returns its data."""
        answer = self.send(cdb, data_in=data_in, data_out=data_out)
        assert (answer.host, answer.status) == (0, GOOD), f"{cdb.hex(' ')}: {answer}"
        return answer.data

    def settle(self) -> None:
        """Takes the unit attentions that wait for this initiator."""
        while self.send(bytes(6)).triple[0] == 6:
            pass


@contextmanager
def opened(path: str) -> Iterator[Unit]:
    """Opens a disk for commands."""
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        yield Unit(fd)
    finally:
        os.close(fd)


def name_by_number(path: str) -> None:
    """Gives a disk the name by which sg_xcopy looks for it, as udev would."""
    number = Path(path).stat().st_rdev
    link = Path(f"/dev/block/{os.major(number)}:{os.minor(number)}")
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(path)


def cdb(*parts: int | tuple[int, int]) -> bytes:
    """Builds a CDB from bytes and from pairs of a value and its number of bytes."""
    return b"".join(bytes([part]) if isinstance(part, int) else part[0].to_bytes(part[1], "big") for part in parts)
