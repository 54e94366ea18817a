"""The disk: sectors that are encrypted on their way to the handler below."""

from __future__ import annotations

import errno
import inspect
import logging
import secrets
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import trio

from tcmu_rs import BlockHandler, IoVec, Lower, Options, handler_below
from tcmu_rs.handlers.file import FileHandler

from . import container, keys, luks2
from ._errors import LuksError
from .below import Below
from .cipher import UNIT, check_cipher, make_cipher
from .kdf import VolumeKey, wipe
from .keys import KeyProvider, Secret
from .volume import NewContainer, Volume

if TYPE_CHECKING:
    from typing import Self

logger = logging.getLogger(__name__)

STAGE = 1 << 20
"""Bytes that are encrypted at once; larger transfers are done in parts."""


class _Stage:
    """A private buffer, as large as was ever needed."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray())
        self._iov = IoVec([self.view])

    def first(self, length: int) -> IoVec:
        """Its first bytes: the same object as before, if it is as many as before."""
        if self._iov.nbytes != length:
            if len(self.view) < length:
                self.view = memoryview(bytearray(length))
            self._iov = IoVec([self.view[:length]])
        return self._iov


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
        self._made_key: VolumeKey | None = None
        self._stack = AsyncExitStack()

    # From the command line.

    @classmethod
    def from_config(cls, config: str, options: Options) -> Self:
        """The text is the path of a file or block device, or the specification of another handler: `qcow2:PATH`.

        `-o key-file=PATH`, `-o passphrase-fd=N` or `-o credential=NAME` says where the passphrase is; otherwise the
        person at the terminal is asked. `-o header=PATH` is a detached header, also on another handler. `-o
        allow-discards=on` lets discards free space, and lets whoever sees the file see how much of it is used, where,
        and perhaps by what file system. `-o lower.KEY=VALUE` is an option of the handler below.
        """
        if options.create:
            raise ValueError(f"make the container first: tcmu-rs create luks:{config} --size SIZE -o key-file=PATH")
        below = Below(config, options)
        allow_discards = below.own.pop("allow-discards", "off")
        if allow_discards not in ("on", "off"):
            raise ValueError(f"allow-discards is {allow_discards!r}; it is on or off")
        lower = below.open_data()
        if isinstance(lower, FileHandler):
            # Before a person is asked for a passphrase in vain.
            lower.path.stat()
        (source,) = keys.take_sources(below.own, config, interactive=options.interactive)
        keys.check_options(below.own, "key-file, passphrase-fd, credential, header, allow-discards and lower.KEY")
        return cls(
            lower,
            lambda _: source(),
            header=below.open_header(read_only=True),
            allow_discards=allow_discards == "on",
            read_only=options.read_only,
            block_size=options.block_size,
            size=options.size,
        )

    @classmethod
    def absolute_config(cls, config: str) -> str:
        """That of what the container is stored in."""
        kind, below = handler_below(config)
        absolute: str = kind.absolute_config(below)
        return config.removesuffix(below) + absolute

    @classmethod
    async def create(cls, config: str, options: Options) -> LuksHandler:
        """Makes a file, or another handler's storage, with an empty container; what is there already is left alone.

        Options are those of a container that is there, and: `-o key-file-2=PATH` and so on for more keyslots, `-o
        sector-size=512` for another size of encryption sectors than 4096, `-o iter-time=MS` for how long one guess of
        the passphrase shall take here (1500), `-o key-size=256` for AES-128 instead of AES-256, `-o label=TEXT`, and
        `-o version=1` for LUKS1. With `-o header=PATH` the header is made there, and the data has all of the other
        file.
        """
        # What is returned has the key already, so that nobody is asked for a new passphrase twice.
        if options.block_size is not None:
            raise ValueError("a container has no logical blocks: choose -o sector-size, or --block-size at attach")
        if options.size is None:
            raise ValueError(f"luks:{config} has to be made: how large? add --size, such as --size 10G")
        below = Below(config, options)
        version = _positive(below.own, "version", 2)
        sector_size = _positive(below.own, "sector-size", 4096 if version == 2 else UNIT)
        key_size = _positive(below.own, "key-size", 512)
        iter_time = _positive(below.own, "iter-time", 1500)
        parameters: dict[str, Any] = {
            "version": version,
            "key_size": key_size // 8,
            "detached": below.header is not None,
        }
        if version == 2:
            parameters |= {"sector_size": sector_size, "label": below.own.pop("label", "")}
        elif sector_size != UNIT:
            raise ValueError(f"LUKS1 has sectors of {UNIT} bytes, not {sector_size}")
        check_cipher("aes-xts-plain64", key_size // 8, sector_size)
        if key_size % 8:
            raise ValueError(f"key-size is {key_size}; it is a number of bits, 256 or 512")
        if options.size % sector_size:
            raise ValueError(
                f"{options.size} bytes are not a whole number of encryption sectors of {sector_size}: "
                "choose another size, or a smaller -o sector-size"
            )
        for kind, path in below.layers:
            if kind is FileHandler and await trio.Path(path).exists():
                raise FileExistsError(errno.EEXIST, "there is such a file already", path)
        sources = keys.take_sources(below.own, config, interactive=options.interactive, new=True)
        keys.check_options(
            below.own,
            "key-file, key-file-2 and so on, passphrase-fd, credential, header, version, sector-size, key-size, "
            "iter-time, label and lower.KEY",
        )
        volume_key = VolumeKey(secrets.token_bytes(key_size // 8))

        def prepare() -> NewContainer:
            keys.forbid_core_dumps()
            passphrases = [source() for source in sources]
            try:
                return container.plan(passphrases, seconds=iter_time / 1000, volume_key=volume_key, **parameters)
            finally:
                wipe(*(passphrase for passphrase in passphrases if isinstance(passphrase, bytearray)))

        await below.create(await trio.to_thread.run_sync(prepare, abandon_on_cancel=True), options.size)
        handler = cls(below.open_data(), _not_asked, header=below.open_header(read_only=True))
        handler._made_key = volume_key
        return handler

    @classmethod
    async def remove(cls, config: str, options: Options) -> bool:
        """Removes what `create` has made: the storage, and that of a detached header."""
        return await Below(config, options).remove()

    @classmethod
    async def info(cls, config: str, options: Options) -> dict[str, Any]:
        """What the header says (`tcmu-rs info`); no passphrase is needed."""
        async with Lower(_header_of(config, options)) as lower:
            return await container.info(lower)

    @classmethod
    async def check(cls, config: str, options: Options, *, repair: bool = False) -> dict[str, Any]:
        """Looks for damage of the header (`tcmu-rs check`), and mends one copy from the other on request.

        Returns:
            `ok`, `problems` that were found, and `repaired`: whether they are gone now.
        """
        async with Lower(_header_of(config, options, writable=repair)) as lower:
            return await container.check(lower, repair=repair)

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
            data = await container.read_bytes(header, 0, luks2.MAX_HEADER)
            volume = container.parse_header(data)
            if volume.version == 2:
                for problem in container.problems_of(data):
                    logger.warning("%s; the other copy is used (`tcmu-rs check --repair` mends it)", problem)
            self._settle(volume)
            areas = {
                slot.number: await container.read_bytes(header, slot.offset, slot.material_size, whole=True)
                for slot in volume.keyslots
            }
            keys.forbid_core_dumps()
            key = await self._unlock(volume, areas)
            try:
                self._cipher = make_cipher(volume.cipher, key, volume.sector_size)
            finally:
                wipe(key)
            stack.callback(self._forget)
            self._stack = stack.pop_all()

    async def _unlock(self, volume: Volume, areas: Mapping[int, bytes]) -> bytearray:
        secret: Secret
        if self._made_key is not None:
            if await trio.to_thread.run_sync(volume.digest.fits, self._made_key):
                return bytearray(self._made_key)
            raise LuksError("this is not the container that was made a moment ago")
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
        self.taskless = lower.taskless
        self.can_flush = lower.has_cache
        self.can_discard = self._allow_discards and lower.can_discard
        self.discard_granularity = max(unit, lower.handler.discard_granularity)
        self.can_set_size = lower.can_set_size and not self.read_only
        self._fixed_size = volume.size is not None
        self._unit = unit
        self._offset = volume.offset
        self._first = volume.iv_tweak
        self._busy = _Busy() if block_size < unit else None
        self._staging: list[_Stage] = []

    async def aclose(self) -> None:
        """Forgets the key and closes what is below."""
        await self._stack.aclose()

    def _forget(self) -> None:
        # The last reference: the key is overwritten.
        del self._cipher
        for staging in self._staging:
            staging.view[:] = bytes(len(staging.view))
        self._staging.clear()

    def statistics(self) -> Mapping[str, float]:
        """What the handler below tells."""
        return self._lower.handler.statistics()

    # Data.

    async def read(self, offset: int, iov: IoVec) -> None:
        """Reads into the initiator's memory and decrypts there."""
        if self._busy is not None and (offset % self._unit or iov.nbytes % self._unit):
            await self._read_through(offset, iov)
            return
        await self._lower.read(self._offset + offset, iov)
        self._cipher.decrypt(self._first + offset // UNIT, iov)

    async def _read_through(self, offset: int, iov: IoVec) -> None:
        """Reads parts of sectors, by way of a buffer of our own."""
        stop = offset + iov.nbytes
        first = offset // self._unit * self._unit
        last = -(-stop // self._unit) * self._unit
        with self._stage() as staging:
            for at in range(first, last, STAGE):
                until = min(at + STAGE, last)
                await self._fetch(at, staging[: until - at])
                start, end = max(at, offset), min(until, stop)
                iov.slice(start - offset, end - offset).copy_from(staging[start - at : end - at])

    async def _fetch(self, at: int, target: memoryview) -> None:
        """Reads and decrypts whole units, from byte `at` of the disk on."""
        iov = IoVec([target])
        if not self.fills_reads:
            iov.zero()
        await self._lower.read(self._offset + at, iov)
        self._cipher.decrypt(self._first + at // UNIT, iov)

    async def write(self, offset: int, iov: IoVec, *, fua: bool = False) -> None:
        """Encrypts into a buffer of our own and writes that."""
        if self._busy is None:
            # Not `_stage`, which costs as much as the encryption.
            staging = self._staging.pop() if self._staging else _Stage()
            length = iov.nbytes
            for at in range(0, length, STAGE):
                part = iov if length <= STAGE else iov.slice(at, min(at + STAGE, length))
                encrypted = staging.first(part.nbytes)
                self._cipher.encrypt(self._first + (offset + at) // UNIT, part, encrypted)
                await self._lower.write(self._offset + offset + at, encrypted, fua=fua)
            self._staging.append(staging)
            return
        stop = offset + iov.nbytes
        async with self._busy.hold(offset // self._unit * self._unit, -(-stop // self._unit) * self._unit):
            await self._write_parts(offset, iov, fua)

    async def _write_parts(self, offset: int, iov: IoVec, fua: bool) -> None:
        """Writes what need not be whole units: what is around it is read first."""
        unit = self._unit
        stop = offset + iov.nbytes
        first = offset // unit * unit
        last = -(-stop // unit) * unit
        with self._stage() as staging:
            for at in range(first, last, STAGE):
                until = min(at + STAGE, last)
                start, end = max(at, offset), min(until, stop)
                if start > at:
                    await self._fetch(at, staging[:unit])
                # Unless that is the unit which has just been read.
                if end < until and (start == at or until - at > unit):
                    await self._fetch(until - unit, staging[until - at - unit : until - at])
                iov.slice(start - offset, end - offset).copy_into(staging[start - at : end - at])
                encrypted = IoVec([staging[: until - at]])
                self._cipher.encrypt(self._first + at // UNIT, encrypted, encrypted)
                await self._lower.write(self._offset + at, encrypted, fua=fua)

    async def set_size(self, size: int) -> None:
        """Has what is below make room, less what is in front of the data."""
        if self._fixed_size:
            raise ValueError("the header says how large the container is: it is made anew to be larger")
        if size % self._unit:
            raise ValueError(f"{size} bytes are not whole blocks of {self._unit} bytes")
        if self._first + size // UNIT >> 64:
            raise ValueError(f"{size} bytes are too many for the iv_tweak of this container")
        try:
            await self._lower.set_size(self._offset + size)
        finally:
            # What is below may have gone a part of the way.
            self.size = max(self._lower.size - self._offset, 0) // self._unit * self._unit
        if self._wanted_size is not None:
            self._wanted_size = size

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

    @contextmanager
    def _stage(self) -> Iterator[memoryview]:
        """A private buffer of `STAGE` bytes at least, one that was used a moment ago if there is one.

        After an error it is not used again: whoever gave up may have left it on its way to the storage.
        """
        staging = self._staging.pop() if self._staging else _Stage()
        staging.first(STAGE)
        yield staging.view
        self._staging.append(staging)


def _header_of(config: str, options: Options, *, writable: bool = False) -> BlockHandler:
    """What holds the header, only to be read unless it is to be repaired."""
    below = Below(config, replace(options, read_only=not writable))
    # Those that attach needs may stay on the command line.
    for name in ("key-file", "passphrase-fd", "credential", "allow-discards"):
        below.own.pop(name, None)
    keys.check_options(below.own, "header and lower.KEY")
    return below.open_header(read_only=not writable) or below.open_data()


def _not_asked(uuid: str) -> Secret:
    raise AssertionError(f"the key of {uuid} is known: it was just made")


def _positive(extra: dict[str, str], name: str, default: int) -> int:
    text = extra.pop(name, str(default))
    if not text.isascii() or not text.isdigit() or not int(text):
        raise ValueError(f"{name} is {text!r}; it is a positive number")
    return int(text)
