"""Commands per second of a served disk on the simulated kernel, by the handler's colour, depth, devices and block size.

    python -m bench.simulator [--quick] [--write]

One process and one thread do everything: the handler, the runtime, and the kernel's side with its copies, so the
figures are what one core does for all of it. The initiator keeps `depth` commands outstanding and sends what is due at
once. The one of a single busy device looks for completions in each pass of the event loop; several are woken up.
"""

from __future__ import annotations

import argparse
import functools
import gc
import os
import random
import statistics
import struct
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trio

import tcmu_rs
from tcmu_rs import _native
from tcmu_rs._runtime import Device
from tcmu_rs.handlers.file import FileHandler
from tcmu_rs.handlers.ram import RamHandler

from .micro import Async, Blocking, Memory, Plain, resident, serve
from .report import README, against, claims, plot, publish, stated, table

SIZE = 64 << 20
DEPTHS = (1, 8, 32, 128)
DEVICES = (1, 10, 100)
SCALE = (1, 2, 5, 10, 20, 50, 100, 200)
LENGTHS = tuple(4096 << shift for shift in range(9))


@dataclass(frozen=True)
class Figure:
    """One measurement.

    Attributes:
        rate: Commands per second.
        cpu: Microseconds of processor time per command, of the whole process.
    """

    rate: float
    cpu: float


def big(make: type[Memory]) -> Callable[[], Memory]:
    """Disks of `SIZE` bytes of that colour, which share their memory: two hundred of them would need all there is."""
    memory = bytearray(SIZE)

    class Big(make):  # type: ignore[misc, valid-type]
        size = SIZE
        max_in_flight = 128

        def __init__(self) -> None:
            self.data = memory
            self.view = memoryview(memory)

    return Big


class File(FileHandler):
    """A file, as shipped, that is all in the page cache."""

    max_in_flight = 128


@contextmanager
def warm_file(directory: str) -> Iterator[Path]:
    """A file that the page cache has."""
    with tempfile.NamedTemporaryFile(dir=directory, prefix="tcmu-bench") as file:
        file.write(os.urandom(SIZE))
        file.flush()
        os.fdatasync(file.fileno())
        yield Path(file.name)


CDB = 16


@functools.cache
def cdbs(write: bool, length: int, size: int, block_size: int) -> bytes:
    """CDBs of transfers of `length` bytes all over the disk, in a random order that is always the same."""
    opcode, blocks = (0x8A if write else 0x88), length // block_size
    places = list(range(size // length))
    random.Random(7).shuffle(places)
    return b"".join(struct.pack(">BBQLBB", opcode, 0, place * blocks, blocks, 0, 0) for place in places)


async def drive(
    kernel: _native.Simulator,
    depth: int,
    seconds: float,
    *,
    write: bool,
    length: int,
    size: int = SIZE,
    block_size: int = 512,
    polls: bool = False,
) -> int:
    """Keeps `depth` commands outstanding; returns how many were done, each of them GOOD.

    An initiator that polls looks for completions in each pass of the event loop, and is not woken up for them.
    """
    commands = cdbs(write, length, size, block_size)
    count = len(commands) // CDB
    # A batch that begins near the end goes on at the start.
    commands += commands[: depth * CDB]
    data, room = (os.urandom(length), 0) if write else (None, length)
    at = sent = done = 0
    end = time.perf_counter() + seconds
    while (running := time.perf_counter() < end) or done < sent:
        if running and (due := depth - (sent - done)):
            kernel.submit_batch(commands[at * CDB : (at + due) * CDB], data, room)
            sent += due
            at = (at + due) % count
        if polls:
            await trio.lowlevel.checkpoint()
        else:
            await trio.lowlevel.wait_readable(kernel.fileno())
        done += kernel.process_batch()
    return done


async def measure(
    make: Callable[[], tcmu_rs.BlockHandler],
    *,
    depth: int,
    seconds: float,
    write: bool = False,
    length: int = 4096,
    devices: int = 1,
    idle: int = 0,
) -> Figure:
    """Serves devices of one kind, all of them busy but the last `idle` ones."""
    kernels = [_native.Simulator(checks=False) for _ in range(devices + idle)]
    counts: list[int] = []
    async with trio.open_nursery() as nursery:
        handlers = [make() for _ in kernels]
        served: list[Device] = []
        for handler, kernel in zip(handlers, kernels, strict=True):
            await handler.open()
            served.append(await nursery.start(serve, handler, kernel))

        async def load(kernel: _native.Simulator, seconds: float) -> None:
            counts.append(await drive(kernel, depth, seconds, write=write, length=length, polls=devices == 1))

        async def everywhere(seconds: float) -> None:
            async with trio.open_nursery() as loads:
                for kernel in kernels[:devices]:
                    loads.start_soon(load, kernel, seconds)

        await everywhere(seconds / 10)
        counts.clear()
        gc.collect()
        gc.freeze()
        wall, cpu = time.perf_counter(), time.process_time()
        await everywhere(seconds)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        gc.unfreeze()
        for device in served:
            device.stop()
    for handler, kernel in zip(handlers, kernels, strict=True):
        await handler.aclose()
        assert not kernel.violations, kernel.violations
    return Figure(sum(counts) / wall, cpu / sum(counts) * 1e6)


def median(rounds: int, run: Callable[[], Figure]) -> Figure:
    """The medians of some rounds."""
    figures = [run() for _ in range(rounds)]
    return Figure(statistics.median(f.rate for f in figures), statistics.median(f.cpu for f in figures))


def idle_devices(count: int, seconds: float) -> tuple[float, float, int]:
    """Kilobytes for each idle device, percent of a core for all of them, and wake-ups of the loop."""

    async def run() -> tuple[float, float, int]:
        kernels = [_native.Simulator(checks=False) for _ in range(count + 1)]
        async with trio.open_nursery() as nursery:
            served: list[Device] = [await nursery.start(serve, big(Async)(), kernels[0])]
            handler = Async()
            before = resident("RssAnon")
            for kernel in kernels[1:]:
                served.append(await nursery.start(serve, handler, kernel))
            grown = (resident("RssAnon") - before) / count / 1024
            cpu = time.process_time()
            await trio.sleep(seconds)
            cpu = time.process_time() - cpu
            woken = sum(device.statistics().wakeups for device in served)
            for device in served:
                device.stop()
        return grown, cpu / seconds * 100, woken

    return trio.run(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter and fewer rounds")
    parser.add_argument("--write", action="store_true", help="put the figures into bench/RESULTS.md")
    parser.add_argument("--directory", default="/var/tmp", help="where the file is (/var/tmp)")
    arguments = parser.parse_args()
    seconds, rounds = (0.2, 3) if arguments.quick else (0.5, 3)
    text = [stated(rounds=f"{rounds} of {seconds} s each, medians", file=f"in {arguments.directory}")]
    grown, percent, woken = idle_devices(200, 2 if arguments.quick else 10)

    with warm_file(arguments.directory) as path:
        colours: dict[str, Callable[[], tcmu_rs.BlockHandler]] = {
            "def": big(Plain),
            "async def": big(Async),
            "@blocking": big(Blocking),
            "ram:": lambda: RamHandler(SIZE),
            "file:": lambda: File(path),
        }

        def run(name: str, **options: int) -> Figure:
            return median(rounds, lambda: trio.run(one, name, options))

        async def one(name: str, options: dict[str, int]) -> Figure:
            return await measure(colours[name], seconds=seconds, **options)  # type: ignore[arg-type]

        for write in (False, True):
            verb = "write" if write else "read"
            rates: dict[str, list[float]] = {}
            rows: list[list[object]] = []
            for name in colours:
                figures = [run(name, depth=depth, write=write) for depth in DEPTHS]
                rates[name] = [figure.rate / 1000 for figure in figures]
                rows.append([name, *(f"{figure.rate / 1000:.1f} ({figure.cpu:.2f})" for figure in figures)])
            text.append(f"### 4 KiB {verb}s, thousands per second (µs of processor time for each), by depth")
            text.append(table(["handler", *map(str, DEPTHS)], rows))
            text.append(
                plot(f"simulator-{verb}", f"4 KiB {verb}s", DEPTHS, rates, x_label="depth", y_label="thousands/s")
            )

        rows = []
        for count in SCALE if not arguments.quick else DEVICES:
            figure = run("async def", depth=32, devices=count)
            rows.append([count, f"{figure.rate / 1000:.1f}", figure.cpu])
        text.append("### Devices in one process, all busy: 4 KiB reads, `async def`, depth 32 each")
        text.append(table(["devices", "thousands/s in all", "µs CPU each"], rows))
        alone, among = run("async def", depth=32), run("async def", depth=32, idle=199)
        share = among.rate / alone.rate
        text.append(
            f"One busy device among 199 idle ones, against the same alone: {against(share, 0.95)}.\n\n"
            f"200 idle devices: {grown:.0f} KiB of memory each (< 1024), {percent:.3f} % of a core for all of them "
            f"(< 0.5), {woken} wake-ups of devices."
        )
        claim = (
            f"200 idle disks in one process take {grown:.0f} KiB each and {percent:.2f} % of a core in all; a busy one "
            f"among them does {share:.2f} of what it does alone."
        )

        rates, rows = {}, []
        lengths = LENGTHS if not arguments.quick else LENGTHS[::2]
        for name in ("async def", "file:"):
            for write in (False, True):
                figures = [run(name, depth=8, length=length, write=write) for length in lengths]
                label = f"{name} {'write' if write else 'read'}"
                rates[label] = [figure.rate * length / 1e6 for figure, length in zip(figures, lengths, strict=True)]
                rows.append([label, *rates[label]])
        text.append("### Megabytes per second by block size, depth 8")
        text.append(table(["handler", *(f"{length >> 10} KiB" for length in lengths)], rows))
        text.append(
            plot(
                "simulator-sizes",
                "Block sizes, depth 8",
                [n >> 10 for n in lengths],
                rates,
                x_label="KiB",
                y_label="MB/s",
                log_y=True,
            )
        )
    publish("bench.simulator", "\n\n".join(text), write=arguments.write, elsewhere={README: claims([claim])})


if __name__ == "__main__":
    main()
