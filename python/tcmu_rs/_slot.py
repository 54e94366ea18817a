"""Where a device's handler is, so that another one can take its place while the device stays in service."""

from __future__ import annotations

import logging
from dataclasses import dataclass

import trio

from ._handler import METHODS, BlockHandler, Handler, Verb, check, has

_log = logging.getLogger("tcmu_rs")


class NobodyServesError(RuntimeError):
    """Neither the new handler nor the old one could be opened."""


@dataclass(frozen=True, slots=True)
class Face:
    """What initiators were told when the device appeared, and rely on: any later handler has to stand for it.

    Attributes:
        block: It is a disk, and not a raw handler.
        size: Bytes.
        block_size: Bytes of a logical block.
        methods: Names of the methods that commands may need.
        native_fua: Writes that have to be durable come with `fua`.
        discard_zeroes: Discarded ranges read as zeroes.
        max_atomic_write: Bytes of a write that is stored whole or not at all.
    """

    block: bool
    size: int
    block_size: int
    methods: frozenset[str]
    native_fua: bool
    discard_zeroes: bool
    max_atomic_write: int

    @classmethod
    def of(cls, handler: Handler) -> Face:
        """The face of an open handler."""
        if not isinstance(handler, BlockHandler):
            return cls(False, handler.size, handler.block_size, frozenset({"command"}), False, False, 0)
        methods = {name for name in METHODS.values() if has(handler, name)}
        if handler.read_only:
            methods.discard(METHODS[Verb.WRITE])
        writes = METHODS[Verb.WRITE] in methods
        return cls(
            True,
            handler.size,
            handler.block_size,
            frozenset(methods),
            handler.native_fua and writes,
            handler.discard_zeroes and "discard" in methods,
            handler.max_atomic_write if writes else 0,
        )

    def check(self, handler: Handler) -> None:
        """Refuses a handler that does not stand for what was told.

        Raises:
            TypeError: It is a handler of the other kind, or none that could be served at all.
            ValueError: Something differs; the message says what.
        """
        check(handler)
        new, name = Face.of(handler), type(handler).__name__
        if new.block != self.block:
            raise TypeError(f"{name} is {'a' if new.block else 'no'} BlockHandler, unlike what it is to replace")
        for what in ("size", "block_size"):
            if getattr(new, what) != getattr(self, what):
                raise ValueError(f"{name}.{what} is {getattr(new, what)}; initiators know {getattr(self, what)}")
        if missing := sorted(self.methods - new.methods):
            raise ValueError(f"{name} has no {missing[0]}(), which initiators were told of")
        if "write" in self.methods and "flush" in new.methods - self.methods:
            raise ValueError(f"{name} has a write cache (flush), and initiators were told that there is none")
        for what in ("native_fua", "discard_zeroes", "max_atomic_write"):
            if getattr(new, what) < getattr(self, what):
                raise ValueError(f"{name}.{what} is {getattr(new, what)}; initiators rely on {getattr(self, what)}")


class Slot:
    """Holds the open handler of a device. Whoever opened the first one closes whichever is there in the end.

    Attributes:
        handler: The present one.
    """

    def __init__(self, handler: Handler) -> None:
        self.handler = handler
        self._open = True

    async def exchange(self, handler: Handler, face: Face, within: float) -> None:
        """Closes the present handler, then opens another one, which takes its place.

        In this order, for both may be of one file, which is locked while it is open.

        Args:
            handler: The new one, not open yet.
            face: What it has to stand for.
            within: Seconds for the new one to open.

        Error handling: if the new one does not open, or is refused, the old one is opened again.

        Raises:
            NobodyServesError: The old one could not be opened again. The reason is its cause.
            Exception: What the new one raised, or `Face.check`; the old one is in its place.
        """
        old = self.handler
        with trio.CancelScope(shield=True):
            self._open = False
            try:
                await old.aclose()
                with trio.fail_after(within):
                    await handler.open()
                await _checked(handler, face)
            except BaseException as error:
                try:
                    await old.open()
                    face.check(old)
                except Exception as second:
                    raise NobodyServesError(
                        f"{type(handler).__name__} did not open ({error}), nor did {type(old).__name__} again: {second}"
                    ) from second
                self._open = True
                raise
            self.handler = handler
            self._open = True

    async def aclose(self) -> None:
        """Closes the present handler, if it is open."""
        if self._open:
            self._open = False
            await self.handler.aclose()


async def _checked(handler: Handler, face: Face) -> None:
    try:
        face.check(handler)
    except BaseException:
        await handler.aclose()
        raise
