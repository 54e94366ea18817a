"""The command line, as far as it goes without a kernel that has TCMU."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result

import tcmu_rs
from tcmu_rs import _cli, _devices, _doctor, _lio

COMMANDS = ["attach", "check", "copy", "create", "detach", "doctor", "handlers", "info", "list"]


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(_cli.main, [str(argument) for argument in arguments])


def error_of(result: Result) -> str:
    """The one line that an error consists of."""
    assert result.stdout == ""
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_explains_itself_with_examples(command: str) -> None:
    result = run(command, "--help")
    assert result.exit_code == 0
    assert f"tcmu-rs {command}" in result.stdout
    assert "Examples:" in result.stdout


def test_help_and_version() -> None:
    assert all(command in run("--help").stdout for command in COMMANDS)
    assert run("--version").stdout.startswith("tcmu-rs, version ")
    assert run().exit_code == 2


@pytest.mark.parametrize(
    ("text", "size"),
    [("4096", 4096), ("1K", 1024), ("512M", 512 << 20), ("10G", 10 << 30), ("3T", 3 << 40), ("1P", 1 << 50)],
)
def test_sizes(text: str, size: int) -> None:
    assert _cli._size(text) == size
    assert _cli._size(_cli.format_size(size)) == size


@pytest.mark.parametrize(
    "text", ["", "0", "0G", "-1", "1.5G", "10GB", "10GiB", "10g", " 1", "1 G", "0x10", "1_000", "\u0661"]
)
def test_sizes_that_are_none(text: str) -> None:
    with pytest.raises(click.BadParameter, match="is no size: use a number of bytes"):
        _cli._size(text)


@pytest.mark.parametrize("size", [0, 1, 1000, 1023, 1025, 1 << 30, (1 << 40) + 512])
def test_sizes_are_written_without_loss(size: int) -> None:
    text = _cli.format_size(size)
    assert size == 0 or _cli._size(text) == size


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["attach"], "Missing argument 'SPEC'"),
        (["attach", "ram"], "'ram' is not of the form HANDLER:CONFIG"),
        (["attach", "ram:", "--size", "10GB"], "'10GB' is no size"),
        (["attach", "ram:", "--fabric", "fc"], "'fc' is not one of"),
        (["attach", "ram:", "--block-size", "520"], "'520' is not one of"),
        (["attach", "ram:", "-o", "key"], "'key' is not of the form KEY=VALUE"),
        (["attach", "ram:", "-o", "a=1", "-o", "a=2"], "-o a is given twice"),
        (["attach", "ram:", "--portal", "127.0.0.1:3261"], "--portal is for iSCSI: add --fabric iscsi"),
        (["attach", "ram:", "--allow-network", "--fabric", "none"], "--allow-network is for iSCSI"),
        (["create", "ram:"], "Missing option '--size'"),
        (["nothing"], "No such command 'nothing'"),
        (["list", "--nothing"], "No such option"),
    ],
)
def test_a_wrong_command_line(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert said in error_of(result)
    assert "--help)" in result.stderr
    assert result.exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["attach", "nothing:"], "no handler 'nothing'; installed: "),
        (["attach", "ram:", "--handler", "no_such_module:Disk"], "No module named 'no_such_module'"),
        (["attach", "ram:"], "ram has no size of its own: add --size"),
        (["resize", "file:/no/such/file", "--size", "1M"], "/no/such/file: "),
        (["create", "ram:", "--size", "1M"], "RamHandler has no storage to create"),
        (["info", "ram:"], "RamHandler has no info"),
        (["check", "ram:"], "RamHandler has no check"),
        (["detach", "nothing"], "no device nothing (`tcmu-rs list` shows the devices)"),
    ],
)
def test_what_cannot_be_done(arguments: list[str], said: str) -> None:
    result = run(*arguments)
    assert said in error_of(result)
    assert result.exit_code == 1


def test_debug_shows_where_an_error_comes_from() -> None:
    result = run("--debug", "attach", "ram:")
    assert "Traceback" in result.stderr
    assert "error: ram has no size" in result.stderr
    assert result.exit_code == 1
    assert "Traceback" not in run("attach", "ram:").stderr


@pytest.mark.skipif(Path("/sys/kernel/config/target").exists(), reason="this machine has a target")
def test_a_machine_without_a_target_is_said(tmp_path: Path) -> None:
    result = run("attach", "ram:", "--size", "1M")
    assert "configfs is not mounted" in error_of(result)
    assert result.exit_code == 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--name", "bad!"], "invalid device name 'bad!'"),
        (["--wwn", "x"], "invalid wwn 'x'"),
        (["--max-sectors", "-5"], "invalid max_sectors -5"),
        (["--fabric", "iscsi", "--portal", "nonsense"], "invalid portal 'nonsense'"),
        (["--fabric", "iscsi", "--portal", "192.0.2.1:3260"], "--allow-network"),
        (["--fabric", "iscsi", "--iqn", "disk"], "invalid target name 'disk'"),
        pytest.param(
            [],
            "configfs is not mounted",
            marks=pytest.mark.skipif(Path("/sys/kernel/config").is_mount(), reason="this machine has configfs"),
        ),
    ],
)
def test_what_is_refused_has_not_made_its_storage(tmp_path: Path, arguments: list[str], said: str) -> None:
    """The file was made before anybody had looked at the rest of the command line."""
    path = tmp_path / "disk.img"
    result = run("attach", f"file:{path}", "--size", "1M", "--create", *arguments)
    assert said in error_of(result)
    assert result.exit_code == 1
    assert not path.exists()


def test_create_makes_the_file(tmp_path: Path) -> None:
    path = tmp_path / "disk.img"
    assert run("create", f"file:{path}", "--size", "1M").exit_code == 0
    assert path.stat().st_size == 1 << 20
    again = run("create", f"file:{path}", "--size", "1M")
    assert str(path) in error_of(again)
    assert again.exit_code == 1


@pytest.mark.parametrize("below", ["", "luks:", "faults:file:", "luks:qcow2:", "luks:faults:luks:"])
def test_a_relative_path_is_another_disk_in_another_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, below: str
) -> None:
    """A killed server's device was taken for that of the file of the same name in another directory, whose content its
    users got; and `resize --shrink` there cut the served disk."""
    seen = []

    def attach(*_: Any, spec: str, **__: Any) -> None:
        seen.append(spec)
        raise ValueError("seen")

    monkeypatch.setattr("tcmu_rs._attach.attach", attach)
    monkeypatch.setattr("tcmu_rs._resize.find", lambda handler, config: seen.append(f"{handler}:{config}"))
    name, _, rest = (below or "file:").partition(":")
    (tmp_path / "disk.img").touch()
    monkeypatch.chdir(tmp_path)
    spec, expected = f"{name}:{rest}disk.img", f"{name}:{rest}{tmp_path}/disk.img"
    keys = ["-o", "key-file=k"] * name.startswith("luks")
    for what in (spec, expected):
        run("resize", what, "--size", "1M", *keys)
        run("snapshot", "delete", what, "x", *keys)
        if "luks:" not in rest:
            run("attach", what, *keys)
    assert seen and set(seen) == {expected} and len(seen) == (4 if "luks:" in rest else 6)


def test_a_class_of_the_current_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trying_out.py").write_text("class Disk:\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])
    assert _cli._find_class("x", "trying_out:Disk").__module__ == "trying_out"


def test_handlers_are_listed() -> None:
    lines = run("handlers").stdout.splitlines()
    assert lines[0].split("\t") == ["NAME", "CLASS", "PACKAGE", "ABOUT"]
    assert any(line.startswith("file\ttcmu_rs.handlers.file:FileHandler\t") for line in lines)
    listed = {row["name"]: row for row in json.loads(run("handlers", "--json").stdout)}
    assert listed["ram"]["error"] is None
    assert listed["ram"]["about"]


def test_a_broken_handler_is_listed_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib.metadata import EntryPoint

    from tcmu_rs import _registry

    monkeypatch.setattr(_registry, "entry_points", lambda group: [EntryPoint("broken", "no.such:Disk", group)])
    result = run("handlers")
    assert result.exit_code == 0
    assert "No module named 'no'" in result.stdout


def test_list_for_programs_and_for_people(monkeypatch: pytest.MonkeyPatch) -> None:
    device = _devices.Device(
        name="disk",
        device="/dev/sda",
        handler="file",
        config="/a b",
        size=10 << 30,
        fabrics=("loopback",),
        pid=42,
        state="serving",
        configfs="/sys/kernel/config/target/core/user_0/disk",
    )
    monkeypatch.setattr(_devices, "devices", lambda: [device])
    assert run("list").stdout.splitlines() == [
        "NAME\tDEVICE\tHANDLER\tCONFIG\tSIZE\tFABRIC\tPID\tSTATE",
        "disk\t/dev/sda\tfile\t/a b\t10G\tloopback\t42\tserving",
    ]
    assert json.loads(run("list", "--json").stdout)[0]["fabrics"] == ["loopback"]


@pytest.mark.skipif(Path("/sys/module/target_core_user").exists(), reason="this machine has TCMU")
def test_the_doctor_says_what_this_machine_lacks() -> None:
    result = run("doctor")
    assert result.exit_code == 1
    assert "MISSING target_core_user: not in this kernel" in result.stdout
    assert "CONFIG_TCM_USER2" in result.stdout
    report = json.loads(run("doctor", "--json").stdout)
    assert report["ok"] is False
    assert all(check["remedy"] for check in report["checks"] if not check["ok"])


def make_machine(root: Path, *, capabilities: int = (1 << 41) - 1) -> None:
    for directory in ("proc/self", "sys", "dev", "lib/modules/6.1.0"):
        (root / directory).mkdir(parents=True)
    (root / "proc/self/status").write_text(f"Name:\tx\nCapEff:\t{capabilities:016x}\n")
    (root / "proc/mounts").write_text("devtmpfs /dev devtmpfs rw 0 0\nconfigfs /sys/kernel/config configfs rw 0 0\n")
    (root / "proc/filesystems").write_text("nodev\tconfigfs\n")
    (root / "lib/modules/6.1.0/modules.dep").write_text(
        "kernel/drivers/target/target_core_user.ko.xz: kernel/drivers/uio/uio.ko.xz\n"
        "kernel/drivers/target/loopback/tcm_loop.ko:\n"
    )
    (root / "lib/modules/6.1.0/modules.builtin").write_text("kernel/drivers/scsi/sd_mod.ko\n")


def lacking(root: Path, release: str = "6.1.0") -> dict[str, str]:
    return {check.name: check.remedy for check in _doctor.examine(root, release=release) if not check.ok}


def test_the_doctor_is_content_with_a_good_machine(tmp_path: Path) -> None:
    make_machine(tmp_path)
    (tmp_path / "etc/target/pr").mkdir(parents=True)
    assert set(lacking(tmp_path)) <= {"iscsi_target_mod"} | ({"privileges"} if os.geteuid() else set())


def test_the_doctor_finds_each_thing(tmp_path: Path) -> None:
    make_machine(tmp_path, capabilities=0)
    (tmp_path / "proc/mounts").write_text("tmpfs /dev tmpfs rw 0 0\n")
    (tmp_path / "lib/modules/6.1.0/modules.dep").unlink()
    (tmp_path / "sys/class/uio/uio0").mkdir(parents=True)
    remedies = lacking(tmp_path)
    assert set(remedies) == {
        "privileges",
        "target_core_user",
        "tcm_loop",
        "iscsi_target_mod",
        "configfs",
        "target",
        "device nodes",
        "reservations",
        "memory",
    }
    assert remedies["reservations"] == "mkdir -p /var/target/pr"
    assert remedies["configfs"] == "mount -t configfs none /sys/kernel/config"
    assert "sudo" in remedies["privileges"]
    assert "kernel" in lacking(tmp_path, "4.4.0-1-generic")


def test_the_doctor_looks_for_reservations_where_the_loaded_module_does(tmp_path: Path) -> None:
    make_machine(tmp_path)
    (tmp_path / "etc/target/pr").mkdir(parents=True)
    (tmp_path / "sys/kernel/config/target").mkdir(parents=True)
    (tmp_path / "sys/kernel/config/target/dbroot").write_text("/var/target\n")
    assert lacking(tmp_path)["reservations"] == "mkdir -p /var/target/pr"
    (tmp_path / "var/target/pr").mkdir(parents=True)
    assert "reservations" not in lacking(tmp_path)


@pytest.mark.parametrize("what", ["disk", "partition", "mapping", "other"])
def test_the_doctor_warns_of_swap_on_a_disk_that_user_space_serves(tmp_path: Path, what: str) -> None:
    make_machine(tmp_path)
    disk = tmp_path / "sys/devices/sda"
    (disk / "device").mkdir(parents=True)
    (disk / "device/vendor").write_text("ATA     \n" if what == "other" else "tcmu-rs \n")
    (disk / "sda1").mkdir()
    (tmp_path / "sys/devices/dm-0/slaves").mkdir(parents=True)
    (tmp_path / "sys/devices/dm-0/slaves/sda1").symlink_to(disk / "sda1")
    (tmp_path / "sys/class/block").mkdir(parents=True)
    for name, place in (("sda", "sda"), ("sda1", "sda/sda1"), ("dm-0", "dm-0")):
        (tmp_path / "sys/class/block" / name).symlink_to(tmp_path / "sys/devices" / place)
    name = {"disk": "sda", "partition": "sda1", "mapping": "dm-0", "other": "sda1"}[what]
    swaps = "Filename Type Size Used Priority\n/dev/{} partition 1024 0 -2\n"
    (tmp_path / "proc/swaps").write_text(swaps.format(name))
    remedy = lacking(tmp_path).get("swap")
    assert remedy == (None if what == "other" else f"swapoff /dev/{name}, and swap to another disk")


def test_the_doctor_knows_a_module_that_has_to_be_loaded(tmp_path: Path) -> None:
    make_machine(tmp_path)
    (tmp_path / "proc/mounts").write_text("devtmpfs /dev devtmpfs rw 0 0\n")
    (tmp_path / "proc/filesystems").write_text("ext4\n")
    (tmp_path / "lib/modules/6.1.0/modules.dep").write_text("kernel/fs/configfs/configfs.ko:\n")
    assert lacking(tmp_path)["configfs"] == "modprobe configfs && mount -t configfs none /sys/kernel/config"


def test_errors_of_a_group_make_one_line() -> None:
    group = ExceptionGroup(
        "x", [_lio.LioError("one", "do"), ExceptionGroup("y", [KeyError("two"), OSError(5, "five")])]
    )
    assert list(_cli._messages(group)) == [
        "one (do)",
        "KeyError: 'two' (`tcmu-rs --debug ...` shows where)",
        "five",
    ]


def test_what_a_handler_takes_is_told() -> None:
    told = run("handlers", "luks").stdout
    assert "-o key-file=PATH" in told and "lets whoever sees the file see" in told
    assert "tcmu-rs create luks:CONFIG" in told and "-o version=1" in told
    assert "tcmu-rs create" not in run("handlers", "ram").stdout
    assert "no handler 'nothing'" in run("handlers", "nothing").stderr


def test_a_handler_that_takes_no_configuration_can_be_attached() -> None:
    """The command line says that a person may be asked, which is no configuration."""

    class Disk(tcmu_rs.BlockHandler):
        pass

    options = _cli._options(size=None, create=False, read_only=True, block_size=None, extra=[])
    assert isinstance(Disk.from_config("", options), Disk)
    options = _cli._options(size=512, create=False, read_only=False, block_size=None, extra=[])
    with pytest.raises(ValueError, match="Disk takes no configuration"):
        Disk.from_config("", options)
