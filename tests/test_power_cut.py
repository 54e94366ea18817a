"""The machine that serves the disks loses its power: what was flushed is there when it comes up again.

On request, half a minute for each cut: `TCMU_POWER_CUTS=20 python -m pytest tests/test_power_cut.py`. What the guest's
kernel had in memory is lost; the order of what had reached the virtual disk is what `tests/test_crash.py` is about.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from random import Random

import pytest

from .guest.power import DISKS, PLACES, writes
from .lab.plugin import Lab

CUTS = int(os.environ.get("TCMU_POWER_CUTS", "0"))

Found = list[tuple[int, int] | None]


def allowed(name: str, round_number: int, flushed: int, before: Found) -> list[set[tuple[int, int] | None]]:
    """What each place may hold after a round: the last write that was flushed, or any after that."""
    choices: list[set[tuple[int, int] | None]] = [{what} for what in before]
    for count, place in enumerate(writes(name, round_number)):
        if count < flushed:
            choices[place] = {(round_number, count)}
        else:
            choices[place].add((round_number, count))
    return choices


@pytest.mark.slow
@pytest.mark.skipif(not CUTS, reason="on request: TCMU_POWER_CUTS=20")
def test_what_was_flushed_survives(lab: Lab, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with disk.open("wb") as file:
        file.truncate(512 << 20)
    random = Random(CUTS)
    expected: dict[str, list[set[tuple[int, int] | None]]] = {
        name: [{(-1, place)} for place in range(PLACES)] for name in DISKS
    }
    flushes = 0
    for round_number in range(CUTS + 1):
        job = f"exec python -m tests.guest.power {round_number}"
        with lab.machine(job, disks=[disk], timeout=600) as machine:
            machine.wait_for_output(b"begins\n")
            if round_number < CUTS:
                # Long enough for every disk to have been flushed now and then.
                for name in DISKS:
                    machine.wait_for_output(f"flushed {name} {round_number} {random.randint(1, 8) * 5}\n".encode())
                time.sleep(random.random())
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
            done = [int(count) for count in re.findall(rf"^flushed {name} {round_number} (\d+)$", output, re.MULTILINE)]
            flushes += len(done)
            expected[name] = allowed(name, round_number, max(done, default=0), found)
    print(f"{CUTS} power cuts, {flushes} flushes of {len(DISKS)} disks, nothing lost")
