"""What the kernel shows of TCMU devices: UIO nodes, the processes that hold them, the disks made from them.

Everything here is read from the kernel at the moment of the call. Nothing is remembered in a state file, so
nothing can be stale, and a device that vanishes while it is read is left out rather than reported as an
error.

The root directories are parameters, so that the tests run on a made-up tree.
"""

from __future__ import annotations

import ctypes
import errno
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SYS = Path("/sys")
DEV = Path("/dev")
PROC = Path("/proc")

_LIBC = ctypes.CDLL(None)
"""For syncfs(2), which the standard library lacks."""

_SECTOR = 512
"""Bytes in the unit of a block device's `size` file, whatever its block size is."""


@dataclass(frozen=True, slots=True)
class UioDevice:
    """A TCMU device as the UIO driver shows it.

    Attributes:
        minor: Number of the node; the kernel gives it to another device as soon as this one is gone.
        path: The node to open, `/dev/uioN`.
        hba: N of the configfs directory `core/user_N`.
        name: Name of the backstore.
        config: `HANDLER/CONFIG` exactly as the kernel has it, escapes included.
        map_size: Bytes to map.
    """

    minor: int
    path: str
    hba: int
    name: str
    config: str
    map_size: int


@dataclass(frozen=True, slots=True)
class Disk:
    """A SCSI disk of this machine.

    Attributes:
        path: Its node, `/dev/sdX`.
        size: Bytes; 0 while the kernel has not read the capacity yet.
        rdev: Device number that the node must have.
    """

    path: str
    size: int
    rdev: int


def parse_uio_name(text: str) -> tuple[int, str, str] | None:
    """Takes the name of a UIO device apart.

    Args:
        text: For instance `tcm-user/0/disk/file//var/tmp/a.img`, without the newline that sysfs adds.

    Returns:
        HBA, backstore name and config (slashes and all, empty if there is none); None if it is not a TCMU
        device.
    """
    parts = text.split("/", 3)
    if len(parts) < 3 or parts[0] != "tcm-user" or not parts[1].isdecimal() or not parts[2]:
        return None
    return int(parts[1]), parts[2], parts[3] if len(parts) == 4 else ""


def scan(*, sys_root: Path = SYS, dev_root: Path = DEV) -> list[UioDevice]:
    """Lists the TCMU devices of this machine, whoever made them, ordered by minor number."""
    try:
        entries = list((sys_root / "class/uio").iterdir())
    except FileNotFoundError:
        return []
    devices = (_read_uio(entry, dev_root) for entry in entries)
    return sorted((device for device in devices if device), key=lambda device: device.minor)


def find(hba: int, name: str, *, sys_root: Path = SYS, dev_root: Path = DEV) -> UioDevice | None:
    """Returns the UIO device of backstore `core/user_HBA/NAME`, or None if it has none (yet, or any more)."""
    for device in scan(sys_root=sys_root, dev_root=dev_root):
        if (device.hba, device.name) == (hba, name):
            return device
    return None


def _read_uio(directory: Path, dev_root: Path) -> UioDevice | None:
    digits = directory.name.removeprefix("uio")
    if not digits.isdecimal():
        return None
    # The device may go while it is read, and `maps` appears only after the device has been announced.
    with suppress(OSError, ValueError):
        # A config may end with a newline of its own: only the one that sysfs adds is removed.
        text = os.fsdecode((directory / "name").read_bytes()).removesuffix("\n")
        if parsed := parse_uio_name(text):
            hba, name, config = parsed
            map_size = int((directory / "maps/map0/size").read_text(), 16)
            return UioDevice(int(digits), str(dev_root / directory.name), hba, name, config, map_size)
    return None


def serving_pids(devices: Iterable[UioDevice], *, proc_root: Path = PROC) -> dict[int, int]:
    """Finds who serves devices.

    A process that closed the descriptor but keeps the mapping still holds the device. Where several processes share
    one (a forked child), the lowest number is reported.

    Returns:
        Process by UIO minor number. Processes that the caller may not inspect are missing: ask as root.
    """
    wanted = {device.minor for device in devices}
    holders: dict[int, int] = {}
    processes = sorted(int(entry.name) for entry in proc_root.iterdir() if entry.name.isdecimal())
    # Reading the mappings of all processes is slow, and rarely needed.
    for held_by in (_open_files, _mapped_files):
        for pid in processes:
            if wanted <= holders.keys():
                return holders
            for minor in wanted.intersection(map(_minor_of, held_by(proc_root / str(pid)))):
                holders.setdefault(minor, pid)
    return holders


def _open_files(process: Path) -> Iterator[str]:
    with suppress(OSError):
        for descriptor in (process / "fd").iterdir():
            with suppress(OSError):
                yield str(descriptor.readlink())


def _mapped_files(process: Path) -> Iterator[str]:
    with suppress(OSError), (process / "maps").open("rb") as maps:
        for line in maps:
            if b"/uio" in line:
                yield os.fsdecode(line.rstrip(b"\n")).rpartition(" ")[2]


def _minor_of(target: str) -> int | None:
    # Another mount namespace may show another directory; a removed device ends with " (deleted)" and is nobody's.
    name = target.rpartition("/")[2]
    if target.startswith("/") and name.startswith("uio") and name[3:].isdecimal():
        return int(name[3:])
    return None


def scsi_disk(address: str, *, sys_root: Path = SYS, dev_root: Path = DEV) -> Disk | None:
    """Finds the disk at a SCSI address.

    Args:
        address: `H:C:T:L`.

    Returns:
        The disk, or None while the kernel has no disk there.
    """
    with suppress(OSError, ValueError):
        for block in (sys_root / "bus/scsi/devices" / address / "block").iterdir():
            major, minor = (block / "dev").read_text().split(":")
            size = int((block / "size").read_text()) * _SECTOR
            return Disk(str(dev_root / block.name), size, os.makedev(int(major), int(minor)))
    return None


def rescan(address: str, *, sys_root: Path = SYS) -> None:
    """Has the kernel look for the size of the disk at a SCSI address; nothing if there is none (any more)."""
    with suppress(FileNotFoundError):
        (sys_root / "bus/scsi/devices" / address / "rescan").write_text("1")


def why_unusable(disk: Disk, size: int) -> str | None:
    """Tells what a disk still lacks before programs can use it. May block for the length of a partition scan.

    Args:
        disk: As found by `scsi_disk`.
        size: Bytes that it must have.

    Returns:
        None if it is usable: the node exists, is this disk, opens, and has the size.
    """
    try:
        fd = os.open(disk.path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        return f"{disk.path} cannot be opened: {error.strerror}"
    try:
        found = os.fstat(fd)
        if not stat.S_ISBLK(found.st_mode) or found.st_rdev != disk.rdev:
            return f"{disk.path} is not the node of this disk"
        length = os.lseek(fd, 0, os.SEEK_END)
        return None if length == size else f"{disk.path} has {length} bytes instead of {size}"
    finally:
        os.close(fd)


def in_use(disk: Disk) -> bool:
    """Tells whether a disk is mounted or held by another driver (LVM, RAID, swap)."""
    try:
        os.close(os.open(disk.path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC))
    except OSError as error:
        return error.errno == errno.EBUSY
    return False


def write_back(disk: Disk, *, proc_root: Path = PROC) -> None:
    """Writes out what the kernel still holds in memory for a disk and the file systems mounted from it.

    The kernel drops all that when the disk goes away. Only mounts that this process sees are covered. Errors
    are the disk's own, and are left to its users.
    """
    devices = {f"{os.major(disk.rdev)}:{os.minor(disk.rdev)}"}
    with suppress(OSError):
        devices |= {part.read_text().strip() for part in (SYS / "class/block" / Path(disk.path).name).glob("*/dev")}
    with suppress(OSError):
        for line in (proc_root / "self/mountinfo").read_text().splitlines():
            fields = line.split(" ")
            if fields[2] in devices:
                # Blanks and such are written in octal.
                _sync(re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), fields[4]), _LIBC.syncfs)
    _sync(disk.path, os.fsync)


def _sync(path: str, how: Callable[[int], object]) -> None:
    with suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            how(fd)
        finally:
            os.close(fd)
