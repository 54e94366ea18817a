"""What a server of the command line does beside serving: it heeds signals, its own and those on the leash."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol, TypeVar

import trio

from ._supervise import Keeper, Leash

_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Served(Protocol):
    """What is served: a device, or a daemon's devices."""

    def hurry(self) -> None:
        """Ends grace periods."""


_S = TypeVar("_S", bound=Served)


def supervised(what: str, hold: Callable[[Leash], None]) -> Leash:
    """Becomes the parent of a server. Returns in the server, and once again in each one that is started after a crash.

    Args:
        what: What is served, for messages.
        hold: Called in a server that was started again, before it waits or serves: fences the device, or raises.
    """
    leash = Leash.inherited() or restarted_by(Keeper(what))
    if not leash.first:
        hold(leash)
        # Over at once if there is something to hear.
        select.select([leash.sock], [], [], leash.delay)
    return leash


def restarted_by(keeper: Keeper) -> Leash:
    """Has a keeper of one server run."""
    keeper.add()
    return keeper.run()


def pid_of_service(leash: Leash | None) -> int:
    """The process that stays while servers come and go: to it signals should be sent."""
    return os.getppid() if leash else os.getpid()


async def serve_until_signal(
    serving: Callable[[], AbstractAsyncContextManager[_S]],
    announce: Callable[[_S], None],
    leash: Leash | None = None,
) -> None:
    """Serves until a signal comes; a second one from the same side, the kernel's or the leash's, ends grace periods.

    Args:
        serving: Makes what is served.
        announce: Tells people, and the supervisor before.
        leash: To the supervisor, if there is one.
    """
    served: _S | None = None
    scope = trio.CancelScope()

    async def stop(numbers: AsyncIterator[int]) -> None:
        async for _ in numbers:
            if leash is not None:
                leash.tell("stopping")
            scope.cancel()
            break
        async for _ in numbers:
            if served is not None:
                served.hurry()

    with trio.open_signal_receiver(*_STOP) as signals:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop, signals)
            if leash is not None:
                nursery.start_soon(stop, leash.signals())
            with scope:
                async with serving() as served:
                    announce(served)
                    await trio.sleep_forever()
            nursery.cancel_scope.cancel()
