"""What is done to images that are not served: making and describing them."""

from __future__ import annotations

import errno
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING

from ._errors import Qcow2Error
from .chain import read_header
from .header import COMPRESSION, LEVELS, Header, make
from .storage import Storage

if TYPE_CHECKING:
    from tcmu_rs.handlers.luks.volume import NewContainer

COMPRESSIONS = {"zlib": 0, "zstd": 1}
_MAX_L1 = 4 << 20


def create(
    path: str | os.PathLike[str],
    size: int | None = None,
    *,
    cluster_size: int = 64 << 10,
    compression: str = "zstd",
    refcount_bits: int = 16,
    backing: str | None = None,
    backing_format: str | None = None,
    encryption: NewContainer | None = None,
    level: int | None = None,
) -> None:
    """Makes an empty image of version 3, which must not exist yet. Blocks.

    Args:
        path: Of the new file.
        size: Bytes of the disk; that of the backing file if not given.
        cluster_size: Bytes: a power of two, 512 to 2 MiB.
        compression: Type of compressed clusters: zstd or zlib.
        refcount_bits: 1 to 64, a power of two.
        backing: Name of the backing file, as it is to be in the header: relative to the directory of `path`.
        backing_format: qcow2 or raw; found out if not given, and then the file must be trustworthy.
        encryption: The LUKS header of an encrypted image.
        level: Of compression, for whoever writes the image with this handler; if not given, the usual one.

    Raises:
        ValueError: A parameter cannot be.
        OSError: The file cannot be made.
    """
    if cluster_size not in (1 << bits for bits in range(9, 22)):
        raise ValueError(f"cluster_size is {cluster_size}; it is a power of two from 512 to 2097152")
    if compression not in COMPRESSIONS:
        raise ValueError(f"compression is {compression!r}; it is zstd or zlib")
    if refcount_bits not in (1, 2, 4, 8, 16, 32, 64):
        raise ValueError(f"refcount_bits is {refcount_bits}; it is 1, 2, 4, 8, 16, 32 or 64")
    if level is not None and not 1 <= level <= LEVELS[compression]:
        raise ValueError(f"level is {level}; for {compression} it is 1 to {LEVELS[compression]}")
    path = Path(path)
    if backing is not None:
        backing_size, backing_format = _measure(path.parent / backing, backing_format)
        size = backing_size if size is None else size
    if size is None:
        raise ValueError(f"{path} has to be made: how large? add --size, such as --size 10G")
    if size <= 0 or size % 512:
        raise ValueError(f"a disk of {size} bytes cannot be: it has whole blocks of 512 bytes")
    bits = cluster_size.bit_length() - 1
    header = Header(3, bits, size, 0, 0, 0, 0, 0, 0)
    header.backing, header.backing_format = backing, backing_format
    header.level = level
    header.refcount_order = refcount_bits.bit_length() - 1
    header.compression_type = COMPRESSIONS[compression]
    header.incompatible = COMPRESSION if header.compression_type else 0
    header.l1_entries = header.l1_needed(size)
    if header.l1_entries > _MAX_L1:
        raise ValueError(f"{size} bytes are too many for clusters of {cluster_size}: choose larger ones")
    pieces, length = _lay_out(header, encryption)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(fd, length)
        # So that no table lacks space later.
        os.posix_fallocate(fd, 0, length)
        for offset, piece in pieces:
            os.pwrite(fd, piece, offset)
        os.fdatasync(fd)
        # Only now it is an image.
        os.pwrite(fd, make(header), 0)
        os.fdatasync(fd)
    except BaseException:
        path.unlink()
        raise
    finally:
        os.close(fd)


def _measure(path: Path, kind: str | None) -> tuple[int, str]:
    """Size of the disk in a backing file, and its format."""
    if kind not in (None, "qcow2", "raw"):
        raise ValueError(f"a backing file of format {kind!r} is not supported: raw and qcow2 are")
    storage = Storage(path, writable=False)
    try:
        if kind != "raw":
            try:
                return read_header(storage).size, "qcow2"
            except Qcow2Error:
                if kind == "qcow2":
                    raise
        if storage.size % 512:
            raise OSError(errno.EINVAL, "is no whole number of blocks of 512 bytes", str(path))
        return storage.size, "raw"
    finally:
        storage.close()


def _lay_out(header: Header, encryption: NewContainer | None) -> tuple[list[tuple[int, bytes]], int]:
    """Places everything; returns what has to be written behind the header, and the size of the file."""
    cluster = header.cluster_size
    block_entries = (cluster * 8) >> header.refcount_order
    l1_clusters = -(-header.l1_entries * 8 // cluster)
    crypt_size = 0 if encryption is None else encryption.header_size
    crypt_clusters = -(-crypt_size // cluster)
    blocks = table_clusters = 1
    while True:
        used = 1 + table_clusters + blocks + l1_clusters + crypt_clusters
        wanted = -(-used // block_entries)
        wanted_table = -(-wanted * 8 // cluster)
        if (wanted, wanted_table) == (blocks, table_clusters):
            break
        blocks, table_clusters = max(blocks, wanted), max(table_clusters, wanted_table)
    header.refcount_offset, header.refcount_clusters = cluster, table_clusters
    first_block = cluster * (1 + table_clusters)
    header.l1_offset = first_block + blocks * cluster
    table = b"".join(struct.pack(">Q", first_block + index * cluster) for index in range(blocks))
    counts = _ones(used, header.refcount_order)
    pieces = [(header.refcount_offset, table), (first_block, counts)]
    if encryption is not None:
        start = header.l1_offset + l1_clusters * cluster
        header.crypt_method, header.crypt_header = 2, (start, crypt_size)
        pieces += [(start + offset, piece) for offset, piece in encryption.pieces]
    return pieces, used * cluster


def _ones(count: int, order: int) -> bytes:
    """So many refcounts of one."""
    if order >= 3:
        return (1).to_bytes(1 << (order - 3), "big") * count
    per_byte = 8 >> order
    full = sum(1 << (index << order) for index in range(per_byte))
    rest = sum(1 << (index << order) for index in range(count % per_byte))
    return bytes([full]) * (count // per_byte) + (bytes([rest]) if rest else b"")
