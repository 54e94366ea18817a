"""Other ways to store a disk and to get at it: read-only, on a block device, over iSCSI."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from .disks import MIB, attached, mounted, run


def test_a_read_only_disk_refuses_writes(tmp_path: Path) -> None:
    image = tmp_path / "disk.img"
    run("truncate", "-s", str(64 * MIB), image)
    run("mkfs.ext4", "-q", image)
    before = image.read_bytes()
    (tmp_path / "mounted").mkdir()
    with attached(f"file:{image}", "--read-only") as disk:
        assert run("blockdev", "--getro", disk.path) == "1\n"
        assert "WP=1" in run("sg_modes", "-a", disk.path)
        with pytest.raises(OSError, match="Read-only file system"), Path(disk.path).open("r+b"):
            pass
        # Around the block layer, which knows: WRITE(10) of one block.
        (generic,) = disk.sysfs.glob("device/scsi_generic/*")
        node = f"/dev/{generic.name}"
        command = ("sg_raw", "-s", "512", "-i", "/dev/zero", node, "2a", *["00"] * 7, "01", "00")
        assert "Write protected" in run(*command, code=7)
        with mounted(disk.path, tmp_path / "mounted", "-o", "ro") as directory:
            assert (directory / "lost+found").is_dir()
    assert image.read_bytes() == before


@pytest.fixture
def loop_device(tmp_path: Path) -> Iterator[Path]:
    run("modprobe", "loop")
    run("truncate", "-s", str(16 * MIB), tmp_path / "below.img")
    device = Path(run("losetup", "--find", "--show", tmp_path / "below.img").strip())
    yield device
    run("losetup", "--detach", device)


def test_a_disk_stored_on_a_block_device(loop_device: Path) -> None:
    data = os.urandom(MIB)
    with attached(f"file:{loop_device}") as disk:
        assert disk.size == 16 * MIB
        disk.write(MIB, data * 3)
        run("blkdiscard", "-o", str(2 * MIB), "-l", str(MIB), disk.path)
        assert disk.read(0, 5 * MIB) == bytes(MIB) + data + bytes(MIB) + data + bytes(MIB)
    assert loop_device.read_bytes()[MIB : 2 * MIB] == data


def test_an_initiator_finds_the_disk_over_iscsi() -> None:
    portal = "127.0.0.1:3260"
    with attached("ram:", "--size", "64M", "--name", "over-iscsi", "--fabric", "iscsi", "--block-size", "4096") as disk:
        (target,) = re.findall(r"Target:(\S+)", run("iscsi-ls", "-s", f"iscsi://{portal}"))
        assert Path("/sys/kernel/config/target/iscsi", target) in disk.traces
        unit = f"iscsi://{portal}/{target}/0"
        report = run("iscsi-inq", unit)
        assert re.search(r"Vendor:tcmu-rs\b", report)
        assert "Peripheral Device Type:DIRECT_ACCESS" in report
        assert "Total size:67108864\n" in run("iscsi-readcapacity16", unit)
        run("iscsi-test-cu", "--dataloss", "--test", "SCSI.Read10.Simple,SCSI.Write10.Simple", unit)
