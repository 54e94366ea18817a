"""Fuzzes the parsers in Python, guided by coverage: `python -m tests.fuzz [SECONDS [TARGET...]]`.

`python -m tests.fuzz --keep [TARGET...]` minimises what was found into the corpus that is kept in the tree, as
`rust/fuzz/run --keep` does; new inputs lie in target/fuzz-python. The kept inputs run first, always. Fails on a
finding, with the command that shows it again; once mended, keep the input as corpus/TARGET/finding-WHAT.

Needs atheris (`pip install --group fuzz`); without it the kept inputs are run, and nothing is looked for.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from .worker import TARGETS, load

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
FRESH = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target")) / "fuzz-python"
LIMITS = ("-timeout=40", "-rss_limit_mb=1024", "-handle_xfsz=0")
"""Seconds and memory that one input may take: far above what the largest needs, far below what an attack would."""
LONGEST = {"spec": 600, "luks": 6000, "qcow2": 12000, "log": 300, "control": 2000}
"""Bytes of an input."""


def command(target: str, *arguments: object) -> list[str]:
    """How the process that is fuzzed is started."""
    found = f"-artifact_prefix={FRESH}/findings/{target}-"
    return [sys.executable, "-m", "tests.fuzz.worker", target, *LIMITS, found, *map(str, arguments)]


def prepare(target: str) -> tuple[Path, Path]:
    """Directories of fresh and of kept inputs; the seeds are among the fresh ones."""
    fresh, kept = FRESH / "corpus" / target, HERE / "corpus" / target
    for directory in (fresh, kept, FRESH / "findings"):
        directory.mkdir(parents=True, exist_ok=True)
    return fresh, kept


def fuzz(target: str, seconds: int) -> bool:
    """Fuzzes a target, and says what came of it. Returns whether nothing was found."""
    fresh, kept = prepare(target)
    if importlib.util.find_spec("atheris") is None:
        arguments: list[object] = [kept]
    else:
        if not any(kept.iterdir()) and not any(fresh.iterdir()):
            for number, seed in enumerate(load(target).seeds()):
                (fresh / f"seed-{number}").write_bytes(seed)
        time = f"-max_total_time={seconds}"
        arguments = [time, f"-max_len={LONGEST[target]}", "-print_final_stats=1", fresh, kept]
    log = FRESH / f"{target}.log"
    with log.open("wb") as file:
        done = subprocess.run(command(target, *arguments), cwd=ROOT, stdout=file, stderr=file, check=False)
    text = log.read_text(errors="replace")
    executions = re.findall(r"^stat::number_of_executed_units: *(\d+)$", text, re.MULTILINE)
    if done.returncode == 0 and executions:
        covered = re.findall(r" cov: (\d+) ", text)
        edges = f"{covered[-1]} edges covered" if covered else "the kept inputs alone (atheris is not installed)"
        print(f"{target}: {executions[-1]} executions, {edges}, nothing found", flush=True)
        return True
    start = text.find("Traceback")
    print(text[start:][:4000] if start >= 0 else text[-4000:], file=sys.stderr)
    finding = re.findall(r"Test unit written to (.*)$|^Running: (.*)$", text, re.MULTILINE)
    again = " ".join(command(target, *("".join(finding[-1]),) if finding else ("# no input kept",)))
    print(f"{target}: a finding; again with: {again}", file=sys.stderr, flush=True)
    return False


def keep(target: str) -> None:
    """Replaces the kept corpus by the fewest and shortest inputs that cover what all do; findings stay."""
    fresh, kept = prepare(target)
    with tempfile.TemporaryDirectory() as name:
        small = Path(name)
        merge = command(target, "-set_cover_merge=1", f"-max_len={LONGEST[target]}", small, kept, fresh)
        subprocess.run(merge, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for finding in kept.glob("finding-*"):
            shutil.copy(finding, small)
        shutil.rmtree(kept)
        shutil.copytree(small, kept)
    print(f"{target}: {len(list(kept.iterdir()))} inputs, {sum(one.stat().st_size for one in kept.iterdir())} bytes")


def main() -> None:
    arguments = sys.argv[1:]
    keeping = arguments[:1] == ["--keep"]
    seconds = 20
    if keeping:
        del arguments[0]
    elif arguments and arguments[0].isdecimal():
        seconds = int(arguments.pop(0))
    if unknown := [name for name in arguments if name not in TARGETS]:
        raise SystemExit(f"no target {unknown[0]!r}: {', '.join(TARGETS)}")
    targets = arguments or TARGETS
    if keeping:
        for target in targets:
            keep(target)
    else:
        raise SystemExit(sum(not fuzz(target, seconds) for target in targets))


if __name__ == "__main__":
    main()
