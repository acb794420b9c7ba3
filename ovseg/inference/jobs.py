"""Many pictures into one folder: the job, its results, and the journal of what is done already."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from .. import distributed
from ..data.file_types import JOURNAL
from ..data.labels import LabelSet
from ..errors import InputError
from ..output_lock import locked_folder
from ..paths import no_file
from ..progress import bar, note
from ..replacing import folder_for, replacing
from ..systems import OVSegModel
from ..text_files import records_of
from ..weights.files import bytes_of
from .built_in import BuiltIn
from .known_words import check_words, tell_stand_in
from .predictor import Predictor, as_published
from .queries import Queries
from .segmentation import Segmentation, save_result, strip
from .sources import Source, find_pictures

ENDINGS = {"overlay": ".overlay.png", "mask": ".mask.png", "json": ".json", "rle": ".rle.json"}
_SHOWN = 5  # labels of one picture, the largest
logger = logging.getLogger(__name__)


@dataclass
class SegmentJob:
    """Pictures that are labelled into a folder.

    Attributes:
        pictures: names of files, folders, patterns, lists and shards, as ``find_pictures`` takes
            them.
        labels: what is asked for; None: the labels of the example.
        out: the folder of the results; a picture keeps its path below the folder that was named.
        formats: what is written of each picture, some of ``ENDINGS``.
        options: of ``Predictor``.
        example: gives a built-in picture for the model, which is labelled first.
        overwrite: whether pictures are done again that were done by the same job.
        allow_unknown: whether a model that knows few words is asked for others.
        tell: takes the lines about results, one by one.
    """

    pictures: Sequence[str]
    labels: LabelSet | None = None
    out: str | Path = "segmented"
    formats: Sequence[str] = ("overlay",)
    options: Mapping[str, Any] = field(default_factory=dict)
    example: Callable[[OVSegModel], BuiltIn] | None = None
    overwrite: bool = False
    allow_unknown: bool = False
    tell: Callable[[str], None] = logger.info

    def __post_init__(self) -> None:
        for name in self.formats:
            if name not in ENDINGS:
                raise InputError(f"--format holds {name!r}; expected some of {', '.join(ENDINGS)}")
        self.out = folder_for(self.out, "--out")

    def check_labels(self) -> None:
        """Refuse a job that is asked for nothing.

        Raises:
            InputError: if there are no labels.
        """
        if not self.labels and not (self.labels is None and self.example):
            raise InputError('no labels: give --labels "cat,grass" or --labels-file')

    def files(self, name: str) -> list[Path]:
        """Return the files of a picture's results."""
        return [Path(self.out) / f"{name}{ENDINGS[kind]}" for kind in self.formats]

    def write(self, result: Segmentation, name: str, image: str) -> None:
        """Write the results of a picture in all formats."""
        for kind, file in zip(self.formats, self.files(name), strict=True):
            with replacing(file) as part:
                _write(result, kind, part, image)


@dataclass
class Outcome:
    """The end of a job in this process.

    Attributes:
        written: pictures that were labelled.
        before: pictures that an earlier run had labelled.
        skipped: what could not be used.
    """

    written: int = 0
    before: int = 0
    skipped: list[str] = field(default_factory=list)


def segment_pictures(job: SegmentJob, load: Callable[[], OVSegModel]) -> Outcome:
    """Label the pictures of a job; of several processes each takes its share.

    Args:
        job: what is labelled, by which labels, and where results go.
        load: gives the model, on its device; called once all that is cheap to see is seen to be
            right.

    Raises:
        InputError: without pictures or labels; for a single picture that cannot be read; where
            results would be written over pictures; for options that the model does not have.
    """
    distributed.place()  # variables that do not fit are refused before any work
    if "" in job.pictures:  # as a path, the present folder
        raise InputError(
            "a picture's name is empty; expected files, folders, patterns, lists or shards"
        )
    sources, bad = find_pictures(job.pictures)
    if not sources and job.example is None:
        raise InputError("\n".join(["no pictures: give files or folders, or --demo", *bad]))
    job.check_labels()
    alone = len(sources) == 1 and job.example is None
    if alone and (what := no_file(sources[0].path)) is not None:
        raise InputError(f"image {str(sources[0].path)!r} {what}; expected a picture")
    _check_apart(sources, job.files)
    with locked_folder(Path(job.out), "--out", "segment"):
        model = load()
        job = replace(job, options=as_published(model, job.options))
        example = None if job.example is None else job.example(model)
        predictor = Predictor(model, **job.options)
        asked = example.labels if example is not None and job.labels is None else job.labels
        queries = replace(predictor.queries, labels=asked)
        _check_words(job, predictor, queries)
        tell_stand_in(model)
        rank = distributed.rank()
        world = distributed.world_size()
        outcome = Outcome(skipped=list(dict.fromkeys(bad)) if rank == 0 else [])  # may overlap
        for problem in outcome.skipped:
            note(f"skipped: {problem}")
        few = len(sources) + (example is not None) < 3 and world == 1
        if example is not None and rank == 0:
            _segment_example(job, example, predictor, queries, few)
        _Run(job, predictor, queries, outcome, few, alone).label(sources[rank::world])
    if not few or outcome.skipped:
        earlier = f", {outcome.before} done before" if outcome.before else ""
        share = f" (process {rank} of {world})" if world > 1 else ""
        job.tell(
            f"{outcome.written} pictures into {job.out}{earlier}, {len(outcome.skipped)} "
            f"skipped{share}"
        )
    return outcome


def _check_words(job: SegmentJob, predictor: Predictor, queries: Queries) -> None:
    try:
        check_words(predictor.model, queries)
    except InputError as error:
        if not job.allow_unknown:
            raise
        note(str(error).partition(";")[0])


def _segment_example(
    job: SegmentJob, example: BuiltIn, predictor: Predictor, queries: Queries, few: bool
) -> None:
    """Label the example, and show its truth beside the labels where its own were asked for."""
    found = predictor.predict_batch([example.image], queries)[0]
    job.write(found, "demo", "demo")
    if few:
        _show(job, found, "demo")
    if job.labels is None and example.truth is not None:
        path = Path(job.out) / "demo.strip.png"
        maps = {"truth": example.truth, predictor.model.name: found.labels}
        save_result(strip(found.image, maps, found.names), path)
        job.tell(str(path))


@dataclass
class _Run:
    """The pictures of a job in this process.

    Attributes:
        few: whether results are shown one by one; such pictures are always done.
        alone: whether there is one picture, whose error is the error of the job.
    """

    job: SegmentJob
    predictor: Predictor
    queries: Queries
    outcome: Outcome
    few: bool
    alone: bool

    def label(self, sources: Sequence[Source]) -> None:
        """Label what is not done yet."""
        journal = Journal(Path(self.job.out), None if self.few else self._settings())
        todo = [
            source
            for source in sources
            if self.few
            or self.job.overwrite
            or not journal.has(source, self.job.files(source.name))
        ]
        self.outcome.before = len(sources) - len(todo)
        progress = bar(
            total=len(sources),
            initial=self.outcome.before,
            show=distributed.is_main(),
            unit="picture",
            desc="segment",
            leave=not self.few,
            delay=2.0 * self.few,
        )
        for source, result in self.predictor.stream(todo, self.queries):
            progress.update()
            problem = self._result(source, result)
            if problem is None:
                journal.add(source, self.job.files(source.name))
                self.outcome.written += 1
            else:
                self.outcome.skipped.append(str(source))
                note(f"skipped: {problem}")
            del result  # before the next one is read
        progress.close()

    def _settings(self) -> dict[str, Any]:
        """Return whatever changes a result, for the journal."""
        labels = self.queries.labels
        assert labels is not None
        model = self.predictor.model
        return {
            **self.job.options,
            "labels": [labels.names, labels.texts, labels.templates],
            "model": fingerprint(model),
            "readout": str(model.config.get("readout")),
        }

    def _result(self, source: Source, result: Segmentation | InputError) -> str | None:
        """Write a result; return what is wrong with the picture, in words, if something is."""
        if isinstance(result, InputError):
            if self.alone:
                raise result
            return str(result) if str(source) in str(result) else f"{source}: {result}"
        try:
            self.job.write(result, source.name, str(source))
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:
                raise
            problem = f"{source}: the names of its results are too long for the file system"
            if self.alone:
                raise InputError(f"{problem}: {error}") from error
            return problem
        if self.few:
            _show(self.job, result, source.name)
        return None


def _show(job: SegmentJob, result: Segmentation, name: str) -> None:
    """Tell the largest labels of one of few pictures, and where its results lie."""
    largest = sorted(result.areas.items(), key=lambda item: -item[1])[:_SHOWN]
    shares = [f"{label} {100 * share:.1f} %" for label, share in largest if share > 0]
    job.tell(", ".join(shares) or "background only")
    for file in job.files(name):
        job.tell(str(file))


def _check_apart(sources: Sequence[Source], files: Callable[[str], list[Path]]) -> None:
    """Refuse results that would replace a picture which is to be read.

    What is no result of an earlier run is the user's own.
    """
    places: dict[Path, str] = {}

    def place(path: Path) -> str:
        if path.parent not in places:
            places[path.parent] = os.path.realpath(path.parent)
        return os.path.join(places[path.parent], path.name)

    pictures = {place(source.path): source for source in sources if source.offset is None}
    for source in sources:
        for file in files(source.name):
            if (other := pictures.get(place(file))) is not None:
                raise InputError(
                    f"the result of {str(source)!r} would be written over {str(other)!r}, which "
                    "is a picture to segment; expected another --out"
                )


def _write(result: Segmentation, kind: str, path: Path, image: str) -> None:
    """Write one format of a result."""
    if kind == "overlay":
        result.save(path)
    elif kind == "mask":
        result.save_mask(path)
    elif kind == "json":
        path.write_text(json.dumps({"image": image, **result.to_dict()}, indent=2))
    else:  # rows of a large picture are not held at once
        with open(path, "w") as file:
            file.write(f'{{"image": {json.dumps(image)}, "labels": [')
            for i, row in enumerate(result.rle_rows()):
                file.write(", " * (i > 0) + json.dumps(row))
            file.write("]}")


class Journal:
    """The record of what has been done in a folder under the present settings.

    It has a line for each picture, so that a killed run can go on.

    Args:
        folder: of the results; the journal is ``ovseg_segment.jsonl`` in it.
        settings: whatever changes a result. Results of other settings are not taken for done. None:
            nobody asks what is done; what is added counts for nothing later.
    """

    def __init__(self, folder: Path, settings: dict[str, Any] | None):
        self.path = folder / JOURNAL
        self.key = ""
        self._done: dict[str, tuple[list[Any], dict[str, int]]] = {}
        if settings is None:
            return
        self.key = f"{zlib.crc32(json.dumps(settings, sort_keys=True).encode()):08x}"
        for entry in records_of(self.path)[0]:  # without the line that a kill cut off
            with contextlib.suppress(KeyError, TypeError, ValueError):  # a line of something else
                self._note(
                    entry["name"],
                    [entry["settings"], *entry["source"]],
                    dict(entry.get("files") or {}),
                )

    def has(self, source: Source, files: Sequence[Path]) -> bool:
        """Return whether this picture, as it is now, was written under these settings.

        Its files must still be there, as long as they were.
        """
        state, sizes = self._done.get(source.name, ([], {}))
        known = no_file(source.path) is None and state == [self.key, *_state(source)]
        return known and all(
            no_file(file) is None and _as_written(file.stat().st_size, sizes.get(file.name))
            for file in files
        )

    def add(self, source: Source, files: Sequence[Path]) -> None:
        """Note that ``files`` are the results of a picture."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        sizes = {file.name: file.stat().st_size for file in files}
        entry = {
            "name": source.name,
            "settings": self.key,
            "source": _state(source),
            "files": sizes,
        }
        with open(self.path, "a", encoding="utf-8") as journal:
            # It begins with a line break, in case a kill cut the last line off. One write: lines of
            # several processes do not mix.
            journal.write("\n" + json.dumps(entry))

    def _note(self, name: str, state: list[Any], sizes: dict[str, int]) -> None:
        """Remember an entry; other formats of the same result come one after another."""
        before, others = self._done.get(name, (None, {}))
        self._done[name] = (state, {**others, **sizes} if before == state else sizes)


def _as_written(size: int, noted: int | None) -> bool:
    """Return whether a file is as long as it was.

    Journals of earlier versions hold no sizes; what is empty was never written.
    """
    return size > 0 if noted is None else size == noted


def _state(source: Source) -> list[Any]:
    """Return what changes where another picture lies in a picture's place."""
    status = source.path.stat()
    return [str(source.path.resolve()), source.member, status.st_size, status.st_mtime_ns]


def fingerprint(model: torch.nn.Module) -> str:
    """Return eight digits that change with any weight."""
    value = 0
    for name, tensor in sorted(model.state_dict().items()):
        value = zlib.crc32(name.encode(), value)
        value = zlib.crc32(bytes_of(tensor), value)
    return f"{value:08x}"
