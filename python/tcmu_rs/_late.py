"""Commands that take too long: their deadline, what they wait for, and handlers that do not heed a cancellation.

Nothing here is on the way of a command that does not suspend. While some are suspended, or wait for their turn, a task
looks at all of them once a second.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import trio

from . import _where
from ._statistics import LATE, LateCommand

if TYPE_CHECKING:
    from collections.abc import Coroutine, Iterator

    from . import _native

logger = logging.getLogger("tcmu_rs")

SWEEP = 1.0
"""Seconds between two looks."""


class Cancellable(Protocol):
    """What ends a command: a `trio.CancelScope`, or the transfer that it waits for."""

    def cancel(self) -> None:
        """Asks for the end."""

    @property
    def cancel_called(self) -> bool:
        """Whether that was done."""


Suspended = tuple[Cancellable, "_native.Command", str, "Coroutine[Any, Any, Any] | None"]
"""A command in its handler: what ends it, the command, `Class.method`, its coroutine."""


class Overseer:
    """Looks after the commands of one device.

    Args:
        name: Of the device, for the log.
        deadline: Seconds that a command may take.
        suspended: The commands in their handlers.
        waiting: The commands that wait for their turn.
        turn_away: Answers some of those, for initiators to send them again.
    """

    def __init__(
        self,
        name: str,
        deadline: float,
        suspended: Callable[[], list[Suspended]],
        waiting: Callable[[], list[_native.Command]],
        turn_away: Callable[[list[_native.Command]], None],
    ) -> None:
        self._name = name
        self._deadline = deadline
        self._suspended = suspended
        self._waiting = waiting
        self._turn_away = turn_away
        self._threads: dict[_native.Command, int] = {}
        self._timed_out: set[_native.Command] = set()
        self._cancelled: set[_native.Command] = set()
        self._told: set[_native.Command] = set()
        self._running = False

    @property
    def running(self) -> bool:
        """Whether it looks, or will."""
        return self._running

    def start(self, nursery: trio.Nursery) -> None:
        """Looks until there is nothing to look at; does nothing if it does so already."""
        if not self._running:
            self._running = True
            nursery.start_soon(self._run)

    def timed_out(self, cmd: _native.Command) -> bool:
        """Whether a command that is cancelled was so for its deadline."""
        return cmd in self._timed_out

    @contextmanager
    def in_thread(self, cmd: _native.Command) -> Iterator[None]:
        """Notes that the calling thread works for a command."""
        self._threads[cmd] = threading.get_ident()
        try:
            yield
        finally:
            del self._threads[cmd]

    def late(self) -> tuple[LateCommand, ...]:
        """The commands that are in their handlers for too long, the oldest first."""
        found = [
            LateCommand(
                method.rpartition(".")[2],
                cmd.offset,
                cmd.length,
                cmd.age / 1e9,
                self._where(cmd, coroutine),
                scope.cancel_called,
            )
            for scope, cmd, method, coroutine in self._suspended()
            if cmd.age > LATE * 1e9
        ]
        return tuple(sorted(found, key=lambda command: -command.age))

    async def _run(self) -> None:
        # A command is taken to be as old as the look before the one that found it: the deadline is never late.
        since: dict[_native.Command, float] = {}
        interval = min(SWEEP, self._deadline / 4)
        previous = trio.current_time()
        while self._suspended() or self._waiting():
            await trio.sleep(interval)
            now = trio.current_time()
            suspended = [item for item in self._suspended() if not item[1].answered]
            waiting = self._waiting()
            since = {cmd: since.get(cmd, previous) for cmd in (*(item[1] for item in suspended), *waiting)}
            previous = now
            for kept in (self._told, self._timed_out, self._cancelled):
                kept &= since.keys()
            for item in suspended:
                self._look_at(item, now - since[item[1]])
            late = [cmd for cmd in waiting if now - since[cmd] >= self._deadline and not cmd.answered]
            if late:
                logger.warning("%s: %d commands had no turn within %g s", self._name, len(late), self._deadline)
                self._turn_away(late)
        self._running = False

    def _look_at(self, item: Suspended, age: float) -> None:
        scope, cmd, method, coroutine = item
        what = f"{method}() of {cmd.length} bytes at {cmd.offset}"
        if not scope.cancel_called:
            if age >= self._deadline:
                where = self._where(cmd, coroutine)
                logger.warning("%s: %s is cancelled after %g s, at %s", self._name, what, age, where)
                self._timed_out.add(cmd)
                scope.cancel()
        elif cmd not in self._cancelled:
            # It gets a whole interval to let the cancellation through.
            self._cancelled.add(cmd)
        elif cmd not in self._told:
            self._told.add(cmd)
            logger.error("%s: %s was cancelled and goes on, at %s", self._name, what, self._where(cmd, coroutine))

    def _where(self, cmd: _native.Command, coroutine: Coroutine[Any, Any, Any] | None) -> str:
        thread = self._threads.get(cmd)
        return _where.await_point(coroutine) if thread is None else _where.thread_point(thread)
