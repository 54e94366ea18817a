"""What runs in the guest whose power is cut: `python -m tests.guest.power ROUND COPIES`.

Every shipped handler serves a disk from a file on /dev/vda. What is on the disks is said first, then they are written
and flushed until the machine is gone. /dev/vdb and those that follow are copies of /dev/vda as other moments have left
it: their handlers are opened without a disk, and looked at. The host has made the files (`prepare`), knows the writes,
for they follow from the round, and hears of flushes.

Lines of output: `found COPY NAME JSON`: for each place who wrote it, where copy 0 is the disk itself; `flushed NAME
ROUND COUNT`: so many writes of the round were done when a flush began that has succeeded; `durable NAME ROUND COUNT`:
this write had FUA and has succeeded.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import trio

import tcmu_rs
from tcmu_rs import BlockHandler, IoVec, Options, _registry

SIZE = 16 << 20
BLOCK = 4096
PLACES = 64
FLUSH_EVERY = 5
MOUNTED = Path("/run/tmp/disk")
COPY = Path("/run/tmp/copy")


@dataclass(frozen=True)
class Kind:
    """How a disk is made and opened.

    Attributes:
        spec: `HANDLER:CONFIG`; the path is put behind.
        options: For both.
        making: For making it alone.
    """

    spec: str
    options: dict[str, str] = field(default_factory=dict)
    making: dict[str, str] = field(default_factory=dict)

    def handler(self, directory: Path, name: str) -> BlockHandler:
        """The disk, to be opened."""
        kind, config = _registry.parse_spec(f"{self.spec}{directory / name}")
        found: BlockHandler = _registry.load(kind).from_config(
            config, Options(extra=self._extra(self.options, directory))
        )
        return found

    async def create(self, directory: Path, name: str) -> None:
        """Makes it."""
        kind, config = _registry.parse_spec(f"{self.spec}{directory / name}")
        extra = self._extra(self.options | self.making, directory)
        await _registry.load(kind).create(config, Options(size=SIZE, create=True, extra=extra))

    def _extra(self, options: dict[str, str], directory: Path) -> dict[str, str]:
        return {key: value.format(directory=directory) for key, value in options.items()}


KEY = {"key-file": "{directory}/key"}
DISKS = {
    "file": Kind("file:"),
    "direct": Kind("file:", {"direct": "on"}),
    "luks": Kind("luks:", KEY),
    "qcow2": Kind("qcow2:"),
    "zstd": Kind("zstd:"),
    "luksqcow2": Kind("luks:qcow2:", KEY),
}


def writes(name: str, round_number: int) -> list[int]:
    """The places that are written in a round, in order."""
    random = Random(f"{name} {round_number}")
    return [random.randrange(PLACES) for _ in range(4000)]


def has_fua(count: int) -> bool:
    """Whether a write is durable by itself."""
    return count % FLUSH_EVERY == 1


def block(name: str, round_number: int, count: int) -> bytes:
    """What a write stores: it says who it is from the first byte to the last."""
    stamp = f"<{name} {round_number} {count}>".encode().ljust(32, b".")
    noise = Random(f"{name} {round_number} {count}").randbytes(BLOCK // 2)
    return stamp * (BLOCK // 64) + noise


def offset(place: int) -> int:
    """Neighbours, and places all over the disk."""
    return (place if place < PLACES // 2 else place * 60) * BLOCK


# On the host.


async def prepare(directory: Path) -> None:
    """Makes the disks in a directory, with something at every place: a new disk may have anything."""
    (directory / "key").write_bytes(b"the key")
    for name, kind in DISKS.items():
        await kind.create(directory, name)
        async with tcmu_rs.Lower(kind.handler(directory, name)) as disk:
            for place in range(PLACES):
                await disk.write(offset(place), IoVec([block(name, -1, place)]))
            await disk.flush()


# In the guest.


def say(*words: object) -> None:
    # One call, so that lines of several threads do not mix.
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def who_wrote(name: str, data: bytes) -> list[int] | None:
    """Which write a block is of, None if it is of none, or not whole."""
    stamp = re.match(rb"<[a-z0-9]+ (-?[0-9]+) ([0-9]+)>", data)
    who = [int(stamp[1]), int(stamp[2])] if stamp else None
    return who if who and data == block(name, *who) else None


def look(name: str, device: str) -> None:
    """Says for each place of a disk which write is there."""
    found = []
    fd = os.open(device, os.O_RDONLY | os.O_DIRECT)
    with mmap.mmap(-1, BLOCK) as buffer:
        for place in range(PLACES):
            assert os.preadv(fd, [buffer], offset(place)) == BLOCK
            found.append(who_wrote(name, bytes(buffer)))
    os.close(fd)
    say("found", 0, name, json.dumps(found))


async def look_at_copy(number: int) -> None:
    """The same for all disks of a copy, which need not be served for that."""
    subprocess.run(["mount", f"/dev/vd{'abcdefgh'[number]}", COPY], check=True)
    for name, kind in DISKS.items():
        found = []
        async with tcmu_rs.Lower(kind.handler(COPY, name)) as disk:
            for place in range(PLACES):
                data = bytearray(BLOCK)
                await disk.read(offset(place), IoVec([data]))
                found.append(who_wrote(name, bytes(data)))
        say("found", number, name, json.dumps(found))
    subprocess.run(["umount", COPY], check=True)


def work(name: str, device: str, round_number: int) -> None:
    """Writes, and flushes now and then, until the power fails."""
    fd = os.open(device, os.O_WRONLY | os.O_DIRECT)
    with mmap.mmap(-1, BLOCK) as buffer:
        for count, place in enumerate(writes(name, round_number)):
            buffer[:] = block(name, round_number, count)
            assert os.pwritev(fd, [buffer], offset(place), os.RWF_DSYNC if has_fua(count) else 0) == BLOCK
            if has_fua(count):
                say("durable", name, round_number, count)
            if count % FLUSH_EVERY == FLUSH_EVERY - 1:
                os.fsync(fd)
                say("flushed", name, round_number, count + 1)
    say("finished", name)


async def in_threads(function: Callable[..., None], devices: dict[str, str], *arguments: object) -> None:
    async def run(name: str, device: str) -> None:
        await trio.to_thread.run_sync(function, name, device, *arguments)

    async with trio.open_nursery() as nursery:
        for name, device in devices.items():
            nursery.start_soon(run, name, device)


async def main() -> None:
    round_number, copies = map(int, sys.argv[1:])
    MOUNTED.mkdir()
    COPY.mkdir()
    for number in range(1, copies + 1):
        await look_at_copy(number)
    subprocess.run(["mount", "/dev/vda", MOUNTED], check=True)
    say("mounted")
    devices: dict[str, str] = {}
    all_served = trio.Event()

    async def serve(name: str) -> None:
        async with tcmu_rs.attach(DISKS[name].handler(MOUNTED, name), name) as device:
            assert device.path is not None
            devices[name] = device.path
            if len(devices) == len(DISKS):
                all_served.set()
            await trio.sleep_forever()

    async with trio.open_nursery() as nursery:
        for name in DISKS:
            nursery.start_soon(serve, name)
        await all_served.wait()
        say("attached")
        await in_threads(look, devices)
        say("begins")
        await in_threads(work, devices, round_number)


if __name__ == "__main__":
    trio.run(main)
