"""The machine that serves the disks loses its power: what was flushed is there when it comes up again.

On request, some minutes: `TCMU_POWER_CUTS=20 python -m pytest tests/test_power_cut.py`; with `TCMU_SEED=2` at other
moments.

QEMU is killed, and before that stopped now and then, by SIGSTOP: a copy of the disk at such a moment is, byte for byte,
what SIGKILL would have left. So a boot, which takes longest, stands for several cuts.

A cut takes with it all that the guest's kernel had in memory: dirty pages of the file system below, its journal that
was on the way, commands in flight. What the virtual disk had acknowledged is in the host's page cache, and the host
lives on; so it stays, whether QEMU's cache mode is writeback (the default, here) or none. A disk with a volatile cache
would lose some of that, in any order: `tests/test_crash.py` enumerates what that leaves.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections import Counter
from pathlib import Path
from random import Random

import pytest
import trio

from . import luks
from .guest import power
from .guest.power import DISKS, PLACES, writes
from .lab.plugin import Lab

CUTS = int(os.environ.get("TCMU_POWER_CUTS", "0"))
SEED = int(os.environ.get("TCMU_SEED", "1"))

COPIES = 4
"""Cuts that one boot stands for beside its kill."""

Found = list[tuple[int, int] | None]
Choices = list[set[tuple[int, int] | None]]


def make_disk(path: Path, directory: Path) -> None:
    """A virtual disk with a file system, and in it a file for each handler."""
    directory.mkdir()
    trio.run(power.prepare, directory)
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-d", str(directory), str(path), "384M"]
    subprocess.run(command, check=True, env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"})


def allowed(name: str, round_number: int, flushed: int, durable: set[int], before: Found) -> Choices:
    """What each place may hold after a round: the last write that was made durable, or any after that."""
    choices: Choices = [{what} for what in before]
    for count, place in enumerate(writes(name, round_number)):
        if count < flushed or count in durable:
            choices[place] = {(round_number, count)}
        else:
            choices[place].add((round_number, count))
    return choices


def acknowledged(output: str, name: str, round_number: int) -> tuple[int, set[int]]:
    """How many writes a flush has made durable, and which were so by themselves."""

    def counts(what: str) -> list[int]:
        return [int(count) for count in re.findall(rf"^{what} {name} {round_number} (\d+)$", output, re.MULTILINE)]

    return max(counts("flushed"), default=0), set(counts("durable"))


def found_in(output: str, copy: int, name: str) -> Found:
    line = re.search(rf"^found {copy} {name} (.*)$", output, re.MULTILINE)
    assert line is not None, output
    return [what and (what[0], what[1]) for what in json.loads(line[1])]


def wrong_in(found: Found, choices: Choices) -> dict[int, object]:
    return {
        place: (what, sorted(allowed, key=str)[:5])
        for place, (what, allowed) in enumerate(zip(found, choices, strict=True))
        if what not in allowed
    }


@pytest.mark.slow
@pytest.mark.skipif(not CUTS, reason="on request: TCMU_POWER_CUTS=20")
def test_what_was_flushed_survives(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    luks.make_cheap(monkeypatch)
    disk = tmp_path / "disk"
    make_disk(disk, tmp_path / "files")
    random = Random(SEED)
    # By copy and name; copy 0 is the disk itself.
    expected: dict[tuple[int, str], Choices] = {(0, name): [{(-1, place)} for place in range(PLACES)] for name in DISKS}
    totals = Counter[str]()
    round_number = cuts = 0
    while True:
        copies = len(expected) // len(DISKS) - 1
        job = f"exec python -m tests.guest.power {round_number} {copies}"
        began = time.monotonic()
        disks = [disk, *(tmp_path / f"copy{number}" for number in range(1, copies + 1))]
        outputs: list[str] = []
        with lab.machine(job, disks=disks, timeout=600, memory="1G") as machine:
            machine.wait_for_output(b"begins\n")
            looked = time.monotonic()
            if cuts < CUTS:
                for name in DISKS:
                    machine.wait_for_output(f"flushed {name} {round_number} ".encode())
            while cuts + len(outputs) < CUTS and len(outputs) <= COPIES:
                time.sleep(random.random() * 3)
                outputs.append(machine.output.decode())
                if len(outputs) <= COPIES and cuts + len(outputs) < CUTS:
                    with machine.stopped():
                        subprocess.run(["cp", "--sparse=always", disk, tmp_path / f"new{len(outputs)}"], check=True)
            machine.kill()
            output = machine.wait().text
        for (copy, name), choices in expected.items():
            wrong = wrong_in(found_in(output, copy, name), choices)
            assert not wrong, f"{name} after {cuts} power cuts: {wrong}"
            totals["checked"] += PLACES
        cuts += len(outputs)
        print(f"\n{cuts} cuts, {looked - began:.0f} + {time.monotonic() - looked:.0f} s, {dict(totals)}", flush=True)
        if not outputs:
            break
        expected.clear()
        # The last one is the kill.
        for copy, seen in enumerate([outputs[-1], *outputs[:-1]]):
            if copy:
                (tmp_path / f"new{copy}").replace(tmp_path / f"copy{copy}")
            for name in DISKS:
                flushed, durable = acknowledged(seen, name, round_number)
                totals["durable"] += flushed + sum(one >= flushed for one in durable)
                totals["flushes"] += flushed // power.FLUSH_EVERY
                expected[copy, name] = allowed(name, round_number, flushed, durable, found_in(output, 0, name))
        round_number += 1
    print(
        f"{CUTS} power cuts, of them {round_number} kills, of {len(DISKS)} disks; {totals['flushes']} flushes and "
        f"{totals['durable']} durable writes before them; {totals['checked']} places looked at, nothing lost"
    )
