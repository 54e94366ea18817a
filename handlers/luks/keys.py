"""Where passphrases come from. Never from the command line itself: every process of the machine can read that."""

from __future__ import annotations

import ctypes
import functools
import getpass
import os
import resource
import sys
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

Secret = bytes | bytearray
KeyProvider = Callable[[str], Secret | Awaitable[Secret]]
"""Gets the UUID of a container, and returns its passphrase. `async def`, or plain and called in a thread."""

MAX_KEY_FILE = 8 << 20
"""Bytes; cryptsetup has the same limit."""
_PR_SET_DUMPABLE = 4
_SOURCES = ("key-file", "passphrase-fd", "credential")


def forbid_core_dumps() -> None:
    """Keeps the memory of this process out of core dumps, and from debuggers of the same user."""
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))
    # The limit alone does not stop a core_pattern that is a program.
    ctypes.CDLL(None).prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0)


def from_file(path: Path) -> bytearray:
    """Reads a key file: all of it is the key, a newline at its end too, as for `cryptsetup --key-file`.

    Raises:
        OSError: It cannot be read.
        ValueError: It is empty, or too large for a key.
    """
    with path.open("rb", buffering=0) as file:
        return _read(file.fileno(), str(path))


def from_descriptor(fd: int) -> bytearray:
    """Reads a passphrase from an open descriptor, up to the first newline or the end, and closes it.

    Raises:
        OSError: It cannot be read.
        ValueError: There is nothing, or too much.
    """
    try:
        passphrase = _read(fd, f"descriptor {fd}")
    finally:
        os.close(fd)
    newline = passphrase.find(b"\n")
    if newline >= 0:
        passphrase[newline:] = b""
    if not passphrase:
        raise ValueError(f"descriptor {fd} has no passphrase")
    return passphrase


def _read(fd: int, name: str) -> bytearray:
    content = bytearray()
    while part := os.read(fd, 1 << 16):
        content += part
        if len(content) > MAX_KEY_FILE:
            raise ValueError(f"{name} is no key: more than {MAX_KEY_FILE} bytes")
    if not content:
        raise ValueError(f"{name} is no key: it is empty")
    return content


def from_credential(name: str) -> bytearray:
    """Reads a credential that systemd hands to the service (LoadCredential=, SetCredentialEncrypted=).

    Raises:
        OSError: There is none of this name.
        ValueError: The service gets no credentials, or the name is none.
    """
    directory = os.environ.get("CREDENTIALS_DIRECTORY")
    if directory is None:
        raise ValueError(f"there is no credential {name!r}: systemd has set no CREDENTIALS_DIRECTORY")
    if "/" in name or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is no name of a credential")
    return from_file(Path(directory, name))


def prompt(what: str, *, twice: bool = False) -> bytearray:
    """Asks the person at the terminal.

    Args:
        what: What the passphrase is for.
        twice: It is a new one: a typing error would lock the data away.

    Raises:
        ValueError: Nothing is given, or not the same twice.
    """
    passphrase = getpass.getpass(f"Passphrase for {what}: ")
    if twice and getpass.getpass("The same again: ") != passphrase:
        raise ValueError("the two passphrases differ")
    if not passphrase:
        raise ValueError("an empty passphrase protects nothing")
    return bytearray(passphrase.encode("utf-8", "surrogateescape"))


def take_sources(
    extra: dict[str, str], what: str, *, interactive: bool, new: bool = False
) -> list[Callable[[], Secret]]:
    """Takes out of a handler's options those that say where passphrases are.

    Args:
        extra: Options; what is understood is removed.
        what: What is to be opened or made.
        interactive: There may be a person to ask, and descriptors are ours.
        new: A container is being made: `key-file-2`, `key-file-3` and so on give it more keyslots.

    Returns:
        One function for each passphrase; each reads when it is called, except that a person is asked at once.

    Raises:
        ValueError: More than one source is given, or none and there is no person to ask.
    """
    given = {name: extra.pop(name) for name in _SOURCES if name in extra}
    if len(given) > 1:
        raise ValueError(f"-o {' and -o '.join(given)} exclude each other")
    sources: list[Callable[[], Secret]] = []
    for name, value in given.items():
        if name == "key-file":
            sources.append(functools.partial(from_file, Path(value)))
        elif name == "credential":
            sources.append(functools.partial(from_credential, value))
        elif not interactive:
            raise ValueError(f"{what}: a passphrase-fd is for commands; a daemon takes a key-file or a credential")
        else:
            if not value.isascii() or not value.isdigit():
                raise ValueError(f"passphrase-fd is {value!r}; it is the number of an open descriptor")
            sources.append(functools.partial(from_descriptor, int(value)))
    number = 2
    while new and "key-file" in given and f"key-file-{number}" in extra:
        sources.append(functools.partial(from_file, Path(extra.pop(f"key-file-{number}"))))
        number += 1
    if not sources:
        if not interactive:
            raise ValueError(f"{what} needs a passphrase: option key-file=PATH or credential=NAME")
        if not sys.stdin.isatty():
            raise ValueError(
                f"{what} needs a passphrase: -o key-file=PATH, -o passphrase-fd=N, -o credential=NAME, or a terminal"
            )
        passphrase = prompt(what, twice=new)
        sources.append(lambda: passphrase)
    return sources


def check_options(extra: Mapping[str, str], known: str) -> None:
    """Refuses options that are left over.

    Raises:
        ValueError: There are some.
    """
    if extra:
        raise ValueError(f"luks knows no option {', '.join(extra)}; it knows {known}")
