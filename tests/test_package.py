"""What users install: the same files whichever way they come."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import tcmu_rs

ROOT = Path(__file__).parent.parent


def maturin(*arguments: str, cwd: Path) -> None:
    # Not a release build: the names of the files are the point, and a debug build takes seconds.
    environment = {**os.environ, "CARGO_TARGET_DIR": os.environ.get("CARGO_TARGET_DIR", str(ROOT / "target"))}
    subprocess.run([sys.executable, "-m", "maturin", *arguments], cwd=cwd, check=True, env=environment)


def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("RECORD")}


@pytest.mark.slow
def test_wheel_and_wheel_from_sdist_have_the_same_files(tmp_path: Path) -> None:
    maturin("build", "--out", str(tmp_path / "direct"), cwd=ROOT)
    maturin("sdist", "--out", str(tmp_path / "sdist"), cwd=ROOT)
    (sdist,) = (tmp_path / "sdist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    maturin("build", "--out", str(tmp_path / "from-sdist"), cwd=unpacked)

    (direct,) = (tmp_path / "direct").glob("*.whl")
    (from_sdist,) = (tmp_path / "from-sdist").glob("*.whl")
    assert direct.name.startswith("tcmu_rs-") and "-cp311-abi3-" in direct.name
    assert names(direct) == names(from_sdist)

    expected = {
        f"tcmu_rs/{path.relative_to(ROOT / 'python/tcmu_rs')}"
        for pattern in ("**/*.py", "**/*.pyi", "py.typed")
        for path in (ROOT / "python/tcmu_rs").glob(pattern)
    }
    expected |= {
        f"tcmu_rs/handlers/{path.relative_to(ROOT / 'handlers')}" for path in (ROOT / "handlers").glob("**/*.py")
    }
    expected |= {"tcmu_rs/_native.abi3.so"}
    assert {name for name in names(direct) if name.startswith("tcmu_rs/")} == expected
    assert not {name for name in names(direct) if not name.startswith(("tcmu_rs/", "tcmu_rs-"))}


def test_handlers_are_importable_as_they_are_installed() -> None:
    for name in ("file", "luks", "ram"):
        assert importlib.util.find_spec(f"tcmu_rs.handlers.{name}") is not None
    entries = {entry.name: entry for entry in importlib.metadata.entry_points(group="tcmu_rs.handlers")}
    assert {"faults", "file", "luks", "ram"} <= set(entries)
    for entry in entries.values():
        assert issubclass(entry.load(), tcmu_rs.Handler)


def test_handlers_use_the_public_interface_alone() -> None:
    for path in (ROOT / "handlers").glob("**/*.py"):
        source = path.read_text()
        assert "_native" not in source, path
        assert "from tcmu_rs._" not in source and "import tcmu_rs._" not in source, path


def test_package_is_typed_and_has_a_version() -> None:
    assert (Path(tcmu_rs.__file__).parent / "py.typed").exists()
    assert tcmu_rs.__version__ == importlib.metadata.version("tcmu-rs")
