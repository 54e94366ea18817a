"""Devices come and go: the kernel's announcements under trio."""

from __future__ import annotations

import logging
from collections import deque
from typing import TYPE_CHECKING, Self, final

import trio

from tcmu_rs._native import NetlinkSocket

if TYPE_CHECKING:
    from types import TracebackType

    from tcmu_rs._native import DeviceEvent

logger = logging.getLogger(__name__)


@final
class Rescan:
    """Announcements were lost: look into sysfs for devices that came or went.

    A device that is found there and whose ``enable`` in configfs still reads 0 waits for the answer to its
    lost event, which :meth:`tcmu_rs._native.DeviceEvent.added` makes good.
    """


class DeviceEvents:
    """What the kernel announces from now on, in the order it was sent.

    Make one first and scan sysfs after that: a device that comes up in between is then seen twice rather
    than never.

    Where replies are switched on, each event keeps somebody in the kernel waiting, with no time limit, until
    it is answered by :meth:`reply`. Answer each event of one's own devices once and soon, no other. Before
    "removed" is answered, configfs below the device's HBA must not be touched: that would wait for the answer
    too.

    *Resource handling.* A context manager; leaving it closes the socket and ends an iteration elsewhere.

    *Error handling.* ``OSError`` of the socket. Messages that cannot be understood are logged and skipped.

    Raises:
        FileNotFoundError: the kernel module ``target_core_user`` is not loaded; out of the iteration, it was
            unloaded.
    """

    def __init__(self) -> None:
        self._socket = NetlinkSocket()
        self._closed = False
        self._pending: deque[DeviceEvent | Rescan] = deque()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> DeviceEvent | Rescan:
        if self._pending:
            await trio.lowlevel.checkpoint()
        while not self._closed:
            if self._pending:
                return self._pending.popleft()
            try:
                await trio.lowlevel.wait_readable(self._socket)
            except trio.ClosedResourceError:
                break
            self._receive()
        raise StopAsyncIteration

    def _receive(self) -> None:
        received = self._socket.receive()
        self._pending.extend(received.events)
        # After the events: the kernel drops until the socket has been emptied, as it is now.
        if received.overflow:
            self._pending.append(Rescan())
        for reason in received.malformed:
            logger.warning("skipped a netlink message of TCM-USER: %s", reason)

    def reply(self, event: DeviceEvent, status: int = 0) -> bool:
        """Answer an event.

        Args:
            event: an event that has not been answered.
            status: 0, or a negative error number, which the writer to configfs gets to see. An error takes a
                device that was "added" down again, leaves the value of a "reconfig" as it was, and does not
                stop "removed".

        Returns:
            Whether the kernel was waiting. It was not if replies are off for the device, or if somebody else
            was faster.

        Raises:
            ValueError: the event has been answered, or the status is positive.
        """
        return self._socket.reply(event, status)

    def set_features(self, reply_supported: bool) -> None:
        """Let the kernel wait for answers, or not: for the whole machine, until somebody switches it again.

        Raises:
            PermissionError: not root.
        """
        self._socket.set_features(reply_supported)

    def close(self) -> None:
        """Stop listening; closing again does nothing."""
        if not self._closed:
            self._closed = True
            trio.lowlevel.notify_closing(self._socket)
            self._socket.close()
