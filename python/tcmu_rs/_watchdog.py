"""Says so when an event loop stands still: then no device of it can answer, and the loop cannot tell.

One thread per loop that serves devices. Every few seconds it asks the loop for a sign of life, which costs the loop
one wake-up; it looks at the loop's stack only if none comes. Code that blocks without giving up the interpreter's lock
stops the thread, too: such is found by the kernel's time-out alone.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import trio

from . import _where

_log = logging.getLogger("tcmu_rs")

PATIENCE = 10.0
"""Seconds without a sign of life before it is told."""


class Watchdog:
    """The watch over one event loop; made by `watching`."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._token = trio.lowlevel.current_trio_token()
        self._loop = threading.get_ident()
        self._stop = threading.Event()
        self._alive = threading.Event()
        self.users = 0
        self._thread = threading.Thread(target=self._watch, name="tcmu_rs watchdog", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the watch."""
        self._stop.set()
        self._alive.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(self._patience / 2):
            self._alive.clear()
            # The end may have come between the two.
            if self._stop.is_set():
                return
            asked = time.monotonic()
            # The loop is over: so is the watch.
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(self._alive.set)
            if self._alive.wait(self._patience):
                continue
            place, text = _where.stack(self._loop)
            _log.error(
                "the event loop stands still for %g s, and all its devices with it, at %s\n%s",
                self._patience, place, text,
            )  # fmt: skip
            self._alive.wait()
            if self._stop.is_set():
                return
            _log.warning("the event loop goes on after %.1f s", time.monotonic() - asked)


_current: trio.lowlevel.RunVar[Watchdog] = trio.lowlevel.RunVar("tcmu_rs watchdog")


@contextmanager
def watching(patience: float | None = None) -> Iterator[None]:
    """Watches the running event loop for the length of a `with` block; blocks that overlap share one watch."""
    try:
        dog = _current.get()
    except LookupError:
        dog = None
    if dog is None or dog.users == 0:
        dog = Watchdog(PATIENCE if patience is None else patience)
        _current.set(dog)
    dog.users += 1
    try:
        yield
    finally:
        dog.users -= 1
        if dog.users == 0:
            dog.stop()
