"""The header: what it says, and how it says that a log is in the file."""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from typing import ClassVar

from ._errors import Qcow2Error

MAGIC = b"QFI\xfb"
SECTOR = 512

DIRTY, CORRUPT, DATA_FILE, COMPRESSION, EXTENDED_L2 = (1 << bit for bit in range(5))
LOG = 1 << 62
LAZY_REFCOUNTS = 1
RAW_DATA_FILE = 1 << 1
_KNOWN = DIRTY | CORRUPT | DATA_FILE | COMPRESSION | EXTENDED_L2 | LOG
_NAMES = {
    0: "dirty bit",
    1: "corrupt bit",
    2: "external data file",
    3: "compression type",
    4: "extended L2 entries",
}
LEVELS = {"zlib": 9, "zstd": 22}
"""The highest level of each compression."""
LOG_NAME = "tcmu write-ahead log"

_END = 0
_BACKING_FORMAT = 0xE2792ACA
_FEATURE_NAMES = 0x6803F857
_DATA_FILE_NAME = 0x44415441
_ENCRYPTION = 0x0537BE77
_LOG = 0x7463574C
_LOG_VERSION = 1
_LEVEL = 0x74634C76

_V2 = struct.Struct(">4sIQIIQIIQQIIQ")
_V3 = struct.Struct(">QQQII")
_LOG_EXTENSION = struct.Struct(">IIQQ16s")
_MAX_SIZE = 1 << 56
_MAX_L1 = 32 << 20
_MAX_REFCOUNT_TABLE = 8 << 20
_MAX_SNAPSHOTS = 65536
_MAX_CRYPT_HEADER = 16 << 20
_AES, _LUKS = 1, 2


@dataclass(frozen=True, slots=True)
class LogPlace:
    """Where the log is: offset and bytes in the file, and the session that writes it."""

    offset: int
    size: int
    session: bytes


@dataclass(slots=True)
class Header:
    """What the header says, in bytes and not in bits or clusters where it can be.

    Attributes:
        version: 2 or 3.
        cluster_bits: 9 to 21.
        size: Bytes of the disk.
        l1_entries: Of the active L1 table.
        l1_offset: Of the active L1 table.
        refcount_offset: Of the refcount table.
        refcount_clusters: Of the refcount table.
        snapshots: How many.
        snapshots_offset: Of the snapshot table.
        incompatible: Feature bits that must be understood.
        compatible: Feature bits that may be ignored.
        autoclear: Feature bits that are cleared by who does not know them.
        refcount_order: Bits of a refcount are 2 to the power of this.
        compression_type: 0 for deflate, 1 for zstd.
        header_length: Where the extensions begin.
        crypt_method: 0 for none, 2 for LUKS.
        crypt_header: Offset and length of the LUKS header.
        backing: Name of the backing file.
        backing_place: Offset and length of that name.
        backing_format: As the header says, if it does.
        data_file: Name of the external data file.
        log: Of an image that is open for writing, or was not closed.
        level: Of compression, as it was chosen when the image was made.
        feature_names: Of incompatible features, by bit.
        extensions: As they are, those that we know too, without the end.
        used: Bytes of the first cluster that are in use.
    """

    version: int
    cluster_bits: int
    size: int
    l1_entries: int
    l1_offset: int
    refcount_offset: int
    refcount_clusters: int
    snapshots: int
    snapshots_offset: int
    incompatible: int = 0
    compatible: int = 0
    autoclear: int = 0
    refcount_order: int = 4
    compression_type: int = 0
    header_length: int = 72
    crypt_method: int = 0
    crypt_header: tuple[int, int] | None = None
    backing: str | None = None
    backing_place: tuple[int, int] = (0, 0)
    backing_format: str | None = None
    data_file: str | None = None
    log: LogPlace | None = None
    level: int | None = None
    feature_names: dict[int, str] = field(default_factory=dict)
    extensions: list[tuple[int, bytes]] = field(default_factory=list)
    used: int = 0

    # Offsets of the fields that change while the image is open.
    SIZE: ClassVar[int] = 24
    L1_ENTRIES: ClassVar[int] = 36
    L1_OFFSET: ClassVar[int] = 40
    REFCOUNT_OFFSET: ClassVar[int] = 48
    REFCOUNT_CLUSTERS: ClassVar[int] = 56
    SNAPSHOTS: ClassVar[int] = 60
    SNAPSHOTS_OFFSET: ClassVar[int] = 64
    END_OF_FIELDS: ClassVar[int] = 72

    @property
    def cluster_size(self) -> int:
        """Bytes of a cluster."""
        return 1 << self.cluster_bits

    @property
    def extended_l2(self) -> bool:
        """Whether L2 entries have 16 bytes."""
        return bool(self.incompatible & EXTENDED_L2)

    @property
    def raw_data_file(self) -> bool:
        """Whether the external data file is to be the disk for those who do not read the image."""
        return bool(self.incompatible & DATA_FILE and self.autoclear & RAW_DATA_FILE)

    @property
    def l2_bits(self) -> int:
        """Entries of an L2 table are 2 to the power of this."""
        return self.cluster_bits - (4 if self.extended_l2 else 3)

    def l1_needed(self, size: int) -> int:
        """Entries of an L1 table for a disk of `size` bytes."""
        return -(-size >> (self.cluster_bits + self.l2_bits)) if size else 0

    def compression_name(self) -> str:
        """As QEMU names it."""
        return {0: "zlib", 1: "zstd"}[self.compression_type]


def parse(data: bytes) -> Header:
    """Reads a header.

    Args:
        data: The start of the file: its first cluster, or 64 KiB if that is not known.

    Raises:
        Qcow2Error: It is none, or it is damaged, or it asks for what is not supported.
    """
    if data[:4] != MAGIC:
        raise Qcow2Error("this is no qcow2 image: it does not begin with QFI")
    if len(data) < _V2.size:
        raise Qcow2Error("the image ends within its header")
    (_, version, backing_at, backing_length, bits, size, crypt, l1_entries, l1_at, table_at, table_clusters, snapshots,
     snapshots_at) = _V2.unpack_from(data)  # fmt: skip
    if version not in (2, 3):
        raise Qcow2Error(f"version {version} of qcow2 is not supported: 2 and 3 are")
    if not 9 <= bits <= 21:
        raise Qcow2Error(f"clusters of 2^{bits} bytes are not supported: 2^9 to 2^21 are")
    header = Header(version, bits, size, l1_entries, l1_at, table_at, table_clusters, snapshots, snapshots_at)
    header.crypt_method = crypt
    header.backing_place = (backing_at, backing_length)
    if version == 3:
        if len(data) < _V2.size + _V3.size:
            raise Qcow2Error("the image ends within its header")
        header.incompatible, header.compatible, header.autoclear, header.refcount_order, header.header_length = (
            _V3.unpack_from(data, _V2.size)
        )
        if header.header_length < 104 or header.header_length % 8 or header.header_length > header.cluster_size:
            raise Qcow2Error(f"a header of {header.header_length} bytes cannot be")
        if header.header_length > 104 and len(data) > 104:
            header.compression_type = data[104]
        if header.refcount_order > 6:
            raise Qcow2Error(f"refcounts of 2^{header.refcount_order} bits are not supported: 1 to 64 bits are")
    cluster = data[: header.cluster_size]
    if backing_at:
        if backing_length > 1023 or backing_at + backing_length > len(cluster):
            raise Qcow2Error("the name of the backing file is not in the first cluster")
        header.backing = cluster[backing_at : backing_at + backing_length].decode("utf-8", "surrogateescape")
        if "\0" in header.backing or not header.backing:
            raise Qcow2Error("the name of the backing file is empty or has a zero byte")
    _read_extensions(header, cluster, min(backing_at or len(cluster), len(cluster)))
    header.used = max(header.used, backing_at + backing_length if backing_at else 0)
    _check(header)
    return header


def _read_extensions(header: Header, cluster: bytes, stop: int) -> None:
    at = header.header_length
    while at + 8 <= stop:
        kind, length = struct.unpack_from(">II", cluster, at)
        at += 8
        if kind == _END:
            break
        if at + length > stop:
            raise Qcow2Error(f"the header extension {kind:08x}h is longer than the header")
        content = cluster[at : at + length]
        at += -(-length // 8) * 8
        header.extensions.append((kind, content))
        if kind == _BACKING_FORMAT:
            header.backing_format = content.decode("ascii", "replace")
        elif kind == _DATA_FILE_NAME:
            header.data_file = content.decode("utf-8", "surrogateescape")
        elif kind == _FEATURE_NAMES:
            for start in range(0, len(content) - 47, 48):
                if content[start] == 0:
                    name = content[start + 2 : start + 48].split(b"\0", 1)[0].decode("utf-8", "replace")
                    header.feature_names[content[start + 1]] = "".join(c if c.isprintable() else "?" for c in name)
        elif kind == _LEVEL and length == 4:
            header.level = int.from_bytes(content, "big")
        elif kind == _ENCRYPTION and length == 16:
            header.crypt_header = struct.unpack(">QQ", content)
        elif kind == _LOG and length == _LOG_EXTENSION.size:
            log_version, _, log_at, log_size, session = _LOG_EXTENSION.unpack(content)
            if log_version != _LOG_VERSION:
                raise Qcow2Error(f"the image has a log of version {log_version}: only version {_LOG_VERSION} is known")
            header.log = LogPlace(log_at, log_size, session)
    header.used = at


def _check(header: Header) -> None:
    """Refuses what is damaged or not understood."""
    unknown = header.incompatible & ~_KNOWN
    if unknown:
        names = [header.feature_names.get(bit, f"bit {bit}") for bit in range(64) if unknown >> bit & 1]
        raise Qcow2Error(f"the image needs what is not supported: {', '.join(names)}")
    _check_encryption(header)
    if bool(header.incompatible & COMPRESSION) != (header.compression_type != 0):
        raise Qcow2Error("the compression type and its feature bit contradict each other")
    if header.compression_type > 1:
        raise Qcow2Error(f"compression type {header.compression_type} is not supported: 0 (zlib) and 1 (zstd) are")
    if header.level is not None and not 1 <= header.level <= LEVELS[header.compression_name()]:
        # A hint, and this is none.
        header.level = None
    if header.extended_l2 and header.cluster_bits < 14:
        raise Qcow2Error("extended L2 entries need clusters of at least 16 KiB")
    if bool(header.incompatible & LOG) != (header.log is not None):
        raise Qcow2Error("the bit of the write-ahead log and its header extension contradict each other")
    cluster = header.cluster_size
    log = header.log
    if log is not None and (
        log.offset % SECTOR
        or log.size % 1024
        or log.size < 32768
        or log.offset < cluster
        or log.offset + log.size > _MAX_SIZE
    ):
        raise Qcow2Error(f"a log of {log.size} bytes at {log.offset} cannot be")
    if header.size > _MAX_SIZE:
        raise Qcow2Error(f"a disk of {header.size} bytes is too large")
    for name, offset in (
        ("the L1 table", header.l1_offset),
        ("the refcount table", header.refcount_offset),
        ("the snapshot table", header.snapshots_offset),
    ):
        if offset % cluster or offset >> 56:
            raise Qcow2Error(f"{name} at {offset} is not at a cluster")
    if header.l1_entries * 8 > _MAX_L1 or header.l1_entries < header.l1_needed(header.size):
        raise Qcow2Error(f"an L1 table of {header.l1_entries} entries does not fit a disk of {header.size} bytes")
    if header.l1_entries and not header.l1_offset:
        raise Qcow2Error("the L1 table is missing")
    if not header.refcount_clusters or header.refcount_clusters * cluster > max(_MAX_REFCOUNT_TABLE, cluster):
        raise Qcow2Error(f"a refcount table of {header.refcount_clusters} clusters cannot be")
    if not header.refcount_offset:
        raise Qcow2Error("the refcount table is missing")
    if header.snapshots > _MAX_SNAPSHOTS:
        raise Qcow2Error(f"{header.snapshots} snapshots are too many")


def _check_encryption(header: Header) -> None:
    if header.crypt_method == _AES:
        raise Qcow2Error(
            "the image has the old AES encryption, which nobody should use any more: decrypt it with `qemu-img convert "
            "--object secret,id=key,file=PASSPHRASE --image-opts "
            "driver=qcow2,file.filename=IMAGE,encrypt.key-secret=key -O qcow2 NEW`"
        )
    if header.crypt_method not in (0, _LUKS):
        raise Qcow2Error(f"the image is encrypted with method {header.crypt_method}: only 2 (LUKS) is supported")
    if (header.crypt_method == _LUKS) != (header.crypt_header is not None):
        raise Qcow2Error("the encryption and its header extension contradict each other")
    if header.crypt_header is not None:
        offset, length = header.crypt_header
        if not offset or offset % header.cluster_size or offset >> 56 or not 592 <= length <= _MAX_CRYPT_HEADER:
            raise Qcow2Error(f"an encryption header of {length} bytes at {offset} cannot be")


def feature_names() -> bytes:
    """The feature name table, with the log among the incompatible features."""
    rows = [*((0, bit, name) for bit, name in _NAMES.items()), (1, 0, "lazy refcounts"), (0, 62, LOG_NAME)]
    return b"".join(struct.pack(">BB46s", kind, bit, name.encode()) for kind, bit, name in rows)


def extension(kind: int, content: bytes) -> bytes:
    """A header extension, padded to 8 bytes."""
    return struct.pack(">II", kind, len(content)) + content.ljust(-(-len(content) // 8) * 8, b"\0")


def make(header: Header) -> bytes:
    """The first cluster of a new image: version 3.

    Raises:
        Qcow2Error: The name of the backing file does not fit.
    """
    extensions = b""
    if header.crypt_header is not None:
        extensions += extension(_ENCRYPTION, struct.pack(">QQ", *header.crypt_header))
    if header.backing_format is not None:
        extensions += extension(_BACKING_FORMAT, header.backing_format.encode())
    if header.level is not None:
        extensions += extension(_LEVEL, struct.pack(">I", header.level))
    if header.cluster_size >= 1024:
        extensions += extension(_FEATURE_NAMES, feature_names())
    extensions += extension(_END, b"")
    at = 112 + len(extensions)
    backing = b"" if header.backing is None else header.backing.encode("utf-8", "surrogateescape")
    if len(backing) > 1023 or at + len(backing) > header.cluster_size:
        raise Qcow2Error(f"the name of the backing file is too long: {len(backing)} bytes")
    header.header_length, header.backing_place = 112, (at if backing else 0, len(backing))
    return (_fields(header) + extensions + backing).ljust(header.cluster_size, b"\0")


def _fields(header: Header) -> bytes:
    fixed = _V2.pack(
        MAGIC,
        3,
        *header.backing_place,
        header.cluster_bits,
        header.size,
        header.crypt_method,
        header.l1_entries,
        header.l1_offset,
        header.refcount_offset,
        header.refcount_clusters,
        header.snapshots,
        header.snapshots_offset,
    )
    bits = (header.incompatible, header.compatible, header.autoclear, header.refcount_order, header.header_length)
    return fixed + _V3.pack(*bits) + bytes([header.compression_type]) + bytes(7)


def _kept(header: Header) -> int:
    """The autoclear features that stay true whatever is written: we see to them."""
    return RAW_DATA_FILE if header.raw_data_file else 0


def with_log(header: Header, cluster: bytes, log: LogPlace) -> tuple[int, bytes, bytes]:
    """How the header says that a log is there, in two steps.

    Args:
        header: Of `cluster`.
        cluster: The first cluster as it is.
        log: What to announce.

    Returns:
        Where to write the extensions first (0 if there is nothing to write), they themselves, and then sector 0.

    Raises:
        Qcow2Error: There is no room.
    """
    ours = extension(_LOG, _LOG_EXTENSION.pack(_LOG_VERSION, 0, log.offset, log.size, log.session))
    others = [(kind, content) for kind, content in header.extensions if kind not in (_FEATURE_NAMES, _LOG)]
    kept = b"".join(extension(kind, content) for kind, content in others)
    name = b"" if header.backing is None else cluster[header.backing_place[0] :][: header.backing_place[1]]
    short = struct.pack(">BB46s", 0, 62, LOG_NAME.encode())
    start = -(-header.used // SECTOR) * SECTOR
    for at, names in ((start, feature_names()), (start, short), (112, feature_names()), (112, short), (112, None)):
        table = b"" if names is None else extension(_FEATURE_NAMES, names)
        content = ours + kept + table + extension(_END, b"")
        stop = at + len(content) + len(name)
        if stop <= (SECTOR if at == 112 else header.cluster_size):
            break
    else:
        raise Qcow2Error("the header has no room for what announces the log: attach the image read-only")
    opened = Header(
        3,
        header.cluster_bits,
        header.size,
        header.l1_entries,
        header.l1_offset,
        header.refcount_offset,
        header.refcount_clusters,
        header.snapshots,
        header.snapshots_offset,
        incompatible=header.incompatible | LOG,
        compatible=header.compatible,
        autoclear=_kept(header),
        crypt_method=header.crypt_method,
        refcount_order=header.refcount_order,
        compression_type=header.compression_type,
        header_length=at,
        backing_place=(at + len(content) if name else 0, len(name)),
    )
    if at == 112:
        return 0, b"", (_fields(opened) + content + name).ljust(SECTOR, b"\0")
    # What follows the fixed fields in sector 0 is not looked at any more; it stays as it was.
    sector = _fields(opened) + cluster[112:SECTOR]
    return at, content + name, sector


def without_log(before: bytes, now: bytes) -> bytes:
    """Sector 0 for a clean close.

    Args:
        before: Sector 0 as it was before the log.
        now: As it is with the log.
    """
    sector = bytearray(before)
    fields = slice(Header.SIZE, Header.END_OF_FIELDS)
    sector[fields] = now[fields]
    if sector[7] == 3:
        # Bitmaps and the like do not describe what was written.
        sector[88:96] = now[88:96]
    return bytes(sector)
