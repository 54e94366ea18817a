"""Threads for handlers that block: each call is made once, none waits while another thread may begin."""

from __future__ import annotations

import contextvars
import random
import threading
import time
from functools import partial

import pytest
import trio
import trio.testing

from tcmu_rs import _threads
from tcmu_rs._threads import Threads

WHO = contextvars.ContextVar("WHO", default="nobody")


def named(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


async def ended(name: str) -> None:
    for thread in named(name):
        await trio.to_thread.run_sync(thread.join, 10)
    assert not named(name)


async def test_as_many_as_may_be_are_under_way_at_once() -> None:
    threads = Threads(4, "together")
    meeting = threading.Barrier(4, timeout=20)
    for _ in range(3):
        async with trio.open_nursery() as nursery:
            for _ in range(4):
                nursery.start_soon(threads.run, meeting.wait)
    assert len(named("together")) == 4


async def test_no_more_than_that() -> None:
    threads = Threads(3, "bounded")
    lock = threading.Lock()
    running = most = 0

    def call() -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.002)
        with lock:
            running -= 1

    async with trio.open_nursery() as nursery:
        for _ in range(40):
            nursery.start_soon(threads.run, call)
    assert most == 3
    assert len(named("bounded")) == 3


async def test_one_that_blocks_keeps_no_other_waiting() -> None:
    """A thread was woken up for the first call: the second one, at once behind it, needs one of its own."""
    threads = Threads(8, "apart")
    await threads.run(lambda: None)
    free = threading.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(threads.run, partial(free.wait, 20))
        nursery.start_soon(threads.run, free.set)
    assert free.is_set()


async def test_results_errors_and_the_context_of_the_caller() -> None:
    threads = Threads(1, "answers")
    WHO.set("me")
    assert await threads.run(WHO.get) == "me"
    with pytest.raises(ZeroDivisionError):
        await threads.run(lambda: 1 // 0)
    with pytest.raises(SystemExit):
        await threads.run(partial(exit, 3))
    assert await threads.run(threading.current_thread) is not threading.current_thread()


async def test_a_cancelled_call_is_waited_for() -> None:
    threads = Threads(1, "patient")
    done = False

    def call() -> None:
        nonlocal done
        time.sleep(0.05)
        done = True

    with trio.move_on_after(0.005) as scope:
        await threads.run(call)
        assert done
        await trio.lowlevel.checkpoint()
    assert scope.cancelled_caught


async def test_threads_without_work_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_threads, "IDLE", 0.02)
    threads = Threads(4, "transient")
    for _ in range(2):
        async with trio.open_nursery() as nursery:
            for _ in range(8):
                nursery.start_soon(threads.run, partial(time.sleep, 0.001))
        await ended("transient")


@pytest.mark.parametrize("seed", range(3))
async def test_calls_that_come_when_threads_end_are_made(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(_threads, "IDLE", 0.0003)
    threads = Threads(3, f"restless {seed}")
    choose = random.Random(seed)
    made: list[int] = []

    async def caller(number: int) -> None:
        for turn in range(60):
            await threads.run(partial(made.append, 60 * number + turn))
            await trio.sleep(choose.choice((0, 0.0002, 0.0003, 0.0004, 0.001)))

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(caller, number)
    assert sorted(made) == list(range(360))
    await ended(f"restless {seed}")


async def test_when_there_can_be_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    threads = Threads(4, "refused")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(RuntimeError, match="can't start new thread"):
            await threads.run(lambda: None)
    assert await threads.run(lambda: 1) == 1


async def test_when_there_can_be_no_other_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that there is comes to all of them."""
    threads = Threads(4, "alone")
    free = threading.Event()
    done: list[int] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(threads.run, partial(free.wait, 20))
        await trio.testing.wait_all_tasks_blocked()
        monkeypatch.setattr(threading.Thread, "start", refuse)
        for number in range(3):
            nursery.start_soon(threads.run, partial(done.append, number))
        await trio.testing.wait_all_tasks_blocked()
        assert done == []
        free.set()
    assert sorted(done) == [0, 1, 2]
    assert len(named("alone")) == 1


def refuse(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")
