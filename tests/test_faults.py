"""A layer that misbehaves on command does so, and is otherwise what it covers."""

from __future__ import annotations

import errno
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from tcmu_rs import BlockHandler, IoVec, MediumError, Options, ScsiError
from tcmu_rs.handlers.file import FileHandler
from tcmu_rs.handlers.ram import RamHandler
from tcmu_rs.testing import check_block_handler, simulated
from tcmu_rs.testing.faults import Faulty, Rule, Store, parse_rules

from .conftest import Log
from .disks import GOOD, TASK_ABORTED, read16, write16

SIZE = 1 << 20


def faulty(*rules: Rule, seed: int = 0) -> Faulty:
    return Faulty(RamHandler(SIZE), rules, seed=seed)


async def content(handler: BlockHandler, offset: int = 0, length: int = SIZE) -> bytes:
    data = bytearray(length)
    result = handler.read(offset, IoVec([data]))  # type: ignore[attr-defined]
    if result is not None:
        await result
    return bytes(data)


async def test_without_rules_it_is_the_disk_below(tmp_path: Path) -> None:
    await check_block_handler(faulty)
    path = tmp_path / "disk"
    await FileHandler.create(str(path), Options(size=SIZE, create=True))
    await check_block_handler(lambda: Faulty(FileHandler(path)), persistent=True)


async def test_the_nth_write_fails_and_no_other(log: Log) -> None:
    disk = faulty(Rule(on="write", skip=2, times=1, error=errno.ENOSPC))
    async with simulated(disk) as initiator:
        for number in range(5):
            if number == 2:
                with pytest.raises(ScsiError) as caught:
                    await initiator.write(number * 512, b"x" * 512)
                assert (caught.value.key, caught.value.asc, caught.value.ascq) == (0x7, 0x27, 0x07)
            else:
                await initiator.write(number * 512, b"x" * 512)
    log.expect("as told: No space left on device")
    assert [(fault.number, fault.verb, fault.offset) for fault in disk.faults] == [(2, "write", 1024)]


async def test_a_bad_block_is_one_for_every_read_that_touches_it(log: Log) -> None:
    disk = faulty(Rule(on="read", start=4096, stop=4608, error=MediumError("as told", information=8)))
    async with simulated(disk) as initiator:
        await initiator.read(0, 4096)
        await initiator.read(4608, 4096)
        for block, blocks in ((8, 1), (0, 16), (1, 8)):
            reply = await initiator.scsi(read16(block, blocks), data_in=blocks * 512)
            assert reply.sense_code == (0x3, 0x11, 0x00)
            log.expect("as told (sense 3/11/00)")
    # The exception that was given is raised again and again, and does not grow.
    assert isinstance(disk.rules[0].error, MediumError)


async def test_delays_and_hangs_are_trios(autojump_clock: trio.testing.MockClock) -> None:
    disk = Faulty(RamHandler(SIZE), [Rule(on="write", delay=3600), Rule(on="read", hang=True)])
    async with simulated(disk) as initiator:
        start = trio.current_time()
        await initiator.write(0, b"x" * 512)
        assert trio.current_time() - start == 3600
        ticket = initiator.submit(read16(0), data_in=512)
        await trio.sleep(80_000)
        assert not initiator.answered(ticket)
        initiator.abort(ticket)
        assert (await initiator.wait(ticket)).status == TASK_ABORTED


async def test_lies_are_told_as_successes() -> None:
    ram = RamHandler(SIZE)
    disk = Faulty(ram, [Rule(on="write", start=0, stop=512, store=Store.NONE), Rule(on="write", store=Store.TORN)])
    async with simulated(disk) as initiator:
        assert (await initiator.scsi(write16(0), b"a" * 512)).status == GOOD
        assert (await initiator.scsi(write16(64, 64), b"b" * 32768)).status == GOOD
        assert await initiator.read(0, 512) == bytes(512)
        torn = await initiator.read(32768, 32768)
    blocks = {torn[at : at + 512] for at in range(0, 32768, 512)}
    assert blocks == {bytes(512), b"b" * 512}


@pytest.mark.parametrize("verb", ["discard", "write_zeroes"])
async def test_half_a_discard(verb: str) -> None:
    ram = RamHandler(SIZE)
    disk = Faulty(ram, [Rule(on=verb, store=Store.TORN, times=1), Rule(on=verb, store=Store.NONE)], seed=1)
    async with disk:
        await disk.write(0, IoVec([b"x" * 65536]))
        await getattr(disk, verb)(0, 65536)
        once = await content(disk, 0, 65536)
        assert once == once.lstrip(b"\0").rjust(65536, b"\0") and 0 < once.count(b"x") < 65536
        await getattr(disk, verb)(0, 65536)
        assert await content(disk, 0, 65536) == once


async def test_one_bit_of_a_read_is_turned() -> None:
    disk = faulty(Rule(on="read", flip=True, times=1))
    async with simulated(disk) as initiator:
        assert sum(byte.bit_count() for byte in await initiator.read(0, 65536)) == 1
        assert await initiator.read(0, 65536) == bytes(65536)


async def test_after_a_crash_nothing_is_stored_or_answered(autojump_clock: trio.testing.MockClock) -> None:
    ram, crashes = RamHandler(SIZE), []
    disk = Faulty(
        ram, [Rule(on="write", skip=1, store=Store.NONE, crash=True)], on_crash=lambda: crashes.append(1)
    )  # fmt: skip
    async with disk:
        await disk.write(0, IoVec([b"x" * 512]))
        for offset in (512, 1024):
            with trio.move_on_after(1) as scope:
                await disk.write(offset, IoVec([b"y" * 512]))
            assert scope.cancelled_caught
        assert await content(ram) == (b"x" * 512).ljust(SIZE, b"\0")
    assert crashes == [1]


async def test_a_crash_is_one_of_what_is_under_way_too(autojump_clock: trio.testing.MockClock) -> None:
    """A write that waited out its delay during the crash was stored after it, and answered."""

    class Slow(RamHandler):
        async def read(self, offset: int, iov: IoVec) -> None:  # type: ignore[override]
            await trio.sleep(10)
            super().read(offset, iov)

    ram, answered = Slow(SIZE), []
    torn = Rule(on="write", start=4096, store=Store.TORN, delay=3)
    disk = Faulty(ram, [torn, Rule(on="write", delay=5), Rule(on="flush", crash=True)], on_crash=lambda: None)

    async def send(verb: str, *arguments: object) -> None:
        await getattr(disk, verb)(*arguments)
        answered.append(verb)

    async with disk:
        with trio.move_on_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(send, "read", 0, IoVec([bytearray(512)]))
                nursery.start_soon(send, "write", 0, IoVec([b"x" * 512]))
                nursery.start_soon(send, "write", 4096, IoVec([b"x" * 65536]))
                await trio.sleep(1)
                nursery.start_soon(send, "flush")
                await trio.sleep(1)
                nursery.start_soon(send, "extents", 0, 4096)
        assert answered == []
        assert bytes(ram._data) == bytes(SIZE)


def test_a_crash_is_one_of_the_process(tmp_path: Path) -> None:
    program = f"""
import trio, tcmu_rs
from tcmu_rs.handlers.file import FileHandler
from tcmu_rs.testing.faults import Faulty, Rule, Store

async def main():
    async with Faulty(FileHandler({str(tmp_path / "disk")!r}, size=1 << 20, create=True),
                      [Rule(on="write", skip=1, crash=True)]) as disk:
        await disk.write(0, tcmu_rs.IoVec([b"x" * 512]))
        await disk.write(512, tcmu_rs.IoVec([b"y" * 512]))

trio.run(main)
"""
    done = subprocess.run([sys.executable, "-c", program], check=False)
    assert done.returncode == -9
    assert (tmp_path / "disk").read_bytes().rstrip(b"\0") == b"x" * 512 + b"y" * 512


@given(seed=st.integers(0, 1 << 32), verbs=st.lists(st.sampled_from(["read", "write"]), max_size=30))
def test_the_same_operations_meet_the_same_faults(seed: int, verbs: list[str]) -> None:
    rules = [Rule(on="write", probability=0.3, store=Store.TORN), Rule(probability=0.2, flip=True, error=errno.EIO)]

    async def run(rules: Sequence[Rule]) -> tuple[list[int], bytes]:
        ram = RamHandler(SIZE)
        disk = Faulty(ram, rules, seed=seed)
        async with disk:
            for number, verb in enumerate(verbs):
                try:
                    await getattr(disk, verb)(0, IoVec([bytearray([number]) * 4096]))
                except OSError:
                    continue
            return [fault.number for fault in disk.faults], await content(ram)

    first = trio.run(run, rules)
    assert trio.run(run, rules) == first
    # A rule that never fires changes nothing for the others.
    assert trio.run(run, [*rules, Rule(on="flush", error=errno.EIO)]) == first


@pytest.mark.parametrize(
    ("text", "rules"),
    [
        ("", []),
        ("write error=EIO", [Rule(on="write", error=errno.EIO)]),
        (
            "write,flush skip=9 times=1 error=ENOSPC; any probability=0.01 delay=0.5 ;",
            [Rule(on="write,flush", skip=9, times=1, error=errno.ENOSPC), Rule(probability=0.01, delay=0.5)],
        ),
        ("read range=1M-2M hang", [Rule(on="read", start=1 << 20, stop=2 << 20, hang=True)]),
        ("read range=4096- flip", [Rule(on="read", start=4096, flip=True)]),
        ("write range=-64K store=torn crash", [Rule(on="write", stop=65536, store=Store.TORN, crash=True)]),
    ],
)
def test_rules_as_text(text: str, rules: list[Rule]) -> None:
    assert parse_rules(text) == rules


def test_a_sense_code_as_text() -> None:
    (rule,) = parse_rules("write error=b/47/03")
    assert isinstance(rule.error, ScsiError)
    assert (rule.error.key, rule.error.asc, rule.error.ascq) == (0xB, 0x47, 0x03)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("scrub error=EIO", "there is no operation scrub: there are read, write"),
        ("write error=EBOGUS", "an error is the name of an errno"),
        ("write error=1F/00/00", "no such sense key"),
        ("write eror=EIO", "'eror=EIO' in the rule 'write eror=EIO' means nothing; there are skip=…"),
        ("write hang=1", "means nothing"),
        ("write skip", "means nothing"),
        ("write skip=-1", "negative"),
        ("write skip=x", "invalid literal"),
        ("write probability=2", "not between 0 and 1"),
        ("write range=2M-1M", "is empty"),
        ("write range=5", "two numbers"),
        ("write delay=nan", "number of seconds"),
        ("write,flush flip", "of what was read"),
        ("write range=1X-2X", "is not a number of bytes"),
        ("write store=some", "'some' is not a valid Store"),
    ],
)
def test_rules_that_mean_nothing(text: str, why: str) -> None:
    with pytest.raises(ValueError, match=re.escape(why)):
        parse_rules(text)


def test_who_comes_after_a_crash_finds_what_is_below(tmp_path: Path) -> None:
    """A disk that was told to crash could not be served again: what it had stored was said to be gone."""
    options = Options(extra={"rules": "write crash"})
    assert Faulty.from_config(f"file:{tmp_path / 'disk'}", options).persistent
    assert not Faulty.from_config("ram:", Options(size=SIZE)).persistent


@given(st.text(alphabet="any read,write=.;0123/-EIOMskptrobablyhg", max_size=60))
def test_no_text_does_anything_else_than_mean_or_not(text: str) -> None:
    try:
        parse_rules(text)
    except ValueError as error:
        assert str(error)


async def test_from_the_command_line(log: Log) -> None:
    options = Options(size=SIZE, block_size=4096, extra={"rules": "write error=EIO", "seed": "7"})
    disk = Faulty.from_config("ram:", options)
    async with simulated(disk) as initiator:
        assert (initiator.size, initiator.block_size) == (SIZE, 4096)
        with pytest.raises(ScsiError):
            await initiator.write(0, b"x" * 4096)
        log.expect("as told: Input/output error")
    for config, extra, why in (
        ("", {}, "not of the form"),
        ("ram:", {"seed": "x"}, "seed is 'x'"),
        ("ram:", {"rules": "write nope"}, "nope"),
        ("ram:", {"bogus": "1"}, "ram knows no option bogus"),
    ):
        with pytest.raises(ValueError, match=why):
            Faulty.from_config(config, Options(size=SIZE, extra=extra))
