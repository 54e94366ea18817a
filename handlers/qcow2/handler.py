"""The disk: an image, served."""

from __future__ import annotations

import errno
import functools
import os
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from tcmu_rs import BlockHandler, ExtentState, IoVec, Options, WriteProtected

from . import offline, tools
from ._errors import Qcow2Error
from .branching import Branching
from .chain import is_encrypted, open_image
from .compaction import RATE
from .header import LEVELS
from .image import Image, Kind
from .pages import Cold
from .snapshots import read_snapshots
from .storage import Storage
from .tools import COMPRESSIONS
from .writer import CACHE, IDLE, Writer

if TYPE_CHECKING:
    from typing import Self

    from tcmu_rs.handlers.luks.keys import KeyProvider
    from tcmu_rs.handlers.luks.volume import NewContainer

    from .payload import Cipher

_PATIENCE = 64
"""How often a read is tried again after what it lacked was brought into memory, or what it read was moved."""
_MAX_EXTENTS = 256
_KEYS = "key-file, passphrase-fd, credential"
"""Options that say where a passphrase is."""


class Qcow2Handler(BlockHandler):
    """Serves an image in the format of QEMU, version 2 or 3.

    Args:
        path: Of the image.
        compress: Write compressed clusters.
        level: Of compression; if not given that with which the image was made, or 2 of zstd and 1 of zlib.
        snapshot: ID or name of an internal snapshot to serve instead, read-only.
        backing_root: Directory in which the files have to be that the image names; its own if not given.
        read_only: Refuse writes, and open the file for reading only.
        block_size: Bytes of a logical block.
        size: Bytes that the disk has to have.
        storage: Opens the files: called with a path and the keyword `writable`.
        cache_size: Bytes of dirty clusters that are kept in memory.
        log_size: Bytes of the log, while the image is open; by default it goes with the size of the disk.
        idle: Seconds without a write after which everything is written back; None for never.
        compaction: Bytes of clusters that are moved in a second while the disk is idle, to give back space; 0 for none.
        key_provider: Called at `open` for each image that is encrypted with LUKS, with the UUID, for the passphrase. An
            `async def`, or a plain function, which is called in a thread. A `bytearray` that it returns is wiped.

    Attributes:
        was_replayed: `open` found a log, of an image that was not closed, and has replayed it.

    Raises:
        Qcow2Error: From `open`: it is no image, damaged, not supported, or names what it must not.
        LuksError: From `open`: a LUKS header is damaged, or asks for what is not supported.
        WrongPassphraseError: From `open`: the passphrase opens no keyslot.
        OSError: From `open`: a file cannot be opened, or is in use (EWOULDBLOCK).
    """

    _name = "qcow2"
    _compresses = False
    _cluster_size = 64 << 10

    max_in_flight = 32
    taskless = ("read", "flush")
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
        cache_size: int = CACHE,
        log_size: int | None = None,
        idle: float | None = IDLE,
        compaction: int = RATE,
        key_provider: KeyProvider | None = None,
    ) -> None:
        self.path = Path(path)
        self.block_size = block_size
        self.read_only = read_only or snapshot is not None
        self._compress = compress
        self._level = level
        self._snapshot = snapshot
        self._backing_root = backing_root
        self._key_provider = key_provider
        self._unlocked: dict[str, Cipher] = {}
        self._wanted_size = size
        self._storage = storage
        self._writing: dict[str, Any] = {
            "cache_size": cache_size,
            "log_size": log_size,
            "idle": idle,
            "compaction": compaction,
        }
        self._image: Image | None = None
        self._writer: Writer | None = None
        self.was_replayed = False

    @classmethod
    def from_config(cls, config: str, options: Options) -> Self:
        """The text is the path.

        `-o snapshot=NAME` serves an internal snapshot, read-only. `-o backing-root=DIR` says where backing files may
        be. `-o compression=on` writes compressed clusters, and `off` plain ones; `-o level=N` says how hard it tries.
        `-o compaction=SIZE` says how much is moved in a second, while nobody reads or writes, to give back space (8M; 0
        for nothing).
        The passphrase of an encrypted image comes from `-o key-file=PATH`, `-o passphrase-fd=N`, `-o credential=NAME`
        or the person at the terminal; the encrypted images of a chain have the same.
        """
        cls._check_path(config)
        if options.create:
            raise ValueError(f"make the image first: tcmu-rs create {cls._name}:{config} --size SIZE")
        extra = dict(options.extra)
        handler = cls(
            config,
            compress=_switch(extra, "compression", cls._compresses),
            level=_number(extra, "level"),
            snapshot=extra.pop("snapshot", None),
            backing_root=extra.pop("backing-root", None),
            read_only=options.read_only,
            block_size=options.block_size or 512,
            size=options.size,
            compaction=RATE if (rate := _size(extra, "compaction")) is None else rate,
            key_provider=cls._keys(config, extra, options, ask=options.interactive),
        )
        cls._check_options(extra, f"snapshot, backing-root, compression, level, compaction, {_KEYS}")
        return handler

    @classmethod
    def absolute_config(cls, config: str) -> str:
        """The path, made absolute."""
        return str(Path.cwd() / config) if config and not config.startswith("/") else config

    @classmethod
    async def create(cls, config: str, options: Options) -> Self:
        """Makes an empty image.

        Options are `cluster-size`, `refcount-bits`, `backing=NAME` and `backing-format=qcow2|raw`; the size is that of
        the backing file if none is given. `level=N` says how hard whoever writes it is to compress (2). `encrypt=on`
        encrypts it with LUKS, by the passphrase that `key-file=PATH` and so on give; `iter-time=MS` says how long one
        guess of it shall take here (1500).
        """
        cls._check_path(config)
        extra = dict(options.extra)
        if _switch(extra, "encrypt", False):
            return await cls._create_encrypted(config, options, extra)
        return await cls._create(config, options, extra, None)

    @classmethod
    async def _create(
        cls, config: str, options: Options, extra: dict[str, str], encryption: NewContainer | None
    ) -> Self:
        # It stays among the options, too: they are for the image when it is used.
        level = _number(dict(extra), "level")
        make = functools.partial(
            tools.create,
            config,
            options.size,
            cluster_size=_size(extra, "cluster-size") or cls._cluster_size,
            refcount_bits=_number(extra, "refcount-bits") or 16,
            backing=extra.pop("backing", None),
            backing_format=extra.pop("backing-format", None),
            encryption=encryption,
            level=level,
        )
        later = ("backing-root", "compression", "level", "compaction")
        unknown = {key: value for key, value in extra.items() if key not in later}
        cls._check_options(
            unknown, f"cluster-size, refcount-bits, backing, backing-format, encrypt, {', '.join(later)}"
        )
        # Those are for the image when it is used: `copy --create` goes on with it.
        handler = cls.from_config(config, replace(options, size=None, create=False, extra=extra))
        await trio.to_thread.run_sync(make)
        return handler

    @classmethod
    async def _create_encrypted(cls, config: str, options: Options, extra: dict[str, str]) -> Self:
        from tcmu_rs.handlers.luks import keys

        from .encryption import make_encryption

        if cls._compresses:
            raise ValueError("compressed clusters would not be encrypted: make it with qcow2:PATH")
        milliseconds = _number(extra, "iter-time") or 1500
        (source,) = keys.take_sources(extra, config, interactive=options.interactive, new=True)

        def prepare() -> tuple[bytes, Any]:
            keys.forbid_core_dumps()
            passphrase = bytes(source())
            return passphrase, make_encryption([passphrase], seconds=milliseconds / 1000)

        if await trio.Path(config).exists():
            raise FileExistsError(errno.EEXIST, "there is such a file already", config)
        passphrase, encryption = await trio.to_thread.run_sync(prepare, abandon_on_cancel=True)
        handler = await cls._create(config, options, extra, encryption)
        # The same person is not asked again.
        handler._key_provider = lambda _: bytearray(passphrase)
        return handler

    @classmethod
    async def remove(cls, config: str, options: Options) -> bool:
        """Deletes the image that `create` has made."""
        await trio.Path(config).unlink()
        return True

    @classmethod
    async def info(cls, config: str, options: Options) -> dict[str, Any]:
        """What the header says (`tcmu-rs info`)."""
        where = cls._where(config, options)

        def describe() -> dict[str, Any]:
            image = open_image(config, writable=False, **where)
            try:
                return offline.describe(image)
            finally:
                image.close()

        return await trio.to_thread.run_sync(describe)

    @classmethod
    async def check(
        cls, config: str, options: Options, *, repair: bool = False, progress: Callable[[float], None] | None = None
    ) -> dict[str, Any]:
        """Looks through all of the image, and reads every compressed cluster (`tcmu-rs check`).

        `repair` replays the log of an image that was not closed. What is damaged otherwise is for `qemu-img check -r`.

        Returns:
            `ok`, `problems` that were found, and `repaired`: whether something was mended.
        """
        where = cls._where(config, options)
        repaired = False
        if repair:
            async with cls(config, backing_root=where["root"], key_provider=where["keys"]) as handler:
                repaired = handler.was_replayed
        problems = await trio.to_thread.run_sync(lambda: offline.check_image(config, progress, **where))
        return {"ok": not problems, "problems": problems, "repaired": repaired}

    @classmethod
    async def resize(cls, config: str, options: Options, *, size: int, shrink: bool = False) -> None:
        """Changes the size of the disk (`tcmu-rs resize`)."""
        await offline.resize(config, size, shrink=shrink, **cls._where(config, options))

    @classmethod
    async def compact(
        cls, config: str, options: Options, *, progress: Callable[[float], None] | None = None
    ) -> dict[str, Any]:
        """Writes the image anew, as small as it can be (`tcmu-rs compact`): `before` and `after` in bytes."""
        before, after = await offline.compact(config, progress, **cls._where(config, options))
        return {"before": before, "after": after}

    @classmethod
    async def snapshots(cls, config: str, options: Options) -> list[dict[str, Any]]:
        """The snapshots in the image, the oldest first (`tcmu-rs snapshot list`)."""
        where = cls._where(config, options)

        def find() -> list[dict[str, Any]]:
            image = open_image(config, writable=False, **where)
            try:
                return [
                    {"id": one.id, "name": one.name, "time": one.seconds, "size": one.disk_size}
                    for one in read_snapshots(image.pages, image.header)
                ]
            finally:
                image.close()

        return await trio.to_thread.run_sync(find)

    @classmethod
    async def snapshot(cls, config: str, options: Options, *, action: str, name: str) -> None:
        """Makes (`create`), takes back (`apply`) or deletes a snapshot, as `qemu-img snapshot` does."""
        await offline.change_map(config, _change(action, name), **cls._where(config, options))

    @classmethod
    def _where(cls, config: str, options: Options) -> dict[str, Any]:
        """Options that say where files may be; those of serving may stay on the command line."""
        cls._check_path(config)
        extra = dict(options.extra)
        where = {
            "root": extra.pop("backing-root", None),
            "keys": cls._keys(config, extra, options, ask=False),
            "locked": True,
        }
        for name in ("snapshot", "compression", "level", "compaction"):
            extra.pop(name, None)
        cls._check_options(extra, f"backing-root, {_KEYS}")
        return where

    @classmethod
    def _keys(cls, config: str, extra: dict[str, str], options: Options, *, ask: bool) -> KeyProvider | None:
        """Takes out of the options what says where the passphrase is."""
        if not extra.keys() & set(_KEYS.split(", ")) and not (ask and is_encrypted(config)):
            return None
        from tcmu_rs.handlers.luks import keys

        (source,) = keys.take_sources(extra, config, interactive=options.interactive)
        return lambda _: source()

    @classmethod
    def _check_path(cls, config: str) -> None:
        if not config:
            raise ValueError(f"{cls._name} needs a path: {cls._name}:/var/tmp/disk.qcow2")

    @classmethod
    def _check_options(cls, extra: dict[str, str], known: str) -> None:
        if extra:
            raise ValueError(f"{cls._name} knows no option {', '.join(extra)}; it knows {known}")

    async def open(self) -> None:
        """Opens the image and what is below it."""
        image = await trio.to_thread.run_sync(
            lambda: open_image(
                self.path,
                writable=not self.read_only,
                snapshot=self._snapshot,
                root=self._backing_root,
                storage=self._storage,
                keys=self._key_provider,
                unlocked=self._unlocked,
            )
        )
        writer = None
        try:
            if self._wanted_size not in (None, image.size):
                raise ValueError(f"{self.path} has {image.size} bytes, not the {self._wanted_size} that were asked for")
            if self._key_provider is not None and not image.is_encrypted:
                raise Qcow2Error(f"{self.path} is not encrypted: its data would be readable by all; leave the key out")
            image.block_size = self.block_size
            hardest = LEVELS[image.header.compression_name()]
            if self._level is not None and not 1 <= self._level <= hardest:
                raise ValueError(f"level is {self._level}; for {image.header.compression_name()} it is 1 to {hardest}")
            if self._level is not None:
                image.codec = image.codec.at_level(self._level)
            if not self.read_only:
                self._check_compression(image)
                writer = Writer(image, compress=self._compress, chain=image.chain, **self._writing)
                if image.chain is not None:
                    await writer.recover()
                    self.was_replayed = True
        except BaseException:
            image.close()
            raise
        self.size = image.size
        # Not encrypted ones: opening them again may ask a person, while initiators wait.
        self.can_set_size = self.can_change_snapshots = not self.read_only
        self.physical_block_size = max(self.block_size, min(4096, image.header.cluster_size))
        self.discard_granularity = image.header.cluster_size
        self._image, self._writer = image, writer

    def _check_compression(self, image: Image) -> None:
        """Refuses to write with what the handler is not named after."""
        if self._compresses and self._compress and image.header.compression_type != COMPRESSIONS["zstd"]:
            raise Qcow2Error(
                f"{self.path} is of compression type {image.header.compression_name()}, and what is written would be, "
                "too: slower, and without checksums. Make one of zstd (tcmu-rs create, then copy), or attach "
                f"qcow2:{self.path} with -o compression=on"
            )

    async def set_size(self, size: int) -> None:
        """Changes the map while the image is closed, for its log goes with its size."""
        await self._while_closed(functools.partial(offline.resize, self.path, size, shrink=True))

    async def change_snapshots(self, action: str, name: str) -> None:
        """Makes or deletes a snapshot while the image is closed: all of the map is in one record of the log."""
        await self._while_closed(functools.partial(offline.change_map, self.path, _change(action, name)))

    async def _while_closed(self, change: Callable[..., Awaitable[None]]) -> None:
        """Closes the image, calls something that opens it itself, and opens it again."""
        assert self._image is not None
        self._unlocked = self._image.ciphers()
        await self.aclose()
        try:
            await change(root=self._backing_root, storage=self._storage, unlocked=self._unlocked)
        finally:
            wanted, self._wanted_size = self._wanted_size, None
            try:
                await self.open()
            finally:
                self._unlocked = {}
            if wanted is not None:
                self._wanted_size = self.size

    async def aclose(self) -> None:
        """Writes everything back, takes the log out of the image, and closes all files.

        Raises:
            OSError: Not everything could be made durable. The log stays, and is replayed at the next open.
        """
        image, self._image = self._image, None
        writer, self._writer = self._writer, None
        if image is None:
            return
        try:
            if writer is not None:
                await writer.close()
        finally:
            image.close()

    async def read(self, offset: int, iov: IoVec) -> None:
        """Reads; waits only for what is not in memory."""
        image = self._image
        assert image is not None
        image.reads += 1
        for _ in range(_PATIENCE):
            try:
                if await image.finish(image.begin(offset, iov)):
                    return
            except Cold as cold:
                await trio.to_thread.run_sync(cold.warm)
        image.read(offset, iov, wait=True)

    async def write(self, offset: int, iov: IoVec) -> None:
        """Stores in memory, or in place; durable after the next flush."""
        await self._writing_to().write(offset, iov)

    async def flush(self) -> None:
        """Makes durable what was written."""
        if self._writer is not None:
            await self._writer.flush()

    async def discard(self, offset: int, length: int) -> None:
        """Makes zeroes of it, and frees the clusters that are in it."""
        await self._writing_to().write_zeroes(offset, length)

    async def write_zeroes(self, offset: int, length: int) -> None:
        """The same."""
        await self._writing_to().write_zeroes(offset, length)

    def statistics(self) -> dict[str, float]:
        """Numbers since the image was opened; only `file_bytes` until something is written.

        `file_bytes`: what the file takes, and `reserved_bytes` behind its end for what is dirty. `free_bytes`: holes in
        it that will be used again. `dirty_bytes`: clusters that are newer in memory. `log_bytes`, `log_used_bytes`: of
        a half of the log. `cache_hits`, `cache_misses`: writes that found their cluster in memory, or not. `destaged`:
        clusters written back. `compressed_bytes`, `stored_bytes`: before and after compression, and their `ratio`.
        `in_place`: writes to plain clusters where they are. `commits`: records of the log. `checkpoints`.
        `compactions`: passes over the map while the disk was idle, and `moved`: clusters that they have moved.
        """
        if self._image is None:
            return {}
        written = {} if self._writer is None else self._writer.statistics()
        taken = self._image.storage.allocated - written.get("reserved_bytes", 0)
        return {"file_bytes": taken, **written}

    def _writing_to(self) -> Writer:
        if self._writer is None:
            raise WriteProtected(f"{self.path} is open read-only")
        return self._writer

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

    _name = "zstd"
    _compresses = True
    _cluster_size = 8 << 10

    def __init__(self, path: str | os.PathLike[str], *, compress: bool = True, **arguments: Any) -> None:
        super().__init__(path, compress=compress, **arguments)


def _change(action: str, name: str) -> Callable[[Branching], None]:
    """What is done with a snapshot."""
    changes = {
        "create": Branching.create_snapshot,
        "apply": Branching.apply_snapshot,
        "delete": Branching.delete_snapshot,
    }
    if action not in changes:
        raise ValueError(f"{action!r} is nothing to do with snapshots: create, apply and delete are")
    return lambda branching: changes[action](branching, name)


def _switch(extra: dict[str, str], name: str, default: bool) -> bool:
    text = extra.pop(name, None)
    if text not in (None, "on", "off"):
        raise ValueError(f"{name} is {text!r}; it is on or off")
    return default if text is None else text == "on"


def _number(extra: dict[str, str], name: str) -> int | None:
    text = extra.pop(name, None)
    if text is None:
        return None
    if not (text.isascii() and text.isdigit()):
        raise ValueError(f"{name} is {text!r}; it is a number")
    return int(text)


def _size(extra: dict[str, str], name: str) -> int | None:
    """A number of bytes, or of K or M."""
    text = extra.pop(name, None)
    if text is None:
        return None
    digits, unit = (text[:-1], text[-1].upper()) if text[-1:].upper() in ("K", "M") else (text, "")
    if not (digits.isascii() and digits.isdigit()):
        raise ValueError(f"{name} is {text!r}; it is a number of bytes, or as in 64K or 2M")
    return int(digits) << {"": 0, "K": 10, "M": 20}[unit]
