"""Writing: commands, changes of the cache or in place, and the life of the log.

Behind it are four, each of which knows those before it alone: the `Recorder` makes records and checkpoints, `Destaging`
takes clusters into the cache and writes them back, `Commits` are what flushes wait for, and `Upkeep` has the tasks in
the background.
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable

import trio

from tcmu_rs import IoVec

from ._errors import Qcow2Error
from .branching import Branching
from .cache import Cache
from .changes import Changes
from .commits import Commits
from .compaction import RATE
from .destaging import CacheFullError, Destaging
from .failure import Failure, text_of
from .header import DIRTY, SECTOR, LogPlace
from .image import Image, Kind
from .log import STATES, Chain
from .packing import Packer
from .pages import Cold
from .recorder import Recorder, worst_change
from .refcounts import Refcounts
from .session import Session, announce, check_room, lay_log, place_log, renounce, resume
from .space import Space
from .tables import COMPRESSED, COPIED, OFFSET, SUBCLUSTERS, ZERO
from .upkeep import Upkeep

CACHE = 16 << 20
"""Bytes of dirty clusters that are kept in memory."""
IDLE = 1.0
"""Seconds without a write after which everything is written back."""
_MAX_LOG = 16 << 20
_MIN_LOG = 4 << 20
_ZEROES_AT_ONCE = 256
"""Clusters that are discarded before others may do something."""
_TABLES_AT_ONCE = 1024
_SLACK = 8
"""Clusters that are reserved for refcount blocks."""


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


def _check_refcounts(image: Image) -> None:
    """Refuses refcounts by which something would be written over what the image begins with.

    Raises:
        Qcow2Error: They are damaged.
    """
    header = image.header
    refcounts = Refcounts(image.pages, header)
    begins = {"header": 0, "L1 table": header.l1_offset, "refcount table": header.refcount_offset}
    for what, offset in begins.items():
        if not refcounts.get(offset >> header.cluster_bits):
            raise Qcow2Error(
                f"{image.storage.path} is damaged: by its refcounts its {what} is free space. `qemu-img check -r all` "
                "may mend it, or attach it read-only"
            )


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
        _check_refcounts(image)
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
        self._bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        self._in_cluster = header.cluster_size - 1
        self._cache = Cache(image.cache, max(4, cache_size >> self._bits))
        self._log_size = max(
            log_size or min(_MAX_LOG, max(_MIN_LOG, image.size >> 6)), STATES + 8 * worst_change(image)
        )
        self._idle = idle
        self._compaction = compaction
        self._chain = chain
        self._room = trio.lowlevel.ParkingLot()
        self._failure = Failure(image.storage.path, self._room)
        self._start_lock = trio.Lock()
        self._space: Space
        # These are there as long as there is a session.
        self._session: Session | None = None
        self._changes: Changes
        self._recorder: Recorder
        self._destaging: Destaging
        self._commits: Commits
        self._upkeep: Upkeep
        self._writes = 0
        self._hits = 0
        self._misses = 0
        self._in_place = 0

    def statistics(self) -> dict[str, float]:
        """What the handler tells."""
        if self._session is None:
            return {}
        log, destaging, compactor = self._session.log, self._destaging, self._upkeep.compactor
        found: dict[str, float] = {
            "reserved_bytes": self._space.ahead,
            "free_bytes": (self._space.holes.sectors + self._space.clusters.sectors) * SECTOR,
            "dirty_bytes": len(self._cache) << self._bits,
            "log_bytes": log.half_size,
            "log_used_bytes": log.half_size - log.room,
            "cache_hits": self._hits,
            "cache_misses": self._misses,
            "destaged": destaging.destaged,
            "in_place": self._in_place,
            "commits": self._recorder.records,
            "checkpoints": self._recorder.checkpoints,
            "compressed_bytes": destaging.compressed_bytes,
            "stored_bytes": destaging.stored_bytes,
        }
        if destaging.stored_bytes:
            found["ratio"] = destaging.compressed_bytes / destaging.stored_bytes
        if compactor is not None:
            found |= {"compactions": compactor.passes, "moved": compactor.moved}
        return found

    # Commands.

    async def write(self, offset: int, iov: IoVec) -> None:
        """Stores; it is durable after the next flush."""
        if self._session is None or self._failure.error is not None:
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
            except (Cold, CacheFullError, OSError):
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

    def flush(self) -> Awaitable[None]:
        """Makes durable what was written before; one fdatasync serves all who wait.

        It is taskless (`BlockHandler`), and so are the commits: this is no coroutine of its own on the way to them.
        """
        return _nothing() if self._session is None else self._commits.flush()

    async def _retry(self, change: Callable[[], None]) -> None:
        """Makes a change, which does nothing if it raises, until there is what it needs."""
        reclaimed = False
        while True:
            await self._recorder.afford(self._recorder.worst)
            try:
                change()
                break
            except Cold as cold:
                await trio.to_thread.run_sync(cold.warm)
            except CacheFullError:
                await self._destaging.make_room()
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) or reclaimed:
                    raise
                # What was freed can be used again after a record.
                reclaimed = True
                await self._commits.settle_map()
        await self._relieve()

    async def _relieve(self) -> None:
        """Lets the log have what it has not, before it is too much for a record."""
        if self._recorder.changed > self._recorder.log.half_size // 16:
            await self._commits.settle_map()

    # Changes, at once and in memory.

    def _put(self, cluster: int, within: int, part: IoVec) -> None:
        """Takes a part of a cluster, or all of it, into the cache, or writes it in place."""
        length = part.nbytes
        cache, most = self._cache, self._recorder.most
        entry = cache.entries.get(cluster)
        if entry is None:
            host = self._place_of(cluster, within, length)
            if host:
                self._payload.write(host + within, part)
                self._recorder.unsynced = True
                self._in_place += 1
                return
        if most is not None and cache.unlogged + cache.logged + length > most:
            raise CacheFullError
        if entry is None:
            entry = self._destaging.add(cluster, whole=length == self._cluster_size)
            self._misses += 1
        else:
            self._hits += 1
        part.copy_into(memoryview(entry.data)[within : within + length])
        cache.mark(cluster, entry, within, length)

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
            if cluster in self._cache.entries or cluster in self._destaging.flying or not self._payload.zero(*where):
                self._put(cluster, 0, IoVec([bytes(self._cluster_size)]))
            else:
                self._recorder.unsynced = True
            return
        if self._changes.needs_table(cluster) and self._changes.shines_through(cluster):
            self._space.reserve(3 * self._cluster_size)
            self._space.release(3 * self._cluster_size)
        try:
            mapped = self._changes.map_zero(cluster)
        except Exception as error:
            self._failure.fail(OSError(errno.EUCLEAN, text_of(error)))
            raise
        if mapped:
            self._destaging.forget(cluster)
            if self._payload.external and cluster not in self._destaging.flying:
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

    # Maps as a whole.

    async def branch(self, change: Callable[[Branching], None]) -> None:
        """Makes a change of the whole map durable; nobody may write meanwhile.

        Raises:
            Qcow2Error: It cannot be made; nothing is changed.
        """
        await self._start()
        await self._drain()
        try:
            change(Branching(self._image, self._changes, self._space))
        except Qcow2Error:
            # These are raised before anything is changed.
            raise
        except Exception as error:
            self._failure.fail(OSError(errno.EUCLEAN, text_of(error)))
            raise
        await self._commits.checkpoint()

    async def _drain(self) -> None:
        """Brings all that was written until now into the tables."""
        await self._destaging.destage()
        await self._commits.flush()
        await self._commits.checkpoint()

    # Life.

    async def _start(self) -> None:
        """Puts the log into the file before the first change."""
        if self._session is not None:
            self._failure.check()
            return
        async with self._start_lock:
            if self._session is None:
                self._failure.check()
                with trio.CancelScope(shield=True):
                    try:
                        place, opened = await trio.to_thread.run_sync(self._lay_log)
                        self._open(await self._failure.in_thread(announce, self._image, place, opened))
                        await self._upkeep.begin()
                    except Qcow2Error as error:
                        # What is damaged is found when it is needed; to who writes it is the medium.
                        raise OSError(errno.EUCLEAN, str(error)) from error

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

    def _open(self, session: Session) -> None:
        """The log is there, and so is space: now there can be changes."""
        image, cache, space, failure, room = self._image, self._cache, self._space, self._failure, self._room
        self._changes = changes = Changes(image, space)
        packer = Packer(image, space, changes, compress=self._compress)
        self._recorder = recorder = Recorder(image, session.log, cache, changes, space, failure, room)
        self._destaging = destaging = Destaging(image, cache, space, changes, packer, recorder, failure, room)
        self._commits = commits = Commits(image.payload, cache, changes, recorder, destaging, failure)
        self._upkeep = Upkeep(
            image,
            cache,
            space,
            changes,
            recorder,
            destaging,
            commits,
            failure,
            writes=lambda: self._writes,
            idle=self._idle,
            compaction=self._compaction if packer.can_compact else None,
        )
        self._session = session

    async def recover(self) -> None:
        """Goes on where a log ended: brings everything into the tables."""
        chain = self._chain
        assert chain is not None
        session, end = await self._failure.in_thread(resume, self._image, chain)
        self._open_space(end)
        self._space.reserve(_SLACK * self._cluster_size)
        for entry in self._cache.entries.values():
            entry.cost = 3 * self._cluster_size + 2 * SECTOR
            self._space.reserve(entry.cost)
        self._open(session)
        try:
            await self._drain()
        finally:
            await self._leave_the_file()
        await self._upkeep.begin()

    async def close(self) -> None:
        """Writes everything back, and takes the log out of the file.

        Raises:
            OSError: That failed. The log stays, and is replayed at the next open.
        """
        session = self._session
        if session is None:
            return
        with trio.CancelScope(shield=True):
            await self._upkeep.end()
            try:
                self._failure.check()
                while self._cache or self._image.pages.dirty or self._recorder.pending():
                    await self._drain()
            finally:
                await self._leave_the_file()
            await self._upkeep.punch()
            await self._failure.in_thread(self._payload.finish, self._image.size)
            end = self._space.trim(*self._image.log_range)
            await self._failure.in_thread(renounce, self._image, session, end)
            self._session = None

    async def _leave_the_file(self) -> None:
        """Waits for what goes on behind a checkpoint: it would write to whatever gets the descriptor next.

        Raises:
            OSError: It failed, or something before it.
        """
        with trio.CancelScope(shield=True):
            await self._recorder.wait_for_checkpoint()


async def _nothing() -> None:
    """There is nothing to do."""
