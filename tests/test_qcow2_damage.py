"""Damaged and hostile images: a defined error or the right data, in bounded memory, never anything else.

`TCMU_EXAMPLES=20000` makes it long.
"""

from __future__ import annotations

import functools
import os
import resource
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tcmu_rs import IoVec, MediumError, ScsiError
from tcmu_rs.handlers.qcow2 import Qcow2Error, Qcow2Handler
from tcmu_rs.handlers.qcow2.header import parse
from tcmu_rs.handlers.qcow2.log import STATES, Record, encode
from tcmu_rs.handlers.qcow2.offline import check_image
from tcmu_rs.testing.crash import Change, Cut, Image, Medium

from . import qcow2
from .conftest import Log

EXAMPLES = int(os.environ.get("TCMU_EXAMPLES", "100"))
SIZE = 256 << 10
MEMORY = 256 << 20
"""Bytes by which no damage may make the process larger."""

# Sizes and offsets where sums overflow, tables are empty or as long as they can be, and bits change their meaning.
INTERESTING = [0, 1, 2, 7, 8, 9, 16, 21, 22, 63, 64, 104, 511, 512, 65535, 65536, 1 << 20, (1 << 31) - 1, 1 << 31]
INTERESTING += [(1 << 32) - 1, 1 << 32, 1 << 40, 1 << 62, (1 << 62) | 0x7FFF, 1 << 63, (1 << 63) | 65536, (1 << 64) - 1]


async def _fill(medium: Medium, *, close: bool, compress: bool) -> None:
    with qcow2.on_medium(medium, compress=compress, log_size=192 << 10, idle=None) as handler:
        await handler.open()
        source = Random(3)
        for number in range(40):
            offset = source.randrange(SIZE // 4096) * 4096
            data = source.randbytes(2048) + bytes(2048) if number % 3 else source.randbytes(4096)
            await handler.write(offset, IoVec([data]))  # type: ignore[attr-defined]
            if number % 8 == 7:
                await handler.flush()  # type: ignore[attr-defined]
        if close:
            await handler.aclose()
            return
        # As a power cut leaves it; the handler is closed on something else.
        medium.history.append(Change(0, 0, None, medium.size))
        left = medium.after(Cut(len(medium.history), "all"))
        await handler.aclose()
        medium.image = left


@functools.cache
def images() -> dict[str, Image]:
    """Images with something in them: closed, with a snapshot, and with a log."""
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, options, close, compress in (
            ("plain", "cluster_size=4k", True, False),
            ("zstd", "cluster_size=8k,compression_type=zstd", True, True),
            ("subclusters", "cluster_size=16k,extended_l2=on", True, False),
            ("log", "cluster_size=8k,compression_type=zstd", False, True),
        ):
            path = Path(directory, name)
            medium = Medium(qcow2.make(path, SIZE, "-o", options))
            trio.run(functools.partial(_fill, medium, close=close, compress=compress))
            if close:
                medium.image.save(path)
                qcow2.run("qemu-img", "snapshot", "-c", "one", path)
                found[name] = Image.load(path)
            else:
                found[name] = medium.image
    return found


async def use(image: Image, *, writing: bool) -> None:
    """Opens the image, reads all of it and writes here and there."""
    # What is in use is what the map says, and that is damaged: no audit.
    options: dict[str, Any] = {"compress": True, "read_only": not writing, "idle": None}
    with qcow2.on_medium(Medium(image), Qcow2Handler, **options) as handler:
        try:
            await handler.open()
        except (Qcow2Error, OSError, ScsiError):
            return
        calls: list[tuple[Callable[..., object], int, IoVec]] = []
        for offset in range(0, min(handler.size, SIZE), 16384):
            length = min(16384, handler.size - offset)
            calls.append((handler.read, offset, IoVec([bytearray(length)])))  # type: ignore[attr-defined]
            if writing:
                calls.append((handler.write, offset, IoVec([bytes(512)])))  # type: ignore[attr-defined]
        for call, offset, iov in calls:
            try:
                await call(offset, iov)  # type: ignore[misc]
            except (OSError, ScsiError):
                continue
        try:
            await handler.aclose()
        except (OSError, ScsiError):
            return


@st.composite
def damage(draw: st.DrawFn) -> tuple[str, list[tuple[int, bytes]]]:
    """An image by name, and what is written over it where."""
    name = draw(st.sampled_from(sorted(images())))
    image = images()[name]
    used = [sector for sector in range(image.size // 512) if any(image.read(sector * 512, 512))]
    wounds = []
    for _ in range(draw(st.integers(1, 4))):
        sector = draw(st.one_of(st.sampled_from([0, 0, 0, 1]), st.sampled_from(used)))
        width = draw(st.sampled_from([1, 2, 4, 8, 8]))
        at = (
            sector * 512
            + draw(st.integers(0, 63)) * 8
            + draw(st.sampled_from([0, 0, 4, 7]) if width < 8 else st.just(0))
        )
        kind = draw(st.sampled_from(["interesting", "flip", "random"]))
        old = int.from_bytes(image.read(at, width).ljust(width, b"\0"), "big")
        if kind == "interesting":
            new = draw(st.sampled_from(INTERESTING))
        elif kind == "flip":
            new = old ^ 1 << draw(st.integers(0, width * 8 - 1))
        else:
            new = draw(st.integers(0, (1 << 64) - 1))
        wounds.append((at, (new & ((1 << (8 * width)) - 1)).to_bytes(width, "big")))
    return name, wounds


@settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))
@given(damaged=damage(), writing=st.booleans())
def test_damage_is_an_error_or_nothing(log: Log, damaged: tuple[str, list[tuple[int, bytes]]], writing: bool) -> None:
    name, wounds = damaged
    image = images()[name].copy()
    size = image.size
    for at, data in wounds:
        image.write(at, data)
    image.resize(size)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    trio.run(functools.partial(use, image, writing=writing))
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) << 10 < MEMORY
    # What it says about an image that it cannot write any more is no surprise.
    log.records.clear()


def test_a_log_that_is_said_to_be_larger_than_the_file() -> None:
    """What is behind it would have been free, and a table of refcounts for all that would have been made: 24 GB."""
    image = images()["log"].copy()
    at = bytes(image.read(0, 4096)).index(b"tcWL") + 24
    for size in (1 << 40, 1 << 62):
        image.write(at, size.to_bytes(8, "big"))

        async def opens() -> None:
            with qcow2.on_medium(Medium(image)) as handler:
                await handler.open()

        with pytest.raises(Qcow2Error, match=r"is not in the file|cannot be"):
            trio.run(opens)


@pytest.mark.parametrize(("cluster", "what"), [(0, "header"), (1, "refcount table"), (3, "L1 table")])
async def test_what_is_in_use_is_not_free_whatever_the_refcounts_say(cluster: int, what: str, tmp_path: Path) -> None:
    """The next cluster would have been written over it."""
    path = tmp_path / "image"
    image = qcow2.make(path, SIZE, "-o", "cluster_size=4k")
    image.write(2 * 4096 + 2 * cluster, bytes(2))
    image.save(path)
    with pytest.raises(Qcow2Error, match=f"its {what} is free space. `qemu-img check -r all`"):
        async with Qcow2Handler(path):
            pass
    async with Qcow2Handler(path, read_only=True):
        pass
    qcow2.run("qemu-img", "check", "-q", "-r", "all", path)
    async with Qcow2Handler(path) as disk:
        await disk.write(0, IoVec([bytes(512)]))
    qcow2.check(path)


async def test_every_bit_of_a_compressed_cluster_is_covered(tmp_path: Path) -> None:
    medium = Medium(qcow2.make(tmp_path / "image", SIZE, "-o", "cluster_size=8k,compression_type=zstd"))
    data = Random(4).randbytes(SIZE // 2) + b"text " * (SIZE // 10) + bytes(SIZE)
    data = data[:SIZE]
    with qcow2.on_medium(medium, compress=True) as handler:
        async with handler:
            await handler.write(0, IoVec([data]))  # type: ignore[attr-defined]
    tables = _tables(medium.image)
    stored = [
        at
        for at in range(8192, medium.image.size)
        if at // 8192 * 8192 not in tables and medium.image.read(at, 1) != b"\0"
    ]
    assert len(stored) > SIZE // 2
    source = Random(5)
    caught = 0
    for at in source.sample(stored, 100):
        image = medium.image.copy()
        image.write(at, bytes([image.read(at, 1)[0] ^ 1 << source.randrange(8)]))
        with qcow2.on_medium(Medium(image), read_only=True) as handler:
            async with handler:
                for offset in range(0, SIZE, 8192):
                    found = bytearray(8192)
                    try:
                        await handler.read(offset, IoVec([found]))  # type: ignore[attr-defined]
                    except MediumError as error:
                        assert error.information is None or offset <= error.information * 512 < offset + 8192
                        caught += 1
                    else:
                        assert found == data[offset : offset + 8192]
    assert caught > 50


def _tables(image: Image) -> set[int]:
    """Clusters with tables: L1, L2, refcounts."""
    head = image.read(0, 104)
    l1_entries, l1_offset, table, clusters = struct.unpack_from(">IQQI", head, 36)
    found = {l1_offset} | {table + 8192 * n for n in range(clusters)}
    for entry in struct.unpack(f">{l1_entries}Q", image.read(l1_offset, 8 * l1_entries)):
        found.add(entry & 0xFFFFFFFFFFFE00)
    found |= set(struct.unpack(">1024Q", image.read(table, 8192)))
    return found


FAR = (1 << 64) - (64 << 10)
"""Behind everything that a file can have; a system call does not even take it for an offset."""


def _far_refcounts(image: Image) -> None:
    (table,) = struct.unpack(">Q", image.read(48, 8))
    image.write(table + 8, struct.pack(">Q", FAR))


def _far_log(image: Image) -> None:
    log = parse(image.read(0, 8192)).log
    assert log is not None
    image.write(image.read(0, 8192).index(struct.pack(">Q", log.offset)), struct.pack(">Q", FAR))


def _record(record: Record) -> Callable[[Image], None]:
    def put(image: Image) -> None:
        log = parse(image.read(0, 8192)).log
        assert log is not None
        states = [struct.unpack("<4sIQ16sIIQ", image.read(log.offset + at, 48)) for at in (0, 4096)]
        _, half, seq = max((state[2], state[4], state[6]) for state in states if state[0] == b"TCWS")
        first = log.offset + STATES + half * ((log.size - STATES) // 2 // 512 * 512)
        assert image.read(first, 4) == b"TCWL"
        image.write(first, encode(record, seq, log.session, 4096))

    return put


@pytest.mark.parametrize(
    ("name", "wound", "opens"),
    [
        ("plain", _far_refcounts, True),
        ("log", _far_log, False),
        ("log", _record(Record(pages=[(FAR >> 12, 1, bytes(8))])), False),
        ("log", _record(Record(pieces=[(1 << 50, bytes(512))])), False),
        # As if the power had failed before the data was there.
        ("log", _record(Record(extents=[(FAR, 4096, 0)])), True),
        ("log", _record(Record(extents=[(0, (1 << 32) - 1, 0)])), True),
    ],
)
def test_places_that_no_file_has(
    name: str, wound: Callable[[Image], None], opens: bool, tmp_path: Path, log: Log
) -> None:
    image = images()[name].copy()
    wound(image)
    path = tmp_path / "image"
    image.save(path)
    handler = Qcow2Handler(path, compress=True)
    if not opens:
        with pytest.raises(Qcow2Error):
            trio.run(handler.open)
        with pytest.raises(Qcow2Error):
            check_image(path)
        return
    assert name == "log" or any("refcount block 1" in problem for problem in check_image(path))

    async def open_and_close() -> None:
        async with handler:
            await handler.flush()

    trio.run(open_and_close)
    log.records.clear()


@pytest.mark.parametrize("offset", [36, 56, 60, 100])
def test_sizes_that_cannot_be_are_refused_at_once(offset: int) -> None:
    """Number of L1 entries, clusters of the refcount table, number of snapshots, length of the header."""
    image = images()["plain"].copy()
    image.write(offset, b"\xff\xff\xff\xff")

    async def opens() -> None:
        with qcow2.on_medium(Medium(image)) as handler:
            await handler.open()
            await handler.aclose()

    with pytest.raises((Qcow2Error, OSError)) as caught:
        trio.run(opens)
    assert str(caught.value)
