"""What is done to qcow2 images that are not served, and what QEMU says of it."""

from __future__ import annotations

import json
import random
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trio
from click.testing import CliRunner

from tcmu_rs import IoVec, Options, _control, _resize, _top
from tcmu_rs._cli import main
from tcmu_rs._control import Message
from tcmu_rs._service import verbs
from tcmu_rs.handlers.qcow2 import Qcow2Error, Qcow2Handler, ZstdHandler, create
from tcmu_rs.handlers.qcow2.encryption import make_encryption
from tcmu_rs.handlers.ram import RamHandler
from tcmu_rs.testing import simulated

from . import qcow2
from .luks import CHEAP, PASSPHRASE, key
from .test_qcow2 import check, contents, qemu, random_image, random_writes, raw, work

MIB = 1 << 20
NOTHING = Options()

pytestmark = pytest.mark.skipif(shutil.which("qemu-img") is None, reason="qemu-utils is not installed")


class Story:
    """An image, what is on it, and what its snapshots have."""

    def __init__(self, path: Path, rng: random.Random) -> None:
        self.path = path
        self.rng = rng
        self.model = bytearray(raw(path))
        self.snapshots: dict[str, bytes] = {}
        self.count = 0

    async def write(self) -> None:
        await work(self.path, self.rng, self.model, 12, compress=self.rng.random() < 0.6)

    async def _snapshot(self, action: str, name: str) -> None:
        await Qcow2Handler.snapshot(str(self.path), NOTHING, action=action, name=name)

    async def create(self) -> None:
        self.count += 1
        name = f"s{self.count}"
        if self.rng.random() < 0.5:
            await self._snapshot("create", name)
        else:
            qemu("qemu-img", "snapshot", "-c", name, self.path)
        self.snapshots[name] = bytes(self.model)

    async def apply(self) -> None:
        if self.snapshots:
            name = self.rng.choice(list(self.snapshots))
            await self._snapshot("apply", name)
            self.model = bytearray(self.snapshots[name])

    async def delete(self) -> None:
        if self.snapshots:
            name = self.rng.choice(list(self.snapshots))
            await self._snapshot("delete", name)
            del self.snapshots[name]

    async def resize(self) -> None:
        size = self.rng.choice([self.rng.randrange(MIB, 6 * MIB, 512), len(self.model) + 65536])
        try:
            await Qcow2Handler.resize(str(self.path), NOTHING, size=size, shrink=True)
        except Qcow2Error as error:
            assert "version 2" in str(error)
            assert self.snapshots
            return
        self.model = self.model[:size] + bytes(max(0, size - len(self.model)))

    async def compact(self) -> None:
        try:
            await Qcow2Handler.compact(str(self.path), NOTHING)
        except Qcow2Error as error:
            assert "has snapshots" in str(error)

    async def judge(self) -> None:
        check(self.path)
        assert raw(self.path) == self.model
        found = await Qcow2Handler.check(str(self.path), NOTHING)
        assert found["ok"], found
        for name, content in self.snapshots.items():
            assert await contents(self.path, snapshot=name) == content


@pytest.mark.parametrize("seed", range(6))
async def test_snapshots_and_sizes(tmp_path: Path, seed: int) -> None:
    rng = random.Random(seed)
    path = tmp_path / "disk.qcow2"
    options: dict[str, Any] = {}
    if seed % 2:
        while options.get("refcount_bits", 1) < 8:
            for file in tmp_path.iterdir():
                file.unlink()
            options = {"refcount_bits": 16, **random_image(path, rng, 2 * MIB)}
        random_writes(path, rng, 2 * MIB, options["cluster_size"])
    else:
        create(path, 2 * MIB, cluster_size=rng.choice([512, 4096, 65536]), refcount_bits=rng.choice([8, 16, 64]))
    story = Story(path, rng)
    steps = [story.write] * 3 + [story.create] * 3 + [story.apply, story.delete, story.resize, story.compact]
    for _ in range(10):
        await rng.choice(steps)()
        await story.judge()


async def test_what_qemu_could_not_apply_any_more_is_not_resized(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    qcow2.make(path, MIB, "-o", "compat=0.10")
    async with Qcow2Handler(path) as disk:
        await disk.write(0, IoVec([b"x" * MIB]))
    await Qcow2Handler.snapshot(str(path), NOTHING, action="create", name="s")
    for size in (MIB // 2, 2 * MIB):
        with pytest.raises(Qcow2Error, match=r"qemu-img amend -f qcow2 -o compat=1\.1"):
            await Qcow2Handler.resize(str(path), NOTHING, size=size, shrink=True)
    check(path)
    assert raw(path) == b"x" * MIB
    qcow2.run("qemu-img", "amend", "-f", "qcow2", "-o", "compat=1.1", path)
    await Qcow2Handler.resize(str(path), NOTHING, size=MIB // 2, shrink=True)
    qcow2.run("qemu-img", "snapshot", "-a", "s", path)
    assert raw(path) == b"x" * MIB


async def test_a_flipped_bit_is_found_and_never_read(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, MIB, cluster_size=8192)
    text = b"all work and no play makes jack a dull boy\n" * 24385
    async with Qcow2Handler(path, compress=True) as disk:
        await disk.write(0, IoVec([text[:MIB]]))
    data = bytearray(path.read_bytes())
    at = data.find(b"\x28\xb5\x2f\xfd") + 40
    data[at] ^= 4
    path.write_bytes(data)
    found = await Qcow2Handler.check(str(path), NOTHING)
    assert not found["ok"]
    assert "damaged" in found["problems"][0]
    with pytest.raises(Exception, match=r"guest cluster .* damaged"):
        await contents(path)


async def test_a_log_that_was_left_is_replayed_by_repair(tmp_path: Path) -> None:
    path, left = tmp_path / "disk.qcow2", tmp_path / "left.qcow2"
    create(path, MIB)
    async with Qcow2Handler(path, compress=True) as disk:
        await disk.write(4096, IoVec([b"x" * 4096]))
        await disk.flush()
        shutil.copy(path, left)
    assert (await Qcow2Handler.info(str(left), NOTHING))["features"] == "log"
    assert await Qcow2Handler.check(str(left), NOTHING, repair=True) == {"ok": True, "problems": [], "repaired": True}
    check(left)
    assert raw(left)[4096:8192] == b"x" * 4096


async def test_snapshots_of_a_disk_in_service(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    keys = iter([PASSPHRASE])
    create(path, MIB, encryption=make_encryption([PASSPHRASE], kdf=CHEAP))
    # As somebody at a terminal, who is not asked again.
    async with simulated(Qcow2Handler(path, key_provider=lambda _: next(keys))) as disk:
        for number in (1, 2):
            await disk.write(0, bytes([number]) * 4096)
            await disk.device.change_snapshots("create", f"s{number}")
        await disk.write(4096, b"x" * 4096)
        for action, name, why in (
            ("create", "s1", "already"),
            ("delete", "s3", "no snapshot"),
            ("apply", "s1", "under"),
        ):
            with pytest.raises(ValueError, match=why):
                await disk.device.change_snapshots(action, name)
        assert await disk.read(0, 8192) == b"\2" * 4096 + b"x" * 4096
        (answer,) = [verb for name, verb in verbs(lambda: [disk.device]).items() if name == "snapshot"]
        request = Message({"name": disk.device.name, "action": "delete", "snapshot": "s2"}, [])
        assert await answer(request, None) == {}  # type: ignore[arg-type]
        await disk.device.resize(2 * MIB - 512)
        await disk.scsi(bytes(6))
        await disk.write(MIB, b"y" * 512)
    assert [one["name"] for one in await Qcow2Handler.snapshots(str(path), NOTHING)] == ["s1"]
    assert (await contents(path, key_provider=key, snapshot="s1"))[:4096] == b"\1" * 4096
    found = await contents(path, key_provider=key)
    assert found[:8192] == b"\2" * 4096 + b"x" * 4096 and found[MIB : MIB + 512] == b"y" * 512
    async with simulated(RamHandler(MIB)) as disk:
        with pytest.raises(TypeError, match="no snapshots in service: detach"):
            await disk.device.change_snapshots("create", "s1")


async def test_the_command_asks_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "disk.qcow2"
    create(path, MIB)

    async def run(*words: str) -> str:
        invoke = partial(CliRunner().invoke, main, ["snapshot", *words])
        return (await trio.to_thread.run_sync(invoke)).output

    async with simulated(Qcow2Handler(path)) as disk, trio.open_nursery() as nursery:
        serving = partial(_control.serve, verbs(lambda: [disk.device]), directory=tmp_path / "run")
        socket = await nursery.start(serving)
        device = SimpleNamespace(name=disk.device.name, pid=1)
        monkeypatch.setattr(_resize, "find", lambda *_: device)
        monkeypatch.setattr(_control, "sockets", lambda _: [socket])
        await disk.write(0, b"x" * 4096)
        assert await run("create", f"qcow2:{path}", "one") == ""
        await disk.write(0, b"y" * 4096)
        other = await nursery.start(
            partial(_control.serve, {"upgrade": verbs(list)["resize"]}, directory=tmp_path / "run")
        )
        monkeypatch.setattr(_control, "sockets", lambda _: [other, socket])
        (found,) = await _top._ask(1, None)
        assert found["storage"]["commits"] >= 0
        assert "detach it first" in await run("apply", f"qcow2:{path}", "one")
        assert "there is no snapshot" in await run("delete", f"qcow2:{path}", "two")
        assert await disk.read(0, 4096) == b"y" * 4096
        device.pid = None
        assert "nobody serves it" in await run("delete", f"qcow2:{path}", "one")
        nursery.cancel_scope.cancel()
    check(path)
    assert (await contents(path, snapshot="one"))[:4096] == b"x" * 4096


async def test_the_level_is_chosen_when_the_image_is_made(tmp_path: Path) -> None:
    text = b"".join(b"%d bottles of beer on the wall\n" % number for number in range(40000))[:MIB]
    sizes = {}
    for level in ("1", "19"):
        path = tmp_path / f"{level}.qcow2"
        options = Options(size=MIB, extra={"level": level, "cluster-size": "64K"})
        async with await ZstdHandler.create(str(path), options):
            pass
        # QEMU keeps what it does not know.
        qemu("qemu-img", "amend", "-f", "qcow2", "-o", "lazy_refcounts=on", path)
        async with ZstdHandler(path) as disk:
            await disk.write(0, IoVec([text]))
            assert disk._writer is not None
            await disk._writer._destaging.destage()
            sizes[level] = disk.statistics()["stored_bytes"]
        check(path)
        found = await ZstdHandler.info(str(path), NOTHING)
        assert found["level"] == int(level)
        await ZstdHandler.compact(str(path), NOTHING)
        assert (await ZstdHandler.info(str(path), NOTHING))["level"] == int(level)
        assert raw(path) == text
    assert sizes["19"] < sizes["1"]
    with pytest.raises(ValueError, match="level is 23; for zstd it is 1 to 22"):
        create(tmp_path / "x", MIB, level=23)


def test_the_commands(tmp_path: Path) -> None:
    path = tmp_path / "disk.qcow2"
    spec = f"zstd:{path}"

    def run(*words: str) -> str:
        result = CliRunner().invoke(main, [*words], standalone_mode=False)
        assert result.exit_code == 0, (result.output, result.exception)
        return result.output

    run("create", spec, "--size", "1M", "-o", "cluster-size=16K")
    run("snapshot", "create", spec, "before")
    run("resize", spec, "--size", "2M")
    assert [one["name"] for one in json.loads(run("snapshot", "list", spec, "--json"))] == ["before"]
    assert "before" in run("snapshot", "list", spec)
    run("snapshot", "apply", spec, "before")
    run("snapshot", "delete", spec, "1")
    assert json.loads(run("compact", spec, "--json"))["after"] < 1 << 20
    found = json.loads(run("info", spec, "--json"))
    assert (found["size"], found["cluster size"], found["snapshots"]) == (MIB, 16384, {})
    assert "in order" in run("check", spec)
