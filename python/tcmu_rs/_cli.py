"""The command `tcmu-rs`."""

from __future__ import annotations

import functools
import inspect
import io
import json
import logging
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import click
import trio

from . import _devices, _doctor, _errors, _lio, _memory, _registry
from ._text import printable

_log = logging.getLogger("tcmu_rs")

_UNITS = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40, "P": 50}


def _size(text: str) -> int:
    match = re.fullmatch(r"([0-9]+)([KMGTP]?)", text)
    if not match or not int(match[1]):
        raise click.BadParameter(
            f"{text!r} is no size: use a number of bytes, or of K, M, G, T or P (powers of 1024) as in 10G"
        )
    return int(match[1]) << _UNITS[match[2]]


def _spec(text: str) -> tuple[str, str]:
    try:
        return _registry.parse_spec(text)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _key_value(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise click.BadParameter(f"{text!r} is not of the form KEY=VALUE")
    return key, value


class _Commands(click.Group):
    """Says what went wrong in one line, `error: what (remedy)`; exit code 1, or 2 for a wrong usage."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Runs a command and exits."""
        kwargs["standalone_mode"] = False
        if isinstance(sys.stdout, io.TextIOWrapper):
            # Names of files may have bytes that are no text.
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            code = super().main(*args, **kwargs)
        except click.exceptions.NoArgsIsHelpError as error:
            error.show()
            sys.exit(2)
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "tcmu-rs"
            _fail(f"{error.format_message().rstrip('.')} (see: {command} --help)", 2)
        except click.Abort:
            _fail("interrupted", 130)
        except Exception as error:
            if _log.isEnabledFor(logging.DEBUG):
                traceback.print_exc()
            _fail("; ".join(dict.fromkeys(_messages(error))), 1)
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> NoReturn:
    click.echo("error: " + printable(" ".join(message.split())), err=True)
    sys.exit(code)


def _messages(error: BaseException) -> Iterator[str]:
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from _messages(inner)
    elif isinstance(error, click.ClickException):
        yield error.format_message()
    elif isinstance(error, OSError) and error.strerror:
        yield f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    elif isinstance(error, (_lio.LioError, _registry.RegistryError, _errors.CopyError, ValueError)):
        yield str(error)
    else:
        yield f"{type(error).__name__}: {error} (`tcmu-rs --debug ...` shows where)"


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="tcmu-rs", prog_name="tcmu-rs")
@click.option("--debug", is_flag=True, help="Log everything, and show where an error comes from.")
def main(debug: bool) -> None:
    """Disks served to the Linux kernel from Python.

    \b
    Examples:
      tcmu-rs doctor                                    what this machine lacks
      tcmu-rs attach file:/var/tmp/disk.img --size 10G --create
      tcmu-rs list
      tcmu-rs detach disk
    """
    logging.basicConfig(
        level=logging.DEBUG if debug else logging.WARNING, format="%(levelname)s: %(name)s: %(message)s"
    )
    _log.setLevel(logging.DEBUG if debug else logging.NOTSET)


def _handler_options(command: Callable[..., None]) -> Callable[..., None]:
    """Adds what every command that makes a handler takes."""
    command = _with_keys(command)
    for option in (
        click.option(
            "--handler",
            "handler_class",
            metavar="MODULE:CLASS",
            help="Use this class; no package announces it.",
        ),
        click.option(
            "-o",
            "extra",
            type=_key_value,
            multiple=True,
            metavar="KEY=VALUE",
            help="An option of the handler.",
        ),
        click.option(
            "--key-file",
            "key_files",
            multiple=True,
            metavar="PATH",
            help="Encrypted disks: the key, as -o key-file=PATH. To `create`, each gives a keyslot.",
        ),
        click.option(
            "--passphrase-fd",
            metavar="N",
            help="Encrypted disks: the passphrase is the first line of this descriptor, as -o passphrase-fd=N.",
        ),
        click.option(
            "--block-size",
            type=click.Choice(["512", "4096"]),
            help="Bytes of a logical block.  [default: the handler's]",
        ),
        click.argument("spec", type=_spec, metavar="SPEC"),
    ):
        command = option(command)
    return command


def _with_keys(command: Callable[..., None]) -> Callable[..., None]:
    """Has a command find the options for keys among those of the handler, which they are short for."""

    @functools.wraps(command)
    def run(
        *,
        extra: Sequence[tuple[str, str]],
        key_files: Sequence[str],
        passphrase_fd: str | None,
        allow_discards: bool = False,
        **rest: Any,
    ) -> None:
        named = [(f"key-file-{number}" if number > 1 else "key-file", path) for number, path in enumerate(key_files, 1)]
        if passphrase_fd is not None:
            named.append(("passphrase-fd", passphrase_fd))
        if allow_discards:
            named.append(("allow-discards", "on"))
        command(extra=[*extra, *named], **rest)

    return run


def _find_class(name: str, handler_class: str | None) -> Any:
    if handler_class is None:
        return _registry.load(name)
    # As `python -m` does it: a class that is being tried out lies in the current directory.
    sys.path.insert(0, str(Path.cwd()))
    return _registry.load_class(handler_class)


def _absolute(spec: tuple[str, str], handler_class: str | None) -> tuple[str, str]:
    """The specification as `attach` tells it to the kernel: a relative path is another disk elsewhere."""
    # A device can be asked for by its name alone, if its handler is not to be had here.
    with suppress(_registry.RegistryError):
        return spec[0], _find_class(spec[0], handler_class).absolute_config(spec[1])
    return spec


def _options(
    *,
    size: int | None,
    create: bool,
    read_only: bool,
    block_size: str | None,
    extra: Sequence[tuple[str, str]],
) -> Any:
    # Imported here, as is all that needs the native module: `doctor` must work without it.
    from ._handler import Options

    keys = [key for key, _ in extra]
    if twice := {key for key in keys if keys.count(key) > 1}:
        raise click.UsageError(f"-o {min(twice)} is given twice")
    return Options(
        size=size,
        create=create,
        read_only=read_only,
        block_size=int(block_size) if block_size else None,
        extra=dict(extra),
        interactive=True,
    )


@main.command()
@_handler_options
@click.option("--size", type=_size, metavar="SIZE", help="Size of the disk: bytes, or as in 512M, 10G.")
@click.option("--create", is_flag=True, help="Create what the disk is stored in, if it is not there yet.")
@click.option("--read-only", is_flag=True, help="Refuse writes.")
@click.option(
    "--allow-discards",
    is_flag=True,
    help="Encrypted disks: let discards free space, as -o allow-discards=on. Whoever sees the file then sees how much "
    "of it is used, and where.",
)
@click.option("--name", help="Name of the device.  [default: from SPEC]")
@click.option("--fabric", type=click.Choice(["loopback", "iscsi", "none"]), default="loopback", show_default=True)
@click.option("--iqn", help="Name of the iSCSI target.  [default: computed]")
@click.option("--portal", default="127.0.0.1:3260", show_default=True, help="Where the iSCSI target listens.")
@click.option("--allow-network", is_flag=True, help="Let other machines reach the portal. There is no password.")
@click.option("--wwn", help="Serial number of the disk, a UUID.  [default: computed from name and SPEC]")
@click.option("--max-sectors", type=int, help="Largest transfer, in blocks.  [default: the kernel's]")
@click.option("--data-area-mb", type=int, help="Memory for the data of commands, MiB.  [default: the kernel's]")
@click.option("--data-pages-per-block", type=int, help="Pages that this memory is taken in.  [default: 1]")
@click.option("--ring-mb", type=int, help="Memory for commands, MiB.  [default: 8]")
@click.option(
    "--busy-poll",
    type=click.IntRange(0, 10_000),
    default=0,
    metavar="MICROSECONDS",
    callback=lambda _context, _option, value: value / 1e6,
    help="Look for the next command so long before sleeping.  [default: 0]",
)
@click.option("--supervise", is_flag=True, help="Start the server again when it crashes.")
@click.option("--lock-memory", is_flag=True, help="Keep the server in memory; the kernel logs a line per device.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def attach(
    spec: tuple[str, str],
    handler_class: str | None,
    extra: Sequence[tuple[str, str]],
    size: int | None,
    create: bool,
    read_only: bool,
    block_size: str | None,
    name: str | None,
    supervise: bool,
    lock_memory: bool,
    as_json: bool,
    **device_options: Any,
) -> None:
    """Serve SPEC as a disk until SIGINT or SIGTERM.

    SPEC is HANDLER:CONFIG; `tcmu-rs handlers` lists the handlers, `tcmu-rs handlers NAME` tells what one takes. One
    that sits on another takes its specification: luks:qcow2:/var/tmp/disk. When the disk is usable, its name and
    its node are printed on one line, separated by a tab (the target's name for iSCSI, the configfs directory
    without a fabric). A second signal cancels what is still in flight.

    If a killed server of the same SPEC has left the device behind, it is adopted: its users notice a pause only. With
    --supervise this process does no more than that: it starts a server, and another one when that crashes.

    \b
    Examples:
      tcmu-rs attach file:/var/tmp/disk.img --size 10G --create
      tcmu-rs attach file:/var/tmp/disk.img --supervise
      tcmu-rs attach luks:/var/tmp/disk.luks --key-file KEY
      tcmu-rs attach ram: --size 512M --name scratch --json
      tcmu-rs attach file:/dev/vdb --read-only --fabric iscsi
      tcmu-rs attach my:anything --handler my_module:MyDisk -o key=value
    """
    from . import _adoption, _attach, _serving, _supervise

    given = click.get_current_context().get_parameter_source
    for option in ("iqn", "portal", "allow_network"):
        if device_options["fabric"] != "iscsi" and given(option) is click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{option.replace('_', '-')} is for iSCSI: add --fabric iscsi")
    kind = _find_class(spec[0], handler_class)
    handler_name, config = spec[0], kind.absolute_config(spec[1])
    if create and _adoption.is_there(_lio.device_config(handler_name, config)):
        # Initiators know what is in the storage: if that is gone, nothing empty may take its place.
        create = False
    options = _options(size=size, create=create, read_only=read_only, block_size=block_size, extra=extra)
    handler = kind.from_config(config, options)
    leash = _supervise.Leash.inherited()
    if supervise:
        if not handler.persistent:
            raise click.UsageError(
                f"what {handler_name} stores goes with its process, so --supervise has nothing to go on with "
                "(a handler of your own says otherwise with `persistent = True`)"
            )

        def hold(leash: _supervise.Leash) -> None:
            claim = _adoption.find(leash.name, _lio.device_config(handler_name, config), persistent=True)
            if claim is None:
                leash.tell("stopping")
                raise _lio.LioError(f"device {leash.name} was removed while its server was dead")
            claim.fence()
            claim.close()

        leash = _serving.supervised(leash, f"{handler_name}:{config}", hold)
    if leash is not None:
        name = leash.name or name
        if not leash.first:
            handler = _adoption.remade(kind, config, options, leash.name)

    def announce(device: _attach.AttachedDevice) -> None:
        if leash is not None:
            leash.tell(f"ready {device.name}")
        record = {
            "name": device.name,
            "device": device.path,
            "configfs": str(device.configfs),
            "handler": handler_name,
            "size": device.size,
            "pid": _serving.pid_of_service(leash),
            "fabric": device.fabric,
            "target": device.target,
        }
        place = device.path or device.target or device.configfs
        if leash is None or leash.first:
            print(json.dumps(record) if as_json else f"{device.name}\t{place}", flush=True)

    def attaching(succession: Any) -> Any:
        return _attach.attach(
            handler,
            name,
            spec=f"{handler_name}:{config}",
            options=options.extra,
            adopt=True,
            leave_on_error=supervise,
            _succession=succession,
            **device_options,
        )

    _memory.protect_memory(lock=lock_memory)
    trio.run(_serving.serve_until_signal, attaching, announce, leash)


@main.command()
@click.argument("names", nargs=-1, metavar="[HANDLER]...")
@click.option("--replies", is_flag=True, help="Let the kernel wait for us when devices are made: see below.")
@click.option("--copies", is_flag=True, help="Let initiators copy between the devices.")
@click.option("--supervise", is_flag=True, help="Start the server again when it crashes.")
@click.option("--isolate", is_flag=True, help="One process for each device, started again when it crashes.")
@click.option("--lock-memory", is_flag=True, help="Keep the server in memory; the kernel logs a line per device.")
def daemon(
    names: Sequence[str], replies: bool, copies: bool, supervise: bool, isolate: bool, lock_memory: bool
) -> None:
    """Serve the devices that targetcli and other programs make.

    Serves every user-backed device whose configuration begins with one of the HANDLERs (all that are installed, if
    none is given), those that are there and those to come, until SIGINT or SIGTERM. Devices of other handlers are
    left alone. When the daemon ends, its devices stay and are blocked: initiators are told that they are busy until a
    daemon serves them again.

    Options of a handler stand behind the configuration, each after a semicolon: /var/tmp/x.luks;key-file=/etc/x.key.
    Everybody can read a configuration, so there is no option that takes a passphrase itself.

    With --replies the kernel waits for an answer when a device is made, so that one whose storage cannot be opened is
    refused at once. The switch holds for the whole machine, and outlives the daemon: while it is on, whoever makes a
    device that no daemon serves waits for ever.

    With --isolate a device that hangs, crashes or uses up its process does so alone.

    With --copies initiators may copy between the devices (EXTENDED COPY). Whoever can write to one of them can then
    read and write all others, too.

    \b
    Examples:
      tcmu-rs daemon
      tcmu-rs daemon file --replies
      targetcli /backstores/user:file create disk1 10G /var/tmp/disk.img
    """
    from . import _daemon, _isolate, _serving, _supervise
    from ._domain import CopyDomain

    handlers = {name: _registry.load(name) for name in names} if names else _installed()
    leash = _supervise.Leash.inherited()
    if isolate and copies:
        raise click.UsageError("--copies needs all devices in one process, --isolate has one for each")
    if isolate and leash is None:
        isolation = _isolate.Isolation(handlers, replies=replies)
        print(f"serving devices of {', '.join(handlers)}", flush=True)
        leash = _serving.held(isolation.run(), lambda leash: _daemon.fence_unserved(handlers, leash.key))
    elif supervise:
        leash = _serving.supervised(leash, "the daemon", lambda _: _daemon.fence_unserved(handlers))

    def announce(_: _daemon.Daemon) -> None:
        if leash is not None:
            leash.tell(f"ready {leash.key or 'daemon'}")
        if leash is None or (leash.first and not isolate):
            print(f"serving devices of {', '.join(handlers)}", flush=True)

    copy_domain = CopyDomain() if copies else None
    only = leash.key if leash is not None and isolate else None

    def serving(succession: Any) -> Any:
        return _daemon.serving(handlers, replies=replies, copy_domain=copy_domain, only=only, _succession=succession)

    _memory.protect_memory(lock=lock_memory)
    ended = None
    try:
        trio.run(_serving.serve_until_signal, serving, announce, leash)
    except* _daemon.EndedError as group:
        ended = group
    if ended is not None:
        if leash is not None and all(error.removed for error in _daemon.leaves(ended)):
            leash.tell("stopping")
            return
        sys.exit(1)


def _installed() -> dict[str, Any]:
    found = {}
    for name in _registry.providers():
        try:
            found[name] = _registry.load(name)
        except _registry.RegistryError as error:
            _log.warning("left out: %s", error)
    return found


@main.command()
@click.argument("name")
@click.option("--force", is_flag=True, help="Although the disk is in use, or a program of your own serves it.")
@click.option(
    "--timeout",
    default=60.0,
    show_default=True,
    metavar="SECONDS",
    help="How long its process may take to end.",
)
def detach(name: str, force: bool, timeout: float) -> None:
    """Take the device NAME away: end its `tcmu-rs attach`, or remove what a killed one left behind.

    Returns when it is gone.

    \b
    Examples:
      tcmu-rs detach disk
      tcmu-rs detach disk --force          although it is mounted: what is not written yet is lost
    """
    _devices.detach(name, force=force, within=timeout)


@main.command()
@click.argument("name", required=False)
@click.option("--all", "every", is_flag=True, help="Every server of the command line on this machine.")
def upgrade(name: str | None, every: bool) -> None:
    """Replace the process that serves the device NAME by a new one, without a gap.

    The new process has the command line of the old one, and the version of tcmu-rs that is installed now. It takes the
    open devices over between two commands: initiators wait a moment and see no error. If it cannot serve them, the old
    one goes on. A process that serves several devices hands over all of them. Prints the name and the new process of
    each device.

    \b
    Examples:
      tcmu-rs upgrade disk
      pip install --upgrade tcmu-rs && tcmu-rs upgrade --all
    """
    from . import _upgrade

    if (name is None) != every:
        raise click.UsageError("name one device, or say --all")
    served = [device for device in _devices.devices() if device.pid is not None and name in (None, device.name)]
    if not served and name is not None:
        raise _lio.LioError(f"no process serves device {name}", "`tcmu-rs list` shows the devices")
    failures = []
    for pid in sorted({device.pid for device in served if device.pid is not None}):
        try:
            answer = trio.run(_upgrade.ask, pid)
        except _upgrade.UpgradeError as error:
            failures.append(str(error))
        else:
            for device in answer["devices"]:
                print(f"{device}\t{answer['pid']}", flush=True)
    if failures:
        raise click.ClickException("; ".join(failures))


@main.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def list_(as_json: bool) -> None:
    """List the TCMU devices of this machine, those of other programs too.

    STATE is serving; unserved: its process is gone, remove it with detach; blocked: initiators are told that
    it is busy; incomplete: never enabled; unknown: only root can tell.

    \b
    Examples:
      tcmu-rs list
      tcmu-rs list --json
    """
    found = _devices.devices()
    if as_json:
        print(json.dumps([asdict(device) for device in found], indent=2))
        return
    _table(
        ("NAME", "DEVICE", "HANDLER", "CONFIG", "SIZE", "FABRIC", "PID", "STATE"),
        [
            (
                device.name,
                device.device or "-",
                device.handler or "-",
                device.config or "-",
                format_size(device.size),
                ",".join(device.fabrics) or "none",
                str(device.pid or "-"),
                device.state,
            )
            for device in found
        ],
    )


@main.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def stats(name: str, as_json: bool) -> None:
    """Say what the device NAME has done, how long it took, and what it waits for.

    Times are split: ring wait, from when its process saw a command in the ring; dispatch, until the handler is called;
    the handler; completion, until the kernel is told. The kernel does not say when it queued a command. A command that
    takes longer than a second is listed with the line of code at which it waits.

    \b
    Examples:
      tcmu-rs stats disk
      tcmu-rs stats disk --json
    """
    from . import _top

    record = _top.statistics(name)
    if as_json:
        print(json.dumps(record, indent=2))
    else:
        for line in _top.describe(record):
            print(printable(line))


@main.command()
@click.option("--interval", default=1.0, show_default=True, metavar="SECONDS", help="Time between two looks.")
@click.option("--rounds", type=click.IntRange(min=1), help="Look so many times, then end.  [default: until Ctrl-C]")
def top(interval: float, rounds: int | None) -> None:
    """Watch what the devices of this machine do.

    Below the table are the commands that take longer than a second, what they wait for, and what the handlers tell
    about the storage.

    \b
    Examples:
      tcmu-rs top
      tcmu-rs top --interval 5
    """
    from . import _top

    with suppress(KeyboardInterrupt):
        trio.run(_top.top, interval, rounds)


@main.command()
@click.argument("name", required=False, metavar="[NAME]")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON array.")
def handlers(name: str | None, as_json: bool) -> None:
    """List the handlers that installed packages offer, or tell what NAME takes.

    \b
    Examples:
      tcmu-rs handlers
      tcmu-rs handlers luks                what stands behind the colon, and the options (-o)
      tcmu-rs handlers --json
    """
    if name is not None:
        if as_json:
            raise click.UsageError("--json is for the list: leave NAME out")
        print(_manual(name, _registry.load(name)))
        return
    rows = []
    for name, offers in _registry.providers().items():
        problem = _registry.conflict(offers)
        for offer in offers:
            about = ""
            try:
                about = _first_line(offer.load())
            except _registry.RegistryError as error:
                problem = str(error)
            rows.append(
                {
                    "name": name,
                    "class": offer.value,
                    "package": offer.package,
                    "about": about,
                    "error": problem,
                }
            )
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    _table(
        ("NAME", "CLASS", "PACKAGE", "ABOUT"),
        [
            (
                str(row["name"]),
                str(row["class"]),
                str(row["package"]),
                f"error: {row['error']}" if row["error"] else str(row["about"]) or "-",
            )
            for row in rows
        ],
    )


def _manual(name: str, handler: type[Any]) -> str:
    """What a handler's author tells of its configuration and options: the documentation of the two methods."""
    from ._handler import Handler

    parts = [f"{name}: {_first_line(handler)}"]
    methods = ((f"{name}:CONFIG", "from_config"), (f"tcmu-rs create {name}:CONFIG", "create"))
    for heading, method in methods:
        if getattr(handler, method).__func__ is not getattr(Handler, method).__func__:
            parts.append(f"{heading}\n{inspect.getdoc(getattr(handler, method)) or 'not documented'}".replace("`", ""))
    return "\n\n".join(parts)


def _first_line(handler: type[Any]) -> str:
    """What a handler is, in the words of its module or else its class."""
    text = sys.modules[handler.__module__].__doc__ or handler.__doc__ or ""
    return text.strip().partition("\n")[0]


@main.command()
@_handler_options
@click.option("--size", type=_size, metavar="SIZE", required=True, help="Size of the disk: bytes, or as in 512M, 10G.")
def create(
    spec: tuple[str, str],
    handler_class: str | None,
    extra: Sequence[tuple[str, str]],
    size: int,
    block_size: str | None,
) -> None:
    """Create what the disk SPEC is stored in, and serve nothing.

    \b
    Examples:
      tcmu-rs create file:/var/tmp/disk.img --size 10G
      tcmu-rs create luks:/var/tmp/disk.luks --size 10G --key-file KEY --key-file SPARE
    """
    name, config = spec
    options = _options(size=size, create=True, read_only=False, block_size=block_size, extra=extra)
    trio.run(_create, _find_class(name, handler_class), config, options)


async def _create(handler_class: Any, config: str, options: Any) -> None:
    await handler_class.create(config, options)


@main.command()
@_handler_options
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def info(
    spec: tuple[str, str],
    handler_class: str | None,
    extra: Sequence[tuple[str, str]],
    block_size: str | None,
    as_json: bool,
) -> None:
    """Say what the storage of SPEC is, and serve nothing.

    Changes nothing, and needs no passphrase. Handlers whose storage has nothing to tell do not know this.

    \b
    Examples:
      tcmu-rs info luks:/var/tmp/disk.luks
      tcmu-rs info luks:/var/tmp/disk.luks --json
    """
    name, config = spec
    options = _options(size=None, create=False, read_only=True, block_size=block_size, extra=extra)
    found = trio.run(_optional_method(name, handler_class, "info"), config, options)
    if as_json:
        print(json.dumps(found, indent=2))
        return
    for key, value in found.items():
        if isinstance(value, dict):
            for number, text in value.items():
                print(f"{key} {number}: {text}")
        else:
            print(f"{key}: {'-' if value in (None, '') else value}")


@main.command()
@_handler_options
@click.option("--repair", is_flag=True, help="Mend what can be mended without loss.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def check(
    spec: tuple[str, str],
    handler_class: str | None,
    extra: Sequence[tuple[str, str]],
    block_size: str | None,
    repair: bool,
    as_json: bool,
) -> None:
    """Look for damage in the storage of SPEC, and serve nothing.

    Changes nothing without --repair. Exit code 1 if something is, and stays, damaged.

    \b
    Examples:
      tcmu-rs check luks:/var/tmp/disk.luks
      tcmu-rs check luks:/var/tmp/disk.luks --repair       rewrite a damaged header from its copy
    """
    name, config = spec
    options = _options(size=None, create=False, read_only=not repair, block_size=block_size, extra=extra)
    method = _optional_method(name, handler_class, "check")
    # Those that take long tell how far they are.
    more = {"progress": _cli_storage.show_progress} if "progress" in inspect.signature(method).parameters else {}
    found = trio.run(functools.partial(method, config, options, repair=repair, **more))
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        for problem in found["problems"]:
            print(problem)
        print("repaired" if found["repaired"] else "in order" if found["ok"] else "damaged")
    if not found["ok"]:
        sys.exit(1)


def _optional_method(name: str, handler_class: str | None, method: str) -> Any:
    """A class method that not every handler has: `info(config, options)`, `check(config, options, *, repair)`."""
    handler = _find_class(name, handler_class)
    found = getattr(handler, method, None)
    if found is None:
        raise ValueError(f"{handler.__name__} has no {method}")
    return found


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object.")
def doctor(as_json: bool) -> None:
    """Say what this machine lacks, and the command that mends it.

    Changes nothing. Exit code 1 if something is missing without which no disk can be served.

    \b
    Examples:
      tcmu-rs doctor
      tcmu-rs doctor --json
    """
    checks = _doctor.examine()
    ok = all(check.ok for check in checks if check.needed)
    if as_json:
        print(json.dumps({"ok": ok, "checks": [asdict(check) for check in checks]}, indent=2))
    else:
        for check in checks:
            word, color = ("ok", "green") if check.ok else ("MISSING", "red") if check.needed else ("missing", "yellow")
            click.echo(f"{click.style(f'{word:8}', fg=color)}{check.name}: {check.found}")
            if check.remedy:
                click.echo(f"        {check.remedy}")
    if not ok:
        sys.exit(1)


def format_size(size: int) -> str:
    """Writes a number of bytes as `--size` takes it, in the largest unit that divides it."""
    for unit, shift in reversed(_UNITS.items()):
        if size and not size & ((1 << shift) - 1):
            return f"{size >> shift}{unit}"
    return str(size)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table for a person, or lines with tabs for a program."""
    rows = [[printable(cell) for cell in row] for row in rows]
    if not sys.stdout.isatty():
        for row in (header, *rows):
            print("\t".join(row))
        return
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(*header, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*map(escape, row))
    Console().print(table)


# Commands in modules of their own, which use what is above.
from . import _cli_copy, _cli_storage  # noqa: E402

for _command in (_cli_copy.copy, _cli_storage.resize, _cli_storage.snapshot, _cli_storage.compact):
    main.add_command(_command)
