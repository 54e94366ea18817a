"""The command `tcmu-rs copy`."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
import trio

from . import _cli
from ._errors import CopyError

if TYPE_CHECKING:
    from ._copy import Progress

_EVERY = 2.0
"""Seconds between two lines of progress."""


def _side(flag: str, name: str, what: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds the options of one side."""
    option = click.option(
        flag,
        f"--{name}-option",
        f"{name}_extra",
        type=_cli._key_value,
        multiple=True,
        metavar="KEY=VALUE",
        help=f"An option of the handler of {what}.",
    )
    handler = click.option(
        f"--{name}-handler", metavar="MODULE:CLASS", help=f"Use this class for {what}; no package announces it."
    )
    return lambda command: option(handler(command))


@click.command()
@_side("-i", "source", "SOURCE")
@_side("-o", "target", "TARGET")
@click.option("--create", is_flag=True, help="Make TARGET, with the source's size; it must not be there yet.")
@click.option("--size", type=_cli._size, metavar="SIZE", help="Size of the target: with --create, to make it larger.")
@click.option("--verify", is_flag=True, help="Read everything back and compare.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON objects, one a line: progress, and last the result.")
@click.argument("source", type=_cli._spec, metavar="SOURCE")
@click.argument("target", type=_cli._spec, metavar="TARGET")
def copy(
    source: tuple[str, str],
    target: tuple[str, str],
    source_handler: str | None,
    source_extra: Sequence[tuple[str, str]],
    target_handler: str | None,
    target_extra: Sequence[tuple[str, str]],
    create: bool,
    size: int | None,
    verify: bool,
    as_json: bool,
) -> None:
    """Copy the disk SOURCE onto the disk TARGET: also from one format into another.

    Both are specifications HANDLER:CONFIG, and must not be in use: SOURCE is opened to be read only, TARGET to be
    overwritten. What is zero is not written where the target can do without. A target that is larger reads as zeroes
    behind the end of the source.

    Bytes are copied as they are. A partition table counts in blocks: after a copy from a disk with blocks of 512 bytes
    onto one with 4096 (as luks makes them), attach that with --block-size 512, or create it with -o sector-size=512.

    The beginning of the disk is written last. So a copy that was interrupted has no partition table and no file
    system, and is not taken for the whole; one that --create has made is removed.

    \b
    Examples:
      tcmu-rs copy file:disk.img luks:disk.luks --create -o key-file=key      encrypt
      tcmu-rs copy luks:disk.luks file:/dev/vdb -i key-file=key --verify      decrypt, onto a block device
      tcmu-rs copy file:old.img file:new.img --create --size 20G              make larger
    """
    source_name, source_config = source
    target_name, target_config = target
    spec = ":".join(target)
    source_class = _cli._find_class(source_name, source_handler)
    target_class = _cli._find_class(target_name, target_handler)
    given = {"block_size": None}
    reading = _cli._options(size=None, create=False, read_only=True, extra=source_extra, **given)
    writing = _cli._options(size=size, create=False, read_only=False, extra=target_extra, **given)
    from_ = source_class.from_config(source_config, reading)
    onto = None if create else target_class.from_config(target_config, writing)
    made = begun = False

    async def make(source_size: int) -> Any:
        nonlocal made
        if (size or source_size) < source_size:
            raise ValueError(f"the source has {source_size} bytes, which do not fit into the {size} of --size")
        making = _cli._options(
            size=size or source_size, create=True, read_only=False, extra=target_extra, block_size=None
        )
        handler = await target_class.create(target_config, making)
        made = True
        return target_class.from_config(target_config, writing) if handler is None else handler

    async def remains() -> str:
        """What is left of a copy that has failed."""
        if made:
            with trio.CancelScope(shield=True):
                removed = await target_class.remove(target_config, writing)
            return f"{spec} is removed again" if removed else f"{spec} is incomplete: delete it"
        return f"{spec} is incomplete" if begun else f"{spec} is unchanged"

    async def run(show: Callable[[Progress], None]) -> Progress:
        from ._copy import copy

        def progress(state: Progress) -> None:
            nonlocal begun
            begun = True
            show(state)

        try:
            return await copy(from_, onto or make, verify=verify, progress=progress)
        except BaseException as error:
            left = await remains()
            if _interrupted(error):
                _cli._fail(f"interrupted: {left}", 130)
            raise CopyError(f"{'; '.join(dict.fromkeys(_cli._messages(error)))} ({left})") from error

    with _terminable(), _showing(as_json) as show:
        done = trio.run(run, show)
    result = {"source": ":".join(source), "target": spec, "written": done.written, "verified": verify}
    if as_json:
        print(json.dumps(result))
    else:
        print(f"{spec}\t{done.written} bytes written{', verified' if verify else ''}")


def _interrupted(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return error.subgroup(KeyboardInterrupt) is not None
    return isinstance(error, KeyboardInterrupt)


@contextmanager
def _terminable() -> Iterator[None]:
    """Lets SIGTERM and SIGHUP interrupt as SIGINT does, which ends the prompt for a passphrase too."""
    others = signal.SIGTERM, signal.SIGHUP
    before = [signal.signal(number, lambda *_: signal.raise_signal(signal.SIGINT)) for number in others]
    try:
        yield
    finally:
        for number, handler in zip(others, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def _showing(as_json: bool) -> Iterator[Callable[[Progress], None]]:
    """Shows how far it is: a bar for a person, lines for everybody else."""
    if not as_json and sys.stderr.isatty():
        with _bar() as show:
            yield show
        return
    next_line = time.monotonic() + _EVERY

    def line(state: Progress) -> None:
        nonlocal next_line
        if time.monotonic() < next_line:
            return
        next_line = time.monotonic() + _EVERY
        if as_json:
            print(json.dumps({"done": state.done, "total": state.total, "written": state.written}), flush=True)
        else:
            click.echo(f"{state.done * 100 // state.total:3}%  {state.done} of {state.total} bytes", err=True)

    yield line


@contextmanager
def _bar() -> Iterator[Callable[[Progress], None]]:
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn()
    bar = Progress(*columns, console=Console(stderr=True))
    task = None

    def show(state: Any) -> None:
        nonlocal task
        # Not before there is something to show: until then a person may be asked for a passphrase.
        if task is None:
            task = bar.add_task("", total=state.total)
            bar.start()
        bar.update(task, completed=state.done)

    try:
        yield show
    finally:
        bar.stop()
