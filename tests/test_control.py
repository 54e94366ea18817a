"""The control socket: messages, descriptors, and what comes instead of them."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from trio.testing import wait_all_tasks_blocked

from tcmu_rs import _control
from tcmu_rs._control import Channel, ControlError, Message


async def echo(request: Message, channel: Channel) -> Mapping[str, Any]:
    return {"echo": request.body}


async def read_pipe(request: Message, channel: Channel) -> Mapping[str, Any]:
    (fd,) = request.take_descriptors()
    with os.fdopen(fd, "rb") as file:
        return {"read": file.read().decode()}


async def give_pipe(request: Message, channel: Channel) -> None:
    read, write = os.pipe()
    os.write(write, b"from the server")
    os.close(write)
    await channel.send({}, [read])
    os.close(read)


async def fail(request: Message, channel: Channel) -> None:
    raise OSError(28, "No space left")


VERBS: dict[str, _control.Verb] = {"echo": echo, "read": read_pipe, "give": give_pipe, "fail": fail}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "run"


@asynccontextmanager
async def server(directory: Path) -> AsyncIterator[Path]:
    async with trio.open_nursery() as nursery:
        yield await nursery.start(
            lambda task_status: _control.serve(VERBS, directory=directory, task_status=task_status)
        )
        nursery.cancel_scope.cancel()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


async def test_requests_and_answers(directory: Path) -> None:
    async with server(directory) as path:
        assert _control.sockets(os.getpid(), directory=directory) == [path]
        assert directory.stat().st_mode & 0o777 == 0o700
        async with _control.connect(path) as channel, _control.connect(path) as other:
            for size in (0, 1, 1 << 20):
                answer = await channel.ask("echo", text="x" * size)
                assert answer.body == {"echo": {"verb": "echo", "text": "x" * size}}
            assert (await other.ask("echo")).body == {"echo": {"verb": "echo"}}
    assert not path.exists()


async def test_descriptors_go_both_ways_and_none_is_left(directory: Path) -> None:
    async with server(directory) as path, _control.connect(path) as channel:
        await channel.ask("echo")
        before = descriptors()
        read, write = os.pipe()
        os.write(write, b"from the client")
        os.close(write)
        assert (await channel.ask("read", descriptors=[read])).body == {"read": "from the client"}
        # A verb that wants none: the server closes what came.
        await channel.ask("echo", descriptors=[read] * _control.MAX_DESCRIPTORS)
        os.close(read)
        given = await channel.ask("give")
        (got,) = given.take_descriptors()
        assert os.read(got, 100) == b"from the server"
        os.close(got)
        (await channel.ask("give")).close()
        await wait_all_tasks_blocked()
        assert descriptors() == before


async def test_what_goes_wrong_is_the_answer(directory: Path) -> None:
    async with server(directory) as path, _control.connect(path) as channel:
        with pytest.raises(ControlError, match="No space left"):
            await channel.ask("fail")
        with pytest.raises(ControlError, match=r"no verb 'what'; there are: echo, .*another version"):
            await channel.ask("what")
        assert await channel.ask("echo")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50, deadline=None)
@given(
    garbage=st.lists(
        st.binary(max_size=100) | st.sampled_from([b"\n", b"{}\n", b'{"verb": []}\n', b"[" * 5000 + b"\n"])
    )
)
def test_garbage_harms_nobody(tmp_path_factory: pytest.TempPathFactory, garbage: list[bytes]) -> None:
    async def main() -> None:
        async with server(tmp_path_factory.mktemp("run") / "d") as path:
            with closing(socket.socket(socket.AF_UNIX)) as raw:
                raw.connect(str(path))
                for part in garbage:
                    try:
                        raw.sendall(part)
                    except BrokenPipeError:
                        break
                    await trio.lowlevel.checkpoint()
            async with _control.connect(path) as channel:
                assert await channel.ask("echo")

    trio.run(main)


async def test_the_socket_of_a_killed_server_is_removed_and_that_of_a_live_one_is_not(directory: Path) -> None:
    async with server(directory) as alive:
        dead = directory / "1.0.sock"
        with closing(socket.socket(socket.AF_UNIX)) as left:
            left.bind(str(dead))
        with pytest.raises(ControlError, match="refused"):
            async with _control.connect(dead):
                pass
        async with server(directory) as second:
            assert not dead.exists()
            assert alive != second
            async with _control.connect(alive) as channel:
                assert await channel.ask("echo")


async def test_a_directory_that_others_can_enter_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    with pytest.raises(PermissionError, match="mode 0700"):
        await _control.serve({}, directory=tmp_path)
