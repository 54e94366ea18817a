"""What another process of this machine says: to the control socket, and as predecessor in an upgrade.

An input is what comes over the socket. By its first byte it is heard by a server, which answers each request with one
message and goes on until there is none; or by a successor, which takes the devices that it was handed, or refuses.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import trio

from tcmu_rs._control import Channel, ControlError, Message, _converse
from tcmu_rs._native import LogicalUnit
from tcmu_rs._upgrade import Succession

_ENVIRONMENT = "TCMU_RS_HEIR"


def _unit() -> LogicalUnit:
    return LogicalUnit(
        size=1 << 20,
        block_size=512,
        vendor="v",
        product="p",
        revision="1",
        serial="s",
        naa=b"\x60" + bytes(15),
        writable=True,
    )


async def _echo(request: Message, _: Channel) -> Mapping[str, Any]:
    return {"body": request.body}


async def _restore(request: Message, _: Channel) -> Mapping[str, Any]:
    unit = _unit()
    before = unit.state()
    try:
        unit.restore([(str(key), int(value)) for key, value in request.body["unit"]])
    except ValueError:
        assert unit.state() == before, "refused, and yet changed"
        raise
    return {"state": unit.state()}


VERBS = {"echo": _echo, "restore": _restore}


async def serve(data: bytes) -> None:
    """A server hears it: each line until the first that is no message has one answer."""
    ours, its = socket.socketpair()
    stream = trio.SocketStream(trio.socket.from_stdlib_socket(its))
    answers = bytearray()
    with ours:
        ours.setblocking(False)
        async with trio.open_nursery() as nursery:

            async def hear() -> None:
                async with stream:
                    try:
                        await _converse(Channel(stream), VERBS)
                    except ControlError as error:
                        assert str(error)

            nursery.start_soon(hear)
            talk = trio.socket.from_stdlib_socket(ours)
            sent = 0
            # It hangs up on what is no message, whatever comes behind that; its answers can be read all the same.
            with suppress(ConnectionError):
                while sent < len(data):
                    sent += await talk.send(data[sent : sent + 1000])
            talk.shutdown(socket.SHUT_WR)
            while True:
                try:
                    more = await talk.recv(1 << 16)
                except ConnectionResetError:
                    continue  # that is told once
                if not more:
                    break
                answers += more
    expected = 0
    for line in data.split(b"\n")[:-1]:
        try:
            if not isinstance(json.loads(line), dict):
                break
        except (ValueError, RecursionError):
            break
        expected += 1
    lines = answers.split(b"\n")[:-1]
    assert len(lines) == expected, f"{len(lines)} answers to {expected} requests"
    assert all(isinstance(json.loads(line), dict) for line in lines)


async def succeed(data: bytes) -> None:
    """A successor hears it, with a descriptor for each line."""
    ours, its = socket.socketpair()
    os.environ[_ENVIRONMENT] = str(its.detach())
    succession = Succession.inherited()
    assert succession is not None
    with ours:
        talk = trio.socket.from_stdlib_socket(ours)
        for line in data.splitlines(keepends=True):
            null = os.open("/dev/null", os.O_RDONLY)
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, null.to_bytes(4, "little"))] if line[:1] == b"{" else []
            await talk.sendmsg([line], rights)
            os.close(null)
        talk.shutdown(socket.SHUT_WR)
        try:
            await succession.receive()
        except ControlError as error:
            assert str(error)
        for key in succession.devices:
            device = succession.take(key)
            assert device is not None
            os.close(device.fd)
        succession._sock.close()


def one_input(data: bytes) -> None:
    if data:
        trio.run(succeed if data[0] & 1 else serve, data[1:])


def seeds() -> Iterator[bytes]:
    for request in (
        {"verb": "echo", "text": "äöü", "number": 1e300, "list": [None, True, {}]},
        {"verb": "restore", "unit": [["write cache", 1], ["stopped", 1]]},
        {"verb": "restore", "unit": _unit().state()},
        {"verb": "none"},
    ):
        yield b"\0" + json.dumps(request).encode() + b"\n"
    record = {"device": "0/disk", "position": 64, "unit": [["stopped", 1]], "kept": [1]}
    yield b"\1" + json.dumps(record).encode() + b"\n" + json.dumps({"end": 1}).encode() + b"\n"
