"""The same commands to an emulated disk and to the kernel's own `scsi_debug`.

What differs in status, sense data, length or, where it is fixed, content of the data has to be in a table here with the
reason; and what is in the table has to differ.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from . import sg
from .everything import Everything, served

pytestmark = pytest.mark.judges

MIB = 1 << 20
SIZE = 16 * MIB
BLOCKS = SIZE // 512


class Thin(Everything):
    """What scsi_debug is, too: it cannot be ejected and promises no atomic writes."""

    removable = False
    max_atomic_write = 0


@dataclass(frozen=True)
class Case:
    """A command, and how much of the answer has to agree: its data, the length of that, or neither of both."""

    name: str
    cdb: bytes
    data_in: int = 0
    data_out: bytes = b""
    compare: str = "data"


def pattern(seed: int, blocks: int) -> bytes:
    return bytes((seed + at // 512 + at) & 0xFF for at in range(blocks * 512))


def rw(opcode: int, lba: int, blocks: int, flags: int = 0) -> bytes:
    """READ, WRITE, VERIFY … of 10, 12 or 16 bytes."""
    group = opcode >> 5
    if group in (1, 2):
        return sg.cdb(opcode, flags, (lba, 4), 0, (blocks, 2), 0)
    if group == 5:
        return sg.cdb(opcode, flags, (lba, 4), (blocks, 4), 0, 0)
    return sg.cdb(opcode, flags, (lba, 8), (blocks, 4), 0, 0)


def unmap(*ranges: tuple[int, int]) -> bytes:
    body = b"".join(sg.cdb((lba, 8), (blocks, 4), (0, 4)) for lba, blocks in ranges)
    return sg.cdb((len(body) + 6, 2), (len(body), 2), (0, 4)) + body


def cases() -> Iterator[Case]:
    """In an order that matters: later ones see what earlier ones have written."""
    one = 512
    yield Case("TEST UNIT READY", bytes(6))
    yield Case("INQUIRY", sg.cdb(0x12, 0, 0, (36, 2), 0), 36, compare="length")
    yield Case("INQUIRY, 5 bytes", sg.cdb(0x12, 0, 0, (5, 2), 0), 96, compare="length")
    yield Case("INQUIRY, page code without EVPD", sg.cdb(0x12, 0, 0x80, (96, 2), 0), 96)
    yield Case("INQUIRY, CMDDT", sg.cdb(0x12, 2, 0, (96, 2), 0), 96)
    for page in (0x00, 0x80, 0x83, 0x86, 0xB0, 0xB1, 0xB2, 0xB7):
        yield Case(f"VPD {page:02X}h", sg.cdb(0x12, 1, page, (512, 2), 0), one, compare="length")
    yield Case("VPD FEh", sg.cdb(0x12, 1, 0xFE, (512, 2), 0), one)
    yield Case("READ CAPACITY(10)", sg.cdb(0x25, *bytes(9)), 8)
    yield Case("READ CAPACITY(16)", sg.cdb(0x9E, 0x10, (0, 8), (32, 4), 0, 0), 32)
    yield Case("READ CAPACITY(16), 12 bytes", sg.cdb(0x9E, 0x10, (0, 8), (12, 4), 0, 0), 32)
    yield Case("SERVICE ACTION IN, unknown", sg.cdb(0x9E, 0x1F, (0, 8), (32, 4), 0, 0), 32)
    yield Case("REPORT LUNS", sg.cdb(0xA0, 0, 0, 0, 0, 0, (16, 4), 0, 0), 16)
    yield Case("REQUEST SENSE", sg.cdb(0x03, 0, 0, 0, 18, 0), 18)
    yield Case("REQUEST SENSE, descriptor", sg.cdb(0x03, 1, 0, 0, 18, 0), 18)
    for page in (0x01, 0x08, 0x0A, 0x1C, 0x3F):
        yield Case(f"MODE SENSE(6), page {page:02X}h", sg.cdb(0x1A, 8, page, 0, 255, 0), 255, compare="length")
        yield Case(
            f"MODE SENSE(10), page {page:02X}h", sg.cdb(0x5A, 8, page, 0, 0, 0, 0, (255, 2), 0), 255, compare="length"
        )
    yield Case("MODE SENSE(6), block descriptor", sg.cdb(0x1A, 0, 0x08, 0, 255, 0), 255, compare="length")
    yield Case(
        "MODE SENSE(10), long descriptor", sg.cdb(0x5A, 0x10, 0x08, 0, 0, 0, 0, (255, 2), 0), 255, compare="length"
    )
    yield Case("MODE SENSE(6), saved", sg.cdb(0x1A, 8, 0xC8, 0, 255, 0), 255)
    yield Case("MODE SENSE(6), unknown page", sg.cdb(0x1A, 8, 0x2A, 0, 255, 0), 255)
    yield Case("MODE SENSE(6), unknown subpage", sg.cdb(0x1A, 8, 0x08, 0x77, 255, 0), 255)
    yield Case("MODE SELECT(6), saving", sg.cdb(0x15, 0x11, 0, 0, 16, 0), data_out=bytes(4) + sg.CONTROL_PAGE)
    yield Case("MODE SELECT(6), unknown page", sg.cdb(0x15, 0x10, 0, 0, 8, 0), data_out=bytes(4) + b"\x2a\2\0\0")
    yield Case(
        "MODE SELECT(10), truncated", sg.cdb(0x55, 0x10, (0, 5), (12, 2), 0), data_out=bytes(8) + b"\x08\x12\0\0"
    )
    yield Case("LOG SENSE, supported pages", sg.cdb(0x4D, 0, 0x40, 0, 0, 0, 0, (255, 2), 0), 255, compare="length")
    yield Case("LOG SENSE, temperature", sg.cdb(0x4D, 0, 0x4D, 0, 0, 0, 0, (255, 2), 0), 255, compare="length")
    yield Case("LOG SENSE, unknown page", sg.cdb(0x4D, 0, 0x7E, 0, 0, 0, 0, (255, 2), 0), 255)
    yield Case("RSOC, READ(10)", sg.cdb(0xA3, 0x0C, 1, 0x28, 0, 0, (64, 4), 0, 0), 64)
    yield Case(
        "RSOC, READ(16) with timeouts", sg.cdb(0xA3, 0x0C, 0x81, 0x88, 0, 0, (64, 4), 0, 0), 64, compare="length"
    )
    yield Case("RSOC, READ CAPACITY(16)", sg.cdb(0xA3, 0x0C, 2, 0x9E, 0, 0x10, (64, 4), 0, 0), 64)
    yield Case("RSOC, option 1 with service actions", sg.cdb(0xA3, 0x0C, 1, 0x9E, 0, 0, (64, 4), 0, 0), 64)
    yield Case("RSOC, option 2 without service actions", sg.cdb(0xA3, 0x0C, 2, 0x28, 0, 0, (64, 4), 0, 0), 64)
    yield Case("RSOC, unknown operation code", sg.cdb(0xA3, 0x0C, 1, 0xC1, 0, 0, (64, 4), 0, 0), 64)
    yield Case("RSOC, reserved option", sg.cdb(0xA3, 0x0C, 7, 0, 0, 0, (64, 4), 0, 0), 64)
    yield Case("RSTMF", sg.cdb(0xA3, 0x0D, 0, 0, 0, 0, (16, 4), 0, 0), 16, compare="length")
    yield Case("RSTMF, extended", sg.cdb(0xA3, 0x0D, 0x80, 0, 0, 0, (16, 4), 0, 0), 16, compare="length")
    for write, read in ((0x2A, 0x28), (0xAA, 0xA8), (0x8A, 0x88)):
        yield Case(f"WRITE {write:02X}h", rw(write, write, 4), data_out=pattern(write, 4))
        yield Case(f"READ {read:02X}h", rw(read, write, 4), 4 * one)
        yield Case(f"READ {read:02X}h, no blocks", rw(read, 0, 0))
        yield Case(f"READ {read:02X}h, larger buffer", rw(read, write, 1), 4 * one)
        yield Case(f"READ {read:02X}h, beyond the end", rw(read, BLOCKS, 1), one)
        yield Case(f"READ {read:02X}h, across the end", rw(read, BLOCKS - 1, 2), 2 * one)
        yield Case(f"READ {read:02X}h, no blocks at the end", rw(read, BLOCKS, 0))
        yield Case(f"READ {read:02X}h, no blocks behind the end", rw(read, BLOCKS + 1, 0))
        yield Case(f"READ {read:02X}h, RDPROTECT", rw(read, 0, 1, 0x20), one)
        yield Case(f"READ {read:02X}h, FUA and DPO", rw(read, write, 1, 0x18), one)
        yield Case(f"WRITE {write:02X}h, beyond the end", rw(write, BLOCKS, 1), data_out=bytes(one))
        yield Case(f"WRITE {write:02X}h, WRPROTECT", rw(write, 0, 1, 0x20), data_out=bytes(one))
    yield Case("READ(6)", sg.cdb(0x08, 0, (0x2A, 2), 2, 0), 2 * one)
    yield Case("WRITE(6)", sg.cdb(0x0A, 0, (0x30, 2), 1, 0), data_out=pattern(6, 1))
    yield Case("READ(16), 64-bit overflow", rw(0x88, (1 << 64) - 1, 2), 2 * one)
    for verify in (0x2F, 0x8F):
        yield Case(f"VERIFY {verify:02X}h", rw(verify, 0, 8))
        yield Case(f"VERIFY {verify:02X}h, same", rw(verify, 0x2A, 4, 2), data_out=pattern(0x2A, 4))
        yield Case(f"VERIFY {verify:02X}h, other", rw(verify, 0x2A, 4, 2), data_out=pattern(0x2B, 4))
        yield Case(f"VERIFY {verify:02X}h, BYTCHK 2", rw(verify, 0x2A, 4, 4))
        yield Case(f"VERIFY {verify:02X}h, beyond the end", rw(verify, BLOCKS, 1))
    yield Case("PRE-FETCH(10)", rw(0x34, 0, 8))
    yield Case("PRE-FETCH(10), beyond the end", rw(0x34, BLOCKS, 8))
    yield Case("SYNCHRONIZE CACHE(10)", rw(0x35, 0, 0))
    yield Case("SYNCHRONIZE CACHE(16)", rw(0x91, 0, 0))
    swap = pattern(0x2A, 1) + pattern(0x99, 1)
    yield Case("COMPARE AND WRITE", sg.cdb(0x89, 0, (0x2A, 8), 0, 0, 0, 1, 0, 0), data_out=swap)
    yield Case("COMPARE AND WRITE, miscompare", sg.cdb(0x89, 0, (0x2A, 8), 0, 0, 0, 1, 0, 0), data_out=swap)
    yield Case("COMPARE AND WRITE, read back", rw(0x88, 0x2A, 1), one)
    yield Case("COMPARE AND WRITE, beyond the end", sg.cdb(0x89, 0, (BLOCKS, 8), 0, 0, 0, 1, 0, 0), data_out=swap)
    for same, bits in ((0x41, 10), (0x93, 16)):
        yield Case(f"WRITE SAME({bits})", rw(same, 64, 8), data_out=pattern(same, 1))
        yield Case(f"WRITE SAME({bits}), read back", rw(0x88, 64, 8), 8 * one)
        yield Case(f"WRITE SAME({bits}), UNMAP", rw(same, 64, 4, 8), data_out=bytes(one))
        yield Case(f"WRITE SAME({bits}), UNMAP, read back", rw(0x88, 64, 8), 8 * one)
        yield Case(f"WRITE SAME({bits}), beyond the end", rw(same, BLOCKS - 1, 8), data_out=bytes(one))
    yield Case("WRITE SAME(16), NDOB", rw(0x93, 64, 8, 1))
    yield Case("WRITE SAME(16), NDOB, read back", rw(0x88, 64, 8), 8 * one)
    yield Case("UNMAP", sg.cdb(0x42, 0, (0, 4), 0, (40, 2), 0), data_out=unmap((0x2A, 1), (0x8A, 2)))
    yield Case("UNMAP, read back", rw(0x88, 0x2A, 4), 4 * one)
    yield Case("UNMAP, nothing", sg.cdb(0x42, 0, (0, 4), 0, (0, 2), 0))
    yield Case("UNMAP, beyond the end", sg.cdb(0x42, 0, (0, 4), 0, (24, 2), 0), data_out=unmap((BLOCKS, 1)))
    yield Case("UNMAP, ANCHOR", sg.cdb(0x42, 1, (0, 4), 0, (24, 2), 0), data_out=unmap((0, 1)))
    yield Case("GET LBA STATUS, mapped", sg.cdb(0x9E, 0x12, (0xAA, 8), (24, 4), 0, 0), 24)
    yield Case("GET LBA STATUS, deallocated", sg.cdb(0x9E, 0x12, (0x2A, 8), (24, 4), 0, 0), 24)
    yield Case("GET LBA STATUS, beyond the end", sg.cdb(0x9E, 0x12, (BLOCKS, 8), (24, 4), 0, 0), 24)
    yield Case("EXTENDED COPY, nothing", sg.cdb(0x83, 0, (0, 8), (0, 4), 0, 0))
    yield Case("RECEIVE COPY RESULTS, unknown list", sg.cdb(0x84, 0, 0x77, (0, 7), (12, 4), 0, 0), 12)
    yield Case("START STOP UNIT, stop", sg.cdb(0x1B, 0, 0, 0, 0, 0))
    yield Case("TEST UNIT READY, stopped", bytes(6))
    yield Case("READ(10), stopped", rw(0x28, 0, 1), one)
    yield Case("INQUIRY, stopped", sg.cdb(0x12, 0, 0, (36, 2), 0), 36, compare="length")
    yield Case("START STOP UNIT, start", sg.cdb(0x1B, 0, 0, 0, 1, 0))
    yield Case("TEST UNIT READY, started", bytes(6))
    yield Case("unknown operation code", sg.cdb(0xC1, *bytes(9)))
    yield Case("reserved bit in a CDB", sg.cdb(0x25, 0, 0, 0, 0, 0, 0, 0, 0x80, 0), 8)
    yield Case("NACA", sg.cdb(0x28, 0, (0, 4), 0, (1, 2), 4), one)
    yield Case("RELEASE(6)", sg.cdb(0x17, *bytes(5)))


DIFFERENCES = {
    "INQUIRY, page code without EVPD": "SPC-4: a page code without EVPD is an invalid field; scsi_debug ignores it",
    "VPD 00h": "other pages: scsi_debug has network addresses, SCSI ports, SATA data and no Block Limits Extension",
    "VPD 80h": "another serial number",
    "VPD 83h": "other names: scsi_debug names its target and ports, which are the fabric's here",
    "VPD B7h": "scsi_debug has no Block Limits Extension page",
    "MODE SENSE(6), page 3Fh": "scsi_debug has more pages: disconnect-reconnect, format device, SAS",
    "MODE SENSE(10), page 3Fh": "the same",
    "LOG SENSE, supported pages": "we have write errors, start-stop and statistics pages; scsi_debug exceptions",
    "LOG SENSE, temperature": "scsi_debug has a reference temperature",
    "RSOC, READ(10)": "scsi_debug says that it looks at protection, groups and reserved bits; we refuse those",
    "RSOC, READ CAPACITY(16)": "scsi_debug says that it looks at the obsolete LBA and reserved bits; we refuse those",
    "PRE-FETCH(10)": "CONDITION MET says that all blocks are cached; we do not know whether they are",
    "READ(16), 64-bit overflow": "scsi_debug adds up in 64 bits and wraps around",
    "VERIFY 2Fh, beyond the end": "without data to compare scsi_debug does not look at the range",
    "VERIFY 8Fh, beyond the end": "the same",
    "UNMAP, nothing": "SBC-4: a parameter list of no bytes is not an error; scsi_debug wants a header",
    "UNMAP, ANCHOR": "SBC-4: ANCHOR without ANC_SUP is an invalid field; scsi_debug ignores it",
    "reserved bit in a CDB": "only refused by scsi_debug with its option strict=1",
    "EXTENDED COPY, nothing": "scsi_debug has no third-party copy",
    "RECEIVE COPY RESULTS, unknown list": "the same",
    "NACA": "ACA is not supported by either: SAM-5 wants it refused; scsi_debug ignores it",
    **{
        f"READ {opcode}h, {what}": why
        for opcode in ("28", "A8", "88")
        for what, why in {
            "no blocks at the end": "the block behind the last is no address, as libiscsi's suite wants it",
            "RDPROTECT": "SBC-4: refused while no protection is formatted; scsi_debug ignores it with dix=0 dif=0",
        }.items()
    },
    **{
        f"WRITE {opcode}h, WRPROTECT": "SBC-4: refused while no protection is formatted; scsi_debug ignores it"
        for opcode in ("2A", "AA", "8A")
    },
}
"""Case by case, why the answers differ."""


@pytest.fixture(scope="module")
def judge() -> Iterator[sg.Unit]:
    options = "dev_size_mb=16 lbpu=1 lbpws=1 lbpws10=1 lbprz=1 delay=0 opts=0 max_luns=1 num_tgts=1 physblk_exp=3"
    subprocess.run(["modprobe", "scsi_debug", *options.split()], check=True)
    try:
        deadline = time.monotonic() + 30
        while not (found := [path for path in Path("/sys/block").glob("sd*") if model(path) == "scsi_debug"]):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        node = Path("/dev", found[0].name)
        while not node.exists():
            time.sleep(0.1)
        with sg.opened(str(node)) as unit:
            unit.settle()
            yield unit
    finally:
        subprocess.run(["modprobe", "-r", "scsi_debug"], check=True)


def model(disk: Path) -> str:
    path = disk / "device/model"
    return path.read_text().strip() if path.exists() else ""


@pytest.fixture(scope="module")
def disk() -> Iterator[sg.Unit]:
    with served(Thin(SIZE), name="disk") as device:
        assert device.path is not None
        with sg.opened(device.path) as unit:
            unit.settle()
            yield unit


def shape(answer: sg.Answer, compare: str) -> tuple[object, ...]:
    data = {"data": answer.data, "length": len(answer.data)}.get(compare)
    # The data of what failed is nobody's business.
    return answer.host, answer.status, answer.triple, data if answer.status == sg.GOOD else None


def told(answer: sg.Answer) -> str:
    return f"{answer} {answer.data[:32].hex()}" if answer.status == sg.GOOD else str(answer)


def test_both_answer_alike(disk: sg.Unit, judge: sg.Unit) -> None:
    found = {}
    for case in cases():
        ours, theirs = (unit.send(case.cdb, data_in=case.data_in, data_out=case.data_out) for unit in (disk, judge))
        if shape(ours, case.compare) != shape(theirs, case.compare):
            found[case.name] = f"ours {told(ours)}, scsi_debug's {told(theirs)}"
    for name, answers in found.items():
        print(f"{name}: {answers}")
    assert sorted(found.keys() - DIFFERENCES.keys()) == [], "answers differ, see above"
    assert sorted(DIFFERENCES.keys() - found.keys()) == [], "answers agree by now"
