"""The running of a device's commands: out of the ring, into the handler, and their answers back.

It starts with one worker. A worker that has nothing to run waits for the ring, takes a batch out of it, and runs the
commands one after the other, in its own task. While no handler suspends, that is all there is: one wake-up, a coroutine
call per command, one doorbell. The moment a handler does suspend, and not before, another worker is called up to go on
with the rest and with the ring. Workers grow to `max_in_flight` that run commands, one more that watches the ring, so
that even a device whose handlers all hang hears of aborted commands, and one that hands back answers when all of these
are busy.

Each worker has a cancel scope around the commands it runs, entered once, not once per command. Task management
cancels the scope of the command meant; the worker then enters a new one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, cast

import trio

from . import _errors, _native, _statistics
from ._calls import Calls, Coroutine, resume
from ._domain import NOT_REACHABLE, Piece
from ._failures import ABORTED, BUG, BUSY, INVALID_OPCODE, TIMED_OUT, Failures, forget
from ._handler import Handler, Verb, has
from ._kept import Kept
from ._late import Overseer, Suspended
from ._polling import Polling
from ._queue import BATCH, Queue
from ._workers import Workers

SMALLEST = 8
"""Commands that a batch counts for beside its own: answering it is more than them."""
STEPS = 4
"""Steps of one command between two passes of the loop."""

_Begun = tuple[Coroutine, Any] | BaseException | None
"""How far a command is: a coroutine that has suspended, and what it waits for; what was raised; or not begun."""


class Engine:
    """Runs the commands of one device.

    Args:
        ring: Where they come from. It is closed by `close`.
        handler: The open handler.
        name: Of the device, for the log.
        strict: Raise what a handler must not raise, instead of going on.
        deadline: Seconds that a command may take.
        free_kept: Tells the kernel that a kept buffer is free.
        copy: Does what a command says that copies between devices, but for its answer.
        busy_poll: Seconds to look for the next command before it waits, at most.
    """

    def __init__(
        self,
        ring: _native.Ring,
        handler: Handler,
        *,
        name: str,
        strict: bool,
        deadline: float,
        free_kept: Callable[[int], None] | None,
        copy: Callable[[_native.Command], Awaitable[None]],
        busy_poll: float,
    ) -> None:
        self._name = name
        self._ring = ring
        self._copy = copy
        self._queue = Queue(ring)
        self._kept = Kept(ring, name, free_kept)
        self._polling = Polling(ring, busy_poll) if busy_poll > 0 else None
        self._failures = Failures(name, strict=strict)
        self._overseer = Overseer(name, deadline, self._all_suspended, self._queue.waiting, self._turn_away_late)
        self._workers = Workers(self._worker, f"<tcmu_rs worker of {name}>")
        self._nursery: trio.Nursery | None = None
        # The same object, nearer at hand.
        self._pending = self._queue.pending
        self._suspended: dict[int, Suspended] = {}
        self._running = 0
        self._copies = 0
        self._calling = 2
        self._pumping = False
        self._taken = 0
        self._dirty = False
        self._committing = False
        self._held: trio.Event | None = None
        self._quiet: trio.Event | None = None
        self._stopping = False
        self._broken = False
        self._drained = trio.Event()
        self._last_call: trio.Event | None = None
        self._serve(handler)

    # What the device asks for.

    async def run(self, scope: trio.CancelScope) -> None:
        """Runs commands until the scope, which is entered here, is cancelled, and all that has begun is over.

        Raises:
            DeviceError: The device is over before.
        """
        try:
            with scope:
                async with trio.open_nursery() as self._nursery:
                    self._workers.nursery = self._nursery
                    self._workers.hire()
        finally:
            # It takes no more tasks.
            self._nursery = self._workers.nursery = None
            try:
                await self._end_waiting()
            finally:
                self._stopping = True
                if self._quiet is not None:
                    self._quiet.set()

    def stop(self) -> None:
        """Begins no more commands."""
        self._stopping = True

    async def drain(self) -> None:
        """Waits, after `stop`, until no command runs any more."""
        if self._in_handlers or self._copies:
            await self._drained.wait()

    def close(self) -> None:
        """Answers what was not begun, with a status that makes initiators try again, and lets go of the device."""
        try:
            self._queue.close()
            self._kept.free()
        except (_errors.DeviceError, OSError):
            # The device is over already: that error is on its way, and nothing can be answered.
            pass
        finally:
            with suppress(_errors.DeviceError):
                trio.lowlevel.notify_closing(self._ring.fileno())
            self._ring.close()

    def fail(self, error: Exception) -> None:
        """Ends with an error. At once: nothing may begin any more, with a handler that is closed."""
        self._stopping = True

        async def fail() -> None:
            raise error

        if self._nursery is not None:
            self._nursery.start_soon(fail)

    def statistics(self, storage: Mapping[str, float]) -> _statistics.DeviceStatistics:
        """Counters and times since the start, and what runs and waits now; with what the storage counts."""
        return _statistics.record(
            self._ring.statistics(),
            in_flight=self._ring.in_flight,
            running=self._in_handlers,
            pending=len(self._queue.waiting()),
            late=self._overseer.late(),
            storage=storage,
        )

    async def invoke(self, name: str, *args: Any) -> None:
        """Calls another method of the handler than those for commands."""
        await self._calls.invoke(name, *args)

    async def perform(self, piece: Piece) -> _errors.Failure | None:
        """Runs a piece of a copy among the commands of this device. Returns how it failed, if it did."""
        if self._stopping:
            return NOT_REACHABLE
        token, is_pending = self._queue.enter(piece)
        try:
            if is_pending:
                self._nudge()
            try:
                await piece.done.wait()
            except trio.Cancelled:
                if not self._queue.withdraw(token):
                    self._abort([piece.id])
                    # The handler may be at work on it.
                    with trio.CancelScope(shield=True):
                        await piece.done.wait()
                raise
        finally:
            self._queue.leave(token)
            self._nudge()
        return piece.failure

    # Standing still, in two ways: commands are left in the ring, or fetched and parked.

    @property
    def is_held(self) -> bool:
        """Whether commands are left in the ring."""
        return self._held is not None

    def hold(self) -> None:
        """Leaves in the ring what comes from now on."""
        self._held = trio.Event()

    def release(self) -> None:
        """Takes commands out of the ring again."""
        if self._held is not None:
            self._held.set()
            self._held = None

    @property
    def is_working(self) -> bool:
        """Whether any command is not over that was taken out of the ring."""
        waiting = self._queue.has_more() or self._dirty
        return bool(self._in_handlers or self._copies or waiting or self._ring.quiescent_at() is None)

    def park(self) -> None:
        """Keeps commands that come from the handler. Their aborts are heard all the same."""
        self._queue.park()

    async def quiesce(self) -> None:
        """Waits, after `park`, until all that has begun is over.

        Raises:
            DeviceError: The device ended meanwhile.
        """
        while not self._is_quiet():
            self._quiet = trio.Event()
            self._nudge()
            await self._quiet.wait()
        self._quiet = None

    def unpark(self, handler: Handler | None) -> None:
        """Begins the commands that were parked.

        Args:
            handler: The one that serves from now on, if it is another one.
        """
        self._quiet = None
        if handler is not None:
            self._serve(handler)
            intercept = has(handler, "scsi_command")
            self._ring.serve_another(intercept=intercept, fills_reads=getattr(handler, "fills_reads", False))
        self._queue.unpark(whole=self._calls.has(None))
        self._nudge()

    def _serve(self, handler: Handler) -> None:
        self._max_in_flight = handler.max_in_flight
        self._workers.limit = handler.max_in_flight + 2
        self._calls = Calls(handler, self._overseer, self._start_copy, self._resume_waiting)

    def _is_quiet(self) -> bool:
        if self._stopping:
            raise _errors.DeviceError(f"{self._name} ended")
        if self._in_handlers or self._copies or self._queue.has_more():
            return False
        self._commit()
        return self._queue.has_only_parked()

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
            self._workers.leave()

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
                await self._workers.rest()
            else:
                await self._pump()

    async def _pump(self) -> None:
        """Waits for the ring and takes a batch."""
        self._pumping = True
        taken = 0
        try:
            if self._held is not None:
                await self._held.wait()
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
            if self._stopping or self._held is not None:
                return
            count, notices = self._queue.fetch()
            self._taken = taken + SMALLEST + count
        finally:
            self._pumping = False
        # What the emulation answered is not handed back yet, nor the space of entries that need no answer.
        self._dirty = True
        if self._queue.parked:
            self._oversee()
        for notice in notices:
            self._abort(notice.commands)

    def _call_workers(self) -> None:
        """A command has suspended: sees to it that somebody goes on with what waits, and with the ring."""
        room = min(len(self._pending), self._max_in_flight - self._in_handlers) + self._calls.methods.over
        # Two, four, and so on: a batch of suspending commands is under way after a few passes of the loop, and the next
        # one after two.
        wanted = min(self._calling, room) or int(self._dirty or not self._pumping)
        self._calling = min(2 * self._calling, self._max_in_flight)
        self._workers.call(wanted)
        self._oversee()

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
                begun = cmd.run(methods, pending)
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
        else:
            self._workers.call(1)
            # If all are busy they look at this before anything else when they are not.

    @property
    def _in_handlers(self) -> int:
        """Commands that run."""
        return self._running + self._calls.methods.waiting

    # A command that needs more than a call.

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
                            failure = INVALID_OPCODE
                        break
                    begun = self._calls.begin(verb, cmd)
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
                    await self._give_way(cmd, scope)
        except _errors.DeviceError:
            raise
        except Exception as error:
            failure = self._failures.of(error, self._calls.name(verb), writing=_writes(verb))
            if self._failures.strict and failure is BUG:
                crash = error
            else:
                forget(error)
        except _errors.TransferCancelled as error:
            failure = self._cut_short(cmd)
            forget(error)
        except BaseException as error:
            # Cancelled, by task management or because the device ends: never swallowed.
            failure = self._cut_short(cmd)
            cancelled = self._failures.only_cancelled(error, self._calls.name(verb), writing=_writes(verb))
            if cancelled is not None:
                forget(error)
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

    async def _suspended_in(
        self, cmd: _native.Command, verb: int | None, coroutine: Coroutine, trap: Any, scope: trio.CancelScope
    ) -> None:
        """Goes on with a handler that has suspended."""
        # An answered command (IMMED) cannot be aborted, and its id may be another one's by now.
        cmd_id = None if cmd.answered else cmd.id
        if cmd_id is not None:
            self._suspended[cmd_id] = scope, cmd, self._calls.name(verb), coroutine
        self._call_workers()
        try:
            result = await resume(coroutine, trap)
        finally:
            if cmd_id is not None:
                self._not_suspended(cmd_id, scope)
        if result is not None:
            self._calls.check_result(verb, result)

    async def _give_way(self, cmd: _native.Command, scope: trio.CancelScope) -> None:
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
                self._not_suspended(cmd_id, scope)

    def _not_suspended(self, cmd_id: int, scope: trio.CancelScope) -> None:
        # One that has gone on behind its abort has left the id to others, and one that is a copy by now has it there.
        if cmd_id in self._suspended and self._suspended[cmd_id][0] is scope:
            del self._suspended[cmd_id]

    def _cut_short(self, cmd: _native.Command) -> _errors.Failure:
        """How a command fails that was cancelled."""
        return TIMED_OUT if self._overseer.timed_out(cmd) else ABORTED

    def _is_idle(self) -> None:
        """If nothing runs any more: tells whom it concerns."""
        if not (self._in_handlers or self._copies):
            if self._stopping:
                self._drained.set()
            if self._quiet is not None:
                self._quiet.set()

    # Copies: each a task of its own, which runs no handler.

    def _start_copy(self, cmd: _native.Command) -> None:
        if self._nursery is None or self._stopping:
            cmd.fail(*BUSY)
            return
        self._copies += 1
        scope = trio.CancelScope()
        self._suspended[cmd.id] = scope, cmd, "extended_copy", None
        self._nursery.start_soon(self._run_copy, cmd, cmd.id, scope, name=f"<tcmu_rs copy of {self._name}>")
        self._call_workers()

    async def _run_copy(self, cmd: _native.Command, cmd_id: int, scope: trio.CancelScope) -> None:
        try:
            with self._first_device_error(), scope:
                await self._copy(cmd)
        finally:
            # Nobody can have the id before the answer is handed back, which is after this.
            del self._suspended[cmd_id]
            if not cmd.answered:
                with suppress(_errors.DeviceError):
                    cmd.fail(*self._cut_short(cmd))
            self._copies -= 1
            self._nudge()
            self._is_idle()

    def _nudge(self) -> None:
        """Has a worker hand back what was answered, and look for commands that waited."""
        self._dirty = True
        if self._workers.count:
            self._call_workers()
        # Else the device is at its end, and all that is left is turned away.

    # Task management, deadlines and the end.

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
        self._queue.abort(ids)

    def _commit(self) -> None:
        self._dirty = False
        if self._queue.commit():
            self._call_workers()

    def _turn_away_late(self, commands: list[_native.Command]) -> None:
        """Commands that had no turn within the deadline: nothing was done for them, so they may come again."""
        self._queue.turn_away(commands)
        self._commit()

    def _all_suspended(self) -> list[Suspended]:
        waiting = self._calls.methods.suspended()
        found: list[Suspended] = [
            (one, one.command, self._calls.name(one.command.verb), one.coroutine) for one in waiting
        ]
        return [*self._suspended.values(), *found]

    def _oversee(self) -> None:
        if not self._overseer.running and self._nursery is not None:
            self._overseer.start(self._nursery)

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

    # Memory that is still looked at after the answer.

    def free_kept(self) -> None:
        """Tells the kernel of kept memory that nobody looks at any more."""
        self._kept.free()

    def _keep(self, cmd: _native.Command, verb: int | None) -> None:
        self._kept.add(cmd, self._calls.name(verb))
        if not self._kept.is_watched and self._nursery is not None:
            self._kept.is_watched = True
            self._nursery.start_soon(self._reap)

    async def _reap(self) -> None:
        with self._first_device_error():
            while not self._stopping:
                self._kept.free()
                # Answers may have waited for the views, and somebody for the answers.
                self._is_idle()
                await self._kept.wait()


def _writes(verb: int | None) -> bool:
    return verb not in (None, Verb.READ)
