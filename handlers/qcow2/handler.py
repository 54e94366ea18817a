"""The disk: an image, served."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import trio

from tcmu_rs import BlockHandler, ExtentState, IoVec, Options

from . import tools
from .chain import open_image
from .image import Image, Kind
from .pages import Cold
from .storage import Storage

if TYPE_CHECKING:
    from typing import Self

_PATIENCE = 64
"""How often a read is tried again after what it lacked was brought into memory."""
_MAX_EXTENTS = 256


class Qcow2Handler(BlockHandler):
    """Serves an image in the format of QEMU, version 2 or 3.

    Args:
        path: Of the image.
        compress: Write compressed clusters.
        level: Of compression; 1 if not given.
        snapshot: ID or name of an internal snapshot to serve instead, read-only.
        backing_root: Directory in which the files have to be that the image names; its own if not given.
        read_only: Refuse writes, and open the file for reading only.
        block_size: Bytes of a logical block.
        size: Bytes that the disk has to have.
        storage: Opens the files: called with a path and the keyword `writable`.

    Raises:
        Qcow2Error: From `open`: it is no image, damaged, not supported, or names what it must not.
        OSError: From `open`: a file cannot be opened, or is in use (EWOULDBLOCK).
    """

    max_in_flight = 32
    fills_reads = True
    discard_zeroes = True

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        compress: bool = False,
        level: int | None = None,
        snapshot: str | None = None,
        backing_root: str | os.PathLike[str] | None = None,
        read_only: bool = False,
        block_size: int = 512,
        size: int | None = None,
        storage: Callable[..., Storage] = Storage,
    ) -> None:
        self.path = Path(path)
        self.block_size = block_size
        self.read_only = read_only or snapshot is not None
        self._compress = compress
        self._level = level
        self._snapshot = snapshot
        self._backing_root = backing_root
        self._wanted_size = size
        self._storage = storage
        self._image: Image | None = None

    @classmethod
    def from_config(cls, config: str, options: Options) -> Self:
        """The text is the path.

        `-o snapshot=NAME` serves an internal snapshot, `-o backing-root=DIR` says where backing files may be.
        """
        _check_path(config)
        if options.create:
            raise ValueError(f"make the image first: tcmu-rs create qcow2:{config} --size SIZE")
        extra = dict(options.extra)
        handler = cls(
            config,
            snapshot=extra.pop("snapshot", None),
            backing_root=extra.pop("backing-root", None),
            read_only=options.read_only,
            block_size=options.block_size or 512,
            size=options.size,
        )
        if extra:
            raise ValueError(f"qcow2 knows no option {', '.join(extra)}; it knows snapshot and backing-root")
        return handler

    @classmethod
    async def create(cls, config: str, options: Options) -> None:
        """Makes an empty image."""
        _check_path(config)
        await trio.to_thread.run_sync(lambda: tools.create(config, options.size))

    async def open(self) -> None:
        """Opens the image and what is below it."""
        image = await trio.to_thread.run_sync(
            lambda: open_image(
                self.path,
                writable=not self.read_only,
                snapshot=self._snapshot,
                root=self._backing_root,
                storage=self._storage,
            )
        )
        try:
            if self._wanted_size not in (None, image.size):
                raise ValueError(f"{self.path} has {image.size} bytes, not the {self._wanted_size} that were asked for")
            image.block_size = self.block_size
            self.size = image.size
        except BaseException:
            image.close()
            raise
        self._image = image

    async def aclose(self) -> None:
        """Closes all files."""
        image, self._image = self._image, None
        if image is not None:
            image.close()

    async def read(self, offset: int, iov: IoVec) -> None:
        """Reads; waits only for what is not in memory."""
        image = self._image
        assert image is not None
        for _ in range(_PATIENCE):
            try:
                image.read(offset, iov, wait=False)
                return
            except Cold as cold:
                await trio.to_thread.run_sync(cold.warm)
        image.read(offset, iov, wait=True)

    async def extents(self, offset: int, length: int) -> list[tuple[int, ExtentState]]:
        """What has storage in this image; what is below it has not."""
        image = self._image
        assert image is not None
        found: list[tuple[int, ExtentState]] = []
        stop = min(length, _MAX_EXTENTS * image.header.cluster_size)
        for extent in image.extents(offset, stop):
            zero = extent.kind == Kind.ZERO or (extent.kind == Kind.UNALLOCATED and image.backing is None)
            found.append((extent.length, ExtentState.DEALLOCATED if zero else ExtentState.MAPPED))
        return found


class ZstdHandler(Qcow2Handler):
    """Serves an image whose clusters are written compressed with zstd."""


def _check_path(config: str) -> None:
    if not config:
        raise ValueError("qcow2 needs a path: qcow2:/var/tmp/disk.qcow2")
