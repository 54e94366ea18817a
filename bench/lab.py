"""Disks on the real kernel under fio: ours, tcmu-runner's and LIO's own, in turn in one boot of the lab.

    python -m bench.lab [--quick] [--write] [--disk] [--only NAME ...]
    python -m bench.lab --tunables [--quick] [--write]

The guest runs in emulation, fifteen to twenty times slower than the machine: only the ratios mean something. The kernel
copies with `rep movsb`, which is emulated byte by byte, so large transfers are mostly copies; with `--cheap-copies` the
processor does not offer that, and copies take a third of the time. Debian's tcmu-runner has no handler for plain files;
its `qcow` handler serves a raw image with `pread` and `pwrite` in C threads, and that is what is measured. All files
are on the guest's tmpfs, or with `--disk` on ext4 on a virtual disk.

With `--tunables` it is one disk of ours, once as it comes and once with each option of `tcmu-rs attach` that may make
it faster or slower.

Needs the lab (`python -m tests.lab install`); tcmu-runner is downloaded from Debian and unpacked beside its kernel.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import mmap
import os
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

import tcmu_rs

SIZE = 128 << 20
PATTERNS = {
    "rr qd1": ("randread", 4096, 1),
    "rr qd32": ("randread", 4096, 32),
    "rw qd32": ("randwrite", 4096, 32),
    "read 256K": ("randread", 262144, 8),
    "write 256K": ("randwrite", 262144, 8),
}
PACKAGES = ("tcmu-runner", "libtcmu2", "libnl-3-200", "libnl-genl-3-200")
TUNABLES = (
    ("--max-sectors", "256"),
    ("--max-sectors", "4096"),
    ("--data-area-mb", "8"),
    ("--data-pages-per-block", "16"),
    ("--ring-mb", "1"),
    # Emulated processors are slow: on real ones a tenth of it is much.
    ("--busy-poll", "5000"),
)
RIVAL = "tcmu-runner"
KERNEL = "LIO fileio"
# By the rival, consumer and pattern: how many times as fast it is to be, at least.
TARGETS: dict[str, dict[str, dict[str, float]]] = {
    RIVAL: {
        "file:": {"rr qd1": 1.25, "rr qd32": 1.5, "rw qd32": 1.5, "read 256K": 1.2, "write 256K": 1.2},
        "async def": {"rr qd1": 1.1, "rr qd32": 1.4, "rw qd32": 1.4, "read 256K": 1.0, "write 256K": 1.0},
    },
    KERNEL: {"file:": {"rr qd32": 0.9, "rw qd32": 0.9}},
}
# Who spends processor time, by how the name of the program begins.
GROUPS = {
    "fio": ("fio",),
    "kernel threads": ("kworker", "ksoftirqd", "rcu_"),
    "server": ("tcmu-r",),
    "others": ("",),
}
FIO = ("fio", "--direct=1", "--ioengine=libaio", f"--size={SIZE}", "--time_based", "--norandommap", "--randrepeat=1")
OBSERVED = ("rr qd32", "rw qd32")
CORE = Path("/sys/kernel/config/target/core")


class _Memory(tcmu_rs.BlockHandler):
    size = SIZE
    fills_reads = True
    max_in_flight = 128

    def __init__(self) -> None:
        self.view = memoryview(mmap.mmap(-1, SIZE))


class PlainDisk(_Memory):
    """Memory, with `def`."""

    def read(self, offset: int, iov: tcmu_rs.IoVec) -> None:
        iov.copy_from(self.view[offset : offset + iov.nbytes])

    def write(self, offset: int, iov: tcmu_rs.IoVec) -> None:
        iov.copy_into(self.view[offset : offset + iov.nbytes])


class AsyncDisk(_Memory):
    """Memory, with `async def`."""

    async def read(self, offset: int, iov: tcmu_rs.IoVec) -> None:
        iov.copy_from(self.view[offset : offset + iov.nbytes])

    async def write(self, offset: int, iov: tcmu_rs.IoVec) -> None:
        iov.copy_into(self.view[offset : offset + iov.nbytes])


class BlockingDisk(_Memory):
    """Memory, with `@blocking`."""

    @tcmu_rs.blocking
    def read(self, offset: int, iov: tcmu_rs.IoVec) -> None:
        iov.copy_from(self.view[offset : offset + iov.nbytes])

    @tcmu_rs.blocking
    def write(self, offset: int, iov: tcmu_rs.IoVec) -> None:
        iov.copy_into(self.view[offset : offset + iov.nbytes])


# In the guest.


def image(directory: Path, name: str) -> Path:
    """A file whose blocks are all there, and in the page cache."""
    path = directory / name
    with path.open("wb") as file:
        for _ in range(SIZE >> 20):
            file.write(os.urandom(4096) * 256)
    return path


@contextmanager
def ours(spec: str, *options: str) -> Iterator[str]:
    """Serves a disk of ours, as users do; yields its path."""
    command = [str(Path(sys.executable).with_name("tcmu-rs")), "attach", spec, *options, "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield str(json.loads(process.stdout.readline())["device"])
        finally:
            process.send_signal(signal.SIGTERM)


@contextmanager
def loopback(hba: str, settings: str) -> Iterator[str]:
    """A backstore of LIO's as a local disk; yields its path."""
    from tcmu_rs import _lio, _sysfs

    path = CORE / hba / "bench"
    path.mkdir(parents=True)
    try:
        (path / "control").write_text(settings)
        (path / "enable").write_text("1")
        (path / "wwn/vpd_unit_serial").write_text(f"6c1d4a5e-0000-4000-8000-{abs(hash(hba)) % 16**12:012x}")
        # Any backstore will do for the fabric: it takes name and directory.
        group = _lio.TARGET / f"loopback/naa.60014050bec4{abs(hash(hba)) % 16**4:04x}" / "tpgt_1"
        group.mkdir(parents=True)
        (group / "nexus").write_text(f"naa.60014050bec5{abs(hash(hba)) % 16**4:04x}")
        lun = group / "lun/lun_0"
        lun.mkdir()
        (lun / "bench").symlink_to(path)
        try:
            for _ in range(300):
                address = _lio.loopback_address(lun)
                found = _sysfs.scsi_disk(address) if address else None
                if found is not None and _sysfs.why_unusable(found, SIZE) is None:
                    break
                time.sleep(0.1)
            else:
                raise AssertionError(f"{hba} has no disk")
            yield found.path
        finally:
            (lun / "bench").unlink()
            lun.rmdir()
            (group / "nexus").write_text("NULL")
            group.rmdir()
            group.parent.rmdir()
    finally:
        path.rmdir()
        path.parent.rmdir()


@contextmanager
def tcmu_runner(root: Path, file: Path) -> Iterator[str]:
    """Runs tcmu-runner and serves a file with it."""
    libraries = root / "usr/lib/x86_64-linux-gnu"
    program, plugins = str(root / "usr/bin/tcmu-runner"), str(libraries / "tcmu-runner")
    command = [program, "--handler-path", plugins, "-l", "/tmp"]
    for directory in ("/var/run/dbus", "/etc/tcmu"):
        Path(directory).mkdir(parents=True, exist_ok=True)
    Path("/etc/tcmu/tcmu.conf").touch()
    bus = subprocess.Popen(["dbus-daemon", "--system", "--nofork", "--nopidfile"], stderr=subprocess.DEVNULL)
    with Path("/tmp/tcmu-runner.out").open("w") as log:
        environment = {**os.environ, "LD_LIBRARY_PATH": f"{libraries}:{root / 'lib/x86_64-linux-gnu'}"}
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        time.sleep(3)
        assert process.poll() is None, Path("/tmp/tcmu-runner.out").read_text()
        with loopback("user_4711", f"dev_config=qcow/{file},dev_size={SIZE},hw_block_size=512") as device:
            yield device
    finally:
        process.terminate()
        process.wait()
        bus.terminate()
        bus.wait()


def fio_job(pattern: str, device: str) -> list[str]:
    """One job of fio's, which begins when those before it are over."""
    kind, length, depth = PATTERNS[pattern]
    where = [f"--name={pattern}", "--stonewall", f"--filename={device}"]
    return [*where, f"--rw={kind}", f"--bs={length}", f"--iodepth={depth}"]


def fio(devices: dict[str, str], seconds: float) -> Iterator[tuple[str, str, float]]:
    """The consumer, the pattern, and its commands per second: pattern by pattern, all consumers one after the other.

    So what is compared is measured within seconds. It is one fio for all: that starts as slowly as it runs.
    """
    # Not in seconds: it leaves out what is behind the point.
    command = [*FIO, f"--runtime={round(seconds * 1000)}ms", "--ramp_time=300ms", "--output-format=json"]
    jobs = list(itertools.product(PATTERNS, devices))
    for pattern, consumer in jobs:
        command += fio_job(pattern, devices[consumer])
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    for (pattern, consumer), job in zip(jobs, json.loads(output[output.index("{") :])["jobs"], strict=True):
        yield consumer, pattern, float(job["read" if PATTERNS[pattern][0] == "randread" else "write"]["iops"])


def processor_time() -> dict[str, float]:
    """Microseconds that there were until now, by who had them: `GROUPS`."""
    found = dict.fromkeys(GROUPS, 0.0)
    for task in Path("/proc").glob("[0-9]*/task/[0-9]*"):
        try:
            program = (task.parent.parent / "comm").read_text()
            spent = int((task / "schedstat").read_text().split()[0]) / 1000
        except (FileNotFoundError, ProcessLookupError):
            continue
        found[next((name for name, begins in GROUPS.items() if program.startswith(begins)), "others")] += spent
    return found


def spent(device: str, pattern: str, seconds: float) -> dict[str, float]:
    """Microseconds of processor time of one command, by who spends it; and `each`, of wall time."""
    counters = Path("/sys/block", Path(device).name, "stat")
    column = 0 if PATTERNS[pattern][0] == "randread" else 4

    def count() -> int:
        return int(counters.read_text().split()[column])

    command = [*FIO, "--runtime=600", *fio_job(pattern, device)]
    first = count()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        # Its start takes longer than what is measured.
        while count() < first + 500:
            time.sleep(0.1)
        before, done, start = processor_time(), count(), time.monotonic()
        time.sleep(seconds)
        after, commands, each = processor_time(), count() - done, time.monotonic() - start
        process.terminate()
    return {**{name: (after[name] - before[name]) / commands for name in GROUPS}, "each": each / commands * 1e6}


def guest(arguments: argparse.Namespace) -> None:
    """Measures, and prints one line of JSON for each consumer and round."""
    for module in ("target_core_user", "target_core_file", "tcm_loop"):
        subprocess.run(["modprobe", module], check=True)
    if arguments.disk:
        directory = Path("/mnt")
        subprocess.run(["mkfs.ext4", "-q", "/dev/vda"], check=True)
        subprocess.run(["mount", "/dev/vda", directory], check=True)
    else:
        # $TMPDIR is a tmpfs; /tmp is an overlay, which knows no RWF_NOWAIT.
        directory = Path(tempfile.mkdtemp())
    here = f"{__package__}.lab"
    root = Path(arguments.tcmu_runner)
    # What is compared is side by side here.
    consumers: dict[str, Callable[[], AbstractContextManager[str]]] = {
        "ram:": lambda: ours("ram:", "--size", str(SIZE)),
        "def": lambda: ours("x:", "--handler", f"{here}:PlainDisk"),
        "@blocking": lambda: ours("x:", "--handler", f"{here}:BlockingDisk"),
        "async def": lambda: ours("x:", "--handler", f"{here}:AsyncDisk"),
        RIVAL: lambda: tcmu_runner(root, image(directory, "runner")),
        "file:": lambda: ours(f"file:{image(directory, 'ours')}"),
        KERNEL: lambda: loopback(
            "fileio_4711",
            f"fd_dev_name={image(directory, 'fileio')},fd_dev_size={SIZE},fd_buffered_io=1",
        ),
    }
    if arguments.tunables:
        ram = functools.partial(ours, "ram:", "--size", str(SIZE), "--name")
        consumers = {"as it comes": functools.partial(ram, "plain")}
        for number, (option, value) in enumerate(TUNABLES):
            consumers[f"{option} {value}"] = functools.partial(ram, f"tuned{number}", option, value)
    chosen = {name: make for name, make in consumers.items() if not arguments.only or name in arguments.only}
    with ExitStack() as stack:
        devices = {name: stack.enter_context(make()) for name, make in chosen.items()}
        for number in range(arguments.rounds):
            # The other way round every other time: what drifts, drifts for all.
            turn = dict(list(devices.items())[:: -1 if number % 2 else 1])
            for name, pattern, rate in fio(turn, arguments.seconds):
                line = json.dumps({"consumer": name, "pattern": pattern, "round": number, "rate": rate})
                print(f"figure {line}", flush=True)
        if not (arguments.tunables or arguments.quick):
            for pattern, name in itertools.product(OBSERVED, devices):
                line = json.dumps({"consumer": name, "pattern": pattern, **spent(devices[name], pattern, 3)})
                print(f"spent {line}", flush=True)


# On the host.


def fetch_tcmu_runner() -> Path:
    """Debian's tcmu-runner, unpacked and not installed."""
    from tests.lab.provision import cache_directory

    root = cache_directory() / "tcmu-runner"
    if not root.exists():
        cache_directory().mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_directory()) as name:
            work = Path(name)
            work.chmod(0o755)
            subprocess.run(["apt-get", "-q", "download", *PACKAGES], cwd=work, check=True, stdout=subprocess.DEVNULL)
            for package in work.glob("*.deb"):
                subprocess.run(["dpkg", "-x", package, work / "root"], check=True)
            (work / "root").rename(root)
    return root


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="shorter runs")
    parser.add_argument("--write", action="store_true", help="put the figures into bench/RESULTS.md")
    parser.add_argument("--only", nargs="*", default=[], help="these consumers")
    parser.add_argument("--disk", action="store_true", help="files on ext4 on a virtual disk, not on tmpfs")
    parser.add_argument("--tunables", action="store_true", help="one disk of ours, with options of attach")
    parser.add_argument("--cheap-copies", action="store_true", help="a processor without `rep movsb`")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=None, help="of each run (3; quick: 0.7)")
    parser.add_argument("--guest", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--tcmu-runner", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.seconds = arguments.seconds or (0.7 if arguments.quick else 3.0)
    if arguments.guest:
        guest(arguments)
        return
    from tests.lab.machine import run

    from .report import README, TUNING, against, bars, claims, publish, stated, table

    job = [sys.executable, "-m", "bench.lab", "--guest", "--tcmu-runner", str(fetch_tcmu_runner())]
    job += ["--rounds", str(arguments.rounds), "--seconds", str(arguments.seconds)]
    job += ["--tunables"] * arguments.tunables + ["--quick"] * arguments.quick
    job += ["--disk"] * arguments.disk + (["--only", *arguments.only] if arguments.only else [])
    with tempfile.TemporaryDirectory() as name:
        disk = Path(name, "disk")
        disk.touch()
        os.truncate(disk, 2 << 30)
        conditions = stated(
            guest=f"QEMU in emulation, 2 CPUs{', no rep movsb' * arguments.cheap_copies}, 3 GiB, Debian's kernel",
            rounds=f"{arguments.rounds} of {arguments.seconds} s, in one boot, in turn for each pattern; medians",
            files=f"{SIZE >> 20} MiB on {'ext4 on a virtual disk' if arguments.disk else 'tmpfs'}",
        )
        result = run(
            shlex.join(job),
            timeout=1800,
            memory="3G",
            erms=not arguments.cheap_copies,
            disks=[disk] if arguments.disk else [],
            on_output=lambda output: (sys.stderr.buffer.write(output), sys.stderr.flush()),
        ).check()
    figures: dict[str, dict[str, list[float]]] = {}
    spending: list[list[object]] = []
    for line in result.text.splitlines():
        kind, _, data = line.partition(" ")
        if kind == "figure":
            figure = json.loads(data)
            figures.setdefault(figure["consumer"], {}).setdefault(figure["pattern"], []).append(figure["rate"])
        elif kind == "spent":
            one = json.loads(data)
            spending.append([one["pattern"], one["consumer"], *(f"{one[key]:.0f}" for key in ("each", *GROUPS))])
    rows: list[list[object]] = [[name, *(_spread(rates[p]) for p in PATTERNS)] for name, rates in figures.items()]
    text = [conditions, "### Commands per second: median (lowest-highest)", table(["consumer", *PATTERNS], rows)]
    medians = {name: [statistics.median(rates[p]) for p in PATTERNS] for name, rates in figures.items()}
    name = "lab-tunables" if arguments.tunables else "lab-disk" if arguments.disk else "lab"
    name += "-cheap-copies" * arguments.cheap_copies
    text.append(bars(name, "Commands per second", list(PATTERNS), medians, y_label="commands/s"))
    for other in (RIVAL, KERNEL, "as it comes"):
        if other in figures and len(figures) > 1:
            rows = [
                [name, *(against(_ratio(rates[p], figures[other][p]), _target(other, name, p)) for p in PATTERNS)]
                for name, rates in figures.items()
            ]
            text += [f"### Against {other}: median of the ratios, round by round", table(["consumer", *PATTERNS], rows)]
    if spending:
        text += [
            "### Where the time goes: microseconds of one command, and of the two processors by who has them",
            table(["pattern", "consumer", "each takes", *GROUPS], spending),
        ]
    sentences = []
    if (
        not (arguments.tunables or arguments.disk or arguments.cheap_copies)
        and {RIVAL, KERNEL, *TARGETS[RIVAL]} <= figures.keys()
    ):
        for name in TARGETS[RIVAL]:
            said = [
                ", ".join(f"{_ratio(rates, figures[other][p]):.2f} ({p})" for p, rates in figures[name].items())
                for other in (RIVAL, KERNEL)
            ]
            sentences.append(
                f"`{name}` on the real kernel, in a virtual machine whose processor is emulated: times the commands "
                f"per second of tcmu-runner: {said[0]}; of LIO's fileio, which stays in the kernel: {said[1]}."
            )
    elsewhere = {README: claims(sentences)} if sentences else {}
    if arguments.tunables:
        elsewhere = {TUNING: text[-1]}
    which = " --tunables" * arguments.tunables + " --disk" * arguments.disk
    which += " --cheap-copies" * arguments.cheap_copies
    publish(f"bench.lab{which}", "\n\n".join(text), write=arguments.write, elsewhere=elsewhere)


def _spread(rates: list[float]) -> str:
    return f"{statistics.median(rates):,.0f} ({min(rates):,.0f}-{max(rates):,.0f})"


def _target(other: str, name: str, pattern: str) -> float | None:
    return TARGETS.get(other, {}).get(name, {}).get(pattern)


def _ratio(ours: list[float], theirs: list[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


if __name__ == "__main__":
    main()
