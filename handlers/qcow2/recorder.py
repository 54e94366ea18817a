"""Records of the log: what goes into them, and checkpoints, after which there is room for more."""

from __future__ import annotations

import errno
from collections.abc import Sequence

import trio

from .cache import Cache
from .changes import Changes
from .failure import Failure
from .header import SECTOR
from .image import Image
from .log import Log, Record
from .pages import Page
from .space import Space
from .turn import Turn

BATCH = 512 << 10
"""Bytes of clusters that are compressed at once."""
_FEW = 32
"""Parts of a record that is made in the loop."""


def worst_change(image: Image) -> int:
    """Bytes that one change of the map may dirty: L2 and refcounts, a new L2 table, a new refcount block."""
    return 2 * image.header.cluster_size + 6 * image.pages.size


class Recorder:
    """Takes what has changed in memory into records, and brings it into the tables before the log is full.

    Args:
        image: What is changed.
        log: Where records go.
        cache: Has data for them.
        changes: Has what they say about the map.
        space: Gets what nothing durable names any more.
        failure: Of anything that makes durable.
        room: Who waits there is told when less is on its way.

    Attributes:
        turn: Of who makes a record.
        worst: Bytes of metadata that one change of the map may dirty.
        promised: Bytes of metadata that the changes on their way may dirty.
        unsynced: Data was written in place, and no record makes it durable yet.
        gate: If there is one, the map must not change until it is opened: a record is about to be taken.
        most: Bytes that the cache may have for the log until then, if there is a limit.
        records: How many there were.
        checkpoints: How many of them had images.
    """

    def __init__(
        self,
        image: Image,
        log: Log,
        cache: Cache,
        changes: Changes,
        space: Space,
        failure: Failure,
        room: trio.lowlevel.ParkingLot,
    ) -> None:
        self.log = log
        self._image = image
        self._storage = image.storage
        self._payload = image.payload
        self._pages = image.pages
        self._cache = cache
        self._changes = changes
        self._space = space
        self._failure = failure
        self._room = room
        self._checkpointing: trio.Event | None = None
        self.turn = Turn()
        self.worst = worst_change(image)
        self.promised = 0
        self.unsynced = False
        self.gate: trio.Event | None = None
        self.most: int | None = None
        self.records = 0
        self.checkpoints = 0

    # How much there is.

    @property
    def changed(self) -> int:
        """Bytes of a record for the changes of the map, at most."""
        changes = self._changes
        named = 8 * len(changes.settled) + 16 * len(changes.extents)
        return self._pages.weight + named

    def pending(self, *, pieces: bool = True) -> bool:
        """Whether there is something for a record; with `pieces`, also what only the cache has."""
        changes = self._changes
        return bool((pieces and self._cache.unlogged) or self._pages.changed or changes.settled or changes.dropped)

    def all_metadata(self) -> int:
        """Bytes of all tables that the map can have, at most."""
        image, header, tables = self._image, self._image.header, self._image.tables
        bits, cluster_size = header.cluster_bits, header.cluster_size
        l2 = (image.size >> bits << tables.entry_bits) + 2 * cluster_size
        # What several that destage at once, and one that writes, may add to the file meanwhile.
        hosts = (self._space.end >> bits) + (16 * BATCH >> bits) + 64
        refcounts = (hosts << header.refcount_order >> 3) + 2 * cluster_size
        return 8 * tables.l1_entries + l2 + refcounts + 4 * cluster_size + 8 * self._pages.size

    async def afford(self, worst: int, *, locked: bool = False) -> None:
        """Waits until so many bytes of metadata more can be dirty: all that is has to fit into half of the log.

        Args:
            worst: Bytes.
            locked: The caller has the turn.
        """
        while True:
            self._failure.check()
            dirty = len(self._pages.dirty) * self._pages.size
            if min(dirty + self.promised + worst, self.all_metadata()) <= self.log.half_size // 2:
                return
            if not dirty:
                if not self.promised:
                    return
                await self._room.park()
            elif locked:
                await self.checkpoint()
            else:
                async with self.turn:
                    self._failure.check()
                    with trio.CancelScope(shield=True):
                        await self.checkpoint()

    # Records. Whoever makes one has the turn.

    async def sync_fresh(self, most: int | None = None) -> None:
        """Makes plain clusters durable that the next record maps, and lets no more come until it is taken.

        With `most` no more than so many bytes in the cache for the log either: a record of images has to hold them.
        """
        fresh, self._changes.fresh = self._changes.fresh, False
        if not fresh or self._payload.external:
            # Nobody else is let in before the record is taken.
            return
        self.gate, self.most = trio.Event(), most
        try:
            self.unsynced = False
            await self._failure.or_fail(self._storage.sync())
        except BaseException:
            self.open_gate()
            raise

    def open_gate(self) -> None:
        """The record is taken: the map may change again."""
        gate, self.gate, self.most = self.gate, None, None
        if gate is not None:
            gate.set()
            self._room.unpark_all()

    def take(self, *, images: bool, pieces: bool = True) -> tuple[Record, list[tuple[int, int]], list[int]]:
        """What changed since the last record, for this one; with `images` all that is not in the file.

        With `pieces` what is in the cache alone, too; `images` have those that were in a record before.

        Returns:
            The record, places for `release` when it is durable, and clusters of metadata that are free when all of it
            is in the tables.
        """
        try:
            return self._take(images=images, pieces=pieces)
        except Exception as error:
            # What was taken until then is in no record.
            self._failure.fail(OSError(errno.EIO, repr(error)))
            raise

    def _take(self, *, images: bool, pieces: bool) -> tuple[Record, list[tuple[int, int]], list[int]]:
        changes = self._changes
        record = Record(self._pages.take_changes(images=images), sorted(changes.settled))
        record.extents = [(offset, length, crc) for offset, (length, crc) in changes.extents.items()]
        record.in_place = self.unsynced and not self._payload.external
        if images:
            record.pieces = self._cache.logged_pieces()
        elif pieces:
            record.pieces = self._cache.take_pieces()
        self.unsynced = False
        dropped, changes.dropped = changes.dropped, []
        metadata: list[int] = []
        if images:
            metadata, changes.dropped_metadata = changes.dropped_metadata, []
        changes.settled = set()
        changes.extents = {}
        return record, dropped, metadata

    async def append(self, record: Record) -> None:
        """Makes a record durable, and what it needs."""
        data = await self._failure.or_fail(self._encode(record))
        if len(data) > self.log.room:
            self._failure.fail(OSError(errno.EFBIG, f"{len(data)} bytes of changes do not fit into the log"))
            self._failure.check()
        if self._payload.external:
            # What the record names, and all that was written in place before it was taken.
            await self._failure.or_fail(self._payload.storage.sync())
        await self._failure.or_fail(self.log.append(data, everything=record.needs_data))

    async def _encode(self, record: Record) -> bytes:
        if len(record.pages) + len(record.pieces) + len(record.extents) <= _FEW:
            # Sooner done than a thread begins.
            return self.log.encode(record)
        return await trio.to_thread.run_sync(self.log.encode, record)

    def release(self, dropped: Sequence[tuple[int, int]]) -> None:
        """A record is durable: nothing durable names these places any more."""
        self.records += 1
        for offset, length in dropped:
            if length:
                self._space.free(offset, length)
            else:
                self._changes.pending.discard(offset)
                self._space.free_cluster(offset)

    # Checkpoints.

    async def checkpoint(self) -> None:
        """Brings what records have into the tables: up to the record of images, and the rest goes on behind.

        What no record has is not in this one either: it is no flush.
        """
        await self.wait_for_checkpoint()
        if not (self._pages.dirty or self._cache.logged):
            return
        await self.sync_fresh()
        try:
            record, dropped, metadata = self.take(images=True)
            copies = [(number, words) for number, _, words in record.pages]
            flying = self._pages.take_off()
        finally:
            self.open_gate()
        seq = self.log.switch()
        await self.append(record)
        self.checkpoints += 1
        self.release(dropped)
        self._checkpointing = trio.Event()
        trio.lowlevel.spawn_system_task(self._bring_home, seq, copies, flying, metadata, self._checkpointing)

    async def _bring_home(
        self, seq: int, copies: list[tuple[int, bytes]], flying: list[Page], metadata: list[int], done: trio.Event
    ) -> None:
        """Writes pages in place, and then the state: the other half is free."""

        def write() -> None:
            for number, words in copies:
                # Of the header only what can change: the rest must not tear.
                data = words[:SECTOR] if number == 0 else words
                self._storage.pwrite(number * self._pages.size, [data])
            self.log.write_state(seq)

        try:
            await self._failure.in_thread(write)
        except Exception:
            # Whoever waits is told.
            pass
        else:
            self._pages.land(flying)
            for offset in metadata:
                self._changes.pending.discard(offset)
                self._space.free_cluster(offset)
        finally:
            self._checkpointing = None
            done.set()

    async def wait_for_checkpoint(self) -> None:
        """Waits until none is under way; this needs no turn.

        Raises:
            OSError: It failed, or something before it.
        """
        while self._checkpointing is not None:
            await self._checkpointing.wait()
        self._failure.check()
