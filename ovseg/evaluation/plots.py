"""Plots of evaluations: confusion matrix, IoU of each class, background-threshold curves.

And of a look at a data set, the shares of its classes. What cannot be drawn is None, with a
warning.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import numpy as np

from ..data.benchmark_sets import SegmentationSet
from ..data.check import CheckReport
from ..figures import beside_the_work, new_figure, save_figure
from ..replacing import write_text
from .report import Report

_MOST_NAMED = 60  # rows of a confusion matrix that are still labelled


@beside_the_work("confusion matrix")
def plot_confusion(report: Report, out: Path) -> Path | None:
    """Draw a row for each truth, in percent of its pixels, and a column for each prediction."""
    matrix = report.scores.matrix.astype(float)
    names = [*report.scores.classes, "no label"][: matrix.shape[1]]
    if matrix.shape[1] > len(report.scores.classes) and not matrix[:, -1].any():
        matrix = matrix[:, :-1]
        names = names[:-1]
    rows = matrix.sum(1) > 0
    share = 100 * matrix[rows] / matrix[rows].sum(1, keepdims=True)
    size = min(16.0, 3.5 + 0.26 * len(names))
    if not rows.any():
        return None
    figure = new_figure(figsize=(size + 1, size))
    axes = figure.subplots()
    image = axes.imshow(share, cmap="viridis", vmin=0, vmax=100, aspect="auto")
    figure.colorbar(image, ax=axes, label="% of the truth's pixels")
    axes.set(xlabel="prediction", ylabel="truth", title=_title(report))
    if len(names) <= _MOST_NAMED:
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=8)
        axes.set_yticks(range(int(rows.sum())), np.array(report.scores.classes)[rows], fontsize=8)
    return save_figure(figure, out, dpi=110)


@beside_the_work("plot of the classes")
def plot_classes(report: Report, out: Path) -> Path | None:
    """Draw the IoU of each class, sorted; unseen classes in another colour."""
    values = {
        name: float(iou)
        for name, iou in zip(report.scores.classes, report.scores.iou, strict=True)
        if not np.isnan(iou)
    }
    marked = dict.fromkeys(report.data.unseen, "#d95f02")
    return plot_bars(
        values,
        out,
        _title(report) + f", mIoU {report.scores.miou:.1f}",
        colours=marked,
        label="IoU, %",
        note="unseen classes orange" if report.data.unseen else "",
    )


@beside_the_work("plot of bars")
def plot_bars(
    values: dict[str, float],
    out: Path,
    title: str,
    *,
    colours: dict[str, str] | None = None,
    label: str = "%",
    log: bool = False,
    note: str = "",
) -> Path | None:
    """Draw a bar for each name, the largest first."""
    order = sorted(values, key=lambda name: -values[name])
    if not order:
        return None
    figure = new_figure(figsize=(min(30.0, 3 + 0.24 * len(order)), 4.2))
    axes = figure.subplots()
    axes.bar(
        range(len(order)),
        [values[name] for name in order],
        color=[(colours or {}).get(name, "#1f77b4") for name in order],
    )
    axes.set_xticks(range(len(order)), order, rotation=90, fontsize=8)
    axes.set(
        ylabel=label, title=title + (f" ({note})" if note else ""), xlim=(-0.8, len(order) - 0.2)
    )
    if log and max(values.values()) > 0:
        axes.set_yscale("log")
    axes.grid(axis="y", alpha=0.3)
    return save_figure(figure, out, dpi=110)


@beside_the_work("sweep of the threshold")
def plot_sweeps(reports: dict[str, Report], out: Path) -> Path | None:
    """Draw mIoU against the background threshold, a curve a report, its best point marked."""
    curves = {name: report.sweep for name, report in reports.items() if report.sweep is not None}
    if not curves:
        return None
    figure = new_figure(figsize=(10, 4.4))
    axes = figure.subplots()
    for name, (thresholds, miou) in curves.items():
        best = int(np.nanargmax(miou))
        line = axes.plot(
            thresholds, miou, label=f"{name}: {miou[best]:.1f} at {thresholds[best]:.3g}"
        )[0]
        axes.plot(thresholds[best], miou[best], "o", color=line.get_color())
    first = next(iter(reports.values()))
    axes.set(
        xlabel=f"background threshold ({first.choices['scores']})",
        ylabel="mIoU, %",
        title=first.choices["data"],
    )
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    return save_figure(figure, out, dpi=110)


def write_check(report: CheckReport, data: SegmentationSet, split: str, out: Path) -> list[Path]:
    """Write what a check of a data set found, and draw its classes; returns the files."""
    about = data.description
    stem = f"{about.name}_{split}"
    file = out / f"{stem}.json"
    write_text(file, json.dumps({**asdict(report), "wrong": report.wrong}, indent=2))
    drawn = plot_bars(
        {name: 100 * share for name, share in report.shares.items()},
        out / f"{stem}.png",
        f"{about.title}, {split}: % of the counted pixels",
        log=True,
    )
    return [path for path in (file, drawn) if path]


def _title(report: Report) -> str:
    return f"{report.summary['model']} on {report.data.name}, {report.summary['protocol']}"
