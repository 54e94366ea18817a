"""Copies between disks of one process: EXTENDED COPY."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import trio

from . import _errors, _native

if TYPE_CHECKING:
    from ._runtime import Device

NOT_REACHABLE = _errors.Failure(_errors.CHECK_CONDITION, 0xA, 0x0D, 0x02)
"""COPY ABORTED, COPY TARGET DEVICE NOT REACHABLE."""


class CopyDomain:
    """Disks between which initiators may copy, each with a command to one of them (SPC-4, EXTENDED COPY).

    Given to `attach`, `serve` or `serve_all` for each of the disks. A disk in no domain, which is the default, copies
    within itself only.

    The kernel does not tell which initiator sends a command, so nobody can ask which LUNs it may use: **whoever can
    write to one disk of a domain can read and write all of them**, past their access control lists and reservations.
    Put disks together only if their initiators are the same. The event loop has to be the same, too; several domains
    may be in one.
    """

    def __init__(self) -> None:
        self._native = _native.CopyDomain()
        self._devices: dict[bytes, Device] = {}
        self._token: trio.lowlevel.TrioToken | None = None

    def _join(self, device: Device, unit: _native.LogicalUnit) -> None:
        """Takes a device in.

        Raises:
            RuntimeError: The others are served in another event loop.
            ValueError: There is one with the same name.
        """
        token = trio.lowlevel.current_trio_token()
        if self._devices and self._token is not token:
            raise RuntimeError("the disks of a copy domain are served in one event loop, by one trio.run")
        self._native.join(unit)
        self._token = token
        self._devices[device._naa] = device

    def _leave(self, device: Device, unit: _native.LogicalUnit) -> None:
        del self._devices[device._naa]
        self._native.leave(unit)

    def _find(self, naa: bytes) -> Device | None:
        return self._devices.get(naa)


async def copy(cmd: _native.Command, home: Device, domain: CopyDomain | None) -> None:
    """Has the devices do what a copy consists of, piece by piece, up to its answer.

    It runs no handler: a piece is a command of the device that it is for, so a handler is called among its own device's
    workers only, and not after its end.

    Args:
        cmd: The copy.
        home: The device that was asked for it.
        domain: Where the others are.
    """
    while (next_piece := cmd.piece) is not None:
        naa, verb = next_piece
        device = home if naa == home._naa else domain._find(naa) if domain is not None else None
        failure: _errors.Failure | None = NOT_REACHABLE
        if device is not None:
            failure = await device.perform(cmd, verb, foreign=device is not home)
        if failure is not None:
            cmd.fail(*failure)
        elif not cmd.advance():
            break


class Piece:
    """What a copy has to read or write next, as a command among those of the unit that it is for.

    A worker sees of it what it sees of a `Command`; there is no answer on a ring at its end.
    """

    answered = False
    lent = 0
    _last = 0

    def __init__(self, copy: _native.Command, verb: int) -> None:
        # Not an id that a command could have.
        Piece._last -= 1
        self.id = Piece._last
        self.verb = verb
        self.offset = copy.offset
        self.length = copy.length
        self.fua = copy.fua
        self.iov = copy.iov
        self.failure: _errors.Failure | None = None
        self._begun = time.monotonic_ns()
        self.done = trio.Event()

    @property
    def age(self) -> int:
        """Nanoseconds since it was asked for."""
        return time.monotonic_ns() - self._begun

    def detach(self) -> bool:
        """Whether it goes on when it is aborted."""
        return False

    def begin(self) -> int:
        """The verb."""
        return self.verb

    def run(self, methods: object, more: object = None) -> Any:
        """Needs more than a call."""
        return NotImplemented

    def advance(self) -> bool:
        """Done."""
        self.done.set()
        return False

    def fail(self, *failure: int | None) -> None:
        """Done, but not well."""
        if not self.done.is_set():
            self.failure = _errors.Failure(*failure)  # type: ignore[arg-type]
            self.done.set()
