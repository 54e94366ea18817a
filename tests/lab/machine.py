"""A virtual machine with a real kernel, which runs one job and is gone.

The guest is QEMU in software emulation: `/dev/kvm` is often absent where tests run, and where it is present
it does not always work. Its root file system is the host's, so a job sees the checkout, the virtual
environment and all programs where they are; what it writes stays in the guest's memory.

Three ways lead out of the guest: a virtio port carries the job's output and, in records marked by a nonce,
what became of it; the serial console is the kernel's log alone; one directory is shared (`Machine.shared`).
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
import mmap
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from .errors import BootError, LabError
from .initramfs import Entry, archive
from .provision import Provision, provide

CHECKOUT = Path(__file__).resolve().parents[2]
"""The directory in which jobs run unless they say otherwise."""

SHARED = "/run/lab/shared"
"""Where the guest sees `Machine.shared`; jobs find it as ``$TCMU_LAB_SHARED``."""

DEFAULT_TIMEOUT = 300.0
"""Seconds that a job may take, not counting the boot."""

_BOOT_TIMEOUT = 180.0
"""Five seconds on an idle machine; generous, as software emulation beside another build is slow."""

_DESCRIBE_TIMEOUT = 60.0
_QUIT_TIMEOUT = 15.0
_TAIL_LINES = 60
_JOB_STARTS = "lab: the job starts"
_PANIC = "Kernel panic - not syncing"

_COMMAND_LINE = (
    "console=ttyS0",
    # A panic ends the machine at once and is found in the console; an oops is no state to go on from.
    "panic=-1",
    "oops=panic",
    # Tests read what the kernel said, some after half an hour.
    "log_buf_len=8M",
    # A busy host stalls the virtual CPUs, which is no fault of the guest.
    "nowatchdog",
    "rcupdate.rcu_cpu_stall_timeout=120",
    # Both are dear under emulation, and protect users of the guest from each other: there is one.
    "init_on_alloc=0",
    "mitigations=off",
    # Otherwise the kernel doubts the emulated counter and asks the HPET: a clock reading costs twice as much.
    "tsc=reliable",
)

# Places of the host that the guest covers with file systems of its own.
_COVERED = frozenset({"dev", "proc", "run", "sys"})

# What the kernel says when it finds a fault in itself. Hung tasks count: a TCMU ring can hang one for ever.
KERNEL_FAULT = re.compile(r"Kernel panic|Oops:|BUG:|WARNING: CPU|INFO: task .* blocked|INFO: rcu.*stall|UBSAN:|KASAN:")


@functools.cache
def _clock_parameters() -> list[str]:
    """Tells the guest how fast its time stamp counter runs: as fast as the host's, which QEMU hands through.

    Left to itself the kernel counts for some milliseconds while a timer of QEMU's runs. A busy host stalls QEMU just
    then now and again, and the guest's clock goes ten times too fast for the rest of its life: every time-out in it
    strikes too early.
    """
    # rdtsc; shl rdx, 32; or rax, rdx; ret
    code = bytes.fromhex("0f31 48c1e220 4809d0 c3")
    try:
        page = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:  # forbidden by some policies
        return []
    page.write(code)
    counter = ctypes.CFUNCTYPE(ctypes.c_uint64)(ctypes.addressof(ctypes.c_char.from_buffer(page)))

    def measure() -> float:
        first, started = counter(), time.monotonic_ns()
        time.sleep(0.02)
        last, ended = counter(), time.monotonic_ns()
        return float((last - first) / (ended - started) * 1e6)

    return [f"tsc_early_khz={statistics.median(measure() for _ in range(5)):.0f}"]


class Verdict(enum.Enum):
    """How a job ended."""

    EXITED = "exited"
    """It ran to its end; `Result.returncode` says with what."""
    TIMED_OUT = "timed out"
    """It took longer than it may; the console's end shows what hung."""
    PANICKED = "panicked"
    """The kernel panicked or oopsed first."""
    KILLED = "killed"
    """`Machine.kill` cut the power first."""
    GONE = "went down by itself"
    """The machine went down by itself: the job rebooted it, or QEMU failed."""


@dataclass(frozen=True, repr=False)
class Result:
    """What became of a job.

    Attributes:
        job: The script.
        verdict: How it ended.
        returncode: Its exit status, None unless the verdict is EXITED.
        output: Everything that it wrote to standard output and standard error.
        dmesg: The kernel's log, from the boot on.
        boot_seconds: From starting QEMU to starting the job.
        job_seconds: From starting the job to its end.
    """

    job: str
    verdict: Verdict
    returncode: int | None
    output: bytes
    dmesg: str
    boot_seconds: float
    job_seconds: float

    @property
    def text(self) -> str:
        """The output as text; bytes that are not UTF-8 appear as escapes."""
        return self.output.decode(errors="backslashreplace")

    @property
    def kernel_faults(self) -> list[str]:
        """The lines in which the kernel reported a fault of its own: warnings, hung tasks, an oops."""
        return [line for line in self.dmesg.splitlines() if KERNEL_FAULT.search(line)]

    @property
    def summary(self) -> str:
        """One line on how the job ended."""
        if self.verdict is Verdict.EXITED:
            said = f"exited with status {self.returncode}"
        elif self.verdict is Verdict.PANICKED:
            said = "ended by a kernel panic"
        elif self.verdict is Verdict.GONE:
            said = "ended as the guest went down by itself"
        elif self.verdict is Verdict.KILLED:
            said = "was killed"
        else:
            said = self.verdict.value
        return f"job {said} after {self.job_seconds:.1f} s (booted in {self.boot_seconds:.1f} s)"

    def report(self) -> str:
        """What a person wants to see: the output and, unless all is well, the end of the kernel's log."""
        parts = [self.summary, "--- output ---", self.text.rstrip("\n")]
        if self.returncode != 0 or self.kernel_faults:
            parts += ["--- end of the kernel log ---", _tail(self.dmesg)]
        return "\n".join(parts)

    def check(self) -> Result:
        """Return self if the job exited with status 0, or else raise `LabError` with a report."""
        if self.returncode != 0:
            raise LabError(self.report())
        return self

    def __repr__(self) -> str:
        return f"<Result: {self.summary}>"


def run(
    job: str,
    *,
    timeout: float = DEFAULT_TIMEOUT,
    env: Mapping[str, str] | None = None,
    disks: Sequence[Path] = (),
    memory: str = "2G",
    cpus: int = 2,
    erms: bool = False,
    on_output: Callable[[bytes], object] | None = None,
) -> Result:
    """Boot a machine, run `job` in it and return what became of it.

    The arguments are those of `Machine`.
    """
    with Machine(
        job, timeout=timeout, env=env, disks=disks, memory=memory, cpus=cpus, erms=erms, on_output=on_output
    ) as machine:
        return machine.wait()


@dataclass
class _Progress:
    """What the guest has said so far, kept under `Machine._changed`."""

    output: bytearray = field(default_factory=bytearray)
    started: float | None = None
    exited: float | None = None
    status: int | None = None
    described: bool = False
    ended: bool = False


class Machine:
    """A machine that runs one job, as a context manager for those who have something to do meanwhile.

    The job is a bash script, run as root with the checkout as its directory, an empty standard input, and
    the virtual environment of this process first in its path. The modules target_core_user, tcm_loop, sd_mod
    and sg are loaded, configfs is mounted, `lo` is up, ``$TMPDIR`` is a tmpfs. No udev and no dbus run:
    devices appear in /dev by themselves, links to them do not. Start a job with ``set -e`` if it shall end at
    its first failure.

    Disks are those of a machine whose power fails when the job ends: what a job has to find again, it syncs.

    Resource handling: entering the context boots the machine, leaving it kills the machine if it still
    runs and deletes `shared`. If this process dies the machine goes too.

    Args:
        job: The script.
        timeout: Seconds that the job may take, not counting the boot.
        env: Variables for the job besides those it has anyway.
        disks: Files of the host that the guest has as /dev/vda, /dev/vdb, … What the guest wrote survives it.
        memory: Size of the guest's memory, as QEMU writes it. Half of it may be used for files.
        cpus: Number of virtual CPUs.
        erms: Whether they offer `rep movsb`, with which the kernel copies then: it is emulated byte by byte.
        on_output: Called with each piece of the output as it comes, from another thread.
        directory: Where the job runs.
        provision: What to boot with, if it is not what `provide` finds.
    """

    def __init__(
        self,
        job: str,
        *,
        timeout: float = DEFAULT_TIMEOUT,
        env: Mapping[str, str] | None = None,
        disks: Sequence[Path] = (),
        memory: str = "2G",
        cpus: int = 2,
        erms: bool = False,
        on_output: Callable[[bytes], object] | None = None,
        directory: Path = CHECKOUT,
        provision: Provision | None = None,
    ) -> None:
        self.job = job
        self.timeout = timeout
        self._environment = {**_environment(), **(env or {})}
        self._disks = disks
        self._memory = memory
        self._cpus = cpus
        self._processor = "max" if erms else "max,-erms,-fsrm"
        self._on_output = on_output
        self._directory = directory
        self._provision = provision
        self._nonce = secrets.token_hex(16)
        self._progress = _Progress()
        self._changed = threading.Condition()
        self._verdict: Verdict | None = None
        self._result: Result | None = None

    def __enter__(self) -> Machine:
        provision = self._provision or provide()
        for path in (self._directory, Path(sys.prefix), provision.kernel.modules):
            if path.parts[1:2] and path.parts[1] in _COVERED:
                raise LabError(f"the guest cannot see {path}, as it has its own /{path.parts[1]}; move it elsewhere")
        self._scratch = Path(tempfile.mkdtemp(prefix="tcmu-lab-"))
        try:
            self.shared.mkdir()
            boot = provision.initramfs.read_bytes() + archive(self._entries(provision))
            self._file("initramfs").write_bytes(boot)
            self._port, port = socket.socketpair()
            with port, self._file("qemu.log").open("wb") as log:
                self._booted = time.monotonic()
                self._qemu = subprocess.Popen(
                    self._command(provision, port.fileno()),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    pass_fds=[port.fileno()],
                )
        except BaseException:
            shutil.rmtree(self._scratch)
            raise
        self._reader = threading.Thread(target=self._read, name="lab output", daemon=True)
        self._reader.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._qemu.kill()
        self._qemu.wait()
        self._reader.join()
        self._port.close()
        shutil.rmtree(self._scratch)

    @property
    def shared(self) -> Path:
        """A directory that the guest has too, as `SHARED`, until the context is left.

        What the guest has written there is here, even if it dies the next moment.
        """
        return self._file("shared")

    @property
    def output(self) -> bytes:
        """What the job has written so far."""
        with self._changed:
            return bytes(self._progress.output)

    @property
    def running(self) -> bool:
        """Whether the job may still do something."""
        with self._changed:
            return not self._over()

    def wait_for_output(self, wanted: bytes, timeout: float = DEFAULT_TIMEOUT) -> None:
        """Wait until the job has written `wanted`.

        Raises:
            LabError: The job ended, or `timeout` seconds went by, without it.
        """
        with self._changed:
            self._changed.wait_for(lambda: wanted in self._progress.output or self._over(), timeout)
            if wanted in self._progress.output:
                return
            happened = "the job ended" if self._over() else f"{timeout:.0f} s went by"
            seen = self._progress.output.decode(errors="backslashreplace")
        raise LabError(f"{happened} without the output {wanted!r}; seen was:\n{seen}\n{_tail(self._console())}")

    def wait(self) -> Result:
        """Wait for the job's end and return what became of it.

        A job that takes too long is ended; the kernel's log then has a list of all tasks and the stacks of
        those that are blocked.

        Raises:
            BootError: The job never started.
        """
        if self._result is not None:
            return self._result
        with self._changed:
            if self._changed.wait_for(lambda: self._progress.started is not None or self._over(), _BOOT_TIMEOUT):
                started = self._progress.started or 0.0
                self._changed.wait_for(self._over, started + self.timeout - time.monotonic())
            over = self._over()
        if not over:
            self.give_up()
        return self._finish()

    def give_up(self) -> None:
        """End a machine whose job takes too long, once its kernel has told what hangs; then `wait` for it."""
        with self._changed:
            if self._over():
                return
            self._verdict = Verdict.TIMED_OUT
            if self._progress.started is not None:
                try:
                    self._port.sendall(b"describe\n")
                except OSError:
                    return  # the machine went down just now
                self._changed.wait_for(lambda: self._progress.described or self._over(), _DESCRIBE_TIMEOUT)
        self._qemu.kill()

    def kill(self) -> None:
        """Cut the machine's power. `wait` returns what was seen until then.

        The guest loses everything that it had not written to its disks. What it had written, flushed or not,
        is in the host's files: a disk with a volatile cache of its own would lose more.
        """
        with self._changed:
            if not self._over():
                self._verdict = Verdict.KILLED
        self._qemu.kill()

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Stop the machine for the length of a `with` block, in the middle of whatever it does.

        Its disks, copied meanwhile, are what `kill` would have left: QEMU's threads stand still between two system
        calls, and what they have not done yet is not done.
        """
        self._qemu.send_signal(signal.SIGSTOP)
        # That all threads have stopped.
        os.waitid(os.P_PID, self._qemu.pid, os.WSTOPPED | os.WEXITED | os.WNOWAIT)
        try:
            yield
        finally:
            self._qemu.send_signal(signal.SIGCONT)

    def _over(self) -> bool:
        return self._progress.ended or self._progress.exited is not None

    def _finish(self) -> Result:
        # Politely, for QEMU to finish what it is writing to the disks.
        self._qemu.terminate()
        try:
            self._qemu.wait(_QUIT_TIMEOUT)
        except subprocess.TimeoutExpired:
            self._qemu.kill()
            self._qemu.wait()
        self._reader.join()
        now = time.monotonic()
        console = self._console()
        said_by_qemu = self._file("qemu.log").read_text(errors="replace")
        progress = self._progress
        if progress.exited is not None:
            verdict = Verdict.EXITED
        elif _PANIC in console:
            verdict = Verdict.PANICKED
        else:
            verdict = self._verdict or Verdict.GONE
        if progress.started is None and verdict is not Verdict.KILLED:
            why = "its kernel panicked" if verdict is Verdict.PANICKED else f"it {verdict.value}"
            raise BootError(f"the guest did not boot ({why}); QEMU and the console:\n{said_by_qemu}{_tail(console)}")
        if verdict is Verdict.GONE:
            console += said_by_qemu
        started = progress.started or now
        self._result = Result(
            job=self.job,
            verdict=verdict,
            returncode=progress.status,
            output=bytes(progress.output),
            dmesg=console,
            boot_seconds=started - self._booted,
            job_seconds=(progress.exited or now) - started,
        )
        return self._result

    def _read(self) -> None:
        """Read the port until QEMU is gone: output of the job, and records on it."""
        records = _Records(self._nonce)
        while True:
            try:
                data = self._port.recv(1 << 16)
            except ConnectionError:
                data = b""
            for piece in records.feed(data) if data else [records.rest()]:
                self._take(piece)
            if not data:
                break
        with self._changed:
            self._progress.ended = True
            self._changed.notify_all()

    def _take(self, piece: bytes | str) -> None:
        progress = self._progress
        with self._changed:
            self._changed.notify_all()
            if isinstance(piece, str):
                word, _, argument = piece.partition(" ")
                if word == "started":
                    progress.started = time.monotonic()
                elif word == "described":
                    progress.described = True
                elif word == "exited":
                    progress.exited = time.monotonic()
                    progress.status = int(argument)
                return
            if progress.exited is not None:
                return  # said by a daemon that the job left behind
            progress.output += piece
        if piece and self._on_output is not None:
            self._on_output(piece)

    def _entries(self, provision: Provision) -> Iterator[Entry]:
        """The part of the initramfs that belongs to this job."""
        settings = {
            "LAB_NONCE": self._nonce,
            "LAB_MODULES": str(provision.kernel.modules),
            "LAB_DIRECTORY": str(self._directory),
        }
        yield Entry.directory("job")
        yield Entry.file("job/guest.sh", Path(__file__).with_name("guest.sh").read_bytes())
        yield Entry.file("job/settings", _assignments(settings))
        yield Entry.file("job/environment", _assignments(self._environment))
        yield Entry.file("job/job", self.job.encode(errors="surrogateescape"))

    def _command(self, provision: Provision, port: int) -> list[str]:
        options = [
            *("-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", self._processor),
            *("-smp", str(self._cpus), "-m", self._memory),
            *("-nodefaults", "-no-user-config", "-no-reboot", "-display", "none"),
            *("-kernel", str(provision.kernel.image), "-initrd", str(self._file("initramfs"))),
            *("-append", " ".join([*_COMMAND_LINE, *_clock_parameters()])),
            *(
                "-chardev",
                f"file,id=console,path={_escaped(self._file('console'))}",
                "-serial",
                "chardev:console",
            ),
            *("-device", "virtio-serial", "-chardev", f"socket,id=port,fd={port}"),
            *("-device", "virtserialport,chardev=port"),
            *_share("host", Path("/"), ",readonly=on,multidevs=remap"),
            *_share("shared", self.shared),
        ]
        for number, disk in enumerate(self._disks):
            drive = f"if=none,id=disk{number},format=raw,discard=unmap,file={_escaped(disk.resolve())}"
            options += ["-drive", drive, "-device", f"virtio-blk,drive=disk{number},serial=disk{number}"]
        return [str(provision.qemu), *options]

    def _console(self) -> str:
        try:
            text = self._file("console").read_text(errors="replace")
        except FileNotFoundError:  # QEMU failed before it made one
            return ""
        return text.replace("\r\n", "\n")

    def _file(self, name: str) -> Path:
        return self._scratch / name


class _Records:
    """Tells the job's output from the records in it, in a stream that arrives in pieces of any size.

    A record is RS, the nonce, a blank, text, RS. Only guest.sh knows the nonce.
    """

    def __init__(self, nonce: str) -> None:
        self._start = f"\x1e{nonce} ".encode()
        self._pending = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes | str]:
        """Yield output as bytes and the text of records as str, all that is certain by now."""
        self._pending += data
        while (start := self._pending.find(self._start)) >= 0:
            end = self._pending.find(b"\x1e", start + len(self._start))
            yield self._cut(start)
            if end < 0:
                return
            record = self._cut(end + 1 - start)
            yield record[len(self._start) : -1].decode()
        possible = self._pending.rfind(b"\x1e")
        if possible < 0 or not self._start.startswith(self._pending[possible:]):
            possible = len(self._pending)
        yield self._cut(possible)

    def rest(self) -> bytes:
        """What looked like the beginning of a record when the stream ended."""
        return self._cut(len(self._pending))

    def _cut(self, length: int) -> bytes:
        piece = bytes(self._pending[:length])
        del self._pending[:length]
        return piece


def _environment() -> dict[str, str]:
    """What every job has in its environment."""
    binaries = [
        str(Path(sys.executable).parent),
        "/usr/local/sbin",
        "/usr/local/bin",
        "/usr/sbin",
        "/usr/bin",
    ]
    environment = {
        "HOME": "/root",
        "LANG": "C.UTF-8",
        "PATH": ":".join([*binaries, "/sbin", "/bin"]),
        "TCMU_LAB_GUEST": "1",
        "TCMU_LAB_SHARED": SHARED,
        "TMPDIR": "/run/tmp",
        "USER": "root",
    }
    if sys.prefix != sys.base_prefix:
        environment["VIRTUAL_ENV"] = sys.prefix
    return environment


def _assignments(variables: Mapping[str, str]) -> bytes:
    """A shell script that sets `variables`."""
    return "".join(f"{name}={shlex.quote(value)}\n" for name, value in variables.items()).encode()


def _share(name: str, path: Path, more: str = "") -> Sequence[str]:
    """QEMU's options for a directory that the guest can mount over 9p."""
    directory = f"local,id={name},path={_escaped(path)},security_model=none{more}"
    return ("-fsdev", directory, "-device", f"virtio-9p-pci,fsdev={name},mount_tag={name}")


def _escaped(path: Path) -> str:
    """A path inside an option of QEMU's, where a comma ends the value."""
    return str(path).replace(",", ",,")


def _tail(text: str) -> str:
    """The last lines of a kernel log since the job started, and all of it since its first fault."""
    lines = text.partition(_JOB_STARTS)[2].splitlines() or text.splitlines()
    end = max(len(lines) - _TAIL_LINES, 0)
    first = next((number for number, line in enumerate(lines) if KERNEL_FAULT.search(line)), end)
    return "\n".join(lines[min(first, end) :]).strip("\n")
