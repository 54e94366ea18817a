"""No answer has a byte of what was in the shared memory before.

Data-In of a command lies where the data of earlier commands lay. If the emulation claims more of it than it has
written, an initiator reads what others wrote. So that memory is filled with a pattern before each command here, by
writes that the disk forgets, and no Data-In may have a piece of it.
"""

from __future__ import annotations

import ctypes
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

import tcmu_rs

from . import sg
from .everything import Everything, served
from .test_sg3 import RESERVATIONS, random_cdb, usages, wait_until_ready

pytestmark = pytest.mark.judges

SIZE = 16 << 20
PIECE = bytes.fromhex("deadbeef")
POISON = PIECE * (256 << 10 >> 2)
TURNED = [PIECE[at:] + PIECE[:at] for at in range(4)]
RING_BYTES = 8 << 20


class Forgetful(Everything):
    """Stores nothing of the pattern, so that no read may return it."""

    def write(self, offset: int, iov: tcmu_rs.IoVec) -> None:
        """Drops the pattern."""
        head = bytearray(len(PIECE))
        iov.slice(0, len(PIECE)).copy_into(head)
        if head != PIECE:
            super().write(offset, iov)


@pytest.fixture(scope="module")
def disk() -> Iterator[sg.Unit]:
    with served(Forgetful(SIZE), name="disk") as device:
        assert device.path is not None
        with sg.opened(device.path) as unit:
            unit.settle()
            yield unit


def poison(unit: sg.Unit) -> None:
    blocks = len(POISON) // 512
    unit.good(sg.cdb(0x8A, 0, (1024, 8), (blocks, 4), 0, 0), data_out=POISON)


def stale(answer: sg.Answer) -> bool:
    return any(piece in answer.memory for piece in TURNED)


def data_area() -> bytes:
    """What the kernel shares with the server, which is this process, where its first blocks of data are."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "/dev/uio" in line:
            return ctypes.string_at(int(line.partition("-")[0], 16) + RING_BYTES, 64 << 10)
    raise AssertionError("this process serves no device")


def test_the_pattern_is_where_answers_go(disk: sg.Unit) -> None:
    poison(disk)
    assert data_area() == POISON[: 64 << 10]
    assert not stale(disk.send(sg.cdb(0x12, 0, 0, (96, 2), 0), data_in=96))
    assert data_area()[:96] != POISON[:96]


def read_commands(unit: sg.Unit, room: int) -> Iterator[bytes]:
    """Commands with Data-In, in every variant that there is, and such that fail."""
    long, short = (room, 4), (min(room, 0xFFFF), 2)
    pages = unit.good(sg.cdb(0x12, 1, 0, (255, 2), 0), data_in=255)[4:]
    logs = unit.good(sg.cdb(0x4D, 0, 0x40, 0, 0, 0, 0, (255, 2), 0), data_in=255)[4:]
    yield sg.cdb(0x12, 0, 0, short, 0)
    yield from (sg.cdb(0x12, 1, page, short, 0) for page in (*pages, 0xFE))
    for control in (0x00, 0x40, 0x80, 0xC0):
        yield from (sg.cdb(0x1A, 8, control | page, 0xFF, min(room, 255), 0) for page in (0x3F, 0x08, 0x11))
        yield from (sg.cdb(0x5A, flags, control | 0x3F, 0xFF, 0, 0, 0, short, 0) for flags in (0, 8, 0x10))
    yield from (sg.cdb(0x4D, 0, 0x40 | page, 0, 0, 0, 0, short, 0) for page in (*logs, 0x3E))
    yield from (sg.cdb(0x03, descriptors, 0, 0, min(room, 255), 0) for descriptors in (0, 1))
    yield sg.cdb(0x25, *bytes(9))
    yield sg.cdb(0x9E, 0x10, (0, 8), long, 0, 0)
    yield from (sg.cdb(0x9E, 0x12, (lba, 8), long, 0, 0) for lba in (0, 1024, SIZE))
    yield sg.cdb(0xA0, 0, 0, 0, 0, 0, long, 0, 0)
    yield from (sg.cdb(0xA3, 0x0C, option, 0x28, 0, 0, long, 0, 0) for option in (0, 0x80, 1, 0x81, 2, 3, 7))
    yield from (sg.cdb(0xA3, 0x0D, extended, 0, 0, 0, long, 0, 0) for extended in (0, 0x80))
    yield from (sg.cdb(0x37, 0, defects, 0, 0, 0, 0, short, 0) for defects in (0, 0x18))
    yield sg.cdb(0xB7, 0x18, (0, 4), long, 0, 0)
    yield from (sg.cdb(0x84, action, (0, 8), long, 0, 0) for action in (0, 3, 4))
    yield from (sg.cdb(0x5E, action, 0, 0, 0, 0, 0, short, 0) for action in (0, 1, 2, 3))
    for lba, blocks in ((0, 0), (0, 1), (0, 7), (2048, 1), (SIZE // 512 - 1, 1), (SIZE // 512, 1)):
        yield sg.cdb(0x28, 0, (lba, 4), 0, (blocks, 2), 0)
        yield sg.cdb(0xA8, 0, (lba, 4), (blocks, 4), 0, 0)
        yield sg.cdb(0x88, 0, (lba, 8), (blocks, 4), 0, 0)
        yield sg.cdb(0x7F, *bytes(6), 0x18, 0, 9, 0, 0, (lba, 8), (0, 8), (blocks, 4))
    yield sg.cdb(0x08, 0, 0, 0, 1, 0)


def other_commands() -> Iterator[bytes]:
    """Commands that have no Data-In, and get a buffer for it all the same."""
    yield bytes(6)
    yield sg.cdb(0x35, *bytes(9))
    yield sg.cdb(0x1B, 0, 0, 0, 1, 0)
    yield sg.cdb(0xC0, *bytes(9))
    yield sg.cdb(0x2F, 0, (0, 4), 0, (1, 2), 0)
    for first in (0x2A, 0x2E, 0x41):
        yield sg.cdb(first, 0, (0, 4), 0, (1, 2), 0)
    for first in (0x8A, 0x8B, 0x8E, 0x93):
        yield sg.cdb(first, 0, (0, 8), (1, 4), 0, 0)
    yield sg.cdb(0x89, 0, (0, 8), (1, 4), 0, 0)
    yield sg.cdb(0x42, 0, (0, 4), 0, (24, 2), 0)
    yield sg.cdb(0x15, 0x10, 0, 0, 24, 0)
    yield sg.cdb(0x55, 0x10, (0, 5), (24, 2), 0)
    yield sg.cdb(0x4C, 0, (0, 5), (8, 2), 0)
    yield sg.cdb(0x83, 0, (0, 8), (76, 4), 0, 0)


@pytest.mark.parametrize("room", [8, 100, 4096, 65536])
def test_larger_buffers_than_answers(disk: sg.Unit, room: int) -> None:
    found = []
    for cdb in [*read_commands(disk, room), *other_commands()]:
        poison(disk)
        answer = disk.send(cdb, data_in=room)
        if stale(answer):
            found.append(f"{cdb.hex(' ')}: {answer}")
        disk.settle()
    assert found == []


def test_random_commands(disk: sg.Unit) -> None:
    chance = random.Random(2)
    rows = [usage for usage in usages(disk) if usage[0] not in RESERVATIONS]
    found = []
    for _ in range(200):
        wait_until_ready(disk, 120)
        # It may have been made read-only.
        disk.send(sg.cdb(0x15, 0x10, 0, 0, 16, 0), data_out=bytes(4) + sg.CONTROL_PAGE)
        disk.settle()
        poison(disk)
        cdb = random_cdb(chance, rows)
        if cdb[0] in RESERVATIONS:
            continue
        answer = disk.send(cdb, data_in=chance.choice([16, 512, 65536]))
        if stale(answer):
            found.append(f"{cdb.hex(' ')}: {answer}")
    wait_until_ready(disk, 120)
    assert found == []
