"""Writing: the cache of dirty clusters, destaging, group commit, checkpoints, and the life of the log."""

from __future__ import annotations

import errno
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, TypeVar

import trio

from tcmu_rs import IoVec, MediumError, TransferCancelled

from ._errors import Qcow2Error
from .branching import Branching
from .cache import Cache, Entry
from .changes import Changes
from .compaction import RATE, Compactor
from .header import DIRTY, SECTOR, LogPlace
from .image import Image, Kind
from .log import STATES, Chain, Log, Record
from .packing import Job, Packer
from .pages import Cold
from .scanner import Scanner
from .session import Session, announce, check_room, lay_log, place_log, renounce, resume
from .space import Space
from .tables import COMPRESSED, COPIED, OFFSET, SUBCLUSTERS, ZERO
from .turn import Turn

logger = logging.getLogger(__name__)
_T = TypeVar("_T")

CACHE = 16 << 20
"""Bytes of dirty clusters that are kept in memory."""
IDLE = 1.0
"""Seconds without a write after which everything is written back."""
_BATCH = 512 << 10
"""Bytes of clusters that are compressed at once."""
_MAX_LOG = 16 << 20
_MIN_LOG = 4 << 20
_DESTAGERS = 2
_PATIENCE = 64
_ZEROES_AT_ONCE = 256
"""Clusters that are discarded before others may do something."""
_TABLES_AT_ONCE = 1024
_PAGES = 4
"""Pages of L2 and refcounts that one change of the map dirties, at most, where the tables are there."""
_MANY_DROPPED = 4096
"""Places that wait for a record, to be used again, before one is made for them; fewer in small images."""
_FEW = 32
"""Parts of a record that is made in the loop."""
_SMALL_RECORD = 32 << 10
"""Bytes of pieces, and of changes, that a flush encodes without another thread."""
_SLACK = 8
"""Clusters that are reserved for refcount blocks."""
_SMALL = 64 << 20
"""Bytes of an image that is looked through at once, before the first change."""


def _text(error: Exception) -> str:
    """An error without its number, which the next one has again."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def _check_external(image: Image, *, compress: bool) -> None:
    """Refuses what does not go with a data file.

    Raises:
        Qcow2Error: Compression, or a raw file over a backing file.
    """
    path = image.storage.path
    if compress:
        raise Qcow2Error(f"{path} has an external data file, which has no compressed clusters: use qcow2:PATH")
    if image.payload.raw and image.backing is not None:
        raise Qcow2Error(
            f"{path} has a raw data file, and a backing file that it would have to show: attach it read-only"
        )


class _CacheFullError(Exception):
    """There is no room for another dirty cluster now."""


class Writer:
    """Changes an image that is open for writing. Its methods belong to the event loop.

    Args:
        image: What to change.
        compress: Write compressed clusters.
        chain: What recovery found in the log.
        cache_size: Bytes of dirty clusters to keep.
        log_size: Bytes of the log; by default it goes with the size of the disk.
        idle: Seconds without a write after which everything is written back; None for never.
        compaction: Bytes of clusters that are moved in a second while the disk is idle.

    Raises:
        Qcow2Error: The image cannot be written.
    """

    def __init__(
        self,
        image: Image,
        *,
        compress: bool,
        chain: Chain | None = None,
        cache_size: int = CACHE,
        log_size: int | None = None,
        idle: float | None = IDLE,
        compaction: int = RATE,
    ) -> None:
        header = image.header
        if image.payload.external:
            _check_external(image, compress=compress)
        if header.incompatible & DIRTY and chain is None:
            raise Qcow2Error(
                f"the refcounts of {image.storage.path} are not up to date: run `qemu-img check -r all`, "
                "or attach it read-only"
            )
        if chain is None:
            # Better known now than at the first write.
            check_room(image)
        if compress and image.payload.cipher is not None:
            raise Qcow2Error(
                f"{image.storage.path} is encrypted, and compressed clusters would not be: use qcow2:PATH, or keep a "
                "compressed image on an encrypted file system"
            )
        # A cluster has to be able to be shared by many.
        self._compress = compress and header.refcount_order >= 3
        self._image = image
        self._storage = image.storage
        self._payload = image.payload
        self._header = header
        self._pages = image.pages
        self._bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self._in_cluster = header.cluster_size - 1
        self._cache = Cache(image.cache, max(4, cache_size >> self._bits))
        # What one change of the map may dirty: L2 and refcounts, a new L2 table, a new refcount block.
        self._worst = 2 * self._cluster_size + 6 * self._pages.size
        self._log_size = max(log_size or min(_MAX_LOG, max(_MIN_LOG, image.size >> 6)), STATES + 8 * self._worst)
        self._many = min(_MANY_DROPPED, max(256, image.size >> self._bits >> 5))
        # Bytes that the changes on their way may dirty.
        self._promised = 0
        self._idle = idle
        self._compaction = compaction
        self._chain = chain
        self._log: Log | None = None
        self._space: Space
        self._changes: Changes
        self._packer: Packer
        self._compactor: Compactor | None = None
        self._session: Session | None = None
        self._unsynced = False
        self._failed: OSError | None = None
        self._destage_error: OSError | None = None
        self._commits = 0
        self._writes = 0
        # Somebody destages for the log to have room.
        self._relieving = False
        self._turn = Turn()
        self._start_lock = trio.Lock()
        # Who takes holes out for a while: nobody else must put them back.
        self._tidying = trio.Lock()
        # Clusters that are being written to the data file: there is one place for each.
        self._flying: set[int] = set()
        self._checkpointing: trio.Event | None = None
        self._gate: trio.Event | None = None
        self._room = trio.lowlevel.ParkingLot()
        self._work = trio.lowlevel.ParkingLot()
        self._closing = trio.Event()
        self._background = 0
        self._ended = trio.Event()
        self.counters = {
            "cache_hits": 0,
            "cache_misses": 0,
            "destaged": 0,
            "in_place": 0,
            "commits": 0,
            "checkpoints": 0,
            "compressed_bytes": 0,
            "stored_bytes": 0,
        }

    @property
    def active(self) -> bool:
        """Whether the log is in the file."""
        return self._log is not None

    @property
    def dirty(self) -> int:
        """Bytes of clusters that are newer in memory."""
        return len(self._cache) << self._bits

    def statistics(self) -> dict[str, float]:
        """What the handler tells."""
        if self._log is None:
            return {}
        found: dict[str, float] = {
            "file_bytes": self._storage.allocated - self._space.ahead,
            "reserved_bytes": self._space.ahead,
            "free_bytes": (self._space.holes.sectors + self._space.clusters.sectors) * SECTOR,
            "dirty_bytes": self.dirty,
            "log_bytes": self._log.half_size,
            "log_used_bytes": self._log.half_size - self._log.room,
            **self.counters,
        }
        if self.counters["stored_bytes"]:
            found["ratio"] = self.counters["compressed_bytes"] / self.counters["stored_bytes"]
        if self._compactor is not None:
            found |= {"compactions": self._compactor.passes, "moved": self._compactor.moved}
        return found

    # Commands.

    async def write(self, offset: int, iov: IoVec) -> None:
        """Stores; it is durable after the next flush."""
        if self._log is None or self._failed is not None:
            await self._start()
        self._writes += 1
        total = iov.nbytes
        done = 0
        while done < total:
            within = (offset + done) & self._in_cluster
            step = min(self._cluster_size - within, total - done)
            part = iov if step == total else iov.slice(done, done + step)
            cluster = (offset + done) >> self._bits
            try:
                self._put(cluster, within, part)
            except (Cold, _CacheFullError, OSError):
                await self._retry(lambda c=cluster, w=within, p=part: self._put(c, w, p))  # type: ignore[misc]
            done += step

    async def write_zeroes(self, offset: int, length: int) -> None:
        """Zeroes; whole clusters are freed."""
        await self._start()
        self._writes += 1
        stop = offset + length
        # Behind the end of the disk there is nothing to keep.
        reach = stop if stop < self._image.size else -(-stop >> self._bits) << self._bits
        count = 0
        while offset < stop:
            within = offset & self._in_cluster
            step = min(self._cluster_size - within, stop - offset)
            cluster = offset >> self._bits
            if within == 0 and offset + self._cluster_size <= reach:
                skip = self._empty_from(cluster, (reach - offset) >> self._bits)
                if skip:
                    offset += skip << self._bits
                    await trio.lowlevel.checkpoint()
                    continue
                await self._retry(lambda c=cluster: self._zero(c))  # type: ignore[misc]
            else:
                await self._retry(lambda c=cluster, w=within, s=step: self._zero_part(c, w, s))  # type: ignore[misc]
            offset += step
            count += 1
            if count % _ZEROES_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        await self._relieve()

    async def flush(self) -> None:
        """Makes durable what was written before; one fdatasync serves all who wait.

        It is taskless (`BlockHandler`): where it may await a transfer first, it holds no cancel scope.
        """
        if self._log is None:
            return
        wanted = self._commits
        await self._turn.take()
        try:
            self._check()
            if self._commits > wanted:
                return
            if self._is_simple(self._log):
                self._commits += 1
                await self._commit_at_once(self._log)
                return
            # From here on it has a task.
            await trio.lowlevel.cancel_shielded_checkpoint()
            with trio.CancelScope(shield=True):
                await self._commit()
        finally:
            self._turn.give_back()

    async def _settle_map(self) -> None:
        """Makes the map durable, but for what only the cache has: it is no flush. What was freed can be used again."""
        async with self._turn:
            self._check()
            with trio.CancelScope(shield=True):
                await self._commit(pieces=False)

    def _check(self) -> None:
        if self._failed is not None:
            raise OSError(
                self._failed.errno, f"an earlier flush failed, nothing is written any more: {_text(self._failed)}"
            )

    async def _retry(self, change: Callable[[], None]) -> None:
        """Makes a change, which does nothing if it raises, until there is what it needs."""
        reclaimed = False
        while True:
            await self._afford(self._worst)
            try:
                change()
                break
            except Cold as cold:
                await trio.to_thread.run_sync(cold.warm)
            except _CacheFullError:
                self._call_destagers()
                await self._wait_for_room()
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or reclaimed:
                    raise
                # What was freed can be used again after a record.
                reclaimed = True
                await self._settle_map()
        await self._relieve()

    async def _wait_for_room(self) -> None:
        if not self._background:
            await self.destage()
            return
        if self._destage_error is not None:
            error, self._destage_error = self._destage_error, None
            raise error
        await self._room.park()

    async def _relieve(self) -> None:
        """Lets the log have what it has not, before it is too much for a record."""
        log = self._log
        assert log is not None
        if self._changed > log.half_size // 16:
            await self._settle_map()

    @property
    def _changed(self) -> int:
        """Bytes of a record for the changes of the map, at most."""
        changes = self._changes
        named = 8 * len(changes.settled) + 16 * len(changes.extents)
        return self._pages.weight + named

    async def _afford(self, worst: int, *, locked: bool = False) -> None:
        """Waits until so many bytes of metadata more can be dirty: all that is has to fit into half of the log.

        Args:
            worst: Bytes.
            locked: The caller has the lock of the commits.
        """
        log = self._log
        assert log is not None
        while True:
            self._check()
            dirty = len(self._pages.dirty) * self._pages.size
            if min(dirty + self._promised + worst, self._all_metadata()) <= log.half_size // 2:
                return
            if not dirty:
                if not self._promised:
                    return
                await self._room.park()
            elif locked:
                await self._checkpoint()
            else:
                async with self._turn:
                    self._check()
                    with trio.CancelScope(shield=True):
                        await self._checkpoint()

    # Changes, at once and in memory.

    def _put(self, cluster: int, within: int, part: IoVec) -> None:
        """Takes a part of a cluster, or all of it, into the cache, or writes it in place."""
        length = part.nbytes
        entry = self._cache.entries.get(cluster)
        if entry is None:
            host = self._place_of(cluster, within, length)
            if host:
                self._payload.write(host + within, part)
                self._unsynced = True
                self.counters["in_place"] += 1
                return
            entry = self._add_entry(cluster, whole=length == self._cluster_size)
            self.counters["cache_misses"] += 1
        else:
            self.counters["cache_hits"] += 1
        part.copy_into(memoryview(entry.data)[within : within + length])
        self._cache.mark(cluster, entry, within, length)

    def _add_entry(self, cluster: int, *, whole: bool) -> Entry:
        if not self._cache.has_room:
            raise _CacheFullError
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
            self._call_destagers()
        return entry

    def _place_of(self, cluster: int, within: int, length: int) -> int:
        """Offset of the host cluster if it can be written in place, else 0."""
        word = self._image.tables.entry(cluster, wait=False)
        if not word & COPIED or word & COMPRESSED:
            return 0
        if self._header.extended_l2:
            size = self._cluster_size // SUBCLUSTERS
            first, last = within // size, (within + length - 1) // size
            wanted = (1 << (last + 1)) - (1 << first)
            if self._image.tables.bitmap(cluster, wait=False) & wanted != wanted:
                return 0
        elif word & ZERO:
            return 0
        return self._image.tables.host(word)

    def _empty_from(self, cluster: int, count: int) -> int:
        """How many clusters from the first of an L2 table on, of `count`, have no table and nothing below."""
        tables = self._image.tables
        size = 1 << tables.l2_bits
        if cluster % size or self._image.backing is not None:
            return 0
        first = cluster >> tables.l2_bits
        cached = {dirty >> tables.l2_bits for dirty in self._cache.entries}
        for number in range(min(count >> tables.l2_bits, _TABLES_AT_ONCE)):
            if first + number in cached or tables.l1(first + number) & OFFSET:
                return number << tables.l2_bits
        return min(count >> tables.l2_bits, _TABLES_AT_ONCE) << tables.l2_bits

    def _zero(self, cluster: int) -> None:
        """A whole cluster is zero."""
        if self._payload.raw:
            # The map stays: what it names has to be zero, for those who do not read it.
            where = cluster << self._bits, self._cluster_size
            if cluster in self._cache.entries or cluster in self._flying or not self._payload.zero(*where):
                self._put(cluster, 0, IoVec([bytes(self._cluster_size)]))
            else:
                self._unsynced = True
            return
        if self._changes.needs_table(cluster) and self._changes.shines_through(cluster):
            self._space.reserve(3 * self._cluster_size)
            self._space.release(3 * self._cluster_size)
        try:
            mapped = self._changes.map_zero(cluster)
        except Exception as error:
            self._fail(OSError(errno.EUCLEAN, _text(error)))
            raise
        if mapped:
            self._forget(cluster)
            if self._payload.external and cluster not in self._flying:
                # Zero is what it may be from now on, also if the power fails.
                self._payload.zero(cluster << self._bits, self._cluster_size)
        else:
            self._put(cluster, 0, IoVec([bytes(self._cluster_size)]))

    def _zero_part(self, cluster: int, within: int, length: int) -> None:
        if cluster not in self._cache.entries:
            parts = self._image.extents((cluster << self._bits) + within, length, wait=False)
            below = self._changes.shines_through(cluster)
            if all(part.kind == Kind.ZERO or (part.kind == Kind.UNALLOCATED and not below) for part in parts):
                return
        self._put(cluster, within, IoVec([bytes(length)]))

    def _forget(self, cluster: int) -> None:
        """The file has this cluster as it is, or it is not there any more."""
        entry = self._cache.remove(cluster)
        if entry is None:
            return
        self._space.release(entry.cost)
        if self._room and self._cache.has_room:
            self._room.unpark_all()

    # Destaging.

    def _call_destagers(self) -> None:
        self._work.unpark_all()

    async def _destager(self) -> None:
        try:
            while not self._closing.is_set():
                # One of them is enough for that, and has larger batches alone: each costs an fdatasync of the file.
                many_logged = (
                    self._log is not None and not self._relieving and self._cache.logged > self._log.half_size // 8
                )
                keep = 0 if many_logged else self._cache.limit * 3 // 8
                batch = [] if self._failed else self._cache.pick(self._batch, keep)
                if not batch:
                    await self._work.park()
                    continue
                self._relieving |= many_logged
                await self._try(self._destage, batch)
                if many_logged:
                    self._relieving = False
                # What was freed is used again only after a record, and one must not become too large.
                if len(self._changes.dropped) > self._many or self._changed > self._log_size // 32:
                    await self._try(self._settle_map)
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
                now = self._writes
                if now == last and now != clean and not self._failed:
                    await self._try(self.destage)
                    await self._try(self.checkpoint)
                    await self._try(self.punch)
                    clean = now
                elif now == clean and not self._failed:
                    await self._try(self._compact)
                last = now
        finally:
            self._leave()

    async def _compact(self) -> None:
        """Empties what is mostly free, and gives it back."""
        if self._compactor is None:
            return
        async with self._tidying:
            moved = await self._compactor.run()
        if moved:
            await self.checkpoint()
            await self.punch()

    async def _rewrite(self, clusters: Sequence[int]) -> int:
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
            except _CacheFullError:
                if not batch:
                    break
            await self._destage(batch)
            count += len(batch)
        return count

    async def _take_in(self, cluster: int) -> Entry | None:
        """The entry of a cluster in the cache; None if it is damaged: whoever reads it has to be told."""
        while True:
            try:
                return self._cache.entries.get(cluster) or self._add_entry(cluster, whole=False)
            except Cold as cold:
                await trio.to_thread.run_sync(cold.warm)
            except MediumError:
                return None

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

    async def _try(self, function: Callable[..., Any], *arguments: Any) -> None:
        """Runs what nobody waits for: whoever needs it to succeed finds out."""
        try:
            await function(*arguments)
        except OSError as error:
            logger.warning("%s: what is dirty cannot be written back: %s", self._storage.path, error)
            self._destage_error = error
            self._room.unpark_all()
            with trio.move_on_after(1):
                await self._closing.wait()
        except Exception as error:
            logger.exception("%s: writing back failed", self._storage.path)
            self._fail(OSError(errno.EIO, _text(error)))

    def _leave(self) -> None:
        self._background -= 1
        if not self._background:
            self._ended.set()
            self._room.unpark_all()

    async def destage(self, *, logged_only: bool = False, locked: bool = False) -> None:
        """Writes back what is dirty now; what is changed meanwhile may stay.

        Args:
            logged_only: Leave alone what no record has.
            locked: The caller has the lock of the commits.
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
                    if len(batch) >= self._batch:
                        break
            if batch:
                await self._destage(sorted(batch, key=lambda pair: pair[0]), locked=locked)
            elif versions:
                await self._room.park() if self._background else await trio.lowlevel.checkpoint()

    async def _destage(self, batch: Sequence[tuple[int, Entry]], *, locked: bool = False) -> None:
        """Compresses, writes, and then changes the map where nobody has written meanwhile."""
        with trio.CancelScope(shield=True):
            # Nobody has to wait for these while they wait.
            await self._afford(self._cost(batch), locked=locked)
            batch = [(cluster, entry) for cluster, entry in batch if self._is_idle(cluster, entry)]
            worst = self._cost(batch)
            jobs = self._jobs(batch)
            placed: list[Job] = []
            self._promised += worst
            try:
                await trio.to_thread.run_sync(self._packer.prepare, jobs)
                plan = self._packer.place(jobs, placed)
                await trio.to_thread.run_sync(self._packer.write_out, plan)
                while self._gate is not None:
                    await self._gate.wait()
            except BaseException:
                self._packer.give_back(placed)
                raise
            else:
                self._settle(jobs)
            finally:
                self._promised -= worst
                self._landed(jobs)
                self._room.unpark_all()

    def _destage_now(self, batch: Sequence[tuple[int, Entry]]) -> None:
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

    def _landed(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            job.entry.busy = False
        if self._payload.external:
            self._flying.difference_update(job.cluster for job in jobs)

    def _jobs(self, batch: Sequence[tuple[int, Entry]]) -> list[Job]:
        jobs = []
        for cluster, entry in batch:
            entry.busy = True
            if self._payload.external:
                self._flying.add(cluster)
            jobs.append(Job(cluster, entry, entry.version, bytes(entry.data)))
        return jobs

    @property
    def _batch(self) -> int:
        """How many clusters are destaged together."""
        assert self._log is not None
        room = self._log.half_size // 4
        most = _BATCH >> self._bits
        return max(1, most if self._all_metadata() <= room else min(most, room // (_PAGES * self._pages.size)))

    def _is_idle(self, cluster: int, entry: Entry) -> bool:
        return self._cache.entries.get(cluster) is entry and not entry.busy and cluster not in self._flying

    def _cost(self, batch: Sequence[tuple[int, Entry]]) -> int:
        """Bytes of metadata that the destaging of these may dirty, at most."""
        # One cluster of each table.
        tables = {cluster >> self._image.tables.l2_bits: cluster for cluster, _ in batch}
        new = sum(map(self._changes.needs_table, tables.values()))
        cost = len(batch) * _PAGES * self._pages.size + new * (self._cluster_size + self._worst // 2)
        return min(cost, self._all_metadata())

    def _all_metadata(self) -> int:
        """Bytes of all tables that the map can have, at most."""
        tables = self._image.tables
        l2 = (self._image.size >> self._bits << tables.entry_bits) + 2 * self._cluster_size
        # What several that destage at once, and one that writes, may add to the file meanwhile.
        hosts = (self._space.end >> self._bits) + (16 * _BATCH >> self._bits) + 64
        refcounts = (hosts << self._header.refcount_order >> 3) + 2 * self._cluster_size
        return 8 * tables.l1_entries + l2 + refcounts + 4 * self._cluster_size + 8 * self._pages.size

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
                    self.counters["compressed_bytes"] += self._cluster_size
                    self.counters["stored_bytes"] += len(job.stored)
            except Exception as error:
                # The map is changed by halves: what is in memory must never be in a record.
                self._fail(OSError(errno.EUCLEAN, _text(error)))
                raise
            self._forget(job.cluster)
            self.counters["destaged"] += 1

    def _fail(self, error: OSError) -> None:
        if self._failed is None:
            self._failed = error
            logger.error("%s: nothing is written any more: %s", self._storage.path, error)
        self._room.unpark_all()

    # Commits and checkpoints.

    async def _or_fail(self, work: Awaitable[_T]) -> _T:
        """Does what makes durable: if it fails, nothing is certain any more."""
        try:
            return await work
        except OSError as error:
            self._fail(error)
            raise

    async def _in_thread(self, function: Callable[..., _T], *arguments: Any) -> _T:
        """The same for what blocks."""
        return await self._or_fail(trio.to_thread.run_sync(function, *arguments))

    def _is_simple(self, log: Log) -> bool:
        """Whether a flush is one small transfer: a record that is durable alone, or an fdatasync."""
        changes, cache = self._changes, self._cache
        if not self._pending():
            return True
        return not (
            self._unsynced
            or changes.extents
            or changes.fresh
            or self._payload.external
            or cache.unlogged > _SMALL_RECORD
            or cache.unlogged + cache.logged > log.half_size // 4
            or self._changed > _SMALL_RECORD
            or self._changed + cache.unlogged * 9 // 8 + 4096 > log.room
        )

    async def _commit_at_once(self, log: Log) -> None:
        """What `_commit` does where it is simple."""
        if not self._pending():
            if self._unsynced:
                self._unsynced = False
                await self._see_through(self._payload.storage.sync)
            return
        record, dropped, _ = self._take(images=False)
        data = log.encode(record)
        try:
            await self._see_through(lambda: log.append(data, everything=False))
        finally:
            if self._failed is None:
                self._end_commit(log, dropped)

    async def _see_through(self, work: Callable[[], Awaitable[None]]) -> None:
        """Does what must not end half done: once more, if it is cancelled, and only then lets that through.

        A cancel scope would do, but costs a good part of a flush, and needs a task.
        """
        try:
            await work()
        except OSError as error:
            self._fail(error)
            raise
        except (trio.Cancelled, TransferCancelled):
            # What is done twice is the same.
            await trio.lowlevel.cancel_shielded_checkpoint()
            with trio.CancelScope(shield=True):
                await self._or_fail(work())
            raise
        except BaseException:
            self._fail(OSError(errno.EIO, "a flush was given up in the middle"))
            raise

    def _end_commit(self, log: Log, dropped: Sequence[tuple[int, int]]) -> None:
        self.counters["commits"] += 1
        self._release(dropped)
        if self._cache.logged > log.half_size // 8:
            self._call_destagers()

    async def _commit(self, *, pieces: bool = True) -> None:
        """One record and one fdatasync; the lock is held.

        Args:
            pieces: With what only the cache has.
        """
        log = self._log
        assert log is not None
        if pieces:
            await self._thin_out(log.half_size // 4)
        if not self._pending(pieces=pieces):
            if pieces:
                self._commits += 1
                if self._unsynced:
                    self._unsynced = False
                    await self._or_fail(self._payload.storage.sync())
            return
        await self._sync_fresh()
        # Until the record is taken nothing more may come in that it has no room for.
        while self._changed + (self._cache.unlogged * 9 // 8 if pieces else 0) + 4096 > log.room:
            self._open_gate()
            await self._checkpoint()
            if pieces:
                await self._thin_out(log.half_size // 4)
            await self._sync_fresh()
        try:
            if pieces:
                self._commits += 1
            record, dropped, _ = self._take(images=False, pieces=pieces)
        finally:
            self._open_gate()
        await self._append(log, record)
        self._end_commit(log, dropped)

    async def _append(self, log: Log, record: Record) -> None:
        if len(record.pages) + len(record.pieces) + len(record.extents) <= _FEW:
            # Encoded sooner than a thread begins.
            data = log.encode(record)
        else:
            data = await self._in_thread(log.encode, record)
        if len(data) > log.room:
            self._fail(OSError(errno.EFBIG, f"{len(data)} bytes of changes do not fit into the log"))
            self._check()
        if self._payload.external:
            # What the record names, and all that was written in place before it was taken.
            await self._or_fail(self._payload.storage.sync())
        await self._or_fail(log.append(data, everything=record.needs_data))

    async def _thin_out(self, limit: int) -> None:
        """Destages until the cache has no more than so many bytes for the log: a record of images has room for them."""
        for _ in range(2):
            if self._cache.unlogged + self._cache.logged <= limit:
                return
            await self.destage(locked=True)
        while self._cache.unlogged + self._cache.logged > limit:
            # Others write as fast.
            await self._afford(self._batch * self._worst, locked=True)
            batch = [pair for pair in self._cache.entries.items() if self._is_idle(*pair)][: self._batch]
            if batch:
                self._destage_now(batch)
            else:
                await self._room.park()

    def _pending(self, *, pieces: bool = True) -> bool:
        changes = self._changes
        return bool((pieces and self._cache.unlogged) or self._pages.changed or changes.settled or changes.dropped)

    async def _sync_fresh(self) -> None:
        """Makes plain clusters durable that the next record maps, and lets no more come until it is taken."""
        fresh, self._changes.fresh = self._changes.fresh, False
        if not fresh or self._payload.external:
            # Nobody else is let in before the record is taken.
            return
        self._gate = trio.Event()
        try:
            self._unsynced = False
            await self._or_fail(self._storage.sync())
        except BaseException:
            self._open_gate()
            raise

    def _open_gate(self) -> None:
        gate, self._gate = self._gate, None
        if gate is not None:
            gate.set()

    def _take(self, *, images: bool, pieces: bool = True) -> tuple[Record, list[tuple[int, int]], list[int]]:
        """What changed since the last record, for this one; with `images` all that is not in the file.

        With `pieces` what is in the cache alone, too; `images` have those that were in a record before.
        """
        changes = self._changes
        record = Record(self._pages.take_changes(images=images), sorted(changes.settled))
        record.extents = [(offset, length, crc) for offset, (length, crc) in changes.extents.items()]
        record.in_place = self._unsynced and not self._payload.external
        if images:
            record.pieces = self._cache.logged_pieces()
        elif pieces:
            record.pieces = self._cache.take_pieces()
        self._unsynced = False
        dropped, changes.dropped = changes.dropped, []
        metadata: list[int] = []
        if images:
            metadata, changes.dropped_metadata = changes.dropped_metadata, []
        changes.settled = set()
        changes.extents = {}
        return record, dropped, metadata

    def _release(self, dropped: Sequence[tuple[int, int]]) -> None:
        """Nothing durable names these places any more."""
        for offset, length in dropped:
            if length:
                self._space.free(offset, length)
            else:
                self._changes.pending.discard(offset)
                self._space.free_cluster(offset)

    async def checkpoint(self) -> None:
        """Brings all that is in the log into the tables."""
        await self.destage(logged_only=True)
        async with self._turn:
            self._check()
            with trio.CancelScope(shield=True):
                await self._checkpoint()
        while self._checkpointing is not None:
            await self._checkpointing.wait()

    async def _checkpoint(self) -> None:
        """The same, up to the record of images; the lock is held. The rest goes on behind.

        What no record has is not in this one either: it is no flush.
        """
        log = self._log
        assert log is not None
        while self._checkpointing is not None:
            await self._checkpointing.wait()
            self._check()
        if not (self._pages.dirty or self._cache.logged):
            return
        await self._sync_fresh()
        try:
            record, dropped, metadata = self._take(images=True)
            copies = [(number, words) for number, _, words in record.pages]
            flying = self._pages.take_off()
        finally:
            self._open_gate()
        seq = log.switch()
        await self._append(log, record)
        self.counters["commits"] += 1
        self.counters["checkpoints"] += 1
        self._release(dropped)
        self._checkpointing = trio.Event()
        trio.lowlevel.spawn_system_task(self._bring_home, seq, copies, flying, metadata)

    async def _bring_home(
        self, seq: int, copies: list[tuple[int, bytes]], flying: list[Any], metadata: list[int]
    ) -> None:
        """Writes pages in place, and then the state: the other half is free."""
        log, done = self._log, self._checkpointing
        assert log is not None
        assert done is not None

        def write() -> None:
            for number, words in copies:
                # Of the header only what can change: the rest must not tear.
                data = words[:SECTOR] if number == 0 else words
                self._storage.pwrite(number * self._pages.size, [data])
            log.write_state(seq)

        try:
            await trio.to_thread.run_sync(write)
        except Exception as error:
            self._fail(error if isinstance(error, OSError) else OSError(errno.EIO, str(error)))
        else:
            self._pages.land(flying)
            for offset in metadata:
                self._changes.pending.discard(offset)
                self._space.free_cluster(offset)
        finally:
            self._checkpointing = None
            done.set()

    # Maps as a whole.

    async def branch(self, change: Callable[[Branching], None]) -> None:
        """Makes a change of the whole map durable; nobody may write meanwhile.

        Raises:
            Qcow2Error: It cannot be made; nothing is changed.
        """
        await self._start()
        await self.destage()
        await self.flush()
        await self.checkpoint()
        try:
            change(Branching(self._image, self._changes, self._space))
        except Qcow2Error:
            # These are raised before anything is changed.
            raise
        except Exception as error:
            self._fail(OSError(errno.EUCLEAN, _text(error)))
            raise
        await self.checkpoint()

    # Life.

    async def _start(self) -> None:
        """Puts the log into the file before the first change."""
        if self._log is not None:
            self._check()
            return
        async with self._start_lock:
            if self._log is None:
                self._check()
                with trio.CancelScope(shield=True):
                    try:
                        place, opened = await trio.to_thread.run_sync(self._lay_log)
                        self._session = await self._in_thread(announce, self._image, place, opened)
                        self._log = self._session.log
                        await self._begin()
                    except Qcow2Error as error:
                        # What is damaged is found when it is needed; to who writes it is the medium.
                        raise OSError(errno.EUCLEAN, str(error)) from error

    async def _begin(self) -> None:
        """The tasks in the background. They end with `close`, as the handler has no nursery to lend them."""
        tasks = [self._destager] * _DESTAGERS + ([self._keeper] if self._idle is not None else [])
        scanner = Scanner(self._image, self._changes, self._space, self._settle_map)
        if self._space.end <= _SMALL:
            await scanner.scan(self._closing)
        else:
            tasks.append(lambda: self._scan(scanner))
        if self._packer.can_compact:
            self._compactor = Compactor(
                self._image,
                self._space,
                rewrite=self._rewrite,
                flush=self._settle_map,
                activity=lambda: self._writes + self._image.reads,
                closing=self._closing,
                rate=self._compaction,
            )
        self._background = len(tasks)
        for task in tasks:
            trio.lowlevel.spawn_system_task(task)

    async def _scan(self, scanner: Scanner) -> None:
        try:
            await self._try(scanner.scan, self._closing)
        finally:
            self._leave()

    def _lay_log(self) -> tuple[LogPlace, bytes]:
        """Makes the log and what goes with it. Blocks; if it raises, nothing has happened."""
        place = place_log(self._image, self._log_size)
        self._open_space(place.offset + place.size)
        try:
            # For refcount blocks, that nobody counts on.
            self._space.reserve(_SLACK * self._cluster_size)
            return place, lay_log(self._image, place)
        except OSError:
            # Reserved was what is behind the end.
            self._storage.truncate(place.offset)
            raise

    def _open_space(self, end: int) -> None:
        end = -(-end >> self._bits) << self._bits
        self._space = Space(self._storage, self._bits, end, packed=self._compress)
        self._changes = Changes(self._image, self._space)
        self._packer = Packer(self._image, self._space, self._changes, compress=self._compress)

    async def recover(self) -> None:
        """Goes on where a log ended: brings everything into the tables."""
        chain = self._chain
        assert chain is not None
        session, end = await self._in_thread(resume, self._image, chain)
        self._open_space(end)
        self._space.reserve(_SLACK * self._cluster_size)
        for entry in self._cache.entries.values():
            entry.cost = 3 * self._cluster_size + 2 * SECTOR
            self._space.reserve(entry.cost)
        self._session, self._log = session, session.log
        await self.destage()
        await self.flush()
        await self.checkpoint()
        await self._begin()

    async def close(self) -> None:
        """Writes everything back, and takes the log out of the file.

        Raises:
            OSError: That failed. The log stays, and is replayed at the next open.
        """
        if self._log is None:
            return
        with trio.CancelScope(shield=True):
            self._closing.set()
            self._work.unpark_all()
            if self._background:
                await self._ended.wait()
            self._check()
            while self._cache or self._pages.dirty or self._pending():
                await self.destage()
                await self.flush()
                await self.checkpoint()
            self._check()
            await self.punch()
            await self._in_thread(self._payload.finish, self._image.size)
            end = self._space.trim(*self._image.log_range)
            await self._in_thread(renounce, self._image, self._session, end)
            self._log = None
