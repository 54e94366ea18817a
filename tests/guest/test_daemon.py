"""`tcmu-rs daemon`: devices that others make, among devices that are nobody's business."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from tcmu_rs import _lio, _sysfs
from tcmu_rs._native import NetlinkSocket

from .sg import name_by_number

T = TypeVar("T")

SIZE = 8 << 20
CORE = Path("/sys/kernel/config/target/core")
REPLIES = pytest.mark.parametrize("replies", [False, True], ids=["no replies", "replies"])


@contextmanager
def daemon(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "tcmu_rs", "daemon", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("serving")
        yield process
    finally:
        process.terminate()
        output, errors = process.communicate(timeout=60)
        print(output, errors)


@contextmanager
def backstore(name: str, config: str, hba: int = 700, *, reply: int = 0, size: int = SIZE) -> Iterator[_lio.Backstore]:
    """As targetcli does it: the serial number comes after the device was announced."""
    path = CORE / f"user_{hba}" / name
    path.mkdir(parents=True)
    try:
        for setting in (f"dev_config={config}", f"dev_size={size}", "hw_block_size=512", f"nl_reply_supported={reply}"):
            (path / "control").write_text(setting)
        (path / "enable").write_text("1")
        serial = "11111111-2222-3333-4444-" + name.encode().hex().ljust(12, "0")[:12]
        (path / "wwn/vpd_unit_serial").write_text(serial)
        yield _lio.Backstore(name, hba, serial)
    finally:
        path.rmdir()
        path.parent.rmdir()


@contextmanager
def disk(store: _lio.Backstore) -> Iterator[str]:
    exposure = _lio.expose_loopback(store)
    try:
        yield wait_for(lambda: path_of(exposure))
    finally:
        _lio.withdraw(exposure)


def path_of(exposure: _lio.Exposure) -> str | None:
    address = _lio.loopback_address(exposure.lun)
    found = _sysfs.scsi_disk(address) if address else None
    return found.path if found and _sysfs.why_unusable(found, SIZE) is None else None


def wait_for(condition: Callable[[], T | None]) -> T:
    for _ in range(600):
        if result := condition():
            return result
        time.sleep(0.1)
    raise AssertionError("it did not happen within a minute")


@pytest.fixture(autouse=True)
def no_replies() -> Iterator[None]:
    # The switch outlives the daemon that set it, and a device without a daemon would wait for ever.
    yield
    events = NetlinkSocket()
    events.set_features(False)
    events.close()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


def write(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_RDWR)
    try:
        os.pwrite(fd, data, 1 << 20)
        os.fsync(fd)
    finally:
        os.close(fd)


@REPLIES
def test_device_made_by_another_program_is_served(image: Path, replies: bool) -> None:
    with daemon("file", *["--replies"] * replies), backstore("late", f"file/{image}") as store, disk(store) as path:
        write(path, b"daemon" * 1000)
        assert image.read_bytes()[1 << 20 : (1 << 20) + 6000] == b"daemon" * 1000
        inquiry = subprocess.run(["sg_inq", path], check=True, capture_output=True, text=True).stdout
        assert store.wwn in inquiry


def test_device_that_was_there_before_is_served(image: Path) -> None:
    with backstore("early", f"file/{image}") as store, daemon("file"), disk(store) as path:
        write(path, b"early")


def test_a_lun_that_waits_for_its_first_server(image: Path) -> None:
    with backstore("waits", f"file/{image}") as store, ThreadPoolExecutor(1) as pool:
        exposing = pool.submit(_lio.expose_loopback, store)
        with pytest.raises(TimeoutError):
            exposing.result(timeout=1)
        with daemon("file"):
            exposure = exposing.result(timeout=60)
            write(wait_for(lambda: path_of(exposure)), b"first")
            _lio.withdraw(exposure)
    assert image.read_bytes()[1 << 20 : (1 << 20) + 5] == b"first"


def test_foreign_devices_are_left_alone(image: Path) -> None:
    with daemon("file"), backstore("foreign", "rbd/pool/image") as store:
        uio = _sysfs.find(store.hba, store.name)
        assert uio is not None and not _sysfs.serving_pids([uio])


def test_with_replies_a_device_without_storage_is_refused_where_it_is_made(tmp_path: Path) -> None:
    with (
        daemon("file", "--replies"),
        pytest.raises(OSError) as refused,
        backstore("nothing", f"file/{tmp_path}/there is none"),
    ):
        pass
    assert refused.value.errno == errno.ENOENT
    assert not (CORE / "user_700/nothing").exists()


def test_killed_daemon_is_succeeded_and_the_initiator_sees_a_pause_only(image: Path) -> None:
    with backstore("survivor", f"file/{image}") as store, daemon("file") as first:
        exposure = _lio.expose_loopback(store)
        path = wait_for(lambda: path_of(exposure))
        fio = subprocess.Popen(
            [
                *("fio", "--name=w", f"--filename={path}", "--rw=randwrite", "--bs=4k", "--iodepth=16", "--direct=1"),
                *("--ioengine=libaio", "--size=4M", "--time_based", "--runtime=12", "--verify=crc32c"),
                "--verify_backlog=64",
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        with pytest.raises(subprocess.TimeoutExpired):
            fio.wait(timeout=5)
        first.kill()
        first.wait()
        with daemon("file"):
            output, _ = fio.communicate(timeout=120)
            assert fio.returncode == 0, output
            write(path, b"second")
            # The LUN goes while somebody serves it: taking it away waits for its commands.
            _lio.withdraw(exposure)


@pytest.mark.judges
@pytest.mark.parametrize("copies", [False, True], ids=["by default", "--copies"])
def test_copies_between_devices_are_an_option(copies: bool) -> None:
    data = os.urandom(1 << 20)
    options = ["--copies"] if copies else []
    # sg_xcopy sends through /dev/sgN.
    subprocess.run(["modprobe", "sg"], check=True)
    with (
        daemon("ram", *options),
        backstore("one", "ram/") as one,
        backstore("two", "ram/", 701) as two,
        disk(one) as source,
        disk(two) as target,
    ):
        with open(source, "r+b", buffering=0) as file:  # noqa: PTH123
            file.write(data)
            os.fsync(file.fileno())
        for path in source, target:
            name_by_number(str(path))
        command = ["sg_xcopy", f"if={source}", f"of={target}", "bs=512", "count=2048", "seek=4096"]
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(done.stdout)
        assert (done.returncode == 0) is copies
        with open(target, "rb", buffering=0) as file:  # noqa: PTH123
            file.seek(4096 * 512)
            assert file.read(len(data)) == (data if copies else bytes(len(data)))
