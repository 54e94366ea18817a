"""The disk: sectors that are encrypted on their way to the handler below."""

from __future__ import annotations

import errno
import inspect
import logging
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from tcmu_rs import BlockHandler, IoVec, Lower, Options
from tcmu_rs.handlers.file import FileHandler

from . import keys, luks1, luks2
from ._errors import LuksError
from .cipher import UNIT, check_cipher, make_cipher, split
from .kdf import Kdf, calibrate, wipe
from .keys import KeyProvider, Secret
from .volume import Volume

if TYPE_CHECKING:
    from typing import Self

logger = logging.getLogger(__name__)

STAGE = 1 << 20
"""Bytes that are encrypted at once; larger transfers are done in parts."""


class _Staging:
    """A private buffer, cut into sectors beforehand."""

    def __init__(self, sector_size: int) -> None:
        self.view = memoryview(bytearray(STAGE))
        self.sectors = split(self.view, sector_size)

    def iovec(self, start: int, stop: int) -> IoVec:
        return IoVec([self.view[start:stop]])


class _Busy:
    """Ranges that are being written: who wants one that overlaps waits.

    Needed only where blocks are smaller than what is written at once. Then a write may have to read what surrounds it,
    and until it has written that back nobody else may change it.
    """

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []
        self._waiting = trio.lowlevel.ParkingLot()

    @asynccontextmanager
    async def hold(self, start: int, stop: int) -> AsyncIterator[None]:
        while any(start < other_stop and other_start < stop for other_start, other_stop in self._ranges):
            await self._waiting.park()
        self._ranges.append((start, stop))
        try:
            yield
        finally:
            self._ranges.remove((start, stop))
            self._waiting.unpark_all()


class LuksHandler(BlockHandler):
    """Opens a container of LUKS1 or LUKS2 on any block handler, as `cryptsetup open` does on a block device.

    Reads are decrypted where they land, in the initiator's memory; writes are encrypted in a buffer of the handler's
    own. Nothing but data is ever written. As with dm-crypt, logical blocks are as large as the encryption sectors
    unless `block_size` says otherwise; smaller ones cost a read for each write of a part of a sector.

    Opening keeps the memory of the whole process out of core dumps, for good.

    Args:
        lower: What holds the container; opened and closed with this.
        key_provider: Called once, at `open`, with the container's UUID. An `async def`, or a plain function, which is
            called in a thread. A `bytearray` that it returns is wiped.
        header: What holds a detached header; then `lower` has the data alone.
        allow_discards: Pass discards down. Whoever sees the storage then sees which parts are in use.
        read_only: Refuse writes.
        block_size: Bytes of a logical block.
        size: Bytes that the disk has to have.

    Raises:
        LuksError: From `open`: no container, a damaged one, or one that asks for what is not supported.
        WrongPassphraseError: From `open`: the key opens no keyslot.
    """

    native_fua = True

    def __init__(
        self,
        lower: BlockHandler,
        key_provider: KeyProvider,
        *,
        header: BlockHandler | None = None,
        allow_discards: bool = False,
        read_only: bool = False,
        block_size: int | None = None,
        size: int | None = None,
    ) -> None:
        self.persistent = lower.persistent
        self._lower = Lower(lower)
        self._header = None if header is None else Lower(header)
        self._key_provider = key_provider
        self._allow_discards = allow_discards
        self._wanted_read_only = read_only
        self._wanted_block_size = block_size
        self._wanted_size = size
        self._made_key: bytearray | None = None
        self._stack = AsyncExitStack()

    # From the command line.

    @classmethod
    def from_config(cls, config: str, options: Options) -> Self:
        """The text is the path of a file or block device.

        `-o key-file=PATH`, `-o passphrase-fd=N` or `-o credential=NAME` says where the passphrase is; otherwise the
        person at the terminal is asked. `-o header=PATH` is a detached header. `-o allow-discards=on` lets discards
        free space, and lets whoever sees the file see how much of it is used, where, and perhaps by what file system.
        """
        _check_path(config)
        if options.create:
            raise ValueError(f"make the container first: tcmu-rs create luks:{config} --size SIZE -o key-file=PATH")
        extra = dict(options.extra)
        allow_discards = extra.pop("allow-discards", "off")
        if allow_discards not in ("on", "off"):
            raise ValueError(f"allow-discards is {allow_discards!r}; it is on or off")
        header = extra.pop("header", None)
        # Before a person is asked for a passphrase in vain.
        Path(config).stat()
        (source,) = keys.take_sources(extra, config)
        keys.check_options(extra, "key-file, passphrase-fd, credential, header and allow-discards")
        return cls(
            FileHandler(config, read_only=options.read_only),
            lambda _: source(),
            header=None if header is None else FileHandler(header, read_only=True),
            allow_discards=allow_discards == "on",
            read_only=options.read_only,
            block_size=options.block_size,
            size=options.size,
        )

    @classmethod
    async def create(cls, config: str, options: Options) -> LuksHandler:
        """Makes a file with an empty container of LUKS2; a file that is there already is left alone.

        The handler that is returned has the key already: it asks for no passphrase when it is opened.

        Options are those of `from_config` for the passphrase, `-o key-file-2=PATH` and so on for more keyslots,
        `-o sector-size=512` for another size of encryption sectors than 4096, and `-o iter-time=MS` for how long one
        guess of the passphrase shall take here (1500).
        """
        _check_path(config)
        if options.block_size is not None:
            raise ValueError("a container has no logical blocks: choose -o sector-size, or --block-size at attach")
        if options.size is None:
            raise ValueError(f"luks:{config} has to be made: how large? add --size, such as --size 10G")
        extra = dict(options.extra)
        sector_size = _positive(extra, "sector-size", 4096)
        iter_time = _positive(extra, "iter-time", 1500)
        check_cipher("aes-xts-plain64", 64, sector_size)
        if options.size % sector_size:
            raise ValueError(f"{options.size} bytes are not a whole number of encryption sectors of {sector_size}")
        path = trio.Path(config)
        if await path.exists():
            raise FileExistsError(errno.EEXIST, "there is such a file already", config)
        sources = keys.take_sources(extra, config, new=True)
        keys.check_options(
            extra, "key-file, key-file-2 and so on, passphrase-fd, credential, sector-size and iter-time"
        )

        handler = cls(FileHandler(config), _only_once)
        handler._made_key = volume_key = luks2.new_key()

        def prepare() -> luks2.NewContainer:
            keys.forbid_core_dumps()
            passphrases = [source() for source in sources]
            try:
                return luks2.make(
                    passphrases, calibrate(iter_time / 1000), sector_size=sector_size, volume_key=volume_key
                )
            finally:
                wipe(*(passphrase for passphrase in passphrases if isinstance(passphrase, bytearray)))

        try:
            container = await trio.to_thread.run_sync(prepare, abandon_on_cancel=True)
            await trio.to_thread.run_sync(_make_file, config, container.volume.offset + options.size)
            try:
                lower = Lower(FileHandler(config))
                await lower.open()
                try:
                    await _write_pieces(lower, container.pieces)
                finally:
                    await lower.aclose()
            except BaseException:
                with trio.CancelScope(shield=True):
                    await path.unlink()
                raise
        except BaseException:
            wipe(volume_key)
            raise
        return handler

    @classmethod
    async def remove(cls, config: str, options: Options) -> bool:
        """Deletes the file that `create` has made."""
        return await FileHandler.remove(config, options)

    @classmethod
    async def info(cls, config: str, options: Options) -> dict[str, Any]:
        """What the header says (`tcmu-rs info`); no passphrase is needed."""
        async with _header_of(config, options) as lower:
            data = await _read(lower, 0, luks2.MAX_HEADER)
            volume = parse_header(data)
            described = describe(volume)
            if volume.size is None and volume.offset:
                described["data size"] = lower.size - volume.offset
            if volume.version == 2:
                described["header"] = _copies(data)
            return described

    @classmethod
    async def check(cls, config: str, options: Options, *, repair: bool = False) -> dict[str, Any]:
        """Looks for damage of the header (`tcmu-rs check`), and mends one copy from the other on request.

        Returns:
            `ok`, `problems` that were found, and `repaired`: whether they are gone now.
        """
        async with _header_of(config, options, repair=repair) as lower:
            data = await _read(lower, 0, luks2.MAX_HEADER)
            volume = parse_header(data)
            problems = _problems(data) if volume.version == 2 else []
            repaired = False
            if problems and repair:
                copy = luks2.choose(data)
                await _write_pieces(lower, [(copy.twin_offset, copy.twin())])
                if left := _problems(await _read(lower, 0, luks2.MAX_HEADER)):
                    raise LuksError(f"the repair has not worked: {'; '.join(left)}")
                repaired = True
            return {"ok": not problems or repaired, "problems": problems, "repaired": repaired}

    # Life.

    async def open(self) -> None:
        """Opens what is below, and unlocks the container in a thread."""
        async with AsyncExitStack() as stack:
            await self._lower.open()
            stack.push_async_callback(self._lower.aclose)
            header = self._lower
            if self._header is not None:
                await self._header.open()
                stack.push_async_callback(self._header.aclose)
                header = self._header
            data = await _read(header, 0, luks2.MAX_HEADER)
            volume = parse_header(data)
            if volume.version == 2:
                for problem in _problems(data):
                    logger.warning("%s; the other copy is used (`tcmu-rs check --repair` mends it)", problem)
            self._settle(volume)
            areas = {
                slot.number: await _read(header, slot.offset, slot.material_size, whole=True)
                for slot in volume.keyslots
            }
            keys.forbid_core_dumps()
            key = await self._unlock(volume, areas)
            try:
                self._cipher = make_cipher(volume.cipher, key, volume.sector_size)
            finally:
                wipe(key)
            stack.callback(self._forget)
            self._volume = volume
            self._stack = stack.pop_all()

    async def _unlock(self, volume: Volume, areas: Mapping[int, bytes]) -> bytearray:
        secret: Secret
        if self._made_key is not None:
            try:
                if await trio.to_thread.run_sync(volume.digest.fits, self._made_key):
                    return bytearray(self._made_key)
                raise LuksError("this is not the container that was made a moment ago")
            finally:
                self._forget_made_key()
        if inspect.iscoroutinefunction(self._key_provider):
            secret = await self._key_provider(volume.uuid)
        else:
            # Nothing waits for a key that is not wanted any more.
            secret = await trio.to_thread.run_sync(self._key_provider, volume.uuid, abandon_on_cancel=True)  # type: ignore[arg-type]
        try:
            return await trio.to_thread.run_sync(volume.unlock, areas, secret, abandon_on_cancel=False)
        finally:
            if isinstance(secret, bytearray):
                wipe(secret)

    def _forget_made_key(self) -> None:
        if self._made_key is not None:
            wipe(self._made_key)
            self._made_key = None

    def _settle(self, volume: Volume) -> None:
        """Takes over the container's geometry and what the handler below can do.

        Raises:
            LuksError: They do not fit together.
            ValueError: They do not fit what was asked for.
        """
        lower = self._lower
        # What is written at once: no part of an encryption sector, and no part of a block below.
        unit = max(volume.sector_size, lower.block_size)
        size = lower.size - volume.offset if volume.size is None else volume.size
        if not volume.offset and self._header is None:
            raise LuksError(
                "this is a detached header: its data is elsewhere (-o header=PATH, and the data as the disk)"
            )
        if size <= 0 or volume.offset + size > lower.size:
            raise LuksError(
                f"the container is cut off: its data begins at {volume.offset}, the storage has {lower.size}"
            )
        if volume.offset % lower.block_size or size % unit:
            raise LuksError(
                f"{size} bytes of data at {volume.offset} are not whole blocks of {unit} bytes: the storage was cut off"
            )
        if volume.iv_tweak + size // UNIT >> 64:
            raise LuksError(f"an iv_tweak of {volume.iv_tweak} is too large for this container")
        if self._wanted_size not in (None, size):
            raise ValueError(f"the container has {size} bytes, not the {self._wanted_size} that were asked for")
        block_size = self._wanted_block_size or unit
        if block_size > unit and size % block_size:
            raise ValueError(f"{size} bytes are not a whole number of blocks of {block_size}: use --block-size {unit}")
        writable = volume.cipher == "aes-xts-plain64"
        if not (writable or self._wanted_read_only):
            raise LuksError(f"{volume.cipher} is only read: ask for that (--read-only)")
        self.size = size
        self.block_size = block_size
        self.physical_block_size = max(unit, lower.physical_block_size)
        self.read_only = self._wanted_read_only or not lower.writable
        self.rotational = lower.handler.rotational
        self.max_in_flight = lower.max_in_flight
        self.fills_reads = lower.fills_reads
        self.can_flush = lower.has_cache
        self.can_discard = self._allow_discards and lower.can_discard
        self.discard_granularity = max(unit, lower.handler.discard_granularity)
        self._unit = unit
        self._sector_size = volume.sector_size
        self._offset = volume.offset
        self._first = volume.iv_tweak
        self._busy = _Busy() if block_size < unit else None
        self._staging: list[_Staging] = []

    async def aclose(self) -> None:
        """Forgets the key and closes what is below."""
        self._forget_made_key()
        await self._stack.aclose()

    def _forget(self) -> None:
        self._cipher.wipe()
        for staging in self._staging:
            staging.view[:] = bytes(STAGE)
        self._staging.clear()

    # Data.

    async def read(self, offset: int, iov: IoVec) -> None:
        """Reads into the initiator's memory and decrypts there."""
        size = self._sector_size
        if self._busy is not None and (offset % self._unit or iov.nbytes % self._unit):
            await self._read_through(offset, iov)
            return
        await self._lower.read(self._offset + offset, iov)
        number = self._first + offset // UNIT
        for view in iov:
            length = len(view)
            if length == size:
                self._cipher.decrypt(number, (view,))
            elif length % size:
                # From here on a sector is in two pieces of memory, which the kernel's data area does not do.
                done = (number - self._first) * UNIT - offset
                await self._read_through(offset + done, iov.slice(done, iov.nbytes))
                return
            else:
                self._cipher.decrypt(number, split(view, size))
            number += length // UNIT

    async def _read_through(self, offset: int, iov: IoVec) -> None:
        """Reads by way of a buffer of our own: parts of sectors, and sectors in several pieces of memory."""
        stop = offset + iov.nbytes
        first = offset // self._unit * self._unit
        last = -(-stop // self._unit) * self._unit
        staging = self._take_staging()
        try:
            for at in range(first, last, STAGE):
                until = min(at + STAGE, last)
                await self._fetch(staging, at, 0, until - at)
                start, end = max(at, offset), min(until, stop)
                iov.slice(start - offset, end - offset).copy_from(staging.view[start - at : end - at])
        finally:
            self._staging.append(staging)

    async def _fetch(self, staging: _Staging, at: int, start: int, stop: int) -> None:
        """Reads and decrypts whole units into `staging[start:stop]`; its beginning is byte `at` of the disk."""
        target = staging.iovec(start, stop)
        if not self.fills_reads:
            target.zero()
        await self._lower.read(self._offset + at + start, target)
        size = self._sector_size
        self._cipher.decrypt(self._first + (at + start) // UNIT, staging.sectors[start // size : stop // size])

    async def write(self, offset: int, iov: IoVec, *, fua: bool = False) -> None:
        """Encrypts into a buffer of our own and writes that."""
        if self._busy is None:
            await self._write(offset, iov, fua)
            return
        stop = offset + iov.nbytes
        async with self._busy.hold(offset // self._unit * self._unit, -(-stop // self._unit) * self._unit):
            await self._write(offset, iov, fua)

    async def _write(self, offset: int, iov: IoVec, fua: bool) -> None:
        unit, size = self._unit, self._sector_size
        stop = offset + iov.nbytes
        first = offset // unit * unit
        last = -(-stop // unit) * unit
        staging = self._take_staging()
        try:
            for at in range(first, last, STAGE):
                until = min(at + STAGE, last)
                start, end = max(at, offset), min(until, stop)
                if start > at:
                    await self._fetch(staging, at, 0, unit)
                # Unless that is the unit which has just been read.
                if end < until and (start == at or until - at > unit):
                    await self._fetch(staging, at, until - at - unit, until - at)
                part = iov if end - start == iov.nbytes else iov.slice(start - offset, end - offset)
                part.copy_into(staging.view[start - at : end - at])
                self._cipher.encrypt(self._first + at // UNIT, staging.sectors[: (until - at) // size])
                await self._lower.write(self._offset + at, staging.iovec(0, until - at), fua=fua)
        finally:
            self._staging.append(staging)

    async def flush(self) -> None:
        """Passes down."""
        await self._lower.flush()

    async def discard(self, offset: int, length: int) -> None:
        """Passes whole units down; what is read of them afterwards is noise."""
        first = -(-offset // self._unit) * self._unit
        last = (offset + length) // self._unit * self._unit
        if first >= last:
            return
        if self._busy is None:
            await self._lower.discard(self._offset + first, last - first)
            return
        async with self._busy.hold(first, last):
            await self._lower.discard(self._offset + first, last - first)

    def _take_staging(self) -> _Staging:
        return self._staging.pop() if self._staging else _Staging(self._sector_size)


def _only_once(uuid: str) -> Secret:
    raise ValueError(f"the key of {uuid} was known only once, after it was made: make another handler")


def parse_header(data: bytes) -> Volume:
    """Reads the header of either version.

    Args:
        data: The start of the device, `luks2.MAX_HEADER` bytes if it has so many.

    Raises:
        LuksError: There is none, or it is damaged, or asks for what is not supported.
    """
    if data.startswith(luks2.MAGIC + b"\x00\x01"):
        return luks1.parse(data)
    return luks2.parse(luks2.choose(data))


def describe(volume: Volume) -> dict[str, Any]:
    """A volume for people and programs."""
    return {
        "version": volume.version,
        "uuid": volume.uuid,
        "label": volume.label,
        "cipher": volume.cipher,
        "key bits": volume.key_size * 8,
        "sector size": volume.sector_size,
        "data offset": volume.offset,
        "data size": volume.size,
        "keyslots": {
            str(slot.number): slot.kdf.describe() + ("" if slot.priority else " (ignored)") for slot in volume.keyslots
        },
    }


async def format_luks(
    lower: BlockHandler, passphrases: Sequence[Secret], *, kdf: Kdf | None = None, **parameters: Any
) -> Volume:
    """Makes a container of LUKS2 on any block handler, over whatever is there.

    Args:
        lower: Opened and closed.
        passphrases: One keyslot each.
        kdf: How to derive keys from them; by default Argon2id for about 1.5 seconds.
        **parameters: As for `luks2.make`: `cipher`, `key_size`, `sector_size`, `label`, `uuid`.

    Raises:
        LuksError: The parameters are not supported, or the storage is too small.
    """
    below = Lower(lower)
    await below.open()
    try:
        container = await trio.to_thread.run_sync(lambda: luks2.make(passphrases, kdf or calibrate(), **parameters))
        room = below.size - container.volume.offset
        if room <= 0 or room % container.volume.sector_size:
            raise LuksError(f"{below.size} bytes are too few, or not {container.volume.offset} and whole sectors")
        await _write_pieces(below, container.pieces)
        return container.volume
    finally:
        await below.aclose()


def _make_file(path: str, size: int) -> None:
    """Makes a sparse file that nobody else may read, and that did not exist."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, size)
    except BaseException:
        Path(path).unlink()
        raise
    finally:
        os.close(fd)


async def _write_pieces(lower: Lower, pieces: Sequence[tuple[int, bytes]]) -> None:
    """Writes what makes a container, the header last and only when the rest is durable."""
    for offset, piece in pieces[:-1]:
        await lower.write(offset, IoVec([piece.ljust(-(-len(piece) // lower.block_size) * lower.block_size, b"\0")]))
    await lower.flush()
    offset, piece = pieces[-1]
    await lower.write(offset, IoVec([piece]))
    await lower.flush()


async def _read(lower: Lower, offset: int, length: int, *, whole: bool = False) -> bytes:
    """Reads bytes from anywhere; fewer at the end of the storage, if not `whole`."""
    start = offset // lower.block_size * lower.block_size
    stop = min(-(-(offset + length) // lower.block_size) * lower.block_size, lower.size)
    if whole and stop < offset + length:
        raise LuksError(f"the container is cut off at {lower.size}")
    buffer = bytearray(max(stop - start, 0))
    if buffer:
        await lower.read(start, IoVec([buffer]))
    return bytes(buffer[offset - start : offset - start + length])


@asynccontextmanager
async def _header_of(config: str, options: Options, *, repair: bool = False) -> AsyncIterator[Lower]:
    """Opens what holds the header, only to be read unless it is to be repaired."""
    _check_path(config)
    extra = dict(options.extra)
    path = extra.pop("header", config)
    # Those that attach needs may stay on the command line.
    for name in ("key-file", "passphrase-fd", "credential", "allow-discards"):
        extra.pop(name, None)
    keys.check_options(extra, "header")
    lower = Lower(FileHandler(path, read_only=not repair))
    await lower.open()
    try:
        yield lower
    finally:
        await lower.aclose()


def _copies(data: bytes) -> dict[str, str]:
    return {
        which: f"damaged: {copy}" if isinstance(copy, LuksError) else f"in order, sequence {copy.seqid}"
        for which, copy in zip(("primary", "secondary"), luks2.find_copies(data), strict=True)
    }


def _problems(data: bytes) -> list[str]:
    copies = luks2.find_copies(data)
    problems = [str(copy) for copy in copies if isinstance(copy, LuksError)]
    good = [copy for copy in copies if not isinstance(copy, LuksError)]
    if len(good) == 2 and (good[0].seqid != good[1].seqid or good[0].metadata != good[1].metadata):
        problems.append(f"the copies of the header differ: sequence {good[0].seqid} and {good[1].seqid}")
    return problems


def _check_path(config: str) -> None:
    if not config:
        raise ValueError("luks needs a path: luks:/var/tmp/disk.luks")


def _positive(extra: dict[str, str], name: str, default: int) -> int:
    text = extra.pop(name, str(default))
    if not text.isascii() or not text.isdigit() or not int(text):
        raise ValueError(f"{name} is {text!r}; it is a positive number")
    return int(text)
