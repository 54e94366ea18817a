"""What users write: handlers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

if TYPE_CHECKING:
    from typing import Self


API_VERSION = 1
_LOWER = "lower."
_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True, slots=True)
class Options:
    """What a person asked for beside the configuration string.

    Attributes:
        size: Bytes, or None for what the storage has.
        create: Make the storage if it is not there.
        read_only: Refuse every change.
        block_size: Bytes of a logical block, or None for the handler's own.
        extra: Options that only this handler knows (`-o KEY=VALUE`).
        interactive: A person may be asked, and passes descriptors: it is a command, and no daemon.
    """

    size: int | None = None
    create: bool = False
    read_only: bool = False
    block_size: int | None = None
    extra: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    interactive: bool = False

    def split(self) -> tuple[dict[str, str], Options]:
        """Tells the options of a layer from those of the handler below it, `-o lower.KEY=VALUE`.

        Returns:
            The layer's own part of `extra`, to take options out of; and what the handler below gets: the others as
            `KEY=VALUE`, no size, and a block size only as `-o lower.block-size=BYTES`.

        Raises:
            ValueError: That is no number.
        """
        own = {key: value for key, value in self.extra.items() if not key.startswith(_LOWER)}
        lower = {key.removeprefix(_LOWER): value for key, value in self.extra.items() if key.startswith(_LOWER)}
        block_size = lower.pop("block-size", None)
        if block_size is not None and not (block_size.isascii() and block_size.isdigit()):
            raise ValueError(f"{_LOWER}block-size is {block_size!r}; it is a number of bytes")
        return own, Options(
            read_only=self.read_only,
            block_size=None if block_size is None else int(block_size),
            extra=lower,
            interactive=self.interactive,
        )


@dataclass(frozen=True, slots=True)
class Identity:
    """How a disk introduces itself (INQUIRY and VPD pages 80h and 83h).

    Attributes:
        vendor: At most 8 printable ASCII characters.
        product: At most 16.
        revision: At most 4.
        serial: Unit serial number, at most 128; None for one derived from the device's WWN.
    """

    vendor: str = "tcmu-rs"
    product: str = "disk"
    revision: str = "0001"
    serial: str | None = None


def blocking(function: _F) -> _F:
    """Marks a plain method that may block: it runs in a worker thread.

    The thread is never abandoned: a cancelled command waits for it, because it may still use the command's memory. It
    is not one of trio's: `trio.from_thread` has to be given the `trio_token`.
    """
    if inspect.iscoroutinefunction(function):
        raise TypeError(f"{function.__qualname__} is async already: @blocking is for plain functions")
    function.__tcmu_blocking__ = True  # type: ignore[attr-defined]
    return function


class Handler:
    """Serves any SCSI device: every command comes as it is. See `BlockHandler` for disks.

    Write `async def command(self, cmd)`: look at `cmd.cdb`, `cmd.data_out` and `cmd.data_in` (`IoVec`s) and return
    None for GOOD (all of `data_in` is sent, if any of it was written), or the number of Data-In bytes that are valid;
    or raise a `ScsiError`. Task attributes and the initiator are not known to TCMU; nor is the direction of a command,
    but by its CDB: touch `data_in` only of commands that have Data-In, for of all others it is their Data-Out, which is
    zeroed before a view of it is taken for writing.

    Attributes:
        api_version: The version of this interface that the class was written for.
        size: Bytes of the medium; for other devices than disks what the kernel should believe.
        block_size: Bytes of a logical block.
        max_in_flight: How many commands may run at once. With 1 there is no concurrency to think of.
        persistent: What a command that was answered has stored is found by the next process that opens the same
            configuration, even if this one was killed. Without that promise no other process goes on with the device:
            its initiators would find a disk that has forgotten what they wrote.
    """

    api_version: ClassVar[int] = API_VERSION
    size: int
    block_size: int = 512
    max_in_flight: int = 1
    persistent: bool = False

    @classmethod
    def from_config(cls, config: str, options: Options) -> Self:
        """Makes a handler from the part of `HANDLER:CONFIG` behind the colon.

        Raises:
            ValueError: The text or an option means nothing to this handler; the message says what would.
        """
        if config or options != Options(read_only=options.read_only, interactive=options.interactive):
            raise ValueError(f"{cls.__name__} takes no configuration, not {config!r}")
        return cls()

    @classmethod
    def absolute_config(cls, config: str) -> str:
        """The same text for any working directory: paths in it made absolute.

        Other processes know a disk of the command line by it: to resize it, or to go on with one that a killed server
        has left. **If omitted**: as it is.
        """
        return config

    @classmethod
    async def create(cls, config: str, options: Options) -> Handler | None:
        """Makes the storage (`tcmu-rs create`), never over storage that is there. **If omitted**: that is an error.

        Of storage that is new every byte reads as one that was discarded.

        Returns:
            A handler of what was made, not open, which may be opened more than once; or None, and then `from_config`
            with the same text and options has to do. Return one where `from_config` would not take the options, or
            would ask for a secret again.
        """
        raise ValueError(f"{cls.__name__} has no storage to create")

    @classmethod
    async def remove(cls, config: str, options: Options) -> bool:
        """Takes away what `create` has made a moment ago, because what was to fill it failed.

        Returns:
            Whether it is gone. **If omitted**: False, so that people are told of what is left.
        """
        return False

    async def open(self) -> None:
        """Takes the storage; called before the device exists. **If omitted**: nothing to take."""

    async def aclose(self) -> None:
        """Gives the storage back; called once, also after errors. **If omitted**: nothing to give back."""

    def statistics(self) -> Mapping[str, float]:
        """Numbers about the storage for people to watch (`tcmu-rs stats`), by names in snake_case.

        Counters run since `open`. Names that end in `_bytes` are shown as sizes. Called in the event loop now and then,
        while the handler is open, and must not block. **If omitted**: there is nothing to tell.
        """
        return {}

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.aclose()


class BlockHandler(Handler):
    """Serves a disk: storage logic in bytes, no SCSI.

    The methods are found by their presence; which are there decides what the disk can do:

    `read(self, offset, iov)`
        Fill `iov` (an `IoVec`, `iov.nbytes` bytes) from byte `offset`. All of it, or raise. Required.
    `write(self, offset, iov)`
        Store `iov`. A later read sees it; it is durable after the next `flush`. With `native_fua` there is a keyword
        `fua`: return only when the data is durable. **If omitted**: the disk is write protected.
    `flush(self)`
        Make durable what every write that returned before had written. **If omitted**: the disk has no write
        cache, so every `write` must be durable by itself when it returns.
    `discard(self, offset, length)`
        The range is not needed. **If omitted**, or with `can_discard` False: the disk is not thin.
    `write_zeroes(self, offset, length)`
        The range reads as zeroes from now on. **If omitted**, or with `can_write_zeroes` False: `write` is called
        with zeroes.
    `extents(self, offset, length)`
        Which parts of the range have storage: a sequence of pairs, length in bytes and `ExtentState`, from `offset` on.
        It may end early, after one block at least. Of a block that is only partly free nothing is. **If omitted**, or
        with `can_extents` False: all of the disk is said to be in use.
    `change_snapshots(self, action, name)`
        With `create` keep the state of the disk as `name`, with `delete` forget it. No command runs meanwhile. **If
        omitted**, or with `can_change_snapshots` False: that can be done only while the disk is not served.
    `set_size(self, size)`
        Make the storage `size` bytes, durably, and set `self.size`; what is new reads as what was discarded, what is
        behind the end is gone. Nothing else of the handler runs meanwhile. If it raises, `self.size` is what there is
        then; a `ValueError` is for sizes that it cannot have. **If omitted**, or with `can_set_size` False: the disk is
        not resized in service.
    `scsi_command(self, cmd)`
        Asked first about every command; as `Handler.command`, or return `NotImplemented` to leave it to the
        emulation.

    Offsets and lengths are multiples of `block_size`, inside the disk and never empty; the caller has checked.

    A handler that ends in a file moves data with `await iov.read_from(fd, offset)` and `await iov.write_to(fd, offset,
    fua=fua)`: without suspending if the page cache can, and without a thread for each.
    `tcmu_rs.fdatasync(fd)` and `fallocate(fd, mode, offset, length)` do the same for `flush` and `discard`.

    Each method is one of three colours: `async def` runs in the event loop and may wait; `def` runs in the event
    loop and must not block; `@tcmu_rs.blocking def` runs in a thread. The order among commands in flight is nobody's
    promise. Exceptions become sense data: a `ScsiError` as it says, an `OSError` by its errno, anything else is a bug,
    is logged, and is an INTERNAL TARGET FAILURE to the initiator.

    Attributes:
        size: Bytes, a multiple of `block_size`. Read after `open` and `set_size`.
        block_size: Bytes of a logical block: 512, 1024, 2048 or 4096.
        physical_block_size: Bytes that the storage writes at once, for the initiator to align to.
        read_only: Refuse every change, `write` or not.
        rotational: Whether nearby blocks are cheaper than distant ones.
        removable: Whether initiators may eject the disk, and load it again.
        native_fua: `write` has the keyword `fua`.
        taskless: Those of `read`, `write` and `flush` that hold nothing of trio's (no lock, no cancel scope, no
            nursery) while they await a transfer: `read_from`, `write_to`, `fdatasync`, `fallocate`. They may go on in
            another task than they were called in, which costs a fraction of waiting in one. What an abort raises in
            them then is `TransferCancelled`, not `trio.Cancelled`.
        fills_reads: `read` promises to have written every byte of `iov` if it returns. Without the promise the memory
            is zeroed before a view of it is taken.
        can_discard: Refines the presence of `discard`.
        can_write_zeroes: Refines the presence of `write_zeroes`.
        can_extents: Refines the presence of `extents`.
        can_set_size: Refines the presence of `set_size`.
        can_change_snapshots: Refines the presence of `change_snapshots`.
        max_atomic_write: `write` of up to so many bytes is stored whole or not at all, even if the power fails; 0 if
            nothing is promised, and then initiators are not offered WRITE ATOMIC.
        discard_zeroes: A discarded range reads as zeroes (LBPRZ).
        discard_granularity: Bytes below which a discard frees nothing; 0 for one block.
        identity: How the disk introduces itself.
    """

    physical_block_size: int | None = None
    read_only: bool = False
    rotational: bool = False
    removable: bool = False
    native_fua: bool = False
    taskless: Collection[str] = ()
    fills_reads: bool = False
    can_discard: bool = True
    can_write_zeroes: bool = True
    can_extents: bool = True
    can_set_size: bool = True
    can_change_snapshots: bool = True
    max_atomic_write: int = 0
    discard_zeroes: bool = False
    discard_granularity: int = 0
    identity: Identity = Identity()


class ExtentState(IntEnum):
    """What a disk has for a range of bytes: the codes of GET LBA STATUS."""

    MAPPED = 0
    """Storage with data."""
    DEALLOCATED = 1
    """No storage; reads as after `discard`."""
    ANCHORED = 2
    """Storage that is reserved, without data."""


class Verb(IntEnum):
    """What a step asks of a block handler: the numbers of `scsi::Verb`."""

    READ = 0
    WRITE = 1
    FLUSH = 2
    DISCARD = 3
    WRITE_ZEROES = 4
    EXTENTS = 5


METHODS = {
    Verb.READ: "read",
    Verb.WRITE: "write",
    Verb.FLUSH: "flush",
    Verb.DISCARD: "discard",
    Verb.WRITE_ZEROES: "write_zeroes",
    Verb.EXTENTS: "extents",
}


class Colour(Enum):
    """How a handler's method is called."""

    ASYNC = "async"
    PLAIN = "plain"
    BLOCKING = "blocking"


def colour_of(method: Callable[..., object]) -> Colour:
    """Decides by the definition, through partials and decorators that keep it visible."""
    function: Any = method
    while isinstance(function, functools.partial):
        function = function.func
    # First, for `functools.wraps` copies the mark of a blocking function to an async one around it.
    if inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__):
        return Colour.ASYNC
    return Colour.BLOCKING if getattr(function, "__tcmu_blocking__", False) else Colour.PLAIN


def has(handler: Handler, name: str) -> bool:
    """Whether the handler has a method, and means it."""
    return callable(getattr(handler, name, None)) and bool(getattr(handler, f"can_{name}", True))


def check(handler: Handler) -> None:
    """Refuses what cannot be served, before anything is made for it.

    Raises:
        TypeError: It is not a handler, or lacks a required method, or was written for another version.
        ValueError: Its size or block size cannot be.
    """
    name = type(handler).__name__
    if not isinstance(handler, Handler):
        raise TypeError(f"{name} is not a handler: derive it from tcmu_rs.BlockHandler or tcmu_rs.Handler")
    if handler.api_version != API_VERSION:
        raise TypeError(
            f"{name} is written for version {handler.api_version} of the handler API; this is {API_VERSION}"
        )
    required = "read" if isinstance(handler, BlockHandler) else "command"
    if not has(handler, required):
        raise TypeError(f"{name} has no method {required}()")
    for method in getattr(handler, "taskless", ()):
        if method not in ("read", "write", "flush"):
            raise ValueError(f"{name}.taskless names {method!r}; it is about read, write and flush")
    if handler.max_in_flight < 1:
        raise ValueError(f"{name}.max_in_flight is {handler.max_in_flight}; at least one command has to run")
    size, block_size = getattr(handler, "size", None), handler.block_size
    if not isinstance(size, int) or isinstance(size, bool):
        raise TypeError(f"{name}.size must be set to a number of bytes by the time that open() returns, not {size!r}")
    if block_size not in (512, 1024, 2048, 4096):
        raise ValueError(f"{name}.block_size is {block_size}; it must be 512, 1024, 2048 or 4096")
    if size <= 0 or size % block_size:
        raise ValueError(f"{name}.size is {size}; it must be a positive multiple of the block size {block_size}")
