"""Servers that are killed, upgraded, resized and swapped under load, for as long as one likes; nothing is lost.

Three disks. On the first fio writes and verifies at depth 32; the second has a file system, to which trees are copied
and compared; both are served by `tcmu-rs attach --supervise`, whose servers are killed and upgraded at random moments.
The third is served by a program that replaces its handler all the time. All three grow and shrink behind what is in
use, and some servers are killed in the middle of that. On each, small direct writes are timed: the longest is the
longest pause, and each that was acknowledged has to be there at the end.

What makes the load pauses, and has a lower priority than what serves it: the lab's processors are slow, and what is to
be seen is what the servers do, and not who gets the processor.

`python -m tests.soak` runs it in the lab.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import trio

from tcmu_rs import _devices, _resize, _upgrade

from .disks import CHECK_FILE_SYSTEM, MAKE_FILE_SYSTEM, MIB, REAL_TREES, TCMU_RS, KernelLog, checksums

SIZE = 96 * MIB
PROBED = 4 * MIB
"""Bytes at the end of each disk that only the probe uses."""
BLOCK = 4096

SWAPPING = """
import sys, trio
from tcmu_rs import attach
from tcmu_rs.handlers.file import FileHandler

async def main(image, size):
    swaps = 0
    async with attach(FileHandler(image), "swapped") as device:
        print(device.path, flush=True)
        while True:
            with trio.move_on_after(0.7):
                await trio.lowlevel.wait_readable(sys.stdin)
                break
            await device.replace(FileHandler(image))
            swaps += 1
            await device.resize(size + (swaps % 2 << 20), shrink=True)
    print(swaps, flush=True)

trio.run(main, sys.argv[1], int(sys.argv[2]))
"""


@dataclass
class Report:
    """What has happened.

    Attributes:
        kills: Servers killed.
        upgrades: Servers replaced by `tcmu-rs upgrade`.
        refused: Upgrades that were given up, because the successor was too slow.
        swaps: Handlers replaced.
        resizes: Sizes changed.
        longest_pause: Seconds of the slowest probe.
        longest_stall: Seconds in which the guest itself did not run.
        probes: Timed writes that were acknowledged.
        trees: Trees copied and compared.
        io_errors: What initiators, fio and file system complained of.
        lost_writes: Acknowledged probes that were not there at the end.
    """

    seconds: float = 0.0
    kills: int = 0
    upgrades: int = 0
    refused: int = 0
    swaps: int = 0
    resizes: int = 0
    longest_pause: float = 0.0
    longest_stall: float = 0.0
    probes: int = 0
    trees: int = 0
    io_errors: list[str] = field(default_factory=list)
    lost_writes: int = 0


class Probe(threading.Thread):
    """Writes blocks with a number in them, one after the other, and remembers the last number of each place."""

    def __init__(self, path: str, report: Report, stop: threading.Event) -> None:
        super().__init__(name=f"probe of {path}")
        self._path = path
        self._report = report
        self._stop_event = stop
        self._acknowledged: dict[int, int] = {}

    def run(self) -> None:
        fd = os.open(self._path, os.O_RDWR | os.O_DIRECT)
        try:
            with mmap.mmap(-1, BLOCK) as buffer:
                self._probe(fd, buffer)
        except OSError as error:
            tell(f"probe of {self._path}: {error}")
            self._report.io_errors.append(f"probe of {self._path}: {error}")
        finally:
            os.close(fd)

    def _probe(self, fd: int, buffer: mmap.mmap) -> None:
        number = 0
        while not self._stop_event.wait(0.05):
            number += 1
            place = number * 7 % (PROBED // BLOCK)
            buffer[:8] = number.to_bytes(8)
            started = time.monotonic()
            os.pwritev(fd, [buffer], SIZE - PROBED + place * BLOCK)
            self._report.longest_pause = max(self._report.longest_pause, time.monotonic() - started)
            self._acknowledged[place] = number
            self._report.probes += 1

    def lost(self, image: Path) -> int:
        """Counts the acknowledged writes that the storage does not have."""
        with image.open("rb") as file:
            found = 0
            for place, number in self._acknowledged.items():
                file.seek(SIZE - PROBED + place * BLOCK)
                found += int.from_bytes(file.read(8)) == number
        return len(self._acknowledged) - found


class Trees(threading.Thread):
    """Copies trees to a file system, reads them back around the cache, removes them, and begins again."""

    def __init__(self, directory: Path, report: Report, stop: threading.Event) -> None:
        super().__init__(name="trees")
        self._directory = directory
        self._report = report
        self._stop_event = stop
        self._wanted = {tree.name: checksums(tree) for tree in REAL_TREES}
        self.kept: set[str] = set()

    def run(self) -> None:
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 10)
        try:
            while not self._stop_event.is_set():
                for tree in REAL_TREES:
                    self._copy(tree)
                    self._stop_event.wait(0.5)
        except (OSError, shutil.Error, AssertionError) as error:
            self._report.io_errors.append(f"trees: {error}")

    def _copy(self, tree: Path) -> None:
        copy = self._directory / tree.name
        self.kept.discard(tree.name)
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(tree, copy, ignore=shutil.ignore_patterns("__pycache__"))
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
        self.check(tree.name)
        self.kept.add(tree.name)
        self._report.trees += 1

    def check(self, name: str) -> None:
        """Compares a copy with what it was made of."""
        wanted = {path: digest for path, digest in self._wanted[name].items() if "__pycache__" not in path}
        assert checksums(self._directory / name) == wanted, f"{name} is not what was copied"


def tell(what: str) -> None:
    """A line of the log."""
    print(f"{time.monotonic():9.2f} {what}", file=sys.stderr, flush=True)


class Stalls(threading.Thread):
    """Tells when nothing ran: under emulation a busy host takes the processor away, and the kernel's timers go on."""

    def __init__(self, report: Report, stop: threading.Event) -> None:
        super().__init__(name="stalls")
        self._report = report
        self._stop_event = stop

    def run(self) -> None:
        last = time.monotonic()
        while not self._stop_event.wait(0.1):
            now = time.monotonic()
            if now - last > 2:
                tell(f"nothing ran for {now - last:.1f} s")
            self._report.longest_stall = max(self._report.longest_stall, now - last)
            last = now


@contextmanager
def supervised(image: Path, name: str) -> Iterator[str]:
    command = [str(TCMU_RS), "attach", f"file:{image}", "--name", name, "--supervise"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process.stdout.readline().rstrip("\n").partition("\t")[2]
        process.terminate()
        process.wait(120)
    finally:
        with suppress(ProcessLookupError):
            process.kill()
        process.communicate()


@contextmanager
def swapped(image: Path, report: Report) -> Iterator[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", SWAPPING, str(image), str(SIZE)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        yield process.stdout.readline().rstrip("\n")
        report.swaps = int(process.communicate("stop\n", timeout=120)[0] or 0)
        report.resizes += report.swaps
    finally:
        process.kill()
        process.communicate()


def server_of(name: str) -> int | None:
    """The process that serves a device, if commands flow."""
    found = next((device for device in _devices.devices() if device.name == name), None)
    return found.pid if found is not None and found.state == "serving" else None


def kill(name: str, report: Report) -> None:
    """Kills a server, and waits for the next."""
    if (pid := server_of(name)) is None:
        raise RuntimeError(f"nobody serves {name}")
    os.kill(pid, signal.SIGKILL)
    report.kills += 1
    tell(f"{name}: kill {report.kills}, of {pid}")
    # Rarely: to look at all processes is work, and the processor is the servers'.
    for _ in range(240):
        if (successor := server_of(name)) not in (None, pid):
            tell(f"{name}: {successor} serves")
            return
        time.sleep(0.25)
    raise RuntimeError(f"nobody serves {name} a minute after its server was killed")


def upgrade(name: str, report: Report) -> None:
    """Has a server replaced, as `tcmu-rs upgrade` does."""
    if (pid := server_of(name)) is None:
        raise RuntimeError(f"nobody serves {name}")
    try:
        answer = trio.run(_upgrade.ask, pid)
    except _upgrade.UpgradeError as error:
        tell(f"{name}: not upgraded: {error}")
        if re.search(r"within \d+ s", str(error)):
            report.refused += 1
        else:
            report.io_errors.append(f"upgrade: {error}")
    else:
        tell(f"{name}: upgraded, {answer['pid']} serves")
        report.upgrades += 1


def resize(name: str, image: Path, path: str, report: Report, chance: random.Random) -> None:
    """Has a disk changed behind what is in use, as `tcmu-rs resize` does; of three servers one is killed meanwhile."""
    now = image.stat().st_size
    size = SIZE + chance.randrange(1, 64) * MIB
    said: list[str] = []

    def change() -> None:
        try:
            if (device := _resize.find("file", str(image))) is None:
                raise RuntimeError(f"{name} is gone")
            _resize.served(device, size, shrink=True)
        except _resize.ResizeError as error:
            said.append(str(error))

    thread = threading.Thread(target=change, name="resize")
    thread.start()
    if is_killed := chance.random() < 0.33:
        # It takes about that long to get to the server and back.
        thread.join(chance.uniform(0, 1))
        kill(name, report)
    thread.join()
    found = image.stat().st_size
    tell(f"{name}: {now >> 20} MiB to {size >> 20}: {found >> 20} {' '.join(said)}")
    if found not in (now, size) or (found != size and not said) or (said and not is_killed):
        report.io_errors.append(f"{image} has {found} bytes after a resize from {now} to {size}: {said}")
    Path("/sys/class/block", Path(path).name, "device/rescan").write_text("1")
    with Path(path).open("rb") as disk:
        if (known := disk.seek(0, os.SEEK_END)) != found:
            report.io_errors.append(f"{path} has {known} bytes, its storage {found}")
    check_end(path, found, report)
    report.resizes += found != now


def check_end(path: str, size: int, report: Report) -> None:
    """Writes the last block of a disk, and reads it."""
    fd = os.open(path, os.O_RDWR | os.O_DIRECT)
    try:
        with mmap.mmap(-1, BLOCK) as buffer:
            data = os.urandom(BLOCK)
            buffer[:] = data
            os.pwritev(fd, [buffer], size - BLOCK)
            buffer[:] = bytes(BLOCK)
            os.preadv(fd, [buffer], size - BLOCK)
            if buffer[:] != data:
                report.lost_writes += 1
    except OSError as error:
        report.io_errors.append(f"the end of {path}: {error}")
    finally:
        os.close(fd)


def soak(seconds: float, kills: int, directory: Path, seed: int) -> Report:
    """Runs all of it.

    Args:
        seconds: How long the load lasts, at least.
        kills: How often servers are killed, at least.
        directory: Where the images and the mount are made.
        seed: Of what happens when.
    """
    report = Report()
    chance = random.Random(seed)
    images = {name: directory / f"{name}.img" for name in ("raw", "tree", "swapped")}
    for image in images.values():
        with image.open("wb") as file:
            file.truncate(SIZE)
    mount = directory / "mount"
    mount.mkdir()
    stop = threading.Event()
    log = KernelLog()
    with (
        supervised(images["raw"], "raw") as raw,
        supervised(images["tree"], "tree") as tree,
        swapped(images["swapped"], report) as third,
    ):
        # The file system leaves the end of the disk to the probe.
        subprocess.run([*MAKE_FILE_SYSTEM["ext4"], "-b", "4096", tree, str((SIZE - PROBED) // 4096)], check=True)
        subprocess.run(["mount", tree, mount], check=True)
        probes = {name: Probe(path, report, stop) for name, path in (("raw", raw), ("tree", tree), ("swapped", third))}
        trees = Trees(mount, report, stop)
        fio = subprocess.Popen(
            [
                *(
                    "nice",
                    "fio",
                    "--name=soak",
                    f"--filename={raw}",
                    "--rw=randwrite",
                    "--bsrange=4k-64k",
                    "--iodepth=32",
                ),
                *("--direct=1", "--ioengine=libaio", f"--size={SIZE - PROBED}", "--time_based", "--runtime=1000000"),
                *(
                    "--thinktime=200ms",
                    "--thinktime_blocks=64",
                    "--verify=crc32c",
                    "--verify_backlog=128",
                    "--verify_fatal=1",
                    "--loops=1000000",
                ),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        started = time.monotonic()
        for thread in (*probes.values(), trees, Stalls(report, stop)):
            thread.start()
        while time.monotonic() - started < seconds or report.kills < kills:
            time.sleep(chance.uniform(0.2, 3))
            name = chance.choice(["raw", "tree"])
            event = chance.random()
            if event < 0.1 or (report.upgrades == 0 and report.kills >= kills // 2):
                upgrade(name, report)
            elif event < 0.4 or (report.resizes == 0 and report.kills >= kills // 2):
                resize(name, images[name], {"raw": raw, "tree": tree}[name], report, chance)
            else:
                kill(name, report)
            if report.io_errors or fio.poll() is not None:
                break
        report.seconds = round(time.monotonic() - started, 1)
        stop.set()
        # SIGINT ends fio's loop, and it says what it has found.
        fio.send_signal(signal.SIGINT)
        said, _ = fio.communicate(timeout=300)
        if fio.returncode not in (0, 128) or re.search(r"verify:|err= *[1-9]", said):
            report.io_errors.append(f"fio ended with {fio.returncode}: {said[-2000:]}")
        for thread in (*probes.values(), trees):
            thread.join(300)
        subprocess.run(["umount", mount], check=True)
        subprocess.run([*CHECK_FILE_SYSTEM["ext4"], tree], check=True, stdout=subprocess.DEVNULL)
        subprocess.run(["mount", "-o", "ro", tree, mount], check=True)
        for name in trees.kept:
            trees.check(name)
        subprocess.run(["umount", mount], check=True)
    report.lost_writes = sum(probe.lost(images[name]) for name, probe in probes.items())
    report.longest_pause = round(report.longest_pause, 2)
    report.longest_stall = round(report.longest_stall, 2)
    complaints = log.complaints()
    report.io_errors += [line for line in complaints if re.search(r"i/o error|ext4.*error", line, re.IGNORECASE)]
    for line in complaints if report.io_errors else []:
        tell(line)
    log.close()
    return report


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.guest.soak")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        report = soak(options.minutes * 60, options.kills, Path(directory), options.seed)
    print(json.dumps(asdict(report), indent=2))
    sys.exit(bool(report.io_errors or report.lost_writes))


if __name__ == "__main__":
    main()
