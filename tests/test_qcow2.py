"""qcow2 against QEMU: images of every kind, made and written by its tools, read by us, and the other way round."""

from __future__ import annotations

import errno
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from tcmu_rs import IoVec, Options
from tcmu_rs.handlers.qcow2 import Qcow2Error, Qcow2Handler, Storage, ZstdHandler, create
from tcmu_rs.handlers.qcow2.codecs import Codec
from tcmu_rs.testing import check_block_handler

from .conftest import Log

MIB = 1 << 20

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-utils is not installed")


def qemu(*command: object, code: int = 0) -> str:
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, check=False)
    assert result.returncode == code, result.stdout + result.stderr
    return result.stdout


def check(path: Path) -> None:
    """`qemu-img check` finds neither errors nor leaks."""
    qemu("qemu-img", "check", "-q", "-f", "qcow2", path)


def raw(path: Path) -> bytes:
    """What QEMU reads."""
    out = path.with_suffix(".raw")
    qemu("qemu-img", "convert", "-f", "qcow2", "-O", "raw", path, out)
    return out.read_bytes()


async def contents(path: Path, **arguments: Any) -> bytes:
    """What we read."""
    async with Qcow2Handler(path, read_only=True, **arguments) as disk:
        data = bytearray(disk.size)
        await disk.read(0, IoVec([data]))
        return bytes(data)


def random_image(path: Path, rng: random.Random, size: int) -> dict[str, Any]:
    """Makes an image with options that are drawn, empty or over a backing file."""
    bits = rng.choice([9, 10, 12, 13, 16, 18, 21])
    options: dict[str, Any] = {"cluster_size": 1 << bits, "compat": rng.choice(["0.10", "1.1"])}
    below: list[object] = []
    if options["compat"] == "1.1":
        options["compression_type"] = rng.choice(["zlib", "zstd"])
        options["refcount_bits"] = rng.choice([1, 2, 8, 16, 64])
        if bits >= 14 and rng.random() < 0.5:
            options["extended_l2"] = "on"
    if rng.random() < 0.2 and "extended_l2" not in options:
        options["preallocation"] = "metadata"
    elif rng.random() < 0.5:
        base = path.with_name(f"base-{path.stem}")
        kind = rng.choice(["raw", "qcow2"])
        qemu("qemu-img", "create", "-q", "-f", kind, base, size * 3 // 4)
        qemu("qemu-io", "-f", kind, "-c", f"write -P 7 0 {size // 2}", base)
        below = ["-b", base.name, "-F", kind]
    text = ",".join(f"{key}={value}" for key, value in options.items())
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", text, *below, path, size)
    return options


def random_writes(path: Path, rng: random.Random, size: int, cluster: int) -> None:
    words = []
    for _ in range(12):
        offset = rng.randrange(0, size, 512)
        length = min(rng.randrange(512, size // 12, 512), size - offset)
        fill = rng.randrange(1, 255)
        words.append(
            rng.choice(
                [
                    f"write -P {fill} {offset} {length}",
                    f"write -z {offset} {length}",
                    f"discard {offset} {length}",
                    # Fails where a cluster is allocated already.
                    f"write -c -P {fill} {offset // cluster * cluster} {cluster}",
                ]
            )
        )
    command = ["qemu-io", "-f", "qcow2"] + [part for word in words for part in ("-c", word)]
    subprocess.run([*command, str(path)], capture_output=True, check=False)


@pytest.mark.parametrize("seed", range(16))
async def test_what_qemu_wrote_is_read(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path / "disk.qcow2"
    options = random_image(path, rng, 4 * MIB)
    random_writes(path, rng, 4 * MIB, options["cluster_size"])
    assert await contents(path) == raw(path), options


@pytest.mark.parametrize("cluster_size", [512, 4096, 8192, 65536, 2 * MIB])
@pytest.mark.parametrize("refcount_bits", [1, 8, 16, 64])
def test_an_image_that_we_made_is_in_order(tmp_path: Path, cluster_size: int, refcount_bits: int) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, 64 * MIB, cluster_size=cluster_size, refcount_bits=refcount_bits)
    check(path)


async def test_a_snapshot_is_read(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, MIB)
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 64k", path)
    qemu("qemu-img", "snapshot", "-c", "before", path)
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 2 0 64k", path)
    assert (await contents(path))[:65536] == b"\2" * 65536
    assert (await contents(path, snapshot="before"))[:65536] == b"\1" * 65536
    assert (await contents(path, snapshot="1"))[:65536] == b"\1" * 65536
    with pytest.raises(Qcow2Error, match=r"no snapshot 'after'; there are: 1 \(before\)"):
        await contents(path, snapshot="after")


async def test_an_external_data_file_is_read(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/data", path, MIB)
    qemu("qemu-io", "-f", "qcow2", "-c", "write -P 1 0 100k", "-c", "write -P 2 512k 64k", path)
    assert await contents(path) == raw(path)


async def test_backing_files_stay_where_they_may_be(tmp_path: Path) -> None:
    inside, outside = tmp_path / "images", tmp_path / "secret"
    inside.mkdir()
    qemu("qemu-img", "create", "-q", "-f", "raw", outside, MIB)
    path = inside / "disk.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", "-b", "../secret", "-F", "raw", path)
    with pytest.raises(Qcow2Error, match=r"outside of .*backing-root"):
        await contents(path)
    assert await contents(path, backing_root=tmp_path) == bytes(MIB)
    (inside / "link").symlink_to(outside)
    qemu("qemu-img", "rebase", "-u", "-b", "link", "-F", "raw", path)
    with pytest.raises(Qcow2Error, match="outside of"):
        await contents(path)
    qemu("qemu-img", "rebase", "-u", "-b", "nbd://localhost", "-F", "raw", path)
    with pytest.raises(Qcow2Error, match="is no file"):
        await contents(path)
    qemu("qemu-img", "rebase", "-u", "-b", "disk.qcow2", "-F", "qcow2", path)
    with pytest.raises(Qcow2Error, match="its own backing file"):
        await contents(path)


async def test_zstd_is_not_written_as_something_else(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qemu("qemu-img", "create", "-q", "-f", "qcow2", path, MIB)
    with pytest.raises(Qcow2Error, match=r"compression type zlib.*compression=on"):
        async with ZstdHandler(path):
            pass
    async with ZstdHandler(path, read_only=True):
        pass
    async with Qcow2Handler(path, compress=True) as disk:
        await disk.write(0, IoVec([b"text" * 16384]))
    check(path)


async def test_what_is_not_understood_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, MIB)
    data = bytearray(path.read_bytes())
    data[72 + 3] = 0x10
    path.write_bytes(data)
    with pytest.raises(Qcow2Error, match="needs what is not supported: bit 36"):
        await contents(path)
    path.write_bytes(b"not an image")
    with pytest.raises(Qcow2Error, match="no qcow2 image"):
        await contents(path)


def some_data(rng: random.Random, length: int) -> bytes:
    """Incompressible, compressible, or all the same."""
    kind = rng.random()
    if kind < 0.3:
        return rng.randbytes(length)
    return bytes([rng.randrange(256)]) * length if kind < 0.7 else rng.randbytes(64) * (length // 64)


async def work(path: Path, rng: random.Random, model: bytearray, operations: int, **arguments: Any) -> None:
    """Random commands, on the disk and on a bytearray."""
    size = len(model)
    sizes: dict[str, Any] = {"cache_size": rng.choice([1 << 16, MIB, 32 * MIB]), "log_size": rng.choice([MIB, 4 * MIB])}
    async with Qcow2Handler(path, idle=rng.choice([None, 0.01]), **sizes, **arguments) as disk:
        for _ in range(operations):
            offset = rng.randrange(0, size, 512)
            length = rng.choice([512, 4096, 8192, 65536, rng.randrange(512, size // 8, 512)])
            length = min(length, size - offset)
            kind = rng.choices(["write", "write_zeroes", "discard", "flush", "read"], [55, 8, 8, 12, 17])[0]
            if kind == "write":
                data = some_data(rng, length)
                await disk.write(offset, IoVec([data]))
                model[offset : offset + length] = data
            elif kind == "flush":
                await disk.flush()
            elif kind == "read":
                found = bytearray(length)
                await disk.read(offset, IoVec([found]))
                assert found == model[offset : offset + length]
            else:
                await (disk.discard if kind == "discard" else disk.write_zeroes)(offset, length)
                model[offset : offset + length] = bytes(length)


@pytest.mark.parametrize("seed", range(12))
async def test_what_we_wrote_qemu_reads(tmp_path: Path, seed: int) -> None:
    """Several times opened and closed, and in between `qemu-img check` finds nothing."""
    rng = random.Random(seed)
    path, size = tmp_path / "disk.qcow2", 4 * MIB
    options: dict[str, Any]
    if seed % 2:
        options = random_image(path, rng, size)
        random_writes(path, rng, size, options["cluster_size"])
    else:
        options = {
            "cluster_size": rng.choice([512, 4096, 8192, 65536, 2 * MIB]),
            "compression": rng.choice(["zlib", "zstd"]),
            "refcount_bits": rng.choice([1, 8, 16, 64]),
        }
        create(path, size, **options)
    model = bytearray(raw(path))
    for _ in range(3):
        await work(path, rng, model, 40, compress=rng.random() < 0.6)
        check(path)
        assert raw(path) == model, options


@pytest.mark.parametrize("handler", [Qcow2Handler, ZstdHandler])
async def test_obligations(tmp_path: Path, handler: type[Qcow2Handler]) -> None:
    path = tmp_path / "disk.qcow2"
    await handler.create(str(path), Options(size=4 * MIB))
    await check_block_handler(lambda: handler(path), persistent=True)
    check(path)


async def test_an_image_that_was_only_read_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, MIB)
    before = path.read_bytes()
    async with Qcow2Handler(path) as disk:
        await disk.read(0, IoVec([bytearray(4096)]))
        await disk.flush()
    assert path.read_bytes() == before


async def test_qemu_keeps_off_while_the_log_is_there(tmp_path: Path) -> None:
    path, left = tmp_path / "disk.qcow2", tmp_path / "left.qcow2"
    create(path, MIB)
    async with Qcow2Handler(path) as disk:
        await disk.write(0, IoVec([b"x" * 4096]))
        assert "lock" in subprocess.run(["qemu-img", "check", path], capture_output=True, text=True, check=False).stderr
        await disk.flush()
        # As after a crash.
        shutil.copy(path, left)
    refused = subprocess.run(["qemu-img", "check", left], capture_output=True, text=True, check=False)
    assert "tcmu write-ahead log" in refused.stderr
    assert (await contents(left))[:4096] == b"x" * 4096
    async with Qcow2Handler(left):
        pass
    check(left)
    assert raw(left)[:4096] == b"x" * 4096


async def test_an_image_in_use_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, MIB)
    async with Qcow2Handler(path):
        with pytest.raises(BlockingIOError, match="in use"):
            await contents(path)


async def test_discarded_space_is_given_back(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, 64 * MIB)
    async with Qcow2Handler(path, idle=0.01) as disk:
        data = random.Random(1).randbytes(8 * MIB)
        for at in range(0, 32 * MIB, len(data)):
            await disk.write(at, IoVec([data]))
        await disk.write(40 * MIB, IoVec([b"end" * 21845 + b"!"]))
        await disk.flush()
        full = path.stat().st_blocks * 512
        await disk.discard(0, 32 * MIB)
        for _ in range(3000):
            if path.stat().st_blocks * 512 <= full - 28 * MIB:
                break
            await trio.sleep(0.01)
        else:
            pytest.fail("it is not given back while the disk is idle")
    assert path.stat().st_blocks * 512 < MIB
    check(path)
    assert raw(path)[40 * MIB :].startswith(b"endend")


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A file system of 12 MiB."""
    mount = tmp_path / "small"
    mount.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(mount)]
    mounted = subprocess.run(command, capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"a small tmpfs cannot be mounted: {mounted.stderr.strip()}")
    yield mount
    subprocess.run(["umount", str(mount)], check=True)


@pytest.mark.parametrize("compress", [False, True])
async def test_a_full_file_system(small: Path, tmp_path: Path, log: Log, compress: bool) -> None:
    """A write that finds no space fails; none that was taken is lost, and after a discard there is space again."""
    rng = random.Random(1)
    path = small / "disk.qcow2"
    create(path, 64 * MIB, cluster_size=8192 if compress else 65536)
    model = bytearray(64 * MIB)
    refused = 0
    async with Qcow2Handler(path, compress=compress, idle=None, log_size=MIB) as disk:

        async def fill(count: int) -> int:
            failed = 0
            for number in range(count):
                offset = rng.randrange(0, 64 * MIB, 65536)
                data = rng.randbytes(65536)
                try:
                    await disk.write(offset, IoVec([data]))
                    model[offset : offset + 65536] = data
                    if number % 16 == 0:
                        await disk.flush()
                except OSError as error:
                    assert error.errno == errno.ENOSPC, error
                    failed += 1
                    # Parts of the command may be there.
                    found = bytearray(65536)
                    await disk.read(offset, IoVec([found]))
                    model[offset : offset + 65536] = found
            return failed

        refused = await fill(250)
        assert refused
        await disk.flush()
        await disk.discard(0, 32 * MIB)
        model[: 32 * MIB] = bytes(32 * MIB)
        await disk.flush()
        again = await fill(20)
        assert again < 20
        await disk.flush()
        found = bytearray(64 * MIB)
        await disk.read(0, IoVec([found]))
        assert found == model
    # The tasks in the background may have told of it.
    log.records.clear()
    check(path)
    shutil.copy(path, tmp_path / "copy")
    assert raw(tmp_path / "copy") == model


async def test_a_burst_of_small_writes_compresses_each_cluster_once(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, MIB, cluster_size=65536)
    async with Qcow2Handler(path, compress=True, idle=None) as disk:
        assert disk.statistics() == {"file_bytes": path.stat().st_blocks * 512}
        for at in range(0, 131072, 4096):
            await disk.write(at, IoVec([bytes([1 + at // 4096]) * 4096]))
        await disk.flush()
        found = disk.statistics()
        assert (found["cache_misses"], found["cache_hits"], found["destaged"], found["commits"]) == (2, 30, 0, 1)
    check(path)


async def test_flushes_that_wait_share_one_record(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, MIB)
    async with Qcow2Handler(path, idle=None) as disk:
        for at in range(0, MIB, 32768):
            await disk.write(at, IoVec([b"x" * 4096]))
        async with trio.open_nursery() as nursery:
            for _ in range(32):
                nursery.start_soon(disk.flush)
        # All of them ask in one pass of the loop: the first makes a record, and one more could be for the others.
        assert disk.statistics()["commits"] <= 2


async def test_the_refcount_table_grows(tmp_path: Path) -> None:
    """Clusters of 512 bytes: a table of one cluster is enough for 8 MiB."""
    path = tmp_path / "disk.qcow2"
    create(path, 32 * MIB, cluster_size=512)
    data = random.Random(1).randbytes(MIB)
    async with Qcow2Handler(path) as disk:
        for at in range(0, 12 * MIB, MIB):
            await disk.write(at, IoVec([data]))
        await disk.flush()
        shutil.copy(path, tmp_path / "left.qcow2")
        for at in range(12 * MIB, 20 * MIB, MIB):
            await disk.write(at, IoVec([data]))
    check(path)
    assert raw(path) == data * 20 + bytes(12 * MIB)
    assert (await contents(tmp_path / "left.qcow2"))[: 12 * MIB] == data * 12


class _BrokenStorage(Storage):
    """A disk that loses power, as far as fdatasync knows."""

    broken = False

    def fdatasync(self) -> None:
        if self.broken:
            raise OSError(errno.EIO, "Input/output error")
        super().fdatasync()

    async def sync(self) -> None:
        self.fdatasync()

    async def commit(self, offset: int, data: bytes, *, everything: bool) -> None:
        if self.broken:
            raise OSError(errno.EIO, "Input/output error")
        await super().commit(offset, data, everything=everything)


async def test_a_failed_flush_is_never_forgotten(tmp_path: Path, log: Log) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, MIB)
    files: list[_BrokenStorage] = []

    def opener(path: Path, *, writable: bool) -> Storage:
        files.append(_BrokenStorage(path, writable=writable))
        return files[-1]

    disk = Qcow2Handler(path, idle=None, storage=opener)
    await disk.open()
    await disk.write(0, IoVec([b"a" * 4096]))
    await disk.flush()
    await disk.write(0, IoVec([b"b" * 4096]))
    files[0].broken = True
    with pytest.raises(OSError, match="Input/output error"):
        await disk.flush()
    files[0].broken = False
    for _ in range(2):
        with pytest.raises(OSError, match="an earlier flush failed"):
            await disk.flush()
        with pytest.raises(OSError, match="an earlier flush failed"):
            await disk.write(8192, IoVec([b"c" * 4096]))
    found = bytearray(4096)
    await disk.read(0, IoVec([found]))
    assert found == b"b" * 4096
    with pytest.raises(OSError, match="an earlier flush failed"):
        await disk.aclose()
    log.expect("nothing is written any more")
    async with Qcow2Handler(path):
        pass
    check(path)
    assert raw(path)[:4096] in (b"a" * 4096, b"b" * 4096)


async def test_clones_share_a_base_that_stays_as_it_is(tmp_path: Path) -> None:
    base = tmp_path / "base.qcow2"
    create(base, 8 * MIB, cluster_size=8192)
    data = random.Random(1).randbytes(8 * MIB)
    async with Qcow2Handler(base, compress=True) as disk:
        await disk.write(0, IoVec([data]))
    before = base.read_bytes()
    for number in range(10):
        path = tmp_path / f"clone{number}.qcow2"
        create(path, backing=base.name)
        async with Qcow2Handler(path, compress=number % 2 == 0) as disk:
            await disk.write(number << 16, IoVec([b"mine" * 128]))
            await disk.discard(MIB, 65536)
        model = bytearray(data)
        model[number << 16 : (number << 16) + 512] = b"mine" * 128
        model[MIB : MIB + 65536] = bytes(65536)
        check(path)
        assert raw(path) == model
        assert path.stat().st_blocks * 512 < MIB
    assert base.read_bytes() == before


async def test_what_is_below_is_read_as_what_is_above(tmp_path: Path) -> None:
    """Compressed clusters of a base are no work for the event loop either."""
    rng = random.Random(1)
    model = bytearray(2 * MIB)
    paths = [tmp_path / f"{number}.qcow2" for number in range(3)]
    # The one in the middle is smaller than both others.
    for number, (size, cluster_size) in enumerate([(2 * MIB, 8192), (MIB + 512, 65536), (2 * MIB, 4096)]):
        create(paths[number], size, cluster_size=cluster_size, backing=paths[number - 1].name if number else None)
        model[size:] = bytes(len(model) - size)
        async with Qcow2Handler(paths[number], compress=True) as disk:
            for _ in range(8 if number else 40):
                length = min(rng.randrange(512, 65536, 512), size)
                at = rng.randrange(0, size - length + 1, 512)
                data = rng.randbytes(length // 2).ljust(length, b"x")
                await disk.write(at, IoVec([data]))
                model[at : at + length] = data
    async with Qcow2Handler(paths[2]) as disk:
        image = disk._image
        assert image is not None
        found = bytearray(2 * MIB)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Codec, "whole", None)
            readings = image.begin(0, IoVec([found]))
            assert {reading.image.storage.path for reading in readings} == {*paths}
            assert await image.finish(readings)
        assert found == model
        for _ in range(300):
            length = rng.randrange(512, 40000, 512)
            at = rng.randrange(0, len(model) - length, 512)
            found = bytearray(length)
            await disk.read(at, IoVec([found]))
            assert found == model[at : at + length]
    for path in paths:
        check(path)
