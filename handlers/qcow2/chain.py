"""Opening: an image, and the files that it names."""

from __future__ import annotations

import errno
import functools
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from tcmu_rs import IoVec

from ._errors import Qcow2Error
from .cache import Entry
from .header import CORRUPT, DATA_FILE, MAGIC, SECTOR, Header, parse
from .image import Image, RawSource, Source
from .log import SAVED_SECTOR, Chain, read_chain
from .pages import Pages
from .payload import Locked, Payload
from .snapshots import find_snapshot, read_snapshots
from .storage import Storage
from .tables import Tables

if TYPE_CHECKING:
    from tcmu_rs.handlers.luks.keys import KeyProvider

    from .payload import Cipher

MAX_CHAIN = 64
_HEAD = 64 << 10
_PROTOCOL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")

StorageFactory = Callable[..., Storage]


def read_header(storage: Storage) -> Header:
    """Reads the header of an image.

    Raises:
        Qcow2Error: It is none, or not supported.
    """
    data = storage.pread(0, _HEAD)
    if len(data) == _HEAD and 16 < data[23] <= 21:
        # The first cluster is larger.
        data += storage.pread(_HEAD, (1 << data[23]) - _HEAD)
    try:
        return parse(data)
    except Qcow2Error as error:
        raise Qcow2Error(f"{storage.path}: {error}") from None


def is_encrypted(path: str | os.PathLike[str]) -> bool:
    """Whether an image has the encryption of LUKS, as far as that can be seen."""
    try:
        with Path(path).open("rb") as file:
            head = file.read(36)
            return head[:4] == MAGIC and head[32:] == b"\0\0\0\2"
    except OSError:
        # Whoever opens it says what is wrong.
        return False


def open_image(
    path: str | os.PathLike[str],
    *,
    writable: bool,
    snapshot: str | None = None,
    root: str | os.PathLike[str] | None = None,
    storage: StorageFactory = Storage,
    keys: KeyProvider | None = None,
    locked: bool = False,
    unlocked: Mapping[str, Cipher] | None = None,
    chain: tuple[tuple[int, int], ...] = (),
) -> Image:
    """Opens an image and what is below it. Blocks.

    Args:
        path: Of the image.
        writable: Open it for writing; what is below never is.
        snapshot: ID or name of an internal snapshot to read instead.
        root: Directory in which the files have to be that it names; its own if not given.
        storage: Opens files.
        keys: Gives the passphrase of each image that is encrypted.
        locked: Without `keys`, open an encrypted image all the same: its map is there, its data is not.
        unlocked: Ciphers that are known already, by path.
        chain: Device and inode of the images above.

    Raises:
        Qcow2Error: It is damaged, not supported, or names what it must not.
        LuksError: A passphrase is wrong, or the LUKS header is damaged or not supported.
        OSError: A file cannot be opened.
    """
    root = Path(os.path.realpath(root if root is not None else Path(path).parent))
    file = storage(path, writable=writable)
    backing: Source | None = None
    data: Storage | None = None
    try:
        identity = Path(path).stat()
        chain = (*chain, (identity.st_dev, identity.st_ino))
        header = read_header(file)
        if writable and header.incompatible & CORRUPT:
            raise Qcow2Error(
                f"{path} is marked as corrupt: `qemu-img check -r all` may mend it, or attach it read-only"
            )
        if header.incompatible & DATA_FILE:
            if header.data_file is None:
                raise Qcow2Error(f"{path} does not say what its data file is")
            data = storage(_resolve(path, header.data_file, root, "data file"), writable=writable)
        cipher = (unlocked or {}).get(str(file.path))
        if cipher is None:
            cipher = _cipher(file, header, keys, locked=locked, writable=writable)
        payload = Payload(data or file, cipher, external=data is not None, raw=header.raw_data_file)
        pages = Pages(file, header.cluster_size)
        chain_of_log = None
        pieces: dict[int, list[tuple[int, bytes]]] = {}
        if header.log is not None:
            if header.log.offset + header.log.size > file.size:
                raise Qcow2Error(f"{path}: its log, to byte {header.log.offset + header.log.size}, is not in the file")
            chain_of_log = read_chain(file, header.log, pages.size, None if isinstance(cipher, Locked) else cipher)
            header, pieces = _replay(file, pages, header, chain_of_log)
        size, tables = header.size, Tables(pages, header)
        if snapshot is not None:
            found = find_snapshot(read_snapshots(pages, header), snapshot)
            tables = Tables(pages, header, l1_offset=found.l1_offset, l1_entries=found.l1_entries)
            size = found.disk_size
        if header.backing is not None:
            below = functools.partial(
                open_image, writable=False, root=root, storage=storage, keys=keys, locked=locked, unlocked=unlocked
            )
            backing = _open_backing(path, header, root, storage, below, chain)
        image = Image(file, header, pages, tables=tables, size=size, backing=backing, payload=payload)
        if snapshot is None and not isinstance(cipher, Locked):
            for cluster, parts in pieces.items():
                content = bytearray(header.cluster_size)
                image.read(cluster << header.cluster_bits, IoVec([content]), wait=True)
                entry = image.cache[cluster] = Entry(content, 0)
                for start, part in parts:
                    content[start : start + len(part)] = part
                    entry.mark(start, len(part))
                entry.logged, entry.unlogged = entry.unlogged, 0
        image.chain = chain_of_log
        return image
    except BaseException:
        file.close()
        if data is not None:
            data.close()
        if backing is not None:
            backing.close()
        raise


def _cipher(file: Storage, header: Header, keys: KeyProvider | None, *, locked: bool, writable: bool) -> Cipher | None:
    """The cipher of an image, None if it is not encrypted."""
    if not header.crypt_method:
        return None
    if keys is None:
        if not locked or (writable and header.log is not None):
            raise Qcow2Error(f"{file.path} is encrypted: say where its passphrase is, such as -o key-file=PATH")
        return Locked(file)
    from .encryption import unlock

    return unlock(file, header, keys, writable=writable)


def _replay(
    file: Storage, pages: Pages, header: Header, chain: Chain
) -> tuple[Header, dict[int, list[tuple[int, bytes]]]]:
    """Applies the records of a log in memory: the header as it is then, and by guest cluster what is newer than it.

    Raises:
        Qcow2Error: The log is not of this image.
    """
    assert header.log is not None
    pieces: dict[int, list[tuple[int, bytes]]] = {}
    for record in chain.records:
        for number, mask, words in record.pages:
            if number * pages.size >> 56:
                raise Qcow2Error(f"{file.path}: a record of the log is not of this image")
            pages.put(number, mask, words)
        for cluster in record.settled:
            pieces.pop(cluster, None)
        for offset, data in record.pieces:
            within = offset & (header.cluster_size - 1)
            if within + len(data) > header.cluster_size:
                raise Qcow2Error(f"{file.path}: a record of the log is not of this image")
            pieces.setdefault(offset >> header.cluster_bits, []).append((within, data))
    header = parse(pages.read(0, header.cluster_size))
    if any(cluster >> header.l2_bits >= header.l1_entries for cluster in pieces):
        raise Qcow2Error(f"{file.path}: a record of the log is not of this image")
    # What is behind the end was written to make the disk larger, which was not finished.
    pieces = {cluster: parts for cluster, parts in pieces.items() if cluster << header.cluster_bits < header.size}
    before = file.pread(header.log.offset + SAVED_SECTOR, SECTOR) if header.log else b""
    if before[:7] != MAGIC + bytes(3) or before[7] not in (2, 3):
        raise Qcow2Error(f"{file.path}: the log of the image is damaged: it does not have the header")
    # While the log is there every image says that it is of version 3.
    header.version = before[7]
    return header, pieces


def _open_backing(
    path: str | os.PathLike[str],
    header: Header,
    root: Path,
    storage: StorageFactory,
    below: Callable[..., Image],
    chain: tuple[tuple[int, int], ...],
) -> Source:
    assert header.backing is not None
    place = _resolve(path, header.backing, root, "backing file")
    try:
        identity = place.stat()
    except FileNotFoundError:
        raise FileNotFoundError(errno.ENOENT, f"the backing file of {path} is missing", str(place)) from None
    if (identity.st_dev, identity.st_ino) in chain:
        raise Qcow2Error(f"{path} is its own backing file, by way of {place}")
    if len(chain) >= MAX_CHAIN:
        raise Qcow2Error(f"more than {MAX_CHAIN} images are below each other")
    kind = header.backing_format
    if kind not in (None, "raw", "qcow2", "file", "host_device"):
        raise Qcow2Error(f"{path}: a backing file of format {kind!r} is not supported: raw and qcow2 are")
    if kind == "qcow2":
        return below(place, chain=chain)
    file = storage(place, writable=False)
    if kind is None and file.pread(0, 4) == MAGIC:
        file.close()
        raise Qcow2Error(
            f"{path} does not say what format its backing file has: say it with "
            f"`qemu-img rebase -u -b {header.backing} -F qcow2 {path}` (or -F raw)"
        )
    return RawSource(file)


def _resolve(path: str | os.PathLike[str], name: str, root: Path, what: str) -> Path:
    """Where the file is that an image names, as QEMU finds it.

    Raises:
        Qcow2Error: It is no file, or not inside `root`.
    """
    if name.startswith("file:"):
        name = name.removeprefix("file:")
    elif _PROTOCOL.match(name):
        raise Qcow2Error(f"{path}: the {what} {name!r} is no file, which is not supported")
    # QEMU's path_combine: relative to the directory of the name that was opened, links not followed.
    place = Path(path).parent / name
    real = Path(os.path.realpath(place))
    if not real.is_relative_to(root):
        raise Qcow2Error(f"{path}: the {what} {place} is outside of {root}: allow it with -o backing-root=DIRECTORY")
    return place
