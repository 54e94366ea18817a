"""A RAM disk in Python twice: ours on the simulated ring, and nbdkit's Python plugin over a Unix socket to fio.

    python -m bench.native [--quick] [--write]

**The transports differ.** Ours has the kernel's side and the initiator, which polls, in the same thread and core, with
two copies of all data; nbdkit has fio in another process, on another core if there is one. So the processor time per
command is of everything for ours, and of the server alone for nbdkit. Both disks are 64 MiB, and both handlers copy.

Needs nbdkit with its Python plugin, and fio with its nbd engine (Debian: nbdkit nbdkit-plugin-python fio).
"""

from __future__ import annotations

import argparse
import functools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path

import trio

from . import luks
from .micro import Async, Memory, Plain
from .report import README, against, claims, plot, publish, stated, table
from .simulator import SIZE, Figure, big, measure

DEPTHS = (1, 8, 32, 128)
RIVAL = "nbdkit, Python plugin"
TARGET_DEPTH = 32
FASTER = 8
"""Times as fast as the rival, at that depth."""
RATE = 300_000
"""Commands per second, at that depth."""

PLUGIN = f"""\
import nbdkit

API_VERSION = 2
disk = bytearray({SIZE})


def thread_model():
    return nbdkit.THREAD_MODEL_SERIALIZE_REQUESTS


def open(readonly):
    return 1


def get_size(h):
    return {SIZE}


def pread(h, buf, offset, flags):
    buf[:] = disk[offset : offset + len(buf)]


def pwrite(h, buf, offset, flags):
    disk[offset : offset + len(buf)] = buf
"""


def median(figures: list[Figure]) -> Figure:
    """The medians."""
    return Figure(statistics.median(f.rate for f in figures), statistics.median(f.cpu for f in figures))


def ours(make: type[Memory], pattern: str, depth: int, seconds: float) -> Figure:
    """Runs a pattern on the simulator."""
    write = pattern == "randwrite"
    return trio.run(functools.partial(measure, big(make), depth=depth, seconds=seconds, write=write))


def compare(pattern: str, theirs: luks.Measure, seconds: float, rounds: int) -> tuple[list[str], str]:
    """Runs a pattern on all servers in turn. Describes it, and says what is to be said of it at `TARGET_DEPTH`."""
    servers: dict[str, Callable[[str, int, float], Figure]] = {
        "ours, def": functools.partial(ours, Plain),
        "ours, async def": functools.partial(ours, Async),
        RIVAL: lambda pattern, depth, seconds: Figure(*theirs(pattern, 4096, depth, seconds)),
    }
    found: dict[str, list[Figure]] = {server: [] for server in servers}
    for depth in DEPTHS:
        runs = [{server: run(pattern, depth, seconds) for server, run in servers.items()} for _ in range(rounds)]
        for server in servers:
            found[server].append(median([figures[server] for figures in runs]))
    rows = [[name, *(f"{f.rate / 1000:.1f} ({f.cpu:.2f})" for f in figures)] for name, figures in found.items()]
    for name, figures in found.items():
        if name != RIVAL:
            ratios = [
                against(f.rate / r.rate, FASTER if depth == TARGET_DEPTH else None)
                for depth, f, r in zip(DEPTHS, figures, found[RIVAL], strict=True)
            ]
            rows.append([f"{name} / nbdkit", *ratios])
    reached = {name: figures[DEPTHS.index(TARGET_DEPTH)].rate / 1000 for name, figures in found.items()}
    verb = "writes" if pattern == "randwrite" else "reads"
    rates = {name: [f.rate / 1000 for f in figures] for name, figures in found.items()}
    text = [
        f"### 4 KiB {verb}, thousands per second (µs of processor time for each), by depth",
        table(["server", *map(str, DEPTHS)], rows),
        f"Thousands per second on one core at depth {TARGET_DEPTH}, `async def`: "
        + against(reached["ours, async def"], RATE / 1000),
        plot(f"native-{verb}", f"4 KiB {verb}", DEPTHS, rates, x_label="depth", y_label="thousands/s"),
    ]
    rates_of_ours = {name: reached[f"ours, {name}"] for name in ("async def", "def")}
    said = " and ".join(
        f"{rate:.0f},000 with `{name}` ({rate / reached[RIVAL]:.1f} times as many)"
        for name, rate in rates_of_ours.items()
    )
    return text, f"4 KiB {verb}: {said}, {reached[RIVAL]:.0f},000 with nbdkit's plugin"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter and fewer rounds")
    parser.add_argument("--write", action="store_true", help="put the figures into bench/RESULTS.md")
    arguments = parser.parse_args()
    seconds, rounds = (0.5, 3) if arguments.quick else (1.5, 5)
    text = [stated(rounds=f"{rounds} of {seconds} s each, in turn, medians", disk=f"{SIZE >> 20} MiB")]
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "ram.py").write_text(PLUGIN)
        command = ["nbdkit", "-f", "-U", "SOCKET", "python", str(directory / "ram.py")]
        theirs = luks.over_nbd(directory / "socket", *command, size=SIZE)
        found = [compare(pattern, theirs, seconds, rounds) for pattern in ("randread", "randwrite")]
    for described, _ in found:
        text += described
    compared = "; ".join(said for _, said in found)
    claim = (
        f"A RAM disk in Python, commands per second at depth {TARGET_DEPTH} on one core, against nbdkit's Python "
        f"plugin on a Unix socket. {compared}. The transports differ: ours is the simulated kernel, in the same thread."
    )
    publish("bench.native", "\n\n".join(text), write=arguments.write, elsewhere={README: claims([claim])})


if __name__ == "__main__":
    main()
