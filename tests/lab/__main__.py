"""The command line of the lab."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from .errors import LabError, MissingError
from .machine import DEFAULT_TIMEOUT, Verdict, run
from .provision import (
    INSTALL_COMMAND,
    cache_directory,
    fetch_kernel,
    install_packages,
    kernel_package,
    missing_packages,
    missing_programs,
    provide,
)

EXAMPLES = """\
examples:
  python -m tests.lab install                     once: Debian packages (as root), a kernel (into the cache)
  python -m tests.lab doctor                      what is missing, and whether the kernel boots
  python -m tests.lab run 'uname -a; lsmod'       a command in the guest, in the checkout's directory
  python -m tests.lab run 'python -m pytest tests/guest -k discard'
  python -m tests.lab run --disk image.raw 'mkfs.ext4 /dev/vda && sync'
  python -m tests.lab run --dmesg 'modprobe scsi_debug; sleep 1; lsblk -S'
  python -m tests.lab script bench/kernel.sh      the same with a file

The exit status of `run` and `script` is the job's; 124 if it timed out, 125 if the lab failed or the kernel
died.

environment:
  TCMU_LAB_CACHE      directory of kernels and initramfs images (default: ~/.cache/tcmu-rs/lab)
  TCMU_LAB_KERNEL     Debian package of the kernel, or one that depends on it (default: linux-image-amd64)
  TCMU_LAB_INSTALL=1  install what is missing without being asked, as CI=true does
"""

TIMED_OUT = 124
LAB_FAILED = 125


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except LabError as error:
        print(f"lab: {error}", file=sys.stderr)
        return LAB_FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.lab",
        description="Runs jobs under a real kernel with TCMU, in a QEMU guest with the host's files.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    command = commands.add_parser("run", help="boot, run a bash command, show its output")
    command.add_argument("job", help="the bash command, or several lines of them")
    _add_machine_options(command)
    command.set_defaults(command=lambda options: _run(options, options.job))

    command = commands.add_parser("script", aliases=["shell-script"], help="boot, run a bash script from a file")
    command.add_argument("file", type=Path, help="the script; it runs in the checkout's directory")
    _add_machine_options(command)
    command.set_defaults(command=lambda options: _run(options, options.file.read_text()))

    command = commands.add_parser("install", help="install the Debian packages and the kernel that the lab needs")
    command.set_defaults(command=lambda _: _install())

    command = commands.add_parser("doctor", help="tell what is missing, and boot once")
    command.set_defaults(command=lambda _: _doctor())
    return parser


def _add_machine_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--timeout", type=float, default=DEFAULT_TIMEOUT, help="seconds for the job [%(default)s]")
    parser.add_argument("--memory", default="2G", help="memory of the guest [%(default)s]")
    parser.add_argument("--cpus", type=int, default=2, help="virtual CPUs [%(default)s]")
    parser.add_argument("--disk", type=Path, action="append", default=[], help="a raw image as /dev/vda, then vdb, …")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE", help="a variable for the job")
    parser.add_argument("--dmesg", action="store_true", help="show the kernel's log at the end")


def _run(options: argparse.Namespace, job: str) -> int:
    result = run(
        job,
        timeout=options.timeout,
        env=dict(variable.split("=", 1) for variable in options.env),
        disks=options.disk,
        memory=options.memory,
        cpus=options.cpus,
        on_output=_show,
    )
    if options.dmesg or result.verdict is not Verdict.EXITED:
        print(result.dmesg, file=sys.stderr)
    if result.verdict is Verdict.EXITED:
        assert result.returncode is not None
        return result.returncode
    print(f"lab: {result.summary}", file=sys.stderr)
    return TIMED_OUT if result.verdict is Verdict.TIMED_OUT else LAB_FAILED


def _show(output: bytes) -> None:
    sys.stdout.buffer.write(output)
    sys.stdout.buffer.flush()


def _install() -> int:
    packages = install_packages()
    print(f"packages: {' '.join(packages) or 'all were there'}")
    print(f"kernel: {fetch_kernel().release} in {cache_directory()}")
    return 0


def _doctor() -> int:
    """Report each thing on a line of its own, so that one run finds all that is missing."""
    programs = missing_programs()
    print(f"programs: {'missing: ' + ' '.join(programs) if programs else 'all here'}")
    try:
        packages = missing_packages()
        print(f"packages for jobs: {'missing: ' + ' '.join(packages) if packages else 'all here'}")
    except MissingError as error:
        print(f"packages for jobs: unknown ({error})")
    print(f"cache: {cache_directory()}, {shutil.disk_usage(_existing(cache_directory())).free >> 20} MiB free")
    try:
        provision = provide(install=False)
    except MissingError as error:
        print(f"kernel: {error}")
        return 1
    print(f"kernel: {provision.kernel.release} (of {kernel_package()})")
    result = run("grep -o '^target_core_user' /proc/modules", timeout=30)
    print(f"boot: {result.summary}")
    if result.returncode != 0 or packages:
        print(result.report() if result.returncode else f"remedy: {INSTALL_COMMAND}")
        return 1
    return 0


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


if __name__ == "__main__":
    sys.exit(main())
