"""What a figure was taken on: no figure without it."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
from pathlib import Path

import trio

from tcmu_rs import _native


def conditions() -> dict[str, str]:
    """The machine, the versions, the date, and how busy the machine was with other things."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")), "unknown")
    rustc = subprocess.run(["rustc", "--version"], capture_output=True, text=True, check=False).stdout.strip()
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "CPU": f"{model}, {os.cpu_count()} logical",
        "load at the start": " ".join(f"{load:.2f}" for load in os.getloadavg()),
        "kernel": platform.release(),
        "Python": platform.python_version(),
        "trio": trio.__version__,
        "tcmu-rs": _native.__version__ + (" (debug build!)" if _native.debug_build else ""),
        "rustc": rustc or "not there",
    }
