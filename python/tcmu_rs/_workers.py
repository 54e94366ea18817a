"""The tasks that run a device's commands: how many there are, and which of them have nothing to do."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import trio


class Workers:
    """The workers of one device.

    Args:
        work: What each of them does. It calls `leave` when it is over.
        name: Of their tasks.

    Attributes:
        count: How many there are.
        limit: How many there may be.
        nursery: Where they live; None before and after that, and then nobody is hired.
    """

    def __init__(self, work: Callable[[], Awaitable[None]], name: str) -> None:
        self.count = 0
        self.limit = 0
        self.nursery: trio.Nursery | None = None
        self._work = work
        self._name = name
        self._idle: list[trio.lowlevel.Task] = []

    def call(self, wanted: int) -> None:
        """Has so many go on that have nothing to do; one new one is hired if they are not enough."""
        for _ in range(wanted):
            if self._idle:
                trio.lowlevel.reschedule(self._idle.pop())
            elif self.count < self.limit:
                self.hire()
                break

    def hire(self) -> None:
        """One more."""
        if self.nursery is not None:
            self.count += 1
            self.nursery.start_soon(self._work, name=self._name)

    def leave(self) -> None:
        """The calling one is over. After the last one nobody is hired: the nursery takes no more tasks then."""
        self.count -= 1
        if not self.count:
            self.nursery = None

    async def rest(self) -> None:
        """The calling one has nothing to do until it is called."""
        task = trio.lowlevel.current_task()
        self._idle.append(task)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._idle.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
