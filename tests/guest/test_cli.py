"""The command line on a real kernel."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from click.testing import CliRunner

from tcmu_rs import _cli, _lio

from .test_attach import leftovers, nothing_left

__all__ = ["nothing_left"]

TCMU_RS = str(Path(sys.executable).with_name("tcmu-rs"))


def run(*arguments: str | Path, code: int = 0) -> str:
    """Runs a command to its end, in this process: Python takes seconds to start in the guest."""
    done = CliRunner().invoke(_cli.main, [str(argument) for argument in arguments])
    print(done.output)
    assert done.exit_code == code
    return done.stdout if code == 0 else done.stderr


def list_devices() -> list[dict[str, object]]:
    devices: list[dict[str, object]] = json.loads(run("list", "--json"))
    return devices


class Server:
    """A running `tcmu-rs attach` and the line that it printed."""

    def __init__(self, *arguments: str | Path) -> None:
        self.process = subprocess.Popen([TCMU_RS, "attach", *map(str, arguments)], stdout=subprocess.PIPE, text=True)
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        self.name, _, self.device = self.line.rstrip("\n").partition("\t")

    def end(self, number: int | None = signal.SIGTERM) -> int:
        if number is not None:
            self.process.send_signal(number)
        # Not one word more than the line.
        assert self.process.communicate(timeout=60)[0] == ""
        return self.process.returncode


@contextmanager
def mounted(device: str, directory: Path) -> Iterator[Path]:
    directory.mkdir(exist_ok=True)
    subprocess.run(["mount", device, directory], check=True)
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=True)


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    run("create", f"file:{path}", "--size", "32M")
    return path


def test_the_main_job(image: Path, tmp_path: Path) -> None:
    server = Server(f"file:{image}")
    assert (server.name, server.device[:7]) == ("disk", "/dev/sd")
    subprocess.run(["mkfs.ext4", "-q", server.device], check=True)
    with mounted(server.device, tmp_path / "mount") as directory:
        (directory / "file").write_text("hello")
    assert server.end() == 0
    assert leftovers() == []
    server = Server(f"file:{image}", "--json", "--read-only", "--name", "again")
    record = json.loads(server.line)
    assert record["name"] == "again"
    assert record["pid"] == server.process.pid
    assert record["size"] == 32 << 20
    assert record["handler"] == "file"
    assert Path(record["configfs"]).is_dir()
    subprocess.run(["fsck.ext4", "-fn", record["device"]], check=True)
    assert server.end(signal.SIGINT) == 0


def test_detach_ends_the_process() -> None:
    server = Server("ram:", "--size", "4M", "--name", "x")
    (listed,) = list_devices()
    assert (listed["state"], listed["pid"], listed["device"]) == ("serving", server.process.pid, server.device)
    assert run("detach", "x") == ""
    assert leftovers() == []
    assert server.end(None) == 0
    assert "no device x" in run("detach", "x", code=1)


def test_what_a_killed_process_left_is_seen_and_removed() -> None:
    server = Server("ram:", "--size", "4M")
    # Commands in flight, whose server is about to die.
    reading = subprocess.Popen(["dd", f"if={server.device}", "of=/dev/null", "bs=512", "iflag=direct"], stderr=-3)
    server.process.kill()
    server.end(None)
    (listed,) = list_devices()
    assert (listed["state"], listed["pid"]) == ("unserved", None)
    assert "exists already" in run("attach", "ram:", "--size", "4M", "--name", server.name, code=1)
    started = time.monotonic()
    run("detach", server.name)
    # The kernel alone would take its 30 seconds for each command.
    assert time.monotonic() - started < 20
    reading.wait(30)


def test_a_blocked_leftover_is_removed() -> None:
    server = Server("ram:", "--size", "4M", "--name", "x")
    server.process.kill()
    server.end(None)
    backstore = _lio.find_backstore("x")
    assert backstore is not None
    (backstore.path / "action/block_dev").write_text("1")
    assert [device["state"] for device in list_devices()] == ["blocked"]
    run("detach", "x")


def test_a_half_made_leftover_is_removed() -> None:
    directory = _lio.TARGET / "core/user_7/half"
    directory.parent.mkdir()
    directory.mkdir()
    assert [device["state"] for device in list_devices()] == ["incomplete"]
    run("detach", "half")


def test_a_disk_in_use_is_not_taken_away(image: Path, tmp_path: Path) -> None:
    server = Server(f"file:{image}")
    subprocess.run(["mkfs.ext4", "-q", server.device], check=True)
    with mounted(server.device, tmp_path / "mount") as directory:
        assert "is in use (unmount it" in run("detach", server.name, code=1)
        # Not written out by anybody yet.
        (directory / "file").write_text("hello")
        run("detach", server.name, "--force")
    assert server.end(None) == 0
    server = Server(f"file:{image}")
    with mounted(server.device, tmp_path / "mount") as directory:
        assert (directory / "file").read_text() == "hello"
    assert server.end() == 0


EMBEDDED = """
import sys, trio, tcmu_rs
from tcmu_rs._attach import attach
from tcmu_rs.handlers.ram import RamHandler

async def main():
    async with attach(RamHandler(1 << 20), "a", fabric="none"), attach(RamHandler(1 << 20), "b", fabric="none"):
        print("up", flush=True)
        await trio.to_thread.run_sync(sys.stdin.read)

trio.run(main)
"""


def test_a_program_of_the_users_own_is_not_ended() -> None:
    program = subprocess.Popen([sys.executable, "-c", EMBEDDED], stdin=-1, stdout=-1)
    assert program.stdin is not None
    assert program.stdout is not None
    assert program.stdout.readline() == b"up\n"
    assert "not by `tcmu-rs attach`" in run("detach", "a", code=1)
    assert len(list_devices()) == 2
    program.stdin.close()
    assert program.wait(60) == 0
    program.stdout.close()


HANGING = """
import trio
from tcmu_rs.handlers.ram import RamHandler

class Disk(RamHandler):
    '''Never answers a read of the second half.'''
    async def read(self, offset, iov):
        if offset >= self.size // 2:
            await trio.sleep_forever()
        super().read(offset, iov)
"""


def test_a_second_signal_does_not_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hanging.py").write_text(HANGING)
    monkeypatch.chdir(tmp_path)
    server = Server("x:", "--handler", "hanging:Disk", "--size", "4M")
    reading = subprocess.Popen(
        ["dd", f"if={server.device}", "of=/dev/null", "skip=1000", "bs=4k", "iflag=direct"], stderr=-3
    )
    time.sleep(1)
    started = time.monotonic()
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert server.end() == 0
    assert time.monotonic() - started < 8
    reading.wait(30)


def test_the_doctor_is_content() -> None:
    assert "MISSING" not in run("doctor")


def test_an_iscsi_target_and_a_bare_backstore_are_announced() -> None:
    server = Server("ram:", "--size", "4M", "--fabric", "iscsi")
    assert server.device.startswith("iqn.2003-01.org.linux-iscsi.tcmu-rs:sn.")
    assert server.end() == 0
    server = Server("ram:", "--size", "4M", "--fabric", "none")
    assert server.device == f"/sys/kernel/config/target/core/user_0/{server.name}"
    assert server.end(signal.SIGHUP) == 0


def test_many_commands_at_once() -> None:
    servers = [
        subprocess.Popen([TCMU_RS, "attach", "ram:", "--size", "1M"], stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    lines = {server.stdout.readline() for server in servers if server.stdout}
    assert len(lines) == 4
    for server in servers:
        os.kill(server.pid, signal.SIGTERM)
        assert server.wait(60) == 0
        assert server.stdout is not None
        server.stdout.close()
