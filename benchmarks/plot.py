"""Result files of a GPU as one picture: ours beside eager and others, and what the host costs.

    python -m benchmarks.plot --out first.png benchmarks/results/<device>/<date>-first-*.jsonl

Left a step, forward and backward, with its share of what bounds it; right steps of small operators
by the clock and replayed in a CUDA graph. A row that failed has its reason in place of a bar. The
tables of ``ovseg bench show`` hold the same numbers and more. Needs matplotlib.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import lines
from .show import Row, fastest_of_ours, rate_in_words, share

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INCHES_A_LINE = 0.19
COLORS = {
    "ovseg (cuda)": "#1f5fa8",
    "ovseg (triton)": "#5aa0dc",
    "ovseg (auto)": "#123a66",
    "eager": "#9a9a9a",
}
OTHER = "#d08a3c"  # other packages, and other ways to write it
MARKS = {"host_us": ("|", "host alone"), "wall_us": ("o", "wall"), "replay_us": ("D", "in a graph")}


def draw(paths: Sequence[str | Path], out: str | Path) -> Path:
    """Draw the last run of every file into ``out``, and return its path.

    Raises ValueError where no file holds a row that was timed.
    """
    from matplotlib.figure import Figure

    runs = [lines.last_run(lines.read(path)[0]) for path in paths]
    panels = []
    for key, panel in (("ms", _steps), ("wall_us", _calls)):
        for run in runs:
            rows = [row for row in lines.finished(run).values() if "implementation" in row]
            if any(key in row for row in rows):
                panels.append((panel, rows))
    if not panels:
        raise ValueError(
            f"{[str(path) for path in paths]} hold no row that was timed; expected files of "
            "`scripts/gpu_check.sh first` or `bench`"
        )
    most = max(sum(1 for _ in _lines(rows)) for _, rows in panels)
    size = (9 * len(panels), 1.6 + INCHES_A_LINE * most)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (panel, rows) in zip(axes, panels, strict=True):
        panel(ax, rows)
    figure.suptitle(_header(runs), fontsize=9)
    figure.savefig(out, dpi=110)
    return Path(out)


def _header(runs: Sequence[Sequence[Row]]) -> str:
    """Return the device and what it reached, each once."""
    rows = [row for run in runs for row in run]
    begun = [row for row in rows if row.get("op") == "environment"]
    names = ("device", "torch", "triton", "commit", "date")
    facts = {name: row[name] for row in begun for name in names if name in row}
    rates = {row["rate"]: rate_in_words(row) for row in rows if row.get("op") == "roofline"}
    told = ", ".join(f"{name} {value}" for name, value in facts.items())
    return f"{told}\n{', '.join(rates.values())}"


def _lines(rows: Sequence[Row]) -> Iterator[tuple[str, Row | None]]:
    """Yield the lines of a panel from the top: a case, then its rows."""
    cases: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        cases.setdefault((row["op"], row["case"], row["dtype"]), []).append(row)
    for case, found in cases.items():
        yield "  ".join(case), None
        for row in found:
            yield row["implementation"], row


def _place_lines(ax: Axes, rows: Sequence[Row]) -> list[tuple[int, Row]]:
    """Label every line of a panel, and return the rows with their places."""
    placed = []
    labels = []
    for y, (label, row) in enumerate(_lines(rows)):
        labels.append(label)
        if row is not None:
            placed.append((y, row))
    ax.set_yticks(range(len(labels)), labels, fontsize=7)
    titles = set(range(len(labels))) - {y for y, _ in placed}
    for y, tick in enumerate(ax.get_yticklabels()):
        if y in titles:
            tick.set_fontweight("bold")
    ax.set_ylim(len(labels) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
    ax.spines[["top", "right", "left"]].set_visible(False)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    ax.set_axisbelow(True)
    return placed


def _steps(ax: Axes, rows: Sequence[Row]) -> None:
    """Draw a bar a row, forward and backward together."""
    fastest = fastest_of_ours(rows)
    shortest = min(row["ms"] for row in rows if "ms" in row)
    longest = max(row["ms"] for row in rows if "ms" in row)
    left = shortest / 2
    for y, row in _place_lines(ax, rows):
        if "ms" not in row:
            _fail(ax, left, y, row["failed"])
            continue
        color = COLORS.get(row["implementation"], OTHER)
        ax.barh(y, row["ms"] - left, left=left, height=0.8, color=color)
        ours = fastest.get((row["op"], row["case"], row["dtype"]), row["ms"])
        ratio = f", {row['ms'] / ours:.2f} x ours" if row["ms"] != ours else ""
        passes = [f"{row[f'{n}_ms']:.3g}" for n in ("forward", "backward") if f"{n}_ms" in row]
        text = f" {' + '.join(passes)} ms, {share(row)}{ratio}"
        ax.text(row["ms"], y, text, va="center", fontsize=6.5)
    ax.set_xlim(left, longest * (longest / left) ** 0.6)  # room for the words
    ax.set_xlabel("ms of a step, forward + backward, with a cold L2", fontsize=8)


def _calls(ax: Axes, rows: Sequence[Row]) -> None:
    """Draw three marks a row: the host alone, all by the clock, and replayed in a graph."""
    times = [row[key] for row in rows for key in MARKS if key in row]
    left = min(times) / 2
    for y, row in _place_lines(ax, rows):
        if "wall_us" not in row:
            _fail(ax, left, y, row["failed"])
            continue
        color = COLORS.get(row["implementation"], OTHER)
        found = [row[key] for key in MARKS if key in row]
        ax.plot([min(found), max(found)], [y, y], color=color, linewidth=1)
        for key, (mark, _) in MARKS.items():
            if key in row:
                face = color if key == "wall_us" else "white"
                ax.plot(row[key], y, mark, color=color, markerfacecolor=face, markersize=5)
        words = f"  {row['wall_us']:.3g} us by the clock, {share(row)}"
        if "replay_failed" in row:
            words += ", not to be captured"
        ax.text(max(found), y, words, va="center", fontsize=6.5)
    for mark, name in MARKS.values():
        ax.plot([], [], mark, color="black", markerfacecolor="white", label=name)
    ax.legend(fontsize=7, frameon=False, ncols=3, loc="lower right", bbox_to_anchor=(1, 1))
    ax.set_xlim(left, max(times) * (max(times) / left) ** 0.8)
    ax.set_xlabel("us of a step; the share is of the time in a graph", fontsize=8)


def _fail(ax: Axes, left: float, y: int, reason: str) -> None:
    """Write the reason of a row that has no time."""
    ax.text(left, y, f" {reason[:90]}", va="center", fontsize=6.5, color="#b02a2a", style="italic")


def main() -> int:
    """Read the arguments, and draw."""
    arguments = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    arguments.add_argument("files", nargs="+", help="the .jsonl files of a run")
    arguments.add_argument("--out", required=True, help="the picture: .png, .svg or .pdf")
    given = arguments.parse_args()
    print(draw(given.files, given.out))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
