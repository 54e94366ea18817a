"""`attach` and `serve` on a real kernel: a disk while the block lasts, and nothing before or after."""

from __future__ import annotations

import functools
import mmap
import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest
import trio

import tcmu_rs
from tcmu_rs import _devices, _lio, _sysfs
from tcmu_rs._attach import AttachedDevice, attach, serve
from tcmu_rs.handlers.ram import RamHandler

SIZE = 4 << 20


class Bug(Exception):
    pass


class Breaking(RamHandler):
    """Breaks the device, under `strict`, when it gets the n-th command."""

    def __init__(self, commands: int) -> None:
        super().__init__(SIZE)
        self.left = commands

    def scsi_command(self, cmd: tcmu_rs.Command) -> object:
        self.left -= 1
        if self.left < 0:
            raise Bug
        return NotImplemented


class Hanging(RamHandler):
    """Never answers a read of the second half."""

    async def read(self, offset: int, iov: tcmu_rs.IoVec) -> None:  # type: ignore[override]
        if offset >= SIZE // 2:
            await trio.sleep_forever()
        super().read(offset, iov)


def leftovers() -> list[str]:
    nodes = [str(backstore.path) for backstore in _lio.backstores()]
    for fabric in ("loopback", "iscsi"):
        if (_lio.TARGET / fabric).is_dir():
            nodes += [str(path) for path in (_lio.TARGET / fabric).iterdir() if path.name.startswith(("naa.", "iqn."))]
    return nodes + [device.path for device in _sysfs.scan()]


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    assert leftovers() == []
    yield
    assert leftovers() == []


def write(path: str, offset: int, data: bytes) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.pwrite(fd, data, offset)
        os.fsync(fd)
    finally:
        os.close(fd)


def read(path: str, offset: int, length: int) -> bytes:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        buffer = mmap.mmap(-1, length)
        assert os.preadv(fd, [buffer], offset) == length
        return bytes(buffer)
    finally:
        os.close(fd)


@pytest.mark.parametrize("block_size", [512, 4096])
async def test_a_disk_while_the_block_lasts(block_size: int) -> None:
    async with attach(RamHandler(SIZE, block_size=block_size), "disk", spec="ram:") as device:
        assert device.path is not None
        assert (device.name, device.size, device.block_size) == ("disk", SIZE, block_size)
        await trio.to_thread.run_sync(write, device.path, 8192, b"hello" * 1000)
        data = await trio.to_thread.run_sync(read, device.path, 8192, 8192)
        assert data == (b"hello" * 1000).ljust(8192, b"\0")
        (listed,) = await trio.to_thread.run_sync(_devices.devices)
        assert listed == _devices.Device(
            name="disk",
            device=device.path,
            handler="ram",
            config="",
            size=SIZE,
            fabrics=("loopback",),
            pid=os.getpid(),
            state="serving",
            configfs=str(device.configfs),
        )
    assert not await trio.Path(device.path).exists()


async def test_the_config_reaches_the_list_whole() -> None:
    spec = "ram:/a b,c:d%e\n\udcff"
    async with attach(RamHandler(SIZE), "disk", spec=spec, fabric="none"):
        (listed,) = await trio.to_thread.run_sync(_devices.devices)
        assert f"{listed.handler}:{listed.config}" == spec


async def test_names_are_made_up_and_taken_names_refused() -> None:
    async with (
        attach(RamHandler(SIZE), fabric="none", spec="file:/a/b.img") as first,
        attach(RamHandler(SIZE), fabric="none", spec="file:/a/b.img") as second,
    ):
        assert (first.name, second.name) == ("b", "b-2")
        assert first.wwn != second.wwn
        with pytest.raises(_lio.BackstoreExistsError, match="tcmu-rs detach b"):
            async with attach(RamHandler(SIZE), "b", fabric="none"):
                pass


async def test_what_is_still_in_memory_is_written_back_first() -> None:
    handler = RamHandler(SIZE)
    stored = b""
    fd = -1
    try:
        async with attach(handler, "disk") as device:
            assert device.path is not None
            fd = await trio.to_thread.run_sync(os.open, device.path, os.O_RDWR)
            await trio.to_thread.run_sync(os.pwrite, fd, b"buffered", 0)
            close = handler.aclose

            async def keep() -> None:
                nonlocal stored
                stored = bytes(handler._data[:8])
                await close()

            handler.aclose = keep  # type: ignore[method-assign]
    finally:
        os.close(fd)
    assert stored == b"buffered"


async def test_an_error_in_the_block_takes_the_disk_away() -> None:
    with pytest.RaisesGroup(KeyError):
        async with attach(RamHandler(SIZE), "disk"):
            raise KeyError


@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.6, 1.0])
async def test_cancelled_at_any_moment(seconds: float) -> None:
    with trio.move_on_after(seconds) as scope:
        async with attach(RamHandler(SIZE), "disk"):
            await trio.sleep_forever()
    assert scope.cancelled_caught


@pytest.mark.parametrize("commands", [0, 1, 2, 4, 8, 12, 16, 20])
async def test_a_server_that_breaks_at_any_moment_leaves_nothing_to_wait_for(commands: int) -> None:
    # Nobody answers the kernel any more: making or removing the LUN would wait for its time-out of 30 seconds.
    with trio.fail_after(20), pytest.RaisesGroup(Bug, flatten_subgroups=True):
        async with attach(Breaking(commands), "disk", strict=True) as device:
            assert device.path is not None
            await trio.to_thread.run_sync(
                subprocess.run, ["dd", f"if={device.path}", "of=/dev/null", "bs=4k", "iflag=direct", "status=none"]
            )
            await trio.sleep_forever()


async def test_a_handler_that_hangs_is_cancelled_after_the_grace_period() -> None:
    command = ["bs=4k", "iflag=direct,skip_bytes", f"skip={SIZE - 4096}", "of=/dev/null", "status=none"]
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery, attach(Hanging(SIZE), "disk", grace=2) as device:
            run = functools.partial(
                trio.run_process, ["dd", f"if={device.path}", *command], check=False, capture_stderr=True
            )
            reading: trio.Process = await nursery.start(run)
            await trio.sleep(0.5)
            assert reading.returncode is None
    assert reading.returncode == 1


async def test_a_disk_that_cannot_be_read_is_not_usable_and_goes() -> None:
    class Mute(Hanging):
        async def read(self, offset: int, iov: tcmu_rs.IoVec) -> None:  # type: ignore[override]
            await trio.sleep_forever()

    with trio.fail_after(30), pytest.RaisesGroup(pytest.RaisesExc(_lio.LioError, match="not usable after 1 s")):
        async with attach(Mute(SIZE), "disk", ready_within=1, grace=1):
            pass


@pytest.mark.parametrize("step", ["withdraw", "block"])
async def test_a_failure_to_take_down_is_raised(step: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = getattr(_lio, step)

    def failing(subject: object) -> None:
        real(subject)
        raise _lio.LioError("as told")

    monkeypatch.setattr(_lio, step, failing)
    with trio.fail_after(20), pytest.RaisesGroup(_lio.LioError, flatten_subgroups=True):
        async with attach(RamHandler(SIZE), "disk"):
            pass


async def test_a_handler_that_does_not_close_is_given_up(caplog: pytest.LogCaptureFixture) -> None:
    class Open(RamHandler):
        async def aclose(self) -> None:
            await trio.sleep_forever()

    with trio.fail_after(20):
        async with attach(Open(SIZE), "disk", fabric="none", grace=0.5):
            pass
    assert "closing took longer than 0.5 s" in caplog.text


async def test_removal_by_another_program_ends_the_block() -> None:
    with pytest.RaisesGroup(tcmu_rs.DeviceRemovedError, flatten_subgroups=True):
        async with attach(RamHandler(SIZE), "disk", fabric="none") as device:
            await trio.to_thread.run_sync(device.configfs.rmdir)
            await trio.sleep_forever()


async def test_serve_makes_a_backstore_and_no_lun() -> None:
    async with trio.open_nursery() as nursery:
        device: AttachedDevice = await nursery.start(serve, RamHandler(SIZE), "ram0")
        assert (device.name, device.path, device.target) == ("ram0", None, None)
        assert device.configfs.is_dir()
        assert await trio.to_thread.run_sync(_lio.luns) == {}
        nursery.cancel_scope.cancel()


async def test_a_lun_of_another_program_keeps_the_backstore() -> None:
    with pytest.RaisesGroup(pytest.RaisesExc(_lio.BackstoreBusyError, match="iscsi/iqn.2026-01.org.example:other")):
        async with trio.open_nursery() as nursery:
            device: AttachedDevice = await nursery.start(serve, RamHandler(SIZE), "ram0")
            backstore = _lio.Backstore(device.name, device.hba, device.wwn)
            other = await trio.to_thread.run_sync(_lio.expose_iscsi, backstore, "iqn.2026-01.org.example:other")
            nursery.cancel_scope.cancel()
    (listed,) = await trio.to_thread.run_sync(_devices.devices)
    assert (listed.state, listed.fabrics) == ("blocked", ("iscsi",))
    _lio.withdraw(other)
    _lio.remove_backstore(backstore)


async def test_iscsi_listens_on_this_machine() -> None:
    async with attach(RamHandler(SIZE), "disk", fabric="iscsi") as device:
        assert device.path is None
        assert device.target is not None
        socket.create_connection(("127.0.0.1", 3260), timeout=10).close()
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.1", 3260), timeout=10)


async def test_fifty_at_once_in_one_process() -> None:
    devices: list[AttachedDevice] = []
    all_up = trio.Event()

    async def one() -> None:
        async with attach(RamHandler(SIZE), spec="ram:") as device:
            devices.append(device)
            if len(devices) == 50:
                all_up.set()
            await all_up.wait()

    with trio.fail_after(240):
        async with trio.open_nursery() as nursery:
            for _ in range(50):
                nursery.start_soon(one)
    for attribute in ("name", "path", "target", "hba", "wwn", "uio"):
        assert len({getattr(device, attribute) for device in devices}) == 50


MANY = """
import trio
from tcmu_rs._attach import attach
from tcmu_rs.handlers.ram import RamHandler

async def one():
    async with attach(RamHandler(1 << 20), spec="ram:") as device:
        print(device.name, device.path, device.target, flush=True)

async def main():
    async with trio.open_nursery() as nursery:
        for _ in range(25):
            nursery.start_soon(one)

trio.run(main)
"""


def test_fifty_at_once_in_two_processes() -> None:
    processes = [
        subprocess.Popen([sys.executable, "-c", MANY], stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)
    ]
    for process in processes:
        output, errors = process.communicate(timeout=240)
        assert (process.returncode, errors) == (0, b"")
        assert len(output.splitlines()) == 25
