"""The parent of servers, with real processes and signals; what is served does not matter to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

SERVER = """
import logging, os, signal, subprocess, sys, time
import trio
from tcmu_rs import _supervise
from tcmu_rs._serving import serve_until_signal, supervised
from contextlib import asynccontextmanager

logging.basicConfig(format="%(message)s")
_supervise._DELAYS = (0.0, 0.1, 0.2)
mode = sys.argv[1]

class Served:
    def hurry(self):
        print("hurry", flush=True)

@asynccontextmanager
async def serving(succession):
    if mode == "fails at once":
        os._exit(3)
    if mode == "fails later" and not leash.first:
        os._exit(4)
    try:
        yield Served()
    finally:
        print("stopping", flush=True)
        with trio.CancelScope(shield=True):
            await trio.sleep(0.3 if mode == "slow" else 0)

def announce(served):
    leash.tell("ready disk")
    if mode == "succeeded" and leash.first:
        heir = os.fork()
        if heir == 0:
            signal.pause()
        leash.tell(f"heir {heir}")
        print(heir, flush=True)
        os._exit(0)
    print(os.getpid(), leash.name or "-", leash.delay, flush=True)

def hold(leash):
    if mode == "succeeded":
        print("fences", os.getpid(), "as it was forked" if leash.outdated else "", flush=True)

leash = supervised(_supervise.Leash.inherited(), "a test", hold)
trio.run(serve_until_signal, serving, announce, leash)
"""


class Service:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def line(self) -> list[str]:
        assert self.process.stdout is not None
        return self.process.stdout.readline().split()

    def server(self) -> tuple[int, str, float]:
        """The next server that is ready: its number, the name it was given, and how long it had to wait."""
        pid, name, delay = self.line()
        return int(pid), name, float(delay)

    def end(self) -> tuple[int, str, str]:
        said, errors = self.process.communicate(timeout=20)
        return self.process.returncode, said, errors


@contextmanager
def service(mode: str = "serves") -> Iterator[Service]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVER, mode],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        yield Service(process)
    finally:
        # Nothing of the whole session is left, whatever the test has come to.
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_a_killed_server_is_started_again_with_the_name_of_its_device() -> None:
    with service() as it:
        first, name, _ = it.server()
        assert name == "-"
        os.kill(first, signal.SIGKILL)
        second, name, delay = it.server()
        assert (second != first, name, delay) == (True, "disk", 0.0)
        it.process.terminate()
        code, _, errors = it.end()
        assert code == 0
        assert "disk: the server ended by signal 9 and is started again" in errors


def test_a_server_that_crashes_again_and_again_waits_longer_each_time_and_that_is_reported() -> None:
    with service() as it:
        delays = []
        for _ in range(4):
            pid, _, delay = it.server()
            delays.append(delay)
            os.kill(pid, signal.SIGSEGV)
        pid, _, delay = it.server()
        assert [*delays, delay] == [0.0, 0.0, 0.1, 0.2, 0.2]
        it.process.terminate()
        assert "it has crashed 4 times in a row" in it.end()[2]


def test_after_an_upgrade_the_device_is_fenced_before_the_new_version_is_loaded() -> None:
    """That took 30 s on a busy machine: commands ran into the kernel's time-out, and initiators saw I/O errors."""
    with service("succeeded") as it:
        os.kill(int(it.line()[0]), signal.SIGKILL)
        _, pid, *forked = it.line()
        assert forked == ["as", "it", "was", "forked"]
        assert it.line() == ["fences", pid]
        assert it.server() == (int(pid), "disk", 0.0)


def test_a_server_that_cannot_begin_is_not_tried_again() -> None:
    with service("fails at once") as it:
        assert it.end() == (3, "", "")


def test_a_server_that_cannot_go_on_is_tried_until_somebody_asks_to_stop() -> None:
    with service("fails later") as it:
        os.kill(it.server()[0], signal.SIGKILL)
        assert it.process.stderr is not None
        for _ in range(3):
            assert "is started again" in it.process.stderr.readline()
        it.process.terminate()
        it.end()
        assert it.process.returncode == 4


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_pass_through(number: signal.Signals) -> None:
    with service() as it:
        it.server()
        it.process.send_signal(number)
        assert it.end() == (0, "stopping\n", "")


@pytest.mark.parametrize("whom", ["parent", "server", "group"])
def test_one_signal_stops_and_two_hurry_wherever_they_are_sent(whom: str) -> None:
    """A terminal and systemd send one to each process, which is no second request."""

    def send() -> None:
        if whom == "group":
            os.killpg(it.process.pid, signal.SIGTERM)
        else:
            os.kill(pid if whom == "server" else it.process.pid, signal.SIGTERM)

    with service("slow") as it:
        pid, _, _ = it.server()
        send()
        assert it.end() == (0, "stopping\n", "")
    with service("slow") as it:
        pid, _, _ = it.server()
        send()
        assert it.line() == ["stopping"]
        send()
        code, said, errors = it.end()
        assert (code, set(said.split()), errors) == (0, {"hurry"}, "")


def test_a_server_outlives_its_parent_and_hears_signals_itself() -> None:
    with service() as it:
        pid, _, _ = it.server()
        it.process.kill()
        it.process.wait()
        os.kill(pid, 0)
        os.kill(pid, signal.SIGTERM)
        said, errors = it.process.communicate(timeout=20)
        assert (said, "the supervisor is gone" in errors) == ("stopping\n", True)


def test_the_parent_hardly_does_anything() -> None:
    with service() as it:
        it.server()

        def used() -> float:
            fields = Path(f"/proc/{it.process.pid}/stat").read_text().rpartition(")")[2].split()
            return int(fields[11]) + int(fields[12])

        before = used()
        time.sleep(0.5)
        assert used() - before <= 1
        assert len(list(Path(f"/proc/{it.process.pid}/task").iterdir())) == 1
        it.process.terminate()
        assert it.end()[0] == 0
