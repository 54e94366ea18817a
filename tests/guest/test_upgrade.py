"""`tcmu-rs upgrade`: another process goes on with a device, and its initiator is not told."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tcmu_rs import _lio, _sysfs

from .disks import KernelLog
from .test_adoption import image
from .test_attach import leftovers, nothing_left, read, write
from .test_cli import Server, run
from .test_daemon import backstore, wait_for
from .test_supervise import load, server_of

__all__ = ["image", "nothing_left"]


@contextmanager
def events(path: str) -> Iterator[None]:
    """Asserts that no command of the disk fails, not even to be sent again, and that the kernel is content."""
    device = Path("/sys/block", Path(path).name, "device")
    log = KernelLog()
    before = int((device / "ioerr_cnt").read_text(), 16)
    try:
        yield
        assert int((device / "ioerr_cnt").read_text(), 16) == before
        # Said of each mapping by a process that locks its memory: it is looked through up to the first missing page.
        assert [line for line in log.complaints() if "Invalid addr to data page" not in line] == []
    finally:
        log.close()


def cache_type(path: str) -> Path:
    """What the initiator believes of the write cache; a change of it is a MODE SELECT."""
    (found,) = Path("/sys/block", Path(path).name, "device/scsi_disk").glob("*/cache_type")
    return found


def upgraded(what: str) -> int:
    """Upgrades the only device, `disk`; returns the process that serves it now."""
    name, _, pid = run("upgrade", what).rstrip("\n").partition("\t")
    assert name == "disk"
    wait_for(lambda: server_of("disk") == int(pid))
    return int(pid)


@pytest.mark.guest(timeout=600)
@pytest.mark.parametrize("supervise", [False, True], ids=["alone", "supervised"])
def test_the_successor_goes_on_between_two_commands(image: Path, supervise: bool) -> None:
    server = Server(f"file:{image}", "--name", "disk", *["--supervise"] * supervise)
    cache_type(server.device).write_text("write through")
    first = server_of("disk")
    assert first is not None
    with events(server.device):
        fio = load(server.device, 12)
        time.sleep(2)
        second = upgraded("disk")
        third = upgraded("--all")
        assert len({first, second, third}) == 3
        output, _ = fio.communicate(timeout=120)
        assert fio.returncode == 0, output
    # What the initiator has set is as it was.
    (Path("/sys/block", Path(server.device).name) / "device/rescan").write_text("1")
    assert cache_type(server.device).read_text() == "write through\n"
    # Whoever has started the first server is told of none of this.
    assert server.process.poll() is None
    if supervise:
        os.kill(third, signal.SIGKILL)
        wait_for(lambda: server_of("disk") not in (None, third) or None)
        write(server.device, 0, b"after" * 100)
        assert read(server.device, 0, 512)[:500] == b"after" * 100
    assert server.end() == 0
    assert leftovers() == []


BAD = """
import os
from tcmu_rs.handlers.file import FileHandler

class Disk(FileHandler):
    async def open(self):
        if os.path.exists("bad"):
            # Not the next one, which is the old server's.
            os.unlink("bad")
            raise OSError(5, "as told")
        await super().open()
"""


def test_a_successor_that_cannot_open_its_handler_leaves_all_as_it_was(
    image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad.py").write_text(BAD)
    monkeypatch.chdir(tmp_path)
    server = Server(f"x:{image}", "--name", "disk", "--handler", "bad:Disk")
    first = server_of("disk")
    with events(server.device):
        fio = load(server.device, 8)
        time.sleep(1)
        Path("bad").touch()
        said = run("upgrade", "disk", code=1)
        output, _ = fio.communicate(timeout=120)
        assert fio.returncode == 0, output
    assert "as told" in said
    assert server_of("disk") == first
    assert server.end() == 0


def test_a_daemon_hands_over_all_its_devices(image: Path) -> None:
    command = [sys.executable, "-m", "tcmu_rs", "daemon", "file"]
    daemon = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert daemon.stdout is not None
    assert daemon.stdout.readline().startswith("serving")
    second = image.with_name("second.img")
    run("create", f"file:{second}", "--size", "8M")
    with (
        backstore("one", f"file/{image}", size=32 << 20) as store,
        backstore("two", f"file/{second}", hba=701, size=8 << 20),
    ):
        wait_for(lambda: server_of("one") and server_of("two"))
        exposure = _lio.expose_loopback(store)
        address = wait_for(lambda: _lio.loopback_address(exposure.lun))
        path = wait_for(lambda: _sysfs.scsi_disk(address)).path
        with events(path):
            fio = load(path, 6)
            time.sleep(1)
            before = server_of("one")
            run("upgrade", "one")
            assert server_of("one") == server_of("two") not in (None, before)
            output, _ = fio.communicate(timeout=120)
            assert fio.returncode == 0, output
        _lio.withdraw(exposure)
        daemon.terminate()
        assert daemon.communicate(timeout=60)[0] == ""
        assert daemon.returncode == 0


def test_what_cannot_be_handed_over_says_so() -> None:
    server = Server("ram:", "--size", "1M", "--name", "disk")
    assert "what disk stored would go with this process" in run("upgrade", "disk", code=1)
    assert server.end() == 0
    assert "no process serves device disk" in run("upgrade", "disk", code=1)
    assert "name one device" in run("upgrade", code=2)
