"""What a command costs in each layer, in nanoseconds: `python -m bench.micro [--rounds N] [--json] [--write]`.

Everything runs on the simulator, in one process and (but for `@blocking`) one thread. The simulator's own share is in
every figure of a served command; it has rows of its own and can be taken off. Answers are checked in every round,
outside of the measured time. Nothing is asserted about time: read the conditions first.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import struct
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

import trio

import tcmu_rs
from tcmu_rs import _native
from tcmu_rs._runtime import Device
from tcmu_rs._service import serve_ring, unit_for

from .conditions import conditions
from .report import README, claims, publish, stated, table

BLOCK = 4096
BLOCKS = 256
SIZE = BLOCK * BLOCKS
BATCH = 32
COMMANDS = 6400
NAA = b"\x60" + bytes(range(1, 16))

TEST_UNIT_READY = bytes(6)
INQUIRY = bytes([0x12, 0, 0, 0, 96, 0])

Completion = tuple[int, int, bytes, bytes, int]


@dataclass(frozen=True)
class Row:
    """One figure: medians over the rounds, with the spread.

    Attributes:
        name: What was measured.
        unit: Of the figures.
        median: Of the time on the clock.
        lowest: Of the same.
        highest: Of the same.
        cpu: Median of the CPU time of the whole process; None where it means nothing.
    """

    name: str
    unit: str
    median: float
    lowest: float
    highest: float
    cpu: float | None = None


class Stopwatch:
    """Adds up the time inside its `with` blocks."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0

    def __enter__(self) -> None:
        self._cpu = time.process_time_ns()
        self._wall = time.perf_counter_ns()

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter_ns() - self._wall
        self.cpu += time.process_time_ns() - self._cpu


def row(name: str, watches: list[Stopwatch], count: int) -> Row:
    """The figures of some rounds of `count` commands each."""
    wall = [watch.wall / count for watch in watches]
    cpu = statistics.median(watch.cpu / count for watch in watches)
    return Row(name, "ns", statistics.median(wall), min(wall), max(wall), cpu)


def pattern(block: int) -> bytes:
    """The bytes of a block, by which one can tell which one it is."""
    return struct.pack("<Q", block * 0x9E3779B97F4A7C15 % 2**64) * (BLOCK // 8)


PATTERNS = [pattern(block) for block in range(BLOCKS)]
READS = [struct.pack(">BBLBHB", 0x28, 0, block * 8, 0, 8, 0) for block in range(BLOCKS)]
WRITES = [struct.pack(">BBLBHB", 0x2A, 0, block * 8, 0, 8, 0) for block in range(BLOCKS)]


class Memory(tcmu_rs.BlockHandler):
    """A disk in memory; subclasses give it its colour."""

    size = SIZE
    fills_reads = True
    max_in_flight = BATCH

    def __init__(self) -> None:
        self.data = bytearray(b"".join(PATTERNS))
        self.view = memoryview(self.data)


class Idle(Memory):
    """Nothing but the device."""

    def __init__(self) -> None:
        pass

    async def read(self, offset: int, iov: tcmu_rs.IoVec) -> None:
        raise NotImplementedError


class Plain(Memory):
    def read(self, offset: int, iov: tcmu_rs.IoVec) -> None:
        iov.copy_from(self.view[offset : offset + iov.nbytes])

    def write(self, offset: int, iov: tcmu_rs.IoVec) -> None:
        iov.copy_into(self.view[offset : offset + iov.nbytes])


class Async(Memory):
    async def read(self, offset: int, iov: tcmu_rs.IoVec) -> None:
        iov.copy_from(self.view[offset : offset + iov.nbytes])

    async def write(self, offset: int, iov: tcmu_rs.IoVec) -> None:
        iov.copy_into(self.view[offset : offset + iov.nbytes])


class Checkpoint(Memory):
    async def read(self, offset: int, iov: tcmu_rs.IoVec) -> None:
        await trio.lowlevel.checkpoint()
        iov.copy_from(self.view[offset : offset + iov.nbytes])

    async def write(self, offset: int, iov: tcmu_rs.IoVec) -> None:
        await trio.lowlevel.checkpoint()
        iov.copy_into(self.view[offset : offset + iov.nbytes])


class Blocking(Memory):
    @tcmu_rs.blocking
    def read(self, offset: int, iov: tcmu_rs.IoVec) -> None:
        iov.copy_from(self.view[offset : offset + iov.nbytes])

    @tcmu_rs.blocking
    def write(self, offset: int, iov: tcmu_rs.IoVec) -> None:
        iov.copy_into(self.view[offset : offset + iov.nbytes])


COLOURS: list[tuple[str, type[Memory]]] = [
    ("def", Plain),
    ("async def", Async),
    ("async def with a checkpoint", Checkpoint),
    ("@blocking", Blocking),
]


def layers(rounds: int) -> list[Row]:
    """The ring and its commands, called from Python with no runtime around them."""
    unit = unit_for(Plain(), serial="bench", naa=NAA)
    kernel = _native.Simulator(checks=False)
    ring = _native.Ring(kernel.memory_fileno(), kernel.consumer_fileno(), kernel.size, unit, fills_reads=True)
    view = memoryview(bytearray(PATTERNS[7]))

    def submit(cdbs: list[bytes], data_out: bytes = b"", data_in: int = 0) -> None:
        kernel.plug()
        for cdb in cdbs:
            kernel.submit(cdb, data_out, data_in)
        kernel.unplug()

    def drain() -> list[_native.Command]:
        commands, _ = ring.drain(BATCH)
        return commands

    def finish(count: int = BATCH) -> list[Completion]:
        done = kernel.process()
        assert len(done) == count, f"{len(done)} answers to {count} commands"
        assert all(status == 0 for _, status, *_ in done), done[0]
        assert not kernel.violations, kernel.violations
        return done

    def complete(commands: list[_native.Command]) -> None:
        for command in commands:
            command.advance()
        ring.commit()

    def fill(commands: list[_native.Command]) -> None:
        for command in commands:
            command.iov.copy_from(view)

    def check(done: list[Completion]) -> None:
        assert all(data == PATTERNS[7] for _, _, _, data, _ in done)

    def simulator_in(watch: Stopwatch) -> None:
        with watch:
            submit(READS[:BATCH], b"", BLOCK)
        commands = drain()
        fill(commands)
        complete(commands)
        with watch:
            done = finish()
        check(done)

    def simulator_out(watch: Stopwatch) -> None:
        with watch:
            submit(WRITES[:BATCH], PATTERNS[7])
        commands = drain()
        assert commands[0].iov.tobytes() == PATTERNS[7]
        complete(commands)
        with watch:
            finish()

    def emulated(cdb: bytes, data_in: int) -> Callable[[Stopwatch], None]:
        def measure(watch: Stopwatch) -> None:
            submit([cdb] * BATCH, b"", data_in)
            with watch:
                rest, _ = ring.drain(BATCH)
                ring.commit()
            assert not rest
            finish()

        return measure

    def decode(watch: Stopwatch) -> None:
        submit(READS[:BATCH], b"", BLOCK)
        with watch:
            commands, _ = ring.drain(BATCH)
        fill(commands)
        complete(commands)
        check(finish())

    def each(what: Callable[[_native.Command], object]) -> Callable[[Stopwatch], None]:
        def measure(watch: Stopwatch) -> None:
            submit(READS[:BATCH], b"", BLOCK)
            commands = drain()
            with watch:
                for command in commands:
                    what(command)
            fill(commands)
            complete(commands)
            check(finish())

        return measure

    def completion(watch: Stopwatch) -> None:
        submit(READS[:BATCH], b"", BLOCK)
        commands = drain()
        fill(commands)
        with watch:
            complete(commands)
        check(finish())

    measured: list[tuple[str, Callable[[Stopwatch], None]]] = [
        ("simulator: submit and process, 4 KiB of Data-In", simulator_in),
        ("simulator: submit and process, 4 KiB of Data-Out", simulator_out),
        ("emulated TEST UNIT READY", emulated(TEST_UNIT_READY, 0)),
        ("emulated INQUIRY", emulated(INQUIRY, 96)),
        ("drain of a READ(10) to a Command", decode),
        ("a Python call of nothing, to compare", each(lambda command: None)),
        ("command.iov", each(lambda command: command.iov)),
        ("command.iov and its memoryviews", each(lambda command: list(command.iov))),
        ("command.iov and copy_from of 4 KiB", each(lambda command: command.iov.copy_from(view))),
        ("advance, and a share of the commit", completion),
    ]
    batches = COMMANDS // BATCH
    rows = []
    for name, measure in measured:
        watches = [Stopwatch() for _ in range(rounds + 1)]
        for watch in watches:
            for _ in range(batches):
                measure(watch)
        # The first round warms up.
        rows.append(row(name, watches[1:], batches * BATCH))
    return rows


class Initiator:
    """Keeps `depth` commands outstanding, and looks at each answer while the watch stands still."""

    def __init__(self, kernel: _native.Simulator, depth: int) -> None:
        self._kernel = kernel
        self._depth = depth

    async def run(self, blocks: list[int], *, write: bool, watch: Stopwatch) -> None:
        """Reads or writes these blocks. What is read must be their patterns."""
        kernel = self._kernel
        sent = done = 0
        tickets: dict[int, int] = {}
        while done < len(blocks):
            due = blocks[sent : sent + self._depth - (sent - done)]
            with watch:
                kernel.plug()
                if write:
                    new = [kernel.submit(WRITES[block], PATTERNS[block]) for block in due]
                else:
                    new = [kernel.submit(READS[block], None, BLOCK) for block in due]
                kernel.unplug()
                await trio.lowlevel.wait_readable(kernel.fileno())
                completions = kernel.process()
            tickets.update(zip(new, due, strict=True))
            for ticket, status, _, data, _ in completions:
                assert (status, data) == (0, b"" if write else PATTERNS[tickets.pop(ticket)])
            sent += len(due)
            done += len(completions)


async def serve(handler: tcmu_rs.BlockHandler, kernel: _native.Simulator, task_status: trio.TaskStatus[Device]) -> None:
    await serve_ring(
        handler,
        memory=kernel.memory_fileno(),
        event=kernel.consumer_fileno(),
        map_size=kernel.size,
        name="bench",
        serial="bench",
        naa=NAA,
        strict=True,
        task_status=task_status,
    )


async def colour(name: str, make: type[Memory], rounds: int) -> list[Row]:
    """A handler of one colour behind the whole runtime, read and written, at depth 1 and 32."""
    rows = []
    for verb in ("read", "write"):
        for depth in (1, 32):
            handler, kernel = make(), _native.Simulator(checks=False)
            initiator = Initiator(kernel, depth)
            blocks = [index * 7 % BLOCKS for index in range(COMMANDS // 4)]
            watches = []
            async with trio.open_nursery() as nursery:
                device: Device = await nursery.start(serve, handler, kernel)
                for _ in range(rounds + 1):
                    watch = Stopwatch()
                    if verb == "write":
                        handler.data[:] = bytes(SIZE)
                    await initiator.run(blocks, write=verb == "write", watch=watch)
                    assert handler.data == b"".join(PATTERNS)
                    watches.append(watch)
                device.stop()
            assert not kernel.violations, kernel.violations
            rows.append(row(f"{name}: {verb} 4 KiB, depth {depth}", watches[1:], len(blocks)))
    return rows


async def timing(rounds: int) -> list[Row]:
    """What it costs to time commands: the same few reads with and without, in turns of a fraction of a millisecond.

    In longer turns the machine gets faster and slower by more than the difference. The share is that of the lower
    quartiles of CPU time.
    """
    rows = []
    for name, make in (("def", Plain), ("async def", Async)):
        for depth in (1, 32):
            kernel = _native.Simulator(checks=False)
            initiator = Initiator(kernel, depth)
            blocks = [index * 7 % BLOCKS for index in range(max(depth, 4))]
            watches: dict[bool, list[Stopwatch]] = {True: [], False: []}
            async with trio.open_nursery() as nursery:
                device: Device = await nursery.start(serve, make(), kernel)
                for turn in range(1000 * (rounds + 1)):
                    # Who comes first takes turns, too.
                    on = (turn + turn // 2) % 2 == 0
                    device._ring.set_timing(on)
                    watch = Stopwatch()
                    await initiator.run(blocks, write=False, watch=watch)
                    watches[on].append(watch)
                device.stop()
            for on, word in ((False, "untimed"), (True, "timed")):
                rows.append(row(f"{name}: read 4 KiB, depth {depth}, {word}", watches[on][500:], len(blocks)))
            low = {on: statistics.quantiles((watch.cpu for watch in watches[on][500:]), n=4)[0] for on in watches}
            share = 1000 * (low[True] / low[False] - 1)
            rows.append(Row(f"{name}: share of timing at depth {depth}", "‰", share, share, share))
    return rows


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(field)


async def memory() -> list[Row]:
    """Growth of the resident set per idle device and per simulator, from 1 to 100 of them.

    Measured once, and before all else: later ones are made of memory that was used before.
    """
    more = 99
    rows: list[Row] = []

    def now() -> dict[str, int]:
        gc.collect()
        return {"anonymous": resident("RssAnon"), "all": resident("VmRSS")}

    def note(name: str, before: dict[str, int]) -> None:
        for kind, after in now().items():
            grown = (after - before[kind]) / more / 1024
            rows.append(Row(f"memory: {name}, {kind}", "KiB", grown, grown, grown))

    kernels = [_native.Simulator(checks=False)]
    before = now()
    kernels += [_native.Simulator(checks=False) for _ in range(more)]
    note("a simulator alone", before)
    handlers = [Idle() for _ in kernels]
    async with trio.open_nursery() as nursery:
        devices: list[Device] = [await nursery.start(serve, handlers[0], kernels[0])]
        before = now()
        for handler, kernel in zip(handlers[1:], kernels[1:], strict=True):
            devices.append(await nursery.start(serve, handler, kernel))
        note("an idle device", before)
        for kernel in kernels:
            kernel.submit(TEST_UNIT_READY)
        with trio.fail_after(10):
            for kernel in kernels:
                await trio.lowlevel.wait_readable(kernel.fileno())
                ((_, status, *_),) = kernel.process()
                assert status == 0
        for device in devices:
            device.stop()
    return rows


async def measure(rounds: int) -> list[Row]:
    rows = await memory()
    rows += layers(rounds)
    for name, make in COLOURS:
        rows += await colour(name, make, rounds)
    rows += await timing(rounds)
    return rows


def described(rows: list[Row]) -> str:
    """A table of all figures."""
    cells: list[list[object]] = [
        [
            row.name,
            row.unit,
            *map(round, (row.median, row.lowest, row.highest)),
            "" if row.cpu is None else round(row.cpu),
        ]
        for row in rows
    ]
    return table(["what", "unit", "median", "lowest", "highest", "CPU"], cells)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="rounds of each measurement (9)")
    parser.add_argument("--json", action="store_true", help="figures and conditions as JSON")
    parser.add_argument("--write", action="store_true", help="put the figures into bench/RESULTS.md")
    arguments = parser.parse_args()
    if arguments.rounds < 1:
        parser.error("at least one round")
    with ExitStack() as stack:
        # The collector would run in somebody's share; what is garbage is counted, and there is none in cycles here.
        gc.disable()
        stack.callback(gc.enable)
        rows = trio.run(measure, arguments.rounds)
    if arguments.json:
        print(json.dumps({"conditions": conditions(), "rows": [asdict(item) for item in rows]}, indent=1))
        return
    note = (
        "Per command, or per device. A served command includes the simulator's share; the rows of the simulator tell "
        "how much that is. At depth 1 both sides of the ring wake up in one event loop for each command, which is most "
        "of the figure."
    )
    text = [note, stated(rounds=arguments.rounds), described(rows)]
    shares = [item.median / 10 for item in rows if item.unit == "‰"]
    sentence = (
        f"The histograms of `tcmu-rs stats` take {min(shares):.1f} to {max(shares):.1f} % of the processor time of a "
        "4 KiB read on the simulator, by depth and kind of handler."
    )
    text.append(f"Share of timing: {sentence} (< 2 %)")
    publish("bench.micro", "\n\n".join(text), write=arguments.write, elsewhere={README: claims([sentence])})


if __name__ == "__main__":
    main()
