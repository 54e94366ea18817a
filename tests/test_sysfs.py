"""Discovery, on made-up trees of /sys, /proc and /dev."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tcmu_rs import _sysfs
from tcmu_rs._sysfs import UioDevice, parse_uio_name

MAP = "0x0000000040800000\n"


def add_uio(root: Path, entry: str, name: str, *, size: str | None = MAP) -> Path:
    directory = root / "class/uio" / entry
    directory.mkdir(parents=True)
    (directory / "name").write_bytes(os.fsencode(name))
    if size is not None:
        (directory / "maps/map0").mkdir(parents=True)
        (directory / "maps/map0/size").write_text(size)
    return directory


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("tcm-user/0/disk/file//var/tmp/a.img", (0, "disk", "file//var/tmp/a.img")),
        ("tcm-user/12/disk/ram/", (12, "disk", "ram/")),
        ("tcm-user/12/disk", (12, "disk", "")),
        ("tcm-user/0/with blank:colon/x/y", (0, "with blank:colon", "x/y")),
        ("tcm-user/0/a/b\nc", (0, "a", "b\nc")),
        ("uio_pci_generic", None),
        ("tcm-user", None),
        ("tcm-user/0", None),
        ("tcm-user/0/", None),
        ("tcm-user/x/disk/cfg", None),
        ("tcm-user/-1/disk/cfg", None),
        ("tcm-user2/0/disk/cfg", None),
        ("", None),
    ],
)
def test_names(text: str, parsed: tuple[int, str, str] | None) -> None:
    assert parse_uio_name(text) == parsed


def test_scan_finds_ours_and_leaves_out_what_is_foreign_or_vanishing(tmp_path: Path) -> None:
    add_uio(tmp_path, "uio10", "tcm-user/1/b/ram/\n")
    add_uio(tmp_path, "uio2", "tcm-user/0/a/file//x y%3A\n")
    add_uio(tmp_path, "uio3", "uio_pci_generic\n")
    # Announced, but the map is not there yet; and one that is gone but for its directory.
    add_uio(tmp_path, "uio4", "tcm-user/0/early/x/\n", size=None)
    (add_uio(tmp_path, "uio5", "tcm-user/0/late/x/\n") / "name").unlink()
    add_uio(tmp_path, "uio6", "tcm-user/0/odd/x/\n", size="what\n")
    add_uio(tmp_path, "uiox", "tcm-user/0/odd/x/\n")
    assert _sysfs.scan(sys_root=tmp_path) == [
        UioDevice(2, "/dev/uio2", 0, "a", "file//x y%3A", 0x40800000),
        UioDevice(10, "/dev/uio10", 1, "b", "ram/", 0x40800000),
    ]


def test_scan_without_uio_finds_nothing(tmp_path: Path) -> None:
    assert _sysfs.scan(sys_root=tmp_path) == []


def test_a_config_keeps_its_own_newline_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    add_uio(tmp_path, "uio0", os.fsdecode(b"tcm-user/0/a/x/\xff\n\n"))
    assert [device.config for device in _sysfs.scan(sys_root=tmp_path)] == [os.fsdecode(b"x/\xff\n")]


def test_find_needs_hba_and_name(tmp_path: Path) -> None:
    add_uio(tmp_path, "uio0", "tcm-user/0/a/x/\n")
    add_uio(tmp_path, "uio1", "tcm-user/1/a/x/\n")
    found = _sysfs.find(1, "a", sys_root=tmp_path)
    assert found is not None
    assert found.minor == 1
    assert _sysfs.find(2, "a", sys_root=tmp_path) is None


def add_process(root: Path, pid: int, *, links: dict[str, str] | None = None, maps: str | None = None) -> None:
    (root / str(pid) / "fd").mkdir(parents=True)
    for number, target in (links or {}).items():
        (root / str(pid) / "fd" / number).symlink_to(target)
    if maps is not None:
        (root / str(pid) / "maps").write_text(maps)


def test_pids_come_from_descriptors_and_from_mappings(tmp_path: Path) -> None:
    add_process(tmp_path, 100, links={"0": "/dev/null", "5": "/dev/uio0", "6": "socket:[1]"}, maps="")
    add_process(tmp_path, 7, maps="7f00-7f10 rw-s 00000000 00:05 123   /dev/uio3\n7f20-7f30 r--p 0 0:0 0\n")
    # A child that inherited the descriptor, a device that is gone, names that only look alike.
    add_process(tmp_path, 101, links={"5": "/dev/uio0"})
    add_process(tmp_path, 102, links={"5": "/dev/uio1 (deleted)", "6": "/dev/uio", "7": "/tmp/uio9x", "8": "uio8"})
    (tmp_path / "103").mkdir()
    (tmp_path / "self").mkdir()
    devices = [UioDevice(minor, f"/dev/uio{minor}", 0, "x", "x", 4096) for minor in range(10)]
    assert _sysfs.serving_pids(devices, proc_root=tmp_path) == {0: 100, 3: 7}
    assert _sysfs.serving_pids(devices[:1], proc_root=tmp_path) == {0: 100}
    assert _sysfs.serving_pids([], proc_root=tmp_path) == {}


def test_pids_of_this_machine_can_be_read() -> None:
    assert _sysfs.serving_pids([UioDevice(9999, "/dev/uio9999", 0, "x", "x", 4096)]) == {}


def test_a_disk_is_found_by_its_address(tmp_path: Path) -> None:
    block = tmp_path / "bus/scsi/devices/2:0:1:0/block/sdq"
    block.mkdir(parents=True)
    assert _sysfs.scsi_disk("2:0:1:0", sys_root=tmp_path) is None
    (block / "dev").write_text("65:0\n")
    (block / "size").write_text("2048\n")
    disk = _sysfs.scsi_disk("2:0:1:0", sys_root=tmp_path)
    assert disk == _sysfs.Disk("/dev/sdq", 1 << 20, os.makedev(65, 0))
    assert _sysfs.scsi_disk("2:0:2:0", sys_root=tmp_path) is None


def test_a_file_in_the_place_of_a_node_is_not_usable(tmp_path: Path) -> None:
    path = tmp_path / "sdq"
    disk = _sysfs.Disk(str(path), 512, os.makedev(65, 0))
    assert "No such file" in str(_sysfs.why_unusable(disk, 512))
    path.write_bytes(bytes(512))
    assert "not the node" in str(_sysfs.why_unusable(disk, 512))
    assert not _sysfs.in_use(disk)


def test_write_back_survives_disks_and_mounts_that_are_gone(tmp_path: Path) -> None:
    (tmp_path / "self").mkdir()
    (tmp_path / "self/mountinfo").write_text("36 35 65:0 / /no\\040where rw - ext4 /dev/sdq rw\n")
    _sysfs.write_back(_sysfs.Disk(str(tmp_path / "sdq"), 512, os.makedev(65, 0)), proc_root=tmp_path)
