"""Backstores and LUNs of the kernel's SCSI target (LIO). Blocking calls: from trio, run them in a thread.

rtslib-fb makes and removes targets, portal groups, portals and LUNs, loads the fabric modules, and reads and
sets attributes and serial numbers. Four things are written to configfs directly, because rtslib cannot do
them here:

* *The backstore's two directories.* rtslib picks the number of `user_N` from a table that each process fills
  once, so two processes pick the same one and the later fails; and its constructor goes on to `enable`, which
  must not happen under the lock that makes a name unique.
* *`control` and `enable`.* They are part of that constructor. Besides, the kernel accepts unknown keys and
  cuts long values without an error, so everything that was asked for is read back.
* *Removal of a backstore.* rtslib first walks all LUNs of all targets. That costs the square of the number of
  devices, and it waits for LUNs of other devices that hang at that moment.
* *`RTSRoot`* is avoided (every rtslib constructor and destructor of backstores makes one): it moves the
  target's database directory to /etc/target for the whole machine and fails where that does not exist.

The save file of rtslib, `udev_path` and the database directory are never touched: what is made here lives as
long as the program that made it.

Concurrency. Any number of threads and processes may call in. One lock, a flock(2) on a file, covers "is the
name free, then take it"; it is never held while the kernel waits for a device. Each backstore gets targets of
its own, with names computed from its serial number, so no two exposures share a node of configfs, and what a
killed process left behind can be found again without a record of it.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import hashlib
import ipaddress
import itertools
import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, ParamSpec, TypeVar
from urllib.parse import unquote_to_bytes

from . import _sysfs

TARGET = Path("/sys/kernel/config/target")
RUN = Path("/run/tcmu-rs")

_CORE = TARGET / "core"
_LINK = "tcmu-rs"
"""Name of the links from LUNs to our backstores: it tells our targets from those of other programs."""

_MAX_CONFIG = 255
"""Bytes of `dev_config`, the handler's name included; the kernel cuts longer ones silently."""

_RESET_INTERVAL = 0.1
"""Seconds between two rounds of failing the commands of an unserved device."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+@=-]{0,127}")
_IQN = re.compile(r"iqn\.[0-9]{4}-[01][0-9]\.[a-z0-9-]+\.[a-z0-9.:-]+")
_HANDLER = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")

_DEMO_MODE = {
    "authentication": 0,
    "generate_node_acls": 1,
    "demo_mode_write_protect": 0,
    "cache_dynamic_acls": 1,
}
"""Attributes of an iSCSI portal group that lets any initiator in, to read and write."""

Fabric = Literal["loopback", "iscsi", "none"]

_P = ParamSpec("_P")
_T = TypeVar("_T")


class LioError(Exception):
    """The kernel's target could not be set up as asked. The text ends with the remedy, if one is known."""

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(f"{what} ({remedy})" if remedy else what)


class InvalidRequestError(LioError, ValueError):
    """A name, size or other value that the kernel cannot carry, would cut silently, or would crash on."""


class BackstoreExistsError(LioError):
    """A backstore of this name exists already."""


class BackstoreBusyError(LioError):
    """A LUN that another program made still uses the backstore."""


@dataclass(frozen=True, slots=True)
class Backstore:
    """A user backstore in configfs.

    Attributes:
        name: Its directory name, unique among user backstores.
        hba: N of its parent directory `user_N`.
        wwn: Unit serial number, a UUID; empty while it is not enabled.
    """

    name: str
    hba: int
    wwn: str

    @property
    def path(self) -> Path:
        """Its directory in configfs."""
        return _CORE / f"user_{self.hba}" / self.name


@dataclass(frozen=True, slots=True)
class Exposure:
    """A target that offers one backstore as LUN 0.

    Attributes:
        fabric: `loopback` or `iscsi`.
        wwn: Name of the target, `naa.…` or `iqn.…`.
    """

    fabric: str
    wwn: str

    @property
    def path(self) -> Path:
        """Its directory in configfs."""
        return TARGET / self.fabric / self.wwn

    @property
    def lun(self) -> Path:
        """The directory of its only LUN."""
        return self.path / "tpgt_1/lun/lun_0"


# Checks of what the caller asks for


def encode_config(config: str) -> str:
    """Escapes what the kernel's `control` file or rtslib cannot carry.

    `%`, `:`, `,`, `;` (see `parse_config`), white space and characters that do not print become `%XX` of their bytes
    in the file system's encoding, as in a URL. All else stays as it is, so most configs are unchanged.
    """
    return "".join(
        "".join(f"%{byte:02X}" for byte in os.fsencode(char))
        if char in "%:,;" or char.isspace() or not char.isprintable()
        else char
        for char in config
    )


def decode_config(text: str) -> str:
    """Reverses `encode_config`. Text that nobody encoded mostly comes back unchanged."""
    return os.fsdecode(unquote_to_bytes(os.fsencode(text)))


def parse_config(text: str) -> tuple[str, dict[str, str]]:
    """Reads what a device made by other programs has behind `HANDLER/`: a config, and options, `;KEY=VALUE` each.

    Raises:
        InvalidRequestError: An option is none, or is there twice.
    """
    config, *options = map(decode_config, text.split(";"))
    extra: dict[str, str] = {}
    for option in options:
        key, equals, value = option.partition("=")
        if not key or not equals or key in extra:
            raise InvalidRequestError(
                f"{option!r} in the configuration {text!r} is no option, or is there twice",
                "write HANDLER/CONFIG;KEY=VALUE;KEY=VALUE, and %3B for a semicolon in a path",
            )
        extra[key] = value
    return config, extra


def check_name(name: str) -> None:
    """Refuses backstore names that the kernel or other tools cannot carry.

    Raises:
        InvalidRequestError: Naming the input and what is allowed.
    """
    if not _NAME.fullmatch(name):
        raise InvalidRequestError(
            f"invalid device name {name!r}",
            "use 1 to 128 letters, digits and _ . + @ = -, with a letter, a digit or _ first",
        )


def device_config(handler: str, config: str) -> str:
    """Builds the kernel's `HANDLER/CONFIG` text.

    Raises:
        InvalidRequestError: The handler's name has other characters than names have, or the text is too long.
    """
    if not _HANDLER.fullmatch(handler):
        raise InvalidRequestError(f"invalid handler name {handler!r}", "use letters, digits and _ . + -")
    text = f"{handler}/{encode_config(config)}"
    if (length := len(os.fsencode(text))) > _MAX_CONFIG:
        raise InvalidRequestError(
            f"the configuration {text!r} has {length} bytes, the kernel keeps {_MAX_CONFIG}",
            "use a shorter path, for instance through a symbolic link",
        )
    return text


def _check_size(size: int, block_size: int) -> None:
    if block_size not in (512, 1024, 2048, 4096):
        raise InvalidRequestError(f"invalid block size {block_size}", "use 512, 1024, 2048 or 4096 bytes")
    if size <= 0 or size % block_size:
        raise InvalidRequestError(
            f"invalid size {size}", f"use a positive multiple of the block size, {block_size} bytes"
        )
    if size >= 1 << 63:
        raise InvalidRequestError(f"invalid size {size}", "the limit is 2^63 - 1 bytes")


def check_limits(wwn: str | None, **values: int | None) -> None:
    """Refuses what `create_backstore` would: a serial number that is none, and limits that are not positive.

    Raises:
        InvalidRequestError: Naming the input and what is allowed.
    """
    if wwn is not None:
        _check_wwn(wwn)
    for key, value in values.items():
        if value is not None and not 0 < value < 1 << 31:
            # data_pages_per_blk=0 divides by zero in the kernel, with a lock held.
            raise InvalidRequestError(f"invalid {key} {value}", "use a positive number")


def whole_pages(blocks: int, block_size: int) -> int:
    """Rounds a number of blocks down to whole pages, as the kernel does with the largest transfer."""
    per_page = max(os.sysconf("SC_PAGE_SIZE") // block_size, 1)
    return max(blocks - blocks % per_page, per_page)


def default_wwn(name: str, dev_config: str) -> str:
    """Computes a serial number that is the same whenever the same device is made on this machine."""
    machine = ""
    with suppress(OSError):
        machine = Path("/etc/machine-id").read_text().strip()
    return str(uuid.uuid5(uuid.NAMESPACE_URL, f"tcmu:{machine}/{name}/{dev_config}"))


def _check_wwn(wwn: str) -> None:
    try:
        uuid.UUID(wwn)
    except ValueError:
        raise InvalidRequestError(f"invalid wwn {wwn!r}", "use a UUID, as `uuidgen` prints") from None


def target_wwn(fabric: str, wwn: str) -> str:
    """Computes the name of the target that exposes a backstore.

    Args:
        fabric: `loopback` or `iscsi`.
        wwn: The backstore's unit serial number.
    """
    digits = hashlib.sha256(wwn.lower().encode()).hexdigest()
    if fabric == "loopback":
        # NAA 5 (IEEE registered), the company id that LIO's tools use, 36 bits of our own. rtslib refuses the
        # longer NAA 6 for targets.
        return f"naa.5001405{digits[:9]}"
    return f"iqn.2003-01.org.linux-iscsi.tcmu-rs:sn.{digits[:12]}"


def parse_portal(portal: str) -> tuple[str, int, bool]:
    """Takes `ADDRESS:PORT` apart (IPv6 addresses in brackets).

    Returns:
        Address as configfs wants it, port, and whether only this machine can reach it.

    Raises:
        InvalidRequestError: It is not of that form.
    """
    host, colon, digits = portal.rpartition(":")
    try:
        if not colon or host.startswith("[") != host.endswith("]"):
            raise ValueError
        address = ipaddress.ip_address(host.strip("[]"))
        if (address.version == 6) != host.startswith("[") or not 0 < (port := int(digits)) < 65536:
            raise ValueError
    except ValueError:
        raise InvalidRequestError(
            f"invalid portal {portal!r}", "use an address and a port: 127.0.0.1:3260 or [::1]:3260"
        ) from None
    return host, port, address.is_loopback


def check_iscsi(iqn: str | None, portal: str, *, allow_network: bool) -> tuple[str, int]:
    """Refuses what `expose_iscsi` would. Returns the portal's address and port.

    Raises:
        InvalidRequestError: Naming the input and what is allowed.
    """
    host, port, local = parse_portal(portal)
    if not local and not allow_network:
        raise InvalidRequestError(
            f"portal {portal} can be reached by other machines, and the disk would be theirs to write",
            "use 127.0.0.1 or [::1], or say that you mean it: --allow-network, allow_network=True",
        )
    if iqn is not None and not _IQN.fullmatch(iqn.lower()):
        raise InvalidRequestError(
            f"invalid target name {iqn!r}", "use iqn.YYYY-MM.DOMAIN:TEXT, as in iqn.2026-01.org.example:disk"
        )
    return host, port


# Access to configfs


@functools.cache
def _rtslib() -> ModuleType:
    # Imported when first needed: it opens libudev, which a machine that only lists handlers may lack.
    try:
        import rtslib_fb
    except ImportError as error:
        raise LioError(f"rtslib-fb cannot be loaded: {error}", "install libudev: apt install libudev1") from error
    return rtslib_fb  # type: ignore[no-any-return]


def own_errors(function: Callable[_P, _T]) -> Callable[_P, _T]:
    """Turns errors of rtslib and of the file system into `LioError`."""

    @functools.wraps(function)
    def wrapper(*args: _P.args, **kwargs: _P.kwargs) -> _T:
        try:
            return function(*args, **kwargs)
        except LioError:
            raise
        except PermissionError as error:
            raise LioError(f"no permission for {error.filename}", "run as root") from error
        except OSError as error:
            raise LioError(
                f"{error.filename}: {error.strerror}" if error.filename else str(error),
                "`tcmu-rs doctor` checks the machine; `dmesg` may say more",
            ) from error
        except _rtslib().RTSLibError as error:
            raise LioError(str(error), "`tcmu-rs doctor` checks the machine; `dmesg` may say more") from error

    return wrapper


def _write(path: Path, text: str) -> None:
    # One write is one operation of the kernel; no newline, which some files would store.
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.write(fd, os.fsencode(text))
    except OSError as error:
        raise LioError(f"the kernel refuses {text!r} in {path}: {error.strerror}", "`dmesg` may say why") from error
    finally:
        os.close(fd)


def _read(path: Path) -> str:
    return os.fsdecode(path.read_bytes()).removesuffix("\n")


@own_errors
def prepare() -> None:
    """Makes sure that the target core is there.

    Raises:
        LioError: It cannot be had.
    """
    if _CORE.is_dir():
        return
    config = TARGET.parent
    if not os.path.ismount(config):
        raise LioError("configfs is not mounted", f"mount -t configfs none {config}")
    _rtslib().utils.modprobe("target_core_mod")


@contextmanager
def _names_locked() -> Iterator[None]:
    """Excludes whoever else takes names: each holder has its own descriptor, so flock serves threads too."""
    RUN.mkdir(mode=0o755, exist_ok=True)
    fd = os.open(RUN / "names.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        yield
    finally:
        os.close(fd)


def _rmdir(path: Path) -> None:
    with suppress(FileNotFoundError):
        path.rmdir()


def _hbas() -> dict[int, str]:
    """Directory names in `core` by their number; the numbers are shared by backstores of all kinds."""
    entries = (entry.name for entry in _CORE.iterdir())
    return {int(number): entry for entry in entries if (number := entry.rpartition("_")[2]).isdecimal()}


# Backstores


def backstores() -> list[Backstore]:
    """Lists all user backstores, of all programs, enabled or not."""
    found = []
    with suppress(FileNotFoundError):
        for hba, directory in sorted(_hbas().items()):
            if directory.startswith("user_"):
                # Each may be removed by somebody else while it is read.
                with suppress(FileNotFoundError):
                    paths = list((_CORE / directory).iterdir())
                    found += [_backstore(path.name, hba) for path in paths if path.is_dir()]
    return found


def device_size(backstore: Backstore) -> int:
    """Returns the size in bytes, 0 if it has none (any more)."""
    with suppress(FileNotFoundError, ValueError):
        return int(_read(backstore.path / "attrib/dev_size"))
    return 0


@own_errors
def set_note(backstore: Backstore, note: str) -> None:
    """Leaves a line with a device, for `note_of`."""
    # The kernel takes nothing for nothing.
    if note != note_of(backstore):
        _write(backstore.path / "alias", note or "\n")


def note_of(backstore: Backstore) -> str:
    """Reads the line that was left with a device: its `alias`, which the kernel keeps and does nothing with."""
    with suppress(FileNotFoundError):
        return _read(backstore.path / "alias")
    return ""


@own_errors
def set_size(backstore: Backstore, size: int) -> None:
    """Tells the kernel another size of a device in service.

    By way of `control`, which announces nothing: the attribute would ask whoever listens, and fail if nobody does.

    Raises:
        LioError: The device is gone, or the kernel did not take it over.
    """
    _write(backstore.path / "control", f"dev_size={size}")
    if (found := device_size(backstore)) != size:
        raise LioError(f"the kernel has dev_size={found} instead of {size}")


def rescan(backstore: Backstore) -> None:
    """Has the disks of this machine that a backstore's loopback LUNs are look for their size, now.

    The device must be served meanwhile. Initiators elsewhere look for themselves.
    """
    for lun in luns().get(backstore.path, []):
        if lun.parents[3].name == "loopback" and (address := loopback_address(lun)):
            _sysfs.rescan(address)


def is_blocked(backstore: Backstore) -> bool:
    """Tells whether the kernel answers "busy" for the device because its server asked for it."""
    # The file cannot be read before the device is enabled.
    with suppress(OSError):
        return _read(backstore.path / "action/block_dev") == "blocked"
    return False


def find_backstore(name: str) -> Backstore | None:
    """Returns the user backstore of this name, or None."""
    return next((backstore for backstore in backstores() if backstore.name == name), None)


def serial_number(backstore: Backstore) -> str:
    """Reads the unit serial number; empty if the device has been given none, or is gone."""
    with suppress(FileNotFoundError):
        return _read(backstore.path / "wwn/vpd_unit_serial").partition(":")[2].strip()
    return ""


def _backstore(name: str, hba: int) -> Backstore:
    return Backstore(name, hba, serial_number(Backstore(name, hba, "")))


@own_errors
def create_backstore(
    name: str | Iterator[str],
    handler: str,
    config: str,
    size: int,
    *,
    block_size: int = 512,
    note: str = "",
    wwn: str | None = None,
    max_sectors: int | None = None,
    ring_mb: int | None = None,
    data_area_mb: int | None = None,
    data_pages_per_block: int | None = None,
    cmd_time_out: int | None = None,
    qfull_time_out: int | None = None,
) -> Backstore:
    """Creates and enables a user backstore, whose UIO device then exists. On an error nothing of it stays.

    The kernel waits for nobody's answer about it over netlink, so a daemon for other devices cannot hang it.
    Values that are None are left to the kernel.

    Args:
        name: Unique name, or candidates of which the first free one is taken.
        handler: First part of the kernel's config.
        config: The handler's configuration, any text; it is escaped.
        size: Bytes.
        block_size: Bytes of a logical block: 512, 1024, 2048 or 4096.
        note: A line that stays with the device (`note_of`), up to 511 bytes.
        wwn: Unit serial number, a UUID; computed from name and config if None.
        max_sectors: Largest transfer that initiators are told, in blocks; rounded down to whole pages.
        ring_mb: Size of the command ring, MiB, 8 at most.
        data_area_mb: Size of the data area, MiB.
        data_pages_per_block: Pages that the data area is allocated in.
        cmd_time_out: Seconds after which the kernel fails a command that is not answered; 0 means never.
        qfull_time_out: Seconds that a command waits for space in a full ring; 0 means not at all.

    Raises:
        InvalidRequestError: A value that the kernel would cut, misread or crash on.
        BackstoreExistsError: The name is taken.
        LioError: The kernel refused something, or did not take it over.
    """
    candidates = iter([name]) if isinstance(name, str) else name
    dev_config = device_config(handler, config)
    _check_size(size, block_size)
    check_limits(
        wwn,
        max_sectors=max_sectors,
        ring_mb=ring_mb,
        data_area_mb=data_area_mb,
        data_pages_per_block=data_pages_per_block,
    )
    if max_sectors is not None:
        max_sectors = whole_pages(max_sectors, block_size)

    # The order matters: the kernel checks the block of data pages against the data area known by then.
    control = {
        "dev_config": dev_config,
        "dev_size": size,
        "hw_block_size": block_size,
        "hw_max_sectors": max_sectors,
        "nl_reply_supported": -1,
        "cmd_ring_size_mb": ring_mb,
        "max_data_area_mb": data_area_mb,
        "data_pages_per_blk": data_pages_per_block,
    }
    attributes = {"cmd_time_out": cmd_time_out, "qfull_time_out": qfull_time_out}

    prepare()
    with ExitStack() as undo:
        name, hba = _take_name(candidates, undo)
        backstore = Backstore(name, hba, wwn or default_wwn(name, dev_config))
        # Notes about task management are how a server learns of aborted commands. Kernels before 5.10 have
        # none: there an aborted command runs to its end.
        if (backstore.path / "attrib/tmr_notification").exists():
            attributes["tmr_notification"] = 1
        if note:
            set_note(backstore, note)
        for key, value in control.items():
            if value is not None:
                _write(backstore.path / "control", f"{key}={value}")
        _write(backstore.path / "enable", "1")
        storage = _rtslib().UserBackedStorageObject(name, index=hba)
        storage.wwn = backstore.wwn
        for key, value in attributes.items():
            if value is not None:
                storage.set_attribute(key, value)
        _verify(backstore, control | attributes)
        undo.pop_all()
    return backstore


def _take_name(candidates: Iterator[str], undo: ExitStack) -> tuple[str, int]:
    """Makes the directories of a new backstore, which `undo` removes. Returns its name and number."""
    with _names_locked():
        hbas = _hbas()
        taken = {backstore.name: backstore.path for backstore in backstores()}
        for name in candidates:
            check_name(name)
            if name not in taken:
                break
        else:
            raise BackstoreExistsError(
                f"device {name} exists already, as {taken[name]}",
                f"choose another name or remove it: tcmu-rs detach {name}",
            )
        for hba in itertools.count():
            # Other tools know nothing of our lock, so the directory itself decides.
            with suppress(FileExistsError):
                if hba not in hbas:
                    (_CORE / f"user_{hba}").mkdir()
                    break
        undo.callback(_rmdir, _CORE / f"user_{hba}")
        (_CORE / f"user_{hba}" / name).mkdir()
        undo.callback(_rmdir, _CORE / f"user_{hba}" / name)
        return name, hba


def _verify(backstore: Backstore, wanted: Mapping[str, object]) -> None:
    """Reads back what was set: the kernel ignores keys it does not know and cuts what is too long."""
    for key, value in wanted.items():
        found = _read(backstore.path / "attrib" / key) if value is not None else None
        if value is not None and found != str(value):
            raise LioError(
                f"the kernel has {key}={found} instead of {value}",
                "its limit is lower, or it is too old for this",
            )


@own_errors
def remove_backstore(backstore: Backstore) -> None:
    """Removes a backstore that no LUN uses any more; one that is gone already is fine.

    Raises:
        BackstoreBusyError: A LUN of another program uses it; it is left as it is.
    """
    try:
        _rmdir(backstore.path)
    except OSError as error:
        if error.errno not in (errno.EBUSY, errno.ENOTEMPTY):
            raise
        users = ", ".join(str(lun) for lun in luns().get(backstore.path, [])) or "a node below it"
        raise BackstoreBusyError(
            f"device {backstore.name} is still used by {users}",
            f"remove that with the tool that made it (targetcli), then: tcmu-rs detach {backstore.name}",
        ) from error
    # Another tool may have put a backstore of its own into the same directory.
    with suppress(OSError):
        _rmdir(backstore.path.parent)


# Exposures


@own_errors
def expose_loopback(backstore: Backstore) -> Exposure:
    """Makes the backstore a disk of this machine, through a loopback target of its own.

    Returns when the kernel has asked the device who it is: it must be served meanwhile, or this lasts until
    the kernel's time-out. The disk's node follows a little later.
    """
    wwn = target_wwn("loopback", backstore.wwn)
    return _expose(backstore, Exposure("loopback", wwn), lambda portal_group: None)


@own_errors
def expose_iscsi(
    backstore: Backstore,
    iqn: str | None = None,
    portal: str = "127.0.0.1:3260",
    *,
    allow_network: bool = False,
) -> Exposure:
    """Offers the backstore over iSCSI, through a target of its own, to anybody who can reach the portal.

    Args:
        backstore: What to offer.
        iqn: Name of the target; computed if None.
        portal: `ADDRESS:PORT`.
        allow_network: Permit an address that other machines can reach. There is no authentication: who reaches the
            portal reads and writes the disk.

    Raises:
        InvalidRequestError: The portal is malformed, or can be reached from outside without `allow_network`.
    """
    # rtslib writes names in small letters, and refuses those that its pattern does not fit.
    iqn = (iqn or target_wwn("iscsi", backstore.wwn)).lower()
    host, port = check_iscsi(iqn, portal, allow_network=allow_network)

    def configure(portal_group: Any) -> None:
        for key, value in _DEMO_MODE.items():
            portal_group.set_attribute(key, value)
        portal_group.enable = True
        _rtslib().NetworkPortal(portal_group, host, port, mode="create")

    return _expose(backstore, Exposure("iscsi", iqn), configure)


def _expose(backstore: Backstore, exposure: Exposure, configure: Callable[[Any], None]) -> Exposure:
    rtslib = _rtslib()
    if exposure.path.exists():
        # Not ours to change, nor to remove on an error.
        raise LioError(f"the target {exposure.path} exists already", "remove it with the tool that made it")
    with ExitStack() as undo:
        target = rtslib.Target(rtslib.FabricModule(exposure.fabric), exposure.wwn, mode="create")
        undo.callback(withdraw, exposure)
        portal_group = rtslib.TPG(target, 1, mode="create")
        storage = rtslib.UserBackedStorageObject(backstore.name, index=backstore.hba)
        rtslib.LUN(portal_group, 0, storage_object=storage, alias=_LINK)
        # Last, so that an initiator that logs in at once finds the LUN.
        configure(portal_group)
        undo.pop_all()
    return exposure


@own_errors
def withdraw(exposure: Exposure) -> None:
    """Removes a target with its LUN; one that is gone already, or half removed, is fine.

    Waits for the commands that the LUN still has, and for a loopback disk also for its last cache flush: the
    device must be served meanwhile or fenced before.
    """
    rtslib = _rtslib()
    for _ in range(3):
        # Something may vanish between a look and the removal when two remove at once: look again.
        with suppress(rtslib.RTSLibNotInCFSError, FileNotFoundError):
            if exposure.path.is_dir():
                rtslib.Target(rtslib.FabricModule(exposure.fabric), exposure.wwn, mode="lookup").delete()
            return
    raise LioError(f"{exposure.path} cannot be removed", "another program works on it: try again")


def exposures(backstore: Backstore) -> list[Exposure]:
    """Finds the targets that we made for a backstore, finished or half-made, by this process or a dead one.

    Reads the LUNs of all targets, and so may wait for one that is just being made.
    """
    found = {lun.parents[2] for lun in luns().get(backstore.path, []) if (lun / _LINK).is_symlink()}
    if backstore.wwn:
        found |= {TARGET / fabric / target_wwn(fabric, backstore.wwn) for fabric in ("loopback", "iscsi")}
    return [Exposure(path.parent.name, path.name) for path in sorted(found) if path.is_dir()]


def is_complete(exposure: Exposure, backstore: Backstore) -> bool:
    """Tells whether a target that we made offers the backstore, and not merely was being made or removed."""
    link = exposure.lun / _LINK
    if not link.is_symlink() or Path(os.path.realpath(link)) != backstore.path:
        return False
    if exposure.fabric == "loopback":
        return loopback_address(exposure.lun) is not None
    return bool(portals(exposure)) and _read(exposure.path / "tpgt_1/enable") == "1"


def portals(exposure: Exposure) -> list[str]:
    """Lists where an iSCSI target listens, as `ADDRESS:PORT`."""
    with suppress(FileNotFoundError):
        return sorted(portal.name for portal in (exposure.path / "tpgt_1/np").iterdir())
    return []


def luns() -> dict[Path, list[Path]]:
    """Finds the LUN directories of all targets, by the directory of the backstore that they offer.

    May wait for a LUN that is just being made.
    """
    found: dict[Path, list[Path]] = {}
    for link in TARGET.glob("*/*/tpgt_*/lun/lun_*/*"):
        if link.is_symlink():
            found.setdefault(Path(os.path.realpath(link)), []).append(link.parent)
    return found


def loopback_address(lun: Path) -> str | None:
    """Returns the SCSI address `H:C:T:L` of a loopback LUN's directory, or None if it is gone."""
    with suppress(FileNotFoundError):
        return f"{_read(lun.parents[1] / 'address')}:{lun.name.removeprefix('lun_')}"
    return None


def act(backstore: Backstore, action: str, value: int) -> None:
    """Writes a number into one of the kernel's actions for a device.

    Raises:
        FileNotFoundError: The device is gone.
        LioError: The kernel refuses.
    """
    _write(backstore.path / "action" / action, str(value))


@own_errors
def block(backstore: Backstore) -> None:
    """Has the kernel answer "busy" for a device; one that is gone already is fine."""
    with suppress(FileNotFoundError):
        act(backstore, "block_dev", 1)


@own_errors
def fail_commands(backstore: Backstore, stop: threading.Event) -> None:
    """Fails the commands of a device that nobody serves, until told to stop, so that nothing waits for them.

    Making and removing a LUN wait for the device, and nobody may interrupt them: this runs beside them, in
    another thread. Only a process that has stopped to work on the ring may do this, or one that found it
    unserved: the ring starts anew.

    The device is not merely blocked, because initiators retry "busy" for minutes, and these are lost anyway.
    """
    uio = _sysfs.find(backstore.hba, backstore.name)
    if uio is None:
        return
    fd = -1
    # A device that nobody ever opened breaks the kernel's page reclaim after a reset. EBUSY: it was opened.
    with suppress(OSError):
        fd = os.open(uio.path, os.O_RDWR | os.O_CLOEXEC)
    try:
        # The process that died may have left it blocked.
        with suppress(FileNotFoundError):
            act(backstore, "block_dev", 0)
            while True:
                act(backstore, "reset_ring", 2)
                if stop.wait(_RESET_INTERVAL):
                    break
    finally:
        if fd >= 0:
            os.close(fd)


def remove_leftover(backstore: Backstore) -> None:
    """Removes a device that nobody serves any more, with all that we made for it.

    Raises:
        BackstoreBusyError: A LUN of another program uses it.
    """
    found = exposures(backstore)
    stop = threading.Event()
    failing = threading.Thread(target=fail_commands, args=(backstore, stop), daemon=True)
    failing.start()
    try:
        for exposure in found:
            withdraw(exposure)
    finally:
        stop.set()
        failing.join()
    remove_backstore(backstore)
