"""Result files as tables, whole or cut off by a kill.

``ovseg bench show FILES``; nothing installed: python -m benchmarks.show FILES.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from . import lines

Row = dict[str, Any]


def tables(path: str | Path) -> str:
    """Return everything that one file holds, as Markdown.

    Raises ValueError for a file without a row.
    """
    if whole := _whole(path):
        return whole
    rows, cut = lines.read(path)
    if not rows:
        raise ValueError(
            f"{path} holds no row of results; expected lines of scripts/gpu_check.sh, or the file "
            "of `ovseg bench --json`"
        )
    parts, everything = [], len(rows)
    rows = lines.last_run(rows)
    for row in rows:
        if row.get("op") == "environment":
            names = (
                "device",
                "torch",
                "cuda",
                "triton",
                "driver",
                "commit",
                "date",
                "time",
                "allow_tf32",
            )
            parts.append(", ".join(f"{name} {row[name]}" for name in names if name in row))
    rates = [rate_in_words(row) for row in rows if row.get("op") == "roofline"]
    if rates:
        parts.append("reached here: " + ", ".join(rates))
    steps = [row for row in rows if "step" in row]
    parts += [
        f"{row['step']}: {row['state']}, {row['seconds']} s"
        + (f"; {row['note']}" if row.get("note") else "")
        for row in steps
    ]
    results, begun = lines.finished(rows), lines.unfinished(rows)
    table = next((t for key, t in TABLES.items() if any(key in r for r in results.values())), None)
    if table is not None:
        parts.append(table([row for row in results.values() if "implementation" in row]))
    elif results:
        parts.append(_checks(list(results.values())))
    for key in begun:
        parts.append(f"was running when it was killed: {key}")
    planned = lines.planned(rows)
    left = [key for key in planned if key not in results and key not in begun]
    if left:
        parts.append(
            f"not reached: {len(left)} of {len(planned)} rows, the first of them: "
            f"{', '.join(left[:5])}"
        )
    if len(rows) < everything:
        parts.append(f"{everything - len(rows)} lines of earlier runs in this file, not shown")
    if cut:
        parts.append(f"{cut} line{'s' * (cut > 1)} cut off in the middle, not shown")
    return "\n\n".join(parts)


def _whole(path: str | Path) -> str:
    """Return the table of a file of ``ovseg bench --json``, which is one JSON object."""
    try:
        found = json.loads(Path(path).read_text())
    except json.JSONDecodeError:
        return ""
    if not isinstance(found, dict) or "rows" not in found:
        return ""
    from .run import table

    return (
        ", ".join(f"{k} {v}" for k, v in found.get("environment", {}).items())
        + "\n\n"
        + table(found["rows"])
    )


def rate_in_words(row: Row) -> str:
    """Return what the device reaches, in words."""
    if "failed" in row:
        return f"{row['rate']}: {row['failed']}"
    if "tflops" in row:
        return f"product {row['rate']} {row['tflops']} TFLOP/s"
    if "gb_per_s" in row:
        return f"{row['rate']} {row['gb_per_s']} GB/s"
    return (
        f"{row['rate']} {row['wall_us']} us, {row['host_us']} of the host, "
        f"{row['replay_us']} in a graph"
    )


def share(row: Row) -> str:
    """Return the larger share of the two rates: that of what bounds the row."""
    found = {
        rate: row[f"percent_of_{rate}"]
        for rate in ("product", "copy")
        if f"percent_of_{rate}" in row
    }
    best = max(found, key=found.__getitem__, default="")
    return f"{found[best]}% of {best}" if best else ""


def _markdown(names: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a table; short rows are filled up with empty cells."""
    text = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for row in rows:
        cells = [*row, *[""] * (len(names) - len(row))]
        text.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(text)


def _labels(row: Row) -> list[str]:
    """Return the cells that say what a row is about."""
    dtype = row["dtype"] + (" (tf32 allowed)" if row.get("allow_tf32") else "")
    return [row["op"], row["case"], dtype, row["implementation"]]


def _sorted(rows: Sequence[Row]) -> list[Row]:
    """Return rows that are compared with one another side by side."""
    return sorted(rows, key=lambda row: (row["op"], row["case"], row["dtype"]))


def fastest_of_ours(rows: Iterable[Row]) -> dict[tuple[str, str, str], float]:
    """Return operator, case and dtype to the milliseconds of our fastest row."""
    found: dict[tuple[str, str, str], float] = {}
    for row in rows:
        at = (row["op"], row["case"], row["dtype"])
        if row["implementation"].startswith("ovseg") and "ms" in row:
            found[at] = min(row["ms"], found.get(at, row["ms"]))
    return found


def _times(rows: Sequence[Row]) -> str:
    """Return one line a row; the ratio is to the fastest row of ours in the same case and dtype."""
    ours = fastest_of_ours(rows)

    def cells(row: Row) -> list[Any]:
        if "ms" not in row:
            return [*_labels(row), row.get("failed", "")]
        at = (row["op"], row["case"], row["dtype"])
        passes = [name for name in ("forward", "backward") if f"{name}_ms" in row]
        times = [
            f"{row[f'{name}_ms']:.3f} ({row[f'{name}_ms_p20']:.3f}-{row[f'{name}_ms_p80']:.3f})"
            for name in passes
        ]
        rates = [
            ", ".join(
                str(row[f"{name}_percent_of_{rate}"])
                for name in passes
                if f"{name}_percent_of_{rate}" in row
            )
            for rate in ("product", "copy")
        ]
        ratio = f"{row['ms'] / ours[at]:.2f}" if at in ours else ""
        times += [""] * (2 - len(times))
        return [*_labels(row), *times, ratio, share(row), *rates, row.get("extra_mib", "")]

    names = (
        "op",
        "case",
        "dtype",
        "implementation",
        "forward ms",
        "backward ms",
        "ms / ovseg",
        "share",
        "% product",
        "% copy",
        "extra MiB",
    )
    return _markdown(names, map(cells, _sorted(rows)))


def _calls(rows: Sequence[Row]) -> str:
    """Return one line a row: a step by the clock, the host's part of it, and in a CUDA graph."""

    def cells(row: Row) -> list[Any]:
        if "wall_us" not in row:
            return [*_labels(row), row.get("failed", "")]
        replay = row.get("replay_us", row.get("replay_failed", ""))
        return [*_labels(row), row["host_us"], row["wall_us"], replay, share(row)]

    names = (
        "op",
        "case",
        "dtype",
        "implementation",
        "host us",
        "wall us",
        "replayed us",
        "share",
    )
    return _markdown(names, map(cells, _sorted(rows)))


def _kernels(rows: Sequence[Row]) -> str:
    """Return one line a kernel of every step, the longest first."""

    def cells(row: Row) -> Iterator[list[Any]]:
        if "kernels" not in row:
            yield [*_labels(row), row.get("failed", "")]
            return
        yield [*_labels(row), "all", row["launches"], row["kernels_us"]]
        for kernel in row["kernels"]:
            yield ["", "", "", "", kernel["name"], kernel["count"], kernel["us"]]

    names = ("op", "case", "dtype", "implementation", "kernel", "launches", "us")
    return _markdown(names, (line for row in _sorted(rows) for line in cells(row)))


# What a file holds is told by a key that its finished rows have.
TABLES: dict[str, Callable[[Sequence[Row]], str]] = {
    "ms": _times,
    "wall_us": _calls,
    "kernels": _kernels,
}


def _checks(rows: Sequence[Row]) -> str:
    """Return how many passed, by backend or group, and every one that did not."""
    counts: dict[str, Counter] = {}
    for row in rows:
        state = "failed" if "failed" in row else row.get("state", "passed")
        counts.setdefault(
            str(row.get("backend") or row.get("group") or row.get("tool") or "all"), Counter()
        )[state] += 1
    text = [
        f"{name}: {', '.join(f'{n} {state}' for state, n in count.most_common())}"
        for name, count in counts.items()
    ]
    return "\n".join(
        text + [f"FAILED {row['key']}: {row['failed']}" for row in rows if "failed" in row]
    )


def run(paths: Sequence[str]) -> int:
    """Print the tables of the files."""
    if not paths:
        raise ValueError("show needs a result file; expected paths of .jsonl or .json files")
    for path in paths:
        if not os.path.isfile(path):
            raise ValueError(
                f"{path} is no file; expected the .jsonl or .json that a benchmark wrote"
            )
        print(f"# {path}\n\n{tables(path)}\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(sys.argv[1:]))
