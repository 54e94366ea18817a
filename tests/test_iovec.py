"""IoVec over memory of one's own: what stacked handlers and tests use."""

from __future__ import annotations

import array
import gc
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tcmu_rs import IoVec


def scattered() -> tuple[list[bytearray], IoVec]:
    pieces = [bytearray(b"abc"), bytearray(b""), bytearray(b"defgh"), bytearray(b"i")]
    return pieces, IoVec(pieces)


def test_it_is_a_sequence_of_memoryviews() -> None:
    pieces, iov = scattered()
    assert iov.nbytes == 9
    assert len(iov) == 4
    assert [bytes(view) for view in iov] == [bytes(piece) for piece in pieces]
    assert all(isinstance(view, memoryview) for view in iov)
    assert bytes(iov[0]) == b"abc"
    assert bytes(iov[-1]) == b"i"
    assert bytes(iov[-4]) == b"abc"
    assert [bytes(view) for view in reversed(iov)] == [b"i", b"defgh", b"", b"abc"]
    assert not iov.readonly
    iov[2][1:3] = b"EF"
    assert pieces[2] == b"dEFgh"


@pytest.mark.parametrize("index", [4, -5, 1 << 40, -(1 << 40)])
def test_no_view_beyond_the_ends(index: int) -> None:
    _, iov = scattered()
    with pytest.raises(IndexError, match="IoVec index out of range"):
        iov[index]


def test_it_is_immutable_and_not_indexed_by_slices() -> None:
    _, iov = scattered()
    untyped: Any = iov
    with pytest.raises(TypeError):
        untyped[0:1]
    with pytest.raises(TypeError):
        untyped[0] = b"x"
    with pytest.raises(AttributeError):
        untyped.nbytes = 3
    with pytest.raises(AttributeError):
        untyped.something = 3


def test_copies_are_whole() -> None:
    pieces, iov = scattered()
    iov.copy_from(b"123456789")
    assert b"".join(pieces) == b"123456789"
    target = bytearray(9)
    iov.copy_into(target)
    assert target == iov.tobytes() == bytes(iov) == b"123456789"
    for wrong in (b"", b"12345678", b"1234567890"):
        with pytest.raises(ValueError, match=rf"the source has {len(wrong)} bytes, the IoVec 9: transfers are whole"):
            iov.copy_from(wrong)
        with pytest.raises(ValueError, match=rf"the target has {len(wrong)} bytes, the IoVec 9: transfers are whole"):
            iov.copy_into(bytearray(wrong))
    assert b"".join(pieces) == b"123456789"
    iov.zero()
    assert b"".join(pieces) == bytes(9)


def test_read_only_memory_makes_it_read_only() -> None:
    iov = IoVec([bytearray(b"ab"), b"cd"])
    assert iov.readonly
    assert iov.slice(0, 2).readonly
    with pytest.raises(TypeError, match="this IoVec is read-only"):
        iov.copy_from(b"1234")
    with pytest.raises(TypeError, match="this IoVec is read-only"):
        iov.zero()
    assert iov.tobytes() == b"abcd"
    with pytest.raises(TypeError, match="the target is read-only"):
        iov.copy_into(b"1234")


def test_any_contiguous_memory_will_do() -> None:
    numbers = array.array("I", [1, 2, 3])
    iov = IoVec([numbers, memoryview(bytearray(8)).cast("Q")])
    assert iov.nbytes == 20
    iov.copy_from(array.array("I", range(5)))
    assert list(numbers) == [0, 1, 2]
    with pytest.raises(BufferError, match="contiguous"):
        iov.copy_from(memoryview(bytearray(40))[::2])
    with pytest.raises(BufferError, match="contiguous"):
        iov.copy_into(memoryview(bytearray(40))[::2])
    with pytest.raises((BufferError, TypeError)):
        IoVec([memoryview(bytearray(40))[::2]])
    untyped: Any = IoVec
    for wrong in (["text"], [3], 3, None):
        with pytest.raises(TypeError):
            untyped(wrong)


def test_slices_share_the_memory() -> None:
    pieces, iov = scattered()
    for start in range(10):
        for stop in range(start, 10):
            part = iov.slice(start, stop)
            assert part.nbytes == stop - start
            assert part.tobytes() == b"abcdefghi"[start:stop]
            assert part.slice(0, part.nbytes).tobytes() == part.tobytes()
    iov.slice(2, 5).slice(1, 2).copy_from(b"D")
    assert b"".join(pieces) == b"abcDefghi"
    for start, stop in ((3, 2), (0, 10), (10, 10)):
        with pytest.raises(ValueError, match=rf"{start}\.\.{stop} is not inside an IoVec of 9 bytes"):
            iov.slice(start, stop)
    with pytest.raises(OverflowError):
        iov.slice(-1, 3)


def test_it_says_what_it_is() -> None:
    assert repr(scattered()[1]) == "<tcmu_rs.IoVec of 9 bytes in 4 pieces, writable>"
    assert repr(IoVec([])) == "<tcmu_rs.IoVec of 0 bytes in 0 pieces, writable>"
    assert repr(IoVec([b"x"])) == "<tcmu_rs.IoVec of 1 bytes in 1 pieces, read-only>"


def test_it_goes_straight_into_vectored_system_calls(tmp_path: Path) -> None:
    fd = os.open(tmp_path / "file", os.O_RDWR | os.O_CREAT)
    try:
        assert os.pwritev(fd, IoVec([b"abc", b"def"]), 1) == 6
        pieces, iov = scattered()
        assert os.preadv(fd, iov, 0) == 7
        assert b"".join(pieces) == b"\0abcdefhi"
    finally:
        os.close(fd)


def test_memory_is_held_while_it_is_used_and_no_longer() -> None:
    buffer = bytearray(4)
    iov = IoVec([buffer])
    with pytest.raises(BufferError):
        buffer.append(0)
    view = iov[0]
    del iov
    gc.collect()
    with pytest.raises(BufferError):
        buffer.append(0)
    del view
    buffer.append(0)


def test_copies_between_views_of_the_same_memory() -> None:
    buffer = bytearray(b"abcdef")
    view = memoryview(buffer)
    IoVec([view[1:]]).copy_from(view[:5])
    assert buffer == b"aabcde"


@given(st.lists(st.binary(max_size=5), max_size=6), st.data())
def test_slicing_and_copying_agree_with_bytes(pieces: list[bytes], data: st.DataObject) -> None:
    buffers = [bytearray(piece) for piece in pieces]
    whole = bytearray(b"".join(pieces))
    iov = IoVec(buffers)
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    new = data.draw(st.binary(min_size=stop - start, max_size=stop - start))
    assert iov.slice(start, stop).tobytes() == whole[start:stop]
    iov.slice(start, stop).copy_from(new)
    whole[start:stop] = new
    assert b"".join(buffers) == whole
    assert sum(view.nbytes for view in iov.slice(start, stop)) == stop - start
