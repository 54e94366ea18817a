"""Runs the suite of libiscsi (`iscsi-test-cu`) and counts what it says, which CUnit's own summary does not.

To CUnit a test that found its command missing has passed. Here it is *skipped*, as it is as soon as any part of it
printed `[SKIPPED]`.
"""

from __future__ import annotations

import os
import re
import selectors
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Literal

Verdict = Literal["passed", "skipped", "failed"]

_PROGRAM = ("stdbuf", "-oL", "iscsi-test-cu")
_SUITE = re.compile(r"^Suite: (?P<name>\S+)")
_TEST = re.compile(r"^ *Test: (?P<name>\S+) \.\.\.(?P<rest>.*)")
_END = re.compile(r"(passed|FAILED)(?:$| +\[)")


@dataclass
class Outcome:
    """What became of one test.

    Attributes:
        verdict: Counted as the module says.
        seconds: How long it took.
        output: What it printed.
    """

    verdict: Verdict
    seconds: float
    output: str


@dataclass
class Score:
    """What became of all tests."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    seconds: float = 0.0

    def tests(self, verdict: Verdict) -> list[str]:
        """The names of the tests that ended so."""
        return [name for name, outcome in self.outcomes.items() if outcome.verdict == verdict]

    def __str__(self) -> str:
        passed, skipped, failed = (len(self.tests(verdict)) for verdict in ("passed", "skipped", "failed"))
        total = len(self.outcomes)
        return f"{passed} passed, {skipped} skipped, {failed} failed of {total} in {self.seconds:.0f} s"

    def report(self, *verdicts: Verdict) -> str:
        """The tests that ended so, and what they said."""
        lines = []
        for name, outcome in self.outcomes.items():
            if outcome.verdict in verdicts:
                said = [line.strip() for line in outcome.output.splitlines()]
                telling = [line for line in said if "[SKIPPED]" in line or "[FAILED]" in line or "CU_" in line]
                lines.append(f"{outcome.verdict:8}{name}: {'; '.join(dict.fromkeys(telling or said[-3:]))}")
        return "\n".join(lines)


def list_tests(family: str = "SCSI") -> list[str]:
    """Names the tests of a family, `FAMILY.SUITE.TEST`."""
    listed = subprocess.run(["iscsi-test-cu", "--list"], capture_output=True, text=True, check=True).stdout
    return [name for name in listed.split() if name.count(".") == 2 and name.startswith(f"{family}.")]


def run(url: str, tests: Sequence[str], *, options: Sequence[str] = (), limit: float = 60.0) -> Score:
    """Runs tests against a target, a suite at a time; a test that hangs or crashes does not take others along.

    Args:
        url: `iscsi://ADDRESS:PORT/IQN/LUN`. Tests that want two paths get it twice: each is a session of its own.
        tests: From `list_tests`.
        options: For `iscsi-test-cu`.
        limit: Seconds in which a test must end; then it has failed.
    """
    score = Score()
    started = time.monotonic()
    for suite, members in groupby(tests, key=lambda name: name.rpartition(".")[0]):
        names = list(members)
        found = _run_one(url, suite, names, options, limit)
        for name in names:
            # The first without an end is what it hung or crashed in, those behind it have not begun.
            if name not in found:
                found |= _run_one(url, name, [name], options, limit)
            score.outcomes[name] = outcome = found.get(name) or Outcome("failed", limit, "it did not run")
            print(f"{outcome.verdict:8}{name} {outcome.seconds:.1f} s", flush=True)
            if outcome.verdict == "failed":
                print(outcome.output[-1000:], flush=True)
    score.seconds = time.monotonic() - started
    return score


def _run_one(url: str, what: str, names: list[str], options: Sequence[str], limit: float) -> dict[str, Outcome]:
    # Only those: a second session has unit attentions of its own, which other tests do not expect.
    paths = 2 if ".MultipathIO" in what else 1
    command = [*_PROGRAM, "--dataloss", *options, "-t", what, *[url] * paths]
    found: dict[str, Outcome] = {}
    lines: list[str] = []
    name = suite = ""
    begun = time.monotonic()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL
    ) as process:
        for line in _lines(process, limit):
            if match := _SUITE.match(line):
                suite = match["name"]
                continue
            if match := _TEST.match(line):
                name = f"{what.partition('.')[0]}.{suite}.{match['name']}"
                lines = []
                line = match["rest"]
            lines.append(line)
            if name and (match := _END.search(line)):
                said = "\n".join(lines)
                verdict: Verdict = "failed" if match[1] == "FAILED" else "skipped" if "[SKIPPED]" in said else "passed"
                # The line of a test comes with its end, so it began when the one before ended.
                found[name] = Outcome(verdict, time.monotonic() - begun, said)
                begun = time.monotonic()
            elif name in found:
                found[name].output += f"\n{line}"
        process.kill()
    if name not in found and name in names:
        said = "\n".join([*lines, f"it hung or ended the program (status {process.returncode})"])
        found[name] = Outcome("failed", time.monotonic() - begun, said)
    elif not name and len(names) == 1:
        found[names[0]] = Outcome("failed", time.monotonic() - begun, "\n".join([*lines, "it did not begin"]))
    return found


def _lines(process: subprocess.Popen[bytes], limit: float) -> Iterator[str]:
    """Yields what a program prints until it ends, or prints nothing for so many seconds."""
    assert process.stdout is not None
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while selector.select(limit) and (data := os.read(process.stdout.fileno(), 1 << 16)):
            *whole, rest = (rest + data).split(b"\n")
            for line in whole:
                yield line.decode(errors="replace")
    yield rest.decode(errors="replace")


@contextmanager
def fileio_target(image: Path, size: int, portal: str, iqn: str) -> Iterator[str]:
    """LIO's own disk in a file, thin provisioned and with a write cache, as an iSCSI target; yields its URL."""
    from tcmu_rs import _lio

    core = _lio.TARGET / "core/fileio_4711"
    subprocess.run(["modprobe", "-a", "target_core_file", "iscsi_target_mod"], check=True)
    device = core / "judge"
    device.mkdir(parents=True)
    (device / "control").write_text(f"fd_dev_name={image},fd_dev_size={size},fd_buffered_io=1")
    (device / "wwn/vpd_unit_serial").write_text("7c2d6a44-31f4-4dd6-9c3c-0d3c0f6d2a11")
    (device / "enable").write_text("1")
    for attribute in ("emulate_tpu", "emulate_tpws", "emulate_write_cache"):
        (device / "attrib" / attribute).write_text("1")
    group = _lio.TARGET / "iscsi" / iqn / "tpgt_1"
    lun, entry = group / "lun/lun_0", group / "np" / portal
    made = [group.parent.parent, group.parent, group, lun, entry]
    for directory in made:
        directory.mkdir(exist_ok=True)
    for attribute, value in _lio._DEMO_MODE.items():
        (group / "attrib" / attribute).write_text(str(value))
    link = lun / "judge"
    link.symlink_to(device)
    (group / "enable").write_text("1")
    try:
        yield f"iscsi://{portal}/{iqn}/0"
    finally:
        (group / "enable").write_text("0")
        link.unlink()
        for directory in (entry, lun, group, group.parent, device, core):
            directory.rmdir()
