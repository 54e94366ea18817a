"""The compressed disk beside `qemu-nbd`, on the same data in one run: an ext4 file system with part of /usr.

    python -m bench.qcow2 [--quick] [--directory /var/tmp] [--write]

**The transports differ.** `zstd:` is driven through the simulated ring by a generator in the same Python process, whose
own time is in the figures; `qemu-nbd` by fio through a Unix socket, in processes of their own. So the processor time
per command is to be compared first: of the peers that of the server alone, of ours that of everything. `qemu-img bench`
is QEMU without any transport: reads at strides, as it has no random ones.

What is written is data of the same file system from elsewhere in it. Overwrites are timed until they are durable and
compressed: a flush and the close of the image are in the time. Everything is in the page cache.

Needs fio with its nbd engine, qemu-utils and e2fsprogs. `--write` puts the table into bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from tcmu_rs.handlers.qcow2 import Qcow2Handler
from tcmu_rs.handlers.qcow2.tools import create
from tcmu_rs.testing import SimulatedDisk, simulated

from .conditions import conditions

KIB, MIB = 1 << 10, 1 << 20
BIG = 16 << 40
TREES = ("/usr/bin", "/usr/lib/python3", "/usr/include", "/usr/share/perl", "/usr/share/doc")
RESULTS = Path(__file__).with_name("RESULTS.md")


@dataclass(frozen=True)
class Plan:
    """How much is measured.

    Attributes:
        size: Bytes of the file system.
        seconds: Of each timed run.
        rounds: Runs of which the median is shown.
        writes: Random overwrites in a run.
    """

    size: int
    seconds: float
    rounds: int
    writes: int


@dataclass(frozen=True)
class Figure:
    """Operations per second, and microseconds of processor time for each."""

    rate: float
    cpu: float


class Table:
    """Rows that are printed as they come, and kept."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, line: str = "") -> None:
        print(line, flush=True)
        self.lines.append(line)

    def rows(self, title: str, unit: float, name: str, figures: dict[str, list[Figure]]) -> None:
        """One pattern: every server, and how many times as fast the first one is."""
        self.say(f"\n### {title}\n\n| server | {name} | lowest | highest | µs of CPU each | ours is |")
        self.say("| --- | ---: | ---: | ---: | ---: | ---: |")
        ours = statistics.median(figure.rate for figure in next(iter(figures.values())))
        for server, runs in figures.items():
            rates = sorted(figure.rate for figure in runs)
            median, cpu = statistics.median(rates), min(figure.cpu for figure in runs)
            shown = " | ".join(f"{rate * unit:,.0f}" for rate in (median, rates[0], rates[-1]))
            ratio = "" if server == next(iter(figures)) else f"{ours / median:.2f} x"
            self.say(f"| {server} | {shown} | {cpu:.1f} | {ratio} |")


# Data.


def make_raw(path: Path, size: int) -> None:
    """Makes a file system with files of this machine in it, about three quarters full."""
    with tempfile.TemporaryDirectory(dir=path.parent) as name:
        root, room = Path(name), size * 3 // 4
        for tree in map(Path, TREES):
            for source in sorted(tree.rglob("*")):
                if room > 0 and source.is_file() and not source.is_symlink():
                    target = root / source.relative_to("/")
                    target.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(source, target)
                    room -= source.stat().st_size + 4096
        run("mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-d", root, path, f"{size >> 10}k")


def run(*command: object) -> str:
    return subprocess.run([str(word) for word in command], check=True, capture_output=True, text=True).stdout


def convert(raw: Path, image: Path, cluster_size: int) -> None:
    options = f"compression_type=zstd,cluster_size={cluster_size}"
    run("qemu-img", "convert", "-c", "-m", "1", "-f", "raw", "-O", "qcow2", "-o", options, raw, image)


# Ours, on the simulator.


def zstd(image: Path) -> Qcow2Handler:
    return Qcow2Handler(image, compress=True)


async def _measure(handler: Qcow2Handler, work: Callable[[SimulatedDisk], Awaitable[int]], warm: int = 0) -> Figure:
    """Runs something that returns how many operations it did; the close of the disk counts, its opening does not."""
    start = cpu = 0.0
    count = 0
    async with simulated(handler, checks=False) as disk:
        for offset in range(0, warm, MIB):
            await disk.read(offset, MIB)
        start, cpu = time.perf_counter(), time.process_time()
        count = await work(disk)
        if not warm:
            await disk.flush()
    return Figure(count / (time.perf_counter() - start), (time.process_time() - cpu) / count * 1e6)


def reads(
    length: int, depth: int, seconds: float, *, sequential: bool = False
) -> Callable[[SimulatedDisk], Awaitable[int]]:
    async def work(disk: SimulatedDisk) -> int:
        blocks, count, done = disk.size // length, length // disk.block_size, 0
        choose = random.Random(5).randrange
        end = time.perf_counter() + seconds

        async def load() -> None:
            nonlocal done
            while time.perf_counter() < end:
                block = done % blocks if sequential else choose(blocks)
                done += 1
                cdb = struct.pack(">BBQLBB", 0x88, 0, block * count, count, 0, 0)
                reply = await disk.scsi(cdb, data_in=length)
                assert reply.status == 0

        async with trio.open_nursery() as nursery:
            for _ in range(depth):
                nursery.start_soon(load)
        return done

    return work


def writes(
    raw: Path, places: list[int], depth: int, *, flush: bool = False
) -> Callable[[SimulatedDisk], Awaitable[int]]:
    """Writes 4 KiB to each place, of the data that is some way on in the file system."""

    async def work(disk: SimulatedDisk) -> int:
        rest = iter(places)
        fd = os.open(raw, os.O_RDONLY)

        async def load() -> None:
            for place in rest:
                await disk.write(place, os.pread(fd, 4096, (place + disk.size // 3) % disk.size))
                if flush:
                    await disk.flush()

        async with trio.open_nursery() as nursery:
            for _ in range(depth):
                nursery.start_soon(load)
        os.close(fd)
        return len(places)

    return work


def fills(raw: Path) -> Callable[[SimulatedDisk], Awaitable[int]]:
    """Writes all of the file system in order, but for what is zero; counts MiB."""

    async def work(disk: SimulatedDisk) -> int:
        rest = iter(range(0, disk.size, 256 * KIB))
        zeroes = bytes(256 * KIB)
        fd = os.open(raw, os.O_RDONLY)

        async def load() -> None:
            for offset in rest:
                data = os.pread(fd, 256 * KIB, offset)
                if data != zeroes:
                    await disk.write(offset, data)

        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(load)
        os.close(fd)
        return disk.size >> 20

    return work


# QEMU, over NBD.


@contextmanager
def qemu_nbd(image: Path, form: str) -> Iterator[tuple[str, int]]:
    """Serves an image; yields its URI and the process."""
    socket = image.parent / "socket"
    socket.unlink(missing_ok=True)
    process = subprocess.Popen(
        ["qemu-nbd", "-t", "-k", str(socket), "-f", form, "--cache=writeback", "--aio=threads", str(image)]
    )
    try:
        while not socket.exists():
            assert process.poll() is None, "qemu-nbd has ended"
            time.sleep(0.02)
        yield f"nbd+unix:///?socket={socket}", process.pid
    finally:
        process.terminate()
        process.wait()


def cpu_of(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def fio(image: Path, form: str, size: int, *options: str, warm: bool = True) -> Figure:
    """Runs a job of fio's against qemu-nbd."""
    with qemu_nbd(image, form) as (uri, pid):
        job = ["fio", "--name=x", "--ioengine=nbd", f"--uri={uri}", f"--size={size}", "--norandommap"]
        if warm:
            run(*job, "--rw=read", "--bs=1M", "--iodepth=4")
        before = cpu_of(pid)
        output = run(*job, "--randrepeat=1", "--output-format=json", *options)
        found = json.loads(output[output.index("{") :])["jobs"][0]
        side = found["read"] if found["read"]["total_ios"] else found["write"]
        return Figure(side["iops"], (cpu_of(pid) - before) / side["total_ios"] * 1e6)


def qemu_img_bench(image: Path, size: int, count: int) -> Figure:
    """4 KiB reads at depth 32 in QEMU's own process: at a stride that soon has been everywhere."""
    stride = (size // 4096 // 2 - 1) // 2 * 2 * 4096 + 4096 + 8192
    before = os.times()
    output = run("qemu-img", "bench", "-f", "qcow2", "-c", count, "-d", 32, "-s", 4096, "-S", stride, image)
    after = os.times()
    seconds = float(output.rpartition("Run completed in ")[2].split()[0])
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return Figure(count / seconds, cpu / count * 1e6)


# The patterns.


def measure(directory: Path, plan: Plan, table: Table) -> None:
    raw = directory / "raw"
    make_raw(raw, plan.size)
    size = plan.size
    table.say("\n".join(f"- {key}: {value}" for key, value in conditions().items()))
    table.say(f"- data: ext4 of {size >> 20} MiB with {', '.join(TREES)}")
    qemu = run("qemu-img", "--version").splitlines()[0]
    table.say(f"- runs: {plan.rounds} of {plan.seconds} s, or {plan.writes:,} writes; {qemu}")
    table.say(
        "- transports: ours the simulated ring, in the generator's process; qemu-nbd a Unix socket, driven by fio"
    )
    ours, peer8, peer64 = directory / "ours", directory / "qemu-8k", directory / "qemu-64k"
    figures: dict[str, list[Figure]] = {
        "ours, 8 KiB": [],
        "qemu-img convert -c -m 1, 8 KiB": [],
        "the same, 64 KiB": [],
    }
    for _ in range(plan.rounds):
        ours.unlink(missing_ok=True)
        create(ours, size, cluster_size=8 * KIB)
        figures["ours, 8 KiB"].append(trio.run(_measure, zstd(ours), fills(raw)))
        for name, image, cluster in zip(list(figures)[1:], (peer8, peer64), (8 * KIB, 64 * KIB), strict=True):
            start, before = time.perf_counter(), os.times()
            convert(raw, image, cluster)
            after = os.times()
            cpu = after.children_user + after.children_system - before.children_user - before.children_system
            mib = size >> 20
            figures[name].append(Figure(mib / (time.perf_counter() - start), cpu / mib * 1e6))
    run("qemu-img", "check", "-q", ours)
    run("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", raw, ours)
    table.rows("Bulk write of the file system", 1, "MiB/s", figures)
    used = raw.stat().st_blocks * 512
    sizes = {path: path.stat().st_blocks * 512 for path in (ours, peer8, peer64)}
    table.say("\n| fresh image | MiB | of `convert -c` at 64 KiB |\n| --- | ---: | ---: |")
    table.say(f"| the data, without holes | {used / MIB:.0f} | {used / sizes[peer64]:.3f} |")
    for name, path in zip(figures, sizes, strict=True):
        table.say(f"| {name} | {sizes[path] / MIB:.0f} | {sizes[path] / sizes[peer64]:.3f} |")

    def pattern(title: str, unit: float, name: str, runs: dict[str, Callable[[], Figure]]) -> None:
        table.rows(title, unit, name, {server: [one() for _ in range(plan.rounds)] for server, one in runs.items()})

    timed = ["--time_based", f"--runtime={plan.seconds}"]
    random_read = ["--rw=randread", "--bs=4k", "--iodepth=32", *timed]
    pattern(
        "4 KiB random read, depth 32", 1, "per second",
        {
            "ours, 8 KiB": lambda: trio.run(_measure, zstd(ours), reads(4096, 32, plan.seconds), size),
            "qemu-nbd, 64 KiB": lambda: fio(peer64, "qcow2", size, *random_read),
            "qemu-nbd, 8 KiB": lambda: fio(peer8, "qcow2", size, *random_read),
            "qemu-img bench, 64 KiB, no transport": lambda: qemu_img_bench(peer64, size, plan.writes),
            "qemu-img bench, 8 KiB, no transport": lambda: qemu_img_bench(peer8, size, plan.writes),
        },
    )  # fmt: skip
    in_order = reads(256 * KIB, 8, plan.seconds, sequential=True)
    pattern(
        "256 KiB sequential read, depth 8", 0.25, "MiB/s",
        {
            "ours, 8 KiB": lambda: trio.run(_measure, zstd(ours), in_order, size),
            "qemu-nbd, 64 KiB": lambda: fio(peer64, "qcow2", size, "--rw=read", "--bs=256k", "--iodepth=8", *timed),
            "qemu-nbd, 8 KiB": lambda: fio(peer8, "qcow2", size, "--rw=read", "--bs=256k", "--iodepth=8", *timed),
        },
    )  # fmt: skip

    choose = random.Random(7)
    scratch = directory / "scratch"

    def copied(image: Path) -> Path:
        shutil.copyfile(image, scratch)
        return scratch

    def overwrite(count: int, depth: int, flush: bool) -> Figure:
        places = [choose.randrange(size // 4096) * 4096 for _ in range(count)]
        return trio.run(_measure, zstd(copied(ours)), writes(raw, places, depth, flush=flush))

    def peer(image: Path, form: str, count: int, depth: int, *options: str) -> Figure:
        job = ["--rw=randwrite", "--bs=4k", f"--iodepth={depth}", f"--number_ios={count}", f"--io_size={count * 4096}"]
        return fio(copied(image), form, size, *job, *options, warm=False)

    pattern(
        "4 KiB random overwrite, depth 32, until it is durable (ours: and compressed)", 1, "per second",
        {
            "ours, 8 KiB": lambda: overwrite(plan.writes, 32, False),
            "qemu-nbd, 8 KiB": lambda: peer(peer8, "qcow2", plan.writes, 32, "--end_fsync=1"),
            "qemu-nbd, 64 KiB": lambda: peer(peer64, "qcow2", plan.writes, 32, "--end_fsync=1"),
        },
    )  # fmt: skip
    count = max(plan.writes // 20, 500)
    pattern(
        "4 KiB random write and flush, depth 1", 1, "per second",
        {
            "ours, 8 KiB": lambda: overwrite(count, 1, True),
            "qemu-nbd, 64 KiB": lambda: peer(peer64, "qcow2", count, 1, "--fsync=1"),
            "qemu-nbd, 8 KiB": lambda: peer(peer8, "qcow2", count, 1, "--fsync=1"),
            "qemu-nbd, raw": lambda: peer(raw, "raw", count, 1, "--fsync=1"),
        },
    )  # fmt: skip

    everything = [place * 4096 for place in choose.sample(range(size // 4096), size // 4096)]
    trio.run(_measure, zstd(copied(ours)), writes(raw, everything, 32))
    run("qemu-img", "check", "-q", scratch)
    ours_after = scratch.stat().st_blocks * 512
    peer(peer8, "qcow2", 2 * size // 4096, 32, "--end_fsync=1")
    theirs = scratch.stat().st_blocks * 512
    table.say("\n| after overwriting everything, at random | MiB | raw is larger by |\n| --- | ---: | ---: |")
    table.say(f"| ours, 8 KiB | {ours_after / MIB:.0f} | {used / ours_after:.2f} x |")
    table.say(
        f"| qemu-nbd, 8 KiB (twice as many writes, at random places) | {theirs / MIB:.0f} | {used / theirs:.2f} x |"
    )
    measure_big(directory / "big", table)


BIG_PROGRAM = """
import random, re, sys, time, trio
from pathlib import Path
from tcmu_rs import IoVec
from tcmu_rs.handlers.qcow2 import Qcow2Handler

def rss():
    return int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) << 10

async def main():
    before, start = rss(), time.perf_counter()
    async with Qcow2Handler(sys.argv[1], compress=True) as disk:
        opened, random_places = time.perf_counter() - start, random.Random(1)
        at_open = rss()
        most = 0
        data = bytearray(random_places.randbytes(2048) + bytes(2048))
        for number in range(int(sys.argv[2])):
            place = random_places.randrange(disk.size // 4096) * 4096
            if number % 2:
                await disk.write(place, IoVec([data]))
            else:
                await disk.read(place, IoVec([bytearray(4096)]))
            if number % 500 == 0:
                most = max(most, rss())
        await disk.flush()
        most = max(most, rss())
    print(opened, at_open - before, most - before)

trio.run(main)
"""


def measure_big(image: Path, table: Table) -> None:
    """Memory and time of opening, at 16 TiB, each in a process of its own; twice, for the second has tables to read."""
    create(image, BIG, cluster_size=8 * KIB)
    table.say(
        "\n| 16 TiB, clusters of 8 KiB | opened in | memory when open | most, in 20,000 random reads and writes |"
    )
    table.say("| --- | ---: | ---: | ---: |")
    for name in ("empty", "with 10,000 clusters all over it"):
        output = run(sys.executable, "-c", BIG_PROGRAM, image, 20_000).split()
        opened, at_open, most = map(float, output)
        table.say(f"| {name} | {opened * 1000:.0f} ms | {at_open / MIB:.0f} MiB | {most / MIB:.0f} MiB |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less of everything: two minutes")
    parser.add_argument("--directory", default="/var/tmp")
    parser.add_argument("--write", action="store_true", help="put the table into bench/RESULTS.md")
    arguments = parser.parse_args()
    for program in ("qemu-img", "qemu-nbd", "fio", "mke2fs"):
        if shutil.which(program) is None:
            sys.exit(f"{program} is missing: apt-get install qemu-utils fio e2fsprogs")
    plan = Plan(192 * MIB, 1.0, 1, 10_000) if arguments.quick else Plan(512 * MIB, 3.0, 3, 40_000)
    table = Table()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        measure(Path(name), plan, table)
    if arguments.write:
        save("\n".join(table.lines), "python -m bench.qcow2" + (" --quick" if arguments.quick else ""))


def save(text: str, command: str) -> None:
    """Replaces what an earlier run has left in RESULTS.md."""
    title = "## `python -m bench.qcow2"
    before, found, rest = RESULTS.read_text().partition(title)
    _, more, behind = rest.partition("\n## ") if found else ("", "", "")
    section = f"## `{command}`\n\n{text.strip()}\n"
    RESULTS.write_text(f"{before.rstrip()}\n\n{section}" + (f"\n## {behind}" if more else ""))


if __name__ == "__main__":
    main()
