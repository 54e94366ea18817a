"""Random commands on images of qemu-img's and of our own: QEMU's tools and a bytearray agree with us all the time.

`TCMU_EXAMPLES=2000` makes it long.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
import trio
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, precondition, rule, run_state_machine_as_test

from tcmu_rs import BlockHandler, Options
from tcmu_rs.handlers.qcow2 import Qcow2Error
from tcmu_rs.handlers.qcow2.handler import Qcow2Handler
from tcmu_rs.handlers.qcow2.storage import Storage
from tcmu_rs.handlers.qcow2.tools import create
from tcmu_rs.testing.model import BlockMachine

from .qcow2 import Audited, check, run

EXAMPLES = int(os.environ.get("TCMU_EXAMPLES", "15"))
SECTOR = 512

needs_qemu = pytest.mark.skipif(
    shutil.which("qemu-img") is None and os.environ.get("CI") != "true", reason="QEMU's tools are needed"
)


@dataclass(frozen=True)
class Kind:
    """How an image is made.

    Attributes:
        size: Of the disk, in sectors.
        options: For `qemu-img create -o`.
        ours: Made by us, with those of the options that we have.
        backing: Sectors of the backing file; 0 for none.
        backing_format: Of it.
        compress: Whether we write compressed clusters.
        seed: Of what the backing file holds.
    """

    size: int
    options: dict[str, str]
    ours: bool
    backing: int
    backing_format: str
    compress: bool
    seed: int


@st.composite
def kinds(draw: st.DrawFn) -> Kind:
    """Every kind of image that QEMU makes and we write."""
    options = {"cluster_size": draw(st.sampled_from(["512", "1k", "4k", "8k", "64k", "2M"]))}
    backing = draw(st.sampled_from([0, 0, 100, 1000]))
    if draw(st.booleans()):
        options["compat"] = "0.10"
    else:
        options["refcount_bits"] = draw(st.sampled_from(["1", "2", "4", "8", "16", "32", "64"]))
        options["compression_type"] = draw(st.sampled_from(["zlib", "zstd"]))
        options["lazy_refcounts"] = draw(st.sampled_from(["off", "off", "on"]))
        if options["cluster_size"] in ("64k", "2M") and draw(st.booleans()):
            options["extended_l2"] = "on"
    if not backing:
        options["preallocation"] = draw(st.sampled_from(["off", "off", "metadata", "falloc", "full"]))
    return Kind(
        size=draw(st.integers(1, 2000)),
        options=options,
        ours=draw(st.booleans()),
        backing=backing,
        backing_format=draw(st.sampled_from(["raw", "qcow2"])),
        compress=draw(st.booleans()),
        seed=draw(st.integers(0, 1 << 16)),
    )


class Tracked(bytearray):
    """What the disk has to hold, and for each sector what it may hold if the server dies before the next flush."""

    maybe: dict[int, set[bytes]]

    def settle(self) -> None:
        """Nothing of it can be lost any more."""
        self.maybe = {}

    def __setitem__(self, where: Any, data: Any) -> None:
        assert isinstance(where, slice)
        for sector in range(where.start // SECTOR, where.stop // SECTOR):
            at = sector * SECTOR
            self.maybe.setdefault(sector, {bytes(self[at : at + SECTOR])}).add(
                bytes(data[at - where.start : at - where.start + SECTOR])
            )
        super().__setitem__(where, data)

    def accept(self, found: bytes) -> None:
        """What is there after the server died: old or new; from now on it stays."""
        assert len(found) == len(self)
        for at in range(0, len(found), SECTOR):
            sector, content = at // SECTOR, found[at : at + SECTOR]
            allowed = self.maybe.get(sector, {bytes(self[at : at + SECTOR])})
            assert content in allowed, f"sector {sector} has {content[:8].hex()}…, which nobody wrote"
        super().__setitem__(slice(0, len(found)), found)
        self.settle()


class Frozen(Storage):
    """A file that nobody changes while it is copied: what a server that dies leaves is of one moment."""

    lock = threading.Lock()

    def pwrite(self, offset: int, views: Sequence[Any]) -> None:
        with self.lock:
            super().pwrite(offset, views)

    def truncate(self, size: int) -> None:
        with self.lock:
            super().truncate(size)

    def punch(self, offset: int, length: int) -> bool:
        with self.lock:
            return super().punch(offset, length)


class Qcow2Machine(BlockMachine):
    """The rules of `BlockMachine`, and what QEMU does to an image meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.directory = Path(tempfile.mkdtemp())
        self.path = self.directory / "image"
        self.snapshots: dict[str, bytes] = {}
        self.serial = 0
        self.kind: Kind
        self._model: Tracked

    @initialize(kind=kinds())
    def open(self, kind: Kind) -> None:
        """Makes the image, and compares what it holds at first."""
        self.kind = kind
        content = bytearray(kind.size * SECTOR)
        if kind.backing:
            below = Random(kind.seed).randbytes(kind.backing * SECTOR)
            (self.directory / "raw").write_bytes(below)
            run("qemu-img", "convert", "-O", kind.backing_format, self.directory / "raw", self.directory / "base")
            content[: len(below)] = below[: len(content)]
        if kind.ours:
            create(
                self.path,
                len(content),
                cluster_size=_bytes(kind.options["cluster_size"]),
                compression=kind.options.get("compression_type", "zstd"),
                refcount_bits=int(kind.options.get("refcount_bits", "16")),
                backing="base" if kind.backing else None,
                backing_format=kind.backing_format if kind.backing else None,
            )
        else:
            options = ",".join(f"{key}={value}" for key, value in kind.options.items())
            backing = ["-b", "base", "-F", kind.backing_format] if kind.backing else []
            run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, *backing, self.path, len(content))
        self._model = Tracked(content)
        self._model.settle()
        self._start()
        self._expect(0, self._handler.size)

    @property
    def counts_many(self) -> bool:
        """Whether a cluster can be in all snapshots, and in the disk, however many compressed ones are in it."""
        return int(self.kind.options.get("refcount_bits", "16")) >= 8

    def make_handler(self) -> BlockHandler:
        sizes: dict[str, Any] = {"cache_size": 128 << 10, "log_size": 1 << 20}
        return Audited(self.path, compress=self.kind.compress, idle=0.01, storage=Frozen, **sizes)

    def teardown(self) -> None:
        try:
            super().teardown()
            if hasattr(self, "_loop") and not self._failed:
                self.judge(whole=True)
        finally:
            shutil.rmtree(self.directory)

    @rule()
    def flush(self) -> None:
        """SYNCHRONIZE CACHE."""
        super().flush()
        self._model.settle()

    def closed(self) -> None:
        self._failed = True
        self._loop.stop()
        self._model.settle()
        self.judge()

    def opened(self) -> None:
        self._start()
        self._expect(0, self._handler.size)

    def judge(self, *, whole: bool = False) -> None:
        """QEMU finds nothing wrong with the closed image, and reads from it what it should.

        With `whole` also what snapshots hold and what is said to be zero: most of the time goes into starting QEMU.
        """
        check(self.path)
        raw = self.directory / "model"
        raw.write_bytes(self._model)
        run("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", raw, self.path)
        if not whole:
            return
        for extent in json.loads(run("qemu-img", "map", "--output=json", "-f", "qcow2", self.path)):
            if extent["zero"]:
                stop = min(extent["start"] + extent["length"], len(self._model))
                assert not any(self._model[extent["start"] : stop]), f"QEMU has zeroes at {extent}"
        for name, content in self.snapshots.items():
            copy = self.directory / "snapshot"
            run("qemu-img", "convert", "-f", "qcow2", "-l", name, "-O", "raw", self.path, copy)
            # QEMU takes the size of the disk as it is now for that of the snapshot.
            found = copy.read_bytes()[: len(content)]
            assert found == content[: len(found)], f"snapshot {name} has changed"

    @rule()
    def close_and_open(self) -> None:
        """Closes the image, has it judged, and opens it again."""
        self.closed()
        self.opened()

    @rule(
        where=st.tuples(st.integers(0, 2000), st.integers(1, 300)),
        fill=st.integers(1, 255),
        verb=st.sampled_from("wwzdc"),
    )
    def qemu_writes(self, where: tuple[int, int], fill: int, verb: str) -> None:
        """qemu-io writes, zeroes, discards, or writes a compressed cluster."""
        self.closed()
        offset, length = self._range(*where)
        model = self._model
        if verb == "c":
            cluster = _bytes(self.kind.options["cluster_size"])
            offset = offset // cluster * cluster
            length = min(cluster, len(model) - offset)
            if self.kind.options.get("extended_l2") or model[offset : offset + length] != bytes(length):
                # QEMU compresses into empty clusters only.
                verb = "w"
        commands = {
            "w": f"write -P {fill} {offset} {length}",
            "z": f"write -z {offset} {length}",
            "d": f"write -z -u {offset} {length}",
            "c": f"write -c -P {fill} {offset} {length}",
        }
        try:
            run("qemu-io", "-f", "qcow2", "-c", commands[verb], self.path)
        except AssertionError:
            # It was allocated although it was zero.
            assert verb == "c"
        else:
            model[offset : offset + length] = bytes([fill if verb in "wc" else 0]) * length
        model.settle()
        self.opened()

    @precondition(lambda self: hasattr(self, "kind") and len(self.snapshots) < 3)
    @rule(ours=st.booleans())
    def snapshot(self, ours: bool) -> None:
        """Somebody makes a snapshot: from now on all clusters are shared."""
        self.closed()
        self.serial += 1
        name = f"s{self.serial}"
        if self._branch("create", name, ours=ours):
            self.snapshots[name] = bytes(self._model)
        self.opened()

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data(), action=st.sampled_from(["apply", "delete"]), ours=st.booleans())
    def apply_or_delete(self, data: st.DataObject, action: str, ours: bool) -> None:
        """Somebody goes back to a snapshot, or deletes one."""
        name = data.draw(st.sampled_from(sorted(self.snapshots)))
        self.closed()
        if self._branch(action, name, ours=ours):
            if action == "apply":
                self._model = Tracked(self.snapshots[name])
                self._model.settle()
            else:
                del self.snapshots[name]
        self.opened()

    def _branch(self, action: str, name: str, *, ours: bool) -> bool:
        """Whether it is done; refcounts of few bits may not be able to count what it would share."""
        if not (ours or self.counts_many):
            # QEMU leaves leaks then.
            return False
        if not ours:
            run("qemu-img", "snapshot", f"-{action[0]}", name, self.path)
            return True
        try:
            trio.run(partial(Qcow2Handler.snapshot, str(self.path), Options(), action=action, name=name))
        except Qcow2Error as error:
            assert "cannot count" in str(error) and not self.counts_many
            self.judge()
            return False
        return True

    @precondition(lambda self: self.snapshots)
    @rule(data=st.data())
    def read_snapshot(self, data: st.DataObject) -> None:
        """We read what a snapshot holds."""
        name = data.draw(st.sampled_from(sorted(self.snapshots)))
        self.closed()
        current, content = self._model, self.snapshots[name]
        self.make_handler, make = lambda: Qcow2Handler(self.path, snapshot=name), self.make_handler  # type: ignore[method-assign]
        self._model = Tracked(content)
        self._model.settle()
        try:
            self.opened()
            self._failed = True
            self._loop.stop()
        finally:
            self.make_handler = make  # type: ignore[method-assign]
            self._model = current
        self.opened()

    @precondition(
        lambda self: not (hasattr(self, "kind") and self.kind.options.get("compat") == "0.10" and self.snapshots)
    )
    @rule(sectors=st.integers(1, 2700), ours=st.booleans())
    def resize(self, sectors: int, ours: bool) -> None:
        """Somebody makes the disk larger or smaller."""
        size = sectors * SECTOR
        if not ours and (size < len(self._model) or self.snapshots or self.kind.backing * SECTOR > len(self._model)):
            # QEMU cannot resize with snapshots, nor always where what is below would show.
            ours = True
        self.closed()
        if ours:
            trio.run(partial(Qcow2Handler.resize, str(self.path), Options(), size=size, shrink=True))
        else:
            run("qemu-img", "resize", "-q", "-f", "qcow2", self.path, size)
        self._model = Tracked(bytes(self._model)[:size].ljust(size, b"\0"))
        self._model.settle()
        self.opened()

    @rule()
    def die(self) -> None:
        """The server dies: what it has in memory is lost, the log is not."""
        other = self.directory / f"image{self.serial + 1}"
        self.serial += 1
        with Frozen.lock:
            shutil.copyfile(self.path, other)
        model = self._model
        self._failed = True
        self._loop.stop()
        self.path.unlink()
        self.path = other
        self._start()
        model.accept(self._call(lambda disk: disk.read(0, disk.size)))
        self._expect(0, self._handler.size)


def _bytes(text: str) -> int:
    return int(text.rstrip("kM")) << {"k": 10, "M": 20}.get(text[-1], 0)


@needs_qemu
def test_qemu_agrees() -> None:
    run_state_machine_as_test(
        Qcow2Machine,
        settings=settings(
            max_examples=EXAMPLES,
            stateful_step_count=12,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )
