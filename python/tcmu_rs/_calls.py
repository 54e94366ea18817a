"""How the methods of a handler are called: by verb and colour, decided once."""

from __future__ import annotations

import functools
import types
from collections.abc import Awaitable, Callable, Generator
from collections.abc import Coroutine as AnyCoroutine
from typing import TYPE_CHECKING, Any

from . import _files, _native
from ._handler import METHODS, BlockHandler, Colour, Handler, Verb, colour_of, has
from ._threads import Threads

if TYPE_CHECKING:
    from ._late import Overseer

Coroutine = AnyCoroutine[Any, Any, Any]
_Call = Callable[["_native.Command"], Coroutine | None]
_Finish = Callable[["_native.Command", Any], None]
_ARGUMENTS: dict[Verb, Callable[[_native.Command], tuple[Any, ...]]] = {
    Verb.READ: lambda cmd: (cmd.offset, cmd.iov),
    Verb.WRITE: lambda cmd: (cmd.offset, cmd.iov),
    Verb.FLUSH: lambda cmd: (),
    Verb.DISCARD: lambda cmd: (cmd.offset, cmd.length),
    Verb.WRITE_ZEROES: lambda cmd: (cmd.offset, cmd.length),
    Verb.EXTENTS: lambda cmd: (cmd.offset, cmd.length),
}


@types.coroutine
def resume(coroutine: Coroutine, trap: Any) -> Generator[Any, Any, Any]:
    """Goes on with a coroutine that has suspended with `trap`, on behalf of the task that awaits this."""
    while True:
        try:
            value = yield trap
        except GeneratorExit:
            coroutine.close()
            raise
        except BaseException as error:
            try:
                trap = coroutine.throw(error)
            except StopIteration as stop:
                return stop.value
        else:
            try:
                trap = coroutine.send(value)
            except StopIteration as stop:
                return stop.value


class Calls:
    """The calls of one handler, by verb; None stands for a command that is passed whole.

    Args:
        handler: The handler.
        overseer: Is told which thread works for a command.
        start_copy: Begins a copy that a handler has left to the emulation.
        wake: Called when `methods` has something to resume.

    Attributes:
        methods: Those that `Command.run` calls by itself, and the commands that wait in them for a transfer.
    """

    def __init__(
        self,
        handler: Handler,
        overseer: Overseer,
        start_copy: Callable[[_native.Command], None],
        wake: Callable[[], None],
    ) -> None:
        self._threads = Threads(handler.max_in_flight, f"<tcmu_rs thread of {type(handler).__name__}>")
        self._handler = handler
        self._overseer = overseer
        self._start_copy = start_copy
        self._calls = self._find_calls()
        self.methods = self._find_methods(wake)

    def has(self, verb: int | None) -> bool:
        """Whether there is a method for it."""
        return verb in self._calls

    def begin(self, verb: int | None, cmd: _native.Command) -> tuple[Coroutine, Any] | None:
        """Calls the method. Returns its coroutine and what that waits for (see `resume`), if it has suspended.

        Raises:
            TypeError: It returned something.
        """
        coroutine = self._calls[verb](cmd)
        if coroutine is not None:
            try:
                return coroutine, coroutine.send(None)
            except StopIteration as stop:
                if stop.value is not None:
                    self.check_result(verb, stop.value)
        return None

    async def invoke(self, name: str, *args: Any) -> None:
        """Calls another method of the handler than those for commands."""
        method: Callable[..., Any] = getattr(self._handler, name)
        if colour_of(method) is Colour.BLOCKING:
            await self._threads.run(functools.partial(method, *args))
        elif (result := method(*args)) is not None:
            await result

    def name(self, verb: int | None) -> str:
        """`Class.method`, for people."""
        if verb is not None:
            method = METHODS[Verb(verb)]
        else:
            method = "scsi_command" if isinstance(self._handler, BlockHandler) else "command"
        return f"{type(self._handler).__name__}.{method}"

    def check_result(self, verb: int | None, result: object) -> None:
        """Refuses what a method must not return.

        Raises:
            TypeError: It returned something.
        """
        if result is None:
            return
        what = f"{self.name(verb)}()"
        if isinstance(result, Awaitable):
            if isinstance(result, AnyCoroutine):
                result.close()
            raise TypeError(f"{what} is a plain function that returned an awaitable: write `async def`")
        raise TypeError(f"{what} returned {result!r}: transfers are whole, return None")

    def _find_calls(self) -> dict[int | None, _Call]:
        handler = self._handler
        calls: dict[int | None, _Call] = {}
        if not isinstance(handler, BlockHandler):
            calls[None] = self._colour(None, "command", self._reply)
            return calls
        if has(handler, "scsi_command"):
            calls[None] = self._colour(None, "scsi_command", self._reply_or_emulate)
        for verb, name in METHODS.items():
            if has(handler, name):
                finish = self._set_extents if verb == Verb.EXTENTS else None
                calls[int(verb)] = self._colour(verb, name, finish, fua=verb == Verb.WRITE and handler.native_fua)
        return calls

    def _find_methods(self, wake: Callable[[], None]) -> _native.Methods:
        handler = self._handler
        found: dict[str, tuple[Callable[..., Any], Callable[..., Any] | None, bool, bool]] = {}
        if isinstance(handler, BlockHandler):
            for verb in (Verb.READ, Verb.WRITE, Verb.FLUSH):
                name = METHODS[verb]
                if has(handler, name) and (colour := colour_of(getattr(handler, name))) is not Colour.BLOCKING:
                    method, durable = getattr(handler, name), None
                    if verb == Verb.WRITE and handler.native_fua:
                        method, durable = functools.partial(method, fua=False), functools.partial(method, fua=True)
                    found[name] = method, durable, colour is Colour.ASYNC, name in handler.taskless
        return _native.Methods(_files.queue(), wake, self.check_result, **found)

    def _colour(self, verb: Verb | None, name: str, finish: _Finish | None, *, fua: bool = False) -> _Call:
        method: Callable[..., Any] = getattr(self._handler, name)
        colour = colour_of(method)
        arguments = (lambda cmd: (cmd,)) if verb is None else _ARGUMENTS[verb]

        if colour is Colour.PLAIN:

            def plain(cmd: _native.Command) -> None:
                result = method(*arguments(cmd), fua=cmd.fua) if fua else method(*arguments(cmd))
                if finish is None or isinstance(result, Awaitable):
                    self.check_result(verb, result)
                else:
                    finish(cmd, result)

            return plain

        if colour is Colour.ASYNC and finish is None:
            # What the handler made is what the worker runs, with nothing around it.
            if not fua:
                return lambda cmd: method(*arguments(cmd))
            return lambda cmd: method(*arguments(cmd), fua=cmd.fua)

        async def suspended(cmd: _native.Command) -> None:
            call = functools.partial(method, *arguments(cmd), **({"fua": cmd.fua} if fua else {}))
            if colour is Colour.BLOCKING:
                # Not abandoned on cancel: the thread may still be writing into the data area.
                result = await self._threads.run(functools.partial(self._in_thread, cmd, call))
            else:
                result = await call()
            if finish is not None:
                finish(cmd, result)
            else:
                self.check_result(verb, result)

        return suspended

    def _in_thread(self, cmd: _native.Command, call: Callable[[], Any]) -> Any:
        with self._overseer.in_thread(cmd):
            return call()

    def _reply(self, cmd: _native.Command, result: Any) -> None:
        if result is not None and not isinstance(result, int):
            raise TypeError(f"{type(self._handler).__name__} returned {result!r}: return None or a number of bytes")
        cmd.succeed(result)

    def _set_extents(self, cmd: _native.Command, result: Any) -> None:
        cmd.set_extents([(int(length), int(state)) for length, state in result])

    def _reply_or_emulate(self, cmd: _native.Command, result: Any) -> None:
        if result is NotImplemented:
            cmd.emulate()
            if cmd.piece is not None:
                self._start_copy(cmd)
        else:
            self._reply(cmd, result)
