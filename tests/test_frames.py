"""Units compressed by Rust, with the `zstandard` package as the judge."""

from __future__ import annotations

import threading
import zlib

import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from tcmu_rs import IoVec, ZstdFrames

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
            places, at = [], 0
            for length, _ in made:
                places.append((at, length))
                at += length
            target = bytearray(len(units) * 8192)
            if frames.decompress(stored, places, IoVec([target])) != 32 or target != b"".join(chosen):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
