"""The commands that change the storage of a disk that is not served: resize, snapshot, compact."""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import click
import trio

from . import _cli

_Spec = tuple[str, str]
_Extra = Sequence[tuple[str, str]]


def _method(
    spec: _Spec, handler_class: str | None, block_size: str | None, extra: _Extra, name: str
) -> Callable[..., Any]:
    """A class method of the handler, with what all of them take."""
    options = _cli._options(size=None, create=False, read_only=False, block_size=block_size, extra=extra)
    return functools.partial(_cli._optional_method(spec[0], handler_class, name), spec[1], options)


def show_progress(done: float) -> None:
    """Tells a person how much is done."""
    if sys.stderr.isatty():
        click.echo(f"\r{done:4.0%} ", err=True, nl=done >= 1)


@click.command()
@_cli._handler_options
@click.option("--size", type=_cli._size, metavar="SIZE", required=True, help="New size: bytes, or as in 512M, 10G.")
@click.option("--shrink", is_flag=True, help="Allow it to become smaller, and lose what is behind.")
def resize(
    spec: _Spec, handler_class: str | None, extra: _Extra, block_size: str | None, size: int, shrink: bool
) -> None:
    """Change the size of the disk SPEC, served or not.

    A disk that is served stays in service. If it is a disk of this machine it has the new size when this returns;
    initiators elsewhere have to look: echo 1 > /sys/block/sdX/device/rescan, or iscsiadm -m session -R. A file system
    on it is made larger by its own tool: resize2fs, xfs_growfs. Before a disk is made smaller, what is on it has to be.

    \b
    Examples:
      tcmu-rs resize file:/var/tmp/disk.img --size 20G
      tcmu-rs resize qcow2:/var/tmp/disk.qcow2 --size 20G
    """
    from . import _resize

    handler, config = _cli._absolute(spec, handler_class)
    if (device := _resize.find(handler, config)) is not None:
        _resize.served(device, size, shrink=shrink)
        return
    kind = _cli._find_class(handler, handler_class)
    options = _cli._options(size=None, create=False, read_only=False, block_size=block_size, extra=extra)
    trio.run(functools.partial(_resize.unserved, kind, config, options, size, shrink=shrink))


@click.group()
def snapshot() -> None:
    """Keep states of a disk.

    A disk that is served stays in service; what its users have not written yet is not in the state, so have them write
    it back first (sync, fsfreeze). To go back to a state it has to be detached.
    """


def _action(action: str, about: str) -> None:
    @snapshot.command(action, help=about)
    @_cli._handler_options
    @click.argument("name")
    def run(spec: _Spec, handler_class: str | None, extra: _Extra, block_size: str | None, name: str) -> None:
        from . import _resize

        if (device := _resize.find(*_cli._absolute(spec, handler_class))) is not None:
            _resize.check_served(device)
            trio.run(functools.partial(_resize.ask, device, "snapshot", action=action, snapshot=name))
            return
        method = _method(spec, handler_class, block_size, extra, "snapshot")
        trio.run(functools.partial(method, action=action, name=name))


_action("create", "Keep the state of the disk SPEC as NAME.")
_action("apply", "Make the state NAME that of the disk SPEC. What the disk has now is lost.")
_action("delete", "Forget the state NAME of the disk SPEC.")


@snapshot.command("list")
@_cli._handler_options
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def list_(spec: _Spec, handler_class: str | None, extra: _Extra, block_size: str | None, as_json: bool) -> None:
    """List the states of the disk SPEC that are kept, the oldest first."""
    found = trio.run(_method(spec, handler_class, block_size, extra, "snapshots"))
    if as_json:
        print(json.dumps(found, indent=2))
        return
    rows = [
        (one["id"], one["name"], time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one["time"])), str(one["size"]))
        for one in found
    ]
    _cli._table(("ID", "NAME", "TIME", "SIZE"), rows)


@click.command()
@_cli._handler_options
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def compact(spec: _Spec, handler_class: str | None, extra: _Extra, block_size: str | None, as_json: bool) -> None:
    """Write the storage of the disk SPEC anew, as small as it can be. It must not be served.

    Needs space for a second copy, which takes the place of the first when it is complete.

    \b
    Examples:
      tcmu-rs compact zstd:/var/tmp/disk.qcow2
    """
    method = _method(spec, handler_class, block_size, extra, "compact")
    found = trio.run(functools.partial(method, progress=show_progress))
    print(json.dumps(found, indent=2) if as_json else f"{found['before']} bytes before, {found['after']} after")
