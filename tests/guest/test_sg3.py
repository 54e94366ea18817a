"""A disk under sg3_utils and sdparm, and under a thousand random commands."""

from __future__ import annotations

import random
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from . import sg
from .everything import Everything, KernelLog, served

pytestmark = pytest.mark.judges

SIZE = 16 << 20
BLOCK = 512
RESERVATIONS = (0x16, 0x17, 0x56, 0x57, 0x5E, 0x5F)
"""Commands that the kernel answers: a random one would lock this initiator out."""
MISCOMPARE = 14
"""What sg3_utils exit with when the sense key says so."""


@pytest.fixture(scope="module")
def disk() -> Iterator[str]:
    with served(Everything(SIZE), name="disk") as device:
        assert device.path is not None
        yield device.path


@pytest.fixture(autouse=True)
def quiet_kernel() -> Iterator[None]:
    log = KernelLog()
    yield
    assert log.complaints() == []


def run(*command: str | Path, status: int = 0) -> str:
    """Runs a program and returns what it said, on whichever channel."""
    done = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120
    )
    print("$", *command, f"[{done.returncode}]")
    print(done.stdout)
    assert done.returncode == status, done.stdout
    return done.stdout


def file(tmp_path: Path, data: bytes, name: str = "data") -> Path:
    path = tmp_path / name
    path.write_bytes(data)
    return path


def write(disk: str, lba: int, data: bytes) -> None:
    with sg.opened(disk) as unit:
        unit.settle()
        unit.good(sg.cdb(0x8A, 0, (lba, 8), (len(data) // BLOCK, 4), 0, 0), data_out=data)


def read(disk: str, lba: int, blocks: int = 1) -> bytes:
    with sg.opened(disk) as unit:
        unit.settle()
        return unit.good(sg.cdb(0x88, 0, (lba, 8), (blocks, 4), 0, 0), data_in=blocks * BLOCK)


def test_every_listed_command_is_there(disk: str) -> None:
    listed = run("sg_opcodes", "--rctd", disk)
    for name in ("Compare and write", "Write same(16)", "Unmap", "Mode select(10)", "Sanitize", "Get LBA status"):
        assert name.lower() in listed.lower()


@pytest.mark.parametrize("program", ["sg_vpd", "sg_modes", "sg_logs"])
def test_all_pages_are_understood(disk: str, program: str) -> None:
    said = run(program, "-a", disk)
    assert not re.search(r"malformed|truncated|too short|unexpected|bad field|failed", said, re.IGNORECASE)


def test_the_write_cache_is_switched(disk: str) -> None:
    def cached() -> str:
        # The status is that of its request for saved values, which there are none of.
        return run("sdparm", "--quiet", "--get=WCE", disk, status=5).split()[1]

    assert cached() == "1"
    run("sdparm", "--clear=WCE", disk)
    assert cached() == "0"
    write(disk, 0, b"through" * 512)
    assert read(disk, 0).startswith(b"through")
    run("sdparm", "--set=WCE", disk)
    assert cached() == "1"


def test_the_format_of_sense_data_is_switched(disk: str) -> None:
    beyond = sg.cdb(0x88, 0, (SIZE // BLOCK, 8), (1, 4), 0, 0)
    run("sdparm", "--set=D_SENSE", disk)
    with sg.opened(disk) as unit:
        unit.settle()
        described = unit.send(beyond, data_in=BLOCK)
        run("sdparm", "--clear=D_SENSE", disk)
        unit.settle()
        fixed = unit.send(beyond, data_in=BLOCK)
    assert (described.sense[0], fixed.sense[0] & 0x7F) == (0x72, 0x70)
    assert described.triple == fixed.triple == (5, 0x21, 0)


def test_saved_pages_are_refused(disk: str) -> None:
    said = run("sdparm", "--set=WCE", "--save", disk, status=97)
    assert "not saveable" in said


def test_verify(disk: str, tmp_path: Path) -> None:
    write(disk, 64, b"v" * 8 * BLOCK)
    run("sg_verify", "--lba=0", "--count=4096", disk)
    run("sg_verify", "--16", "--lba=0", "--count=4096", disk)
    same, other = file(tmp_path, b"v" * 8 * BLOCK), file(tmp_path, b"v" * 7 * BLOCK + b"w" * BLOCK, "other")
    ask = ["--lba=64", "--count=8", f"--ndo={8 * BLOCK}"]
    run("sg_verify", *ask, "--ebytchk=1", f"--in={same}", disk)
    run("sg_verify", *ask, "--ebytchk=1", f"--in={other}", disk, status=MISCOMPARE)
    block = file(tmp_path, b"v" * BLOCK, "block")
    run("sg_verify", "--16", "--lba=64", "--count=8", f"--ndo={BLOCK}", "--ebytchk=3", f"--in={block}", disk)


@pytest.mark.parametrize("length", ["--10", "--16", "--32"])
def test_write_same(disk: str, tmp_path: Path, length: str) -> None:
    pattern = file(tmp_path, bytes(range(256)) * 2)
    run("sg_write_same", length, "--lba=128", "--num=16", f"--in={pattern}", disk)
    assert read(disk, 128, 16) == bytes(range(256)) * 32
    run("sg_write_same", length, "--unmap", "--lba=128", "--num=16", disk)
    assert read(disk, 128, 16) == bytes(16 * BLOCK)


def test_write_same_without_data(disk: str) -> None:
    write(disk, 128, b"x" * 16 * BLOCK)
    run("sg_write_same", "--16", "--ndob", "--lba=128", "--num=16", disk)
    assert read(disk, 128, 16) == bytes(16 * BLOCK)


def test_unmap_and_what_is_mapped(disk: str) -> None:
    write(disk, 0, b"m" * 64 * BLOCK)
    run("sg_unmap", "--force", "--lba=16,32", "--num=8,8", disk)
    states = {lba: run("sg_get_lba_status", "-bb", f"--lba={lba}", disk).strip() for lba in (0, 16, 24, 32)}
    assert states == {0: "0", 16: "1", 24: "0", 32: "1"}
    assert read(disk, 16, 8) == bytes(8 * BLOCK)
    assert read(disk, 24, 8) == b"m" * 8 * BLOCK


def test_compare_and_write(disk: str, tmp_path: Path) -> None:
    write(disk, 200, b"a" * BLOCK)
    swap = file(tmp_path, b"a" * BLOCK + b"b" * BLOCK)
    command = ["sg_compare_and_write", f"--in={swap}", "--lba=200", "--num=1", disk]
    run(*command)
    assert read(disk, 200) == b"b" * BLOCK
    run(*command, status=MISCOMPARE)
    assert read(disk, 200) == b"b" * BLOCK


@pytest.mark.parametrize("length", [[], ["--16"]])
@pytest.mark.parametrize("check", ["0", "1"])
def test_write_and_verify(disk: str, tmp_path: Path, length: list[str], check: str) -> None:
    data = random.Random(check).randbytes(8 * BLOCK)
    path = file(tmp_path, data)
    run("sg_write_verify", *length, f"--bytchk={check}", "--lba=300", "--num=8", f"--in={path}", disk)
    assert read(disk, 300, 8) == data


@pytest.mark.parametrize("how", [["--block"], ["--overwrite", "--zero"], ["--fail"]], ids=lambda how: str(how[0]))
def test_sanitize(disk: str, how: list[str]) -> None:
    write(disk, 400, b"secret" * 256)
    run("sg_sanitize", *how, "--quick", "--wait", disk)
    assert read(disk, 400) == (b"secret" * 86)[:BLOCK] if how == ["--fail"] else bytes(BLOCK)


def test_sanitize_without_waiting(disk: str, tmp_path: Path) -> None:
    pattern = file(tmp_path, b"\x5a" * 4)
    run("sg_sanitize", "--overwrite", "--count=2", "--ipl=4", f"--pattern={pattern}", "--quick", "--early", disk)
    with sg.opened(disk) as unit:
        wait_until_ready(unit, 120)
    assert read(disk, 400) == b"\x5a" * BLOCK


def test_format(disk: str) -> None:
    write(disk, 400, b"secret" * 256)
    run("sg_format", "--format", "--quick", "--wait", disk)
    assert read(disk, 400) == bytes(BLOCK)


def test_extended_copy(disk: str) -> None:
    # It sends through /dev/sgN.
    run("modprobe", "sg")
    sg.name_by_number(disk)
    write(disk, 0, b"copied" * 1024)
    run("sg_xcopy", f"if={disk}", f"of={disk}", "skip=0", "seek=2048", "count=12", "bs=512")
    assert read(disk, 2048, 12) == b"copied" * 1024
    assert "Third party copy" in run("sg_vpd", "-p", "tpc", disk)
    run("sg_copy_results", "--params", disk)


def wait_until_ready(unit: sg.Unit, seconds: float) -> None:
    """Waits for the end of a FORMAT UNIT or SANITIZE, and starts a unit that was stopped or has no medium."""
    deadline = time.monotonic() + seconds
    while (answer := unit.send(bytes(6))).status != sg.GOOD:
        assert time.monotonic() < deadline, answer
        if answer.triple in ((2, 4, 2), (2, 0x3A, 0)):
            unit.send(sg.cdb(0x1B, 0, 0, 0, 3, 0))
        elif answer.triple == (3, 0x31, 3):
            unit.send(sg.cdb(0x48, 0x1F, 0, 0, 0, 0, 0, (0, 2), 0))
        time.sleep(0.05)


def random_cdb(chance: random.Random, rows: list[bytes]) -> bytes:
    """Half of them random bits where a command looks for some, the others random altogether."""
    if chance.random() < 0.5:
        return chance.randbytes(chance.choice([6, 10, 12, 16, 32]))
    usage = chance.choice(rows)
    cdb = bytearray(usage)
    for at in range(1, len(cdb)):
        fixed = usage[at] if at == 1 or (cdb[0] == 0x7F and at < 10) else 0
        cdb[at] = chance.getrandbits(8) & usage[at] if not fixed or chance.random() < 0.3 else fixed
    # Mostly blocks that there are, and not too many of them.
    if len(cdb) >= 10 and chance.random() < 0.7:
        first = 12 if cdb[0] == 0x7F else 2
        cdb[first : first + 2] = bytes(2)
        if len(cdb) == 16:
            cdb[2:6], cdb[10:12] = bytes(4), bytes(2)
    return bytes(cdb)


def usages(unit: sg.Unit) -> list[bytes]:
    """The CDB usage data of every command, as the disk reports it."""
    listed = unit.good(sg.cdb(0xA3, 0x0C, 0, 0, (0, 2), (4096, 4), 0, 0), data_in=4096)
    rows = []
    for at in range(4, 4 + int.from_bytes(listed[:4], "big"), 8):
        opcode, action = listed[at], listed[at + 2 : at + 4]
        option = 2 if listed[at + 5] & 1 else 1
        one = unit.good(sg.cdb(0xA3, 0x0C, option, opcode, *action, (256, 4), 0, 0), data_in=256)
        rows.append(one[4 : 4 + int.from_bytes(one[2:4], "big")])
    return rows


def illegality(cdb: bytes, answer: sg.Answer, room: int) -> str | None:
    """Says what is wrong with an answer; None if nothing is."""
    if answer.host:
        return "the transport failed"
    if not 0 <= answer.residual <= room:
        return "impossible residual"
    if answer.status == sg.GOOD or answer.status == 0x18:
        return None
    if answer.status != sg.CHECK_CONDITION:
        return "unknown status"
    if len(answer.sense) < 8 or answer.sense[0] & 0x7F not in (0x70, 0x72):
        return "no sense data"
    key, asc, _ = answer.triple
    if key not in (0x1, 0x2, 0x3, 0x5, 0x6, 0x7, 0xA, 0xE):
        return "unexpected sense key"
    if (key, asc) == (5, 0x24) and answer.sense[0] == 0x70 and answer.sense[15] & 0x80:
        at = int.from_bytes(answer.sense[16:18], "big")
        if not answer.sense[15] & 0x40 or at > len(cdb):
            return "the field pointer does not point into the CDB"
    return None


@pytest.mark.parametrize("seed", [1])
def test_a_thousand_random_commands(disk: str, seed: int) -> None:
    chance = random.Random(seed)
    wrong, seen = [], dict[str, int]()
    slowest = (0.0, "")
    with sg.opened(disk) as unit:
        unit.settle()
        rows = [usage for usage in usages(unit) if usage[0] not in RESERVATIONS]
        for number in range(1000):
            cdb = random_cdb(chance, rows)
            while cdb[0] in RESERVATIONS:
                cdb = random_cdb(chance, rows)
            room = chance.choice([0, 1, 8, 255, 512, 4096, 65536])
            started = time.monotonic()
            if chance.random() < 0.5:
                answer = unit.send(cdb, data_in=room)
            else:
                answer = unit.send(cdb, data_out=chance.randbytes(room))
            slowest = max(slowest, (time.monotonic() - started, cdb.hex(" ")))
            seen[str(answer).partition(",")[0]] = seen.get(str(answer).partition(",")[0], 0) + 1
            if fault := illegality(cdb, answer, room):
                wrong.append(f"{number}: {cdb.hex(' ')}: {answer}: {fault}")
            if number % 20 == 19:
                wait_until_ready(unit, 120)
        wait_until_ready(unit, 120)
        assert unit.good(sg.cdb(0x25, *bytes(9)), data_in=8) == (SIZE // BLOCK - 1).to_bytes(4, "big") + b"\0\0\2\0"
        # Mode pages back to their defaults, for the tests that follow.
        unit.good(sg.cdb(0x15, 0x10, 0, 0, 16, 0), data_out=bytes(4) + sg.CONTROL_PAGE)
    print(seen, slowest)
    assert wrong == []
    assert slowest[0] < 60
