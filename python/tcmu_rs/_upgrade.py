"""One server process hands its devices to another one, maybe of another version, between two commands.

The successor is started first, with the command line of the process that it succeeds. When it is loaded, and not
before, there is a pause:

1. The predecessor takes nothing more out of its rings, and waits until what it took is answered and handed back. Then
   there is no command in flight, and all that there is to know of a ring is one position, which is in the mailbox too.
   What initiators send meanwhile waits in the ring.
2. It closes its handlers, so that their storage is complete and their locks are free.
3. It sends each device's descriptor (`SCM_RIGHTS`), position, the settings that initiators made, and the buffers that
   the kernel keeps.
4. The successor opens its handlers, maps the rings, and says `ready`. It has not touched a ring so far.
5. The predecessor says `go`, and touches nothing any more: it leaves the process without a last word to the kernel.
6. The successor takes commands from that position.

Exactly one process works on a ring at any time: before `go` the predecessor, from `go` on the successor. Whatever goes
wrong before ends the successor, of whose death the predecessor makes sure; then it opens its handlers again and goes
on. If the predecessor dies before `go`, there was no command in flight: the successor goes on as after `go`. If the
successor dies after it, it has crashed as any server may, and its supervisor starts the next one.

The record is JSON with a version. A successor that does not know the version, or something of the record, refuses.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn

import trio

from . import _control, _lio
from ._control import Channel, ControlError
from ._supervise import Leash, become_subreaper

if TYPE_CHECKING:
    from ._native import LogicalUnit, Ring
    from ._runtime import Device

_log = logging.getLogger("tcmu_rs")

VERSION = 1
"""Of the record and the conversation."""

_ENVIRONMENT = "TCMU_RS_HEIR"
_STARTS_WITHIN = 60.0
"""Seconds for a successor to load. Devices are served meanwhile."""
_QUIET_WITHIN = 5.0
"""Seconds for the commands in flight of all devices to end."""
_OPENS_WITHIN = 15.0
"""Seconds for handlers to close, and then for the successor's to open, both together: with the quiet before they stay
below the 30 s after which the kernel fails what waits in the ring, on a machine that is busy with other things, too."""
_OFFERS_WITHIN = 5.0
"""Seconds for a server that has just begun to offer the verb."""


class UpgradeError(Exception):
    """The devices stay with the process that had them. The text says why."""


# The side of the predecessor.


class Heir:
    """The process that has taken over.

    Attributes:
        pid: Its number.
        leash: Our end of its leash, if it has a leash to us and not to the supervisor that we have.
    """

    def __init__(self, pid: int, leash: socket.socket | None) -> None:
        self.pid = pid
        self.leash = leash

    def leave(self, name: str) -> NoReturn:
        """Ends this process, without any of the things that are done at an end: the devices are the heir's.

        Without a supervisor this process becomes one, for who has started it waits for its end, and has its number.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        if self.leash is not None:
            # Signals wait until the new program can hear them.
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD])
            self.leash.set_inheritable(True)
            # Now, and not when the new program is ready: by then the heir may have left to an heir of its own.
            become_subreaper()
            keep = [str(self.pid), str(self.leash.fileno()), name]
            with suppress(OSError):
                os.execv(sys.executable, [sys.executable, "-m", "tcmu_rs._supervise", *keep])
        os._exit(0)


async def hand_over(devices: Mapping[str, Device], leash: Leash | None, name: str) -> Heir:
    """Hands devices to a new process. After that the caller may do nothing but leave.

    Args:
        devices: By `HBA/NAME`.
        leash: To the supervisor of this process, which becomes the heir's.
        name: What the supervisor calls the server.

    Raises:
        UpgradeError: They are served here as before.
    """
    ours, its = socket.socketpair()
    channel = Channel(trio.SocketStream(trio.socket.from_stdlib_socket(ours)))
    own_leash = None
    if leash is None:
        own_leash, other = socket.socketpair()
        leash = Leash(other, name=name)
    leash.name = name
    try:
        process = _start(its, leash)
    except OSError as error:
        ours.close()
        raise UpgradeError(f"the successor cannot be started: {error}") from error
    finally:
        its.close()
        if own_leash is not None:
            leash.sock.close()
    try:
        await _negotiate(channel, devices, process)
    except BaseException:
        if own_leash is not None:
            own_leash.close()
        raise
    finally:
        ours.close()
    return Heir(process.pid, own_leash)


def _start(sock: socket.socket, leash: Leash) -> subprocess.Popen[bytes]:
    environment = {**os.environ, _ENVIRONMENT: str(sock.fileno())}
    descriptors = (sock.fileno(), leash.to_inherit(environment))
    return subprocess.Popen(sys.orig_argv, executable=sys.executable, env=environment, pass_fds=descriptors)


async def _negotiate(channel: Channel, devices: Mapping[str, Device], process: subprocess.Popen[bytes]) -> None:
    paused: list[Device] = []
    closed: list[Device] = []
    try:
        with _within(_STARTS_WITHIN, "the successor did not load"):
            hello = await _expect(channel, "version")
        if hello != VERSION:
            raise UpgradeError(f"the successor speaks version {hello} of the hand-over, this process {VERSION}")
        until = trio.current_time() + _QUIET_WITHIN
        for device in devices.values():
            paused.append(device)
            await device.pause(max(until - trio.current_time(), 0))
        with _within(_OPENS_WITHIN, "the handlers could not be closed and opened by the successor"):
            for device in devices.values():
                closed.append(device)
                await device.handler.aclose()
            for key, device in devices.items():
                await channel.send({"device": key, **device.estate()}, [device.fileno()])
            await channel.send({"end": len(devices)})
            await _expect(channel, "ready")
        await channel.send({"go": True})
    except BaseException as error:
        with trio.CancelScope(shield=True):
            # First of all: from here on nobody else touches the rings.
            process.kill()
            await trio.to_thread.run_sync(process.wait)
            await _go_on(paused, closed)
        if isinstance(error, ControlError | trio.TooSlowError | trio.BusyResourceError):
            raise UpgradeError(str(error)) from error
        raise
    with trio.move_on_after(_OPENS_WITHIN), suppress(ControlError):
        await _expect(channel, "took")


async def _go_on(paused: list[Device], closed: list[Device]) -> None:
    for device in closed:
        try:
            await device.handler.open()
        except Exception as error:
            # Nobody can serve it here. Nothing is in flight: the next server finds a device that is in order.
            _log.critical("%s: its storage cannot be opened again, the server ends: %s", device.name, error)
            for other in paused:
                with suppress(OSError, _lio.LioError):
                    if backstore := _lio.find_backstore(other.name):
                        _lio.block(backstore)
            os._exit(1)
    for device in paused:
        device.resume()


@contextmanager
def _within(seconds: float, what: str) -> Iterator[None]:
    try:
        with trio.fail_after(seconds):
            yield
    except trio.TooSlowError:
        raise UpgradeError(f"{what} within {seconds:g} s") from None


async def _expect(channel: Channel, key: str) -> Any:
    message = await channel.receive()
    message.close()
    if "error" in message.body:
        raise UpgradeError(str(message.body["error"]))
    if key not in message.body:
        raise UpgradeError(f"the other process said {message.body} instead of {key!r}")
    return message.body[key]


# The side of the successor.


class Inherited:
    """One device that was handed over.

    Attributes:
        fd: Its node, open.
    """

    def __init__(self, succession: Succession, fd: int, record: Mapping[str, Any]) -> None:
        self.fd = fd
        self._succession = succession
        self._record = record

    @property
    def is_ours(self) -> bool:
        """Whether we may touch it."""
        return self._succession.committed.is_set()

    async def begin(self, ring: Ring, unit: LogicalUnit | None) -> None:
        """Continues where the predecessor has stopped; returns when that one has let go.

        Raises:
            ValueError: The record does not fit the device, or has something that is unknown here.
        """
        if unknown := self._record.keys() - {"device", "position", "unit", "kept"}:
            raise ValueError(f"the hand-over has {', '.join(unknown)}, which is unknown here")
        if ring.quiescent_at() != self._record["position"]:
            raise ValueError(f"the ring stands at {ring.quiescent_at()}, not at {self._record['position']}")
        if (unit is None) != (self._record["unit"] is None):
            raise ValueError("the handler has become one of another kind")
        if unit is not None:
            unit.restore([(str(key), int(value)) for key, value in self._record["unit"]])
        await self._succession.is_ready()

    async def free_kept(self, free: Callable[[int], None]) -> None:
        """Frees the buffers that the kernel kept for views in the predecessor, when that one is gone."""
        await self._succession.gone.wait()
        for number in self._record["kept"]:
            with suppress(OSError):
                free(int(number))


class Succession:
    """What a successor gets. Made from the environment of the process.

    Attributes:
        committed: Set when the devices are ours.
        gone: Set when the predecessor has left.
    """

    def __init__(self, sock: socket.socket) -> None:
        self.committed = trio.Event()
        self.gone = trio.Event()
        self._channel: Channel | None = None
        self._sock = sock
        self._devices: dict[str, Inherited] = {}
        self._left = 0
        self._all_waiting = trio.Event()

    @classmethod
    def inherited(cls) -> Succession | None:
        """The succession that this process was started for, if it was."""
        if (text := os.environ.pop(_ENVIRONMENT, None)) is None:
            return None
        sock = socket.socket(fileno=int(text))
        sock.set_inheritable(False)
        return cls(sock)

    @staticmethod
    def is_due() -> bool:
        """Whether this process was started to succeed another one."""
        return _ENVIRONMENT in os.environ

    @property
    def devices(self) -> list[str]:
        """Those that nobody has taken yet, as `HBA/NAME`."""
        return list(self._devices)

    def take(self, key: str) -> Inherited | None:
        """A device that was handed over, for who serves it, once."""
        return self._devices.pop(key, None)

    async def receive(self) -> None:
        """Says that this process is loaded, and waits for the devices.

        Raises:
            ControlError: The predecessor goes on by itself.
        """
        self._channel = Channel(trio.SocketStream(trio.socket.from_stdlib_socket(self._sock)))
        await self._channel.send({"version": VERSION})
        while "end" not in (message := await self._channel.receive()).body:
            device, descriptors = message.body.get("device"), message.take_descriptors()
            if not isinstance(device, str) or device in self._devices or len(descriptors) != 1:
                for descriptor in descriptors:
                    os.close(descriptor)
                raise ControlError(f"the predecessor hands over {device!r} with {len(descriptors)} descriptors")
            self._devices[device] = Inherited(self, descriptors[0], message.body)
        message.close()
        self._left = len(self._devices)

    async def is_ready(self) -> None:
        """Waits until all devices are ready, and ours."""
        self._left -= 1
        if self._left == 0:
            self._all_waiting.set()
        await self.committed.wait()

    async def run(self) -> None:
        """The conversation, once the devices are being prepared."""
        assert self._channel is not None
        await self._all_waiting.wait()
        with suppress(ControlError):
            # One that is gone has left nothing in flight, and will touch nothing.
            await self._channel.send({"ready": True})
            await _expect(self._channel, "go")
        self.committed.set()
        with suppress(ControlError):
            await self._channel.send({"took": True})
            await self._channel.receive()
        self.gone.set()

    async def fail(self, error: BaseException) -> NoReturn:
        """Leaves the devices to the predecessor, which they belong to: nothing of them may be touched at the end."""
        text = "; ".join(str(leaf) or type(leaf).__name__ for leaf in _leaves(error))
        with trio.CancelScope(shield=True, deadline=trio.current_time() + 1), suppress(ControlError):
            if self._channel is not None:
                await self._channel.send({"error": f"the successor: {text}"})
        os._exit(1)


def _leaves(error: BaseException) -> list[BaseException]:
    if not isinstance(error, BaseExceptionGroup):
        return [error]
    return [leaf for inner in error.exceptions for leaf in _leaves(inner) if not isinstance(leaf, trio.Cancelled)]


# The side of who asks for it.


async def ask(pid: int) -> dict[str, Any]:
    """Has a server process hand its devices over.

    Returns:
        `pid` of the successor, and `devices`, their names.

    Raises:
        UpgradeError: It did not; the devices are served as before.
    """
    deadline = trio.current_time() + _OFFERS_WITHIN
    while True:
        try:
            return await _ask_once(pid)
        except _NotOfferedError as error:
            # A server that has just begun answers other questions before this one.
            if trio.current_time() > deadline:
                raise UpgradeError(str(error)) from error
            await trio.sleep(0.1)


class _NotOfferedError(Exception):
    """No socket of the process knows the verb."""


async def _ask_once(pid: int) -> dict[str, Any]:
    why = f"process {pid} has no control socket: it is not `tcmu-rs attach` or `daemon`, or of an older version"
    for path in _control.sockets(pid):
        try:
            async with _control.connect(path) as channel:
                answer = await channel.ask("upgrade")
                # Until the old process is off the devices, so that whoever looks finds one server.
                with trio.move_on_after(_OPENS_WITHIN), suppress(ControlError):
                    await channel.receive()
                return answer.body
        except ControlError as error:
            # Each process has a socket that knows the verb, among others that do not.
            if "no verb" not in str(error):
                raise UpgradeError(str(error).removeprefix("UpgradeError: ")) from error
            why = f"process {pid} is no server of the command line, which alone can be started anew: {error}"
    raise _NotOfferedError(why)
