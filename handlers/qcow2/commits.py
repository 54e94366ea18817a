"""Commits: one record for all flushes that wait, and what has to be done before there is room for it."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Sequence

import trio

from tcmu_rs import TransferCancelled

from .cache import Cache
from .changes import Changes
from .destaging import Destaging
from .failure import Failure
from .payload import Payload
from .recorder import Recorder

_SMALL_RECORD = 32 << 10
"""Bytes of pieces, and of changes, that a flush encodes without another thread."""


class Commits:
    """Makes durable, one at a time, what all have done until then.

    Args:
        payload: Where data was written in place.
        cache: What it has goes into records, unless it is too much for them.
        changes: Of the map.
        recorder: Makes the records.
        destaging: Makes less of what the cache has.
        failure: Of anything that makes durable.
    """

    def __init__(
        self,
        payload: Payload,
        cache: Cache,
        changes: Changes,
        recorder: Recorder,
        destaging: Destaging,
        failure: Failure,
    ) -> None:
        self._payload = payload
        self._cache = cache
        self._changes = changes
        self._recorder = recorder
        self._destaging = destaging
        self._failure = failure
        self._log = recorder.log
        self._turn = recorder.turn
        self._flushes = 0

    async def flush(self) -> None:
        """Makes durable what was written before; one fdatasync serves all who wait.

        It is taskless (`BlockHandler`): where it may await a transfer first, it holds no cancel scope.
        """
        wanted = self._flushes
        await self._turn.take()
        try:
            self._failure.check()
            if self._flushes > wanted:
                return
            if self._is_simple():
                self._flushes += 1
                await self._commit_at_once()
                return
            # From here on it has a task.
            await trio.lowlevel.cancel_shielded_checkpoint()
            with trio.CancelScope(shield=True):
                await self._commit()
        finally:
            self._turn.give_back()

    async def settle_map(self) -> None:
        """Makes the map durable, but for what only the cache has: it is no flush. What was freed can be used again."""
        async with self._turn:
            self._failure.check()
            with trio.CancelScope(shield=True):
                await self._commit(pieces=False)

    async def checkpoint(self) -> None:
        """Brings all that is in the log into the tables."""
        await self._destaging.destage(logged_only=True)
        async with self._turn:
            self._failure.check()
            with trio.CancelScope(shield=True):
                await self._recorder.checkpoint()
        await self._recorder.wait_for_checkpoint()

    def _is_simple(self) -> bool:
        """Whether a flush is one small transfer: a record that is durable alone, or an fdatasync."""
        recorder, changes, cache, log = self._recorder, self._changes, self._cache, self._log
        if not recorder.pending():
            return True
        return not (
            recorder.unsynced
            or changes.extents
            or changes.fresh
            or self._payload.external
            or cache.unlogged > _SMALL_RECORD
            or cache.unlogged + cache.logged > log.half_size // 4
            or recorder.changed > _SMALL_RECORD
            or recorder.changed + cache.unlogged * 9 // 8 + 4096 > log.room
        )

    async def _commit_at_once(self) -> None:
        """What `_commit` does where it is simple."""
        recorder, log = self._recorder, self._log
        if not recorder.pending():
            if recorder.unsynced:
                recorder.unsynced = False
                await self._see_through(self._payload.storage.sync)
            return
        record, dropped, _ = recorder.take(images=False)
        try:
            await self._see_through(lambda: log.append(log.encode(record), everything=False))
        finally:
            if self._failure.error is None:
                self._end(dropped)

    async def _see_through(self, work: Callable[[], Awaitable[None]]) -> None:
        """Does what must not end half done: once more, if it is cancelled, and only then lets that through.

        A cancel scope would do, but costs a good part of a flush, and needs a task.
        """
        try:
            await work()
        except OSError as error:
            self._failure.fail(error)
            raise
        except (trio.Cancelled, TransferCancelled):
            # What is done twice is the same.
            await trio.lowlevel.cancel_shielded_checkpoint()
            with trio.CancelScope(shield=True):
                await self._failure.or_fail(work())
            raise
        except BaseException:
            self._failure.fail(OSError(errno.EIO, "a flush was given up in the middle"))
            raise

    async def _commit(self, *, pieces: bool = True) -> None:
        """One record and one fdatasync; the caller has the turn.

        Args:
            pieces: With what only the cache has.
        """
        recorder, cache, log = self._recorder, self._cache, self._log
        if pieces:
            await self._destaging.thin_out(log.half_size // 4)
        if not recorder.pending(pieces=pieces):
            if pieces:
                self._flushes += 1
                if recorder.unsynced:
                    recorder.unsynced = False
                    await self._failure.or_fail(self._payload.storage.sync())
            return
        most = log.half_size * 3 // 8 if pieces else None
        await recorder.sync_fresh(most)
        # Until the record is taken nothing more may come in that it has no room for.
        while recorder.changed + (cache.unlogged * 9 // 8 if pieces else 0) + 4096 > log.room:
            recorder.open_gate()
            await recorder.checkpoint()
            if pieces:
                await self._destaging.thin_out(log.half_size // 4)
            await recorder.sync_fresh(most)
        try:
            if pieces:
                self._flushes += 1
            record, dropped, _ = recorder.take(images=False, pieces=pieces)
        finally:
            recorder.open_gate()
        await recorder.append(record)
        self._end(dropped)

    def _end(self, dropped: Sequence[tuple[int, int]]) -> None:
        self._recorder.release(dropped)
        if self._cache.logged > self._log.half_size // 8:
            self._destaging.work.unpark_all()
