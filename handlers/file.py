"""A disk in a file, or on a block device: `file:PATH`."""

from __future__ import annotations

import errno
import fcntl
import logging
import mmap
import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from tcmu_rs import BlockHandler, ExtentState, IoVec, Options, blocking, fallocate, fdatasync

if TYPE_CHECKING:
    from typing import Self

logger = logging.getLogger(__name__)

_ZEROES = bytes(1 << 20)
_MAX_EXTENTS = 256

_FALLOC_FL_KEEP_SIZE = 0x01
_FALLOC_FL_PUNCH_HOLE = 0x02
_FALLOC_FL_ZERO_RANGE = 0x10
_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.ENOSYS})


class FileHandler(BlockHandler):
    """Blocks are where they are in the file; what was never written, or was discarded, is a hole.

    The file is locked (`flock`) while it is open: exclusively, or shared when read-only; a block device that is written
    has no other user (`O_EXCL`), such as a file system that is mounted. What the page cache can do is
    done in the event loop, everything else by io_uring or in a few threads.

    Args:
        path: A regular file or a block device.
        size: Bytes. For a new file its size; for one that is there it has to agree.
        create: Make the file if it is not there; needs `size`.
        read_only: Open it for reading only.
        block_size: Bytes of a logical block.
        direct: Go around the page cache (O_DIRECT).

    Raises:
        OSError: From `open`: the path cannot be opened, is locked (EWOULDBLOCK), or a block device in use (EBUSY).
        ValueError: From `open`: it is neither file nor block device, or its size does not fit.
    """

    max_in_flight = 32
    persistent = True
    native_fua = True
    taskless = ("read", "write", "flush")
    fills_reads = True
    discard_zeroes = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        size: int | None = None,
        create: bool = False,
        read_only: bool = False,
        block_size: int = 512,
        direct: bool = False,
    ) -> None:
        self.path = Path(path)
        self.block_size = block_size
        self.read_only = read_only
        self._wanted_size = size
        self._create = create
        self._direct = direct
        self._fd = -1
        self._made = False
        self._sync_failed: OSError | None = None

    @classmethod
    def from_config(cls, config: str, options: Options) -> Self:
        """The text is the path; `-o direct=on` goes around the page cache."""
        if not config:
            raise ValueError("file needs a path: file:/var/tmp/disk.img")
        extra = dict(options.extra)
        direct = extra.pop("direct", "off")
        if extra:
            raise ValueError(f"file knows no option {', '.join(extra)}; it knows direct=on")
        if direct not in ("on", "off"):
            raise ValueError(f"direct is {direct!r}; it is on or off")
        return cls(
            config,
            size=options.size,
            create=options.create,
            read_only=options.read_only,
            block_size=options.block_size or 512,
            direct=direct == "on",
        )

    @classmethod
    def absolute_config(cls, config: str) -> str:
        """The path, made absolute."""
        return str(Path.cwd() / config) if config and not config.startswith("/") else config

    @classmethod
    async def create(cls, config: str, options: Options) -> None:
        """Makes a sparse file, which must not exist yet."""
        handler = cls.from_config(config, options)
        if handler.path.exists():
            raise FileExistsError(errno.EEXIST, "there is such a file already", str(handler.path))
        handler._create = True
        await handler.open()
        made = handler._made
        try:
            await handler.aclose()
        except BaseException:
            if made:
                handler.path.unlink()
            raise
        if not made:
            # Somebody else was faster.
            raise FileExistsError(errno.EEXIST, "there is such a file already", str(handler.path))

    @classmethod
    async def remove(cls, config: str, options: Options) -> bool:
        """Deletes the file that `create` has made."""
        await trio.Path(config).unlink()
        return True

    async def open(self) -> None:
        """Opens and locks the file."""
        fd, made = await trio.to_thread.run_sync(self._open)
        try:
            self.can_discard = not self.read_only and await self._punches(fd)
            self.can_set_size = not self.read_only
        except BaseException:
            self._undo(fd, made)
            raise
        self._fd, self._made = fd, made

    def _undo(self, fd: int, made: bool) -> None:
        os.close(fd)
        if made:
            self.path.unlink()

    def _open(self) -> tuple[int, bool]:
        flags = (os.O_RDONLY if self.read_only else os.O_RDWR) | (os.O_DIRECT if self._direct else 0)
        # O_NONBLOCK means nothing to files and disks; but the opening of a FIFO would wait for its other end.
        flags |= os.O_CLOEXEC | os.O_NONBLOCK
        if not self.read_only and self.path.is_block_device():
            # Who has it mounted heeds no flock.
            flags |= os.O_EXCL
        made = False
        try:
            fd = os.open(self.path, flags)
        except FileNotFoundError:
            if not self._create:
                raise FileNotFoundError(
                    errno.ENOENT, "there is no such file (--create makes one)", str(self.path)
                ) from None
            if self._wanted_size is None:
                raise ValueError(f"{self.path} has to be made: how large? add --size, such as --size 10G") from None
            if self.read_only:
                raise ValueError(
                    f"{self.path} is not there, and cannot be made read-only: it would stay empty"
                ) from None
            fd = os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            made = True
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            raise OSError(
                errno.EBUSY, "is in use: unmount it, or take it out of what it is a part of", str(self.path)
            ) from None
        try:
            self._lock(fd)
            if made:
                assert self._wanted_size is not None
                self._check_size(self._wanted_size)
                os.ftruncate(fd, self._wanted_size)
            self.size = self._size_of(fd)
            self._check_size(self.size)
            if self._wanted_size not in (None, self.size):
                raise ValueError(f"{self.path} has {self.size} bytes, not the {self._wanted_size} that were asked for")
            if self._direct:
                self._check_direct(fd)
            self.can_extents = self._knows_holes(fd)
            os.set_blocking(fd, True)
        except BaseException:
            self._undo(fd, made)
            raise
        return fd, made

    def _lock(self, fd: int) -> None:
        try:
            fcntl.flock(fd, (fcntl.LOCK_SH if self.read_only else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(
                errno.EWOULDBLOCK, "is in use: another server holds its lock", str(self.path)
            ) from None

    def _size_of(self, fd: int) -> int:
        mode = os.fstat(fd).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISBLK(mode)):
            raise ValueError(f"{self.path} is neither a regular file nor a block device")
        # The same for both: a block device's st_size is 0.
        return os.lseek(fd, 0, os.SEEK_END)

    def _check_size(self, size: int) -> None:
        if size <= 0 or size % self.block_size:
            raise ValueError(
                f"{self.path}: {size} bytes are not a whole number of blocks of {self.block_size}; "
                "resize the file (truncate --size) or choose another --block-size"
            )

    def _check_direct(self, fd: int) -> None:
        """Reads the last block, for the storage may want larger pieces than the disk's blocks."""
        with mmap.mmap(-1, self.block_size) as memory:
            try:
                os.preadv(fd, [memory], self.size - self.block_size)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                raise ValueError(
                    f"{self.path} cannot be read around the page cache in blocks of {self.block_size}: "
                    "choose a larger --block-size, or -o direct=off"
                ) from None

    async def _punches(self, fd: int) -> bool:
        """Whether the file system can make holes; asked behind the end, where there is nothing to lose."""
        try:
            await fallocate(fd, _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE, self.size, 1 << 20)
        except OSError as error:
            # A block device has nothing behind its end (EINVAL); it says at the first discard what it can do.
            return error.errno not in _UNSUPPORTED
        return True

    def _knows_holes(self, fd: int) -> bool:
        try:
            os.lseek(fd, 0, os.SEEK_DATA)
        except OSError as error:
            # ENXIO: one hole.
            return error.errno == errno.ENXIO
        return True

    async def aclose(self) -> None:
        """Makes everything durable, then lets go of the file."""
        if self._fd < 0:
            return
        fd, self._fd = self._fd, -1
        try:
            if not self.read_only:
                await fdatasync(fd)
        finally:
            os.close(fd)

    async def read(self, offset: int, iov: IoVec) -> None:
        """Reads into the initiator's memory."""
        await iov.read_from(self._fd, offset)

    async def write(self, offset: int, iov: IoVec, *, fua: bool = False) -> None:
        """Writes from the initiator's memory."""
        try:
            await iov.write_to(self._fd, offset, fua=fua)
        except OSError as error:
            if fua and error.errno == errno.EIO:
                # The kernel has reported the failed write-back with this, whatever it was of: see `flush`.
                self._sync_failed = error
            if error.errno == errno.ENOSPC and self._ends_before(offset + iov.nbytes):
                # What the kernel says of a device that was taken out of the machine. It is not full.
                raise OSError(errno.ENXIO, "the device is gone, or smaller than it was") from error
            raise

    async def flush(self) -> None:
        """Makes what was written durable."""
        if self._sync_failed is not None:
            # The kernel reports a failed write-back once and drops the pages: a later success would be a lie.
            raise OSError(self._sync_failed.errno, f"data was lost by an earlier flush: {self._sync_failed}")
        try:
            await fdatasync(self._fd)
        except OSError as error:
            self._sync_failed = error
            raise

    async def discard(self, offset: int, length: int) -> None:
        """Punches a hole."""
        await self._zero(_FALLOC_FL_PUNCH_HOLE, offset, length)

    async def write_zeroes(self, offset: int, length: int) -> None:
        """Zeroes, and keeps the space."""
        await self._zero(_FALLOC_FL_ZERO_RANGE, offset, length)

    @blocking
    def extents(self, offset: int, length: int) -> list[tuple[int, ExtentState]]:
        """Asks the file system (lseek(2), SEEK_DATA and SEEK_HOLE); zeroes that take space may count as a hole."""
        found: list[tuple[int, ExtentState]] = []
        end = offset + length
        while offset < end and len(found) < _MAX_EXTENTS:
            try:
                data = min(os.lseek(self._fd, offset, os.SEEK_DATA), end)
            except OSError as error:
                # No data from here on.
                if error.errno != errno.ENXIO:
                    raise
                data = end
            if data > offset:
                found.append((data - offset, ExtentState.DEALLOCATED))
            if data < end:
                hole = min(os.lseek(self._fd, data, os.SEEK_HOLE), end)
                found.append((hole - data, ExtentState.MAPPED))
                data = hole
            offset = data
        return found

    @blocking
    def set_size(self, size: int) -> None:
        """Makes the file so large; a block device has to have the size already, for it is others that change it."""
        if stat.S_ISREG(os.fstat(self._fd).st_mode):
            os.ftruncate(self._fd, size)
        elif (found := os.lseek(self._fd, 0, os.SEEK_END)) < size:
            raise ValueError(f"{self.path} has {found} bytes, not {size}: enlarge the block device first")
        self.size = size
        if self._wanted_size is not None:
            self._wanted_size = size
        try:
            os.fsync(self._fd)
        except OSError as error:
            # It may be about data that was written: see `flush`.
            self._sync_failed = error
            raise

    def _ends_before(self, offset: int) -> bool:
        return stat.S_ISBLK(os.fstat(self._fd).st_mode) and os.lseek(self._fd, 0, os.SEEK_END) < offset

    async def _zero(self, mode: int, offset: int, length: int) -> None:
        try:
            await fallocate(self._fd, mode | _FALLOC_FL_KEEP_SIZE, offset, length)
        except OSError as error:
            if error.errno not in _UNSUPPORTED:
                raise
            zeroes = IoVec([_ZEROES])
            for at in range(offset, offset + length, zeroes.nbytes):
                await zeroes.slice(0, min(zeroes.nbytes, offset + length - at)).write_to(self._fd, at)
