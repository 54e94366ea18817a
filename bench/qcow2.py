"""The compressed disk beside `qemu-nbd`, on the same data in one run: an ext4 file system with part of /usr.

    python -m bench.qcow2 [--quick | --levels] [--directory /var/tmp] [--write]

**The transports differ.** `zstd:` is driven through the simulated ring, by a native thread that is the initiator and
the kernel, copies included; `qemu-nbd` by fio through a Unix socket, in processes of their own. The processor time per
command is of the peers that of the server alone, of ours that of everything. `qemu-img bench` is QEMU without any
transport: reads at strides, as it has no random ones.

What is written is data of the same file system from elsewhere in it. Overwrites are timed until they are durable and
compressed: a flush and the close of the image are in the time. Everything is in the page cache, and no image has dirty
pages there when its time begins. The servers take turns, round by round.

Needs fio with its nbd engine, qemu-utils and e2fsprogs. `--write` puts the figures into bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

from tcmu_rs.handlers.qcow2 import Qcow2Handler
from tcmu_rs.handlers.qcow2.tools import create

from . import generator
from .generator import FLUSH, drive, served
from .report import publish, stated, table

KIB, MIB = 1 << 10, 1 << 20
LEVELS = (1, 2, 3, 9)
BIG = 16 << 40
TREES = ("/usr/bin", "/usr/lib/python3", "/usr/include", "/usr/share/perl", "/usr/share/doc")


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
class Load:
    """Commands for a disk.

    Attributes:
        requests: In this order.
        depth: How many are outstanding at a time.
        seconds: Begin again until the time is over.
        count: Operations that they are; by default one each.
    """

    requests: Sequence[generator.Request]
    depth: int
    seconds: float | None = None
    count: int | None = None


@dataclass(frozen=True)
class Figure:
    """Operations per second, and microseconds of processor time for each."""

    rate: float
    cpu: float


class Report:
    """Text that is printed as it comes, and what is to be judged in the end."""

    def __init__(self) -> None:
        self.parts: list[str] = []
        self.medians: dict[tuple[str, str], float] = {}
        self.verdicts: list[tuple[str, float, str, float]] = []

    def say(self, text: str) -> None:
        """Adds a paragraph."""
        print(text, end="\n\n", flush=True)
        self.parts.append(text)

    def pattern(
        self, title: str, unit: float, name: str, rounds: int, servers: Mapping[str, Callable[[], Figure]]
    ) -> None:
        """Measures one pattern with every server, in turn; the first one is ours."""
        figures: dict[str, list[Figure]] = {server: [] for server in servers}
        for _ in range(rounds):
            for server, run in servers.items():
                figures[server].append(run())
        rows: list[list[object]] = []
        ours = statistics.median(figure.rate for figure in next(iter(figures.values())))
        for server, runs in figures.items():
            rates = sorted(figure.rate for figure in runs)
            median, cpu = statistics.median(rates), min(figure.cpu for figure in runs)
            self.medians[title, server] = median
            shown = [f"{rate * unit:,.0f}" for rate in (median, rates[0], rates[-1])]
            rows.append([server, *shown, f"{cpu:.1f}", "" if server in (OURS,) else f"{ours / median:.2f} x"])
        self.say(f"### {title}")
        self.say(table(["server", name, "lowest", "highest", "µs of CPU each", "ours is"], rows))

    def compare(self, title: str, peer: str, least: float) -> None:
        """Ours has to be so many times as fast."""
        ratio = self.medians[title, OURS] / self.medians[title, peer]
        self.verdicts.append((f"{title}: times {peer}", ratio, "≥", least))

    def judge(self, what: str, found: float, sign: str, bound: float) -> None:
        """A figure has to be at least, or at most, so large."""
        self.verdicts.append((what, found, sign, bound))

    def verdict(self) -> None:
        """Which targets were met."""
        rows: list[list[object]] = []
        for what, found, sign, bound in self.verdicts:
            met = found >= bound if sign == "≥" else found <= bound
            rows.append([what, f"{found:.2f}", f"{sign} {bound:g}", "met" if met else "**missed**"])
        self.say("### The targets")
        self.say(table(["what", "found", "target", ""], rows))


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


async def _measure(image: Path, load: Load, warm: int = 0, level: int | None = None) -> Figure:
    """Does work on an image; after writes a flush and the close count, the opening never does."""
    start = cpu = 0.0
    count = 0
    async with served(Qcow2Handler(image, compress=True, level=level)) as kernel:
        await drive(kernel, [generator.read(offset, 256 * KIB) for offset in range(0, warm, 256 * KIB)], 4)
        start, cpu = time.perf_counter(), time.process_time()
        done = await drive(kernel, load.requests, load.depth, load.seconds)
        count = load.count or done
        if warm:
            return _figure(count, start, cpu)
    return _figure(count, start, cpu)


def _figure(count: int, start: float, cpu: float) -> Figure:
    return Figure(count / (time.perf_counter() - start), (time.process_time() - cpu) / count * 1e6)


def reads(size: int, depth: int, seconds: float) -> Load:
    """4 KiB from anywhere."""
    choose = random.Random(5).randrange
    return Load([generator.read(choose(size // 4096) * 4096, 4096) for _ in range(50_000)], depth, seconds)


def reads_in_order(size: int, depth: int, seconds: float) -> Load:
    """256 KiB after 256 KiB."""
    return Load([generator.read(offset, 256 * KIB) for offset in range(0, size, 256 * KIB)], depth, seconds)


def writes(data: memoryview, places: list[int], depth: int, *, flush: bool = False) -> Load:
    """Writes 4 KiB to each place, of the data that is some way on in the file system; flushes each time, or once."""
    requests: list[generator.Request] = []
    for place in places:
        source = (place + len(data) // 3 // 4096 * 4096) % len(data)
        requests.append(generator.write(place, bytes(data[source : source + 4096])))
        if flush:
            requests.append(FLUSH)
    return Load([*requests, FLUSH], depth, count=len(places))


def fills(data: memoryview) -> Load:
    """Writes all of the file system in order, but for what is zero; counts MiB."""
    zeroes = bytes(256 * KIB)
    parts = ((offset, bytes(data[offset : offset + 256 * KIB])) for offset in range(0, len(data), 256 * KIB))
    requests = [generator.write(offset, part) for offset, part in parts if part != zeroes]
    return Load([*requests, FLUSH], 4, count=len(data) >> 20)


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

OURS = "ours, 8 KiB"
NBD8, NBD64, RAW = "qemu-nbd, 8 KiB", "qemu-nbd, 64 KiB", "qemu-nbd, raw"
CONVERT8, CONVERT64 = "qemu-img convert -c -m 1, 8 KiB", "qemu-img convert -c -m 1, 64 KiB"
BULK = "Bulk write of the file system"
READ = "4 KiB random read, depth 32"
IN_ORDER = "256 KiB sequential read, depth 8"
OVERWRITE = "4 KiB random overwrite, depth 32, until it is durable (ours: and compressed)"
FLUSHED = "4 KiB random write and flush, depth 1"


class Images:
    """The same data as a file system, in an image of ours, and in two of QEMU's."""

    def __init__(self, directory: Path, plan: Plan) -> None:
        self.plan = plan
        self.raw, self.ours, self.peer8, self.peer64 = (directory / name for name in ("raw", "ours", "8k", "64k"))
        self.scratch = directory / "scratch"
        make_raw(self.raw, plan.size)
        self.data = memoryview(self.raw.read_bytes())
        self.used = self.raw.stat().st_blocks * 512
        self._choose = random.Random(7)

    def places(self, count: int) -> list[int]:
        """Random ones, of 4 KiB."""
        return [self._choose.randrange(self.plan.size // 4096) * 4096 for _ in range(count)]

    def everywhere(self) -> list[int]:
        """Each place once, in a random order."""
        count = self.plan.size // 4096
        return [place * 4096 for place in self._choose.sample(range(count), count)]

    def fill(self) -> Figure:
        self.ours.unlink(missing_ok=True)
        create(self.ours, self.plan.size, cluster_size=8 * KIB)
        return trio.run(_measure, self.ours, fills(self.data))

    def convert(self, image: Path, cluster_size: int) -> Figure:
        image.unlink(missing_ok=True)
        start, before = time.perf_counter(), os.times()
        convert(self.raw, image, cluster_size)
        # Ours is timed until it is durable.
        run("sync", image)
        after, mib = os.times(), self.plan.size >> 20
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        return Figure(mib / (time.perf_counter() - start), cpu / mib * 1e6)

    def copy(self, image: Path) -> Path:
        """To write to. It is durable, so that the first flush has nothing of it to write."""
        shutil.copyfile(image, self.scratch)
        run("sync", self.scratch)
        return self.scratch

    def overwrite(self, places: list[int], depth: int, *, flush: bool = False) -> Figure:
        return trio.run(_measure, self.copy(self.ours), writes(self.data, places, depth, flush=flush))

    def peer(self, image: Path, form: str, count: int, depth: int, *options: str) -> Figure:
        job = ["--rw=randwrite", "--bs=4k", f"--iodepth={depth}", f"--number_ios={count}", f"--io_size={count * 4096}"]
        return fio(self.copy(image), form, self.plan.size, *job, *options, warm=False)


def measure(directory: Path, plan: Plan, report: Report) -> None:
    """All of it."""
    images = Images(directory, plan)
    size, seconds, rounds = plan.size, plan.seconds, plan.rounds
    ours, peer8, peer64 = images.ours, images.peer8, images.peer64
    report.say(
        stated(
            data=f"ext4 of {size >> 20} MiB with {', '.join(TREES)}",
            runs=f"{rounds} of {seconds} s, or {plan.writes:,} writes, in turn, medians",
            QEMU=run("qemu-img", "--version").splitlines()[0],
            transports="ours the simulated ring, driven by a native thread; qemu-nbd a Unix socket, driven by fio",
        )
    )
    report.pattern(
        BULK, 1, "MiB/s", rounds,
        {
            OURS: images.fill,
            CONVERT8: lambda: images.convert(peer8, 8 * KIB),
            CONVERT64: lambda: images.convert(peer64, 64 * KIB),
        },
    )  # fmt: skip
    report.compare(BULK, CONVERT8, 2)
    run("qemu-img", "check", "-q", ours)
    run("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", images.raw, ours)
    sizes = {OURS: space(ours), CONVERT8: space(peer8), CONVERT64: space(peer64)}
    shown = {"the data, without holes": images.used, **sizes}
    rows = [[name, f"{taken / MIB:.1f}", f"{taken / sizes[CONVERT64]:.3f}"] for name, taken in shown.items()]
    report.say(table(["fresh image", "MiB", "of `convert -c` at 64 KiB"], rows))
    report.judge("Fresh image: parts of `qemu-img convert -c` at 64 KiB", sizes[OURS] / sizes[CONVERT64], "≤", 1.1)

    timed = ["--time_based", f"--runtime={round(seconds * 1000)}ms"]
    random_read = ["--rw=randread", "--bs=4k", "--iodepth=32", *timed]
    report.pattern(
        READ, 1, "per second", rounds,
        {
            OURS: lambda: trio.run(_measure, ours, reads(size, 32, seconds), size),
            NBD64: lambda: fio(peer64, "qcow2", size, *random_read),
            NBD8: lambda: fio(peer8, "qcow2", size, *random_read),
            "qemu-img bench, 64 KiB, no transport": lambda: qemu_img_bench(peer64, size, plan.writes),
            "qemu-img bench, 8 KiB, no transport": lambda: qemu_img_bench(peer8, size, plan.writes),
        },
    )  # fmt: skip
    report.compare(READ, NBD64, 4)
    report.compare(READ, NBD8, 2.5)
    in_order = ["--rw=read", "--bs=256k", "--iodepth=8", *timed]
    report.pattern(
        IN_ORDER, 0.25, "MiB/s", rounds,
        {
            OURS: lambda: trio.run(_measure, ours, reads_in_order(size, 8, seconds), size),
            NBD64: lambda: fio(peer64, "qcow2", size, *in_order),
            NBD8: lambda: fio(peer8, "qcow2", size, *in_order),
        },
    )  # fmt: skip
    report.compare(IN_ORDER, NBD64, 1)
    report.pattern(
        OVERWRITE, 1, "per second", rounds,
        {
            OURS: lambda: images.overwrite(images.places(plan.writes), 32),
            NBD8: lambda: images.peer(peer8, "qcow2", plan.writes, 32, "--end_fsync=1"),
            NBD64: lambda: images.peer(peer64, "qcow2", plan.writes, 32, "--end_fsync=1"),
        },
    )  # fmt: skip
    report.compare(OVERWRITE, NBD8, 3)
    count = plan.writes // 6
    report.pattern(
        FLUSHED, 1, "per second", rounds,
        {
            OURS: lambda: images.overwrite(images.places(count), 1, flush=True),
            NBD64: lambda: images.peer(peer64, "qcow2", count, 1, "--fsync=1"),
            NBD8: lambda: images.peer(peer8, "qcow2", count, 1, "--fsync=1"),
            RAW: lambda: images.peer(images.raw, "raw", count, 1, "--fsync=1"),
        },
    )  # fmt: skip
    report.compare(FLUSHED, NBD64, 2.5)
    report.compare(FLUSHED, RAW, 1)

    images.overwrite(images.everywhere(), 32)
    run("qemu-img", "check", "-q", images.scratch)
    ours_after = space(images.scratch)
    images.peer(peer8, "qcow2", size // 4096, 32, "--end_fsync=1")
    theirs = space(images.scratch)
    rows = [
        [OURS, f"{ours_after / MIB:.1f}", f"{images.used / ours_after:.2f} x"],
        [f"{NBD8}, as many writes, at random places", f"{theirs / MIB:.1f}", f"{images.used / theirs:.2f} x"],
    ]
    report.say(table(["after overwriting everything, at random", "MiB", "raw is larger by"], rows))
    report.judge("After overwriting everything: raw over ours", images.used / ours_after, "≥", 1.9)
    measure_big(directory / "big", report)


def levels(directory: Path, report: Report) -> None:
    """What levels and cluster sizes gain and cost, on 64 MiB of the same data: `--levels`."""
    size = 64 * MIB
    raw, image = directory / "raw", directory / "image"
    make_raw(raw, size)
    data = memoryview(raw.read_bytes())
    used = raw.stat().st_blocks * 512
    report.say(stated(data=f"ext4 of {size >> 20} MiB with {', '.join(TREES)}", runs="one of each, processor time"))
    rows: list[list[object]] = []
    for cluster_size in (4 * KIB, 8 * KIB, 16 * KIB, 64 * KIB):
        for level in LEVELS:
            image.unlink(missing_ok=True)
            create(image, size, cluster_size=cluster_size)
            written = trio.run(_measure, image, fills(data), 0, level)
            read = trio.run(_measure, image, reads(size, 32, 0.5), size)
            speed = used / (written.cpu / 1e6 * (size >> 20)) / 1e6
            rows.append(
                [
                    f"{cluster_size >> 10} KiB",
                    level,
                    f"{used / space(image):.3f}",
                    f"{speed:.0f} MB/s",
                    f"{read.cpu:.1f} µs",
                ]
            )
    report.say(
        table(["clusters", "level", "raw is larger by", "written, per s of CPU", "4 KiB random read, CPU"], rows)
    )


def space(image: Path) -> int:
    """Bytes that a file takes."""
    return image.stat().st_blocks * 512


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
    print(before, opened, at_open - before, most - before)

trio.run(main)
"""


def measure_big(image: Path, report: Report) -> None:
    """Memory and time of opening, at 16 TiB, each in a process of its own; twice, for the second has tables to read."""
    create(image, BIG, cluster_size=8 * KIB)
    rows: list[list[object]] = []
    slowest = largest = 0.0
    for name in ("empty", "with 10,000 clusters all over it"):
        output = run(sys.executable, "-c", BIG_PROGRAM, image, 20_000).split()
        base, opened, at_open, most = map(float, output)
        shown = [f"{bytes_ / MIB:.0f} MiB" for bytes_ in (base, at_open, most)]
        rows.append([name, f"{opened * 1000:.0f} ms", *shown])
        slowest, largest = max(slowest, opened), max(largest, most / MIB)
    report.say(
        table(["16 TiB, clusters of 8 KiB", "opened in", "process before", "grown by, open", "grown by, at most"], rows)
    )
    report.say("The most is that of 20,000 random reads and writes and of the flush behind them, sampled all along.")
    report.judge("16 TiB: seconds to open", slowest, "≤", 1)
    report.judge("16 TiB: MiB that the process grows by", largest, "≤", 64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="less of everything: two minutes")
    parser.add_argument("--directory", default="/var/tmp")
    parser.add_argument("--write", action="store_true", help="put the figures into bench/RESULTS.md")
    parser.add_argument("--levels", action="store_true", help="what levels and cluster sizes gain and cost, alone")
    arguments = parser.parse_args()
    for program in ("qemu-img", "qemu-nbd", "fio", "mke2fs"):
        if shutil.which(program) is None:
            sys.exit(f"{program} is missing: apt-get install qemu-utils fio e2fsprogs")
    plan = Plan(192 * MIB, 1.0, 1, 6_000) if arguments.quick else Plan(256 * MIB, 1.5, 3, 12_000)
    report = Report()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        if arguments.levels:
            levels(Path(name), report)
            return
        measure(Path(name), plan, report)
    report.verdict()
    if arguments.write:
        publish("bench.qcow2", "\n\n".join(report.parts), write=True)


if __name__ == "__main__":
    main()
