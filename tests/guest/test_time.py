"""Time on the real kernel: statistics from another process, deadlines before the kernel's, resets of hung units."""

from __future__ import annotations

import fcntl
import subprocess
import sys

import pytest
import trio

import tcmu_rs
from tcmu_rs import IoVec, _top

from . import sg

BLOCK = 512


class Hanging(tcmu_rs.BlockHandler):
    """Hangs with a read of its last block, until that is cancelled."""

    size = 8 << 20
    max_in_flight = 8

    def __init__(self) -> None:
        self.data = bytearray(self.size)
        self.entered = trio.Event()
        self.cancelled = 0

    async def read(self, offset: int, iov: IoVec) -> None:
        if offset == self.size - BLOCK:
            self.entered.set()
            try:
                await trio.sleep_forever()
            except trio.Cancelled:
                self.cancelled += 1
                raise
        iov.copy_from(self.data[offset : offset + iov.nbytes])

    async def write(self, offset: int, iov: IoVec) -> None:
        self.data[offset : offset + iov.nbytes] = iov.tobytes()


LAST = Hanging.size // BLOCK - 1
READ_LAST = bytes([0x28, 0, *LAST.to_bytes(4, "big"), 0, 0, 1, 0])

SG_SCSI_RESET = 0x2284
RESET_DEVICE_ONLY = 0x101


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "tcmu_rs", *arguments], capture_output=True, text=True, check=False)


async def test_a_hung_command_is_seen_from_outside_and_ends_before_the_kernel_gives_it_up(
    caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    handler = Hanging()
    async with tcmu_rs.attach(handler, "slow", cmd_time_out=12) as disk:
        assert disk.path is not None
        path = disk.path
        answers: list[sg.Answer] = []

        def read_last() -> None:
            with sg.opened(path) as unit:
                answers.append(unit.send(READ_LAST, data_in=BLOCK, timeout=100))

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, read_last)
                await handler.entered.wait()
                await trio.sleep(1.5)
                record = await trio.to_thread.run_sync(_top.statistics, "slow")
                (late,) = record["late"]
                assert (late["verb"], late["offset"], late["length"]) == ("read", LAST * BLOCK, BLOCK)
                assert "in read(), which awaits trio's sleep_forever()" in late["where"]
                assert record["verbs"]["read"]["handler"]["count"] > 0
                assert "late: read of 512 bytes" in " ".join(_top.describe(record))
                await _top.top(1.0, rounds=1)
                assert "slow: late: read of 512 bytes" in " ".join(capsys.readouterr().out.split())
    # The kernel would have said 2/08/00 after 12 seconds; a disk driver tries this one again, and SG_IO shows it.
    assert handler.cancelled >= 1
    assert answers[0].triple == (0xB, 0x2E, 0x02) or answers[0].host, str(answers[0])
    assert "is cancelled after 10" in caplog.text


async def test_a_unit_reset_ends_what_hangs_and_comes_back_at_once() -> None:
    handler = Hanging()
    async with tcmu_rs.attach(handler, "reset") as disk:
        assert disk.path is not None
        path = disk.path

        def read_last() -> None:
            with sg.opened(path) as unit:
                unit.send(READ_LAST, data_in=BLOCK, timeout=100)

        def reset() -> None:

            with sg.opened(path) as unit:
                fcntl.ioctl(unit.fd, SG_SCSI_RESET, RESET_DEVICE_ONLY.to_bytes(4, sys.byteorder))

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(trio.to_thread.run_sync, read_last)
                await handler.entered.wait()
                # It comes back when the command that hangs is answered: the kernel's own timer is at 30 s.
                with trio.fail_after(20):
                    await trio.to_thread.run_sync(reset)
        assert handler.cancelled >= 1

        def read_first() -> bytes:
            with sg.opened(path) as unit:
                unit.settle()
                return unit.good(bytes([0x28, 0, 0, 0, 0, 0, 0, 0, 1, 0]), data_in=BLOCK)

        assert await trio.to_thread.run_sync(read_first) == bytes(BLOCK)


def test_what_cannot_be_asked_is_said() -> None:
    missing = command("stats", "no-such-device")
    assert missing.returncode == 1
    assert missing.stderr == "error: no device no-such-device (`tcmu-rs list` shows the devices)\n"
