"""How figures are kept: a section of `RESULTS.md` for each benchmark, with its conditions, table and plots."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .conditions import conditions

HERE = Path(__file__).parent
RESULTS = HERE / "RESULTS.md"
README = HERE.parent / "README.md"
TUNING = HERE.parent / "docs/tuning.md"
PLOTS = HERE / "plots"
# Figures of matplotlib, by name: files when the section is written.
_drawn: dict[str, Any] = {}
NO_PLOT = "(No plot: `pip install --group bench` has matplotlib.)"


def table(heading: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Markdown; numbers on the right."""
    align = ["---"] + ["---:"] * (len(heading) - 1)
    lines = [heading, align, *rows]
    return "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)


def against(value: float, target: float | None) -> str:
    """A figure beside what it was to be, at least; a miss stands out."""
    if target is None:
        return f"{value:.2f}"
    return f"{value:.2f} (≥ {target:g})" if value >= target else f"**{value:.2f}** (missed: ≥ {target:g})"


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.2f}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def plot(
    name: str,
    title: str,
    x: Sequence[float],
    lines: Mapping[str, Sequence[float]],
    *,
    x_label: str,
    y_label: str,
    log_y: bool = False,
) -> str:
    """Draws lines over a logarithmic axis, for `plots/NAME.png`; returns the text that shows it."""
    try:
        import matplotlib
    except ImportError:
        return NO_PLOT
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for label, values in lines.items():
        axes.plot(list(x), list(values), marker="o", label=label)
    axes.set(title=title, xlabel=x_label, ylabel=y_label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(list(x), [f"{value:g}" for value in x])
    if log_y:
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    _drawn[name] = figure
    return f"![{title}](plots/{name}.png)"


def bars(name: str, title: str, groups: Sequence[str], series: Mapping[str, Sequence[float]], *, y_label: str) -> str:
    """Draws groups of bars, for `plots/NAME.png`; returns the text that shows it."""
    try:
        import matplotlib
    except ImportError:
        return NO_PLOT
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4), layout="constrained")
    width = 0.8 / len(series)
    for number, (label, values) in enumerate(series.items()):
        axes.bar([group + number * width for group in range(len(groups))], list(values), width, label=label)
    axes.set(title=title, ylabel=y_label)
    axes.set_xticks([group + 0.4 - width / 2 for group in range(len(groups))], list(groups))
    axes.grid(alpha=0.3, axis="y")
    axes.legend()
    _drawn[name] = figure
    return f"![{title}](plots/{name}.png)"


def stated(**more: object) -> str:
    """The conditions as a list."""
    return "\n".join(f"- {name}: {value}" for name, value in {**conditions(), **more}.items())


def publish(module: str, text: str, *, write: bool, elsewhere: Mapping[Path, str] | None = None) -> None:
    """Prints a section, and on request puts it into `RESULTS.md` in place of the one before.

    Args:
        module: The benchmark, by which the section is found.
        text: What is below its heading.
        write: Change the files.
        elsewhere: What other pages say of it, wins and losses, in place of what they said before.
    """
    section = f"## `python -m {module}`\n\n{text}\n"
    print(section)
    if not write:
        return
    before = RESULTS.read_text()
    old = re.compile(rf"^## `python -m {re.escape(module)}`.*?(?=^## |\Z)", re.M | re.S)
    after, found = old.subn(lambda _: section + "\n", before)
    if not found:
        after = before.rstrip() + "\n\n" + section
    RESULTS.write_text(after.rstrip() + "\n")
    PLOTS.mkdir(exist_ok=True)
    for name, figure in _drawn.items():
        figure.savefig(PLOTS / f"{name}.png", dpi=110)
    for page, block in (elsewhere or {}).items():
        page.write_text(inserted(page.read_text(), module, block))


def claims(sentences: Sequence[str]) -> str:
    """A list, for the README."""
    wrap = textwrap.TextWrapper(120, initial_indent="- ", subsequent_indent="  ", break_long_words=False)
    return "\n".join(map(wrap.fill, sentences))


def inserted(page: str, module: str, block: str) -> str:
    """A page with this block between the marks of a benchmark.

    Raises:
        ValueError: It has no such marks.
    """
    begin, end = f"<!-- {module} -->\n", f"<!-- end of {module} -->\n"
    head, found, rest = page.partition(begin)
    _, found_end, tail = rest.partition(end)
    if not (found and found_end):
        raise ValueError(f"there is no {begin.strip()} and {end.strip()}")
    return f"{head}{begin}\n{block}\n\n{end}{tail}"
