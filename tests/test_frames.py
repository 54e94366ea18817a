"""Units compressed by Rust, with the `zstandard` package as the judge."""

from __future__ import annotations

import errno
import itertools
import os
import threading
import zlib
from pathlib import Path

import pytest
import trio
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tcmu_rs import DamagedFrameError, IoVec, ZstdFrames

from .test_files import suspends

UNIT = 512
WORDS = st.lists(
    st.sampled_from([b"\0" * 64, b"disk" * 16, bytes(range(64)), b"\x80\x01" * 32]), min_size=8, max_size=8
)
UNITS = st.one_of(st.binary(min_size=UNIT, max_size=UNIT), WORDS.map(b"".join))


@given(st.lists(UNITS, min_size=1, max_size=5), st.data())
def test_frames_are_those_of_zstandard(units: list[bytes], data: st.DataObject) -> None:
    frames = ZstdFrames(UNIT, data.draw(st.integers(1, 22)))
    stored, made = frames.compress(b"".join(units))
    at = 0
    places = []
    for unit, (length, crc) in zip(units, made, strict=True):
        frame = stored[at : at + length]
        assert (length == 0) == (not any(unit))
        if length:
            assert zstandard.ZstdDecompressor().decompress(frame, max_output_size=UNIT) == unit
            parameters = zstandard.get_frame_parameters(frame)
            assert parameters.has_checksum and parameters.content_size == UNIT
            assert crc == zlib.crc32(frame)
            places.append((at, length + data.draw(st.integers(0, len(stored) - at - length))))
        at += length
    assert at == len(stored)
    kept = b"".join(unit for unit in units if any(unit))
    if not kept:
        return
    within = data.draw(st.integers(0, UNIT - 1))
    stop = data.draw(st.integers(max(len(kept) - UNIT, within) + 1, len(kept)))
    cut = data.draw(st.integers(0, stop - within))
    pieces = [bytearray(cut), bytearray(stop - within - cut)]
    assert frames.decompress(stored, places, IoVec(pieces), within) == len(places)
    assert b"".join(pieces) == kept[within:stop]


@given(UNITS.filter(any), st.booleans())
def test_frames_of_zstandard_are_read(unit: bytes, checksum: bool) -> None:
    """QEMU's have no checksum, and may not say how long they are."""
    compressor = zstandard.ZstdCompressor(write_checksum=checksum, write_content_size=False).compressobj()
    stored = compressor.compress(unit) + compressor.flush()
    target = bytearray(UNIT)
    assert ZstdFrames(UNIT).decompress(stored, [(0, len(stored))], IoVec([target])) == 1
    assert target == unit


def test_damage_is_told_by_the_number_of_the_frame() -> None:
    frames = ZstdFrames(4096)
    units = [bytes([number]) * 100 + bytes(3996) for number in range(1, 4)]
    stored, made = frames.compress(b"".join(units))
    damaged = bytearray(stored)
    damaged[made[0][0] + made[1][0] - 1] ^= 1
    starts = [0, made[0][0], made[0][0] + made[1][0]]
    places = [(start, length) for start, (length, _) in zip(starts, made, strict=True)]
    target = bytearray(3 * 4096)
    assert frames.decompress(damaged, places, IoVec([target])) == 1
    assert target[:4096] == units[0]
    assert frames.decompress(stored, places, IoVec([target])) == 3


def test_what_cannot_be_is_refused() -> None:
    frames = ZstdFrames(4096)
    stored, made = frames.compress(b"x" * 4096)
    for places, length, within in [
        ([(0, len(stored) + 1)], 4096, 0),
        ([(1 << 63, 1 << 63)], 4096, 0),
        ([(0, made[0][0])], 4097, 0),
        ([(0, made[0][0])], 4096, 1),
        ([(0, made[0][0])], 0, 4096),
        ([(0, made[0][0])] * 2, 4096, 0),
        ([], 512, 0),
    ]:
        with pytest.raises((ValueError, OverflowError)):
            frames.decompress(stored, places, IoVec([bytearray(length)]), within)
    with pytest.raises(TypeError):
        frames.decompress(stored, [(0, made[0][0])], IoVec([bytes(4096)]))
    for unit, level in [(511, 1), (32 << 20, 1), (4096, 0), (4096, 23)]:
        with pytest.raises(ValueError):
            ZstdFrames(unit, level)


def test_threads_share_it() -> None:
    frames = ZstdFrames(8192)
    units = [bytes([number]) * 3000 + bytes(5192) for number in range(1, 33)]
    wrong: list[int] = []

    def work(number: int) -> None:
        chosen = units[number:] + units[:number]
        for _ in range(20):
            stored, made = frames.compress(b"".join(chosen))
            target = bytearray(len(units) * 8192)
            if frames.decompress(stored, places_of(made), IoVec([target])) != 32 or target != b"".join(chosen):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# Out of a file.


async def read(frames: ZstdFrames, fd: int, places: list[tuple[int, int]], target: bytearray) -> None:
    await frames.read_from(fd, places, IoVec([target]))


def places_of(made: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Where frames are that lie one behind the other, from their lengths."""
    lengths = [length for length, _ in made]
    return [*zip(itertools.accumulate(lengths, initial=0), lengths, strict=False)]


@given(st.lists(UNITS.filter(any), min_size=1, max_size=8), st.data())
async def test_frames_of_a_file(units: list[bytes], data: st.DataObject) -> None:
    """In any order, with anything between them and at the end of the file, into pieces of any length."""
    frames = ZstdFrames(UNIT)
    file = b""
    places = {}
    for number in data.draw(st.permutations(range(len(units)))):
        stored, ((length, _),) = frames.compress(units[number])
        file += bytes(data.draw(st.sampled_from([0, 1, 700, 9000, 300 << 10])))
        places[number] = (len(file), length + data.draw(st.integers(0, 600)))
        file += stored
    kept = b"".join(units)
    within = data.draw(st.integers(0, UNIT - 1))
    stop = data.draw(st.integers(max(len(kept) - UNIT, within) + 1, len(kept)))
    cut = data.draw(st.integers(0, stop - within))
    pieces = [bytearray(cut), bytearray(stop - within - cut)]
    fd = os.memfd_create("frames")
    try:
        os.write(fd, file)
        await frames.read_from(fd, [places[number] for number in range(len(units))], IoVec(pieces), within)
    finally:
        os.close(fd)
    assert b"".join(pieces) == kept[within:stop]


@pytest.mark.parametrize("count", [3, 40], ids=["at once", "in a thread"])
async def test_damage_in_a_file_is_told_by_the_number_of_the_frame(tmp_path: Path, count: int) -> None:
    frames = ZstdFrames(4096)
    units = [os.urandom(100) + bytes(3996) for _ in range(count)]
    stored, made = frames.compress(b"".join(units))
    places = places_of(made)
    path = tmp_path / "frames"
    path.write_bytes(stored)
    fd = os.open(path, os.O_RDWR)
    try:
        target = bytearray(count * 4096)
        assert suspends(read(frames, fd, places, target)) == (count == 40)
        await frames.read_from(fd, places, IoVec([target]))
        assert target == b"".join(units)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        await frames.read_from(fd, places, IoVec([target]))
        assert target == b"".join(units)
        os.pwrite(fd, b"\xff\xff", places[2][0] + 60)
        with pytest.raises(DamagedFrameError, match="frame 2") as caught:
            await frames.read_from(fd, places, IoVec([target]))
        assert (caught.value.number, caught.value.errno) == (2, errno.EIO)
        os.ftruncate(fd, places[1][0] + 5)
        with pytest.raises(DamagedFrameError) as caught:
            await frames.read_from(fd, places, IoVec([target]))
        assert caught.value.number == 1
    finally:
        os.close(fd)


async def test_a_file_that_cannot_be_read_is_an_error_of_the_system(tmp_path: Path) -> None:
    frames = ZstdFrames(4096)
    directory = os.open(tmp_path, os.O_RDONLY)
    try:
        for count in (1, 40):
            with pytest.raises(IsADirectoryError):
                await frames.read_from(directory, [(0, 100)] * count, IoVec([bytearray(count * 4096)]))
        with pytest.raises(ValueError, match="not what 1 units of 4096 bytes are for"):
            frames.read_from(directory, [(0, 100)], IoVec([bytearray(4097)]))
        with pytest.raises(TypeError, match="read-only"):
            frames.read_from(directory, [(0, 100)], IoVec([bytes(4096)]))
        with pytest.raises(OverflowError):
            frames.read_from(directory, [(-1, 100)], IoVec([bytearray(4096)]))
        for place in ((1 << 64) - 1, 1 << 63, (1 << 63) - 1):
            with pytest.raises(OSError):
                await frames.read_from(directory, [(place, 1 << 60)] * 40, IoVec([bytearray(40 * 4096)]))
    finally:
        os.close(directory)


async def test_many_reads_at_once_each_get_their_own() -> None:
    frames = ZstdFrames(4096)
    units = [bytes([number]) * 4096 for number in range(1, 65)]
    stored, made = frames.compress(b"".join(units))
    places = places_of(made)
    fd = os.memfd_create("frames")
    os.write(fd, stored)

    async def read_some(first: int) -> None:
        for count in (1, 5, 32):
            target = bytearray(count * 4096)
            await frames.read_from(fd, places[first : first + count], IoVec([target]))
            assert target == b"".join(units[first : first + count])

    try:
        async with trio.open_nursery() as nursery:
            for first in range(32):
                nursery.start_soon(read_some, first)
    finally:
        os.close(fd)
