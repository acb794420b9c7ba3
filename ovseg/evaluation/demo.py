"""Results of the demo: the models that it has trained so far, measured on held-out scenes."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..data.scenes import Scenes
from ..errors import DataError
from ..progress import duration
from ..replacing import write_text
from ..systems import from_pretrained
from .report import Report
from .scenes import evaluate_scenes, save_gallery, scene_table

_KEPT = 10  # examples in the gallery
logger = logging.getLogger(__name__)


@dataclass
class DemoResults:
    """Results so far, written after each stage: a demo that is stopped leaves the rows that it has.

    Attributes:
        out: the folder of the demo.
        folders: of all rows that there may be, by their titles, in the order of tables.
        data, scenes, seed: what is measured on.
        quiet: whether nothing is said.
        seconds: of training, by the title of each stage that has been trained, in earlier demos
            too.
        reports: by title.
        facts: of ``results.json``.
    """

    out: Path
    folders: dict[str, str]
    data: str
    scenes: int
    seed: int
    quiet: bool = False
    seconds: dict[str, float] = field(init=False)
    reports: dict[str, Report] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    began: float = field(default_factory=time.time)

    def __post_init__(self) -> None:
        self.seconds = _earlier(self.out / "results.json")

    @property
    def done(self) -> list[str]:
        """The titles of what has been trained, in the order of tables."""
        return [title for title in self.folders if title in self.seconds]

    def measure(self, title: str, seconds: float) -> None:
        """Measure what has been trained and is not measured yet; write table, gallery and results.

        Args:
            title: of the stage that was trained last.
            seconds: of its training.
        """
        self.seconds[title] = seconds
        scenes = Scenes(self.data, "val", self.scenes, self.seed)
        for name in self.done:  # those of earlier demos too: the pictures need their predictions
            if name not in self.reports:
                self.reports[name] = self._report(name, scenes)
        self.reports = {name: self.reports[name] for name in self.done}
        rows = [report.summary for report in self.reports.values()]
        save_gallery(self.reports, self.out / "gallery.png")
        write_text(self.out / "table.md", scene_table(rows) + "\n")
        seen = [row["seen_miou"] or 0.0 for row in rows]  # None where no class of them occurs
        environment = self.out / self.folders[title] / "env.json"
        self.facts = {
            "data": self.data,
            "seed": self.seed,
            "rows": rows,
            "seen_miou_over_first": [value / max(seen[0], 1e-9) for value in seen],
            "seconds": round(time.time() - self.began, 1),
            "environment": json.loads(environment.read_text()),
        }
        write_text(self.out / "results.json", json.dumps(self.facts, indent=2) + "\n")

    def _report(self, title: str, scenes: Scenes) -> Report:
        model = from_pretrained(self.out / self.folders[title] / "model")
        report = evaluate_scenes(model, scenes, keep=_KEPT, progress=not self.quiet)
        report.summary |= {"model": title, "train_seconds": self.seconds[title]}
        logger.info(
            "%s: seen mIoU %s, trained in %s",
            title,
            report.summary["seen_miou"],
            duration(self.seconds[title]),
        )
        return report

    def lines(self) -> list[str]:
        """Return the table, and what the rows gain over the first."""
        rows = [report.summary for report in self.reports.values()]
        ratios = zip(rows[1:], self.facts["seen_miou_over_first"][1:], strict=True)
        shown = ", ".join(f"{row['model']} {ratio:.1f}" for row, ratio in ratios)
        compared = f"Seen-object mIoU over that of {rows[0]['model']!r}: {shown}; " if shown else ""
        return [scene_table(rows), f"\n{compared}{self.facts['seconds']:.0f} s in all."]


def _earlier(results: Path) -> dict[str, float]:
    """Return the seconds of training of each row of an earlier demo in the same folder."""
    if not results.exists():
        return {}
    try:
        rows: Sequence[Any] = json.loads(results.read_text("utf-8"))["rows"]
        return {row["model"]: row["train_seconds"] for row in rows}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{results} is damaged ({error!r}); expected the results of a demo. Remove it, or "
            "give a new --out"
        ) from error
