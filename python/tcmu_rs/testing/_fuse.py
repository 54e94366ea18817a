"""A `Medium` as a file of the kernel, by FUSE: what any code does to the file is recorded.

The protocol is that of `include/uapi/linux/fuse.h`; no library is needed for a mount that is one regular file.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
import struct
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path

from ._medium import Medium

_HEADER = struct.Struct("<IIQQIIII")
_MAX_WRITE = 1 << 20
_FATTR_SIZE = 1 << 3
_KEEP_SIZE, _PUNCH_HOLE, _ZERO_RANGE = 1, 2, 16
_MS_NOSUID_NODEV = 2 | 4
_MNT_DETACH = 2
_FOREVER = 1 << 30

_libc = ctypes.CDLL(None, use_errno=True)


class _Op(IntEnum):
    """Requests of the kernel: `enum fuse_opcode`."""

    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    FLUSH = 25
    INIT = 26
    ACCESS = 34
    INTERRUPT = 36
    DESTROY = 38
    BATCH_FORGET = 42
    FALLOCATE = 43


@contextmanager
def recorded_file(medium: Medium) -> Iterator[Path]:
    """Mounts the medium as a regular file, for handlers whose storage is a path.

    Every `pwrite` reaches the medium before it returns, as does `fdatasync`, `RWF_DSYNC`, `ftruncate` and
    `fallocate`, whichever way they are called. Needs root and /dev/fuse.

    Raises:
        OSError: It cannot be mounted.
    """
    fd = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    try:
        with tempfile.TemporaryDirectory(prefix="tcmu-rs-") as directory:
            path = Path(directory, "medium")
            path.touch()
            options = f"fd={fd},rootmode={stat.S_IFREG:o},user_id=0,group_id=0"
            if _libc.mount(b"tcmu-rs", bytes(path), b"fuse", _MS_NOSUID_NODEV, options.encode()):
                error = ctypes.get_errno()
                raise OSError(error, f"FUSE cannot be mounted: {os.strerror(error)}")
            thread = threading.Thread(target=_serve, args=(fd, medium), name="tcmu_rs.testing.crash", daemon=True)
            thread.start()
            try:
                yield path
            finally:
                _libc.umount2(bytes(path), _MNT_DETACH)
                thread.join()
    finally:
        os.close(fd)


def _serve(fd: int, medium: Medium) -> None:
    """Answers the kernel until the mount is gone."""
    while True:
        try:
            request = os.read(fd, _MAX_WRITE + 65536)
        except OSError as error:
            # ENOENT: the request was interrupted before it was read.
            if error.errno in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                continue
            if error.errno == errno.ENODEV:
                return
            raise
        _, opcode, unique, *_ = _HEADER.unpack_from(request)
        if opcode in (_Op.FORGET, _Op.BATCH_FORGET, _Op.INTERRUPT):
            continue
        status, reply = _answer(opcode, request[_HEADER.size :], medium)
        try:
            os.write(fd, struct.pack("<IiQ", 16 + len(reply), -status, unique) + reply)
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENODEV):
                raise


def _answer(opcode: int, body: bytes, medium: Medium) -> tuple[int, bytes]:
    """Returns an errno and what is behind the header of the answer."""
    match opcode:
        case _Op.INIT:
            big_writes, max_pages = 1 << 5, 1 << 22
            minor, readahead, flags = struct.unpack_from("<4xIII", body)
            head = struct.pack("<IIII", 7, min(minor, 31), readahead, flags & (1 | big_writes | max_pages))
            return 0, head + struct.pack("<HHIIHHI28x", 16, 12, _MAX_WRITE, 1, _MAX_WRITE // 4096, 0, 0)
        case _Op.GETATTR:
            return 0, _attributes(medium)
        case _Op.SETATTR:
            valid, _, _, size = struct.unpack_from("<IIQQ", body)
            if valid & _FATTR_SIZE:
                medium.truncate(size)
            return 0, _attributes(medium)
        case _Op.OPEN:
            return 0, struct.pack("<QII", 1, 0, 0)
        case _Op.READ:
            _, offset, size = struct.unpack_from("<QQI", body)
            return 0, medium.pread(size, offset)
        case _Op.WRITE:
            _, offset, size = struct.unpack_from("<QQI", body)
            return 0, struct.pack("<II", medium.pwrite(body[40 : 40 + size], offset), 0)
        case _Op.FSYNC:
            medium.fdatasync()
            return 0, b""
        case _Op.FALLOCATE:
            _, offset, length, mode = struct.unpack_from("<QQQI", body)
            return _allocate(medium, offset, length, mode), b""
        case _Op.STATFS:
            return 0, struct.pack("<QQQQQIIII24x", 1 << 30, 1 << 29, 1 << 29, 1, 0, 4096, 255, 4096, 0)
        case _Op.RELEASE | _Op.FLUSH | _Op.ACCESS | _Op.DESTROY:
            return 0, b""
    return errno.ENOSYS, b""


def _allocate(medium: Medium, offset: int, length: int, mode: int) -> int:
    if mode & ~(_KEEP_SIZE | _PUNCH_HOLE | _ZERO_RANGE):
        return errno.EOPNOTSUPP
    if not mode & _KEEP_SIZE and offset + length > medium.size:
        medium.truncate(offset + length)
    if mode & (_PUNCH_HOLE | _ZERO_RANGE):
        medium.punch(offset, length)
    return 0


def _attributes(medium: Medium) -> bytes:
    size = medium.size
    times = (0, 0, 0, 0, 0, 0)
    return struct.pack("<QII", _FOREVER, 0, 0) + struct.pack(
        "<QQQQQQIIIIIIIIII", 1, size, -(-size // 512), *times, stat.S_IFREG | 0o600, 1, 0, 0, 0, 4096, 0
    )
