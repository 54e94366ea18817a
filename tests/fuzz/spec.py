"""What local users write: specifications, configurations, options, names, sizes, portals, rules of faults.

An input is text, as the operating system hands it to a process. It is read in every way there is; it is taken or
refused with a documented exception that says something, and what is taken comes back as it was.
"""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import click
import trio

from tcmu_rs import Options, _cli, _lio, _registry, _sysfs
from tcmu_rs._lio import LioError
from tcmu_rs._registry import RegistryError
from tcmu_rs.testing.faults import parse_rules

from ..hostile import open_and_close

_registry.providers = functools.cache(_registry.providers)
for _name in _registry.providers():
    _registry.load(_name)
_NOWHERE = tempfile.TemporaryDirectory()

OPEN = ("file", "luks", "qcow2", "zstd")
"""Handlers whose `open` finds out what there is."""


def refused(call: Callable[..., Any], *arguments: Any, by: tuple[type[Exception], ...]) -> Any:
    """What a call returns; None if it raised one of these, which says why."""
    try:
        return call(*arguments)
    except by as error:
        assert str(error)
        return None


def kernel(handler: str, config: str) -> None:
    """What the kernel is told comes back."""
    text = refused(_lio.device_config, handler, config, by=(LioError, UnicodeEncodeError))
    if text is None:
        return
    assert len(os.fsencode(text)) <= 255 and not set(text) & set(",\n\0")
    parsed = _sysfs.parse_uio_name(f"tcm-user/0/name/{text}")
    assert parsed is not None
    kind, _, rest = parsed[2].partition("/")
    assert (kind, _lio.decode_config(rest)) == (handler, config)
    assert _lio.parse_config(rest) == (config, {})


def handlers(name: str, config: str, words: list[str]) -> None:
    """Makes a handler, and opens it where nothing of the machine can be meant."""
    config = config.replace("/", "\N{FRACTION SLASH}")
    pairs = [refused(_cli._key_value, word, by=(click.BadParameter,)) for word in words]
    extra = {pair[0]: pair[1].replace("/", "\N{FRACTION SLASH}") for pair in pairs if pair}
    kind = _registry.load(name)
    by = (OSError, ValueError, LookupError, LioError)
    handler = refused(kind.from_config, config, Options(size=len(config) << 9 or None, extra=extra), by=by)
    if handler is not None and name in OPEN:
        trio.run(open_and_close, handler)


def one_input(data: bytes) -> None:
    with contextlib.chdir(_NOWHERE.name):
        read_in_every_way(os.fsdecode(data))


def read_in_every_way(text: str) -> None:
    words = text.split("\x01")
    spec = refused(_registry.parse_spec, words[0], by=(ValueError,))
    if spec is not None:
        assert ":".join(spec) == words[0]
        kernel(*spec)
        if spec[0] in _registry.providers():
            handlers(spec[0], spec[1], words[1:])
    refused(_registry.handler_below, text.replace("/", "\N{FRACTION SLASH}"), by=(ValueError, RegistryError))
    refused(_lio.check_name, text, by=(LioError,))
    config = refused(_lio.parse_config, text, by=(LioError,))
    assert config is None or isinstance(config[0], str)
    if "\0" not in text:
        assert _lio.decode_config(_lio.encode_config(text)) == text
    _sysfs.parse_uio_name(text)
    refused(_lio.parse_portal, text, by=(LioError,))
    size = refused(_cli._size, text, by=(click.BadParameter,))
    assert size is None or size > 0
    refused(parse_rules, text, by=(ValueError,))
    assert os.listdir(_NOWHERE.name) == []  # noqa: PTH208


def seeds() -> Iterator[bytes]:
    for text in (
        "file:/var/tmp/disk.img\x01direct=on",
        "luks:qcow2:/disk\x01key-file=/key\x01lower.level=3\x01lower.block-size=512\x01allow-discards=on",
        "luks:/disk\x01header=/head\x01credential=name\x01passphrase-fd=3",
        "zstd:disk\x01snapshot=1\x01compression=off\x01level=9\x01backing-root=.",
        "qcow2:\udcff\x01cluster-size=4K\x01refcount-bits=16\x01backing=base\x01backing-format=raw",
        "ram:\x01size=1",
        "faults:ram:\x01rules=write skip=9 times=1 error=EIO; read delay=0.5",
        "faults:file:x\x01seed=4\x01rules=any probability=0.1 range=1M-2M store=torn flip",
        "read,write range=-64K error=3/11/00 hang; flush crash; write store=none times=2",
        "10G",
        "4096T",
        "127.0.0.1:3260",
        "[::1]:3260",
        "disk_0.a+b@c=d-e",
        "tcm-user/0/disk/file//var/tmp/a.img;direct=on;x=%3B",
        "/var/tmp/a%2Cb;key-file=/k;read_only=on",
    ):
        yield os.fsencode(text)
