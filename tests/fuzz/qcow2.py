"""A file that says it is a qcow2 image: its header, its tables, its snapshots, its compressed clusters.

An input is the file, so `qemu-img info FINDING` has something to say to it. It is opened, read, looked through, and
written to. All of that ends in a documented exception, or works; and if the check finds nothing wrong with the image,
everything has to work, and what was written has to be there.
"""

from __future__ import annotations

import resource
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from random import Random

import trio

from tcmu_rs import IoVec, ScsiError
from tcmu_rs.handlers.luks import LuksError
from tcmu_rs.handlers.qcow2 import Qcow2Error
from tcmu_rs.handlers.qcow2.chain import open_image
from tcmu_rs.handlers.qcow2.handler import Qcow2Handler
from tcmu_rs.handlers.qcow2.offline import check_image, describe

SIZE = 64 << 10
"""Bytes of a disk that are looked at."""
ROOM = 8 << 20
"""Bytes that a file may have: as if the file system were full then."""
DOCUMENTED = (Qcow2Error, LuksError, OSError, ScsiError)

_directory = tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
PATH = Path(_directory.name, "image")
resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def put(data: bytes) -> None:
    """Makes this the image."""
    PATH.write_bytes(data)


def look() -> bool:
    """Describes the image and looks through it; returns whether it opens, and nothing is wrong with it."""
    try:
        image = open_image(PATH, writable=False)
    except DOCUMENTED:
        return False
    try:
        found = describe(image)
    except DOCUMENTED:
        return False
    finally:
        image.close()
    for number in list(found["snapshots"])[:2]:
        trio.run(read_all, Qcow2Handler(PATH, snapshot=number))
    try:
        return not check_image(PATH)
    except DOCUMENTED:
        return False


async def read_all(handler: Qcow2Handler) -> dict[int, bytes | None]:
    """What the start of the disk has, by 4 KiB; None where it cannot be read."""
    found: dict[int, bytes | None] = {}
    try:
        await handler.open()
    except DOCUMENTED:
        return found
    try:
        for offset in range(0, min(handler.size, SIZE), 4096):
            data = bytearray(min(4096, handler.size - offset))
            try:
                await handler.read(offset, IoVec([data]))
                found[offset] = bytes(data)
            except DOCUMENTED:
                found[offset] = None
        await handler.extents(0, min(handler.size, SIZE) or 512)
    except DOCUMENTED:
        pass
    finally:
        await handler.aclose()
    return found


async def change(handler: Qcow2Handler) -> dict[int, bytes] | None:
    """Writes, discards, and flushes; returns by sector what has to be there, None if something did not work."""
    random = Random(1)
    written: dict[int, bytes] = {}
    try:
        async with handler:
            sectors = min(handler.size, SIZE) // 512
            if not sectors:
                return None
            for number in range(8):
                first = random.randrange(sectors)
                count = min(random.choice([1, 1, 2, 9]), sectors - first)
                if number % 4 == 3:
                    await handler.discard(first * 512, count * 512)
                    data = bytes(count * 512)
                else:
                    data = random.randbytes(256) * (2 * count)
                    await handler.write(first * 512, IoVec([data]))
                for at in range(count):
                    written[first + at] = data[at * 512 : at * 512 + 512]
                if number % 3 == 2:
                    await handler.flush()
    except DOCUMENTED:
        return None
    return written


def one_input(data: bytes) -> None:
    put(data)
    good = look()
    before = trio.run(read_all, Qcow2Handler(PATH, read_only=True))
    assert PATH.read_bytes() == data, "what is only read has changed"
    for compress in (False, True):
        put(data)
        written = trio.run(change, Qcow2Handler(PATH, compress=compress, idle=None, log_size=1))
        if not good or written is None:
            continue
        # Nothing was wrong with it, and nothing went wrong.
        assert look(), check_image(PATH)
        after = trio.run(read_all, Qcow2Handler(PATH, read_only=True))
        assert after.keys() == before.keys()
        for offset, found in after.items():
            expected = before[offset]
            assert found is not None and expected is not None, f"byte {offset} cannot be read"
            for at in range(0, len(found), 512):
                wanted = written.get((offset + at) // 512, expected[at : at + 512])
                assert found[at : at + 512] == wanted, f"byte {offset + at} is not what was there or was written"


def seeds() -> Iterator[bytes]:
    """Images of qemu-img's and of ours, as small as they can be."""
    random = Random(2)
    raw = b"".join(random.choice([bytes(512), b"text" * 128, random.randbytes(512)]) for _ in range(16))
    with tempfile.TemporaryDirectory() as directory:
        source, image, backed = (Path(directory, name) for name in ("raw", "image", "backed"))
        source.write_bytes(raw)
        for options in (
            "cluster_size=512",
            "cluster_size=512,compat=0.10",
            "cluster_size=512,refcount_bits=1",
            "cluster_size=512,refcount_bits=64",
            "cluster_size=512,lazy_refcounts=on",
            "cluster_size=512,compression_type=zstd",
            "cluster_size=1024,compression_type=zstd",
            "cluster_size=2048",
        ):
            for flags in ((), ("-c",)):
                convert: list[str | Path] = [
                    "qemu-img",
                    "convert",
                    *flags,
                    "-f",
                    "raw",
                    "-O",
                    "qcow2",
                    "-o",
                    options,
                    source,
                    image,
                ]
                subprocess.run(convert, check=True)
                yield image.read_bytes()
                if not flags and "=1," not in options and "bits=1" not in options:
                    subprocess.run(["qemu-img", "snapshot", "-c", "name", image], check=True)
                    subprocess.run(["qemu-io", "-c", "write -P 1 512 2048", image], check=True, capture_output=True)
                    yield image.read_bytes()
        encrypt = ["--object", "secret,id=key,data=key", "-o", "encrypt.format=luks,encrypt.key-secret=key"]
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", *encrypt, image, "64K"], check=True)
        # Its keyslots are cut off.
        yield image.read_bytes()[:8192]
        create: list[str | Path] = [
            "qemu-img",
            "create",
            "-q",
            "-f",
            "qcow2",
            "-o",
            "cluster_size=512",
            "-b",
            image,
            "-F",
            "qcow2",
        ]
        subprocess.run([*create, backed], check=True)
        yield backed.read_bytes()
