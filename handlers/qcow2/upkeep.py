"""What goes on in the background: clusters are written back, space is found, used again and given back."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Sequence
from typing import Any

import trio

from .cache import Cache
from .changes import Changes
from .commits import Commits
from .compaction import Compactor
from .destaging import Destaging
from .failure import Failure, text_of
from .header import SECTOR
from .image import Image
from .recorder import Recorder
from .scanner import Scanner
from .space import Space

logger = logging.getLogger(__name__)

_NOT_WRITTEN = "what is dirty cannot be written back"
_NOT_GIVEN_BACK = "what is free cannot be given back"
_DESTAGERS = 2
_MANY_DROPPED = 4096
"""Places that wait for a record, to be used again, before one is made for them; fewer in small images."""
_SMALL = 64 << 20
"""Bytes of an image that is looked through at once, before the first change."""


class Upkeep:
    """The tasks of an image in the background. They end with `end`, as the handler has no nursery to lend them.

    Args:
        image: What is written.
        cache: Of its dirty clusters.
        space: Free space in it.
        changes: Of its map.
        recorder: Of these.
        destaging: Writes back.
        commits: Make durable what has been freed, and bring it into the tables.
        failure: After one nothing is written.
        writes: Counts commands that write.
        idle: Seconds without one after which everything is written back; None for never.
        compaction: Bytes of clusters that are moved in a second while the disk is idle; None if none can be.

    Attributes:
        compactor: If there is one.
    """

    def __init__(
        self,
        image: Image,
        cache: Cache,
        space: Space,
        changes: Changes,
        recorder: Recorder,
        destaging: Destaging,
        commits: Commits,
        failure: Failure,
        *,
        writes: Callable[[], int],
        idle: float | None,
        compaction: int | None,
    ) -> None:
        self._image = image
        self._storage = image.storage
        self._cache = cache
        self._space = space
        self._changes = changes
        self._recorder = recorder
        self._destaging = destaging
        self._commits = commits
        self._failure = failure
        self._writes = writes
        self._idle = idle
        self._compaction = compaction
        # Bytes of changes of the map that are enough for a record of their own.
        self._heavy = recorder.log.half_size // 16
        self._many = min(_MANY_DROPPED, max(256, image.size >> image.header.cluster_bits >> 5))
        # Somebody destages for the log to have room.
        self._relieving = False
        # Who takes holes out for a while: nobody else must put them back.
        self._tidying = trio.Lock()
        self._closing = trio.Event()
        self._tasks = 0
        self._ended = trio.Event()
        self.compactor: Compactor | None = None

    async def begin(self) -> None:
        """Begins all tasks; a small image has been looked through then."""
        tasks = [self._destager] * _DESTAGERS + ([self._keeper] if self._idle is not None else [])
        scanner = Scanner(self._image, self._changes, self._space, self._commits.settle_map)
        if self._space.end <= _SMALL:
            await scanner.scan(self._closing)
        else:
            tasks.append(lambda: self._scan(scanner))
        if self._compaction is not None:
            self.compactor = Compactor(
                self._image,
                self._space,
                rewrite=self._destaging.rewrite,
                flush=self._commits.settle_map,
                activity=lambda: self._writes() + self._image.reads,
                closing=self._closing,
                rate=self._compaction,
            )
        self._tasks = len(tasks)
        self._destaging.helped = True
        for task in tasks:
            trio.lowlevel.spawn_system_task(task)

    async def end(self) -> None:
        """Ends all tasks."""
        self._closing.set()
        self._destaging.work.unpark_all()
        if self._tasks:
            await self._ended.wait()

    def _leave(self) -> None:
        self._tasks -= 1
        if not self._tasks:
            self._destaging.leave_alone()
            self._ended.set()

    async def _try(self, what: str, function: Callable[..., Any], *arguments: Any) -> bool:
        """Runs what nobody waits for, and returns whether it succeeded: whoever needs it to finds out."""
        try:
            await function(*arguments)
            return True
        except OSError as error:
            logger.warning("%s: %s: %s", self._storage.path, what, error)
            if what == _NOT_WRITTEN:
                self._destaging.report(error)
            with trio.move_on_after(1):
                await self._closing.wait()
        except Exception as error:
            logger.exception("%s: %s", self._storage.path, what)
            self._failure.fail(OSError(errno.EIO, text_of(error)))
        return False

    async def _scan(self, scanner: Scanner) -> None:
        try:
            await self._try("what is free in it is not known", scanner.scan, self._closing)
        finally:
            self._leave()

    async def _destager(self) -> None:
        cache, destaging, recorder = self._cache, self._destaging, self._recorder
        try:
            while not self._closing.is_set():
                # One of them is enough for that, and has larger batches alone: each costs an fdatasync of the file.
                many_logged = not self._relieving and cache.logged > recorder.log.half_size // 8
                keep = 0 if many_logged else cache.limit * 3 // 8
                batch = [] if self._failure.error else cache.pick(destaging.batch, keep)
                if not batch:
                    await destaging.work.park()
                    continue
                self._relieving |= many_logged
                await self._try(_NOT_WRITTEN, destaging.write_back, batch)
                if many_logged:
                    self._relieving = False
                # What was freed is used again only after a record, and one must not become too large.
                if len(self._changes.dropped) > self._many or recorder.changed > self._heavy:
                    await self._try(_NOT_WRITTEN, self._commits.settle_map)
        finally:
            self._leave()

    async def _keeper(self) -> None:
        """Writes everything back when nobody has written for a while."""
        assert self._idle is not None
        last = clean = -1
        try:
            while not self._closing.is_set():
                with trio.move_on_after(self._idle):
                    await self._closing.wait()
                    break
                now = self._writes()
                if now == last and now != clean and not self._failure.error:
                    written = await self._try(_NOT_WRITTEN, self._destaging.destage)
                    if await self._try(_NOT_WRITTEN, self._commits.checkpoint) and written:
                        clean = now
                    await self._try(_NOT_GIVEN_BACK, self.punch)
                elif now == clean and not self._failure.error:
                    await self._try(_NOT_GIVEN_BACK, self.compact)
                last = now
        finally:
            self._leave()

    async def compact(self) -> None:
        """Empties what is mostly free, and gives it back."""
        if self.compactor is None:
            return
        async with self._tidying:
            moved = await self.compactor.run()
        if moved:
            await self._commits.checkpoint()
            await self.punch()

    async def punch(self) -> None:
        """Gives free space back to the file system; nobody gets it meanwhile."""
        if not self._space.freed:
            return
        with trio.CancelScope(shield=True):
            async with self._tidying:
                self._space.freed = False
                found = self._space.take_large()
                try:
                    await trio.to_thread.run_sync(self._punch, found)
                finally:
                    self._space.give_back(found)

    def _punch(self, found: Sequence[tuple[Any, int, int]]) -> None:
        """In a thread."""
        for _, start, length in found:
            if not self._storage.punch(start * SECTOR, length * SECTOR):
                return
