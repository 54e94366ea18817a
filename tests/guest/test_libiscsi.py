"""The suite of libiscsi against a disk of ours over iSCSI, and against LIO's own for comparison.

What does not pass is in `docs/scsi.md`, test by test, with the reason: that table is what this test compares with.
The same suite on LIO's fileio, in the same boot, takes minutes more and is only for reading:

    python -m tests.lab run --timeout 3600 --env TCMU_COMPARE=1 'python -m pytest -rP tests/guest/test_libiscsi.py'
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import trio

import tcmu_rs

from . import libiscsi
from .everything import Everything, KernelLog, served

pytestmark = pytest.mark.judges

SIZE = 64 << 20
PASSES = 193
"""What was reached, when all failed that varies. A command that the emulation learns raises it."""

_TABLE = Path(__file__).parents[2] / "docs/scsi.md"
_ROW = re.compile(r"^\| `(?P<name>[\w.-]+)` \| (?P<verdict>skipped|failed|varies) \| (?P<whose>[^|]+) \|", re.MULTILINE)


class Leisurely(Everything):
    """Takes its time to overwrite the whole disk: one test wants to meet a SANITIZE that is still going."""

    async def write(self, offset: int, iov: tcmu_rs.IoVec) -> None:  # type: ignore[override]
        """Waits where a SANITIZE writes."""
        super().write(offset, iov)
        if iov.nbytes == 1 << 20:
            await trio.sleep(0.2)


def known() -> dict[str, str]:
    """The tests in the table, and how they end."""
    return {f"SCSI.{match['name']}": match["verdict"] for match in _ROW.finditer(_TABLE.read_text())}


@pytest.mark.slow
@pytest.mark.guest(timeout=1800)
def test_the_suite() -> None:
    log = KernelLog()
    # Sanitizing erases all of the disk, which is why the suite wants to be told that it may.
    with served(Leisurely(SIZE), name="disk", fabric="iscsi") as device:
        score = libiscsi.run(
            f"iscsi://127.0.0.1:3260/{device.target}/0",
            libiscsi.list_tests(),
            options=["--allow-sanitize"],
            limit=300,
        )
    print(score)
    print(score.report("skipped", "failed"))
    table = known()
    assert [name for name in score.tests("failed") if table.get(name) not in ("failed", "varies")] == []
    assert [name for name in score.tests("skipped") if table.get(name) != "skipped"] == []
    assert [name for name in score.tests("passed") if table.get(name, "varies") != "varies"] == []
    assert len(score.tests("passed")) >= PASSES
    assert [line for line in log.lines() if re.search(r"BUG|WARNING|Oops|blocked for|stall", line)] == []


@pytest.mark.slow
@pytest.mark.guest(timeout=1800)
@pytest.mark.skipif("TCMU_COMPARE" not in os.environ, reason="set TCMU_COMPARE=1 to compare with LIO's fileio")
def test_the_suite_on_fileio(tmp_path: Path) -> None:
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(SIZE)
    with libiscsi.fileio_target(image, SIZE, "127.0.0.1:3260", "iqn.2026-01.org.example:judge") as url:
        score = libiscsi.run(url, libiscsi.list_tests(), options=["--allow-sanitize"], limit=300)
    print(score)
    print(score.report("skipped", "failed"))
    assert len(score.outcomes) == 215
