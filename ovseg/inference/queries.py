"""Text embeddings of label sets on disk: 171 classes in 80 templates are 13 680 texts, a minute on
a CPU and the same every time.

A file is named by all that its numbers depend on: the weights of the text tower, what is made of
them (its activation is in no tensor), the texts in their order, the templates, how they are
averaged, the dtype. Only models with weights of their own are remembered, and not the tiny ones,
which are faster than a disk.

What is asked of a picture, the second of the three values, and the same as a model reads it.

Embeddings of the label sets that a predictor was asked for last, and when they are stale.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional as F

from ..data.class_lists import read_class_embeddings
from ..data.labels import LabelSet
from ..data.templates import check_templates, invisible_in
from ..data.templates import templates as resolve_templates
from ..errors import CheckpointError, InputError
from ..nn.tensors import Version, autocast_type, upload
from ..paths import cache_folder
from ..systems import OVSegModel
from ..systems.checks import check_reading
from ..weights.files import hash_tensors, load_tensors, save_tensors
from .fields import one_of, option

_FEW = 1_000_000  # parameters of a text tower that is not worth a file
_HASHES: WeakKeyDictionary[OVSegModel, tuple[Version, str]] = WeakKeyDictionary()


def encode_labels(
    model: OVSegModel, texts: Sequence[str], templates: str | Sequence[str], *, unit: bool
) -> torch.Tensor:
    """``model.encode_checked``, from the disk where it has been asked before.

    A file that is damaged is made again; a folder that cannot be written is left alone.
    """
    path = _path(model, texts, templates, unit)
    if path is None:
        return model.encode_checked(texts, templates, unit=unit)
    parameter = model.text_parameters()[0]
    if path.is_file():
        try:
            found = load_tensors(path)["texts"]
            if found.shape == (len(texts), model.spec.embed_dim) and bool(found.isfinite().all()):
                return found.to(parameter.device, parameter.dtype)
        except (CheckpointError, KeyError):
            pass
    rows = model.encode_checked(texts, templates, unit=unit)
    if bool(rows.isfinite().all()):
        with contextlib.suppress(
            OSError
        ):  # no space, no permission: the next run encodes them again
            save_tensors({"texts": rows}, path)
    return rows


def _path(
    model: OVSegModel, texts: Sequence[str], templates: str | Sequence[str], unit: bool
) -> Path | None:
    folder = cache_folder()
    if (
        folder is None
        or model.source is None
        or sum(p.numel() for p in model.text_parameters()) < _FEW
    ):
        return None
    asked = [
        _weights_hash(model),
        model.text_facts(),
        list(texts),
        list(resolve_templates(templates)),
        unit,
    ]
    cast = autocast_type(model.text_parameters()[0].device.type)
    asked += [] if cast is None else [str(cast)]
    return (
        folder
        / "texts"
        / f"{hashlib.blake2b(json.dumps(asked).encode(), digest_size=20).hexdigest()}.safetensors"
    )


def _weights_hash(model: OVSegModel) -> str:
    """Of the text tower; made again when a parameter has been written to or moved since."""
    parameters = model.text_parameters()
    version, value = _HASHES.get(model, (None, ""))
    if version is None or not version.holds(parameters):
        version = Version(parameters)
        heads = (f"{p.dtype} {tuple(p.shape)}" for p in parameters)
        value = hash_tensors(zip(heads, parameters, strict=True), size=20)
        _HASHES[model] = (version, value)
    return value


logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Queries:
    """What is asked.

    Attributes:
        labels: the classes with their texts; None until a label set is given.
        templates: prompt templates, a name or format strings; None: those of the label set, else
            the model's.
        text_mean: of the templates: ``unit`` normalises every text embedding before the mean,
            ``raw`` does not.
        synonyms: ``max``: a class scores what its best text scores; ``mean``: the mean of its
            texts' unit embeddings is asked for.
        background: texts that stand for everything else; where one wins, the label is -1. One that
            is a text of a class too, as in published lists, counts for the class alone, which is
            told: see ``rivals``.
        embeddings: a ``.npy`` file of the texts' embeddings, those of the background last, in place
            of the text tower and the templates.
    """

    labels: LabelSet | None = None
    templates: str | tuple[str, ...] | None = option(
        None, "set of prompt templates: label, simple, scenes, pacl7, zegclip15, clip80"
    )
    text_mean: str = option(
        "unit",
        "unit: embeddings of the templates are normalised before their mean; raw: they are not",
    )
    synonyms: str = option(
        "max", "max: a label scores what its best text scores; mean: the mean text is asked for"
    )
    background: tuple[str, ...] = option(
        (), "comma-separated texts that stand for everything else; where one wins there is no label"
    )
    embeddings: str | None = option(
        None,
        "a .npy file with a row for each label's texts, in place of the text tower and templates",
    )

    def __post_init__(self):
        one_of(self, "text_mean", ("unit", "raw"))
        one_of(self, "synonyms", ("max", "mean"))
        if isinstance(self.background, (int, float)):
            raise InputError(
                f"background is {self.background!r}; expected texts such as 'wall'. A number is "
                "background_threshold"
            )
        if not isinstance(self.background, Iterable | None) or isinstance(
            self.background, torch.Tensor
        ):
            raise InputError(
                f"background is a {type(self.background).__name__}; expected texts such as 'wall'"
            )
        texts = (
            [self.background]
            if isinstance(self.background, str)
            else list(() if self.background is None else self.background)
        )
        if any(not isinstance(text, str) or not text.strip() for text in texts):
            raise InputError(f"background is {texts!r}; expected texts that are not blank")
        if (
            hidden := next((found for text in texts if (found := invisible_in(text))), None)
        ) is not None:
            raise InputError(
                f"background is {texts!r}, which holds {hidden}; expected texts without it"
            )
        object.__setattr__(self, "background", tuple(texts))
        if self.templates is not None:
            check_templates(self.templates)
        if isinstance(self.templates, list):
            object.__setattr__(self, "templates", tuple(self.templates))
        if self.labels is not None:
            object.__setattr__(self, "labels", LabelSet.of(self.labels))
        if self.embeddings is not None:
            if not isinstance(self.embeddings, str | Path):
                raise InputError(
                    f"embeddings is a {type(self.embeddings).__name__}; expected the path of a "
                    ".npy file"
                )
            object.__setattr__(self, "embeddings", str(self.embeddings))

    @property
    def rivals(self) -> tuple[str, ...]:
        """The texts of ``background`` that are no text of a class, each once."""
        taken = {text.casefold() for text in self.labels.queries} if self.labels else set()
        return tuple(
            text
            for text in dict.fromkeys(" ".join(text.split()) for text in self.background)
            if text.casefold() not in taken
        )

    def templates_for(self, model: OVSegModel) -> str | tuple[str, ...]:
        """The templates that are used: these, else those of the label set, else the model's."""
        of_labels = None if self.labels is None else self.labels.templates
        given = (found for found in (self.templates, of_labels) if found is not None)
        return next(given, model.templates)


@dataclass(frozen=True)
class EncodedQueries:
    """Queries as a model reads them.

    Attributes:
        names: of the classes.
        texts: unit embeddings [T, E].
        owners: [T] int64, the class of each text; -1 for the background's.
    """

    names: tuple[str, ...]
    texts: torch.Tensor
    owners: torch.Tensor

    @classmethod
    @torch.no_grad()
    def encode(cls, model: OVSegModel, queries: Queries) -> EncodedQueries:
        labels, background = queries.labels, queries.rivals
        if labels is None:
            raise InputError("no labels are set; call set_labels first, or give labels")
        if dropped := [
            text for text in queries.background if " ".join(text.split()) not in background
        ]:
            logger.warning(
                "left out of the background, being labels: %s", ", ".join(map(repr, dropped))
            )
        asked, owned = [*labels.queries, *background], labels.owners + [-1] * len(background)
        if queries.embeddings is None:
            templates = resolve_templates(queries.templates_for(model))
            check_reading(model.tokenizer, asked, owned, templates)
            texts = encode_labels(model, asked, templates, unit=queries.text_mean == "unit")
        else:
            like = next(model.parameters())
            texts = read_class_embeddings(queries.embeddings, len(asked), model.spec.embed_dim).to(
                like.device, like.dtype
            )
        owners = torch.tensor(owned)
        if queries.synonyms == "mean" and len(labels.queries) > len(labels):
            of_classes = owners.to(texts.device)[: len(labels.queries)]
            sums = texts.new_zeros(len(labels), texts.shape[1]).index_add(
                0, of_classes, texts[: len(labels.queries)]
            )
            texts = torch.cat([F.normalize(sums, dim=-1), texts[len(labels.queries) :]])
            owners = torch.tensor([*range(len(labels))] + [-1] * len(background))
        return cls(labels.names, texts, owners.to(texts.device))

    @property
    def label_type(self) -> torch.dtype:
        """What holds a label: two bytes, where that is enough."""
        return torch.int16 if len(self.names) <= 2**15 else torch.int64

    def allowed(self, names: Sequence[str]) -> torch.Tensor:
        """[T] bool: the texts that may win where only the labels ``names`` may.

        Those of the background always may.
        """
        if not isinstance(names, Iterable) or isinstance(names, torch.Tensor):
            raise InputError(f"allowed is a {type(names).__name__}; expected names of labels")
        given = [names] if isinstance(names, str) else list(names)
        unknown = [name for name in given if name not in self.names]
        if unknown:
            raise InputError(f"allowed names {unknown[0]!r}; expected some of the labels")
        of_name = upload(
            torch.tensor([name in given for name in self.names] + [True]), self.texts.device
        )
        return of_name[self.owners]  # the background's -1 takes the last

    def offsets(
        self, bias: dict[str, float] | None, allowed: torch.Tensor | None, dtype: torch.dtype
    ) -> torch.Tensor | None:
        """[T], what is added to each text's score: its class's bias, -inf where it may not win;
        None if that is nothing.
        """
        found = None
        if bias:
            unknown = [name for name in bias if name not in self.names]
            if unknown:
                raise InputError(f"bias names {unknown[0]!r}; expected some of the labels")
            of_name = upload(
                torch.tensor([bias.get(name, 0.0) for name in self.names] + [0.0], dtype=dtype),
                self.texts.device,
            )
            found = of_name[self.owners]
        if allowed is not None:
            base = (
                torch.zeros(len(self.owners), device=self.texts.device, dtype=dtype)
                if found is None
                else found
            )
            found = base.masked_fill(~allowed, -torch.inf)
        return found


_REMEMBERED = 64  # label sets


class RememberedTexts:
    """``EncodedQueries`` by all that they depend on: the texts and how they are read, the weights
    of the text tower, the file of embeddings. Threads may ask at once; what two of them ask for is
    encoded once. Copies and pickles begin empty.
    """

    def __init__(self) -> None:
        self._found: OrderedDict[Any, tuple[Version, EncodedQueries]] = OrderedDict()
        self._looking = threading.Lock()
        self._encoding = threading.RLock()  # a hook of the model may ask too

    def __len__(self) -> int:
        return len(self._found)

    def __reduce__(self) -> tuple[type[RememberedTexts], tuple[()]]:
        return RememberedTexts, ()

    def encoded(self, model: OVSegModel, queries: Queries) -> EncodedQueries:
        """The queries as the model, as it is now, reads them."""
        queries = replace(queries, templates=queries.templates_for(model))
        key = (queries, _file_state(queries.embeddings))
        found = self._find(model, key)
        if found is not None:
            return found
        with self._encoding:
            found = self._find(model, key)  # another thread may have been first
            if found is None:
                version = _version(model)  # before: what is written meanwhile makes it stale
                found = EncodedQueries.encode(model, queries)
                self._keep(key, version, found)
        return found

    def _find(self, model: OVSegModel, key: Any) -> EncodedQueries | None:
        with self._looking:
            version, found = self._found.get(key, (None, None))
            if version is None or not version.holds(*_made_of(model)):
                return None
            self._found.move_to_end(key)
            return found

    def _keep(self, key: Any, version: Version, found: EncodedQueries) -> None:
        with self._looking:
            self._found[key] = (version, found)
            self._found.move_to_end(key)
            if len(self._found) > _REMEMBERED:
                self._found.popitem(last=False)


def _made_of(model: OVSegModel) -> tuple[list[Any], Any]:
    like = next(model.parameters())
    return model.text_parameters(), (like.dtype, like.device)  # what given embeddings are moved to


def _version(model: OVSegModel) -> Version:
    return Version(*_made_of(model))


def _file_state(path: str | None) -> Any:
    """Return what changes when a file is written again; its reader says what is wrong with one that
    is not there.
    """
    try:
        status = Path(path).stat() if path is not None else None
    except (OSError, ValueError):
        return None
    return status and (status.st_size, status.st_mtime_ns, status.st_ino)
