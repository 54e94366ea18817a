"""The machine that serves the disks loses its power: what was flushed is there when it comes up again.

On request, a minute for each cut: `TCMU_POWER_CUTS=20 python -m pytest tests/test_power_cut.py`; with `TCMU_SEED=2` at
other moments.

QEMU is killed, which takes with it all that the guest's kernel had in memory: dirty pages of the file system below, its
journal that was on the way, commands in flight. What the virtual disk had acknowledged is in the host's page cache, and
the host lives on; so it stays, whether QEMU's cache mode is writeback (the default, here) or none. A disk with a
volatile cache would lose some of that, in any order: `tests/test_crash.py` enumerates what that leaves.
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

Found = list[tuple[int, int] | None]


def make_disk(path: Path, directory: Path) -> None:
    """A virtual disk with a file system, and in it a file for each handler."""
    directory.mkdir()
    trio.run(power.prepare, directory)
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-d", str(directory), str(path), "384M"]
    subprocess.run(command, check=True, env={**os.environ, "PATH": f"{os.environ['PATH']}:/usr/sbin:/sbin"})


def allowed(
    name: str, round_number: int, flushed: int, durable: set[int], before: Found
) -> list[set[tuple[int, int] | None]]:
    """What each place may hold after a round: the last write that was made durable, or any after that."""
    choices: list[set[tuple[int, int] | None]] = [{what} for what in before]
    for count, place in enumerate(writes(name, round_number)):
        if count < flushed or count in durable:
            choices[place] = {(round_number, count)}
        else:
            choices[place].add((round_number, count))
    return choices


@pytest.mark.slow
@pytest.mark.skipif(not CUTS, reason="on request: TCMU_POWER_CUTS=20")
def test_what_was_flushed_survives(lab: Lab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    luks.make_cheap(monkeypatch)
    disk = tmp_path / "disk"
    make_disk(disk, tmp_path / "files")
    random = Random(SEED)
    expected: dict[str, list[set[tuple[int, int] | None]]] = {
        name: [{(-1, place)} for place in range(PLACES)] for name in DISKS
    }
    totals = Counter[str]()
    for round_number in range(CUTS + 1):
        job = f"exec python -m tests.guest.power {round_number}"
        began = time.monotonic()
        with lab.machine(job, disks=[disk], timeout=600, memory="1G") as machine:
            machine.wait_for_output(b"begins\n")
            if round_number < CUTS:
                for name in DISKS:
                    machine.wait_for_output(f"flushed {name} {round_number} ".encode())
                time.sleep(random.random() * 4)
            machine.kill()
            output = machine.wait().text
        for name in DISKS:
            line = re.search(rf"^found {name} (.*)$", output, re.MULTILINE)
            assert line is not None, output
            found: Found = [what and (what[0], what[1]) for what in json.loads(line[1])]
            wrong = {
                place: (what, sorted(choices, key=str)[:5])
                for place, (what, choices) in enumerate(zip(found, expected[name], strict=True))
                if what not in choices
            }
            assert not wrong, f"{name} after {round_number} power cuts: {wrong}"
            totals["checked"] += PLACES

            def counts(what: str, name: str = name) -> list[int]:
                pattern = rf"^{what} {name} {round_number} (\d+)$"  # noqa: B023 - called at once
                return [int(count) for count in re.findall(pattern, output, re.MULTILINE)]  # noqa: B023

            flushed, durable = counts("flushed"), set(counts("durable"))
            totals["flushes"] += len(flushed)
            totals["durable"] += max(flushed, default=0) + sum(one >= max(flushed, default=0) for one in durable)
            expected[name] = allowed(name, round_number, max(flushed, default=0), durable, found)
        print(f"\n{round_number}: {time.monotonic() - began:.0f} s, {dict(totals)}", flush=True)
    print(
        f"{CUTS} power cuts of {len(DISKS)} disks, {totals['flushes']} flushes, {totals['durable']} durable writes, "
        f"{totals['checked']} places looked at, nothing lost"
    )
