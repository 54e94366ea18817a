"""The TCMU devices of this machine as an administrator sees them: a list, and taking one away."""

from __future__ import annotations

import errno
import os
import select
import signal
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from . import _lio, _sysfs


@dataclass(frozen=True, slots=True)
class Device:
    """A user backstore with what hangs on it.

    Attributes:
        name: Name of the backstore.
        device: `/dev/sdX` of its loopback LUN, or None.
        handler: First part of its configuration.
        config: The rest, without escapes.
        size: Bytes.
        fabrics: Fabrics that offer it, whoever made the LUNs.
        pid: Process that serves it; None if there is none, or if the caller may not see it.
        state: `serving`; `unserved`: its process is gone; `blocked`: the kernel answers "busy" for it; `incomplete`:
            never enabled; `unknown`: only root can tell.
        configfs: The backstore's directory.
    """

    name: str
    device: str | None
    handler: str
    config: str
    size: int
    fabrics: tuple[str, ...]
    pid: int | None
    state: str
    configfs: str


def devices() -> list[Device]:
    """Lists the user backstores of all programs, by name."""
    uio = {(device.hba, device.name): device for device in _sysfs.scan()}
    pids = _sysfs.serving_pids(uio.values())
    luns = _lio.luns()
    return sorted(
        (
            _device(backstore, uio.get((backstore.hba, backstore.name)), pids, luns.get(backstore.path, []))
            for backstore in _lio.backstores()
        ),
        key=lambda device: device.name,
    )


def _device(backstore: _lio.Backstore, uio: _sysfs.UioDevice | None, pids: dict[int, int], luns: list[Path]) -> Device:
    pid = pids.get(uio.minor) if uio else None
    if uio is None:
        state = "incomplete"
    elif _lio.is_blocked(backstore):
        state = "blocked"
    elif pid is not None:
        state = "serving"
    else:
        state = "unserved" if os.geteuid() == 0 else "unknown"
    handler, _, config = (uio.config if uio else "").partition("/")
    disk = _disk(luns)
    return Device(
        name=backstore.name,
        device=disk.path if disk else None,
        handler=handler,
        config=_lio.decode_config(config),
        size=_lio.device_size(backstore),
        fabrics=tuple(sorted({lun.parents[3].name for lun in luns})),
        pid=pid,
        state=state,
        configfs=str(backstore.path),
    )


def _disk(luns: list[Path]) -> _sysfs.Disk | None:
    for lun in luns:
        if lun.parents[3].name == "loopback" and (address := _lio.loopback_address(lun)):
            return _sysfs.scsi_disk(address)
    return None


def detach(name: str, *, force: bool, within: float) -> None:
    """Takes a device away: has its process end, or removes what a dead process left.

    Args:
        name: Name of the backstore.
        force: Do it although the disk is in use, or although a program serves it that is not `tcmu-rs attach` or
            serves other devices too. That program ends.
        within: Seconds that the process may take.

    Raises:
        LioError: There is no such device, one of the reasons above, or the process takes longer.
    """
    backstore = _lio.find_backstore(name)
    if backstore is None:
        raise _lio.LioError(f"no device {name}", "`tcmu-rs list` shows the devices")
    disk = _disk(_lio.luns().get(backstore.path, []))
    if disk and not force and _sysfs.in_use(disk):
        raise _lio.LioError(f"{disk.path} of device {name} is in use", "unmount it, or lose data: --force")
    uio = _sysfs.find(backstore.hba, name)
    if uio is not None and _end_server(uio, backstore, force=force, within=within):
        return
    _lio.remove_leftover(backstore)


def _end_server(uio: _sysfs.UioDevice, backstore: _lio.Backstore, *, force: bool, within: float) -> bool:
    """Ends the process that serves a device. Returns whether the device went with it."""
    pid = _sysfs.serving_pids([uio]).get(uio.minor)
    if pid is None:
        _check_unserved(uio)
        return False
    try:
        # The descriptor stands for the process, whatever becomes of its number.
        process = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        served = [minor for minor, server in _sysfs.serving_pids(_sysfs.scan()).items() if server == pid]
        if uio.minor not in served:
            return False
        if not force:
            _check_ours(pid, backstore.name, others=len(served) - 1)
        signal.pidfd_send_signal(process, signal.SIGTERM)
        deadline = time.monotonic() + within
        while backstore.path.exists():
            if select.select([process], [], [], 0.02)[0]:
                return not backstore.path.exists()
            if time.monotonic() > deadline:
                raise _lio.LioError(
                    f"process {pid} did not detach {backstore.name} within {within:g} s",
                    f"kill -9 {pid}, then again: tcmu-rs detach {backstore.name}",
                )
        return True
    finally:
        os.close(process)


def _check_unserved(uio: _sysfs.UioDevice) -> None:
    try:
        os.close(os.open(uio.path, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise _lio.LioError(
                f"device {uio.name} is served by a process that cannot be seen from here",
                "run as root, outside of containers",
            ) from error
        if isinstance(error, PermissionError):
            raise _lio.LioError(f"no permission for {uio.path}", "run as root") from error


def _check_ours(pid: int, name: str, *, others: int) -> None:
    arguments: list[str] = []
    with suppress(OSError):
        arguments = os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")
    # python3 .../bin/tcmu-rs attach, or python3 -m tcmu_rs attach
    ours = any(os.path.basename(argument) in ("tcmu-rs", "tcmu_rs") for argument in arguments[:4])  # noqa: PTH119
    if not ours:
        raise _lio.LioError(
            f"device {name} is served by process {pid} ({arguments[0] if arguments else 'unknown'}), "
            "not by `tcmu-rs attach`",
            "stop that program, or have it ended: --force",
        )
    if others:
        raise _lio.LioError(
            f"process {pid} serves {others} more devices besides {name}",
            "have it ended with all of them: --force",
        )
