"""A server is killed, and another process goes on with its device."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import trio

import tcmu_rs
from tcmu_rs import _devices, _lio
from tcmu_rs.handlers.file import FileHandler
from tcmu_rs.handlers.ram import RamHandler

from .test_attach import leftovers, nothing_left, read
from .test_cli import Server, run

__all__ = ["nothing_left"]

SIZE = 32 << 20


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


def killed(*arguments: str | Path) -> Server:
    server = Server(*arguments)
    server.process.kill()
    server.end(None)
    return server


def state_of(name: str) -> str:
    return next(device.state for device in _devices.devices() if device.name == name)


@pytest.mark.guest(timeout=600)
def test_the_initiator_of_a_killed_server_notices_a_pause_only(image: Path, tmp_path: Path) -> None:
    spec = f"file:{image}"
    first = Server(spec, "--name", "disk")
    fio = subprocess.Popen(
        [
            *("fio", "--name=w", f"--filename={first.device}", "--rw=randwrite", "--bs=4k", "--iodepth=32"),
            *("--direct=1", "--ioengine=libaio", "--size=8M", "--time_based", "--runtime=25", "--verify=crc32c"),
            "--verify_backlog=64",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with pytest.raises(subprocess.TimeoutExpired):
        fio.wait(timeout=4)
    first.process.kill()
    first.end(None)
    assert state_of("disk") == "unserved"
    second = Server(spec, "--name", "disk")
    # The same line, the same disk.
    assert second.line == first.line
    with pytest.raises(subprocess.TimeoutExpired):
        fio.wait(timeout=2)
    second.process.kill()
    second.end(None)
    # The name is found by the SPEC, too.
    third = Server(spec)
    assert third.line == first.line
    output, _ = fio.communicate(timeout=120)
    assert fio.returncode == 0, output
    assert third.end() == 0
    assert leftovers() == []


def test_a_live_owner_is_refused_by_name_and_pid(image: Path) -> None:
    server = Server(f"file:{image}", "--name", "disk")
    said = run("attach", f"file:{image}", "--name", "disk", code=1)
    assert "device disk exists already" in said
    assert f"process {server.process.pid} serves it" in said
    assert server.end() == 0


def test_another_device_is_not_adopted(image: Path, tmp_path: Path) -> None:
    """Each refusal names both, and leaves the device as it is."""
    killed(f"file:{image}", "--name", "disk")
    other = tmp_path / "other.img"
    said = run("attach", f"file:{other}", "--name", "disk", "--create", "--size", "32M", code=1)
    assert f"left by a server of file:{image}, not of file:{other}" in said
    assert not other.exists()
    with image.open("r+b") as file:
        file.truncate(SIZE // 2)
    said = run("attach", f"file:{image}", "--name", "disk", code=1)
    assert f"left by a dead process with {SIZE} bytes, and the storage has {SIZE // 2}" in said
    with image.open("r+b") as file:
        file.truncate(SIZE)
    assert "hw_block_size 512, not 4096" in run(
        "attach", f"file:{image}", "--name", "disk", "--block-size", "4096", code=1
    )
    wwn = "11111111-2222-3333-4444-555555555555"
    assert f"not {wwn}" in run("attach", f"file:{image}", "--name", "disk", "--wwn", wwn, code=1)
    said = run("attach", f"file:{image}", "--name", "disk", "--fabric", "iscsi", code=1)
    assert "offered as loopback naa." in said and "not as iscsi" in said
    assert "left by a dead process with no options, not read-only" in run(
        "attach", f"file:{image}", "--name", "disk", "--read-only", code=1
    )
    assert "with no options, not direct=off" in run(
        "attach", f"file:{image}", "--name", "disk", "-o", "direct=off", code=1
    )
    # Blocked since the first of them that was near enough: its initiators are told that it is busy.
    assert state_of("disk") == "blocked"
    server = Server(f"file:{image}", "--name", "disk")
    assert state_of("disk") == "serving"
    assert server.end() == 0


def test_a_storage_that_was_deleted_is_not_created_anew(image: Path) -> None:
    arguments = (f"file:{image}", "--name", "disk", "--create", "--size", str(SIZE))
    killed(*arguments)
    away = image.rename(image.with_suffix(".away"))
    assert "there is no such file" in run("attach", *arguments, code=1)
    assert not image.exists()
    away.rename(image)
    assert Server(*arguments).end() == 0


def test_a_storage_that_has_gone_with_its_process_is_not_served_as_if_it_were_there() -> None:
    killed("ram:", "--size", "4M", "--name", "disk")
    assert "what ram: stored has gone with its process" in run("attach", "ram:", "--size=4M", "--name=disk", code=1)
    run("detach", "disk")


def test_a_killed_iscsi_server_is_succeeded(image: Path) -> None:
    arguments = (f"file:{image}", "--fabric", "iscsi", "--portal", "127.0.0.1:3270")
    first = killed(*arguments)
    assert "not as iscsi 127.0.0.1:3271" in run("attach", *arguments[:-1], "127.0.0.1:3271", code=1)
    second = Server(*arguments)
    assert second.line == first.line
    assert second.end() == 0


async def test_adoption_through_the_library(image: Path) -> None:
    spec = f"file:{image}"
    killed(spec, "--name", "disk")
    with pytest.raises(_lio.BackstoreExistsError):
        async with tcmu_rs.attach(FileHandler(image), "disk", spec=spec):
            pass
    async with tcmu_rs.attach(FileHandler(image), "disk", spec=spec, adopt=True) as device:
        assert device.path is not None
        assert await trio.to_thread.run_sync(read, device.path, 0, 4096) == bytes(4096)


class Bug(Exception):
    pass


async def test_a_device_is_left_on_an_error_and_adopted(image: Path) -> None:
    spec = f"file:{image}"
    with pytest.RaisesGroup(Bug):
        async with tcmu_rs.attach(FileHandler(image), "disk", spec=spec, leave_on_error=True) as device:
            path = device.path
            raise Bug
    assert state_of("disk") == "blocked"
    async with tcmu_rs.attach(FileHandler(image), "disk", spec=spec, adopt=True, leave_on_error=True) as device:
        assert device.path == path
        os.close(os.open(path or "", os.O_RDONLY))
    # A regular end is none.
    assert leftovers() == []


async def test_without_a_leftover_there_is_nothing_to_adopt() -> None:
    async with tcmu_rs.attach(RamHandler(SIZE), "disk", fabric="none", adopt=True) as device:
        assert device.configfs.is_dir()
