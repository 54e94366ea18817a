"""qcow2 against QEMU: images of every kind, made and written by its tools, read by us, and the other way round."""

from __future__ import annotations

import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tcmu_rs import IoVec
from tcmu_rs.handlers.qcow2 import Qcow2Error, Qcow2Handler, create

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
