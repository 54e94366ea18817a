"""Busy polling: a worker looks at its ring for a while before it sleeps, so that the next command wakes nobody up."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from . import _native

TURN = 50_000
"""Nanoseconds between two passes of the event loop."""
START = 10_000
"""Nanoseconds of the first window."""


def next_window(window: int, waited: int, limit: int) -> int:
    """How long to look next time, in nanoseconds.

    As KVM adapts its halt polling (`adjust_halt_poll_ns` of Linux): longer if that would have met the command, not at
    all as soon as not even the limit would have.

    Args:
        window: How long it was.
        waited: How long the command let one wait.
        limit: How long it may be.
    """
    if waited <= window:
        return window
    return min(limit, max(2 * window, START)) if waited < limit else 0


class Polling:
    """Waits for the commands of one ring.

    Args:
        ring: The ring.
        limit: Seconds to look before it sleeps, at most.
    """

    def __init__(self, ring: _native.Ring, limit: float) -> None:
        self._ring = ring
        self._limit = int(limit * 1e9)
        self._window = 0
        self._turned = 0

    async def wait(self) -> None:
        """Returns when there are commands, or an event. Other tasks have their turn meanwhile.

        Raises:
            DeviceError: The ring is over.
        """
        now = began = time.perf_counter_ns()
        end = began + self._window
        while now < end:
            if now - self._turned >= TURN:
                await trio.lowlevel.checkpoint()
                self._turned = time.perf_counter_ns()
            if self._ring.look(TURN):
                break
            now = time.perf_counter_ns()
        else:
            await trio.lowlevel.wait_readable(self._ring.fileno())
            self._turned = time.perf_counter_ns()
        self._window = next_window(self._window, time.perf_counter_ns() - began, self._limit)
