"""Finding, and on request installing, what the lab needs: QEMU, a kernel with TCMU, an initramfs.

The kernel is Debian's own, unpacked from its package into a cache directory and never installed. The cache is
``$TCMU_LAB_CACHE``, or ``tcmu-rs/lab`` in the user's cache directory:

    kernels/linux-image-amd64 -> ../packages/linux-image-6.1.0-56-amd64_6.1.192-2_amd64
    packages/…/{boot,lib,vmlinux}
    initramfs/RELEASE-HASH

Whatever appears in it does so by one rename under a lock, so any number of processes may share it.
"""

from __future__ import annotations

import fcntl
import hashlib
import lzma
import os
import platform
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from .errors import LabError, MissingError
from .initramfs import Entry, archive

INSTALL_COMMAND = "python -m tests.lab install"

LAB_PROGRAMS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "busybox": "busybox-static",
    "modprobe": "kmod",
    "depmod": "kmod",
    "ip": "iproute2",
    "ps": "procps",
}
"""Programs without which the guest does not boot, and the Debian packages that have them."""

GUEST_PACKAGES = (
    "btrfs-progs",
    "cryptsetup-bin",
    "dmsetup",
    "e2fsprogs",
    "fio",
    "libiscsi-bin",
    "qemu-utils",
    "sdparm",
    "sg3-utils",
    "util-linux",
    "xfsprogs",
)
"""Debian packages that the project's jobs use. They belong on the host, whose root the guest's is."""

_INIT = Path(__file__).with_name("init.sh")
_BUSYBOX_APPLETS = ("cp", "insmod", "mkdir", "mount", "sh", "switch_root", "umount")
_BOOT_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_console", "virtio_blk")
_DEFAULT_KERNEL = "linux-image-amd64"


@dataclass(frozen=True)
class Kernel:
    """An unpacked kernel package."""

    release: str
    image: Path
    modules: Path


@dataclass(frozen=True)
class Provision:
    """Everything that a boot needs."""

    qemu: Path
    kernel: Kernel
    initramfs: Path


def provide(*, install: bool | None = None) -> Provision:
    """Return what a boot needs.

    Args:
        install: Whether missing packages may be installed and the kernel downloaded; by default if
            ``TCMU_LAB_INSTALL=1`` or ``CI=true`` is in the environment.

    Raises:
        MissingError: Something is not there and may not, or cannot, be installed.
    """
    if platform.machine() != "x86_64":
        raise MissingError("an x86-64 machine, as the guest runs the host's programs", "run it on one")
    if may_install() if install is None else install:
        install_packages()
        kernel = _cached_kernel() or fetch_kernel()
    else:
        if missing := missing_programs():
            raise MissingError(" and ".join(missing), _remedy())
        if (cached := _cached_kernel()) is None:
            raise MissingError(f"a kernel (Debian's {kernel_package()}) in {cache_directory()}", _remedy())
        kernel = cached
    return Provision(_program("qemu-system-x86_64"), kernel, _initramfs(kernel))


def may_install() -> bool:
    """Whether the environment allows to install packages and to download a kernel."""
    return os.environ.get("TCMU_LAB_INSTALL") == "1" or os.environ.get("CI") == "true"


def kernel_package() -> str:
    """The Debian package of the kernel to boot, or one that depends on it: ``$TCMU_LAB_KERNEL``."""
    return os.environ.get("TCMU_LAB_KERNEL") or _DEFAULT_KERNEL


def cache_directory() -> Path:
    """Where kernels and initramfs images are kept between runs."""
    if chosen := os.environ.get("TCMU_LAB_CACHE"):
        return Path(chosen).resolve()
    caches = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    return Path(caches, "tcmu-rs", "lab").resolve()


def missing_programs() -> list[str]:
    """The programs that a boot needs and that are not here."""
    return [program for program in LAB_PROGRAMS if _which(program) is None]


def missing_packages() -> list[str]:
    """The Debian packages, of the lab and of its jobs, that are not installed."""
    wanted = sorted({*LAB_PROGRAMS.values(), *GUEST_PACKAGES})
    try:
        query = subprocess.run(
            ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *wanted],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise MissingError("Debian's dpkg and apt-get", "run it on Debian or in a container of it") from None
    lines = (line.split() for line in query.stdout.splitlines())
    installed = {package for package, status in lines if status == "installed"}
    return [package for package in wanted if package not in installed]


def install_packages() -> list[str]:
    """Install the Debian packages that are missing, and return their names."""
    packages = missing_packages()
    if not packages:
        return []
    if os.geteuid() != 0:
        raise MissingError(
            f"the Debian packages {' '.join(packages)}",
            f"install them as root: apt-get install --no-install-recommends {' '.join(packages)}",
        )
    with _locked():
        _apt("apt-get", "install", "-y", "--no-install-recommends", *packages)
    return packages


def fetch_kernel() -> Kernel:
    """Download and unpack the current kernel package, unless the cache has this very version."""
    with _locked() as cache:
        packages = cache / "packages"
        packages.mkdir(exist_ok=True)
        # Below the cache, for a rename that is atomic and because 400 MB may be too much for /tmp.
        with tempfile.TemporaryDirectory(dir=cache, prefix="fetch-") as scratch:
            deb = _download(kernel_package(), Path(scratch))
            if not (packages / deb.stem).exists():
                _unpack(deb, Path(scratch, "unpacked"))
                Path(scratch, "unpacked").rename(packages / deb.stem)
            link = Path(scratch, "link")
            link.symlink_to(Path("..", "packages", deb.stem))
            kernels = cache / "kernels"
            kernels.mkdir(exist_ok=True)
            link.rename(kernels / kernel_package())
    kernel = _cached_kernel()
    assert kernel is not None, "it was put there just now"
    return kernel


def _cached_kernel() -> Kernel | None:
    link = cache_directory() / "kernels" / kernel_package()
    if not link.exists():
        return None
    # The name behind the link, so that the kernel stays the same if a newer one is fetched during a run.
    return _kernel(link.resolve())


def _kernel(directory: Path) -> Kernel:
    found = [*directory.glob("lib/modules/*"), *directory.glob("usr/lib/modules/*")]
    if len(found) != 1:
        raise LabError(f"{directory} should hold the modules of one kernel, not {len(found)}; delete it")
    release = found[0].name
    unpacked = directory / "vmlinux"
    return Kernel(release, unpacked if unpacked.exists() else directory / f"boot/vmlinuz-{release}", found[0])


def _download(package: str, directory: Path) -> Path:
    """Download the kernel package that `package` is or depends on."""
    depends = _apt("apt-cache", "depends", "--important", package).split()
    for word, name in pairwise(depends):
        if word == "Depends:" and name.startswith("linux-image-"):
            package = name
            break
    # Without the sandbox of apt, whose user may not write here and which would only warn about it.
    _apt("apt-get", "download", "-o", "APT::Sandbox::User=root", package, cwd=directory)
    (deb,) = directory.glob("*.deb")
    return deb


def _unpack(deb: Path, directory: Path) -> None:
    _run("dpkg-deb", "-x", str(deb), str(directory))
    kernel = _kernel(directory)
    if vmlinux := _vmlinux(kernel.image.read_bytes()):
        Path(directory, "vmlinux").write_bytes(vmlinux)
    # The package leaves modules.dep to its installation script.
    _run("depmod", "-b", str(kernel.modules.parents[2]), kernel.release)


def _vmlinux(image: bytes) -> bytes | None:
    """Take the kernel proper out of a bzImage, which under emulation takes three seconds to unpack itself.

    Returns None if it is not compressed with xz; it boots all the same.
    """
    # Offsets of setup_sects, payload_offset and payload_length: Documentation/arch/x86/boot.rst.
    setup_sectors = image[0x1F1]
    offset, length = struct.unpack_from("<II", image, 0x248)
    start = (setup_sectors + 1) * 512 + offset
    try:
        # A decompressor object, as four bytes of another kind follow the compressed stream.
        return lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(image[start : start + length])
    except lzma.LZMAError:
        return None


def _initramfs(kernel: Kernel) -> Path:
    busybox = _program("busybox").read_bytes()
    if b"/ld-linux" in busybox:
        raise MissingError("a busybox that is linked statically", _remedy())
    recipe = hashlib.sha256()
    for part in (_INIT.read_bytes(), Path(__file__).read_bytes(), busybox):
        recipe.update(hashlib.sha256(part).digest())
    path = cache_directory() / "initramfs" / f"{kernel.release}-{recipe.hexdigest()[:16]}"
    if not path.exists():
        with _locked() as cache, tempfile.TemporaryDirectory(dir=cache, prefix="initramfs-") as scratch:
            built = Path(scratch, "initramfs")
            built.write_bytes(archive(_initramfs_entries(kernel, busybox)))
            path.parent.mkdir(exist_ok=True)
            built.rename(path)
    return path


def _initramfs_entries(kernel: Kernel, busybox: bytes) -> Iterator[Entry]:
    for directory in ("bin", "host", "memory", "modules", "new", "proc"):
        yield Entry.directory(directory)
    yield Entry.file("bin/busybox", busybox, executable=True)
    for applet in _BUSYBOX_APPLETS:
        yield Entry.link(f"bin/{applet}", "busybox")
    yield Entry.file("init", _INIT.read_bytes(), executable=True)
    names = []
    for module in _module_files(kernel):
        data = module.read_bytes()
        if module.suffix == ".xz":
            data = lzma.decompress(data)
        names.append(module.name.removesuffix(".xz"))
        yield Entry.file(f"modules/{names[-1]}", data)
    yield Entry.file("modules.list", "".join(f"{name}\n" for name in names).encode())


def _module_files(kernel: Kernel) -> Sequence[Path]:
    """The modules that the guest boots with, each after those that it needs."""
    root = str(kernel.modules.parents[2])
    files: dict[Path, None] = {}
    for module in _BOOT_MODULES:
        for line in _run("modprobe", "--show-depends", "-d", root, "-S", kernel.release, module).stdout.splitlines():
            action, _, argument = line.partition(" ")
            if action == "insmod":
                files[Path(argument.split()[0])] = None
    return list(files)


@contextmanager
def _locked() -> Iterator[Path]:
    """Hold the only right to change the cache."""
    cache = cache_directory()
    cache.mkdir(parents=True, exist_ok=True)
    with Path(cache, "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield cache


def _apt(*command: str, cwd: Path | None = None) -> str:
    """Run a program of apt; if it fails, as with a container's empty lists, once more with fresh ones."""
    try:
        return _run(*command, cwd=cwd).stdout
    except LabError:
        if os.geteuid() != 0:
            raise
        _run("apt-get", "update")
        return _run(*command, cwd=cwd).stdout


def _run(program: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C.UTF-8", "DEBIAN_FRONTEND": "noninteractive"}
    command = [str(_program(program)), *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise LabError(f"`{' '.join(command)}` failed with status {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


def _program(name: str) -> Path:
    if (path := _which(name)) is None:
        raise MissingError(name, _remedy())
    return Path(path)


def _which(name: str) -> str | None:
    # The PATH of an ordinary user often lacks the directories with modprobe and depmod.
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin")


def _remedy() -> str:
    environment = "".join(
        f"{name}={os.environ[name]} " for name in ("TCMU_LAB_CACHE", "TCMU_LAB_KERNEL") if name in os.environ
    )
    python = Path(sys.executable).name
    return f"run `{environment}{INSTALL_COMMAND.replace('python', python, 1)}` in the checkout"
