"""LUKS side by side: ours on the simulator, `qemu-nbd` and nbdkit's luks filter over NBD, in turn, in one run.

    python -m bench.luks [--seconds 1] [--rounds 3] [--quick] [--write] [--directory /var/tmp] [--cipher]

Needs fio with its nbd engine, qemu-utils and nbdkit; without them only ours is measured.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import trio

from tcmu_rs import AesXts, BlockHandler, IoVec, _native
from tcmu_rs._runtime import Device
from tcmu_rs.handlers.file import FileHandler
from tcmu_rs.handlers.luks import LuksHandler, format_luks
from tcmu_rs.handlers.luks.cipher import FreshXts, KeptXts, SectorCipher
from tcmu_rs.handlers.luks.kdf import Pbkdf2
from tcmu_rs.testing import simulated

from .micro import serve
from .report import publish, stated, table
from .simulator import drive

SIZE = 256 << 20
KEY = b"bench"
PATTERNS = (("randread", 4096, 32), ("randwrite", 4096, 32), ("randread", 262144, 8), ("randwrite", 262144, 8))

Figure = tuple[float, float]
"""Commands per second; microseconds of processor time per command."""
Measure = Callable[[str, int, int, float], Figure]

TRANSPORTS = """**The transports differ.** Ours is driven through the simulated ring, by a generator in the same Python
process and event loop; the peers by fio through a Unix socket. In brackets is the processor time per command: for the
peers that of the server alone, for ours that of everything, generator and simulator too. The rows without encryption
tell what each transport costs by itself.

Rows named LUKS1 are the same file for all, with sectors of 512 bytes. Sectors of 4096 bytes are what only LUKS2 has,
and the peers only know LUKS1: part of the difference is the size of the sectors."""
OURS, SAME = "ours, LUKS2, 4096-byte sectors", "ours, LUKS1"
QEMU, NBDKIT = "qemu-nbd, LUKS1", "nbdkit luks, LUKS1"
TARGETS = (
    # What, against what, and by how much the rate is to be higher, in the order of `PATTERNS`.
    (OURS, QEMU, (4.0, 3.0, 5.0, 5.0)),
    (OURS, NBDKIT, (2.0, 1.8, 2.5, 2.5)),
    (SAME, QEMU, (2.0, 2.0, 2.0, 2.0)),
    (SAME, NBDKIT, (1.0, 1.0, 1.0, 1.0)),
)


class Null(BlockHandler):
    """Stores nothing: what is left is the transport."""

    fills_reads = True
    max_in_flight = 32
    block_size = 4096
    size = SIZE

    async def read(self, offset: int, iov: IoVec) -> None:
        pass

    async def write(self, offset: int, iov: IoVec) -> None:
        pass


async def ours(handler: BlockHandler, pattern: str, length: int, depth: int, seconds: float) -> Figure:
    """Runs a pattern on the simulator."""
    kernel = _native.Simulator(checks=False)
    async with handler, trio.open_nursery() as nursery:
        device: Device = await nursery.start(serve, handler, kernel)
        load = functools.partial(
            drive,
            kernel,
            depth,
            write=pattern == "randwrite",
            length=length,
            size=device.size,
            block_size=device.block_size,
        )
        await load(seconds / 10)
        gc.collect()
        start, cpu = time.perf_counter(), time.process_time()
        done = await load(seconds)
        figure = done / (time.perf_counter() - start), (time.process_time() - cpu) / done * 1e6
        device.stop()
    assert not kernel.violations, kernel.violations
    return figure


def on_simulator(make: Callable[[], BlockHandler]) -> Measure:
    """Measures a handler of ours."""
    return lambda pattern, length, depth, seconds: trio.run(ours, make(), pattern, length, depth, seconds)


@contextmanager
def serving(socket: Path, *command: str) -> Iterator[tuple[str, int]]:
    """Runs a server of NBD, and yields its URI and process."""
    process = subprocess.Popen([word.replace("SOCKET", str(socket)) for word in command])
    try:
        while not socket.exists():
            assert process.poll() is None, f"{command[0]} has ended"
            time.sleep(0.05)
        yield f"nbd+unix:///?socket={socket}", process.pid
    finally:
        process.terminate()
        process.wait()
        socket.unlink(missing_ok=True)


def over_nbd(socket: Path, *command: str, size: int = SIZE) -> Measure:
    """Measures a server of others with fio."""

    def measure(pattern: str, length: int, depth: int, seconds: float) -> Figure:
        with serving(socket, *command) as (uri, pid):
            before = cpu_of(pid)
            fio = [
                "fio", "--name=x", "--ioengine=nbd", f"--uri={uri}", f"--rw={pattern}", f"--bs={length}",
                f"--size={size}", f"--iodepth={depth}", "--time_based", f"--runtime={round(seconds * 1000)}ms",
                "--norandommap",
                "--output-format=json",
            ]  # fmt: skip
            output = subprocess.run(fio, check=True, capture_output=True, text=True).stdout
            job = json.loads(output[output.index("{") :])["jobs"][0]["read" if pattern == "randread" else "write"]
            return job["iops"], (cpu_of(pid) - before) / job["total_ios"] * 1e6

    return measure


def cpu_of(pid: int) -> float:
    """Seconds of processor time that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def servers(directory: Path) -> dict[str, Measure]:
    """Makes the images, all of them filled, and what serves them."""
    secret, luks1, raw = directory / "secret", directory / "luks1", directory / "raw"
    secret.write_bytes(KEY)
    raw.write_bytes(os.urandom(SIZE))

    def luks(path: Path) -> BlockHandler:
        return LuksHandler(FileHandler(path), lambda _: KEY)

    found = {
        "ours, no storage": on_simulator(Null),
        "ours, file, not encrypted": on_simulator(lambda: FileHandler(raw, block_size=4096)),
    }
    for sector_size in (4096, 512):
        path = directory / f"luks2-{sector_size}"
        with path.open("wb") as file:
            file.truncate((16 << 20) + SIZE)
        make = functools.partial(format_luks, kdf=Pbkdf2("sha256", 1000, b""), sector_size=sector_size)
        trio.run(make, FileHandler(path), [KEY])
        fill(luks(path))
        found[f"ours, LUKS2, {sector_size}-byte sectors"] = on_simulator(functools.partial(luks, path))
    if missing := [program for program in ("qemu-img", "qemu-nbd", "nbdkit", "fio") if shutil.which(program) is None]:
        print(f"not measured, as there is no {' and no '.join(missing)}: the peers\n")
        return found
    objects = ["--object", f"secret,id=s,file={secret}"]
    options = "key-secret=s,iter-time=10,cipher-alg=aes-256,cipher-mode=xts,ivgen-alg=plain64"
    make_luks1: list[str | Path] = ["qemu-img", "create", "-q", "-f", "luks", *objects, "-o", options, luks1, str(SIZE)]
    # It measures its own processor time to calibrate, and now and then finds that inaccurate.
    if not any(subprocess.run(make_luks1, check=False).returncode == 0 for _ in range(5)):
        raise RuntimeError("qemu-img has made no image")
    fill(luks(luks1))
    found[SAME] = on_simulator(functools.partial(luks, luks1))
    image = f"driver=luks,key-secret=s,file.filename={luks1}"
    socket = directory / "socket"
    kit = ["nbdkit", "-f", "-U", "SOCKET"]
    found["nbdkit, no storage"] = over_nbd(socket, *kit, "null", str(SIZE))
    found["nbdkit, file, not encrypted"] = over_nbd(socket, *kit, "file", str(raw))
    found[NBDKIT] = over_nbd(socket, *kit, "--filter=luks", "file", str(luks1), f"passphrase=+{secret}")
    found[QEMU] = over_nbd(socket, "qemu-nbd", "-t", "-k", "SOCKET", *objects, "--image-opts", image)
    return found


def fill(handler: BlockHandler) -> None:
    """Makes every block of the data real, through the encryption."""

    async def write() -> None:
        async with simulated(handler, checks=False) as disk:
            for offset in range(0, disk.size, 1 << 20):
                await disk.write(offset, os.urandom(1 << 20))

    trio.run(write)


def ciphers() -> str:
    """What the encryption alone costs, each way: `--cipher`."""
    sizes = [(sector_size, length) for sector_size in (512, 4096) for length in (4096, 65536, 262144)]
    heading = ["AES-256-XTS, decryption in place"]
    heading += [f"{length >> 10}K, sectors of {sector_size}" for sector_size, length in sizes]
    rows = []
    for name, kind in (("Rust", AesXts), ("OpenSSL, kept contexts", KeptXts), ("OpenSSL, new contexts", FreshXts)):
        row = [name]
        for sector_size, length in sizes:
            sectors: SectorCipher = kind(bytearray(range(64)), sector_size)
            iov = IoVec([bytearray(length)])
            calls = max((1 << 16) // length, 1)
            times = []
            for _ in range(100):
                start = time.perf_counter()
                for _ in range(calls):
                    sectors.decrypt(0, iov)
                times.append((time.perf_counter() - start) / calls)
            row.append(f"{min(times) * 1e6:.1f} µs ({length / min(times) / 1e9:.1f} GB/s)")
        rows.append(row)
    return table(heading, rows)


def report(figures: dict[str, list[list[Figure]]]) -> str:
    """A table, and how far the targets are met."""
    heading = [f"{pattern} {length >> 10}K, depth {depth}" for pattern, length, depth in PATTERNS]
    rows = []
    summary: dict[str, list[Figure]] = {}
    for name, rounds in figures.items():
        summary[name] = [
            (statistics.median(figure[0] for figure in each), min(figure[1] for figure in each))
            for each in zip(*rounds, strict=True)
        ]
        cells = [name]
        for (rate, cpu), (_, length, _) in zip(summary[name], PATTERNS, strict=True):
            shown = f"{rate / 1000:.1f} k/s" if length == 4096 else f"{rate * length / 1e6:.0f} MB/s"
            cells.append(f"{shown} ({cpu:.1f} µs)")
        rows.append(cells)
    text = table(["server", *heading], rows)
    if QEMU not in summary:
        return text
    rows = []
    for one, other, targets in TARGETS:
        cells = [f"{one} / {other}"]
        for (rate, cpu), (their_rate, their_cpu), target in zip(summary[one], summary[other], targets, strict=True):
            ratio = rate / their_rate
            shown = f"{ratio:.1f} (≥ {target:g})" if ratio >= target else f"**{ratio:.1f}** (missed: ≥ {target:g})"
            cells.append(f"{shown}; {cpu / their_cpu:.2f}")
        rows.append(cells)
    return f"{text}\n\n{table(['times as fast, and the target; parts of the processor time', *heading], rows)}"


def run(directory: str, seconds: float, rounds: int) -> str:
    """Measures all servers, with their images in a directory."""
    with tempfile.TemporaryDirectory(dir=directory) as made:
        found = servers(Path(made))
        figures: dict[str, list[list[Figure]]] = {name: [] for name in found}
        # In turn, so that what else the machine does meets all of them; but not what the one before has left to write.
        forget(Path(made))
        for _ in range(rounds):
            for name, measure in found.items():
                os.sync()
                warm(Path(made))
                figures[name].append([measure(*pattern, seconds) for pattern in PATTERNS])
        return report(figures)


def forget(directory: Path) -> None:
    """Has the page cache let go of all files, for `warm` to read them.

    The kernel keeps a file in pieces as large as it was written in, and a small write to a large piece costs ext4 twice
    as much: so who made an image would decide.
    """
    for path in filter(Path.is_file, directory.iterdir()):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def warm(directory: Path) -> None:
    """Has the page cache hold all files, for some kernels let go of what nobody has read for a minute."""
    room = bytearray(1 << 20)
    for path in filter(Path.is_file, directory.iterdir()):
        with path.open("rb", buffering=0) as file:
            while file.readinto(room):
                pass


def file_system(directory: str) -> str:
    """The kind of file system that a directory is on."""
    return subprocess.run(
        ["findmnt", "-no", "FSTYPE", "-T", directory], check=True, capture_output=True, text=True
    ).stdout.strip()


def main() -> None:
    """Measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each figure")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="one round of 0.3 seconds each")
    parser.add_argument("--cipher", action="store_true", help="the encryption alone, each way that there is")
    parser.add_argument("--directory", action="append", help="where the images are (/var/tmp); may be given again")
    parser.add_argument("--write", action="store_true", help="put the figures into bench/RESULTS.md")
    arguments = parser.parse_args()
    if arguments.cipher:
        publish("bench.luks --cipher", f"{stated()}\n- the lowest of 100\n\n{ciphers()}", write=arguments.write)
        return
    seconds, rounds = (0.3, 1) if arguments.quick else (arguments.seconds, arguments.rounds)
    taken = f"{rounds} of {seconds:g} s: median of the rates, lowest processor time"
    text = [TRANSPORTS, stated(rounds=taken, image=f"{SIZE >> 20} MiB, all of it written and in the page cache")]
    for directory in arguments.directory or ["/var/tmp"]:
        text += [f"### Images on {file_system(directory)}", run(directory, seconds, rounds)]
    publish("bench.luks", "\n\n".join(text), write=arguments.write)


if __name__ == "__main__":
    main()
