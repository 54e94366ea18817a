"""Handlers that others write: the README's, and one that no package announces."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from pathlib import Path

from .disks import MIB, KernelLog, attached, end, run, use

README = Path(__file__).parents[2] / "README.md"

MIRROR = '''
"""A disk that is stored twice."""
import os
import tcmu_rs


class Mirror(tcmu_rs.BlockHandler):
    block_size = 4096
    max_in_flight = 8

    def __init__(self, *paths):
        self.paths = paths

    @classmethod
    def from_config(cls, config, options):
        return cls(*config.split(","))

    async def open(self):
        self.files = [os.open(path, os.O_RDWR) for path in self.paths]
        self.size = min(os.lseek(file, 0, os.SEEK_END) for file in self.files)

    async def aclose(self):
        for file in self.files:
            os.close(file)

    async def read(self, offset, iov):
        assert os.preadv(self.files[0], iov, offset) == iov.nbytes

    @tcmu_rs.blocking
    def write(self, offset, iov):
        for file in self.files:
            assert os.pwritev(file, iov, offset) == iov.nbytes

    @tcmu_rs.blocking
    def flush(self):
        for file in self.files:
            os.fdatasync(file)
'''


def test_the_readmes_program_is_a_disk(tmp_path: Path) -> None:
    (program,) = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)[:1]
    (tmp_path / "program.py").write_text(program)
    log = KernelLog()
    server = subprocess.Popen([sys.executable, tmp_path / "program.py"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        said = server.stdout.readline()
        device = re.match(r"(/dev/sd[a-z]+): 1073741824 bytes", said)
        assert device, said
        (tmp_path / "mounted").mkdir()
        use(device[1], "ext4", tmp_path / "mounted")
        server.send_signal(signal.SIGINT)
        server.wait(60)
    finally:
        end(server)
    assert not Path(device[1]).exists()
    assert not list(Path("/sys/kernel/config/target/core").glob("user_*/*/wwn"))
    assert log.complaints() == []
    log.close()


def test_a_handler_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(MIRROR)
    halves = [tmp_path / "left", tmp_path / "right"]
    for half in halves:
        run("truncate", "-s", str(64 * MIB), half)
    (tmp_path / "mounted").mkdir()
    spec = f"mirror:{halves[0]},{halves[1]}"
    with attached(spec, "--handler", "mine:Mirror", directory=tmp_path) as disk:
        assert (disk.size, disk.block_size) == (64 * MIB, 4096)
        use(disk.path, "ext4", tmp_path / "mounted")
    run("cmp", *halves)
    run("fsck.ext4", "-fn", halves[1])
