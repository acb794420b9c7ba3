"""Loss curves of runs."""

from __future__ import annotations

import statistics
from pathlib import Path

from ..figures import beside_the_work, new_figure, save_figure
from ..text_files import records_of

_COLOURS = (("#9ecae1", "#08519c"), ("#fdae6b", "#a63603"), ("#a1d99b", "#00682a"))


def plot_loss(log: Path, out: Path, title: str = "") -> Path | None:
    """Loss against step from ``log.jsonl``, raw and smoothed. None, with a warning, where it cannot be drawn."""
    return join_curves({title or "loss": log}, out)


@beside_the_work("loss curve")
def join_curves(logs: dict[str, Path], out: Path) -> Path | None:
    """One panel a run, four side by side."""
    curves = {title: _points(log) for title, log in logs.items()}
    curves = {title: points for title, points in curves.items() if points}
    if not curves:
        return None
    columns, rows = min(4, len(curves)), -(-len(curves) // 4)
    figure = new_figure(figsize=(5.5 * columns, 3.5 * rows))
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[len(curves) :]:
        axes.remove()
    for axes, (title, points), (pale, strong) in zip(panels, curves.items(), _COLOURS * len(curves), strict=False):
        steps, losses = zip(*points, strict=True)
        window = max(1, len(losses) // 20)  # a centred median: a running mean would trail the drop at the start
        smooth = [statistics.median(losses[max(0, i - window) : i + window + 1]) for i in range(len(losses))]
        axes.plot(steps, losses, color=pale, linewidth=0.8, label="loss")
        axes.plot(steps, smooth, color=strong, linewidth=1.6, label="smoothed")
        axes.set(xlabel="step", ylabel="loss", title=title)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    return save_figure(figure, out, dpi=120)


def _points(log: Path) -> list[tuple[int, float]]:
    entries = [entry for entry in records_of(log)[0] if "skipped" not in entry]
    return [(entry["step"], entry["loss"]) for entry in entries if {"step", "loss"} <= set(entry)]
