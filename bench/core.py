"""What a command costs in the core alone, in nanoseconds, with no Python: runs `cargo bench --bench ring`.

python -m bench.core [--write]
"""

from __future__ import annotations

import argparse
import subprocess

from .report import HERE, publish, stated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the figures into bench/RESULTS.md")
    arguments = parser.parse_args()
    command = ["cargo", "bench", "--quiet", "--bench", "ring"]
    output = subprocess.run(command, cwd=HERE.parent, check=True, stdout=subprocess.PIPE, text=True).stdout
    publish("bench.core", f"{stated()}\n\n```text\n{output.strip()}\n```", write=arguments.write)


if __name__ == "__main__":
    main()
