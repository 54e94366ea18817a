"""A device that is served: its life, and the exchange and the size of its handler while it is in service."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

import trio

from . import _errors, _native, _statistics, _watchdog
from ._domain import CopyDomain, Piece, copy
from ._engine import Engine
from ._handler import Handler, has
from ._slot import Face, NobodyServesError, Slot

logger = logging.getLogger("tcmu_rs")

GRACE = 10.0
"""Seconds that commands in flight get when a device stops."""
_CONFIGFS_WITHIN = 5.0
"""Seconds for the kernel to take a number."""


class Device:
    """A device that is being served.

    Attributes:
        name: Its name, for people.
        handler: What serves it.
        size: Bytes.
        block_size: Bytes of a logical block.
    """

    def __init__(
        self,
        slot: Slot,
        ring: _native.Ring,
        name: str,
        *,
        strict: bool,
        grace: float,
        deadline: float,
        free_kept: Callable[[int], None] | None,
        before_stop: Callable[[], None] | None,
        naa: bytes,
        copy_domain: CopyDomain | None,
        unit: _native.LogicalUnit | None,
        set_kernel_size: Callable[[int], None] | None,
        busy_poll: float,
    ) -> None:
        self.name = name
        self.handler = handler = slot.handler
        self.size = handler.size
        self.block_size = handler.block_size
        self._slot = slot
        self._face = Face.of(handler)
        self._exchange = trio.Lock()
        self._unparked = trio.Event()
        self._unparked.set()
        self._ring = ring
        self._engine = Engine(
            ring,
            handler,
            name=name,
            strict=strict,
            deadline=deadline,
            free_kept=free_kept,
            copy=functools.partial(copy, home=self, domain=copy_domain),
            busy_poll=busy_poll,
        )
        self._grace = grace
        self._before_stop = before_stop
        self._naa = naa
        self._unit = unit
        self._set_kernel_size = set_kernel_size
        self._winding_down: trio.CancelScope | None = None
        self._stop_requested = trio.Event()

    def __repr__(self) -> str:
        return f"<tcmu_rs.Device {self.name!r}, {self.size} bytes, served by {type(self.handler).__name__}>"

    def statistics(self) -> _statistics.DeviceStatistics:
        """Counters and times since the start, and what runs and waits now."""
        return self._engine.statistics(self._storage_statistics())

    def _storage_statistics(self) -> Mapping[str, float]:
        if not self._unparked.is_set():
            # It may just be closed.
            return {}
        try:
            return _statistics.numbers(self.handler.statistics())
        except Exception:
            logger.exception("%s: %s.statistics() failed", self.name, type(self.handler).__name__)
            return {}

    def stop(self) -> None:
        """Asks the device to stop: no new commands, then as when its task is cancelled."""
        self._stop_requested.set()

    def shorten_grace(self, grace: float = 0.0) -> None:
        """Sets the seconds that commands in flight get from now on, when the device stops or is stopping."""
        self._grace = grace
        if self._winding_down is not None:
            self._winding_down.deadline = trio.current_time() + grace

    def fileno(self) -> int:
        """The descriptor of the device."""
        return self._ring.fileno()

    async def pause(self, within: float) -> None:
        """Takes no more commands, and returns when there are none in flight; what comes then waits in the ring.

        Args:
            within: Seconds that the commands may take.

        Raises:
            TooSlowError: One takes longer. The device goes on.
            BusyResourceError: Its handler is just being replaced or resized. The device goes on.
        """
        try:
            self._exchange.acquire_nowait()
        except trio.WouldBlock:
            raise trio.BusyResourceError(f"{self.name}: its handler is just being replaced or resized") from None
        self._engine.hold()
        try:
            with trio.fail_after(within):
                # Some ends of commands wake nobody up, and this is rare.
                while self._engine.is_working:  # noqa: ASYNC110
                    await trio.sleep(0.002)
        except trio.TooSlowError:
            self.resume()
            raise trio.TooSlowError(f"{self.name}: a command has not ended within {within:g} s") from None
        except BaseException:
            self.resume()
            raise

    def resume(self) -> None:
        """Takes commands again, after `pause` in the same task; nothing if it does."""
        if self._engine.is_held:
            self._engine.release()
            self._exchange.release()

    def estate(self) -> dict[str, Any]:
        """What another process needs to go on with the ring of a paused device, beside the descriptor."""
        self._engine.free_kept()
        unit = self._ring.unit_state()
        return {"position": self._ring.quiescent_at(), "unit": unit, "kept": self._ring.kept()}

    async def perform(self, cmd: _native.Command, verb: int, *, foreign: bool) -> _errors.Failure | None:
        """Runs the next piece of a copy among the commands of this device. Returns how it failed, if it did.

        Args:
            cmd: The copy.
            verb: What the piece does.
            foreign: The copy is another device's, and waits while the handler of this one is exchanged.
        """
        # Another exchange may begin before the end of one is heard of here.
        while foreign and not self._unparked.is_set():
            await self._unparked.wait()
        return await self._engine.perform(Piece(cmd, verb))

    # Another handler, or another size.

    async def replace(self, handler: Handler, *, within: float = GRACE) -> None:
        """Has another handler serve the device, which stays in service meanwhile.

        Commands that have begun end with the present handler; those that come wait. Then the present handler is flushed
        and closed, and the new one opened; both may be of the same storage. Initiators notice a pause.

        Args:
            handler: The new one, not open yet. Closing it is the device's from now on, as it was with the one before.
            within: Seconds for what has begun to end, and as many for the new handler to open.

        Error handling: whatever goes wrong, the present handler goes on, opened again if it was closed. If that fails,
        too, the device ends with the error.

        Raises:
            TooSlowError: Commands did not end in time, or the new handler did not open in time.
            TypeError: The new handler cannot be served here.
            ValueError: It differs from what initiators were told of the disk: see `_slot.Face`. It may do more, which
                they are told when the device is made anew.
            BusyResourceError: Another replacement, a change of the size or an upgrade is under way.
            DeviceError: The device ended meanwhile.
            Exception: What opening the new handler raised.
        """
        if handler is self.handler:
            raise ValueError("a handler cannot replace itself")
        async with self._parking():
            with trio.fail_after(within):
                await self._quiesce()
                if has(self.handler, "flush"):
                    await self._engine.invoke("flush")
            try:
                await self._slot.exchange(handler, self._face, within)
            except NobodyServesError as error:
                self._engine.fail(error)
                raise

    async def resize(self, size: int, *, shrink: bool = False, within: float = GRACE) -> None:
        """Changes the size of the disk, which stays in service meanwhile.

        Commands that have begun end first; those that come wait, and find the new size. The next of them is answered
        with CAPACITY DATA HAS CHANGED; what an initiator does with that is its own affair (Linux: `rescan`).

        A disk that grows has its storage before anybody is told; one that shrinks has told the kernel and refuses
        what is behind the new end before its storage goes. So there is never a command for what is not there,
        whenever this process is killed.

        Args:
            size: Bytes.
            shrink: Permit a smaller size than now. What is behind it is lost.
            within: Seconds for what has begun to end.

        Raises:
            TypeError: The handler has no `set_size`.
            ValueError: It is no size of a disk of such blocks, or a smaller one without `shrink`.
            TooSlowError: Commands did not end in time.
            BusyResourceError: A replacement or an upgrade is under way.
            DeviceError: The device ended meanwhile.
            Exception: What `set_size` raised. The disk has the size then that the handler says.
        """
        kind = type(self.handler).__name__
        if not has(self.handler, "set_size"):
            raise TypeError(f"{kind} has no set_size(): {self.name} cannot be resized in service")
        if not 0 < size < 1 << 63 or size % self.block_size:
            raise ValueError(f"{size} is no size of a disk with blocks of {self.block_size} bytes")
        if size < self.size and not shrink:
            raise ValueError(
                f"{size} bytes are less than the {self.size} of now: what is behind would be lost (--shrink)"
            )
        async with self._parking():
            with trio.fail_after(within):
                await self._quiesce()
            if size != self.size:
                with trio.CancelScope(shield=True):
                    await self._set_size(size)

    async def change_snapshots(self, action: str, name: str, *, within: float = GRACE) -> None:
        """Keeps the state of the disk, or forgets one that was kept, while the disk stays in service.

        Commands that have begun end first; those that come wait. So the state is of one moment, with everything that
        was answered: to whoever has written to the disk it is as after a power cut.

        Args:
            action: `create` or `delete`.
            name: Of the state.
            within: Seconds for what has begun to end.

        Raises:
            TypeError: The handler has no `change_snapshots`.
            ValueError: It is another action. To go back to a state would change the disk under its users.
            TooSlowError: Commands did not end in time.
            BusyResourceError: A replacement, a change of the size or an upgrade is under way.
            DeviceError: The device ended meanwhile.
            Exception: What `change_snapshots` raised.
        """
        if action not in ("create", "delete"):
            raise ValueError(f"{action} would change {self.name} under those who use it: detach it first")
        if not has(self.handler, "change_snapshots"):
            raise TypeError(f"{type(self.handler).__name__} has no snapshots in service: detach {self.name} first")
        async with self._parking():
            with trio.fail_after(within):
                await self._quiesce()
            with trio.CancelScope(shield=True):
                await self._engine.invoke("change_snapshots", action, name)

    async def _set_size(self, size: int) -> None:
        handler = self.handler
        if size < self.size:
            await self._announce_size(size)
        try:
            await self._engine.invoke("set_size", size)
            if handler.size != size:
                raise RuntimeError(f"{type(handler).__name__}.set_size({size}) has left size at {handler.size}")
        finally:
            if handler.size != self.size:
                try:
                    await self._announce_size(handler.size)
                except ValueError as error:
                    self._engine.fail(error)

    async def _announce_size(self, size: int) -> None:
        if self._set_kernel_size is not None:
            # Given up rather than waited for: configfs stands still while the device is being removed, and that may
            # wait for us.
            with trio.fail_after(_CONFIGFS_WITHIN):
                await trio.to_thread.run_sync(self._set_kernel_size, size, abandon_on_cancel=True)
        if self._unit is not None:
            self._unit.set_size(size)
        self.size = size
        self._face = dataclasses.replace(self._face, size=size)

    @asynccontextmanager
    async def _parking(self) -> AsyncIterator[None]:
        """Keeps commands that come from the handler; after the block, whichever is there then gets them."""
        try:
            self._exchange.acquire_nowait()
        except trio.WouldBlock:
            raise trio.BusyResourceError(f"{self.name}: another change is under way") from None
        self._engine.park()
        try:
            yield
        finally:
            before, self.handler = self.handler, self._slot.handler
            self._unparked.set()
            self._engine.unpark(self.handler if self.handler is not before else None)
            self._exchange.release()

    async def _quiesce(self) -> None:
        await self._engine.quiesce()
        # Not before: others' copies have to go on, for they are waited for there, maybe by one that we wait for here.
        self._unparked = trio.Event()

    # The whole life.

    async def run(self, task_status: trio.TaskStatus[Device]) -> None:
        """Serves until cancelled or stopped; raises `DeviceError` if the device is over before."""
        shield = trio.CancelScope(shield=True)
        try:
            with _watchdog.watching():
                await self._serve(shield, task_status)
        finally:
            # Whoever closes the handler next must not meet an exchange.
            with trio.CancelScope(shield=True):
                async with self._exchange:
                    self._engine.close()

    async def _serve(self, shield: trio.CancelScope, task_status: trio.TaskStatus[Device]) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._engine.run, shield)
            task_status.started(self)
            try:
                await self._stop_requested.wait()
            finally:
                await self._wind_down(shield)

    async def _wind_down(self, shield: trio.CancelScope) -> None:
        """No new commands; a grace period for those in flight; then they are cancelled."""
        self._engine.stop()
        try:
            if self._before_stop is not None:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(self._before_stop)
            with trio.CancelScope(shield=True, deadline=trio.current_time() + self._grace) as self._winding_down:
                await self._engine.drain()
        finally:
            shield.cancel()
