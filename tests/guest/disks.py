"""Disks for tests in the guest, each served by a process of its own, and the tools that judge them."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import mmap
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

TCMU_RS = Path(sys.executable).with_name("tcmu-rs")
MIB = 1 << 20

_WARNING = 4
_COMPLAINT = re.compile(r"sense key|i/o error|invalid|asked for|not supported|unsupported|fail", re.IGNORECASE)
# What slow emulation makes the kernel say about itself.
_EMULATION = re.compile(r"hrtimer: |clocksource: |perf: |rcu: |sched: ")


class KernelLog:
    """What the kernel says from now on."""

    def __init__(self) -> None:
        self._fd = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.lseek(self._fd, 0, os.SEEK_END)

    def complaints(self) -> list[str]:
        """Takes what was said since the last call, and leaves out what is fine."""
        found = []
        with contextlib.suppress(BlockingIOError):
            while True:
                try:
                    head, _, text = os.read(self._fd, 8192).decode(errors="replace").partition(";")
                except BrokenPipeError:
                    # The oldest records were overwritten; the next read goes on with what is left.
                    found.append("the kernel said more than its log holds")
                    continue
                line = text.partition("\n")[0]
                level = int(head.partition(",")[0]) & 7
                if (level <= _WARNING or _COMPLAINT.search(line)) and not _EMULATION.match(line):
                    found.append(line)
        return found

    def close(self) -> None:
        os.close(self._fd)


@dataclass
class Disk:
    """A disk of this machine, served by `process`.

    Attributes:
        path: /dev/sdX.
        block_size: Bytes of a logical block.
        traces: What must not exist any more when it is detached.
        backing: The file behind it, if there is one.
    """

    process: subprocess.Popen[str]
    path: str
    size: int
    block_size: int
    traces: list[Path]
    backing: Path | None

    @property
    def sysfs(self) -> Path:
        return Path("/sys/block", Path(self.path).name)

    def occupied(self) -> int:
        """Bytes that it takes where it is stored."""
        if self.backing is not None:
            return self.backing.stat().st_blocks * 512
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.findall(r"^RssAnon:\s+(\d+) kB$", status, re.MULTILINE)[0]) << 10

    def write(self, offset: int, data: bytes) -> None:
        """Writes around the page cache."""
        with _direct(self.path, os.O_WRONLY) as fd, mmap.mmap(-1, len(data)) as buffer:
            buffer[:] = data
            assert os.pwritev(fd, [buffer], offset) == len(data)

    def read(self, offset: int, length: int) -> bytes:
        """Reads around the page cache."""
        with _direct(self.path, os.O_RDONLY) as fd, mmap.mmap(-1, length) as buffer:
            assert os.preadv(fd, [buffer], offset) == length
            return bytes(buffer)

    def is_gone(self) -> None:
        """Asserts that it has left nothing behind."""
        assert [path for path in self.traces if path.exists()] == []


@contextmanager
def _direct(path: str, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_DIRECT | os.O_CLOEXEC)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def attached(spec: str, *options: str, directory: Path | None = None, complaints: bool = False) -> Iterator[Disk]:
    """Runs `tcmu-rs attach` in `directory`, and sees to it that it ends well and leaves nothing.

    Neither the server nor the kernel may complain meanwhile, unless `complaints`.
    """
    command = [str(TCMU_RS), "attach", spec, *options, "--json"]
    log = KernelLog()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, cwd=directory)
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line, f"{command} ended with {process.wait()}: {_text(errors.fileno())}"
            record = json.loads(line)
            handler, _, config = spec.partition(":")
            disk = Disk(
                process=process,
                path=record["device"],
                size=record["size"],
                block_size=int(_attribute(record["device"], "logical_block_size")) if record["device"] else 0,
                traces=traces(record),
                backing=Path(config) if handler == "file" else None,
            )
            yield disk
            process.send_signal(signal.SIGTERM)
            # Not one word more than the line.
            assert process.communicate(timeout=120)[0] == ""
            assert (process.returncode, complaints or _text(errors.fileno())) == (0, complaints or "")
            disk.is_gone()
            assert complaints or log.complaints() == []
        except BaseException:
            print(f"{command} said:\n{_text(errors.fileno())}\nthe kernel said:\n" + "\n".join(log.complaints()))
            raise
        finally:
            log.close()
            end(process)


def traces(record: dict[str, str]) -> list[Path]:
    """The paths by which an attached device can be seen, according to what `attach --json` printed."""
    paths = [Path(record["configfs"])]
    if record["target"]:
        paths.append(Path("/sys/kernel/config/target", record["fabric"], record["target"]))
    if record["device"]:
        paths.append(Path(record["device"]))
    return paths


def end(process: subprocess.Popen[str]) -> None:
    """Ends a server that a failed test has left."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(60)
    process.kill()
    process.wait()
    if process.stdout is not None:
        process.stdout.close()


def _text(fd: int) -> str:
    return os.pread(fd, 1 << 20, 0).decode(errors="replace")


def _attribute(device: str, name: str) -> str:
    return Path("/sys/block", Path(device).name, "queue", name).read_text().strip()


def run(*command: str | Path, code: int = 0) -> str:
    """Runs a program, and shows what it said if it does not end with `code`. Returns what it said."""
    started = time.monotonic()
    environment = {**os.environ, "LC_ALL": "C"}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, env=environment
    )
    print(f"$ {shlex.join(map(str, command))}   # {time.monotonic() - started:.1f} s\n{done.stdout}", end="")
    assert done.returncode == code, f"{command} ended with {done.returncode} and said:\n{done.stdout}"
    return done.stdout


@contextmanager
def mounted(device: str, directory: Path, *options: str) -> Iterator[Path]:
    run("mount", *options, device, directory)
    try:
        yield directory
    finally:
        run("umount", directory)


MAKE_FILE_SYSTEM = {"ext4": ("mkfs.ext4", "-q", "-F"), "xfs": ("mkfs.xfs", "-q", "-f")}
CHECK_FILE_SYSTEM = {"ext4": ("fsck.ext4", "-fn"), "xfs": ("xfs_repair", "-n")}

REAL_TREES = [Path(os.__file__).parent / name for name in ("asyncio", "email", "xml")]
"""Some hundred files of the standard library."""


def checksums(directory: Path) -> dict[str, str]:
    """The digest of each file below a directory."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@functools.cache
def _real_checksums(tree: Path) -> dict[str, str]:
    return checksums(tree)


def use(device: str, kind: str, directory: Path) -> None:
    """Makes a file system, copies real trees to it, checks it, and compares what can be read from it then."""
    run(*MAKE_FILE_SYSTEM[kind], device)
    with mounted(device, directory):
        run("cp", "-a", *REAL_TREES, directory)
    run(*CHECK_FILE_SYSTEM[kind], device)
    with mounted(device, directory):
        for tree in REAL_TREES:
            assert checksums(directory / tree.name) == _real_checksums(tree)
