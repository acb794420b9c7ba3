"""``train.cache``: what a frozen image tower gives is computed once, and steps read it from disk.

The folder holds a subfolder for each key: the tensors and options of the tower, the precision it
runs in, how pictures are normalised, which pictures they are and what some of them look like. Other
weights, another view or other pictures are another key, so that nothing stale is ever read.
``data/feature_store.py`` has the files, ``data/cached_source.py`` what reads them.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .. import distributed
from ..data.batches import Batch
from ..data.cached_source import CachedSource
from ..data.feature_store import FeatureStore, Form, in_words
from ..data.loader import Loader
from ..data.sampling import generator, rank_slice
from ..data.sources.base import Sample, Source
from ..errors import ConfigError, DataError, InputError, first_line
from ..output_lock import locked_folder
from ..progress import bar
from ..replacing import folder_for
from ..systems import OVSegModel
from ..systems.objective import Objective
from ..time_limits import data_limit
from ..weights.files import tensors_hash
from .gradients import Cast
from .recipe import Recipe

logger = logging.getLogger(__name__)
LIMIT = 20 << 30  # bytes, where train.cache_limit says nothing
_OF_PICTURES = ("pictures", "some")  # facts of a key that say which pictures they are
_SAMPLES = 4  # pictures whose pixels are part of the key
_TRIES = 32  # pictures in a row that cannot be read
_AT_ONCE = 32  # pictures of a process, at most: maps of convolutions are large
_MOST = torch.finfo(torch.float16).max


def check_cache(recipe: Recipe, objective: Objective) -> None:
    """Refuse ``train.cache`` where the tower does not give the same of a picture in every step.

    Raises:
        ConfigError: for a tower that is trained, an objective that looks at pictures, data that
            are augmented.
        InputError: for a folder that cannot be one.
    """
    cache = recipe.train.cache
    if cache is None:
        return
    where = f"train.cache is {cache!r}"
    folder_for(cache, "train.cache")
    model = objective.model
    name = recipe.model.name
    if not model.frozen_tower:
        raise ConfigError(
            f"{where} and the image tower of {name} does not stay as it is: model.options.trained "
            f"is {list(model.options.trained)}; expected a frozen tower (PACL without 'vision', "
            "MGCA, ZegCLIP on a trunk), or train.cache null"
        )
    if not objective.takes_features:
        raise ConfigError(
            f"{where} and the objective {type(objective).__name__} looks at pictures themselves; "
            "expected that of PACL, MGCA, ZegCLIP or clip_dense, or train.cache null"
        )
    augment = getattr(recipe.data, "augment", None)
    if augment is None:
        return
    drawn = getattr(augment, "drawn", None)
    if drawn is None:
        raise ConfigError(
            f"{where} and data.augment of data.kind {recipe.data.kind!r} crops at random; expected "
            "data.augment null, data without random views, or train.cache null"
        )
    if (field := drawn()) is not None:
        raise ConfigError(
            f"{where} and data.augment.{field} is {getattr(augment, field)!r}: a picture looks "
            "different each time, and one view of it is kept; expected "
            "data.augment={scale: [1, 1], ratio: [1, 1], flip: 0, rand_augment: null, erase: 0}, "
            "or train.cache null"
        )


@dataclass(frozen=True)
class Tower:
    """A frozen tower that is ready to encode.

    Attributes:
        model: whole, on its device.
        cast: makes the autocast context that steps run in.
        precision: what that is called.
    """

    model: OVSegModel
    cast: Cast
    precision: str

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int], int]:
        """Return rows [B, N D + E] in float32 on the device, the grid and D."""
        model = self.model
        images = images.to(next(model.parameters()).device, non_blocking=True)
        with self.cast():
            found = model.encode_tower(
                images if images.is_floating_point() else model.normalize(images)
            )
        rows = torch.cat([found.tokens.flatten(1).float(), found.embedding.float()], 1)
        return rows, found.grid, found.tokens.shape[2]


def fill_cache(
    source: CachedSource,
    tower: Tower,
    recipe: Recipe,
    *,
    asked: Callable[[], bool],
    show: bool,
) -> bool:
    """Encode the pictures that are not in the cache yet, and let ``source`` read from it.

    Called by all processes, each of which encodes its share.

    Args:
        source: of the stage.
        tower: with its weights.
        recipe: of the stage.
        asked: whether this process is to stop.
        show: whether this process shows a bar.

    Returns:
        False if a process was asked to stop; what is encoded stays.

    Raises:
        DataError: if there is no room or the disk fills, if numbers exceed float16, if pictures
            cannot be read.
        ConfigError: if pictures look different each time.
        InputError: if another run is writing into the same subfolder.
    """
    cache = recipe.train.cache
    assert cache is not None
    root = Path(cache)
    limit = recipe.train.cache_limit or LIMIT
    model = tower.model
    was = model.training
    model.eval()
    try:
        form, facts = _from_main(lambda: _key(source.pictures, tower, show=show))
        name = hashlib.blake2b(json.dumps([form, facts]).encode(), digest_size=8).hexdigest()
        store = FeatureStore(root / name, Form(**{**form, "grid": tuple(form["grid"])}), facts)
        whole = _from_main(lambda: store.exists() and len(store.missing()) == 0)
        bad: dict[int, str] | None = {}
        if not whole:
            with locked_folder(store.folder, "train.cache", "train"):
                _from_main(lambda: _prepare(store, source.pictures, limit))
                bad = _Filling(store, source.pictures, tower, recipe, asked, show=show).run()
    finally:
        model.train(was)
    if bad is None:
        return False
    if distributed.is_main():
        logger.info(
            "train.cache: features of %d pictures are read from %s, %s",
            store.form.pictures - len(bad),
            store.folder,
            in_words(store.form.size),
        )
    source.use(store, bad)
    return True


def _from_main(compute: Callable[[], Any]) -> Any:
    """Return to all processes what the main one computes, as JSON holds it, or raise its error."""
    found = None
    failure = None
    if distributed.is_main():
        try:
            found = compute()
        except (ConfigError, DataError, InputError, OSError) as error:
            failure = [isinstance(error, ConfigError), str(error)]
    found, failure = distributed.broadcast_json([found, failure])
    if failure is not None:
        is_config, text = failure
        raise ConfigError(text) if is_config else DataError(text)
    return found


def _key(source: Source[Any], tower: Tower, *, show: bool) -> list[dict[str, Any]]:
    """Return the form of the rows, and what they depend on; for JSON."""
    first, images = _first(source)
    again = source.collate([source.read(first, generator(first + 1))]).images
    if not torch.equal(images, again):
        raise ConfigError(
            f"train.cache is set and picture {first} of {source.describe()} looks different each "
            "time it is read; expected data without random views, or train.cache null"
        )
    rows, grid, width = tower.encode(images)
    form = Form(len(source), grid, width, rows.shape[1] - math.prod(grid) * width)
    spec = tower.model.spec
    count = len(source)
    some = sorted({first, *(i * (count - 1) // (_SAMPLES - 1) for i in range(_SAMPLES))})
    facts = {
        "tower": tensors_hash(tower.model.tower_tensors()),
        "options": tower.model.tower_options(),
        "precision": tower.precision,
        "view": {"size": list(images.shape[2:]), "mean": list(spec.mean), "std": list(spec.std)},
        "pictures": source.identity(progress=show),
        "some": {str(i): source.digest_of(i).hex()[:32] for i in some},
    }
    return [asdict(form), json.loads(json.dumps(facts, default=str))]


def _first(source: Source[Any]) -> tuple[int, torch.Tensor]:
    """Return the number and the pixels [1, 3, H, W] of the first picture that can be read."""
    problem = ""
    for index in range(min(_TRIES, len(source))):
        try:
            return index, source.collate([source.read(index, generator(index))]).images
        except (InputError, DataError) as error:
            problem = problem or str(error)
    raise DataError(
        f"{min(_TRIES, len(source))} pictures in a row cannot be used; the first: {problem}"
    )


def _prepare(store: FeatureStore, pictures: Source[Any], limit: int) -> None:
    """Look for room, and make the files unless rows are there that only lack some.

    Rows of the same pictures that lie in folders of other keys, and are the same, are copied.
    """
    store.check_room(limit)
    if not store.exists() and any(file.suffix == ".bin" for file in store.folder.iterdir()):
        logger.warning("train.cache: %s is damaged and is made anew", store.folder)
    try:
        if not store.exists():
            store.create(pictures.identities())
        if copied := store.take_over(_OF_PICTURES):
            logger.info("train.cache: features of %d pictures were there already", copied)
    except OSError as error:
        raise DataError(
            f"train.cache: {store.folder} cannot be written ({first_line(error)}); expected a "
            "folder and a disk that can be"
        ) from error


@dataclass
class _Read(Sample):
    """A picture that is to be encoded, or why there is none."""

    number: int
    inside: Sample | None
    problem: str = ""


@dataclass
class _Pictures(Batch):
    """Pictures and their numbers, and the numbers of those that cannot be read -> why."""

    numbers: list[int]
    problems: dict[int, str]


class _Share(Source[_Read]):
    """The pictures that one process encodes. None is replaced by another."""

    batch_type = _Pictures

    def __init__(self, pictures: Source[Any], numbers: np.ndarray):
        self.pictures = pictures
        self.numbers = numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, index: int, rng: torch.Generator) -> _Read:
        number = int(self.numbers[index])
        try:
            return _Read(number, self.pictures.read(number, generator(number)))
        except (InputError, DataError) as error:
            return _Read(number, None, str(error))

    def collate(self, samples: Sequence[_Read]) -> _Pictures:
        good = [sample for sample in samples if sample.inside is not None]
        images = torch.empty(0, 3, 0, 0, dtype=torch.uint8)
        if good:
            images = self.pictures.collate([sample.inside for sample in good]).images
        problems = {sample.number: sample.problem for sample in samples if sample.inside is None}
        return _Pictures(images, [sample.number for sample in good], problems)

    def describe(self) -> dict[str, Any]:
        return self.pictures.describe()


class _Filling:
    """Encodes the rows that are missing, all processes together.

    Args:
        store: which they hold the lock of.
        source: of the pictures.
        tower: that encodes them.
        recipe: says how many workers read, and how many pictures are encoded at once.
        asked: whether this process is to stop.
        show: whether this process shows a bar.
    """

    def __init__(
        self,
        store: FeatureStore,
        source: Source[Any],
        tower: Tower,
        recipe: Recipe,
        asked: Callable[[], bool],
        *,
        show: bool,
    ):
        self.store = store
        self.source = source
        self.tower = tower
        self.recipe = recipe
        self.asked = asked
        self.show = show
        each = math.ceil(recipe.train.batch_size / distributed.world_size())
        self.size = min(_AT_ONCE, recipe.train.chunk or each)
        self.problems: dict[int, str] = {}

    def run(self) -> dict[int, str] | None:
        """Encode them; return number -> why of those that cannot be, None if asked to stop."""
        if distributed.any_flag(not self.store.exists())[0]:
            raise ConfigError(
                f"train.cache {str(self.store.folder.parent)!r}: what the main process made there "
                "is not there for all; expected a folder that all processes see"
            )
        began = time.monotonic()
        missing = self.store.missing()
        distributed.barrier()  # nobody writes before all have read
        ranks = distributed.world_size()
        own = missing[rank_slice(len(missing), distributed.rank(), ranks)]
        rounds = math.ceil(math.ceil(len(missing) / ranks) / self.size)
        there = self.store.form.pictures - len(missing)
        if distributed.is_main():
            logger.info(
                "train.cache: %d of %d pictures are encoded into %s, %s",
                len(missing),
                self.store.form.pictures,
                self.store.folder,
                in_words(self.store.form.size),
            )
        with (
            bar(
                show=self.show,
                total=self.store.form.pictures,
                initial=there,
                unit="picture",
                desc="encoding pictures",
            ) as shown,
            self._loader(own) as loader,
        ):
            batches = iter(loader)
            for _ in range(rounds):
                stopping, done = self._round(batches)
                shown.update(done)
                if stopping:
                    return None
        found = [json.dumps(problem) for problem in self.problems.items()]
        problems = {int(n): why for n, why in map(json.loads, distributed.gather_strings(found))}
        if lacking := set(self.store.missing().tolist()) - problems.keys():
            raise DataError(
                f"{self.store.folder} lacks {len(lacking)} pictures that were written; expected a "
                "folder that nobody else writes into"
            )
        if distributed.is_main():
            logger.info("train.cache: encoded in %.1f s", time.monotonic() - began)
        return problems

    def _loader(self, own: np.ndarray) -> Any:
        """Return the pictures of this process in batches, read by workers as training reads."""
        if not len(own):
            return _Nothing()
        options = self.recipe.data
        return Loader(
            _Share(self.source, own),
            min(self.size, len(own)),
            epochs=1,
            drop_last=False,
            shuffle=False,
            workers=options.workers,
            prefetch=options.prefetch,
            timeout=data_limit(),
            tell_signals=True,
        )

    def _round(self, batches: Iterator[Any]) -> tuple[bool, int]:
        """Encode a batch of each process.

        Returns:
            Whether any is to stop, and how many pictures all have encoded.

        Raises:
            DataError: in all processes if it fails in one of them.
        """
        failure = ""
        done = 0
        try:
            if (batch := next(batches, None)) is not None:
                self._encode(batch)
                self.problems |= batch.problems
                done = len(batch.numbers)
        except (DataError, InputError, OSError) as error:
            failure = str(error) or repr(error)
        counts = np.array([bool(failure), self.asked(), done], np.int64)
        failed, stopping, done = distributed.all_reduce_sum(counts).tolist()
        if failed:
            failure = distributed.gather_strings([failure] if failure else [])[0]
            count = self.store.form.pictures
            whole = count - len(self.store.missing())
            raise DataError(f"{failure}; {whole} of {count} pictures are in the cache and stay")
        return bool(stopping), done

    def _encode(self, batch: _Pictures) -> None:
        """Encode pictures and write their rows.

        Raises:
            DataError: for numbers that float16 does not hold, and if they cannot be written.
        """
        if not batch.numbers:
            return
        form = self.store.form
        rows, grid, width = self.tower.encode(batch.images)
        if (grid, width, rows.shape[1]) != (form.grid, form.width, form.row):
            raise DataError(
                f"pictures {batch.numbers[0]} to {batch.numbers[-1]} give a grid of {list(grid)} "
                f"tokens and the first picture one of {list(form.grid)}; expected one size"
            )
        largest = rows.abs().amax(1)
        held = (largest <= _MOST).cpu()  # False for NaN too
        if not bool(held.all()):
            at = int((~held).nonzero()[0])
            raise DataError(
                f"the image tower gives {float(largest[at]):g} of picture {batch.numbers[at]}, "
                f"which float16 does not hold (up to {_MOST:g}); expected train.cache null for "
                "such a tower"
            )
        try:
            self.store.write(batch.numbers, rows.to(torch.float16).cpu().numpy())
        except OSError as error:
            raise DataError(
                f"train.cache: {self.store.folder} cannot be written ({first_line(error)}); "
                f"expected room for {in_words(form.size)} in all, then the same command goes on"
            ) from error


class _Nothing:
    """The batches of a process that has no share."""

    def __enter__(self) -> Iterator[Any]:
        return iter(())

    def __exit__(self, *error: object) -> None:
        pass
