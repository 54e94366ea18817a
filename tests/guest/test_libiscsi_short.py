"""A minute of libiscsi's suite: what is emulated, and not the kernel's. All of it is in `make judges`."""

from __future__ import annotations

from . import libiscsi
from .everything import Everything, served

SUITES = (
    "ExtendedCopy",
    "GetLBAStatus",
    "Inquiry",
    "ModeSense6",
    "OrWrite",
    "ReadCapacity16",
    "ReceiveCopyResults",
    "TestUnitReady",
    "Unmap",
    "Verify16",
    "Write16",
    "WriteAtomic16",
    "WriteVerify16",
)
LEFT_OUT = (
    # The test's own: see docs/scsi.md.
    "GetLBAStatus.UnmapSingle",
    # These take longer than all others together in an emulated machine.
    "OrWrite.Simple",
    "OrWrite.Verify",
    "Unmap.Simple",
    "Verify16.Simple",
    "Verify16.Mismatch",
)


def test_what_is_emulated_passes() -> None:
    tests = [
        name
        for name in libiscsi.list_tests()
        if name.split(".")[1] in SUITES and name.partition(".")[2] not in LEFT_OUT
    ]
    # First the one that wants to know of no copy: whose results are kept, the kernel does not tell.
    tests.sort(key=lambda name: "ReceiveCopyResults" not in name)
    with served(Everything(32 << 20), name="disk", fabric="iscsi") as device:
        score = libiscsi.run(f"iscsi://127.0.0.1:3260/{device.target}/0", tests)
    print(score)
    assert score.tests("passed") == tests, score.report("skipped", "failed")
