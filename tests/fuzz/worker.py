"""The process that is fuzzed: `python -m tests.fuzz.worker TARGET [ARGUMENTS OF LIBFUZZER]`.

With files as arguments, it runs the target once on each, as libFuzzer does; without atheris that is all it can do.
"""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

TARGETS = ("spec", "luks", "qcow2", "log", "control")
"""Modules here that have `one_input` and `seeds`."""

EXCLUDED = ["tcmu_rs.handlers.luks.kdf"]
"""What computes for long, and depends on no input."""

Target = Callable[[bytes], None]


def strict(one_input: Target) -> Target:
    """A target that lets no descriptor leak, and no log record reach the terminal."""
    logging.disable()

    def run(data: bytes) -> None:
        before = len(os.listdir("/proc/self/fd"))  # noqa: PTH208 - a hundred times as fast as Path.iterdir
        one_input(data)
        after = len(os.listdir("/proc/self/fd"))  # noqa: PTH208
        assert after == before, f"{after - before} descriptors are left open"

    return run


def load(name: str) -> ModuleType:
    """The module of a target."""
    return importlib.import_module(f"tests.fuzz.{name}")


def inputs(places: list[str]) -> list[Path]:
    """Files, and those in directories."""
    found = []
    for place in map(Path, places):
        found += sorted(place.iterdir()) if place.is_dir() else [place]
    return found


def main() -> None:
    name, *arguments = sys.argv[1:]
    try:
        import atheris
    except ImportError:
        one_input = strict(load(name).one_input)
        places = [argument for argument in arguments if not argument.startswith("-")]
        for number, path in enumerate(inputs(places)):
            print(f"Running: {path}", file=sys.stderr)
            one_input(path.read_bytes())
            print(f"stat::number_of_executed_units: {number + 1}", file=sys.stderr)
        return
    with atheris.instrument_imports(include=["tcmu_rs"], exclude=EXCLUDED):
        module = load(name)
    atheris.Setup([sys.argv[0], *arguments], strict(module.one_input))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
