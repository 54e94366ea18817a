"""What a server of the command line does beside serving.

It heeds signals, its own and those on the leash, and hands its devices to a successor when it is asked to.
"""

from __future__ import annotations

import os
import select
import signal
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager, suppress
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

import trio

from . import _control
from ._supervise import Keeper, Leash
from ._upgrade import Succession, UpgradeError, hand_over

if TYPE_CHECKING:
    from ._runtime import Device

_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Served(Protocol):
    """What is served: a device, or a daemon's devices."""

    def hurry(self) -> None:
        """Ends grace periods."""

    def _estate(self) -> AbstractAsyncContextManager[dict[str, Device]]: ...


_S = TypeVar("_S", bound=Served)


def supervised(inherited: Leash | None, what: str, hold: Callable[[Leash], None]) -> Leash:
    """Becomes the parent of a server. Returns in the server, and once again in each one that is started after a crash.

    Args:
        inherited: The leash of this process, if it is such a server already.
        what: What is served, for messages.
        hold: Called in a server that was started again, before it waits or serves: fences the device, or raises.
    """
    return held(inherited or restarted_by(Keeper(what)), hold)


def held(leash: Leash, hold: Callable[[Leash], None]) -> Leash:
    """Fences what a server that crashed has left, and waits as long as the leash says; see `supervised`."""
    again = not leash.first and not Succession.is_due()
    if again:
        hold(leash)
    if leash.outdated:
        # That takes seconds, so commands are told BUSY before: else they run into the kernel's time-out.
        leash.execute()
    if again:
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
    serving: Callable[[Succession | None], AbstractAsyncContextManager[_S]],
    announce: Callable[[_S], None],
    leash: Leash | None = None,
) -> None:
    """Serves until a signal comes; a second one from the same side, the kernel's or the leash's, ends grace periods.

    Args:
        serving: Makes what is served; gets what a predecessor hands over.
        announce: Tells people, and the supervisor before.
        leash: To the supervisor, if there is one.
    """
    succession = Succession.inherited()
    server = _Server(serving, announce, leash, succession)
    with trio.open_signal_receiver(*_STOP) as signals:
        try:
            await server.run(signals)
        except BaseException as error:
            if succession is not None and not succession.committed.is_set():
                await succession.fail(error)
            raise


class _Server(Generic[_S]):
    def __init__(
        self,
        serving: Callable[[Succession | None], AbstractAsyncContextManager[_S]],
        announce: Callable[[_S], None],
        leash: Leash | None,
        succession: Succession | None,
    ) -> None:
        self._serving = serving
        self._announce = announce
        self._leash = leash
        self._succession = succession
        self._served: _S | None = None
        self._scope = trio.CancelScope()
        # Held while the devices are handed over: a request to stop waits for who has them then.
        self._here = trio.Lock()
        self._asked_to_stop = False

    async def run(self, signals: AsyncIterator[int]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._stop, signals)
            if self._succession is not None:
                await self._succession.receive()
                nursery.start_soon(self._succession.run)
            if self._leash is not None:
                nursery.start_soon(self._heed_leash, self._leash)
            with self._scope:
                async with self._serving(self._succession) as self._served:
                    self._announce(self._served)
                    await _control.offer({"upgrade": self._upgrade})
            nursery.cancel_scope.cancel()

    async def _heed_leash(self, leash: Leash) -> None:
        if self._succession is not None:
            # The predecessor listens to it until then.
            await self._succession.committed.wait()
        await self._stop(leash.signals())

    async def _stop(self, numbers: AsyncIterator[int]) -> None:
        async for _ in numbers:
            self._asked_to_stop = True
            async with self._here:
                if self._leash is not None:
                    self._leash.tell("stopping")
                self._scope.cancel()
            break
        async for _ in numbers:
            if self._served is not None:
                self._served.hurry()

    async def _upgrade(self, request: _control.Message, channel: _control.Channel) -> None:
        """The verb `upgrade`: answers with the successor's `pid` and the `devices`, and does not return."""
        with trio.CancelScope(shield=True):
            async with self._here:
                if self._asked_to_stop or self._served is None:
                    raise UpgradeError("the server is about to end")
                async with self._served._estate() as devices:
                    if not devices:
                        raise UpgradeError("nothing is served here")
                    if volatile := [device.name for device in devices.values() if not device.handler.persistent]:
                        raise UpgradeError(f"what {', '.join(volatile)} stored would go with this process")
                    names = sorted(device.name for device in devices.values())
                    name = self._leash.name if self._leash and self._leash.name else names[0]
                    heir = await hand_over(devices, self._leash, name)
                    # Only the heir may answer for the devices now, whatever goes wrong here.
                    try:
                        if self._leash is not None:
                            self._leash.tell(f"heir {heir.pid}")
                        if self._asked_to_stop:
                            os.kill(heir.pid, signal.SIGTERM)
                        with trio.move_on_after(1), suppress(_control.ControlError):
                            await channel.send({"pid": heir.pid, "devices": names})
                    finally:
                        heir.leave(name)
