"""Views that a handler keeps beyond the answer of their command, and the memory that stays in use for them."""

from __future__ import annotations

import logging
from collections.abc import Callable

import trio

from . import _native

logger = logging.getLogger("tcmu_rs")


class Kept:
    """The kept views of one device.

    Args:
        ring: Which notices when they go.
        name: Of the device, for the log.
        tell: Tells the kernel that the memory of a command is free.

    Attributes:
        is_watched: Somebody waits for them to go.
    """

    def __init__(self, ring: _native.Ring, name: str, tell: Callable[[int], None] | None) -> None:
        self.is_watched = False
        self._ring = ring
        self._name = name
        self._tell = tell

    def add(self, cmd: _native.Command, method: str) -> None:
        """Logs that `Class.method` has kept views of an answered command."""
        logger.warning(
            "%s: %s() kept %d views of a command's data after it returned; their memory stays in use",
            self._name, method, cmd.lent,
        )  # fmt: skip
        # Who has the last view may be another thread, between a look at what has gone and the first wait.
        self._ring.wake_fileno()

    async def wait(self) -> None:
        """Returns when views may have gone."""
        await trio.lowlevel.wait_readable(self._ring.wake_fileno())

    def free(self) -> None:
        """Tells the kernel of the memory of those that have gone."""
        for cmd_id in self._ring.reap():
            if self._tell is not None:
                try:
                    self._tell(cmd_id)
                except OSError as error:
                    # Blocks of the data area are lost then; that is no reason to lose the device.
                    logger.warning("%s: the buffer of command %d cannot be freed: %s", self._name, cmd_id, error)
