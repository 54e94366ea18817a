"""The end of a server whose disk is being written to."""

from __future__ import annotations

import itertools
import json
import mmap
import os
import random
import signal
import subprocess
import threading
from pathlib import Path

import pytest

from .disks import MIB, TCMU_RS, end, traces

SIZE = 256 * MIB
RECORD = 8192


class Writer(threading.Thread):
    """Writes records, each to a place of its own, and remembers those that the disk has acknowledged."""

    def __init__(self, path: str, places: list[int]) -> None:
        super().__init__()
        self._path = path
        self._places = places
        self.acknowledged: list[int] = []
        self.error: OSError | None = None

    def run(self) -> None:
        fd = os.open(self._path, os.O_WRONLY | os.O_DIRECT)
        try:
            for place in self._places:
                with mmap.mmap(-1, RECORD) as buffer:
                    buffer[:] = record(place)
                    os.pwritev(fd, [buffer], place * RECORD)
                self.acknowledged.append(place)
        except OSError as error:
            self.error = error
        finally:
            os.close(fd)


def record(place: int) -> bytes:
    return random.Random(place).randbytes(RECORD)


@pytest.mark.guest(timeout=600)
@pytest.mark.parametrize("signals", [1, 2], ids=["SIGTERM", "SIGTERM twice"])
def test_a_write_that_was_acknowledged_is_in_the_file(tmp_path: Path, signals: int) -> None:
    """Whatever else goes on: fio keeps the queue full, and writes are on their way when the signal comes."""
    backing = tmp_path / "disk.img"
    command = [str(TCMU_RS), "attach", f"file:{backing}", "--create", "--size", str(SIZE), "--json"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    attached = json.loads(server.stdout.readline())
    device = attached["device"]

    # The upper half is for fio, and the lower one for the writers.
    places = random.Random(1).sample(range(SIZE // 2 // RECORD), k=SIZE // 2 // RECORD)
    writers = [Writer(device, places[number::8]) for number in range(8)]
    fio = ["fio", "--name=load", f"--filename={device}", "--direct=1", "--ioengine=libaio", "--iodepth=32"]
    fio += ["--rw=randwrite", "--bsrange=4k-256k", f"--offset={SIZE // 2}", f"--size={SIZE // 2}"]
    fio += ["--time_based", "--runtime=600"]
    load = subprocess.Popen(fio, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        wait_for_writes(device)
        for writer in writers:
            writer.start()
        while min(len(writer.acknowledged) for writer in writers) < 20:
            assert server.poll() is None
            writers[0].join(0.05)
        for _ in range(signals):
            server.send_signal(signal.SIGTERM)
        assert server.wait(120) == 0
        said, _ = load.communicate(timeout=120)
        print(said)
        for writer in writers:
            writer.join(120)
            assert not writer.is_alive()
            # It was not done: the disk went away under it.
            assert writer.error is not None
        assert load.returncode != 0
    finally:
        load.kill()
        load.communicate()
        end(server)

    assert [path for path in traces(attached) if path.exists()] == []
    with backing.open("rb") as file:
        lost = []
        for place in itertools.chain.from_iterable(writer.acknowledged for writer in writers):
            file.seek(place * RECORD)
            if file.read(RECORD) != record(place):
                lost.append(place)
    assert lost == []


def wait_for_writes(device: str) -> None:
    """Waits until the disk has answered writes of another process."""
    statistics = Path("/sys/block", Path(device).name, "stat")
    waiting = threading.Event()
    for _ in range(2400):
        if int(statistics.read_text().split()[4]) > 0:
            return
        waiting.wait(0.05)
    raise AssertionError("nobody has written anything for two minutes")
