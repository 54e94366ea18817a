"""Transfers between files and memory: what the page cache cannot do at once.

There is one queue for all devices that a run of trio serves. It lives as long as one of them is served, or a transfer
is under way; a system task waits for what is over, and wakes up who waits for that: a task, or the device of a command
that waits without one. What is started in one pass of the loop begins together, in the next.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Coroutine
from typing import Any, NoReturn

import trio

from . import _native

VARIABLE = "TCMU_RS_IO_URING"
"""Environment: `off` has threads do all the work."""


class _Queue:
    """The transfers of one run of trio."""

    def __init__(self, queue: _native.FileQueue) -> None:
        self.users = 0
        self.queue = queue
        self._waiting: dict[int, trio.lowlevel.Task] = {}
        self._errors: dict[int, OSError] = {}
        self._closed = False
        trio.lowlevel.spawn_system_task(self._serve, name="<tcmu_rs files>")

    # Ctrl-C comes between any two lines elsewhere: a transfer would be started, and nobody wait for it.
    @trio.lowlevel.enable_ki_protection
    async def finish(self, transfer: _native.Transfer) -> None:
        """Does a transfer, and returns or raises when its memory is not used any more.

        One that is cancelled is asked to end early, and waited for. If it ends well all the same, so be it.
        """
        ticket = self.queue.start(transfer)
        self._waiting[ticket] = trio.lowlevel.current_task()
        cancelled: Callable[[], NoReturn] | None = None

        def abort(raise_cancel: Callable[[], NoReturn]) -> trio.lowlevel.Abort:
            nonlocal cancelled
            cancelled = raise_cancel
            self.queue.cancel(ticket)
            return trio.lowlevel.Abort.FAILED

        try:
            await trio.lowlevel.wait_task_rescheduled(abort)
        finally:
            # If this task is never to run again. The queue keeps the memory as long as it is needed.
            self._waiting.pop(ticket, None)
        if ticket in self._errors:
            error = self._errors.pop(ticket)
            try:
                if cancelled is not None and error.errno == errno.ECANCELED:
                    cancelled()
                raise error
            finally:
                # It has this frame in its traceback, which would be a circle.
                del error

    async def _serve(self) -> None:
        # System tasks are cancelled when the main task ends, and others may have to wait for transfers even then.
        with trio.CancelScope(shield=True):
            while not self._closed:
                try:
                    await trio.lowlevel.wait_readable(self.queue.fileno())
                except trio.ClosedResourceError:
                    return
                self._take()

    def _take(self) -> None:
        over: list[tuple[int, OSError | None]]
        try:
            over = self.queue.finish()
        except OSError as broken:
            # Only a defect can do that. Its memory stays lent.
            over = [(ticket, broken) for ticket in self._waiting]
        for ticket, error in over:
            task = self._waiting.pop(ticket, None)
            if task is not None:
                if error is not None:
                    self._errors[ticket] = error
                trio.lowlevel.reschedule(task)
        self.close_if_unused()

    def close_if_unused(self) -> None:
        """Gives everything back, if nobody has a use for it."""
        if self.users or self._waiting or self.queue.waiting or self._closed:
            return
        self._closed = True
        _current.set(None)
        trio.lowlevel.notify_closing(self.queue.fileno())
        # Waits for transfers that nobody waits for.
        self.queue.close()


_current: trio.lowlevel.RunVar[_Queue | None] = trio.lowlevel.RunVar("tcmu_rs files", None)


def _open() -> _Queue:
    queue = _current.get()
    if queue is None:
        queue = _Queue(_choose()[0])
        _current.set(queue)
    return queue


def _choose() -> tuple[_native.FileQueue, str | None]:
    """A queue; and why it is without io_uring, if it is."""
    if os.environ.get(VARIABLE) == "off":
        return _native.FileQueue(io_uring=False), f"turned off by {VARIABLE}"
    try:
        return _native.FileQueue(io_uring=True), None
    except OSError as error:
        return _native.FileQueue(io_uring=False), str(error)


def obstacle() -> str | None:
    """Why io_uring is not used here; None if it is."""
    queue, reason = _choose()
    queue.close()
    return reason


class _User:
    """Somebody who will want transfers to be done: keeps the queue, so that it is not made for each of them."""

    @trio.lowlevel.enable_ki_protection
    def __enter__(self) -> None:
        _open().users += 1

    @trio.lowlevel.enable_ki_protection
    def __exit__(self, *_: object) -> None:
        queue = _open()
        queue.users -= 1
        queue.close_if_unused()


USER = _User()


def queue() -> _native.FileQueue:
    """The queue, for who is a `USER`."""
    return _open().queue


@trio.lowlevel.enable_ki_protection
def finish(transfer: _native.Transfer) -> Coroutine[Any, Any, None]:
    """Does what is left of a transfer."""
    return (_current.get() or _open()).finish(transfer)
