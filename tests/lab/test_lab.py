"""The lab itself: what it says of a job must be what happened in the guest."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest

from . import CHECKOUT, MissingError, Verdict, provide
from .machine import _Records
from .plugin import Lab

ODD_BYTES = bytes(range(256)) + b"\r\n\x1e\x1e0123456789abcdef \x1e"


@pytest.mark.parametrize("size", [1, 2, 7, 64, 1000])
def test_records_are_told_from_output_however_the_stream_is_cut(size: int) -> None:
    nonce = "00ff" * 8
    almost = b"\x1e" + nonce[:-1].encode() + b"\x1e"
    stream = b"\x1e%s started\x1e" % nonce.encode() + ODD_BYTES + almost + b"\x1e%s exited 7\x1e" % nonce.encode()
    records = _Records(nonce)
    pieces = [piece for at in range(0, len(stream), size) for piece in records.feed(stream[at : at + size])]
    assert [piece for piece in pieces if isinstance(piece, str)] == ["started", "exited 7"]
    assert b"".join(piece for piece in pieces if isinstance(piece, bytes)) == ODD_BYTES + almost
    assert records.rest() == b""


def test_output_that_might_become_a_record_is_not_lost_at_the_end() -> None:
    records = _Records("00ff")
    assert b"".join(piece for piece in records.feed(b"ab\x1e00") if isinstance(piece, bytes)) == b"ab"
    assert records.rest() == b"\x1e00"


def test_output_is_shown_as_soon_as_it_cannot_be_a_record() -> None:
    """A prompt without a newline must not wait for the next line."""
    assert list(_Records("00ff").feed(b"prompt> ")) == [b"prompt> "]


def test_a_missing_kernel_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TCMU_LAB_CACHE", str(tmp_path))
    monkeypatch.setenv("TCMU_LAB_KERNEL", "linux-image-none")
    monkeypatch.setattr("tests.lab.provision.missing_programs", list[str])
    with pytest.raises(MissingError) as raised:
        provide(install=False)
    assert "linux-image-none" in raised.value.piece
    assert f"TCMU_LAB_CACHE={tmp_path}" in raised.value.remedy
    assert "-m tests.lab install" in raised.value.remedy


def test_missing_programs_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.lab.provision.LAB_PROGRAMS", {"no-such-program": "no-such-package"})
    with pytest.raises(MissingError, match=r"the lab needs no-such-program; run `.*install` in the checkout"):
        provide(install=False)


def test_processes_that_build_the_same_initramfs_do_not_disturb_each_other(
    lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    package = lab.provision.kernel.image.parent
    Path(tmp_path, "kernels").mkdir()
    Path(tmp_path, "kernels", "shared").symlink_to(package)
    monkeypatch.setenv("TCMU_LAB_CACHE", str(tmp_path))
    monkeypatch.setenv("TCMU_LAB_KERNEL", "shared")
    built: list[bytes] = []

    def build() -> None:
        built.append(provide(install=False).initramfs.read_bytes())

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert built == [lab.provision.initramfs.read_bytes()] * 4
    assert len(list(Path(tmp_path, "initramfs").iterdir())) == 1


def test_what_a_job_does_and_says_comes_back_unchanged(lab: Lab, tmp_path: Path) -> None:
    odd = tmp_path / "odd"
    odd.write_bytes(ODD_BYTES)
    job = f"""
        cat {odd}
        echo error >&2
        echo again >/dev/stdout
        seq 200000
        [[ $GREETING == "it's \\"quoted\\" \\$HOME" ]] && pwd
        cp -r /sys/class/uio /dev/null
        (sleep 0.1; echo late) &
        echo done >"$TCMU_LAB_SHARED/file"
        kill -TERM $$
    """
    with lab.machine(job, env={"GREETING": 'it\'s "quoted" $HOME'}) as machine:
        result = machine.wait()
        assert Path(machine.shared, "file").read_text() == "done\n"
    numbers = "".join(f"{number}\n" for number in range(1, 200001)).encode()
    assert result.output.startswith(ODD_BYTES + b"error\nagain\n" + numbers + f"{CHECKOUT}\n".encode())
    assert result.verdict is Verdict.EXITED
    assert result.returncode == 128 + 15
    assert result.kernel_faults == []
    assert "Linux version" in result.dmesg


def test_a_backstore_is_made_and_removed_by_plain_shell(lab: Lab) -> None:
    result = lab.run("""
        set -e
        grep -q '^target_core_user ' /proc/modules
        hba=/sys/kernel/config/target/core/user_0
        mkdir -p $hba/disk
        printf 'dev_config=test/disk,dev_size=1048576' >$hba/disk/control
        printf 'hw_block_size=512,nl_reply_supported=-1' >$hba/disk/control
        printf 1 >$hba/disk/enable
        cat /sys/class/uio/uio0/name
        [[ -c /dev/uio0 ]]
        rmdir $hba/disk $hba
        [[ ! -e /dev/uio0 ]] && [[ ! -e /sys/class/uio/uio0 ]]
    """)
    assert result.check().text == "tcm-user/0/disk/test/disk\n"
    assert result.kernel_faults == []


def test_a_job_that_hangs_times_out_and_is_named(lab: Lab) -> None:
    result = lab.run("echo before; sleep 1000", timeout=2)
    assert (result.verdict, result.returncode) == (Verdict.TIMED_OUT, None)
    assert result.output == b"before\n"
    assert "sleep 1000" in result.dmesg
    assert "timed out" in result.report()


def test_a_panic_is_no_time_out(lab: Lab) -> None:
    result = lab.run("echo before; echo c >/proc/sysrq-trigger; sleep 1000")
    assert (result.verdict, result.returncode) == (Verdict.PANICKED, None)
    assert result.output == b"before\n"
    assert any("sysrq triggered crash" in line for line in result.kernel_faults)
    assert "sysrq triggered crash" in result.report()


def test_what_reached_the_disk_survives_a_power_cut_and_nothing_else(lab: Lab, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(1 << 20))
    job = """
        exec 3<>/dev/vda
        printf durable >&3 && sync /dev/vda
        printf volatile >&3 && echo written
        sleep 1000
    """
    with lab.machine(job, disks=[disk]) as machine:
        machine.wait_for_output(b"written\n")
        machine.kill()
        result = machine.wait()
    assert (result.verdict, result.returncode) == (Verdict.KILLED, None)
    assert disk.read_bytes() == b"durable".ljust(1 << 20, b"\0")


def test_a_job_that_brings_the_machine_down_has_not_exited(lab: Lab) -> None:
    assert lab.run("echo b >/proc/sysrq-trigger; sleep 1000").verdict is Verdict.GONE


@pytest.mark.usefixtures("lab")
def test_the_command_line_passes_output_and_status_through() -> None:
    command = [sys.executable, "-m", "tests.lab", "run", "--env", "A=b", 'printf "$A\\0"; exit 3']
    done = subprocess.run(command, cwd=CHECKOUT, capture_output=True, check=False, timeout=600)
    assert (done.returncode, done.stdout) == (3, b"b\0")


GUEST_TESTS = """
import os, time
from pathlib import Path
import pytest

pytestmark = pytest.mark.guest

def test_is_in_the_guest():
    assert os.uname().nodename == "lab"

@pytest.mark.parametrize("text", ["a b", "::[x]", "é"])
def test_odd_names(text):
    pass

def test_fails():
    left, right = "here", "there"
    print("seen before the failure")
    assert left == right

@pytest.mark.skip(reason="not this one")
def test_skipped():
    pass

@pytest.mark.xfail(strict=True)
def test_fails_as_expected():
    assert False

@pytest.fixture
def broken():
    yield
    raise RuntimeError("teardown broke")

def test_teardown(broken):
    pass

KERNEL_WARNING = "WARNING: CPU: 0 PID: 1 at nowhere\\n"

def test_warned_by_the_kernel():
    Path("/dev/kmsg").write_text(KERNEL_WARNING)

@pytest.mark.guest(kernel_faults=True)
def test_warned_as_expected():
    Path("/dev/kmsg").write_text(KERNEL_WARNING)

def test_kills_the_machine():
    Path("/proc/sysrq-trigger").write_text("c")
    time.sleep(1000)

def test_goes_on_after_a_panic():
    assert os.uname().nodename == "lab"

@pytest.mark.guest(timeout=2)
def test_hangs():
    time.sleep(1000)

def test_goes_on_after_a_hang():
    assert os.uname().nodename == "lab"

def test_not_selected():
    assert False
"""


def make_project(directory: Path, tests: str) -> None:
    Path(directory, "conftest.py").write_text('pytest_plugins = ["tests.lab.plugin"]\n')
    Path(directory, "pytest.ini").write_text(f"[pytest]\npythonpath = {CHECKOUT}\n")
    Path(directory, "test_inner.py").write_text(tests)


def run_pytest(
    directory: Path, *options: str, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run pytest as a process of its own, for this one's options and plugins not to matter."""
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options]
    done = subprocess.run(command, cwd=directory, env=env, capture_output=True, text=True, check=False, timeout=1800)
    print(done.stdout, done.stderr)
    return done


@pytest.mark.usefixtures("lab")
def test_what_guest_tests_do_is_reported_as_if_they_ran_here(tmp_path: Path) -> None:
    make_project(tmp_path, GUEST_TESTS)
    # Without pytest-trio, whose import takes ten seconds in the guest.
    done = run_pytest(tmp_path, "-v", "-rA", "-p", "no:trio", "-k", "not selected")
    assert done.returncode == pytest.ExitCode.TESTS_FAILED
    lines = done.stdout.splitlines()

    def outcome(test: str) -> str:
        # The first, as reports of dead machines repeat what the pytest inside has said.
        line = next(line for line in lines if line.startswith(f"test_inner.py::{test} "))
        return line.removeprefix(f"test_inner.py::{test} ").split()[0]

    assert outcome("test_is_in_the_guest") == "PASSED"
    assert outcome("test_odd_names[a b]") == "PASSED"
    assert outcome("test_odd_names[::[x]]") == "PASSED"
    assert outcome("test_skipped") == "SKIPPED"
    assert outcome("test_fails_as_expected") == "XFAIL"
    assert outcome("test_fails") == "FAILED"
    assert "E       AssertionError: assert 'here' == 'there'" in lines
    assert "seen before the failure" in lines
    assert "E       RuntimeError: teardown broke" in lines
    assert "the kernel reported faults of its own:" in lines
    assert outcome("test_kills_the_machine") == "FAILED"
    assert "sysrq triggered crash" in done.stdout
    assert outcome("test_goes_on_after_a_panic") == "PASSED"
    assert outcome("test_hangs") == "FAILED"
    assert "nothing happened for 2 s" in done.stdout
    assert outcome("test_goes_on_after_a_hang") == "PASSED"
    assert "3 failed, 9 passed, 1 skipped, 1 deselected, 1 xfailed, 2 errors" in lines[-1]


@pytest.mark.parametrize(("ci", "outcome"), [("", "2 skipped"), ("true", "2 errors")])
def test_where_the_lab_is_incomplete_tests_are_skipped_and_fail_under_ci(tmp_path: Path, ci: str, outcome: str) -> None:
    make_project(
        tmp_path,
        """
import pytest

@pytest.mark.guest
def test_inside():
    raise AssertionError("ran outside")

def test_outside(lab):
    raise AssertionError("ran without a lab")
""",
    )
    # Without a PATH there is no QEMU, and no dpkg either to install it with.
    done = run_pytest(tmp_path, "-rs", env={**os.environ, "CI": ci, "PATH": "/nonexistent"})
    assert outcome in done.stdout.splitlines()[-1]
    assert "the lab needs" in done.stdout
