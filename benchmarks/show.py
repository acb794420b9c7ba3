"""Result files as tables, whole or cut off by a kill.

``ovseg bench show FILES``; nothing installed: python -m benchmarks.show FILES.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
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
    roof = [row for row in rows if row.get("op") == "roofline"]
    rates = [
        f"{row['implementation']} {row['dtype']} {row['tflops']} TFLOP/s"
        for row in roof
        if "tflops" in row
    ]
    rates += [f"copy {row['gb_per_s']} GB/s" for row in roof if "gb_per_s" in row]
    if rates:
        parts.append("reached here: " + ", ".join(rates))
    steps = [row for row in rows if "step" in row]
    parts += [
        f"{row['step']}: {row['state']}, {row['seconds']} s"
        + (f"; {row['note']}" if row.get("note") else "")
        for row in steps
    ]
    results, begun = lines.finished(rows), lines.unfinished(rows)
    if any("ms" in row for row in results.values()):
        parts.append(_bench([row for row in results.values() if "implementation" in row]))
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


def _bench(rows: Sequence[Row]) -> str:
    """Return one line a row; the ratio is to the fastest row of ours in the same case and dtype."""
    ours: dict[tuple, float] = {}
    for row in rows:
        at = (row["op"], row["case"], row["dtype"])
        if row["implementation"].startswith("ovseg") and "ms" in row:
            ours[at] = min(row["ms"], ours.get(at, row["ms"]))
    names = (
        "op",
        "case",
        "dtype",
        "implementation",
        "forward ms",
        "backward ms",
        "ms / ovseg",
        "% product",
        "% copy",
        "extra MiB",
    )
    text = [f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    for row in sorted(rows, key=lambda row: (row["op"], row["case"], row["dtype"])):
        at = (row["op"], row["case"], row["dtype"])
        cells = [*at, row["implementation"]]
        if row.get("allow_tf32"):
            cells[2] += " (tf32 allowed)"
        if "ms" in row:
            passes = [name for name in ("forward", "backward") if f"{name}_ms" in row]
            cells += [
                f"{row[f'{name}_ms']:.3f} ({row[f'{name}_ms_p20']:.3f}-{row[f'{name}_ms_p80']:.3f})"
                if name in passes
                else ""
                for name in ("forward", "backward")
            ]
            cells.append(f"{row['ms'] / ours[at]:.2f}" if at in ours else "")
            cells += [
                ", ".join(
                    str(row[f"{name}_percent_of_{rate}"])
                    for name in passes
                    if f"{name}_percent_of_{rate}" in row
                )
                for rate in ("product", "copy")
            ]
            cells.append(row.get("extra_mib", ""))
        else:
            cells += [row.get("failed", ""), *[""] * 5]
        text.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(text)


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
