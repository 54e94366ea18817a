"""LUKS side by side on one file: ours on the simulator, `qemu-nbd` and nbdkit's luks filter over NBD, driven by fio.

    python -m bench.luks [--seconds 3] [--directory /var/tmp]

**The transports differ.** Ours is driven through the simulated ring by a generator in the same Python process, whose
own time is in the figures; the peers by fio through a Unix socket. So the column to compare first is the processor time
per command: for the peers that of the server alone, for ours that of everything. Rows of 512-byte sectors are the same
LUKS1 file for all; 4096-byte sectors are what only LUKS2 has, and most of the difference.

Needs fio with its nbd engine, qemu-utils and nbdkit; without them only ours is measured.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import random
import shutil
import statistics
import struct
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from tcmu_rs import BlockHandler
from tcmu_rs.handlers.file import FileHandler
from tcmu_rs.handlers.luks import LuksHandler, format_luks
from tcmu_rs.handlers.luks.kdf import Pbkdf2
from tcmu_rs.testing import simulated

SIZE = 256 << 20
KEY = b"bench"
PATTERNS = (("randread", 4096, 32), ("randwrite", 4096, 32), ("randread", 262144, 8), ("randwrite", 262144, 8))
ROUNDS = 3

Figure = tuple[float, float]
"""Commands per second; microseconds of processor time per command."""


async def ours(handler: BlockHandler, pattern: str, length: int, depth: int, seconds: float) -> Figure:
    """Runs a pattern on the simulator."""
    async with simulated(handler, checks=False) as disk:
        blocks, count = disk.size // length, length // disk.block_size
        data = os.urandom(length) if pattern == "randwrite" else b""
        opcode, room = (0x8A, 0) if data else (0x88, length)
        choose = random.Random(5).randrange
        done = 0

        async def load() -> None:
            nonlocal done
            while time.perf_counter() < end:
                cdb = struct.pack(">BBQLBB", opcode, 0, choose(blocks) * count, count, 0, 0)
                reply = await disk.scsi(cdb, data, data_in=room)
                assert reply.status == 0
                done += 1

        start, cpu = time.perf_counter(), time.process_time()
        end = start + seconds
        async with trio.open_nursery() as nursery:
            for _ in range(depth):
                nursery.start_soon(load)
        return done / (time.perf_counter() - start), (time.process_time() - cpu) / done * 1e6


@contextmanager
def serving(directory: Path, *command: str) -> Iterator[tuple[str, int]]:
    """Runs a server of NBD, and yields its URI and process."""
    socket = directory / "socket"
    socket.unlink(missing_ok=True)
    process = subprocess.Popen([word.replace("SOCKET", str(socket)) for word in command])
    try:
        while not socket.exists():
            assert process.poll() is None, f"{command[0]} has ended"
            time.sleep(0.05)
        yield f"nbd+unix:///?socket={socket}", process.pid
    finally:
        process.terminate()
        process.wait()


def theirs(uri: str, pid: int, seconds: float, pattern: str, length: int, depth: int, *, size: int = SIZE) -> Figure:
    """Runs a pattern with fio."""
    before = cpu_of(pid)
    command = [
        "fio", "--name=x", "--ioengine=nbd", f"--uri={uri}", f"--rw={pattern}", f"--bs={length}", f"--size={size}",
        f"--iodepth={depth}", "--time_based", f"--runtime={seconds}", "--randrepeat=1", "--norandommap",
        "--output-format=json",
    ]  # fmt: skip
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    job = json.loads(output[output.index("{") :])["jobs"][0]["read" if pattern == "randread" else "write"]
    return job["iops"], (cpu_of(pid) - before) / job["total_ios"] * 1e6


def cpu_of(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def report(name: str, measure: Callable[[str, int, int], Figure]) -> None:
    """Measures every pattern and prints a row."""
    cells = []
    for pattern, length, depth in PATTERNS:
        figures = [measure(pattern, length, depth) for _ in range(ROUNDS)]
        rate = statistics.median(figure[0] for figure in figures)
        shown = f"{rate / 1000:.1f} k/s" if length == 4096 else f"{rate * length / 1e6:.0f} MB/s"
        cells.append(f"{shown} ({min(figure[1] for figure in figures):.1f} µs)")
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--directory", default="/var/tmp")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as name:
        measure_in(Path(name), arguments.seconds)


def measure_in(directory: Path, seconds: float) -> None:
    """Measures with files in a directory."""
    secret, luks1 = directory / "secret", directory / "luks1"
    secret.write_bytes(KEY)
    heading = " | ".join(f"{pattern} {length >> 10}K, depth {depth}" for pattern, length, depth in PATTERNS)
    print(f"| server | {heading} |\n|{' --- |' * (len(PATTERNS) + 1)}")

    def row(name: str, path: Path) -> None:
        # The page cache has all of it, for every server alike.
        path.read_bytes()

        def measure(pattern: str, length: int, depth: int) -> Figure:
            return trio.run(ours, LuksHandler(FileHandler(path), lambda _: KEY), pattern, length, depth, seconds)

        report(name, measure)

    for sector_size in (4096, 512):
        path = directory / f"luks2-{sector_size}"
        with path.open("wb") as file:
            file.truncate((16 << 20) + SIZE)
        make = functools.partial(format_luks, kdf=Pbkdf2("sha256", 1000, b""), sector_size=sector_size)
        trio.run(make, FileHandler(path), [KEY])
        fill(path)
        row(f"ours, LUKS2, {sector_size}-byte sectors", path)
        path.unlink()
    if missing := [program for program in ("qemu-img", "qemu-nbd", "nbdkit", "fio") if shutil.which(program) is None]:
        print(f"not measured, as there is no {' and no '.join(missing)}: the peers")
        return
    objects = ["--object", f"secret,id=s,file={secret}"]
    options = "key-secret=s,iter-time=10,cipher-alg=aes-256,cipher-mode=xts,ivgen-alg=plain64"
    subprocess.run(["qemu-img", "create", "-q", "-f", "luks", *objects, "-o", options, luks1, str(SIZE)], check=True)
    fill(luks1)
    row("ours, LUKS1", luks1)
    image = f"driver=luks,key-secret=s,file.filename={luks1}"
    servers = {
        "qemu-nbd, LUKS1": ["qemu-nbd", "-t", "-k", "SOCKET", *objects, "--image-opts", image],
        "nbdkit luks, LUKS1": [
            "nbdkit", "-f", "-U", "SOCKET", "--filter=luks", "file", str(luks1), f"passphrase=+{secret}"
        ],
    }  # fmt: skip
    for name, command in servers.items():
        with serving(directory, *command) as (uri, pid):
            report(name, functools.partial(theirs, uri, pid, seconds))


def fill(path: Path) -> None:
    """Makes every block of the data real, through the encryption."""

    async def write() -> None:
        async with simulated(LuksHandler(FileHandler(path), lambda _: KEY), checks=False) as disk:
            for offset in range(0, disk.size, 1 << 20):
                await disk.write(offset, os.urandom(1 << 20))

    trio.run(write)


if __name__ == "__main__":
    main()
