"""What this machine lacks for serving disks, each with the command that mends it."""

from __future__ import annotations

import importlib
import os
import platform
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import _devices

_CAP_SYS_ADMIN = 21
_MEMORY_CAPABILITIES = {"CAP_IPC_LOCK": 14, "CAP_SYS_RESOURCE": 24}

_MODULES = {
    "target_core_user": ("CONFIG_TCM_USER2", "sys/module/target_core_user", True),
    "tcm_loop": ("CONFIG_LOOPBACK_TARGET", "sys/module/tcm_loop", True),
    "sd_mod": ("CONFIG_BLK_DEV_SD", "sys/bus/scsi/drivers/sd", True),
    "iscsi_target_mod": ("CONFIG_ISCSI_TARGET", "sys/module/iscsi_target_mod", False),
}
"""Kernel modules: the option that builds each, what shows that it is there, and whether nothing works without
it."""


@dataclass(frozen=True, slots=True)
class Check:
    """One finding.

    Attributes:
        name: What was looked at.
        ok: Whether it is as it should be.
        needed: Whether disks cannot be served without it.
        found: What was found.
        remedy: A command or an action that mends it; empty if all is well.
    """

    name: str
    ok: bool
    needed: bool
    found: str
    remedy: str = ""


def examine(root: Path = Path("/"), *, release: str | None = None) -> list[Check]:
    """Looks at the machine; changes nothing.

    Args:
        root: Where its file systems are, for tests.
        release: Kernel release, `uname -r`; this machine's if None.
    """
    release = release or platform.release()
    modules = [_module(root, release, name) for name in _MODULES]
    configfs = _configfs(root, release)
    return [
        _kernel(release),
        _privileges(root),
        *modules,
        configfs,
        _target(root, loadable=modules[0].ok and configfs.ok),
        _nodes(root),
        _reservations(root),
        *([_served()] if root == Path("/") else []),
        *_libraries(),
        _file_io(root),
        _memory(root),
        *_swap(root),
    ]


def _served() -> Check:
    """Devices whose server is dead: their commands wait for it, or are told that it is busy."""
    left = [device for device in _devices.devices() if device.state in ("blocked", "unserved")]
    found = ", ".join(f"{device.name} is {device.state}" for device in left)
    remedy = "; ".join(
        f"tcmu-rs attach {device.handler}:{device.config} --name {device.name} (or, to lose it: tcmu-rs detach "
        f"{device.name})"
        for device in left
    )
    return Check("devices", not left, False, found or "each has a server", remedy)


def _kernel(release: str) -> Check:
    numbers = [int(part) for part in release.split("-")[0].split(".")[:2] if part.isdecimal()]
    ok = numbers >= [4, 20]
    return Check("kernel", ok, True, release, "" if ok else "boot Linux 4.20 or later")


def _capabilities(root: Path) -> int:
    with suppress(OSError, StopIteration):
        status = (root / "proc/self/status").read_text().splitlines()
        return int(next(line for line in status if line.startswith("CapEff:")).split()[1], 16)
    return 0


def _privileges(root: Path) -> Check:
    effective = _capabilities(root)
    admin = bool(effective & 1 << _CAP_SYS_ADMIN)
    ok = admin and os.geteuid() == 0
    found = f"user {os.geteuid()}, {'with' if admin else 'without'} CAP_SYS_ADMIN"
    return Check("privileges", ok, True, found, "" if ok else "run as root, in no container: sudo tcmu-rs")


def _module(root: Path, release: str, name: str) -> Check:
    option, evidence, needed = _MODULES[name]
    if (root / evidence).is_dir():
        return Check(name, True, needed, "in the kernel")
    if where := _shipped(root, release, name):
        return Check(name, True, needed, where)
    return Check(name, False, needed, "not in this kernel", _other_kernel(option, release))


def _shipped(root: Path, release: str, module: str) -> str | None:
    """Looks a module up in the lists that come with the kernel."""
    for file, where in (("modules.builtin", "built in"), ("modules.dep", "can be loaded")):
        with suppress(OSError), (root / "lib/modules" / release / file).open() as lines:
            for line in lines:
                # kernel/drivers/target/target_core_user.ko.xz: kernel/drivers/uio/uio.ko.xz
                path = line.partition(":")[0].strip()
                if path.rpartition("/")[2].partition(".")[0].replace("-", "_") == module:
                    return where
    return None


def _other_kernel(option: str, release: str) -> str:
    return (
        f"boot a kernel with {option}: apt install linux-image-amd64 (Debian), "
        f"apt install linux-modules-extra-{release} (Ubuntu)"
    )


def _configfs(root: Path, release: str) -> Check:
    with suppress(OSError):
        for line in (root / "proc/mounts").read_text().splitlines():
            if line.split(" ")[1:3] == ["/sys/kernel/config", "configfs"]:
                return Check("configfs", True, True, "mounted")
    mount = "mount -t configfs none /sys/kernel/config"
    with suppress(OSError):
        if "configfs" in (root / "proc/filesystems").read_text().split():
            return Check("configfs", False, True, "not mounted", mount)
    if _shipped(root, release, "configfs"):
        return Check("configfs", False, True, "not loaded", f"modprobe configfs && {mount}")
    return Check("configfs", False, True, "not in this kernel", _other_kernel("CONFIG_CONFIGFS_FS", release))


def _target(root: Path, *, loadable: bool) -> Check:
    directory = "sys/kernel/config/target/core"
    if (root / directory).is_dir():
        return Check("target", True, True, f"/{directory}")
    if loadable:
        return Check("target", True, True, f"/{directory} comes with the first device")
    return Check(
        "target",
        False,
        True,
        f"no /{directory}",
        "first what is missing above, then: modprobe target_core_user",
    )


def _nodes(root: Path) -> Check:
    with suppress(OSError):
        for line in (root / "proc/mounts").read_text().splitlines():
            if line.split(" ")[1:3] == ["/dev", "devtmpfs"]:
                return Check("device nodes", True, True, "/dev is kept by the kernel")
    uio = []
    with suppress(OSError):
        uio = [entry.name for entry in (root / "sys/class/uio").iterdir()]
    missing = [name for name in uio if not (root / "dev" / name).exists()]
    found = f"no /dev/{missing[0]}" if missing else "/dev is no devtmpfs: new disks have no node"
    return Check("device nodes", False, True, found, "mount -t devtmpfs none /dev, or leave the container")


def _reservations(root: Path) -> Check:
    """Looks for the directory of `__core_scsi3_write_aptpl_to_file`: without it PERSISTENT RESERVE OUT always fails."""
    database = "etc/target" if (root / "etc/target").is_dir() else "var/target"
    # What the loaded module has chosen, which is the former if it was there at the time.
    with suppress(OSError):
        database = (root / "sys/kernel/config/target/dbroot").read_text().strip().lstrip("/")
    if (root / database / "pr").is_dir():
        return Check("reservations", True, False, f"/{database}/pr")
    return Check("reservations", False, False, f"no /{database}/pr", f"mkdir -p /{database}/pr")


def _libraries() -> Iterator[Check]:
    for name, remedy in (
        ("rtslib_fb", "apt install libudev1; pip install rtslib-fb"),
        ("tcmu_rs._native", "reinstall the package: pip install --force-reinstall tcmu-rs"),
    ):
        try:
            importlib.import_module(name)
        except ImportError as error:
            yield Check(name, False, True, str(error), remedy)
        else:
            yield Check(name, True, True, "can be imported")


def _file_io(root: Path) -> Check:
    # Not at the top: the doctor has to work where the package does not.
    try:
        from . import _files
    except ImportError as error:
        return Check("file I/O", False, False, str(error), "see tcmu_rs._native")
    obstacle = _files.obstacle()
    if obstacle is None:
        return Check("file I/O", True, False, "io_uring")
    disabled = "0"
    with suppress(OSError):
        disabled = (root / "proc/sys/kernel/io_uring_disabled").read_text().strip()
    if obstacle.endswith(_files.VARIABLE):
        remedy = f"unset {_files.VARIABLE}"
    elif disabled != "0":
        remedy = "sysctl kernel.io_uring_disabled=0"
    else:
        remedy = "allow io_uring_setup, io_uring_enter and io_uring_register in the container's seccomp profile"
    return Check("file I/O", False, False, f"threads, slower than io_uring for cold reads: {obstacle}", remedy)


def _memory(root: Path) -> Check:
    """Whether a server can be kept from waiting for its own disk when memory is short (`tcmu_rs.protect_memory`)."""
    effective = _capabilities(root)
    lacking = [name for name, bit in _MEMORY_CAPABILITIES.items() if not effective & 1 << bit]
    if not lacking:
        return Check("memory", True, False, "a server can be kept in memory")
    found = f"without {', '.join(lacking)} a server that this machine mounts a disk of may wait for itself"
    return Check("memory", False, False, found, "run as root, in no container; or mount the disk elsewhere")


def _swap(root: Path) -> Iterator[Check]:
    """Swap space on our own disks: what has to be written when memory is short needs memory to be written."""
    with suppress(OSError):
        for line in (root / "proc/swaps").read_text().splitlines()[1:]:
            # Blanks in names are written in octal; a file's own disk is not looked for.
            name = Path(line.split()[0]).name
            if disks := sorted(_disks_below(root, name)):
                found = f"{line.split()[0]} is on {disks[0]}, which user space serves"
                yield Check("swap", False, False, found, f"swapoff {line.split()[0]}, and swap to another disk")


def _disks_below(root: Path, name: str) -> Iterator[str]:
    """Our disks among those that a block device is made of."""
    directory = root / "sys/class/block" / name
    slaves = []
    with suppress(OSError):
        slaves = [slave.name for slave in (directory / "slaves").iterdir()]
    for slave in slaves:
        yield from _disks_below(root, slave)
    # A partition is a directory in that of its disk.
    for place in (directory, directory.resolve().parent):
        with suppress(OSError):
            if (place / "device/vendor").read_text().strip() == "tcmu-rs":
                yield f"/dev/{place.resolve().name}"
                return
