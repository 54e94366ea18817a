"""What a handler sits on: another block handler, called one way whatever its colours."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable, Collection, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

import trio

from ._handler import BlockHandler, Colour, ExtentState, check, colour_of, has
from ._native import IoVec
from ._threads import Threads

if TYPE_CHECKING:
    from typing import Self


class Lower:
    """A block handler as the layer above it sees it.

    ```python
    class Encrypted(tcmu_rs.BlockHandler):
        def __init__(self, lower: tcmu_rs.BlockHandler) -> None:
            self._lower = tcmu_rs.Lower(lower)

        async def open(self) -> None:
            await self._lower.open()
            self.size = self._lower.size
            self.max_in_flight = self._lower.max_in_flight
    ```

    Every method is to be awaited, whichever of the three colours the handler's own has: a `@blocking` one runs in a
    thread, which is never abandoned, so a buffer is free again as soon as the call has returned or raised.

    Offsets and lengths are multiples of `block_size` and inside `size`, as for any block handler: the layer sees to it.
    So does it to the number of calls at once: a layer that makes one call at a time for each of its own commands is in
    order if it takes `max_in_flight` over. Exceptions pass through as they are.

    Args:
        handler: Opened by `open` and closed by `aclose`.

    Attributes:
        handler: What was given.
        size: Bytes. Like all that follows, known from `open` on.
        block_size: Bytes of a logical block.
        physical_block_size: Bytes that the storage writes at once.
        max_in_flight: How many calls may run at once.
        writable: `write` works.
        has_cache: What is written is durable only after `flush`; without it, when `write` returns.
        can_discard: `discard` works.
        can_write_zeroes: `write_zeroes` works.
        can_extents: `extents` works.
        can_set_size: `set_size` works.
        discard_zeroes: What was discarded reads as zeroes.
        fills_reads: `read` promises to write every byte.
        taskless: Which of `read`, `write` and `flush` may go on in another task (`BlockHandler.taskless`): a method of
            the layer may, too, if it awaits these and holds nothing of trio's meanwhile.
    """

    size: int
    block_size: int
    physical_block_size: int
    max_in_flight: int
    writable: bool
    has_cache: bool
    can_discard: bool
    can_write_zeroes: bool
    can_extents: bool
    can_set_size: bool
    discard_zeroes: bool
    fills_reads: bool
    taskless: Collection[str]

    read: Callable[[int, IoVec], Awaitable[None]]
    """Fills the `IoVec` from a byte offset on."""
    write: Callable[..., Awaitable[None]]
    """Stores the `IoVec` from a byte offset on; with `fua=True` it is durable on return."""
    discard: Callable[[int, int], Awaitable[None]]
    """Gives up a range: offset and length."""
    write_zeroes: Callable[[int, int], Awaitable[None]]
    """Makes a range read as zeroes: offset and length."""
    extents: Callable[[int, int], Awaitable[Sequence[tuple[int, ExtentState]]]]
    """Which parts of a range have storage: see `BlockHandler`."""

    def __init__(self, handler: BlockHandler) -> None:
        self.handler = handler

    async def open(self) -> None:
        """Opens the handler and learns what it can.

        Resource handling: if this raises, the handler is closed.

        Raises:
            TypeError: It is no block handler.
            ValueError: Its size or block size cannot be.
        """
        handler = self.handler
        if not isinstance(handler, BlockHandler):
            raise TypeError(f"{type(handler).__name__} is not a tcmu_rs.BlockHandler: nothing can sit on it")
        try:
            await handler.open()
            check(handler)
        except BaseException:
            with trio.CancelScope(shield=True):
                await handler.aclose()
            raise
        self.size = handler.size
        self.block_size = handler.block_size
        self.physical_block_size = max(handler.block_size, handler.physical_block_size or 0)
        self.max_in_flight = handler.max_in_flight
        self.writable = has(handler, "write") and not handler.read_only
        self.has_cache = has(handler, "flush")
        self.can_discard = self.writable and has(handler, "discard")
        self.can_write_zeroes = self.writable and has(handler, "write_zeroes")
        self.can_extents = has(handler, "extents")
        self.can_set_size = has(handler, "set_size")
        self.discard_zeroes = handler.discard_zeroes
        self.fills_reads = handler.fills_reads
        # Those that are no `async def` await no transfer.
        self.taskless = [
            name
            for name in ("read", "write", "flush")
            if name in handler.taskless
            or not (has(handler, name) and colour_of(getattr(handler, name)) is Colour.ASYNC)
        ]
        self._threads = Threads(handler.max_in_flight, f"<tcmu_rs thread of {type(handler).__name__}>")
        self.read = self._awaitable("read")
        self.discard = self._awaitable("discard")
        self.write_zeroes = self._awaitable("write_zeroes")
        self.extents = self._awaitable("extents")
        self._plain_write = self._awaitable("write")
        self.write = self._plain_write if handler.native_fua else self._write
        self._flush = self._awaitable("flush")
        self._set_size = self._awaitable("set_size")

    async def aclose(self) -> None:
        """Closes the handler."""
        await self.handler.aclose()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, tb: TracebackType | None
    ) -> None:
        with trio.CancelScope(shield=True):
            await self.aclose()

    async def _write(self, offset: int, iov: IoVec, *, fua: bool = False) -> None:
        """`write` of a handler that does not know FUA."""
        await self._plain_write(offset, iov)
        if fua:
            await self.flush()

    async def flush(self) -> None:
        """Makes durable what was written; does nothing if it is so already."""
        if self.has_cache:
            await self._flush()

    async def set_size(self, size: int) -> None:
        """Changes the size of what is below, while nothing else is asked of it."""
        try:
            await self._set_size(size)
        finally:
            self.size = self.handler.size

    def _awaitable(self, name: str) -> Callable[..., Awaitable[Any]]:
        """A method as one that is awaited; an `async def` is the handler's own, with nothing around it."""
        handler = self.handler
        if not has(handler, name):

            async def missing(*_: object, **__: object) -> None:
                raise NotImplementedError(f"{type(handler).__name__} cannot {name}")

            return missing
        method: Callable[..., Any] = getattr(handler, name)
        colour = colour_of(method)
        if colour is Colour.ASYNC:
            return method

        async def plain(*args: Any, **kwargs: Any) -> Any:
            result = method(*args, **kwargs)
            if isinstance(result, Awaitable):
                # Or the traceback would keep it, and its complaint that nobody awaited it.
                del result
                what = f"{type(handler).__name__}.{name}()"
                raise TypeError(f"{what} is a plain function that returned an awaitable: write `async def`")
            return result

        async def in_thread(*args: Any, **kwargs: Any) -> Any:
            return await self._threads.run(functools.partial(method, *args, **kwargs))

        return plain if colour is Colour.PLAIN else in_thread
