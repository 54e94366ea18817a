"""A disk that grows while it is in use, on the real kernel: file system, fio, targetcli's attribute, kills."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tcmu_rs import _lio

from .disks import MIB, KernelLog, checksums, run
from .test_attach import nothing_left
from .test_cli import Server
from .test_cli import run as tcmu_rs
from .test_daemon import backstore, daemon, disk, no_replies, wait_for

__all__ = ["no_replies", "nothing_left"]

SIZE = 64 * MIB
SMALL = 8 * MIB


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    with path.open("wb") as file:
        file.truncate(SIZE)
    return path


def size_of(device: str) -> int:
    with Path(device).open("rb") as disk:
        return disk.seek(0, os.SEEK_END)


def rescan(device: str) -> None:
    Path("/sys/class/block", Path(device).name, "device/rescan").write_text("1")


@pytest.mark.guest(timeout=300)
def test_a_file_system_grows_under_load_and_over_a_kill(image: Path, tmp_path: Path) -> None:
    """fio verifies on the file system while the disk grows, `resize2fs` follows, and the server is killed after it."""
    log = KernelLog()
    spec = f"file:{image}"
    # What the first was told on its command line does not hold for the next ones.
    server = Server(spec, "--name", "disk", "--size", str(SIZE), "--supervise")
    run("mkfs.ext4", "-q", "-F", server.device)
    mount = tmp_path / "mount"
    mount.mkdir()
    run("mount", server.device, mount)
    tree = Path(os.__file__).parent / "email"
    run("cp", "-a", tree, mount)
    fio = subprocess.Popen(
        [
            *("fio", "--name=w", f"--directory={mount}", "--rw=randwrite", "--bs=4k", "--iodepth=16", "--size=8M"),
            *("--direct=1", "--ioengine=libaio", "--verify=crc32c", "--time_based", "--runtime=15"),
            "--verify_backlog=64",
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert tcmu_rs("resize", spec, "--size", "128M") == ""
    assert size_of(server.device) == 2 * SIZE
    run("resize2fs", server.device)
    # Behind what was the end.
    filler = os.urandom(70 * MIB)
    (mount / "filler").write_bytes(filler)
    os.sync()
    assert "less than the 134217728 of now" in tcmu_rs("resize", spec, "--size", "96M", code=1)
    run("pkill", "-9", "-f", "-P", str(server.process.pid), "tcmu-rs attach")
    os.sync()
    assert tcmu_rs("upgrade", "disk").startswith("disk\t")
    Path("/proc/sys/vm/drop_caches").write_text("3")
    assert (mount / "filler").read_bytes() == filler
    output, _ = fio.communicate(timeout=120)
    assert fio.returncode == 0, output
    assert checksums(mount / "email") == checksums(tree)
    run("umount", mount)
    run("fsck.ext4", "-fn", server.device)
    assert size_of(server.device) == 2 * SIZE == _lio.device_size(_lio.find_backstore("disk") or pytest.fail())
    said = log.complaints()
    log.close()
    assert any("Capacity data has changed" in line for line in said)
    # The kill: what initiators had set is gone, and they know.
    assert any("device reset occurred" in line for line in said)
    assert [line for line in said if "I/O error" in line] == []
    assert server.end() == 0


def test_storage_that_grew_behind_a_dead_server_is_adopted_and_less_is_not(image: Path) -> None:
    spec = f"file:{image}"
    first = Server(spec, "--name", "disk")
    first.process.kill()
    first.end(None)
    assert "nobody serves it" in tcmu_rs("resize", spec, "--size", "128M", code=1)
    os.truncate(image, SIZE // 2)
    said = tcmu_rs("attach", spec, "--name", "disk", code=1)
    assert f"left by a dead process with {SIZE} bytes, and the storage has {SIZE // 2}" in said
    os.truncate(image, 2 * SIZE)
    second = Server(spec, "--name", "disk")
    assert _lio.device_size(_lio.find_backstore("disk") or pytest.fail()) == 2 * SIZE
    rescan(second.device)
    assert size_of(second.device) == 2 * SIZE
    assert second.end() == 0


@pytest.mark.parametrize("replies", [False, True], ids=["no replies", "replies"])
def test_whoever_made_the_device_may_let_it_grow(tmp_path: Path, replies: bool) -> None:
    """`targetcli /backstores/user:file/grow set attribute dev_size=…`: a write to the attribute in configfs."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(SMALL)
    with (
        daemon("file", *["--replies"] * replies),
        backstore("grow", f"file/{image}", size=SMALL) as store,
        disk(store) as path,
    ):
        attribute = store.path / "attrib/dev_size"
        attribute.write_text(str(2 * SMALL))
        wait_for(lambda: image.stat().st_size == 2 * SMALL)
        rescan(path)
        assert size_of(path) == 2 * SMALL
        # Less is not for an attribute to say. Without replies the kernel believes it for a moment.
        if replies:
            with pytest.raises(OSError, match="Invalid argument"):
                attribute.write_text(str(SMALL))
        else:
            attribute.write_text(str(SMALL))
        wait_for(lambda: attribute.read_text().strip() == str(2 * SMALL))
        assert image.stat().st_size == 2 * SMALL
        # By its own command it may be any size; what is behind the configuration's path is found by that.
        assert tcmu_rs("resize", f"file:{image}", "--size", str(SMALL), "--shrink") == ""
        assert (size_of(path), image.stat().st_size) == (SMALL, SMALL)
