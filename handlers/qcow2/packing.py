"""What is stored of dirty clusters, and where: compressed one behind the other, or as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .cache import Entry
from .changes import Changes
from .header import SECTOR
from .image import Image
from .space import Space
from .storage import Buffer


@dataclass(slots=True)
class Job:
    """A dirty cluster on its way to the file.

    Attributes:
        cluster: Of the guest.
        entry: In the cache.
        version: Of the entry when it was copied.
        data: The copy.
        stored: What is written; None for a plain cluster; empty for zeroes.
        place: Where.
        crc: Of what is stored.
    """

    cluster: int
    entry: Entry
    version: int
    data: bytes
    stored: Buffer | None = None
    place: int = 0
    crc: int = 0


class Packer:
    """Finds for each cluster what is stored of it, and a place.

    Args:
        image: Where to.
        space: Where places come from.
        changes: Know what the map can say.
        compress: Or store clusters as they are.
    """

    def __init__(self, image: Image, space: Space, changes: Changes, *, compress: bool) -> None:
        header = image.header
        self._header = header
        self._codec = image.codec
        self._payload = image.payload
        self._space = space
        self._changes = changes
        self._compress = compress
        self._bits = header.cluster_bits
        self._cluster_size = header.cluster_size
        # A frame takes at least so much of a host cluster, so that its refcount suffices.
        self._least = max(1, self._cluster_size // min(1 << 62, (1 << (1 << header.refcount_order)) // 2))

    @property
    def can_compact(self) -> bool:
        """Whether all sectors of a cluster may be used by frames of their own, so that any that are free are holes."""
        return self._compress and self._least <= SECTOR

    def prepare(self, jobs: Sequence[Job]) -> None:
        """In a thread: what is stored of each cluster."""
        if self._compress:
            for job, (stored, crc) in zip(jobs, self._codec.compress([job.data for job in jobs]), strict=True):
                job.stored, job.crc = stored, crc
            return
        zeroes = bytes(self._cluster_size)
        for job in jobs:
            # In a raw data file they have to be zeroes indeed.
            if job.data == zeroes and not self._payload.raw:
                job.stored = b""

    def place(self, jobs: Sequence[Job], placed: list[Job]) -> list[tuple[int, list[Buffer]]]:
        """Takes free space for what is stored; returns what to write where."""
        plan: list[tuple[int, list[Buffer]]] = []
        run: list[tuple[Job, int]] = []
        at = 0
        most = 1 << (self._bits - 8)
        for job in jobs:
            stored = job.stored
            if stored == b"":
                if self._header.version > 2 or not self._changes.shines_through(job.cluster):
                    continue
                stored = job.stored = None
            if stored is None:
                if self._payload.external:
                    job.place = job.cluster << self._bits
                else:
                    job.place = self._space.take_clusters(1)
                    placed.append(job)
                plan.append((job.place, [job.data]))
                continue
            hole = self._space.take_sectors(max(len(stored), self._least))
            if hole is not None:
                job.place = hole
                self._space.use(hole, len(stored))
                placed.append(job)
                plan.append((hole, [stored]))
                continue
            if ((at + len(stored) - 1) >> 9) - (at >> 9) >= most:
                at = -(-at // SECTOR) * SECTOR
            run.append((job, at))
            at += max(len(stored), self._least)
        if run:
            start = self._space.take_run(at)
            buffers: list[Buffer] = []
            stop = 0
            for job, place in run:
                assert job.stored is not None
                job.place = start + place
                self._space.use(job.place, len(job.stored))
                placed.append(job)
                buffers += [bytes(place - stop), job.stored] if place > stop else [job.stored]
                stop = place + len(job.stored)
            plan.append((start, buffers))
        return plan

    def write_out(self, plan: Sequence[tuple[int, list[Buffer]]]) -> None:
        """In a thread."""
        for offset, buffers in plan:
            self._payload.write_buffers(offset, buffers)

    def give_back(self, placed: Sequence[Job]) -> None:
        """Nothing names these places."""
        for job in placed:
            if self._payload.external:
                continue
            if job.stored is None:
                self._space.free_cluster(job.place)
            else:
                self._space.free(job.place, len(job.stored))
