"""What runs in the guest whose power is cut: `python -m tests.guest.power STATE`.

Every shipped handler serves a disk from a file on /dev/vda. What is on the disks is said first, then they are written
and flushed until the machine is gone. The host knows the writes, for they follow from the round, and hears of flushes.

Lines of output: `found NAME JSON`: for each place who wrote it; `flushed NAME ROUND COUNT`: so many writes of the round
were done when a flush began that has succeeded.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import subprocess
import sys
import threading
from pathlib import Path
from random import Random

from .disks import TCMU_RS, run

MIB = 1 << 20
SIZE = 16 * MIB
BLOCK = 4096
PLACES = 96
FLUSH_EVERY = 5
MOUNTED = Path("/run/tmp/disk")

KEY = ["-o", "key-file=/run/tmp/disk/key"]
DISKS: dict[str, tuple[list[str], list[str]]] = {
    "file": ([], []),
    "luks": (KEY, ["-o", "iter-time=1"]),
    "qcow2": ([], []),
    "zstd": ([], []),
}
"""The handlers, options for their disks, and more of them for making those."""


def writes(name: str, round_number: int) -> list[int]:
    """The places that are written in a round, in order."""
    random = Random(f"{name} {round_number}")
    return [random.randrange(PLACES) for _ in range(4000)]


def block(name: str, round_number: int, count: int) -> bytes:
    """What a write stores: it says who it is from the first byte to the last."""
    stamp = f"<{name} {round_number} {count}>".encode().ljust(32, b".")
    noise = Random(f"{name} {round_number} {count}").randbytes(BLOCK // 2)
    return stamp * (BLOCK // 64) + noise


def offset(place: int) -> int:
    """Neighbours, and places all over the disk."""
    return (place if place < PLACES // 2 else place * 37) * BLOCK


def attach(name: str) -> str:
    options, _ = DISKS[name]
    process = subprocess.Popen(
        [TCMU_RS, "attach", f"{name}:{MOUNTED / name}", *options, "--json"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    return str(json.loads(process.stdout.readline())["device"])


def say(*words: object) -> None:
    # One call, so that lines of several threads do not mix.
    os.write(1, (" ".join(map(str, words)) + "\n").encode())


def begin(name: str, device: str) -> None:
    """Writes every place: a new disk may have anything."""
    fd = os.open(device, os.O_WRONLY | os.O_DIRECT)
    with mmap.mmap(-1, BLOCK) as buffer:
        for place in range(PLACES):
            buffer[:] = block(name, -1, place)
            assert os.pwritev(fd, [buffer], offset(place)) == BLOCK
    os.fsync(fd)
    os.close(fd)


def look(name: str, device: str) -> None:
    """Says for each place which write is there, None if it is none or not whole."""
    found: list[list[int] | None] = []
    fd = os.open(device, os.O_RDONLY | os.O_DIRECT)
    with mmap.mmap(-1, BLOCK) as buffer:
        for place in range(PLACES):
            assert os.preadv(fd, [buffer], offset(place)) == BLOCK
            data = bytes(buffer)
            stamp = re.match(rb"<[a-z0-9]+ (-?[0-9]+) ([0-9]+)>", data)
            who = [int(stamp[1]), int(stamp[2])] if stamp else None
            found.append(who if who and data == block(name, *who) else None)
    os.close(fd)
    say("found", name, json.dumps(found))


def work(name: str, device: str, round_number: int) -> None:
    """Writes, and flushes now and then, until the power fails."""
    fd = os.open(device, os.O_WRONLY | os.O_DIRECT)
    with mmap.mmap(-1, BLOCK) as buffer:
        for count, place in enumerate(writes(name, round_number)):
            buffer[:] = block(name, round_number, count)
            assert os.pwritev(fd, [buffer], offset(place)) == BLOCK
            if count % FLUSH_EVERY == FLUSH_EVERY - 1:
                os.fsync(fd)
                say("flushed", name, round_number, count + 1)
    say("finished", name)


def main() -> None:
    round_number = int(sys.argv[1])
    MOUNTED.mkdir()
    if round_number == 0:
        run("mkfs.ext4", "-q", "-F", "/dev/vda")
    run("mount", "/dev/vda", MOUNTED)
    if round_number == 0:
        Path(MOUNTED, "key").write_bytes(b"the key")
        for name, (options, more) in DISKS.items():
            run(TCMU_RS, "create", f"{name}:{MOUNTED / name}", "--size", "16M", *options, *more)
        os.sync()
    devices = {name: attach(name) for name in DISKS}
    for name, device in devices.items():
        if round_number == 0:
            begin(name, device)
        look(name, device)
    say("begins")
    for name, device in devices.items():
        threading.Thread(target=work, args=(name, device, round_number)).start()


if __name__ == "__main__":
    main()
