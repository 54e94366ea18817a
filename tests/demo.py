"""The main job, shown step by step: Linux formats, fills, checks and reads a disk that Python serves.

    python -m tests.demo           here if this machine's kernel has TCMU, or else in the lab's guest
    python -m tests.demo --lab     in the guest in any case
    python -m tests.demo --here    here, or not at all

Exit code 0 if everything went well, 1 if not. Leaves nothing behind.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn

from tcmu_rs._doctor import examine

from .lab import LabError, Machine, MissingError, provide
from .lab.provision import INSTALL_COMMAND

SOURCE = Path(sysconfig.get_path("stdlib"))
"""Several thousand small files and some large ones that every machine with this program has."""

NOT_COPIED = ("site-packages", "dist-packages", "test", "config-*", "*.pyc.*")
PROGRAMS = ("mkfs.ext4", "fsck.ext4", "mount", "umount", "xargs", "cp", "sha256sum")
PATH = f"{Path(sys.executable).parent}:{os.environ.get('PATH', os.defpath)}:/usr/sbin:/sbin"

_INDENT = "     "
_NEWS_EVERY = 10.0
"""Seconds between two lines of progress where nobody can see a bar."""


class Failed(Exception):
    """A step did not do what it should."""


class Narrator:
    """Says what is done, how far it is, how long it took and what came of it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._step = 0

    @contextmanager
    def step(self, what: str, command: str = "", total: float | None = None) -> Iterator[Callable[[float], None]]:
        """Announces a step and times it. What the block raises has failed; it may report progress towards `total`."""
        self._step += 1
        self._print(f"[bold]{self._step:3}. {what}[/bold]")
        if command:
            self._print(f"{_INDENT}[cyan]$ {command}[/cyan]")
        started = time.monotonic()
        with self.progress("", total) as advance:
            yield advance
        self._print(f"{_INDENT}[green]done[/green] in {time.monotonic() - started:.1f} s")

    def result(self, text: str) -> None:
        """Says what the step before has shown."""
        self._print(_INDENT + text)

    @contextmanager
    def progress(self, what: str, total: float | None = None) -> Iterator[Callable[[float], None]]:
        """Shows that something goes on, while it does."""
        if not self._console.is_terminal:
            yield self._occasionally(total)
            return
        columns = [TextColumn(f"{_INDENT}{what}"), SpinnerColumn(), TimeElapsedColumn()]
        if total is not None:
            columns += [BarColumn(), TaskProgressColumn()]
        with Progress(*columns, console=self._console, transient=True) as bars:
            task = bars.add_task("", total=total)
            yield lambda completed: bars.update(task, completed=completed)

    def _occasionally(self, total: float | None) -> Callable[[float], None]:
        last = time.monotonic()

        def advance(completed: float) -> None:
            nonlocal last
            if total and time.monotonic() - last > _NEWS_EVERY:
                last = time.monotonic()
                self.result(f"{min(completed / total, 1):.0%}")

        return advance

    def _print(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


class Demo:
    """The job on the kernel of this machine, with all that it makes below one directory."""

    def __init__(self, narrator: Narrator, directory: Path) -> None:
        self._narrator = narrator
        self._directory = directory
        self._image = directory / "disk.img"
        self._mount = directory / "mnt"
        self._list = directory / "files"
        self._sums = directory / "sums"
        self._stack = ExitStack()

    def run(self) -> str:
        """Does it all. Returns what it has shown."""
        files = [path.relative_to(SOURCE) for path in _files(SOURCE)]
        size = sum((SOURCE / file).stat().st_size for file in files)
        tree = f"{len(files)} files, {size / 1e6:.0f} MB"
        self._list.write_bytes(b"".join(bytes(file) + b"\0" for file in files))
        self._mount.mkdir()
        with self._stack:
            self._use(tree, size, names=sum(len(bytes(file)) for file in files), count=len(files))
        self._narrator.result(self._occupied())
        return f"{tree}: equal after detaching and attaching the disk again"

    def _use(self, tree: str, size: int, *, names: int, count: int) -> None:
        xargs = ["xargs", "-0", "-a", str(self._list)]

        server = self._attach("A Python process becomes a disk, stored in a sparse file", "--size", "1G", "--create")
        self._command("Linux formats it", ["mkfs.ext4", "-q", server.device])
        with self._mounted(server.device):
            # Each line has the digest, two blanks, the name and an end.
            self._command(
                f"Checksums of a real tree ({tree})",
                [*xargs, "sha256sum"],
                cwd=SOURCE,
                output=self._sums,
                progress=(lambda: self._sums.stat().st_size, names + 67 * count),
            )
            before = _used(self._mount)
            self._command(
                "It is copied to the disk",
                [*xargs, "cp", "--preserve", "--parents", f"--target-directory={self._mount}"],
                cwd=SOURCE,
                progress=(lambda: _used(self._mount) - before, size),
            )
        self._detach(server)
        self._narrator.result(self._occupied())

        server = self._attach("Another process becomes the same disk")
        said = self._command("The file system is sound", ["fsck.ext4", "-f", "-n", server.device])
        self._narrator.result(said.splitlines()[-1])
        with self._mounted(server.device, "-o", "ro"):
            checked = self._directory / "checked"
            self._command(
                "Every file is what it was",
                ["sha256sum", "--check", str(self._sums)],
                cwd=self._mount,
                output=checked,
                progress=(lambda: checked.stat().st_size, names + len(": OK\n") * count),
            )
            equal = checked.read_text().count(": OK\n")
            if equal != count:
                raise Failed(f"{equal} of {count} files were compared:\n{checked.read_text()}")
            self._narrator.result(f"{equal} files are equal")
        self._detach(server)
        said = self._command("Nothing is left in the kernel", ["tcmu-rs", "list"])
        if traces := [path for path in server.traces if path.exists()]:
            raise Failed(f"this is left: {', '.join(map(str, traces))}\n{said}")
        self._narrator.result(f"no {server.device}, no {server.traces[0]}")

    def _attach(self, what: str, *options: str) -> Server:
        command = ["tcmu-rs", "attach", f"file:{self._image}", *options, "--json"]
        with self._narrator.step(what, _shown(command)):
            server = Server(command, self._directory / "server.log")
            self._stack.callback(server.kill)
            server.wait_usable()
        self._narrator.result(f"{server.device}, served by process {server.process.pid}")
        return server

    def _detach(self, server: Server) -> None:
        with self._narrator.step("The disk is detached", f"kill -TERM {server.process.pid}"):
            server.terminate()
        self._narrator.result("the process has ended with exit code 0")

    @contextmanager
    def _mounted(self, device: str, *options: str) -> Iterator[None]:
        self._command("It is mounted", ["mount", *options, device, self._mount])
        with ExitStack() as emergency:
            emergency.callback(subprocess.run, ["umount", "--lazy", str(self._mount)], check=False)
            yield
            self._command("It is unmounted", ["umount", self._mount])
            emergency.pop_all()

    def _command(
        self,
        what: str,
        command: Sequence[str | Path],
        *,
        cwd: Path | None = None,
        output: Path | None = None,
        progress: tuple[Callable[[], float], float] | None = None,
    ) -> str:
        """Runs a program. Returns what it said, or lets it write that to `output`."""
        shown = _shown(command) if cwd is None else f"cd {shlex.quote(str(cwd))} && {_shown(command)}"
        shown += f" > {shlex.quote(str(output))}" if output else ""
        errors = self._directory / "errors"
        said = output or self._directory / "output"
        environment = {**os.environ, "PATH": PATH, "LC_ALL": "C.UTF-8"}
        with (
            self._narrator.step(what, shown, progress[1] if progress else None) as advance,
            said.open("wb") as stdout,
            errors.open("wb") as stderr,
        ):
            process = subprocess.Popen(command, cwd=cwd, stdout=stdout, stderr=stderr, env=environment)
            try:
                while process.poll() is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(0.2)
                    if progress:
                        advance(progress[0]())
            finally:
                process.kill()
                process.wait()
            if process.returncode:
                text = said.read_text(errors="replace") + errors.read_text(errors="replace")
                raise Failed(f"{shown}\nended with exit code {process.returncode} and said:\n{text}")
        return said.read_text() if output is None else ""

    def _occupied(self) -> str:
        status = self._image.stat()
        occupied = status.st_blocks * 512 >> 20
        return f"{self._image} has {status.st_size >> 20} MiB, of which {occupied} MiB are occupied"


class Server:
    """A `tcmu-rs attach`."""

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._log = log
        with log.open("w") as stderr:
            self.process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=stderr, env={**os.environ, "PATH": PATH}, text=True
            )
        self.device = ""
        self.traces: list[Path] = []

    def wait_usable(self) -> None:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise Failed(f"tcmu-rs ended with exit code {self.process.wait()} and said:\n{self._log.read_text()}")
        record = json.loads(line)
        self.device = record["device"]
        target = Path("/sys/kernel/config/target", record["fabric"], record["target"])
        self.traces = [Path(record["configfs"]), target, Path(self.device)]

    def terminate(self) -> None:
        self.process.terminate()
        code = self.process.wait()
        if said := self._log.read_text():
            raise Failed(f"tcmu-rs has complained:\n{said}")
        if code:
            raise Failed(f"tcmu-rs ended with exit code {code}")

    def kill(self) -> None:
        """Ends it, if it still runs because something has failed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            if self.process.poll() is None:
                self.process.terminate()
                self.process.wait(60)
        self.process.kill()
        self.process.wait()
        if self.process.stdout is not None:
            self.process.stdout.close()


def _files(directory: Path) -> Iterator[Path]:
    for path in sorted(directory.iterdir()):
        if path.is_symlink() or any(path.match(pattern) for pattern in NOT_COPIED):
            continue
        if path.is_dir():
            yield from _files(path)
        elif path.is_file():
            yield path


def _used(directory: Path) -> int:
    status = os.statvfs(directory)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def _shown(command: Sequence[str | Path]) -> str:
    return shlex.join(map(str, command))


def why_not_here() -> str | None:
    """Why this machine cannot run the demo itself."""
    for check in examine():
        if check.needed and not check.ok:
            return f"{check.name}: {check.found}"
    if missing := [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]:
        return f"no {' and no '.join(missing)}"
    return None


def run_here(console: Console) -> int:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="demo-") as directory:
        try:
            shown = Demo(Narrator(console), Path(directory)).run()
        except Failed as failure:
            console.print(f"\nFAILED: {failure}", style="red", markup=False, highlight=False, soft_wrap=True)
            kernel = subprocess.run(["dmesg"], capture_output=True, text=True, check=False).stdout.splitlines()
            console.print("The kernel said last:", *kernel[-20:], sep="\n", markup=False, highlight=False)
            return 1
    console.print(
        f"\n[bold green]SUCCESS[/bold green] in {time.monotonic() - started:.0f} s. {shown}.", highlight=False
    )
    return 0


def run_in_lab(console: Console) -> int:
    narrator = Narrator(console)
    try:
        provision = provide(install=False)
    except MissingError as missing:
        console.print(f"Installing QEMU and Debian's kernel, once ({missing.piece}) …", markup=False, soft_wrap=True)
        with narrator.progress("installing"):
            subprocess.run([sys.executable, *INSTALL_COMMAND.split()[1:]], check=True)
        provision = provide(install=False)

    console.print(
        f"Booting Debian's kernel {provision.kernel.release} in QEMU, without hardware acceleration: all takes"
    )
    console.print("about fifteen times as long as on a machine of its own.")
    environment = {"LC_ALL": "C.UTF-8"}
    if console.is_terminal:
        environment |= {"FORCE_COLOR": "1", "COLUMNS": str(console.width), "TERM": os.environ.get("TERM", "linux")}
    with ExitStack() as booting:
        booting.enter_context(narrator.progress("booting"))

        def show(output: bytes) -> None:
            booting.close()
            sys.stdout.buffer.write(output)
            sys.stdout.buffer.flush()

        job = "echo; exec python -m tests.demo --here"
        with Machine(job, timeout=3600, env=environment, on_output=show, provision=provision) as machine:
            result = machine.wait()
    if result.returncode is None or result.kernel_faults:
        console.print(result.report(), markup=False, highlight=False)
        return 1
    return result.returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.demo", description=(__doc__ or "").partition("\n")[0])
    where = parser.add_mutually_exclusive_group()
    where.add_argument("--here", action="store_true", help="on this machine's kernel")
    where.add_argument("--lab", action="store_true", help="in the lab's guest, though this machine's kernel may do")
    arguments = parser.parse_args()
    console = Console()
    reason = None if arguments.lab else why_not_here()
    if arguments.here and reason:
        console.print(f"FAILED: this machine cannot serve disks: {reason} (tcmu-rs doctor tells more)", markup=False)
        return 1
    try:
        if not arguments.lab and not reason:
            return run_here(console)
        if reason:
            console.print(f"This machine's kernel cannot serve disks ({reason}).", markup=False, soft_wrap=True)
        return run_in_lab(console)
    except KeyboardInterrupt:
        console.print("\ninterrupted")
        return 130
    except (LabError, subprocess.CalledProcessError) as error:
        console.print(f"FAILED: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 1


if __name__ == "__main__":
    sys.exit(main())
