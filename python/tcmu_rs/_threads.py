"""Threads for handlers that block.

`trio.to_thread` hands one call to one thread and takes one answer back: many short calls at once are ten times as dear
as they are one after the other, for the interpreter goes from thread to thread with each. Here a thread that is done
goes on with what waits, and tells the event loop once of all that is over.
"""

from __future__ import annotations

import contextvars
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import trio

IDLE = 10.0
"""Seconds after which a thread ends that has nothing to do."""


class _Call:
    """One call, and what came of it.

    Args:
        function: What to call, in the context of the calling task.
    """

    __slots__ = ("_context", "_function", "error", "result", "task", "token")

    def __init__(self, function: Callable[[], Any]) -> None:
        self._function = function
        self._context = contextvars.copy_context()
        self.task = trio.lowlevel.current_task()
        self.token = trio.lowlevel.current_trio_token()
        self.result: Any = None
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self._context.run(self._function)
        except BaseException as error:
            self.error = error


class Threads:
    """Runs calls in threads: each begins at once while there may be another thread, else in the order they came.

    Args:
        limit: Of threads.
        name: Of each of them.
    """

    def __init__(self, limit: int, name: str) -> None:
        self._limit = limit
        self._name = name
        # Of these three, which both sides change.
        self._changed = threading.Condition(threading.Lock())
        self._waiting: deque[_Call] = deque()
        self._count = 0
        self._idle = 0
        self._over: deque[_Call] = deque()
        self._told = False

    # Ctrl-C comes between any two lines elsewhere: a call would be made, and nobody wait for it.
    @trio.lowlevel.enable_ki_protection
    async def run(self, function: Callable[[], Any]) -> Any:
        """Calls in a thread, and returns or raises what that does.

        It is never given up: the thread may be at work on memory that is lent to it.

        Raises:
            RuntimeError: There can be no thread.
        """
        call = _Call(function)
        self._begin(call)
        await trio.lowlevel.wait_task_rescheduled(lambda _: trio.lowlevel.Abort.FAILED)
        try:
            if call.error is not None:
                raise call.error
            return call.result
        finally:
            # An error has this frame in its traceback, which would be a circle.
            del call

    def _begin(self, call: _Call) -> None:
        with self._changed:
            self._waiting.append(call)
            if len(self._waiting) <= self._idle:
                self._changed.notify()
                return
            if self._count == self._limit:
                return
            self._count += 1
        try:
            threading.Thread(target=self._work, name=self._name, daemon=True).start()
        except RuntimeError:
            with self._changed:
                self._count -= 1
                if self._count:
                    # One of those that there are comes to it.
                    return
                self._waiting.remove(call)
            raise

    def _work(self) -> None:
        while (call := self._next()) is not None:
            call.run()
            token = call.token
            self._over.append(call)
            del call
            if not self._told:
                self._told = True
                # The event loop has ended, and nobody waits any more.
                with suppress(trio.RunFinishedError):
                    token.run_sync_soon(self._take)

    def _next(self) -> _Call | None:
        with self._changed:
            while not self._waiting:
                self._idle += 1
                told = self._changed.wait(IDLE)
                self._idle -= 1
                if not told and not self._waiting:
                    self._count -= 1
                    return None
            return self._waiting.popleft()

    def _take(self) -> None:
        # In this order: of what is over from here on it is told again.
        self._told = False
        while self._over:
            trio.lowlevel.reschedule(self._over.popleft().task)
