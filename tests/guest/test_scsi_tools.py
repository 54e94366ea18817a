"""What sg3_utils and the kernel read out of a disk."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from .disks import MIB, Disk, attached, run


@pytest.fixture(scope="module", params=["512", "4096"])
def disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disk]:
    path = tmp_path_factory.mktemp("file") / "disk.img"
    with attached(f"file:{path}", "--create", "--size", "256M", "--block-size", request.param) as disk:
        yield disk


def facts(text: str) -> dict[str, str]:
    """The lines `name: value` of a report, and its items `name=value`."""
    lines = re.findall(r"^\s*([^:=\n]+?): +(.+?)\s*$", text, re.MULTILINE)
    return {**dict(lines), **dict(re.findall(r"(\w[\w ]*?)=(\w+)", text))}


def test_it_introduces_itself(disk: Disk) -> None:
    report = run("sg_inq", disk.path)
    found = facts(report)
    assert "Peripheral device type: disk" in report
    assert found["Vendor identification"] == "tcmu-rs"
    assert (found["version"], found["CmdQue"], found["Resp_data_format"]) == ("0x06", "1", "2")


def test_it_is_named_after_its_serial_number(disk: Disk) -> None:
    serial = facts(run("sg_inq", disk.path))["Unit serial number"]
    assert serial in run("sg_inq", "-p", "0x80", disk.path)
    page = run("sg_inq", "-p", "0x83", disk.path)
    (naa,) = re.findall(r"\[0x(6001405\w{25})\]", page)
    assert naa[7:] == serial.replace("-", "")[:25]
    assert serial in page
    assert naa in (disk.sysfs / "device/wwid").read_text()


def test_its_limits(disk: Disk) -> None:
    found = facts(run("sg_inq", "-p", "0xb0", disk.path))
    largest = int(found["Maximum transfer length"].split()[0]) * disk.block_size
    assert largest >= MIB
    # The kernel has taken note: it lets nobody make it send more.
    limit = disk.sysfs / "queue/max_sectors_kb"
    limit.write_text(str(largest >> 10))
    with pytest.raises(OSError, match="Invalid argument"):
        limit.write_text(str((largest >> 10) + 4))
    assert int(found["Maximum unmap LBA count"]) > 0
    assert int(found["Maximum unmap block descriptor count"]) > 0
    assert int((disk.sysfs / "queue/discard_max_bytes").read_text()) > 0


def test_it_is_thin(disk: Disk) -> None:
    assert "00 b2 00 04" in run("sg_inq", "-p", "0xb2", disk.path)
    found = facts(run("sg_vpd", "-p", "lbpv", disk.path))
    assert "1" in found["Unmap command supported (LBPU)"]
    assert "thin" in found["Provisioning type"]
    (kernel,) = disk.sysfs.glob("device/scsi_disk/*")
    assert (kernel / "thin_provisioning").read_text() == "1\n"
    assert (kernel / "provisioning_mode").read_text() == "unmap\n"


def test_its_capacity(disk: Disk) -> None:
    found = facts(run("sg_readcap", "-l", disk.path))
    blocks = disk.size // disk.block_size
    assert found["Number of logical blocks"] == str(blocks)
    assert found["Last LBA"] == str(blocks - 1)
    assert found["Logical block length"] == str(disk.block_size)
    assert (found["lbpme"], found["lbprz"], found["prot_en"]) == ("1", "1", "0")
    assert int((disk.sysfs / "size").read_text()) * 512 == disk.size


def test_its_commands_are_those_that_it_names(disk: Disk) -> None:
    named = dict(re.findall(r"^ ([0-9a-f]{2}) .*\d,\d +(\S.*)$", run("sg_opcodes", disk.path), re.MULTILINE))
    assert named["12"] == "Inquiry"
    assert named["88"] == "Read(16)"
    assert named["42"] == "Unmap"
    for operation in "Read", "Write":
        assert {f"{operation}({length})" for length in (6, 10, 12, 16)} <= set(named.values())
    # Those that it does not name, it refuses: READ LONG(10) for instance, while TEST UNIT READY is fine.
    run("sg_raw", disk.path, *["00"] * 6)
    assert "3e" not in named
    answer = run("sg_raw", disk.path, "3e", *["00"] * 9, code=9)
    assert "Invalid command operation code" in answer


def test_its_mode_pages(disk: Disk) -> None:
    text = run("sg_modes", "-a", disk.path)
    assert "WP=0, DpoFua=1" in text
    assert ">> Read-Write error recovery, page_control: current" in text
    # WCE is the third bit of the third byte.
    (third,) = re.findall(r">> Caching, page_control: current\n 00     08 12 (\w\w)", text)
    assert int(third, 16) & 4
    assert ">> Control, page_control: current" in text
    assert (disk.sysfs / "queue/write_cache").read_text() == "write back\n"
    assert (disk.sysfs / "queue/fua").read_text() == "1\n"
    assert (disk.sysfs / "queue/rotational").read_text() == "0\n"
