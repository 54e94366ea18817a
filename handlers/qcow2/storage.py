"""The one way to a file: what the engine does to an image it does through a `Storage`."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import trio

from tcmu_rs import IoVec, fdatasync

Buffer = bytes | bytearray | memoryview
_IOV_MAX = os.sysconf("SC_IOV_MAX")

_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02
_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_longlong, ctypes.c_longlong]
_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS, errno.ENODEV})

# QEMU locks single bytes of an image: 100 + n for each permission that it uses, 200 + n for each that it does not leave
# to others (QEMU block/file-posix.c). Consistent read, write, resize.
_USED, _REFUSED = 100, 200
_READ, _WRITE, _RESIZE = 0, 1, 3


class Storage:
    """A file, or a block device. Methods that are no coroutines block, and any thread may call them.

    Args:
        path: What to open.
        writable: Open it for writing, and keep others from it; else share it with other readers.

    Raises:
        OSError: It cannot be opened, or is in use (EWOULDBLOCK).
    """

    def __init__(self, path: str | os.PathLike[str], *, writable: bool) -> None:
        self.path = Path(path)
        self.writable = writable
        # O_NONBLOCK means nothing to files; but the opening of a FIFO would wait for its other end.
        self._fd = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            mode = os.fstat(self._fd).st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
                raise OSError(errno.EINVAL, "is neither a regular file nor a block device", str(path))
            self._lock()
        except BaseException:
            os.close(self._fd)
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._fd, (fcntl.LOCK_EX if self.writable else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            used = (_READ, _WRITE, _RESIZE) if self.writable else (_READ,)
            for number in used:
                self._lock_byte(_USED + number)
            for number in (_WRITE, _RESIZE):
                self._lock_byte(_REFUSED + number)
            for start, numbers in ((_REFUSED, used), (_USED, (_WRITE, _RESIZE))):
                for number in numbers:
                    self._check_byte(start + number)
        except BlockingIOError:
            raise BlockingIOError(
                errno.EWOULDBLOCK, "is in use: another program holds its lock", str(self.path)
            ) from None

    def _lock_byte(self, at: int) -> None:
        fcntl.fcntl(self._fd, fcntl.F_OFD_SETLK, _flock(fcntl.F_RDLCK, at))

    def _check_byte(self, at: int) -> None:
        """Whether another holds a byte: a lock for writing, that is only asked for, would fail."""
        found = fcntl.fcntl(self._fd, fcntl.F_OFD_GETLK, _flock(fcntl.F_WRLCK, at))
        if struct.unpack_from("=h", found)[0] != fcntl.F_UNLCK:
            raise BlockingIOError

    def close(self) -> None:
        """Lets go of the file."""
        os.close(self._fd)

    def fileno(self) -> int:
        """The descriptor, for what reads by itself."""
        return self._fd

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return os.lseek(self._fd, 0, os.SEEK_END)

    @property
    def allocated(self) -> int:
        """Bytes that it takes from the file system."""
        return os.fstat(self._fd).st_blocks * 512

    def preadv(self, offset: int, views: Sequence[Any], *, wait: bool = True) -> int:
        """Fills the views from a byte offset on; returns how many bytes there were up to the end of the file.

        Raises:
            BlockingIOError: With `wait` False: it would have to wait for the disk.
        """
        if not wait:
            try:
                return os.preadv(self._fd, views, offset, os.RWF_NOWAIT)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
        if len(views) == 1:
            done = os.preadv(self._fd, views, offset)
            if not done or done == len(views[0]):
                return done
        else:
            done = 0
        return done + self._transfer(os.preadv, offset + done, views, done)

    def pread(self, offset: int, length: int, *, wait: bool = True) -> bytes:
        """The same, as bytes; fewer at the end of the file.

        Raises:
            BlockingIOError: With `wait` False: it would have to wait for the disk.
        """
        buffer = bytearray(length)
        done = self.preadv(offset, [buffer], wait=wait)
        while not wait and 0 < done < length:
            # The rest is not in memory, or is not there.
            step = self.preadv(offset + done, [memoryview(buffer)[done:]], wait=False)
            if not step:
                break
            done += step
        return bytes(memoryview(buffer)[:done])

    def pwrite(self, offset: int, views: Sequence[Any]) -> None:
        """Writes all of the views from a byte offset on."""
        self._transfer(os.pwritev, offset, views, 0)

    def _transfer(self, call: Callable[..., int], offset: int, views: Sequence[Any], done: int) -> int:
        """Calls until everything is transferred, or nothing more is there. `done` bytes of the views were before."""
        moved = 0
        rest: list[memoryview] = []
        for view in views:
            if done < len(view):
                rest.append(memoryview(view)[done:])
            done = max(0, done - len(view))
        while rest:
            step = call(self._fd, rest[:_IOV_MAX], offset + moved)
            if not step:
                break
            moved += step
            while rest and step >= len(rest[0]):
                step -= len(rest.pop(0))
            if step:
                rest[0] = rest[0][step:]
        return moved

    def fdatasync(self) -> None:
        """Makes all that was written durable, and the size."""
        os.fdatasync(self._fd)

    async def sync(self) -> None:
        """The same, without a thread of Python's."""
        await fdatasync(self._fd)

    async def commit(self, offset: int, data: bytes, *, everything: bool) -> None:
        """Writes, and makes that durable: alone (RWF_DSYNC), or with `everything` that was written before."""
        if everything:
            await trio.to_thread.run_sync(self._commit_everything, offset, data)
        else:
            await IoVec([data]).write_to(self._fd, offset, fua=True)

    def _commit_everything(self, offset: int, data: bytes) -> None:
        self.pwrite(offset, [data])
        self.fdatasync()

    def truncate(self, size: int) -> None:
        """Sets the size."""
        if stat.S_ISREG(os.fstat(self._fd).st_mode):
            os.ftruncate(self._fd, size)

    def punch(self, offset: int, length: int) -> bool:
        """Gives space back; the range reads as zeroes. False if the file system cannot."""
        return self._fallocate(_FALLOC_FL_PUNCH_HOLE, offset, length)

    def allocate(self, offset: int, length: int) -> bool:
        """Reserves space, also behind the end, so that writing there cannot fail for want of it.

        Returns:
            False if the file system cannot reserve.

        Raises:
            OSError: There is no more (ENOSPC, EDQUOT, EFBIG).
        """
        return self._fallocate(0, offset, length)

    def _fallocate(self, mode: int, offset: int, length: int) -> bool:
        while _libc.fallocate(self._fd, mode | _FALLOC_FL_KEEP_SIZE, offset, length):
            error = ctypes.get_errno()
            if error in _UNSUPPORTED:
                return False
            if error != errno.EINTR:
                raise OSError(error, os.strerror(error), str(self.path))
        return True


def _flock(kind: int, start: int) -> bytes:
    """struct flock of 64-bit Linux, for one byte."""
    return struct.pack("=hh4xqqi4x", kind, os.SEEK_SET, start, 1, 0)
