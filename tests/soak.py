"""Kills, upgrades and swaps servers under load in the lab: `python -m tests.soak --minutes 60`.

Prints what happened as JSON. The exit status is 1 if a byte was lost or an initiator saw an error.
"""

from __future__ import annotations

import argparse
import sys

from tests.lab import __main__ as lab


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60, help="how long the load lasts, at least [%(default)s]")
    parser.add_argument("--kills", type=int, default=50, help="how often servers are killed, at least [%(default)s]")
    parser.add_argument("--seed", type=int, default=1, help="of what happens when [%(default)s]")
    options = parser.parse_args()
    job = f"python -m tests.guest.soak --minutes {options.minutes} --kills {options.kills} --seed {options.seed}"
    # A killed server costs seconds under emulation.
    seconds = options.minutes * 60 + options.kills * 30 + 600
    return lab.main(["run", "--timeout", str(seconds), job])


if __name__ == "__main__":
    sys.exit(main())
