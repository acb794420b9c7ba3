"""The demo on photographs: small models trained on a folder of them, row by row and seed by seed.

The rows are those of ``photo_rows.yaml``; of each:

    title     in tables
    folder    of its runs, below --out, and its name on the command line
    recipe    what trains it
    data      parts of the photographs that it sees, folders below --root
    changes   overrides of the recipe

The layout of the photographs is that of docs/photos.md.
"""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .. import distributed
from ..bounds import AT_LEAST_0
from ..data.set_descriptions import describe
from ..errors import ConfigError, DataError, InputError
from ..paths import no_file, no_folder
from ..replacing import folder_for, write_text
from ..text_files import tree_of
from ..weights.teachers import write_teacher
from . import trainer
from .hooks import Hook, Step
from .recipe import Recipe, load_recipe
from .stages import check_names

_ROWS = Path(__file__).with_name("photo_rows.yaml")
_TEACHER = "teacher.npz"
_EFFORT = "effort.json"
_MASKS = "voc"  # the part with VOC's masks
# What each part must hold.
PARTS = {
    "coco_captions": "annotations",
    "voc_names": "names.tsv",
    "voc": "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt",
    "vectors": "zegclip_coco_single.npy",
}
# Files of text embeddings, and the set whose names their rows are, in order.
_VECTORS = {"zegclip_coco_single.npy": "coco_stuff", "zegclip_voc12_single.npy": "voc14"}


@dataclass(frozen=True)
class PhotoRow:
    """One row of the table; the attributes are keys of ``photo_rows.yaml``."""

    title: str
    folder: str
    recipe: str
    data: tuple[str, ...]
    changes: tuple[str, ...] = ()

    @property
    def supervised(self) -> bool:
        """True for a row that masks teach."""
        return _MASKS in self.data


def photo_rows() -> list[PhotoRow]:
    """Return all rows in the order of the table."""
    found = []
    for row in tree_of(_ROWS.read_text("utf-8")):
        data = tuple(row.pop("data"))
        changes = tuple(row.pop("changes", ()))
        found.append(PhotoRow(data=data, changes=changes, **row))
    return found


@dataclass(frozen=True)
class PhotoRun:
    """The training of one row with one seed."""

    row: PhotoRow
    seed: int
    folder: Path


@dataclass
class Effort:
    """The cost of a run, over all the times that it was started.

    Attributes:
        training_seconds: of its steps.
        encoding_seconds: of the trunk over those pictures that no earlier run had encoded.
        peak_megabytes: the most memory that the process had, with all that it did before.
    """

    training_seconds: float = 0.0
    encoding_seconds: float = 0.0
    peak_megabytes: float = 0.0


@dataclass
class PhotoJob:
    """A demo on photographs: the runs that are trained, and their folders.

    Attributes:
        root: the photographs.
        out: the folder of the runs and results.
        seeds: of all recipes, one run of each row a seed.
        names: folders of the rows; None: all.
        steps: of every stage, to try it; None leaves them to the recipes.
        overrides: of all recipes, after those of the rows.
        runs: in order, seed by seed.
        teacher: the file of text vectors that the models begin with.
    """

    root: Path
    out: Path
    seeds: Sequence[int] = (0,)
    names: Sequence[str] | None = None
    steps: int | None = None
    overrides: Sequence[str] = ()
    runs: list[PhotoRun] = field(init=False)
    teacher: Path = field(init=False)

    def __post_init__(self) -> None:
        distributed.place()  # variables that do not fit are refused before any work
        self.out = folder_for(self.out, "--out")
        if (what := no_folder(self.root)) is not None:
            raise InputError(f"--root {str(self.root)!r} {what}; expected a folder of photographs")
        # Recipes that are saved in a run name files, wherever the command was started.
        self.root = Path(self.root).resolve()
        self.out = Path(self.out).resolve()
        self.teacher = self.out / _TEACHER
        if len(set(self.seeds)) < len(self.seeds) or not self.seeds:
            raise InputError(f"--seeds is {list(self.seeds)}; expected different numbers")
        for seed in self.seeds:
            AT_LEAST_0.check("--seeds", seed, InputError)
        rows = {row.folder: row for row in photo_rows()}
        chosen = list(rows) if self.names is None else list(self.names)
        if unknown := [name for name in chosen if name not in rows]:
            raise InputError(f"--rows names {unknown[0]!r}; expected some of {', '.join(rows)}")
        kept = [row for name, row in rows.items() if name in chosen]
        self._check_parts(kept)
        self.runs = [
            PhotoRun(row, seed, self.out / row.folder / f"seed_{seed}")
            for seed in self.seeds
            for row in kept
        ]

    def _check_parts(self, rows: Sequence[PhotoRow]) -> None:
        """Raise DataError, in one sentence, if a part that is needed is missing."""
        needed = {part: [row.folder for row in rows if part in row.data] for part in PARTS}
        needed["vectors"] = needed[_MASKS] = [row.folder for row in rows]  # to begin, to measure
        for part, who in needed.items():
            if who and no_file(self.root / part / PARTS[part]) not in (None, "is a folder"):
                raise DataError(
                    f"{self.root} lacks {part}/{PARTS[part]}, which these rows need: "
                    f"{', '.join(who)}; expected the layout of docs/photos.md, or --rows without "
                    "them"
                )

    def recipes(self) -> dict[PhotoRun, Recipe]:
        """Return the recipe of each run.

        Raises:
            ConfigError: where a folder holds another run.
        """
        return {run: self._recipe(run) for run in self.runs}

    def _recipe(self, run: PhotoRun) -> Recipe:
        recipe = load_recipe(run.row.recipe, [*run.row.changes, *self.overrides])
        places = [str(self.root / part) for part in run.row.data]
        recipe.data.root = places[0] if len(places) == 1 else places
        recipe.train.seed = run.seed
        recipe.train.cache = str(self.out / "cache")
        text = recipe.model.options.get("text", {})
        if text.get("kind") == "vectors":
            text["teacher"] = str(self.teacher)
        if self.steps is not None:
            recipe.train.epochs = None
            recipe.train.steps = self.steps
            for stage in recipe.stages:
                stage["train"] = {**stage.get("train", {}), "epochs": None, "steps": self.steps}
        check_names(folder_for(run.folder, "--out needs a folder, and"))
        saved = run.folder / "config.yaml"
        # Another seed or other data: going on would mix two runs.
        if saved.exists() and load_recipe(saved) != recipe:
            raise ConfigError(
                f"{run.folder} was begun with other settings; expected a new --out, or the same "
                "command again"
            )
        return recipe

    def write_teacher(self, width: int) -> None:
        """Write the text vectors that all runs begin with."""
        folder = self.root / "vectors"
        # As the set is described, with all its names.
        tables = [
            (describe(name).tree["classes"], folder / file) for file, name in _VECTORS.items()
        ]
        write_teacher(self.teacher, tables, width)


def train_runs(
    job: PhotoJob,
    done: Collection[PhotoRun],
    after: Callable[[PhotoRun, Effort], Any],
    *,
    quiet: bool = False,
) -> None:
    """Train what is not trained yet; a demo that was stopped goes on.

    Args:
        job: what is trained.
        done: runs that are left out.
        after: called with each run that has been trained, and what it took.
        quiet: whether the runs say nothing.

    Raises:
        Interrupted: when a signal has come and the state is saved.
    """
    recipes = job.recipes()  # all, before the first of them trains
    texts = [recipe.model.options.get("text", {}) for recipe in recipes.values()]
    if widths := {text.get("width", 512) for text in texts if "teacher" in text}:
        job.write_teacher(max(widths))
    for run, recipe in recipes.items():
        if run in done:
            continue
        with _Clock(run.folder / _EFFORT) as clock:
            trainer.train(recipe, run.folder, resume="auto", quiet=quiet, hooks=[clock])
        after(run, clock.effort)


class _Clock(Hook):
    """Adds up what a run takes, in a file beside it."""

    def __init__(self, path: Path):
        self.path = path
        self.effort = Effort()
        if no_file(path) is None:
            try:
                self.effort = Effort(**json.loads(path.read_text("utf-8")))
            except (ValueError, TypeError) as error:
                raise DataError(
                    f"{path} is damaged ({error}); remove it, and the seconds begin anew"
                ) from error

    def before_steps(self, trainer: trainer.Trainer) -> None:
        self.effort.encoding_seconds += trainer.encoding_seconds

    def after_step(self, trainer: trainer.Trainer, step: Step) -> None:
        self.effort.training_seconds += step.seconds

    def __enter__(self) -> _Clock:
        return self

    def __exit__(self, *error: object) -> None:
        if self.effort == Effort():
            return  # nothing was begun
        self.effort.peak_megabytes = max(self.effort.peak_megabytes, peak_megabytes())
        write_text(self.path, json.dumps(asdict(self.effort)) + "\n")


def peak_megabytes() -> float:
    """Return the most memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak / 1e3  # bytes there, kilobytes here
