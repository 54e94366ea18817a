"""Devices that a dead process left: found, claimed, and taken from their initiators' point of view into a pause.

The kernel keeps a device whose server was killed, its LUNs and the commands in its ring. Whoever opens the UIO node is
the successor: the kernel lets nobody else open it, so a claim is atomic and needs no file. The entries in the ring
cannot be continued, for the dead process may have put answers into the slots of commands that it still ran. So they go
back to their initiators as BUSY (`action/reset_ring`), new ones are refused alike (`action/block_dev`) until commands
flow again, and initiators send both again.

Blocking calls: from trio, run them in a thread.
"""

from __future__ import annotations

import errno
import hashlib
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from . import _lio, _sysfs
from ._lio import Backstore, BackstoreExistsError, LioError
from ._native import Ring
from ._sysfs import UioDevice

if TYPE_CHECKING:
    from ._handler import Handler, Options
    from ._native import LogicalUnit

_MAX_NOTE = 511
"""Bytes that the kernel keeps of it (`SE_DEV_ALIAS_LEN`)."""
_DYING_FOR = 5.0
"""Seconds that the kernel may take to close what a killed process had open; its mapping is large."""


class Claim:
    """A device that nobody serves, and that nobody else can serve while this is open.

    Attributes:
        backstore: It, in configfs.
        uio: Its node and mapping.
        fd: Its node, open; closed by `close`.
        was_served: Whether another process has served it before: its initiators may rely on what that one stored.
        was_handed_over: Whether that one has let go of it in good order, and not died.
        known_size: Bytes that its initiators know.
    """

    def __init__(self, backstore: Backstore, uio: UioDevice, fd: int | None = None) -> None:
        self.backstore = backstore
        self.uio = uio
        self.was_served = True
        self.known_size = _lio.device_size(backstore)
        self.was_handed_over = fd is not None
        if fd is not None:
            self.fd = fd
            return
        self.fd = _open(uio)
        try:
            # The reset of a ring takes away the one sign, and leaves the other.
            self.was_served = _lio.is_blocked(backstore) or Ring.was_served(self.fd, uio.map_size)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Lets go of the device; closing again does nothing."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def settle(self, size: int, unit: LogicalUnit | None) -> None:
        """Tells the kernel and the initiators what is new about the device, before its first command is taken.

        Storage that has grown: a resize was cut short, or somebody has enlarged it meanwhile. And if the server before
        has died, that what initiators had set there is forgotten.

        Args:
            size: Bytes of the storage.
            unit: The emulated unit, if there is one.
        """
        if size > self.known_size:
            _lio.set_size(self.backstore, size)
        if unit is not None:
            if size > self.known_size:
                unit.announce_capacity()
            if self.was_served and not self.was_handed_over:
                unit.announce_reset()

    def fence(self) -> None:
        """Gives back as BUSY what the dead process has not answered, and what comes until `unblock`.

        Raises:
            LioError: The kernel refuses.
        """
        # Only ever with the node open: the kernel trips over the reset of a device that nobody has opened.
        fence(self.backstore)


@_lio.own_errors
def fence(backstore: Backstore) -> None:
    """Blocks a device and empties its ring, whose server must be dead or have stopped to work on it."""
    with suppress(FileNotFoundError):
        _lio.act(backstore, "block_dev", 1)
        _lio.act(backstore, "reset_ring", 1)


@_lio.own_errors
def unblock(backstore: Backstore) -> None:
    """Has the kernel accept commands again."""
    _lio.act(backstore, "block_dev", 0)


def _open(uio: UioDevice) -> int:
    deadline = time.monotonic() + _DYING_FOR
    while True:
        try:
            return os.open(uio.path, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
        _refuse_served(uio)
        if time.monotonic() > deadline:
            raise BackstoreExistsError(
                f"device {uio.name} exists already, served by a process that cannot be seen from here",
                "run as root, outside of containers",
            )
        time.sleep(0.02)


def _refuse_served(uio: UioDevice) -> None:
    if (pid := _sysfs.serving_pids([uio]).get(uio.minor)) is not None:
        raise BackstoreExistsError(
            f"device {uio.name} exists already, process {pid} serves it",
            f"choose another name, or end it: tcmu-rs detach {uio.name}",
        )


@_lio.own_errors
def inherit(key: str, fd: int) -> Claim:
    """The claim to a device `HBA/NAME` that its server hands over, with the open node.

    Raises:
        LioError: There is no such device (any more).
    """
    hba, _, name = key.partition("/")
    backstore = _lio.find_backstore(name)
    uio = _sysfs.find(int(hba), name)
    if backstore is None or uio is None or backstore.hba != int(hba):
        raise LioError(f"device {name} of user_{hba} is gone")
    return Claim(backstore, uio, fd)


def is_there(dev_config: str) -> bool:
    """Whether there is a device of this configuration, served or not."""
    return any(uio.config == dev_config for uio in _sysfs.scan())


@_lio.own_errors
def find(name: str | None, dev_config: str, *, persistent: bool) -> Claim | None:
    """Claims the device that a dead process left, if there is one to adopt.

    Args:
        name: Name of the backstore; None for the one with this configuration.
        dev_config: `HANDLER/CONFIG` as the kernel has it.
        persistent: Whether the handler's storage has outlived the process.

    Returns:
        The claim; None if the name is free, or with no name if no such device was left.

    Raises:
        BackstoreExistsError: A live process serves the device, or it is another one: of another configuration,
            unfinished, or with a storage that is gone.
    """
    if name is None:
        return _find_by_config(dev_config) if persistent else None
    backstore = _lio.find_backstore(name)
    if backstore is None:
        return None
    uio = _sysfs.find(backstore.hba, name)
    if uio is None:
        raise BackstoreExistsError(
            f"device {name} exists already, unfinished", f"if nobody is making it now: tcmu-rs detach {name}"
        )
    if uio.config == dev_config and persistent:
        # At once: commands wait, and to look who else might have it goes through all processes of the machine.
        return Claim(backstore, uio)
    # A stranger's device is not even opened.
    _refuse_served(uio)
    if uio.config != dev_config:
        raise BackstoreExistsError(
            f"device {name} exists already, left by a server of {_spec(uio.config)}, not of {_spec(dev_config)}",
            f"adopt it: tcmu-rs attach {_spec(uio.config)} --name {name}; or remove it: tcmu-rs detach {name}",
        )
    raise BackstoreExistsError(
        f"device {name} exists already, and what {_spec(uio.config)} stored has gone with its process",
        f"choose another name or remove it: tcmu-rs detach {name}",
    )


def _find_by_config(dev_config: str) -> Claim | None:
    for uio in _sysfs.scan():
        if uio.config == dev_config:
            # Served, or gone by now: then it is not one that was left.
            with suppress(LioError, OSError):
                if backstore := next((b for b in _lio.backstores() if (b.hba, b.name) == (uio.hba, uio.name)), None):
                    return Claim(backstore, uio)
    return None


def _spec(dev_config: str) -> str:
    handler, _, config = dev_config.partition("/")
    return f"{handler}:{_lio.decode_config(config)}"


def note(read_only: bool, options: Mapping[str, str]) -> str:
    """What a device was asked for beside its configuration, on one line; it stays with the device for its next server.

    Empty if there is nothing. What would be too long is there as a digest.
    """
    words = ["read-only"] * read_only + [f"{key}={_lio.encode_config(options[key])}" for key in sorted(options)]
    text = " ".join(words)
    if len(os.fsencode(text)) > _MAX_NOTE:
        text = f"sha256={hashlib.sha256(os.fsencode(text)).hexdigest()}"
    return text


@_lio.own_errors
def check_note(backstore: Backstore, wanted: str) -> None:
    """Refuses other options than those of the server before: the disk could be another one by them.

    Raises:
        BackstoreExistsError: The text has both.
    """
    if (found := _lio.note_of(backstore)) != wanted:
        raise BackstoreExistsError(
            f"device {backstore.name} exists already, left by a dead process with "
            f"{found or 'no options'}, not {wanted or 'none'}",
            f"ask for the same (--read-only, -o KEY=VALUE), or remove it: tcmu-rs detach {backstore.name}",
        )


def check_size(backstore: Backstore, size: int) -> None:
    """Refuses storage that is smaller than what initiators know. Larger is fine: they are told.

    Raises:
        BackstoreExistsError: The text has both sizes.
    """
    if size < (known := _lio.device_size(backstore)):
        raise BackstoreExistsError(
            f"device {backstore.name} exists already, left by a dead process with {known} bytes, "
            f"and the storage has {size}",
            f"make the storage larger, or remove the device: tcmu-rs detach {backstore.name}",
        )


def remade(kind: type[Handler], config: str, options: Options, name: str) -> Handler:
    """The handler of a device that was served before, by a server that was given the same options.

    The device may have been resized since, so its size is that of the storage, whatever the options say; where the
    storage has none of its own, what initiators know. And it is not to be made: storage that is gone is not replaced
    by an empty one.
    """
    options = replace(options, create=False)
    if options.size is None:
        return kind.from_config(config, options)
    try:
        return kind.from_config(config, replace(options, size=None))
    except ValueError:
        backstore = _lio.find_backstore(name)
        return kind.from_config(config, replace(options, size=_lio.device_size(backstore) if backstore else None))


@_lio.own_errors
def check_same(backstore: Backstore, wanted: Mapping[str, object], wwn: str | None) -> None:
    """Compares a device that was left with the one that was asked for.

    Args:
        backstore: The device.
        wanted: Attributes of configfs; those that are None are not compared.
        wwn: Unit serial number, or None.

    Raises:
        BackstoreExistsError: They differ; the text has both values.
    """
    for key, value in [*wanted.items(), ("wwn", wwn)]:
        found = backstore.wwn if key == "wwn" else _attribute(backstore.path, key)
        if value is not None and found.lower() != str(value).lower():
            raise BackstoreExistsError(
                f"device {backstore.name} exists already, left by a dead process with {key} {found}, not {value}",
                f"ask for the same, or remove it: tcmu-rs detach {backstore.name}",
            )


def _attribute(backstore: Path, key: str) -> str:
    return (backstore / "attrib" / key).read_text().strip()


@_lio.own_errors
def exposure(
    backstore: Backstore, fabric: _lio.Fabric, *, target: str | None = None, portal: str | None = None
) -> _lio.Exposure | None:
    """Finds the LUN of a device that was left; what is half-made or half-removed goes. The device must be served.

    Args:
        backstore: The device.
        fabric: Where it should be offered.
        target: Name of the target that was asked for, or None.
        portal: Where it has to listen, for iSCSI.

    Returns:
        The LUN as it should be; None if there is none.

    Raises:
        BackstoreExistsError: It is offered otherwise; the text says how.
    """
    kept = None
    for found in _lio.exposures(backstore):
        if not _lio.is_complete(found, backstore):
            _lio.withdraw(found)
        elif (
            found.fabric != fabric
            or (target or found.wwn).lower() != found.wwn
            or (fabric == "iscsi" and portal not in (None, *_lio.portals(found)))
        ):
            offered = " ".join([found.fabric, found.wwn, *_lio.portals(found)])
            raise BackstoreExistsError(
                f"device {backstore.name} exists already, offered as {offered}, not as "
                + " ".join(filter(None, [fabric, target, portal])),
                f"ask for the same, or remove it: tcmu-rs detach {backstore.name}",
            )
        else:
            kept = found
    return kept
