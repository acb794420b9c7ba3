"""Results of evaluations, as tables and files."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..data.benchmark_sets import SetDescription
from ..replacing import write_text
from .metrics import Scores

COLUMNS = {
    "model": "model",
    "data": "data",
    "protocol": "protocol",
    "pictures": "pictures",
    "miou": "mIoU",
    "mean_accuracy": "mAcc",
    "pixel_accuracy": "aAcc",
    "occurring_miou": "mIoU of names that occur",
    "first_name_right": "first name right %",
    "seen_miou": "seen mIoU",
    "unseen_miou": "unseen mIoU",
    "hiou": "hIoU",
    "stuff_miou": "stuff mIoU",
    "boundary_miou": "boundary IoU",
    "best_threshold": "best threshold",
    "best_miou": "mIoU there",
    "things_called_stuff": "things called stuff %",
    "classification": "top-1 %",
    "train_seconds": "training s",
}


@dataclass
class Report:
    """The result of an evaluation.

    Attributes:
        model, data: names.
        choices: the whole protocol.
        scores: of all classes, the background included.
        summary: the figures of tables.
        pictures, skipped: how many were counted, and which could not be.
        boundary: Boundary IoU of each class, if asked for.
        sweep: thresholds and mIoU at each, if asked for.
        partial: what was there of all pictures, "223 of 1449"; None where nothing was missing.
        first_name_right: share of pictures in percent, see ``FirstNameRight``; None where names are
            not asked for alone.
        examples: (picture, truth, prediction) of the first pictures, as class indices.
    """

    model: str
    data: SetDescription
    choices: dict[str, Any]
    scores: Scores
    summary: dict[str, Any]
    pictures: int
    skipped: list[str]
    boundary: np.ndarray | None = None
    sweep: tuple[np.ndarray, np.ndarray] | None = None
    partial: str | None = None
    first_name_right: float | None = None
    examples: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it for ``results.json``, the whole protocol included."""
        rows = {}
        for i, name in enumerate(self.scores.classes):
            rows[name] = {
                "iou": rounded(self.scores.iou[i]),
                "accuracy": rounded(self.scores.accuracy[i]),
            }
            if self.boundary is not None:
                rows[name]["boundary_iou"] = rounded(self.boundary[i])
        found: dict[str, Any] = {
            "summary": self.summary,
            "pictures": self.pictures,
            "skipped": self.skipped,
            "classes": rows,
        }
        if self.partial is not None:
            found["partial"] = self.partial
        if self.sweep is not None:
            found["sweep"] = {
                "threshold": [round(float(t), 6) for t in self.sweep[0]],
                "miou": [rounded(v) for v in self.sweep[1]],
            }
        return {**found, "protocol": self.choices, "confusion": self.scores.matrix.tolist()}


def rounded(value: float) -> float | None:
    """Round to two digits; None for a mean over classes that do not occur."""
    return None if np.isnan(value) else round(float(value), 2)


def table(rows: list[dict[str, Any]], columns: dict[str, str] | None = None) -> str:
    """Return summaries as a Markdown table; columns that no row has are left out."""
    names = columns or COLUMNS
    shown = [key for key in names if any(row.get(key) is not None for row in rows)]
    lines = ["| " + " | ".join(names[key] for key in shown) + " |", "|" + "---|" * len(shown)]
    lines += ["| " + " | ".join(_cell(row.get(key)) for key in shown) + " |" for row in rows]
    return "\n".join(lines)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def class_table(report: Report) -> str:
    """Return IoU and accuracy of each class as a Markdown table."""
    rows = []
    for i, name in enumerate(report.scores.classes):
        row = {
            "class": name,
            "iou": rounded(report.scores.iou[i]),
            "accuracy": rounded(report.scores.accuracy[i]),
        }
        if report.boundary is not None:
            row["boundary"] = rounded(report.boundary[i])
        if report.data.unseen:
            row["split"] = "unseen" if name in report.data.unseen else "seen"
        rows.append(row)
    columns = {"class": "class", "split": "split", "iou": "IoU", "accuracy": "accuracy"}
    return table(rows, {**columns, "boundary": "boundary IoU"})


def write_results(reports: list[Report], out: Path, **facts: Any) -> list[Path]:
    """Write ``results.json``, ``table.md`` and ``classes.csv``, IoU of every class in every row.

    Args:
        reports: of the evaluations so far.
        out: the folder.
        facts: what else ``results.json`` holds.
    """
    out.mkdir(parents=True, exist_ok=True)
    found = {**facts, "results": [report.to_dict() for report in reports]}
    write_text(out / "results.json", json.dumps(found, indent=1) + "\n")
    write_text(out / "table.md", table([report.summary for report in reports]) + "\n")
    lines = ["model,data,protocol,class,iou,accuracy"]
    for report in reports:
        for i, name in enumerate(report.scores.classes):
            row = [
                report.summary["model"],
                report.data.name,
                report.summary["protocol"],
                f'"{name}"',
                rounded(report.scores.iou[i]),
                rounded(report.scores.accuracy[i]),
            ]
            lines.append(",".join("" if value is None else str(value) for value in row))
    write_text(out / "classes.csv", "\n".join(lines) + "\n")
    return [out / name for name in ("results.json", "table.md", "classes.csv")]
