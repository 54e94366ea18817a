"""A file system without space: what was acknowledged before stays, and the disk goes on when there is space again."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path
from random import Random
from typing import Any, ClassVar

import pytest

from tcmu_rs import IoVec
from tcmu_rs.testing.crash import Medium

from . import qcow2
from .conftest import Log

SIZE = 8 << 20
BLOCK = 4096


class Limited(qcow2.RecordedStorage):
    """A file on a file system with so many blocks."""

    capacity = 0
    blocks: ClassVar[set[int]] = set()

    def _take(self, offset: int, length: int) -> None:
        wanted = set(range(offset // BLOCK, -(-(offset + length) // BLOCK))) - self.blocks
        if len(self.blocks) + len(wanted) > Limited.capacity:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.blocks.update(wanted)

    def pwrite(self, offset: int, views: Sequence[Any]) -> None:
        self._take(offset, sum(len(view) for view in views))
        super().pwrite(offset, views)

    def allocate(self, offset: int, length: int) -> bool:
        self._take(offset, length)
        return True

    def punch(self, offset: int, length: int) -> bool:
        self.blocks.difference_update(range(-(-offset // BLOCK), (offset + length) // BLOCK))
        return super().punch(offset, length)

    def truncate(self, size: int) -> None:
        self.blocks.intersection_update(range(-(-size // BLOCK)))
        super().truncate(size)

    @property
    def allocated(self) -> int:
        return len(self.blocks) * BLOCK


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("seed", range(3))
async def test_nothing_acknowledged_is_lost(
    seed: int, compress: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: Log
) -> None:
    monkeypatch.setattr(qcow2, "RecordedStorage", Limited)
    image = qcow2.make(tmp_path / "image", SIZE, "-o", "cluster_size=8k,compression_type=zstd")
    medium, random, model = Medium(image), Random(seed), bytearray(SIZE)
    options: dict[str, Any] = {"compress": compress, "log_size": 1 << 20, "cache_size": 512 << 10, "idle": 0.01}
    Limited.blocks = {*range(-(-medium.size // BLOCK))}
    for least, most in ((300, 1000), (0, 100)):
        # What is there, the log, and less than half of the disk. The second time there are holes without blocks: writes
        # were accepted for them that no flush could write then.
        Limited.capacity = len(Limited.blocks) + (1 << 20) // BLOCK + random.randrange(least, most)
        await use(medium, random, model, options)
    found = bytearray(SIZE)
    Limited.capacity = 1 << 30
    with qcow2.on_medium(Medium(medium.image), **options) as handler:
        async with handler:
            await handler.read(0, IoVec([found]))  # type: ignore[attr-defined]
    assert found == model
    log.records.clear()


async def use(medium: Medium, random: Random, model: bytearray, options: dict[str, Any]) -> None:
    """Writes more than there is space for."""
    refused = 0
    with qcow2.on_medium(medium, **options) as handler:
        await handler.open()
        for number in range(2500):
            if refused == 20:
                # Somebody has made room.
                Limited.capacity += 300
            offset = random.randrange(SIZE // BLOCK) * BLOCK
            data = random.randbytes(BLOCK) if random.random() < 0.8 else bytes(BLOCK)
            length = 0
            kind = random.choice(["write"] * 12 + ["discard", "flush"])
            try:
                if kind == "write":
                    await handler.write(offset, IoVec([data]))  # type: ignore[attr-defined]
                    model[offset : offset + BLOCK] = data
                elif kind == "discard":
                    length = min(random.randrange(1, 64) * BLOCK, SIZE - offset)
                    await handler.discard(offset, length)  # type: ignore[attr-defined]
                    model[offset : offset + length] = bytes(length)
                else:
                    await handler.flush()  # type: ignore[attr-defined]
            except OSError as error:
                assert error.errno == errno.ENOSPC and kind != "flush", (number, kind, error)
                refused += 1
                # What was refused may be done in part: from now on it stays.
                found = bytearray(BLOCK if kind == "write" else length)
                await handler.read(offset, IoVec([found]))  # type: ignore[attr-defined]
                model[offset : offset + len(found)] = found
        assert refused >= 20
        found = bytearray(SIZE)
        await handler.read(0, IoVec([found]))  # type: ignore[attr-defined]
        assert found == model
        await handler.flush()  # type: ignore[attr-defined]
        await handler.aclose()
    qcow2.judge(medium.image)
