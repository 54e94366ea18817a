"""Dirty clusters: they are taken into the cache, and written back."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import trio

from tcmu_rs import IoVec, MediumError

from .cache import Cache, Entry
from .changes import Changes
from .failure import Failure, text_of
from .header import SECTOR
from .image import Image
from .packing import Job, Packer
from .pages import Cold
from .recorder import BATCH, Recorder
from .space import Space

_PAGES = 4
"""Pages of L2 and refcounts that one change of the map dirties, at most, where the tables are there."""


class CacheFullError(Exception):
    """There is no room for another dirty cluster now."""


class Destaging:
    """Has space for each cluster that gets dirty, and writes clusters back.

    Args:
        image: Where to.
        cache: Of dirty clusters.
        space: Where space is reserved.
        changes: Say in the map where clusters are now.
        packer: Finds places.
        recorder: Of the changes.
        failure: Of a change by halves.
        room: Who waits there is told when there may be room in the cache, or a cluster is not busy any more.

    Attributes:
        flying: Clusters that are being written to the data file: there is one place for each.
        work: Tasks wait there for clusters to write back.
        helped: There are such tasks: who needs room leaves it to them.
        destaged: Clusters that were written back.
        compressed_bytes: Of those that were compressed.
        stored_bytes: What was left of these.
    """

    def __init__(
        self,
        image: Image,
        cache: Cache,
        space: Space,
        changes: Changes,
        packer: Packer,
        recorder: Recorder,
        failure: Failure,
        room: trio.lowlevel.ParkingLot,
    ) -> None:
        self._image = image
        self._payload = image.payload
        self._cache = cache
        self._space = space
        self._changes = changes
        self._packer = packer
        self._recorder = recorder
        self._failure = failure
        self._room = room
        self._bits = image.header.cluster_bits
        self._cluster_size = image.header.cluster_size
        self.flying: set[int] = set()
        self.work = trio.lowlevel.ParkingLot()
        self.helped = False
        self._error: OSError | None = None
        self.destaged = 0
        self.compressed_bytes = 0
        self.stored_bytes = 0

    # The cache.

    def add(self, cluster: int, *, whole: bool) -> Entry:
        """A new entry in the cache, with what is there now, or, if `whole`, for what is written to all of it.

        Raises:
            CacheFullError: There is no room for it.
            Cold: What is there is not in memory.
            MediumError: It is damaged.
            OSError: There is no space to write it back.
        """
        if not self._cache.has_room:
            raise CacheFullError
        data = bytearray(self._cluster_size)
        if not whole:
            self._image.read(cluster << self._bits, IoVec([data]), wait=False)
        cost = self._cluster_size + 2 * SECTOR
        if self._changes.needs_table(cluster):
            # And what is cut off in front of it.
            cost += 2 * self._cluster_size
        self._space.reserve(cost)
        if self._payload.external:
            try:
                self._payload.storage.allocate(cluster << self._bits, self._cluster_size)
            except OSError:
                self._space.release(cost)
                raise
        entry = self._cache.entries[cluster] = Entry(data, cost)
        if len(self._cache) > self._cache.limit // 2:
            self.work.unpark_all()
        return entry

    def forget(self, cluster: int) -> None:
        """The file has this cluster as it is, or it is not there any more."""
        entry = self._cache.remove(cluster)
        if entry is None:
            return
        self._space.release(entry.cost)
        if self._room and self._cache.has_room:
            self._room.unpark_all()

    async def make_room(self) -> None:
        """Waits until there may be room in the cache.

        Raises:
            OSError: What is in it cannot be written back.
        """
        self.work.unpark_all()
        if not self.helped:
            await self.destage()
            return
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        await self._room.park()

    def report(self, error: OSError) -> None:
        """A task could not write back: one of those who wait for room gets the error."""
        self._error = error
        self._room.unpark_all()

    def leave_alone(self) -> None:
        """There are no tasks any more: who needs room writes back."""
        self.helped = False
        self._room.unpark_all()

    # Writing back.

    async def destage(self, *, logged_only: bool = False, locked: bool = False) -> None:
        """Writes back what is dirty now; what is changed meanwhile may stay.

        Args:
            logged_only: Leave alone what no record has.
            locked: The caller has the turn of the recorder.
        """
        entries = self._cache.entries
        versions = {cluster: entry.version for cluster, entry in entries.items() if entry.logged or not logged_only}
        while versions:
            batch = []
            for cluster in list(versions):
                entry = entries.get(cluster)
                if entry is None:
                    del versions[cluster]
                elif not entry.busy:
                    del versions[cluster]
                    batch.append((cluster, entry))
                    if len(batch) >= self.batch:
                        break
            if batch:
                await self.write_back(sorted(batch, key=lambda pair: pair[0]), locked=locked)
            elif versions:
                await self._room.park() if self.helped else await trio.lowlevel.checkpoint()

    async def thin_out(self, limit: int) -> None:
        """Destages until the cache has no more than so many bytes for the log: a record of images has room for them.

        The caller has the turn of the recorder.
        """
        cache = self._cache
        for _ in range(2):
            if cache.unlogged + cache.logged <= limit:
                return
            await self.destage(locked=True)
        while cache.unlogged + cache.logged > limit:
            # Others write as fast.
            await self._recorder.afford(self.batch * self._recorder.worst, locked=True)
            batch = [pair for pair in cache.entries.items() if self._is_idle(*pair)][: self.batch]
            if batch:
                self._write_back_now(batch)
            elif cache.unlogged + cache.logged > limit:
                await self._room.park()

    async def rewrite(self, clusters: Sequence[int]) -> int:
        """Stores clusters at another place, as if they had been written; returns how many it were.

        It never waits for room in the cache: those who make it have no duty to compaction, and may be gone.
        """
        count = 0
        waiting = list(clusters)
        while waiting:
            batch: list[tuple[int, Entry]] = []
            try:
                while waiting and len(batch) <= self._cache.limit // 2:
                    cluster = waiting[-1]
                    entry = await self._take_in(cluster)
                    if entry is not None and self._is_idle(cluster, entry):
                        batch.append((cluster, entry))
                    waiting.pop()
            except CacheFullError:
                if not batch:
                    break
            await self.write_back(batch)
            count += len(batch)
        return count

    async def _take_in(self, cluster: int) -> Entry | None:
        """The entry of a cluster in the cache; None if it is damaged: whoever reads it has to be told."""
        while True:
            try:
                return self._cache.entries.get(cluster) or self.add(cluster, whole=False)
            except Cold as cold:
                await trio.to_thread.run_sync(cold.warm)
            except MediumError:
                return None

    async def write_back(self, batch: Sequence[tuple[int, Entry]], *, locked: bool = False) -> None:
        """Compresses, writes, and then changes the map where nobody has written meanwhile."""
        recorder = self._recorder
        with trio.CancelScope(shield=True):
            # Nobody has to wait for these while they wait.
            await recorder.afford(self._cost(batch), locked=locked)
            batch = [(cluster, entry) for cluster, entry in batch if self._is_idle(cluster, entry)]
            worst = self._cost(batch)
            jobs = self._jobs(batch)
            placed: list[Job] = []
            recorder.promised += worst
            try:
                await trio.to_thread.run_sync(self._packer.prepare, jobs)
                plan = self._packer.place(jobs, placed)
                await trio.to_thread.run_sync(self._packer.write_out, plan)
                while recorder.gate is not None:
                    await recorder.gate.wait()
            except BaseException:
                self._packer.give_back(placed)
                raise
            else:
                self._settle(jobs)
                # What was in the way is not there any more.
                self._error = None
            finally:
                recorder.promised -= worst
                self._landed(jobs)
                self._room.unpark_all()

    def _write_back_now(self, batch: Sequence[tuple[int, Entry]]) -> None:
        """The same at once, so that nobody can write meanwhile. Others wait, so it is the last resort."""
        jobs = self._jobs(batch)
        placed: list[Job] = []
        try:
            self._packer.prepare(jobs)
            self._packer.write_out(self._packer.place(jobs, placed))
        except BaseException:
            self._packer.give_back(placed)
            raise
        finally:
            self._landed(jobs)
        self._settle(jobs)

    @property
    def batch(self) -> int:
        """How many clusters are written back together."""
        room = self._recorder.log.half_size // 4
        most = BATCH >> self._bits
        return max(
            1, most if self._recorder.all_metadata() <= room else min(most, room // (_PAGES * self._image.pages.size))
        )

    def _cost(self, batch: Sequence[tuple[int, Entry]]) -> int:
        """Bytes of metadata that the destaging of these may dirty, at most."""
        # One cluster of each table.
        tables = {cluster >> self._image.tables.l2_bits: cluster for cluster, _ in batch}
        new = sum(map(self._changes.needs_table, tables.values()))
        cost = len(batch) * _PAGES * self._image.pages.size + new * (self._cluster_size + self._recorder.worst // 2)
        return min(cost, self._recorder.all_metadata())

    def _is_idle(self, cluster: int, entry: Entry) -> bool:
        return self._cache.entries.get(cluster) is entry and not entry.busy and cluster not in self.flying

    def _jobs(self, batch: Sequence[tuple[int, Entry]]) -> list[Job]:
        jobs = []
        for cluster, entry in batch:
            entry.busy = True
            if self._payload.external:
                self.flying.add(cluster)
            jobs.append(Job(cluster, entry, entry.version, bytes(entry.data)))
        return jobs

    def _landed(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            job.entry.busy = False
        if self._payload.external:
            self.flying.difference_update(job.cluster for job in jobs)

    def _settle(self, jobs: Sequence[Job]) -> None:
        """The data is written: the map may say so."""
        changes = self._changes
        for job in jobs:
            if self._cache.entries.get(job.cluster) is not job.entry or job.entry.version != job.version:
                if job.stored != b"":
                    self._packer.give_back([job])
                continue
            try:
                if job.stored == b"":
                    changes.map_zero(job.cluster)
                elif job.stored is None:
                    changes.map_plain(job.cluster, job.place)
                else:
                    changes.map_frame(job.cluster, job.place, len(job.stored), job.crc)
                    self.compressed_bytes += self._cluster_size
                    self.stored_bytes += len(job.stored)
            except Exception as error:
                # The map is changed by halves: what is in memory must never be in a record.
                self._failure.fail(OSError(errno.EUCLEAN, text_of(error)))
                raise
            self.forget(job.cluster)
            self.destaged += 1
