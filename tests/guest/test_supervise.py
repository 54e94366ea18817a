"""`--supervise` on a real kernel: the server is killed under load, and nobody is told but the log."""

from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tcmu_rs import _devices, _doctor, _lio, _sysfs

from .test_adoption import image
from .test_attach import leftovers, nothing_left, read, write
from .test_cli import Server, run
from .test_daemon import backstore, wait_for

__all__ = ["image", "nothing_left"]


def server_of(name: str) -> int | None:
    return next((device.pid for device in _devices.devices() if device.name == name), None)


def is_another(name: str, pid: int) -> bool | None:
    return server_of(name) not in (None, pid) or None


def load(device: str, seconds: int) -> subprocess.Popen[str]:
    command = [
        *("fio", "--name=w", f"--filename={device}", "--rw=randwrite", "--bs=4k", "--iodepth=32", "--direct=1"),
        *("--ioengine=libaio", "--size=4M", "--time_based", f"--runtime={seconds}", "--verify=crc32c"),
        "--verify_backlog=64",
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.mark.guest(timeout=600)
def test_a_killed_server_is_replaced_without_an_error(image: Path) -> None:
    server = Server(f"file:{image}", "--supervise", "--json")
    record = json.loads(server.line)
    # Who is to be told, whatever becomes of the server.
    assert record["pid"] == server.process.pid
    assert server_of("disk") not in (None, server.process.pid)
    fio = load(record["device"], 15)
    for _ in range(3):
        time.sleep(2)
        pid = server_of("disk")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        wait_for(functools.partial(is_another, "disk", pid))
    output, _ = fio.communicate(timeout=120)
    assert fio.returncode == 0, output
    # Both sides of the switch.
    write(record["device"], 0, b"after" * 100)
    assert read(record["device"], 0, 512)[:500] == b"after" * 100
    run("detach", "disk")
    assert server.end(None) == 0
    assert leftovers() == []


def test_a_storage_that_is_gone_leaves_the_device_blocked_until_it_is_back(image: Path) -> None:
    # What it was told to create once is not created again, empty, in the place of what initiators know.
    server = Server(f"file:{image}", "--supervise", "--create", "--size", "32M")
    away = image.rename(image.with_suffix(".away"))
    pid = server_of("disk")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    wait_for(lambda: [device.state for device in _devices.devices()] == ["blocked"] or None)
    (found,) = [check for check in _doctor.examine() if check.name == "devices"]
    assert not found.ok and "disk" in found.found and "tcmu-rs detach disk" in found.remedy
    reading = subprocess.Popen(["dd", f"if={server.device}", "of=/dev/null", "bs=4k", "count=1", "iflag=direct"])
    away.rename(image)
    wait_for(lambda: [device.state for device in _devices.devices()] == ["serving"] or None)
    # It was answered "busy", and has waited.
    assert reading.wait(60) == 0
    assert server.end() == 0


def test_what_dies_with_its_process_is_not_supervised() -> None:
    assert "goes with its process" in run("attach", "ram:", "--size", "1M", "--supervise", code=2)


def test_a_supervised_daemon(image: Path) -> None:
    command = [sys.executable, "-m", "tcmu_rs", "daemon", "file", "--supervise"]
    daemon = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert daemon.stdout is not None
    assert daemon.stdout.readline().startswith("serving")
    with backstore("one", f"file/{image}", size=32 << 20) as store:
        wait_for(lambda: server_of("one"))
        exposure = _lio.expose_loopback(store)
        address = wait_for(lambda: _lio.loopback_address(exposure.lun))
        path = wait_for(lambda: _sysfs.scsi_disk(address)).path
        fio = load(path, 8)
        time.sleep(2)
        pid = server_of("one")
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        output, _ = fio.communicate(timeout=120)
        assert fio.returncode == 0, output
        assert server_of("one") not in (None, pid)
        _lio.withdraw(exposure)
        daemon.terminate()
        assert daemon.communicate(timeout=60)[0] == ""
        assert daemon.returncode == 0
