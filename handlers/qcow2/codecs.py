"""Compression: what is stored of a cluster, and back."""

from __future__ import annotations

import errno
import threading
import zlib

import zstandard

ZLIB, ZSTD = 0, 1


class Codec:
    """Compresses and decompresses clusters; may be used from several threads.

    Args:
        kind: The compression type of the image: `ZLIB` or `ZSTD`.
        cluster_size: Bytes of a cluster.
        level: Of compression; None for 1.
    """

    def __init__(self, kind: int, cluster_size: int, level: int | None = None) -> None:
        self.kind = kind
        self.level = 1 if level is None else level
        self._size = cluster_size
        self._local = threading.local()

    def decompress(self, data: bytes | memoryview) -> bytes:
        """The cluster; what follows its compressed form is ignored.

        Raises:
            OSError: It is damaged (EIO).
        """
        try:
            if self.kind == ZLIB:
                # The window is that of QEMU, 2^12, or larger.
                found = zlib.decompressobj(-15).decompress(data, self._size)
            else:
                # A frame that says how much it has gets the memory for it.
                if zstandard.frame_content_size(data) > self._size:
                    raise zstandard.ZstdError("the frame has more than a cluster")
                found = self._decompressor().decompress(data, max_output_size=self._size)
        except (zlib.error, zstandard.ZstdError) as error:
            raise OSError(errno.EIO, f"a compressed cluster is damaged: {error}") from None
        if len(found) != self._size:
            raise OSError(errno.EIO, f"a compressed cluster has {len(found)} bytes instead of {self._size}")
        return found

    def compress(self, data: bytes | bytearray | memoryview) -> bytes | None:
        """What to store, or None if a plain cluster is better."""
        if self.kind == ZLIB:
            deflate = zlib.compressobj(self.level, zlib.DEFLATED, -12)
            found = deflate.compress(data) + deflate.flush()
        else:
            compressor = getattr(self._local, "compressor", None)
            if compressor is None:
                compressor = self._local.compressor = zstandard.ZstdCompressor(
                    level=self.level, write_checksum=True, write_content_size=True
                )
            # What cannot be compressed becomes raw blocks, a little longer than the cluster, but with a checksum.
            return bytes(compressor.compress(data))
        return found if len(found) <= self._size - 512 else None

    def _decompressor(self) -> zstandard.ZstdDecompressor:
        decompressor = getattr(self._local, "decompressor", None)
        if decompressor is None:
            decompressor = self._local.decompressor = zstandard.ZstdDecompressor()
        return decompressor
