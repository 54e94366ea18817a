"""Transfers between files and memory: what the page cache cannot do at once.

The work is in io_uring: one queue for all devices that a run of trio serves. Nobody is hired to look after it: of the
tasks that wait for a transfer one waits for the queue's descriptor, too, and tells the others. Where io_uring is not to
be had each transfer takes a thread.
"""

from __future__ import annotations

import os

import trio

from . import _native

VARIABLE = "TCMU_RS_IO_URING"
"""Environment: `off` has threads do the work."""


class _Queue:
    """The transfers of one run of trio."""

    def __init__(self) -> None:
        self._queue = _native.FileQueue()
        self._waiting: dict[int, trio.lowlevel.Task | None] = {}
        self._over: dict[int, OSError | None] = {}
        self._led = False
        self._due = False

    async def finish(self, transfer: _native.Transfer) -> None:
        """Does a transfer, and returns or raises when the kernel is done with its memory."""
        ticket = self._queue.start(transfer)
        self._waiting[ticket] = None
        try:
            try:
                await self._wait(ticket)
            except GeneratorExit:
                # This task will never run again. The queue keeps the memory until the kernel is done.
                raise
            except BaseException:
                # The kernel has the addresses. It is asked to hurry, and waited for.
                self._queue.cancel(ticket)
                with trio.CancelScope(shield=True):
                    await self._wait(ticket)
                raise
        finally:
            del self._waiting[ticket]
            error = self._over.pop(ticket, None)
        if error is not None:
            try:
                raise error
            finally:
                # It has this frame in its traceback, which would be a circle.
                del error

    async def _wait(self, ticket: int) -> None:
        if not self._due:
            # One system call for all that is started in this pass of the loop.
            self._due = True
            try:
                await trio.lowlevel.cancel_shielded_checkpoint()
            finally:
                self._due = False
                self._go_on()
        while ticket not in self._over:
            if self._led:
                await self._follow(ticket)
            else:
                await self._lead()
        # Whoever leads may be gone with his own transfer.
        if not self._led:
            for other, task in self._waiting.items():
                if task is not None and other not in self._over:
                    self._wake(other, task)
                    break

    async def _lead(self) -> None:
        self._led = True
        try:
            await trio.lowlevel.wait_readable(self._queue.fileno())
        finally:
            self._led = False
            self._go_on()

    async def _follow(self, ticket: int) -> None:
        def abort(_: object) -> trio.lowlevel.Abort:
            self._waiting[ticket] = None
            return trio.lowlevel.Abort.SUCCEEDED

        self._waiting[ticket] = trio.lowlevel.current_task()
        await trio.lowlevel.wait_task_rescheduled(abort)

    def _wake(self, ticket: int, task: trio.lowlevel.Task) -> None:
        self._waiting[ticket] = None
        trio.lowlevel.reschedule(task)

    def _go_on(self) -> None:
        try:
            if self._led:
                # What is over by now wakes him who leads; were it taken from him, he would wait for ever.
                self._queue.submit()
                return
            over = self._queue.finish()
        except OSError as error:
            # The queue is broken, which only a defect can do. Its memory stays lent.
            over = [(ticket, error) for ticket in self._waiting]
        for ticket, result in over:
            if ticket not in self._waiting:
                continue
            self._over[ticket] = result
            task = self._waiting[ticket]
            if task is not None:
                self._wake(ticket, task)

    def close(self) -> None:
        """Gives the descriptor back."""
        trio.lowlevel.notify_closing(self._queue.fileno())
        self._queue.close()


class _Threads:
    """The same without io_uring, for a reason."""

    def __init__(self, reason: str) -> None:
        self.reason = reason

    async def finish(self, transfer: _native.Transfer) -> None:
        """Does a transfer in a thread, which is not abandoned."""
        await trio.to_thread.run_sync(transfer.block)

    def close(self) -> None:
        """Does nothing."""


class _User:
    """Somebody who wants transfers to be done: the way they are is chosen for the first one, and ends with the last."""

    current: trio.lowlevel.RunVar[tuple[int, _Queue | _Threads | None]] = trio.lowlevel.RunVar("tcmu_rs files")

    @trio.lowlevel.enable_ki_protection
    def __enter__(self) -> _Queue | _Threads:
        users, chosen = self.current.get((0, None))
        if chosen is None:
            chosen = _choose()
        self.current.set((users + 1, chosen))
        return chosen

    @trio.lowlevel.enable_ki_protection
    def __exit__(self, *_: object) -> None:
        users, chosen = self.current.get()
        assert chosen is not None
        if users == 1:
            chosen.close()
        self.current.set((users - 1, chosen if users > 1 else None))


def _choose() -> _Queue | _Threads:
    if os.environ.get(VARIABLE) == "off":
        return _Threads(f"turned off by {VARIABLE}")
    try:
        return _Queue()
    except OSError as error:
        return _Threads(str(error))


def obstacle() -> str | None:
    """Why io_uring is not used here; None if it is."""
    chosen = _choose()
    return chosen.reason if isinstance(chosen, _Threads) else None


USER = _User()


# Ctrl-C comes between any two lines elsewhere: a completion would be taken, and nobody told.
@trio.lowlevel.enable_ki_protection
async def finish(transfer: _native.Transfer) -> None:
    """Does what is left of a transfer."""
    with USER as files:
        await files.finish(transfer)
