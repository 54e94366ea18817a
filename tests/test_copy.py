"""Copies: whatever is on either side, the target reads as the source; and one that ended early looks like none."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from tcmu_rs import BlockHandler, CopyError, ExtentState, IoVec, Progress, _cli, _copy, copy
from tcmu_rs.handlers.file import FileHandler

from .luks import make_cheap

KIB = 1 << 10
MIB = 1 << 20
# Of the tests: so that disks of some KiB have a beginning, many parts, and holes.
CHUNK, HEAD, GRAIN = 16 * KIB, 32 * KIB, 8 * KIB
# As it is.
SIGN = 4 * KIB


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    shrink(monkeypatch)


def shrink(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("CHUNK", CHUNK), ("HEAD", HEAD), ("_GRAIN", GRAIN), ("_EMPTY_AT_ONCE", 3 * CHUNK)):
        monkeypatch.setattr(_copy, name, value)


class Disk(BlockHandler):
    """Storage with any capabilities, which tells what was done to it and what a power cut would leave."""

    fills_reads = True

    def __init__(self, data: bytes, *, block_size: int = 512, depth: int = 4, fail_at: int | None = None) -> None:
        self.data = bytearray(data)
        self.durable = bytes(data)
        self.size = len(data)
        self.block_size = block_size
        self.max_in_flight = depth
        self.fail_at = fail_at
        self.calls: list[tuple[str, int, int]] = []
        self.running = 0
        self.is_open = False

    async def open(self) -> None:
        self.is_open = True

    async def aclose(self) -> None:
        self.is_open = False

    async def _call(self, name: str, offset: int = 0, length: int = 0) -> None:
        assert self.is_open
        assert offset % self.block_size == length % self.block_size == 0 and offset + length <= self.size
        self.calls.append((name, offset, length))
        if self.fail_at == len(self.calls):
            raise OSError(28, "No space left on device")
        self.running += 1
        assert self.running <= self.max_in_flight
        try:
            await trio.lowlevel.checkpoint()
        finally:
            self.running -= 1

    async def read(self, offset: int, iov: IoVec) -> None:
        await self._call("read", offset, iov.nbytes)
        iov.copy_from(self.data[offset : offset + iov.nbytes])

    async def write(self, offset: int, iov: IoVec) -> None:
        await self._call("write", offset, iov.nbytes)
        self.data[offset : offset + iov.nbytes] = iov.tobytes()

    async def flush(self) -> None:
        await self._call("flush")
        self.durable = bytes(self.data)


class Thin(Disk):
    """What is discarded reads as zeroes."""

    discard_zeroes = True

    async def discard(self, offset: int, length: int) -> None:
        await self._call("discard", offset, length)
        self.data[offset : offset + length] = bytes(length)


class Zeroing(Disk):
    """Zeroes fast; a discard leaves noise."""

    async def write_zeroes(self, offset: int, length: int) -> None:
        await self._call("write_zeroes", offset, length)
        self.data[offset : offset + length] = bytes(length)

    async def discard(self, offset: int, length: int) -> None:
        raise AssertionError("what is discarded here is noise")


class Mapped(Thin):
    """Knows which of its blocks are empty; some that are zero have storage all the same."""

    def extents(self, offset: int, length: int) -> Sequence[tuple[int, ExtentState]]:
        assert offset % self.block_size == length % self.block_size == 0
        found = []
        for at in range(offset, offset + length, self.block_size):
            empty = not any(self.data[at : at + self.block_size]) and at // self.block_size % 7
            state = (ExtentState.MAPPED, ExtentState.DEALLOCATED, ExtentState.ANCHORED)[empty and 1 + at // 4096 % 2]
            found.append((self.block_size, state))
            if len(found) == 40:
                break
        return found


class MappedZeroing(Zeroing):
    """Knows which of its blocks are empty, and cannot be trusted to read as zeroes there."""

    extents = Mapped.extents


SOURCES, TARGETS = (Disk, Mapped, MappedZeroing), (Disk, Thin, Zeroing, Mapped, MappedZeroing)


def content(seed: int, size: int) -> bytes:
    """Data and holes of all sizes."""
    source = random.Random(seed)
    data = bytearray(size)
    at = 0
    while at < size:
        length = min(source.choice([512, 1024, 4096, 20480, 70000]), size - at)
        if source.random() < 0.5:
            data[at : at + length] = source.randbytes(length)
        at += length
    return bytes(data)


@given(
    source=st.sampled_from(SOURCES),
    target=st.sampled_from(TARGETS),
    blocks=st.tuples(st.sampled_from([512, 4096]), st.sampled_from([512, 4096])),
    size=st.integers(1, 60).map(lambda n: n * 4096) | st.integers(1, 400).map(lambda n: n * 512),
    more=st.sampled_from([0, 1, 3, 40]),
    fresh=st.booleans(),
    verify=st.booleans(),
    depths=st.tuples(st.integers(1, 10), st.integers(1, 10)),
    seed=st.integers(0, 1 << 20),
)
@settings(max_examples=300, deadline=None)
def test_the_target_reads_as_the_source(
    source: type[Disk],
    target: type[Disk],
    blocks: tuple[int, int],
    size: int,
    more: int,
    fresh: bool,
    verify: bool,
    depths: tuple[int, int],
    seed: int,
) -> None:
    size = -(-size // blocks[0]) * blocks[0]
    data = content(seed, size)
    room = -(-size // blocks[1]) * blocks[1] + more * blocks[1]
    # A fresh disk that reads as noise is one whose holes are encrypted, or that has another one behind it.
    before = bytes(room) if fresh and target is Thin else random.Random(seed).randbytes(room)
    onto = target(before, block_size=blocks[1], depth=depths[1])
    from_ = source(data, block_size=blocks[0], depth=depths[0])
    told: list[Progress] = []

    async def make(wanted: int) -> BlockHandler:
        assert wanted == size and from_.is_open
        return onto

    with pytest.MonkeyPatch.context() as monkeypatch:
        shrink(monkeypatch)
        done = trio.run(lambda: copy(from_, make if fresh else onto, verify=verify, progress=told.append))
    assert onto.data == onto.durable == data + bytes(room - size)
    assert from_.data == data and {call[0] for call in from_.calls} <= {"read"}
    assert not (from_.is_open or onto.is_open)
    assert told[0] == Progress(0, size * (1 + verify), 0)
    assert told[-1] == done and done.done == done.total
    assert [state.done for state in told] == sorted(state.done for state in told)
    if target is not Disk:
        # Nothing that is a whole grain of zeroes is written as data.
        assert all(any(data[at : at + length]) for name, at, length in onto.calls if name == "write")
    if fresh and target is Thin:
        assert "discard" not in {call[0] for call in onto.calls}


@pytest.mark.parametrize("target", TARGETS)
async def test_wherever_it_ends_early_it_does_not_look_like_the_copy(target: type[Disk], small: None) -> None:
    data = random.Random(1).randbytes(5 * CHUNK)
    whole = target(b"x" * len(data))
    await copy(Mapped(data), whole)
    for fail_at in range(1, len(whole.calls) + 1):
        broken = target(b"x" * len(data), fail_at=fail_at)
        with pytest.RaisesGroup(CopyError, allow_unwrapped=True, flatten_subgroups=True):
            await copy(Mapped(data), broken)
        assert not broken.is_open
        # The power fails: of what was not flushed anything may be there, or not.
        untouched = all(name == "flush" or at + length <= HEAD for name, at, length in broken.calls[:fail_at])
        assert untouched or broken.durable[:HEAD] == bytes(HEAD)
        assert untouched or broken.data[:HEAD] == bytes(HEAD)


@pytest.mark.parametrize("target", TARGETS)
async def test_wherever_the_machine_dies_the_partition_table_is_not_there_before_all_else(
    target: type[Disk], small: None
) -> None:
    """The beginning was written by several tasks at once: its first part was there while others were missing."""

    class Dying(target):  # type: ignore[misc, valid-type]
        async def _call(self, name: str, offset: int = 0, length: int = 0) -> None:
            await super()._call(name, offset, length)
            if self.dies_at is not None and len(self.calls) >= self.dies_at:
                raise OSError(5, "Input/output error")

    data = random.Random(1).randbytes(5 * CHUNK)
    whole = Dying(b"x" * len(data))
    whole.dies_at = None
    await copy(Mapped(data), whole)
    signed = 0
    for dies_at in range(1, len(whole.calls) + 1):
        broken = Dying(b"x" * len(data))
        broken.dies_at = dies_at
        with pytest.RaisesGroup(CopyError, allow_unwrapped=True, flatten_subgroups=True):
            await copy(Mapped(data), broken)
        if broken.data[:SIGN] == data[:SIGN]:
            assert broken.durable[SIGN:] == data[SIGN:]
            signed += 1
        else:
            assert set(broken.data[:SIGN]) <= {*b"\0x"}
    assert signed


async def test_a_copy_that_is_cancelled_at_its_beginning_has_none(small: None) -> None:
    data = random.Random(1).randbytes(10 * CHUNK)
    target = Disk(b"x" * len(data))
    with trio.CancelScope() as scope:

        def stop_near_the_end(state: Progress) -> None:
            if state.done > state.total - HEAD:
                scope.cancel()

        await copy(Disk(data), target, progress=stop_near_the_end)
    assert scope.cancelled_caught
    assert target.data[:HEAD] == target.durable[:HEAD] == bytes(HEAD)
    assert target.data[HEAD:] == data[HEAD:]


async def test_a_cancelled_copy_closes_both_and_has_no_beginning(small: None) -> None:
    data = random.Random(1).randbytes(10 * CHUNK)
    source, target = Disk(data), Disk(b"x" * len(data))
    with trio.CancelScope() as scope:

        def stop_in_the_middle(state: Progress) -> None:
            if state.done > state.total // 3:
                scope.cancel()

        await copy(source, target, progress=stop_in_the_middle)
    assert scope.cancelled_caught
    assert not (source.is_open or target.is_open)
    assert target.data[:HEAD] == bytes(HEAD) and target.data != bytes(len(data))


@pytest.mark.parametrize("at", [0, 3 * CHUNK + 100, 10 * CHUNK - 1])
async def test_a_target_that_lies_is_found_by_verification(at: int, small: None) -> None:
    class Liar(Disk):
        async def read(self, offset: int, iov: IoVec) -> None:
            await self._call("read", offset, iov.nbytes)
            data = bytearray(self.data[offset : offset + iov.nbytes])
            if offset <= at < offset + len(data):
                data[at - offset] ^= 1
            iov.copy_from(data)

    data = random.Random(1).randbytes(10 * CHUNK)
    await copy(Disk(data), Liar(bytes(len(data))))
    liar = Liar(bytes(len(data)))
    with pytest.RaisesGroup(pytest.RaisesExc(CopyError, match=f"reads differently from the source at {at}$")):
        await copy(Disk(data), liar, verify=True)
    assert liar.data[:HEAD] == bytes(HEAD)


async def test_an_error_says_where_and_why(small: None) -> None:
    class Damaged(Disk):
        async def read(self, offset: int, iov: IoVec) -> None:
            if offset <= 5 * CHUNK < offset + iov.nbytes:
                raise OSError(5, "Input/output error")
            await super().read(offset, iov)

    said = f"reading {CHUNK} bytes at {5 * CHUNK} of the source: .*Input/output error"
    with pytest.RaisesGroup(pytest.RaisesExc(CopyError, match=said)):
        await copy(Damaged(bytes(10 * CHUNK)), Disk(bytes(10 * CHUNK)))


async def test_a_source_that_says_nothing_of_its_extents_is_no_endless_loop(small: None) -> None:
    class Silent(Thin):
        def extents(self, offset: int, length: int) -> Sequence[tuple[int, ExtentState]]:
            return []

    with pytest.RaisesGroup(pytest.RaisesExc(CopyError, match="says nothing")):
        await copy(Silent(bytes(10 * CHUNK)), Disk(bytes(10 * CHUNK)))


async def test_what_cannot_be_copied_is_left_alone() -> None:
    source = Disk(bytes(8192))
    small = Disk(b"x" * 4096)
    with pytest.raises(ValueError, match="4096 bytes, the source 8192"):
        await copy(source, small)
    protected = Disk(b"x" * 8192)
    protected.read_only = True
    with pytest.raises(ValueError, match="write protected"):
        await copy(source, protected)
    assert small.calls == protected.calls == []
    assert not (source.is_open or small.is_open or protected.is_open)


async def test_parts_are_on_their_way_side_by_side(small: None) -> None:
    class Counting(Disk):
        most = 0

        async def _call(self, name: str, offset: int = 0, length: int = 0) -> None:
            self.most = max(self.most, self.running + 1)
            await super()._call(name, offset, length)
            self.running += 1
            for _ in range(20):
                await trio.lowlevel.checkpoint()
            self.running -= 1

    source, target = Counting(bytes(40 * CHUNK), depth=3), Counting(bytes(40 * CHUNK), depth=5)
    await copy(source, target)
    assert source.most == 3 and target.most > 1


# On the command line.


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(_cli.main, [str(argument) for argument in arguments])


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    make_cheap(monkeypatch)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(random.Random(3).randbytes(6 * MIB) + bytes(6 * MIB))
    return path


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "key"
    path.write_bytes(b"key")
    return path


def test_encrypt_and_decrypt(tmp_path: Path, image: Path, key_file: Path, cheap: None) -> None:
    encrypted, plain = tmp_path / "encrypted", tmp_path / "plain"
    options = ["-o", f"key-file={key_file}", "-o", "iter-time=1", "--create", "--verify", "--json"]
    result = run("copy", f"file:{image}", f"luks:{encrypted}", *options)
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == {
        "source": f"file:{image}",
        "target": f"luks:{encrypted}",
        "written": 12 * MIB,
        "verified": True,
    }
    assert image.read_bytes()[:4096] not in encrypted.read_bytes()
    result = run("copy", f"luks:{encrypted}", f"file:{plain}", "--create", "-i", f"key-file={key_file}")
    assert (result.exit_code, result.stdout) == (0, f"file:{plain}\t{6 * MIB} bytes written\n")
    assert plain.read_bytes() == image.read_bytes()
    assert plain.stat().st_blocks * 512 <= 6 * MIB + 64 * KIB
    assert plain.stat().st_mode & 0o777 == 0o600


def test_onto_what_is_there(tmp_path: Path, image: Path) -> None:
    old = tmp_path / "old"
    old.write_bytes(b"x" * 14 * MIB)
    assert run("copy", f"file:{image}", f"file:{old}").exit_code == 0
    assert old.read_bytes() == image.read_bytes() + bytes(2 * MIB)
    assert old.stat().st_blocks * 512 <= 6 * MIB + 64 * KIB


def test_a_larger_target(tmp_path: Path, image: Path) -> None:
    larger = tmp_path / "larger"
    assert run("copy", f"file:{image}", f"file:{larger}", "--create", "--size", "16M").exit_code == 0
    assert larger.read_bytes() == image.read_bytes() + bytes(4 * MIB)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["file:{image}", "file:{image}"], "in use.*file:.* is unchanged"),
        (["file:{image}", "file:{key}"], "not a whole number of blocks.*is unchanged"),
        (["file:{image}", "file:{absent}"], "no such file \\(--create makes one\\).*is unchanged"),
        (["file:{absent}", "file:{new}", "--create"], "absent: there is no such file.*new is unchanged"),
        (["file:{image}", "file:{image}", "--create"], "there is such a file already.*is unchanged"),
        (["file:{image}", "file:{new}", "--create", "--size", "1M"], "12582912 bytes, which do not fit"),
        (["file:{image}", "luks:{new}", "--create", "-o", "key-file={absent}"], "absent: No such file.*is unchanged"),
        (["file:{image}", "ram:", "--create"], "no storage to create"),
        (["file:{image}", "file"], "not of the form HANDLER:CONFIG"),
        (["file:{image}"], "Missing argument 'TARGET'"),
    ],
)
def test_what_is_refused_changes_nothing(
    tmp_path: Path, image: Path, key_file: Path, arguments: list[str], said: str
) -> None:
    before = image.read_bytes()
    names = {"image": image, "key": key_file, "absent": tmp_path / "absent", "new": tmp_path / "new"}
    result = run("copy", *(argument.format(**names) for argument in arguments))
    assert result.exit_code != 0 and result.stdout == ""
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
    pytest.RaisesExc(ValueError, match=said).matches(ValueError(result.stderr)) or pytest.fail(result.stderr)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["image", "key"]
    assert image.read_bytes() == before


def test_a_copy_that_fails_takes_away_what_it_made(
    tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(FileHandler, "flush", full)
    new, old = tmp_path / "new", tmp_path / "old"
    result = run("copy", f"file:{image}", f"file:{new}", "--create")
    assert result.exit_code == 1
    assert f"No space left on device (file:{new} is removed again)" in result.stderr
    assert not new.exists()
    old.write_bytes(b"x" * 12 * MIB)
    assert f"(file:{old} is incomplete)" in run("copy", f"file:{image}", f"file:{old}").stderr


class Unremovable(FileHandler):
    """Cannot take away what it has made, and cannot be written."""

    @classmethod
    async def remove(cls, config: str, options: Any) -> bool:
        return False

    async def flush(self) -> None:
        raise OSError(5, "Input/output error")


def test_a_copy_that_cannot_be_taken_away_is_named(tmp_path: Path, image: Path) -> None:
    arguments = "--create", "--target-handler", f"{__name__}:Unremovable"
    result = run("copy", f"file:{image}", f"x:{tmp_path / 'new'}", *arguments)
    assert f"Input/output error (x:{tmp_path / 'new'} is incomplete: delete it)" in result.stderr


class Slow(FileHandler):
    """Is never done."""

    async def read(self, offset: int, iov: IoVec) -> None:
        if offset > 8 * MIB:
            await trio.sleep_forever()
        await super().read(offset, iov)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_copy_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    image, new = tmp_path / "image", tmp_path / "new"
    image.write_bytes(os.urandom(16 * MIB))
    command = [sys.executable, "-m", "tcmu_rs", "copy", f"x:{image}", f"file:{new}", "--create"]
    with subprocess.Popen(
        [*command, "--source-handler", f"{__name__}:Slow"],
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent.parent,
    ) as process:
        while not (new.exists() and new.stat().st_blocks):
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, error = process.communicate()
    assert (process.returncode, error) == (130, f"error: interrupted: file:{new} is removed again\n")
    assert not new.exists()


def test_progress_is_told_line_by_line(tmp_path: Path, image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tcmu_rs import _cli_copy

    monkeypatch.setattr(_cli_copy, "_EVERY", 0)
    result = run("copy", f"file:{image}", f"file:{tmp_path / 'one'}", "--create")
    lines = result.stderr.splitlines()
    assert lines[0] == f"  0%  0 of {12 * MIB} bytes" and lines[-1] == f"100%  {12 * MIB} of {12 * MIB} bytes"
    result = run("copy", f"file:{image}", f"file:{tmp_path / 'two'}", "--create", "--json")
    objects = [json.loads(line) for line in result.stdout.splitlines()]
    assert objects[0] == {"done": 0, "total": 12 * MIB, "written": 0}
    assert objects[-2] == {"done": 12 * MIB, "total": 12 * MIB, "written": 6 * MIB}
