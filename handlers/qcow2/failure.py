"""What went wrong for good: after it nothing is written any more."""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar

import trio

logger = logging.getLogger(__name__)
_T = TypeVar("_T")


class Failure:
    """The first error after which it is not certain what is durable, or whether what is in memory is right.

    Args:
        path: Of the image.
        room: Who waits there is told.

    Attributes:
        error: None as long as all is well.
    """

    def __init__(self, path: Path, room: trio.lowlevel.ParkingLot) -> None:
        self._path = path
        self._room = room
        self.error: OSError | None = None

    def check(self) -> None:
        """Raises if there was one."""
        if self.error is not None:
            raise OSError(
                self.error.errno, f"an earlier flush failed, nothing is written any more: {text_of(self.error)}"
            )

    def fail(self, error: OSError) -> None:
        """From now on nothing is written."""
        if self.error is None:
            self.error = error
            logger.error("%s: nothing is written any more: %s", self._path, error)
        self._room.unpark_all()

    async def or_fail(self, work: Awaitable[_T]) -> _T:
        """Does what makes durable: if it fails, nothing is certain any more."""
        try:
            return await work
        except Exception as error:
            self.fail(error if isinstance(error, OSError) else OSError(errno.EIO, repr(error)))
            raise

    async def in_thread(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """The same for what blocks."""
        return await self.or_fail(trio.to_thread.run_sync(function, *arguments))


def text_of(error: Exception) -> str:
    """An error without its number, which the next one has again."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
