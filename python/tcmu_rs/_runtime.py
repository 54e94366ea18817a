"""The engine under every device: commands out of the ring, into handlers, and their answers back.

Life of a device: `serve_ring` starts one worker. A worker that has nothing to run waits for the ring, takes a batch
out of it, and runs the commands one after the other, in its own task. While no handler suspends, that is all there
is: one wake-up, a coroutine call per command, one doorbell. The moment a handler does suspend, and not before,
another worker is called up to go on with the rest and with the ring. Workers grow to `max_in_flight` that run
commands, one more that watches the ring, so that even a device whose handlers all hang hears of aborted commands, and
one that hands back answers when all of these are busy.

Each worker has a cancel scope around the commands it runs, entered once, not once per command. Task management
cancels the scope of the command meant; the worker then enters a new one.
"""

from __future__ import annotations

import dataclasses
import logging
import traceback
import types
from collections import deque
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any, cast

import trio

from . import _errors, _native, _statistics, _watchdog
from ._calls import Calls
from ._domain import NOT_REACHABLE, CopyDomain, Piece
from ._handler import Colour, Handler, Verb, colour_of, has
from ._late import Overseer, Suspended
from ._polling import Polling
from ._slot import Face, NobodyServesError, Slot

logger = logging.getLogger("tcmu_rs")

BATCH = 64
"""Entries taken from the ring at once, and commands between two passes of the loop."""
SMALLEST = 8
"""Commands that a batch counts for beside its own: answering it is more than them."""
STEPS = 4
"""Steps of one command between two passes of the loop."""
LAST_BATCHES = 16
"""Batches of new commands that a device turns away when it ends; an initiator may send them again at once."""
GRACE = 10.0
"""Seconds that commands in flight get when a device stops."""
_CONFIGFS_WITHIN = 5.0
"""Seconds for the kernel to take a number."""

_ABORTED = _errors.Failure(_errors.TASK_ABORTED)
_BUSY = _errors.Failure(_errors.BUSY)
# COMMAND TIMEOUT DURING PROCESSING: initiators send such a command again, and not one that the kernel has timed out.
_TIMED_OUT = _errors.Failure(_errors.CHECK_CONDITION, 0xB, 0x2E, 0x02)
_BUG = _errors.HardwareError.failure
_INVALID_OPCODE = _errors.Failure(_errors.CHECK_CONDITION, 0x5, 0x20, 0x00)

_Coroutine = Coroutine[Any, Any, Any]
_Begun = tuple[_Coroutine, Any] | BaseException | None
"""How far a command is: a coroutine that has suspended, and what it waits for; what was raised; or not begun."""


@types.coroutine
def _resume(coroutine: _Coroutine, trap: Any) -> Generator[Any, Any, Any]:
    """Goes on with a coroutine that has suspended with `trap`, on behalf of the task that awaits this."""
    while True:
        try:
            value = yield trap
        except GeneratorExit:
            coroutine.close()
            raise
        except BaseException as error:
            try:
                trap = coroutine.throw(error)
            except StopIteration as stop:
                return stop.value
        else:
            try:
                trap = coroutine.send(value)
            except StopIteration as stop:
                return stop.value


def _forget(error: BaseException) -> None:
    """Drops the tracebacks of an exception that is dealt with.

    They hold the frames of the handler, and these may hold views of the command's data; while somebody still has the
    exception (a thread on its way out, a record in a log, a circle of references) its memory could not be used again.
    """
    errors: list[BaseException | None] = [error]
    seen = set()
    while errors:
        this = errors.pop()
        if this is None or id(this) in seen:
            continue
        seen.add(id(this))
        this.__traceback__ = None
        errors += [this.__cause__, this.__context__]
        if isinstance(this, BaseExceptionGroup):
            errors += this.exceptions


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
        self._slot = slot
        self.handler = handler = slot.handler
        self._face = Face.of(handler)
        self._exchange = trio.Lock()
        self._parked: deque[_native.Command] | None = None
        self._unparked = trio.Event()
        self._unparked.set()
        self._quiet: trio.Event | None = None
        self.size = handler.size
        self.block_size = handler.block_size
        self._ring = ring
        self._polling = Polling(ring, busy_poll) if busy_poll > 0 else None
        self._strict = strict
        self._grace = grace
        self._free_kept = free_kept
        self._before_stop = before_stop
        self._naa = naa
        self._copy_domain = copy_domain
        self._unit = unit
        self._set_kernel_size = set_kernel_size
        self._copies = 0
        self._waiting_pieces: dict[int, Piece] = {}
        self._max_in_flight = handler.max_in_flight
        self._pending: deque[_native.Command] = deque()
        self._idle: list[trio.lowlevel.Task] = []
        self._suspended: dict[int, Suspended] = {}
        self._overseer = Overseer(name, deadline, self._all_suspended, self._waiting, self._turn_away_late)
        self._calls = self._calls_of(handler)
        self._workers = 0
        self._running = 0
        self._pumping = False
        self._taken = 0
        self._dirty = False
        self._committing = False
        self._calling = 2
        self._stopping = False
        self._broken = False
        self._drained = trio.Event()
        self._winding_down: trio.CancelScope | None = None
        self._reaping = False
        self._bugs: set[tuple[str, str]] = set()
        self._nursery: trio.Nursery | None = None
        self._stop_requested = trio.Event()
        self._resumed: trio.Event | None = None
        self._last_call: trio.Event | None = None

    def __repr__(self) -> str:
        return f"<tcmu_rs.Device {self.name!r}, {self.size} bytes, served by {type(self.handler).__name__}>"

    def statistics(self) -> _statistics.DeviceStatistics:
        """Counters and times since the start, and what runs and waits now."""
        return _statistics.record(
            self._ring.statistics(),
            in_flight=self._ring.in_flight,
            running=self._in_handlers,
            pending=len(self._waiting()),
            late=self._overseer.late(),
            storage=self._storage_statistics(),
        )

    def _storage_statistics(self) -> Mapping[str, float]:
        if self._parked is not None:
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
        self._resumed = trio.Event()
        try:
            with trio.fail_after(within):
                # Some ends of commands wake nobody up, and this is rare.
                while self._is_working():  # noqa: ASYNC110
                    await trio.sleep(0.002)
        except trio.TooSlowError:
            self.resume()
            raise trio.TooSlowError(f"{self.name}: a command has not ended within {within:g} s") from None
        except BaseException:
            self.resume()
            raise

    def resume(self) -> None:
        """Takes commands again, after `pause` in the same task; nothing if it does."""
        if self._resumed is not None:
            self._resumed.set()
            self._resumed = None
            self._exchange.release()

    def _is_working(self) -> bool:
        waiting = self._pending or self._waiting_pieces or self._dirty
        return bool(self._in_handlers or self._copies or waiting or self._ring.quiescent_at() is None)

    def estate(self) -> dict[str, Any]:
        """What another process needs to go on with the ring of a paused device, beside the descriptor."""
        self._free_released()
        unit = self._ring.unit_state()
        return {"position": self._ring.quiescent_at(), "unit": unit, "kept": self._ring.kept()}

    # Another handler.

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
                    await self._invoke("flush")
            try:
                await self._slot.exchange(handler, self._face, within)
            except NobodyServesError as error:
                self._fail(error)
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
                await self._invoke("change_snapshots", action, name)

    async def _set_size(self, size: int) -> None:
        handler = self.handler
        if size < self.size:
            await self._announce_size(size)
        try:
            await self._invoke("set_size", size)
            if handler.size != size:
                raise RuntimeError(f"{type(handler).__name__}.set_size({size}) has left size at {handler.size}")
        finally:
            if handler.size != self.size:
                try:
                    await self._announce_size(handler.size)
                except ValueError as error:
                    self._fail(error)

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
        self._parked = deque()
        self._unparked = trio.Event()
        try:
            yield
        finally:
            self._resume_with(self._slot.handler)
            self._exchange.release()

    async def _quiesce(self) -> None:
        """Waits until all that has begun is over."""
        while not self._is_quiet():
            self._quiet = trio.Event()
            self._nudge()
            await self._quiet.wait()
        self._quiet = None

    def _is_quiet(self) -> bool:
        if self._stopping:
            raise _errors.DeviceError(f"{self.name} ended")
        if self._in_handlers or self._copies or self._pending or self._waiting_pieces:
            return False
        self._commit()
        return not self._pending and self._ring.in_flight == len(self._parked or ())

    async def _invoke(self, name: str, *args: Any) -> None:
        method: Callable[..., Any] = getattr(self.handler, name)
        if colour_of(method) is Colour.BLOCKING:
            await trio.to_thread.run_sync(method, *args, limiter=self._calls.limiter)
        elif (result := method(*args)) is not None:
            await result

    def _resume_with(self, handler: Handler) -> None:
        """Begins the commands that came meanwhile, with the handler that is there now."""
        parked, self._parked, self._quiet = self._parked or (), None, None
        self._unparked.set()
        if handler is not self.handler:
            self.handler = handler
            self._max_in_flight = handler.max_in_flight
            self._calls = self._calls_of(handler)
            intercept = has(handler, "scsi_command")
            self._ring.serve_another(intercept=intercept, fills_reads=getattr(handler, "fills_reads", False))
        whole = self._calls.has(None)
        # Each is answered, needs the handler, or has to wait for others and comes out of the ring again.
        with suppress(_errors.DeviceError):
            self._pending.extend([cmd for cmd in parked if whole or cmd.emulate()])
        self._dirty = True
        self._nudge()

    def _fail(self, error: Exception) -> None:
        # At once: nothing may begin any more, with a handler that is closed.
        self._stopping = True

        async def fail() -> None:
            raise error

        if self._nursery is not None:
            self._nursery.start_soon(fail)

    # Workers.

    async def _worker(self) -> None:
        try:
            with self._first_device_error():
                while self._has_work:
                    with trio.CancelScope() as scope:
                        await self._work(scope)
                # Nobody comes to hand this back while other commands use up the grace period.
                self._commit()
        finally:
            self._workers -= 1

    @contextmanager
    def _first_device_error(self) -> Iterator[None]:
        """Lets one `DeviceError` through: what the others find afterwards is its consequence."""
        try:
            yield
        except _errors.DeviceError:
            if not self._broken:
                self._broken = self._stopping = True
                raise

    @property
    def _has_work(self) -> bool:
        """Whether workers are needed: in the end until nothing waits for a transfer."""
        return not self._stopping or self._calls.methods.waiting > 0

    async def _work(self, scope: trio.CancelScope) -> None:
        """Runs commands and watches the ring until the scope is spent on an aborted command, or the device stops."""
        waited = False
        while self._has_work:
            may_begin = self._pending and not self._stopping and self._in_handlers < self._max_in_flight
            if may_begin or self._calls.methods.over:
                if (begun := self._run_at_once(scope)) is not None:
                    await self._run(*begun, scope)
                    # What nobody runs in is not cancelled by others.
                    if scope.cancel_called:
                        break
                    del begun
                continue
            if self._dirty and not self._committing:
                # Others may finish in this pass of the loop too: one doorbell for all of them. When none can, at once.
                if self._running and not waited:
                    waited = self._committing = True
                    try:
                        await trio.lowlevel.cancel_shielded_checkpoint()
                    finally:
                        self._committing = False
                    continue
                self._commit()
                waited = False
                # Commands may have waited for those that are answered now.
                continue
            waited = False
            if self._pumping or self._stopping:
                await self._park()
            else:
                await self._pump()

    async def _pump(self) -> None:
        """Waits for the ring and takes a batch."""
        self._pumping = True
        taken = 0
        try:
            if self._resumed is not None:
                await self._resumed.wait()
            elif self._ring.pending() and self._taken < BATCH and not self._running:
                # A pass of the loop would cost as much as a small batch, and no handler waits for it.
                taken = self._taken
            elif self._ring.pending():
                await trio.lowlevel.checkpoint()
            elif self._polling is None or self._in_handlers:
                # What handlers wait for comes by way of the event loop.
                await trio.lowlevel.wait_readable(self._ring.fileno())
            else:
                await self._polling.wait()
            if self._stopping or self._resumed is not None:
                return
            parked = self._parked
            commands, notices = self._ring.drain(BATCH, parked is not None)
            self._taken = taken + SMALLEST + len(commands)
        finally:
            self._pumping = False
        # What the emulation answered is not handed back yet, nor the space of entries that need no answer.
        self._dirty = True
        if self._waiting_pieces:
            self._grant()
        if parked is None:
            self._pending.extend(commands)
        else:
            for cmd in commands:
                # Those that have waited for others go on with the handler that is there.
                (parked if cmd.verb is None and cmd.piece is None else self._pending).append(cmd)
            self._oversee()
        for notice in notices:
            self._abort(notice.commands)

    async def _park(self) -> None:
        task = trio.lowlevel.current_task()
        self._idle.append(task)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._idle.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)

    def _call_workers(self) -> None:
        """A command has suspended: sees to it that somebody goes on with what waits, and with the ring."""
        room = min(len(self._pending), self._max_in_flight - self._in_handlers) + self._calls.methods.over
        # Two, four, and so on: a batch of suspending commands is under way after a few passes of the loop, and the next
        # one after two.
        wanted = min(self._calling, room) or int(self._dirty or not self._pumping)
        self._calling = min(2 * self._calling, self._max_in_flight)
        for _ in range(wanted):
            if self._idle:
                trio.lowlevel.reschedule(self._idle.pop())
            elif self._workers < self._max_in_flight + 2:
                self._hire()
                break

        self._oversee()

    def _hire(self) -> None:
        if self._nursery is not None:
            self._workers += 1
            self._nursery.start_soon(self._worker, name=f"<tcmu_rs worker of {self.name}>")

    def _resume(self, scope: trio.CancelScope) -> tuple[_native.Command, _Begun] | None:
        """Goes on with commands whose transfers are over, as `_run_at_once`; cancels the scope for one that was."""
        self._dirty = True
        while (resumed := self._calls.methods.resume()) is not None:
            cmd, begun, cancelled = resumed
            if isinstance(begun, int):
                self._keep(cmd, begun)
                continue
            if cancelled:
                scope.cancel()
            return cmd, None if begun is NotImplemented else cast("_Begun", begun)
        if self._stopping or self._quiet is not None:
            self._is_idle()
        return None

    def _run_at_once(self, scope: trio.CancelScope) -> tuple[_native.Command, _Begun] | None:
        """Runs what waits, one command after the other, as long as a call or a transfer is all that they need.

        Returns the first one that needs more, and how far it is.
        """
        if (resumed := self._resume(scope)) is not None:
            return resumed
        pending, methods = self._pending, self._calls.methods
        room = 0 if self._stopping else self._max_in_flight - self._in_handlers
        while pending and room > 0:
            cmd = pending.popleft()
            try:
                begun = cmd.run(methods, bool(pending))
            except BaseException as error:
                return cmd, error
            if begun is None:
                continue
            if begun is Ellipsis:
                room -= 1
                continue
            if begun is NotImplemented:
                return cmd, None
            if isinstance(begun, tuple):
                return cmd, begun
            self._keep(cmd, begun)
        # None of them needs a task: one worker at a time is enough again.
        self._calling = 2
        if methods.waiting:
            methods.submit()
            self._oversee()
        if self._stopping or self._quiet is not None:
            self._is_idle()
        return None

    def _resume_waiting(self) -> None:
        """A transfer is over: sees to it that somebody goes on with its command."""
        if self._last_call is not None:
            self._last_call.set()
        elif self._idle:
            trio.lowlevel.reschedule(self._idle.pop())
        elif self._workers < self._max_in_flight + 2:
            self._hire()
        # Else all are busy, and look at this before anything else when they are not.

    @property
    def _in_handlers(self) -> int:
        """Commands that run."""
        return self._running + self._calls.methods.waiting

    def _calls_of(self, handler: Handler) -> Calls:
        return Calls(handler, self._overseer, self._start_copy, self._resume_waiting)

    def _all_suspended(self) -> list[Suspended]:
        waiting = self._calls.methods.suspended()
        found: list[Suspended] = [
            (one, one.command, self._calls.name(one.command.verb), one.coroutine) for one in waiting
        ]
        return [*self._suspended.values(), *found]

    def _call(self, cmd: _native.Command, verb: int | None) -> tuple[_Coroutine, Any] | None:
        """Calls the handler. Returns the coroutine and what it waits for, if it has suspended."""
        coroutine = self._calls.call(verb, cmd)
        if coroutine is not None:
            try:
                return coroutine, coroutine.send(None)
            except StopIteration as stop:
                if stop.value is not None:
                    self._calls.check_result(verb, stop.value)
        return None

    async def _suspended_in(
        self, cmd: _native.Command, verb: int | None, coroutine: _Coroutine, trap: Any, scope: trio.CancelScope
    ) -> None:
        """Goes on with a handler that has suspended."""
        # An answered command (IMMED) cannot be aborted, and its id may be another one's by now.
        cmd_id = None if cmd.answered else cmd.id
        if cmd_id is not None:
            self._suspended[cmd_id] = scope, cmd, self._calls.name(verb), coroutine
        self._call_workers()
        try:
            result = await _resume(coroutine, trap)
        finally:
            if cmd_id is not None:
                self._not_suspended(cmd_id, cmd)
        if result is not None:
            self._calls.check_result(verb, result)

    async def _run(self, cmd: _native.Command, begun: _Begun, scope: trio.CancelScope) -> None:
        """Runs one command to its answer, whatever happens."""
        self._running += 1
        failure: _errors.Failure | None = None
        crash: Exception | None = None
        verb = cmd.begin() if begun is None else cmd.verb
        steps = 0
        try:
            if isinstance(begun, BaseException):
                raise begun
            if cmd.answered:
                # IMMED: the initiator does not wait for what follows.
                self._commit()
            while True:
                if begun is None:
                    if not self._calls.has(verb):
                        if verb is None and cmd.piece is not None:
                            self._start_copy(cmd)
                        else:
                            failure = _INVALID_OPCODE
                        break
                    begun = self._call(cmd, verb)
                if begun is not None:
                    await self._suspended_in(cmd, verb, *begun, scope)
                    begun = None
                if verb is None:
                    # Answered by now, or left to the emulation, which may want a step done, or waits for other
                    # commands and hands this one out again.
                    if cmd.verb is None:
                        break
                elif not cmd.advance():
                    break
                verb = cmd.verb
                steps += 1
                if steps % STEPS == 0:
                    # A handler that never suspends must not keep the loop for the length of a FORMAT UNIT.
                    await self._pause(cmd, scope)
        except _errors.DeviceError:
            raise
        except Exception as error:
            failure = self._failure(error, verb)
            if self._strict and failure is _BUG:
                crash = error
            else:
                _forget(error)
        except _errors.TransferCancelled as error:
            failure = _TIMED_OUT if self._overseer.timed_out(cmd) else _ABORTED
            _forget(error)
        except BaseException as error:
            # Cancelled, by task management or because the device ends: never swallowed.
            failure = _TIMED_OUT if self._overseer.timed_out(cmd) else _ABORTED
            cancelled = self._only_cancelled(error, verb)
            if cancelled is not None:
                _forget(error)
                raise cancelled from None
            raise
        finally:
            del begun
            self._running -= 1
            self._dirty = True
            if failure is not None:
                cmd.fail(*failure)
            # The frames of an exception that is raised again may hold views, and do no harm: the device ends.
            if cmd.lent and crash is None:
                self._keep(cmd, verb)
            self._is_idle()
        if crash is not None:
            try:
                raise crash
            finally:
                del crash

    def _only_cancelled(self, error: BaseException, verb: int | None) -> BaseException | None:
        """What is left of a cancellation without the errors of a handler that had tasks of its own; None if more is."""
        if isinstance(error, trio.Cancelled):
            return error
        if not isinstance(error, BaseExceptionGroup):
            return None
        cancelled, rest = error.split(trio.Cancelled)
        if isinstance(rest, ExceptionGroup) and cancelled is not None and not self._strict:
            self._failure(rest, verb)
            rest = None
        return cancelled if rest is None else None

    async def _pause(self, cmd: _native.Command, scope: trio.CancelScope) -> None:
        """Lets others run between two steps of a long command."""
        self._dirty = True
        cmd_id = None if cmd.answered else cmd.id
        if cmd_id is not None:
            self._suspended[cmd_id] = scope, cmd, self._calls.name(cmd.verb), None
        self._call_workers()
        try:
            await trio.lowlevel.checkpoint()
        finally:
            if cmd_id is not None:
                self._not_suspended(cmd_id, cmd)

    def _not_suspended(self, cmd_id: int, cmd: _native.Command) -> None:
        # One that has gone on behind its abort has left the id to others.
        if cmd_id in self._suspended and self._suspended[cmd_id][1] is cmd:
            del self._suspended[cmd_id]

    def _failure(self, error: Exception, verb: int | None) -> _errors.Failure:
        writing = verb not in (None, Verb.READ)
        failure = _errors.failure_of(error, writing=writing)
        what = f"{self._calls.name(verb)}()"
        if failure is not None:
            logger.warning("%s: %s failed: %s", self.name, what, error)
            return failure
        # Once per place: a broken handler must not fill the disk with its tracebacks.
        kind = (what, type(error).__name__)
        if kind not in self._bugs:
            self._bugs.add(kind)
            # As text: whoever keeps the record would keep the frames, too (see `_forget`).
            text = "".join(traceback.format_exception(error))
            logger.error("%s: %s raised what it must not\n%s", self.name, what, text)
        return _BUG

    def _is_idle(self) -> None:
        """If nothing runs any more: tells whom it concerns."""
        if not (self._in_handlers or self._copies):
            if self._stopping:
                self._drained.set()
            if self._quiet is not None:
                self._quiet.set()

    # Copies: each a task of its own, which runs no handler. Its pieces are commands of the units that they are for, so
    # that a handler is called among its own device's workers only, and not after its end.

    def _start_copy(self, cmd: _native.Command) -> None:
        if self._nursery is None or self._stopping:
            cmd.fail(*_BUSY)
            return
        self._copies += 1
        scope = trio.CancelScope()
        self._suspended[cmd.id] = scope, cmd, "extended_copy", None
        self._nursery.start_soon(self._copy, cmd, cmd.id, scope, name=f"<tcmu_rs copy of {self.name}>")
        self._call_workers()

    async def _copy(self, cmd: _native.Command, cmd_id: int, scope: trio.CancelScope) -> None:
        try:
            with self._first_device_error(), scope:
                while (piece := cmd.piece) is not None:
                    naa, verb = piece
                    device = self if naa == self._naa else self._neighbour(naa)
                    if device is not None and device is not self:
                        await device._unparked.wait()
                    failure = NOT_REACHABLE if device is None else await device.perform(Piece(cmd, verb))
                    if failure is not None:
                        cmd.fail(*failure)
                    elif not cmd.advance():
                        break
        finally:
            # Nobody can have the id before the answer is handed back, which is after this.
            del self._suspended[cmd_id]
            if not cmd.answered:
                with suppress(_errors.DeviceError):
                    cmd.fail(*(_TIMED_OUT if self._overseer.timed_out(cmd) else _ABORTED))
            self._copies -= 1
            self._nudge()
            self._is_idle()

    def _neighbour(self, naa: bytes) -> Device | None:
        return self._copy_domain._find(naa) if self._copy_domain is not None else None

    async def perform(self, piece: Piece) -> _errors.Failure | None:
        """Runs a piece of a copy among the commands of this device. Returns how it failed, if it did."""
        if self._stopping:
            return NOT_REACHABLE
        token, granted = self._ring.enter(piece.offset, piece.length)
        try:
            if granted:
                self._take(piece)
            else:
                self._waiting_pieces[token] = piece
            try:
                await piece.done.wait()
            except trio.Cancelled:
                if self._waiting_pieces.pop(token, None) is None:
                    self._abort([piece.id])
                    # The handler may be at work on it.
                    with trio.CancelScope(shield=True):
                        await piece.done.wait()
                raise
        finally:
            self._ring.leave(token)
            # Others may have waited for it.
            self._nudge()
        return piece.failure

    def _take(self, piece: Piece) -> None:
        self._pending.append(cast("_native.Command", piece))
        self._nudge()

    def _grant(self) -> None:
        for token in self._ring.granted():
            piece = self._waiting_pieces.pop(token, None)
            if piece is not None:
                self._take(piece)

    def _nudge(self) -> None:
        """Has a worker hand back what was answered, and look for commands that waited."""
        self._dirty = True
        if self._workers:
            self._call_workers()
        # Else the device is at its end, and all that is left is turned away.

    def _abort(self, ids: list[int]) -> None:
        for cmd_id in ids:
            if cmd_id in self._suspended:
                scope, cmd, *_ = self._suspended[cmd_id]
                if cmd.detach():
                    # A SANITIZE: it goes on, like one with IMMED.
                    del self._suspended[cmd_id]
                    self._dirty = True
                else:
                    scope.cancel()
        for transfer in self._calls.methods.suspended():
            if transfer.command.id in ids:
                transfer.cancel()
        waiting = [cmd for cmd in self._waiting() if cmd.id in ids and not cmd.answered and not cmd.detach()]
        for cmd in waiting:
            self._take_out(cmd)
            cmd.fail(*_ABORTED)

    def _commit(self) -> None:
        self._dirty = False
        if self._ring.commit():
            # Commands that had to wait for others which are answered now.
            self._pending.extend(self._ring.ready())
            if self._waiting_pieces:
                self._grant()
            self._call_workers()

    # Commands that wait for their turn.

    def _waiting(self) -> list[_native.Command]:
        return [*self._pending, *(self._parked or ())]

    def _take_out(self, cmd: _native.Command) -> None:
        (self._pending if cmd in self._pending else self._parked or self._pending).remove(cmd)

    def _turn_away_late(self, commands: list[_native.Command]) -> None:
        """Commands that had no turn within the deadline: nothing was done for them, so they may come again."""
        for cmd in commands:
            self._take_out(cmd)
            cmd.fail(*_BUSY)
        self._commit()

    def _oversee(self) -> None:
        if not self._overseer.running and self._nursery is not None:
            self._overseer.start(self._nursery)

    # Memory that is still looked at after the answer.

    def _keep(self, cmd: _native.Command, verb: int | None) -> None:
        logger.warning(
            "%s: %s() kept %d views of a command's data after it returned; their memory stays in use",
            self.name, self._calls.name(verb), cmd.lent,
        )  # fmt: skip
        if not self._reaping and self._nursery is not None:
            self._reaping = True
            self._nursery.start_soon(self._reap)

    async def _reap(self) -> None:
        fd = self._ring.wake_fileno()
        with self._first_device_error():
            while not self._stopping:
                self._free_released()
                await trio.lowlevel.wait_readable(fd)

    def _free_released(self) -> None:
        for cmd_id in self._ring.reap():
            if self._free_kept is not None:
                try:
                    self._free_kept(cmd_id)
                except OSError as error:
                    # Blocks of the data area are lost then; that is no reason to lose the device.
                    logger.warning("%s: the buffer of command %d cannot be freed: %s", self.name, cmd_id, error)

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
                if self._quiet is not None:
                    self._quiet.set()
                async with self._exchange:
                    self._close()

    async def _serve(self, shield: trio.CancelScope, task_status: trio.TaskStatus[Device]) -> None:
        async with trio.open_nursery() as outer:

            async def engine() -> None:
                try:
                    with shield:
                        async with trio.open_nursery() as self._nursery:
                            self._hire()
                finally:
                    await self._end_waiting()

            outer.start_soon(engine)
            task_status.started(self)
            try:
                await self._stop_requested.wait()
            finally:
                await self._wind_down(shield)

    async def _end_waiting(self) -> None:
        """Cancels commands that wait for transfers, and sees to their end: till then their memory is in use."""
        methods = self._calls.methods
        self._last_call = trio.Event()
        with trio.CancelScope(shield=True):
            for waiting in methods.suspended():
                waiting.cancel()
            while methods.waiting:
                with suppress(_errors.DeviceError), trio.CancelScope() as scope:
                    scope.cancel()
                    while (begun := self._resume(scope)) is not None:
                        await self._run(*begun, scope)
                if methods.waiting and not methods.over:
                    await self._last_call.wait()
                    self._last_call = trio.Event()

    async def _wind_down(self, shield: trio.CancelScope) -> None:
        """No new commands; a grace period for those in flight; then they are cancelled."""
        self._stopping = True
        try:
            if self._before_stop is not None:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(self._before_stop)
            with trio.CancelScope(shield=True, deadline=trio.current_time() + self._grace) as self._winding_down:
                if self._in_handlers or self._copies:
                    await self._drained.wait()
        finally:
            shield.cancel()

    def _close(self) -> None:
        """Answers what was not begun, with a status that makes initiators try again, and lets go of the device."""
        try:
            self._turn_away([*self._pending, *self._waiting_pieces.values()])
            self._pending.clear()
            self._waiting_pieces.clear()
            for _ in range(LAST_BATCHES):
                commands, _ = self._ring.drain(BATCH)
                self._turn_away(commands)
                if not self._ring.pending():
                    break
            self._free_released()
        except (_errors.DeviceError, OSError):
            # The device is over already: that error is on its way, and nothing can be answered.
            pass
        finally:
            with suppress(_errors.DeviceError):
                trio.lowlevel.notify_closing(self._ring.fileno())
            self._ring.close()

    def _turn_away(self, commands: Iterable[_native.Command | Piece]) -> None:
        for cmd in commands:
            cmd.fail(*_BUSY)
        # Commands that waited for those come out now, and those that waited for them.
        while self._ring.commit():
            for cmd in self._ring.ready():
                cmd.fail(*_BUSY)
