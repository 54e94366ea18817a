"""The control socket of a serving process: questions and orders from other processes of this machine.

Each `attach` and each daemon listens at `/run/tcmu-rs/control/PID.N.sock`. Only root gets there: the directory has mode
0700, and the kernel's word on who connects is checked besides. A message is a JSON object on one line; descriptors may
go with it. The client sends a request with the key `verb`; the verb answers with one message, or goes on with a
conversation of its own. One message is under way at a time, so that descriptors belong to the message they come with.

Which process serves a device is read from `/proc`, as ever; the socket's name holds nothing that could be stale but the
socket itself, which the next server removes.
"""

from __future__ import annotations

import array
import errno
import json
import logging
import os
import socket
import struct
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import trio

_log = logging.getLogger("tcmu_rs")

DIRECTORY = Path("/run/tcmu-rs/control")
"""Where the sockets are."""
MAX_LINE = 16 << 20
"""Bytes of a message."""
MAX_DESCRIPTORS = 253
"""Descriptors that the kernel lets go with a message (`SCM_MAX_FD`)."""

_BACKLOG = 16
_UCRED = struct.Struct("=iII")


class ControlError(Exception):
    """The other side said no, went away, or does not speak this protocol. The text says which."""


class Message:
    """What came over a channel.

    Attributes:
        body: The JSON object.
    """

    def __init__(self, body: dict[str, Any], descriptors: list[int]) -> None:
        self.body = body
        self._descriptors = descriptors

    def take_descriptors(self) -> list[int]:
        """Returns the descriptors that came with the message; closing them is the caller's from now on."""
        taken, self._descriptors = self._descriptors, []
        return taken

    def close(self) -> None:
        """Closes the descriptors that nobody took."""
        for descriptor in self.take_descriptors():
            os.close(descriptor)


Verb = Callable[["Message", "Channel"], Awaitable[Mapping[str, Any] | None]]
"""Serves a request: returns the answer, or None if it has sent what there was to send. An exception is answered with
its text. Descriptors of the request that it does not take are closed."""


class Channel:
    """One end of a connection; not to be used by two tasks at once."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._rest = b""

    async def send(self, body: Mapping[str, Any], descriptors: Iterable[int] = ()) -> None:
        """Sends a message.

        Raises:
            ControlError: The other side is gone.
        """
        line = json.dumps(body, separators=(",", ":")).encode() + b"\n"
        rights = array.array("i", descriptors)
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
        try:
            # The descriptors go with the first byte.
            sent = await self._stream.socket.sendmsg([line], ancillary)
            await self._stream.send_all(line[sent:])
        except (OSError, trio.BrokenResourceError) as error:
            raise ControlError(f"the other side is gone: {error}") from error

    async def receive(self) -> Message:
        """Waits for a message.

        Raises:
            ControlError: The other side is gone, or sent something else.
        """
        data = self._rest
        descriptors: list[int] = []
        try:
            while b"\n" not in data:
                if len(data) > MAX_LINE:
                    raise ControlError(f"a message of more than {MAX_LINE} bytes")
                more, ancillary, flags, _ = await self._stream.socket.recvmsg(
                    1 << 16, socket.CMSG_SPACE(4 * MAX_DESCRIPTORS), socket.MSG_CMSG_CLOEXEC
                )
                for level, kind, rights in ancillary:
                    if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                        descriptors += array.array("i", rights[: len(rights) // 4 * 4])
                if flags & socket.MSG_CTRUNC:
                    raise ControlError("descriptors were lost: this process may open no more")
                if not more:
                    raise ControlError("the other side went away in the middle" if data else "the other side is gone")
                data += more
            line, _, self._rest = data.partition(b"\n")
            body = json.loads(line)
            if not isinstance(body, dict):
                raise ControlError("a message that is no JSON object")
        except BaseException as error:
            Message({}, descriptors).close()
            if isinstance(error, OSError | ValueError | RecursionError):
                raise ControlError(f"no message came: {error}") from error
            raise
        return Message(body, descriptors)

    async def ask(self, verb: str, *, descriptors: Iterable[int] = (), **arguments: Any) -> Message:
        """Sends a request and waits for the answer.

        Raises:
            ControlError: With the text of the other side if it could not do it.
        """
        await self.send({"verb": verb, **arguments}, descriptors)
        answer = await self.receive()
        if "error" in answer.body:
            answer.close()
            raise ControlError(str(answer.body["error"]))
        return answer


async def serve(
    verbs: Mapping[str, Verb],
    *,
    directory: Path = DIRECTORY,
    task_status: trio.TaskStatus[Path] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serves requests until cancelled.

    Args:
        verbs: What can be asked.
        directory: Where the socket is made; made itself if it is not there.
        task_status: Gets the path of the socket.

    Resource handling: the socket is removed at the end.

    Error handling: what goes wrong with a request is the answer to it.

    Raises:
        OSError: The socket cannot be made.
    """
    path, listener = _listen(directory)

    async def connection(stream: trio.SocketStream) -> None:
        with suppress(ControlError):
            await _converse(Channel(stream), verbs)

    try:
        task_status.started(path)
        await trio.serve_listeners(connection, [listener])
    finally:
        path.unlink(missing_ok=True)
        listener.socket.close()


async def offer(verbs: Mapping[str, Verb], *, directory: Path = DIRECTORY) -> None:
    """`serve`, but for devices that do without if there can be no socket."""
    try:
        await serve(verbs, directory=directory)
    except OSError as error:
        _log.warning("no control socket, so no `stats` of this process: %s", error)


def _listen(directory: Path) -> tuple[Path, trio.SocketListener]:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = directory.lstat()
    if found.st_uid != os.geteuid() or found.st_mode & 0o077 or not directory.is_dir():
        raise PermissionError(errno.EPERM, "not a directory of our own with mode 0700", str(directory))
    _sweep(directory)
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        for number in range(1 << 16):
            path = directory / f"{os.getpid()}.{number}.sock"
            with suppress(FileExistsError):
                _publish(bound, path)
                return path, trio.SocketListener(trio.socket.from_stdlib_socket(bound))
        raise FileExistsError(errno.EEXIST, "too many sockets", str(directory))
    except BaseException:
        bound.close()
        raise


def _publish(bound: socket.socket, path: Path) -> None:
    """Gives a socket its name when it listens already: another server would take it for a dead one's before."""
    if not bound.getsockname():
        # The descriptor is in the name because one process may be here several times.
        unfinished = path.with_name(f"{os.getpid()}.{bound.fileno()}.new")
        unfinished.unlink(missing_ok=True)
        bound.bind(str(unfinished))
        bound.listen(_BACKLOG)
    unfinished = Path(bound.getsockname())
    path.hardlink_to(unfinished)
    unfinished.unlink()


def _sweep(directory: Path) -> None:
    """Removes the sockets of servers that were killed: nobody listens there."""
    for path in directory.glob("*.sock"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.setblocking(False)
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink(missing_ok=True)
            except OSError:
                # Busy, or gone by now: somebody else's business.
                pass


async def _converse(channel: Channel, verbs: Mapping[str, Verb]) -> None:
    credentials = channel._stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
    _, user, _ = _UCRED.unpack(credentials)
    if user not in (0, os.geteuid()):
        await channel.send({"error": f"not for user {user}"})
        return
    while True:
        request = await channel.receive()
        try:
            answer = await _answer(request, channel, verbs)
        finally:
            request.close()
        if answer is not None:
            await channel.send(answer)


async def _answer(request: Message, channel: Channel, verbs: Mapping[str, Verb]) -> Mapping[str, Any] | None:
    name = request.body.get("verb")
    verb = verbs.get(name) if isinstance(name, str) else None
    if verb is None:
        return {"error": f"no verb {name!r}; there are: {', '.join(verbs)} (another version of tcmu-rs?)"}
    try:
        return await verb(request, channel)
    except ControlError:
        raise
    except Exception as error:
        # The devices go on, whatever is asked of their process.
        _log.debug("%s failed", name, exc_info=error)
        return {"error": f"{type(error).__name__}: {error}"}


def sockets(pid: int, *, directory: Path = DIRECTORY) -> list[Path]:
    """The sockets of a process, of which each stands for one `attach` or daemon in it."""
    return sorted(directory.glob(f"{pid}.*.sock"))


@asynccontextmanager
async def connect(path: Path) -> AsyncIterator[Channel]:
    """A channel to a server for the length of an `async with` block.

    Raises:
        ControlError: Nobody listens there.
    """
    try:
        stream = await trio.open_unix_socket(str(path))
    except (OSError, RuntimeError) as error:
        raise ControlError(f"{path}: {error}") from error
    async with stream:
        yield Channel(stream)
