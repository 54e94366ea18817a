"""One process per device under one supervisor: `tcmu-rs daemon --isolate`.

What one device's server does, hanging, crashing, using up its memory or its descriptors, no other device notices. The
supervisor finds the devices and hears of new ones; that is all it knows of them. Their servers listen to the kernel's
announcements themselves, and answer those of their device.
"""

from __future__ import annotations

from collections.abc import Container

from . import _sysfs
from ._native import NetlinkSocket
from ._supervise import Keeper, Leash


class Isolation:
    """The supervisor of a server for each device of some handlers.

    Args:
        handlers: Names of the handlers.
        replies: Let the kernel wait until a new device is served, or refused.

    Raises:
        FileNotFoundError: The kernel module `target_core_user` is not loaded.
    """

    def __init__(self, handlers: Container[str], *, replies: bool) -> None:
        self._handlers = handlers
        self._socket = NetlinkSocket()
        if replies:
            self._socket.set_features(True)
        self._again: set[str] = set()
        self._keeper = Keeper("the daemon", watch=self._socket.fileno(), on_watch=self._read, on_ended=self._look_again)

    def run(self) -> Leash:
        """Has each device served until a signal comes. Returns in the servers, with the device's `HBA/NAME` as key."""
        self._scan()
        leash = self._keeper.run()
        self._socket.close()
        return leash

    def _scan(self) -> None:
        for uio in _sysfs.scan():
            if uio.config.partition("/")[0] in self._handlers:
                self._keeper.add(f"{uio.hba}/{uio.name}")

    def _read(self) -> None:
        received = self._socket.receive()
        for event in received.events:
            parsed = _sysfs.parse_uio_name(event.name)
            if event.kind == "added" and parsed and parsed[2].partition("/")[0] in self._handlers:
                key = f"{parsed[0]}/{parsed[1]}"
                if not self._keeper.add(key):
                    # The server of a device of the same name that is gone has not ended yet.
                    self._again.add(key)
        if received.overflow:
            self._scan()

    def _look_again(self, key: str) -> None:
        if key in self._again:
            self._again.discard(key)
            self._keeper.add(key)
