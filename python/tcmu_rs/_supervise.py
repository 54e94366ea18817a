"""A parent that starts its servers again when they crash: `--supervise`, `--isolate`.

The parent must survive whatever its servers die of, so it does as little as possible: it forks, waits and passes
signals on. No event loop, no threads, no handler, no device. It has imported what servers need before it forks the
first, so the next one serves within a fraction of a second, and needs little memory and no disk for it; and the
kernel's OOM killer spares it.

Server and parent are bound by a socket, the leash. The parent sends the numbers of the signals that it got; the server
says, on a line each, that it is `ready NAME`, that it is `stopping` because it was asked to, and that `heir PID` goes
on in its place (`tcmu-rs upgrade`). A server that ends without having said `stopping` has crashed.

A signal to the whole process group or the whole service, from a terminal or systemd, reaches the server twice: by
itself and by the leash. So the two are counted apart (see `_serving.serve_until_signal`).
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import select
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import trio

_log = logging.getLogger("tcmu_rs")

_DELAYS = (0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
"""Seconds to wait before the first, second, … start after a crash. The last one stays."""
_FORGIVEN_AFTER = 60.0
"""Seconds of service after which earlier crashes do not count."""
_STOP = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_ENVIRONMENT = "TCMU_RS_LEASH"
_PR_SET_CHILD_SUBREAPER = 36


@dataclass
class Leash:
    """The server's end of its leash.

    Attributes:
        sock: The socket.
        key: Which server this is, for a parent of several.
        name: Name of the device, if a server before this one has served it; empty for the first.
        delay: Seconds to wait before it is tried again.
        outdated: This process was forked from another version than the one that served: see `execute`.
    """

    sock: socket.socket
    key: str = ""
    name: str = ""
    delay: float = 0.0
    outdated: bool = False

    @property
    def first(self) -> bool:
        """Whether no server was there before."""
        return not self.name

    @classmethod
    def inherited(cls) -> Leash | None:
        """The leash of a server that was not forked but executed; None if this process has none."""
        if (text := os.environ.pop(_ENVIRONMENT, None)) is None:
            return None
        fd, key, name, delay = json.loads(text)
        os.set_inheritable(fd, False)
        return cls(socket.socket(fileno=fd), key, name, delay)

    def to_inherit(self, environment: dict[str, str]) -> int:
        """Notes the leash in the environment of a process to be executed; returns the descriptor that it needs."""
        environment[_ENVIRONMENT] = json.dumps([self.sock.fileno(), self.key, self.name, self.delay])
        return self.sock.fileno()

    def execute(self) -> NoReturn:
        """Starts the program anew: what this process has imported is not the version that was serving."""
        environment = dict(os.environ)
        os.set_inheritable(self.to_inherit(environment), True)
        os.execve(sys.executable, sys.orig_argv, environment)

    def tell(self, line: str) -> None:
        """Tells the parent something; it may be gone."""
        with suppress(OSError):
            self.sock.send(line.encode() + b"\n")

    async def signals(self) -> AsyncIterator[int]:
        """The signals that the parent passes on. Ends when the parent does: the server goes on without it."""
        self.sock.setblocking(False)
        while True:
            await trio.lowlevel.wait_readable(self.sock)
            with suppress(BlockingIOError):
                numbers = b""
                with suppress(ConnectionResetError):
                    numbers = self.sock.recv(64)
                if not numbers:
                    _log.warning("the supervisor is gone: nobody starts this server again")
                    return
                for number in numbers:
                    yield number


@dataclass
class _Server:
    key: str
    name: str = ""
    pid: int = 0
    sock: socket.socket | None = None
    said: bytes = b""
    ready: bool = False
    stopping: bool = False
    heir: int = 0
    crashes: int = 0
    since: float = field(default_factory=time.monotonic)


class Keeper:
    """The parent of servers.

    Args:
        what: What is served, for messages.
        restart: Start a server again that has crashed.
        watch: A descriptor to wait for, too.
        on_watch: Called when it is readable.
        on_ended: Called with the key of a server that has ended and is not started again.
    """

    def __init__(
        self,
        what: str,
        *,
        restart: bool = True,
        watch: int = -1,
        on_watch: Callable[[], None] | None = None,
        on_ended: Callable[[str], None] | None = None,
    ) -> None:
        self._what = what
        self._restart = restart
        self._watch = watch
        self._on_watch = on_watch
        self._on_ended = on_ended
        self._servers: dict[str, _Server] = {}
        self._ending = False
        self._outdated = False
        self._code = 0
        self._handlers: dict[int, Any] = {}
        self._score = ""
        self._awake: tuple[socket.socket, socket.socket] | None = None

    def add(self, key: str = "") -> bool:
        """Has a server started; false if it is there."""
        new = _Server(key)
        return self._servers.setdefault(key, new) is new

    def send(self, key: str, number: int) -> None:
        """Passes a signal on to a server, if it is there."""
        if (server := self._servers.get(key)) and server.sock is not None:
            with suppress(OSError):
                server.sock.send(bytes([number]))

    def follow(self, pid: int, sock: socket.socket, name: str) -> None:
        """Takes a server over that runs already, as the child of this process."""
        sock.set_inheritable(False)
        sock.setblocking(False)
        self._servers[""] = _Server("", name, pid, sock, ready=True)

    def run(self) -> Leash:
        """Keeps the servers until all have ended, then exits. Returns in each forked server, and nowhere else."""
        self._set_up()
        while self._servers or (self._watch >= 0 and not self._ending):
            for server in list(self._servers.values()):
                if server.pid == 0 and (leash := self._start(server)) is not None:
                    return leash
            self._wait()
            self._reap()
        sys.exit(self._code)

    def _set_up(self) -> None:
        self._awake = socket.socketpair()
        for end in self._awake:
            end.setblocking(False)
        signal.set_wakeup_fd(self._awake[1].fileno(), warn_on_full_buffer=False)
        for number in (*_STOP, signal.SIGCHLD):
            # Something has to be called, for the wake-up to be written.
            self._handlers[number] = signal.signal(number, lambda *_: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self._handlers)
        become_subreaper()
        with suppress(OSError):
            self._score = Path("/proc/self/oom_score_adj").read_text()
            Path("/proc/self/oom_score_adj").write_text("-1000")

    def _start(self, server: _Server) -> Leash | None:
        """Forks. Returns the leash in the child, None in the parent."""
        sys.stdout.flush()
        sys.stderr.flush()
        ours, its = socket.socketpair()
        delay = _DELAYS[min(server.crashes, len(_DELAYS)) - 1] if server.crashes else 0.0
        leash = Leash(its, server.key, server.name, delay, self._outdated)
        pid = os.fork()
        if pid == 0:
            self._become_server(ours)
            return leash
        its.close()
        ours.setblocking(False)
        server.pid, server.sock, server.said, server.ready, server.since = pid, ours, b"", False, time.monotonic()
        return None

    def _become_server(self, ours: socket.socket) -> None:
        assert self._awake is not None
        signal.set_wakeup_fd(-1)
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        for end in (*self._awake, ours, *(server.sock for server in self._servers.values())):
            if end is not None:
                end.close()
        if self._score:
            with suppress(OSError):
                Path("/proc/self/oom_score_adj").write_text(self._score)

    def _wait(self) -> None:
        assert self._awake is not None
        poll = select.poll()
        by_fd = {server.sock.fileno(): server for server in self._servers.values() if server.sock is not None}
        for fd in (self._awake[0].fileno(), *by_fd, *([self._watch] if self._watch >= 0 else [])):
            poll.register(fd, select.POLLIN)
        for fd, _ in poll.poll():
            if fd == self._awake[0].fileno():
                for number in self._awake[0].recv(64):
                    if number in _STOP:
                        self._ending = True
                        for key in self._servers:
                            self.send(key, number)
            elif fd == self._watch and self._on_watch is not None:
                self._on_watch()
            elif fd in by_fd:
                self._listen(by_fd[fd])

    def _listen(self, server: _Server) -> None:
        assert server.sock is not None
        try:
            while more := server.sock.recv(4096):
                server.said += more
        except OSError:
            # BlockingIOError: that was all.
            pass
        else:
            # Closed at the other end: its process ends, which is heard otherwise.
            server.sock.close()
            server.sock = None
        *lines, server.said = server.said.split(b"\n")
        for line in lines:
            word, _, argument = line.decode().partition(" ")
            if word == "ready":
                server.ready, server.name, server.since = True, argument, time.monotonic()
            elif word == "stopping":
                server.stopping = True
            elif word == "heir":
                server.heir = int(argument)

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            # Others are orphans of what handlers have started.
            for server in [server for server in self._servers.values() if server.pid == pid]:
                self._ended(server, os.waitstatus_to_exitcode(status))

    def _ended(self, server: _Server, code: int) -> None:
        if server.sock is not None:
            self._listen(server)
        if server.heir:
            server.pid, server.heir = server.heir, 0
            self._outdated = True
            return
        if server.sock is not None:
            server.sock.close()
            server.sock = None
        asked = server.stopping or self._ending or code == 0
        if asked or not server.name or not self._restart:
            del self._servers[server.key]
            if self._watch < 0:
                self._code = code if code >= 0 else 128 - code
            if self._on_ended is not None and not self._ending:
                self._on_ended(server.key)
            return
        if server.ready and time.monotonic() - server.since > _FORGIVEN_AFTER:
            server.crashes = 0
        server.crashes += 1
        server.pid = 0
        how = f"by signal {-code}" if code < 0 else f"with code {code}"
        delay = _DELAYS[min(server.crashes, len(_DELAYS)) - 1]
        _log.error(
            "%s: the server ended %s and is started again%s",
            server.name or self._what,
            how,
            f" in {delay:g} s; it has crashed {server.crashes} times in a row" if delay else "",
        )


def become_subreaper() -> None:
    """An heir is a child of the server that it succeeds, and comes to this process when that one leaves.

    What is set lasts over the start of another program (prctl(2)).
    """
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _keep(arguments: list[str]) -> None:
    """What a server becomes that has handed its devices to its child: the parent of that one (`_upgrade`)."""
    pid, fd, name = arguments
    keeper = Keeper(name, restart=False)
    keeper.follow(int(pid), socket.socket(fileno=int(fd)), name)
    keeper.run()


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(name)s: %(message)s")
    _keep(sys.argv[1:])
