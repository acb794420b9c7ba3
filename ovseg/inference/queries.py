"""Queries, the second of the three values: labels to ask for, and their text embeddings.

``Queries`` holds the words. ``EncodedQueries.encode`` makes embeddings of them. They are remembered
twice: ``RememberedTexts`` holds those of the label sets that a predictor was asked for last and
knows when they are stale; ``encode_labels`` keeps those of large models on disk, as 171 classes in
80 templates are 13 680 texts, a minute on a CPU and the same every time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch.nn import functional as F

from ..bounds import bounded, check_bounds, choice
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

_REMEMBERED = 64  # label sets
_FEW = 1_000_000  # parameters of a text tower that is not worth a file
_HASHES: WeakKeyDictionary[OVSegModel, tuple[Version, str]] = WeakKeyDictionary()
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Queries:
    """The question: what is asked of a picture; each field says what it does.

    ``labels`` are the classes with their texts, None until a label set is given. A text of the
    ``background`` that is a text of a class too, as in published lists, counts for the class alone,
    which is told: see ``rivals``.
    """

    labels: LabelSet | None = None
    templates: str | tuple[str, ...] | None = bounded(
        None,
        help="set of prompt templates: label, simple, scenes, pacl7, zegclip15, clip80; in Python "
        "format strings too (default: of the label set, else of the model)",
    )
    text_mean: str = bounded(
        "unit",
        choice("unit", "raw"),
        "unit: embeddings of the templates are normalised before their mean; raw: they are not",
    )
    synonyms: str = bounded(
        "max",
        choice("max", "mean"),
        "max: a label scores what its best text scores; mean: the mean text is asked for",
    )
    background: tuple[str, ...] = bounded(
        (),
        help="comma-separated texts that stand for everything else; where one wins there is no "
        "label",
    )
    embeddings: str | None = bounded(
        None,
        help="a .npy file with a row for each text, those of the background last, in place of the "
        "text tower and templates",
    )

    def __post_init__(self) -> None:
        check_bounds(self, "", InputError)
        object.__setattr__(self, "background", _background_texts(self.background))
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
        """Return the templates that are used: these, else the label set's, else the model's."""
        chosen = self.templates
        if chosen is None and self.labels is not None:
            chosen = self.labels.templates
        if chosen is None:
            chosen = model.templates
        return chosen if isinstance(chosen, str) else tuple(chosen)


def _background_texts(given: Any) -> tuple[str, ...]:
    """Return the texts of the background, as a caller may give them."""
    if isinstance(given, (int, float)):
        raise InputError(
            f"background is {given!r}; expected texts such as 'wall'. A number is "
            "background_threshold"
        )
    if not isinstance(given, Iterable | None) or isinstance(given, torch.Tensor):
        raise InputError(f"background is a {type(given).__name__}; expected texts such as 'wall'")
    texts = [given] if isinstance(given, str) else list(() if given is None else given)
    if any(not isinstance(text, str) or not text.strip() for text in texts):
        raise InputError(f"background is {texts!r}; expected texts that are not blank")
    for text in texts:
        if (hidden := invisible_in(text)) is not None:
            raise InputError(
                f"background is {texts!r}, which holds {hidden}; expected texts without it"
            )
    return tuple(texts)


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
        """Encode all texts, those of the background last.

        Raises:
            InputError: without labels, for texts that the model reads as nothing or alike, and for
                a file of embeddings that does not fit.
        """
        labels = queries.labels
        if labels is None:
            raise InputError("no labels are set; call set_labels first, or give labels")
        background = queries.rivals
        dropped = [text for text in queries.background if " ".join(text.split()) not in background]
        if dropped:
            logger.warning(
                "left out of the background, being labels: %s", ", ".join(map(repr, dropped))
            )
        asked = [*labels.queries, *background]
        owned = labels.owners + [-1] * len(background)
        if queries.embeddings is None:
            templates = resolve_templates(queries.templates_for(model))
            check_reading(model.tokenizer, asked, owned, templates)
            texts = encode_labels(model, asked, templates, unit=queries.text_mean == "unit")
        else:
            like = next(model.parameters())
            texts = read_class_embeddings(queries.embeddings, len(asked), model.spec.embed_dim)
            texts = texts.to(like.device, like.dtype)
        owners = torch.tensor(owned)
        count = len(labels.queries)
        if queries.synonyms == "mean" and count > len(labels):
            sums = texts.new_zeros(len(labels), texts.shape[1])
            sums = sums.index_add(0, owners[:count].to(texts.device), texts[:count])
            texts = torch.cat([F.normalize(sums, dim=-1), texts[count:]])
            owners = torch.tensor([*range(len(labels))] + [-1] * len(background))
        return cls(labels.names, texts, owners.to(texts.device))

    @property
    def label_type(self) -> torch.dtype:
        """The dtype that holds a label: two bytes, where that is enough."""
        return torch.int16 if len(self.names) <= 2**15 else torch.int64

    def allowed(self, names: Sequence[str]) -> torch.Tensor:
        """Return which texts may win where only the labels ``names`` may, [T] bool.

        Texts of the background always may.
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
        """Return what is added to each text's score, [T]; None if that is nothing.

        It is the bias of the text's class, and -inf where the text may not win.
        """
        found = None
        if bias:
            unknown = [name for name in bias if name not in self.names]
            if unknown:
                raise InputError(f"bias names {unknown[0]!r}; expected some of the labels")
            of_name = torch.tensor(
                [bias.get(name, 0.0) for name in self.names] + [0.0], dtype=dtype
            )
            found = upload(of_name, self.texts.device)[self.owners]
        if allowed is None:
            return found
        if found is None:
            found = torch.zeros(len(self.owners), device=self.texts.device, dtype=dtype)
        return found.masked_fill(~allowed, -torch.inf)


class RememberedTexts:
    """``EncodedQueries`` by all that they depend on.

    That is the texts and how they are read, the weights of the text tower, and the file of
    embeddings. Threads may ask at once; what two of them ask for is encoded once. Copies and
    pickles begin empty.
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
        """Return the queries as the model, as it is now, reads them."""
        key = (queries, queries.templates_for(model), _file_state(queries.embeddings))
        found = self._find(model, key)
        if found is not None:
            return found
        with self._encoding:
            found = self._find(model, key)  # another thread may have been first
            if found is None:
                version = Version(
                    *_made_of(model)
                )  # before: what is written meanwhile makes it stale
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
    """Return what texts are encoded by, and where given embeddings are moved to."""
    like = next(model.parameters())
    return model.text_parameters(), (like.dtype, like.device)


def _file_state(path: str | None) -> Any:
    """Return what changes when a file is written again.

    The file's reader says what is wrong with one that is not there.
    """
    try:
        status = Path(path).stat() if path is not None else None
    except (OSError, ValueError):
        return None
    return status and (status.st_size, status.st_mtime_ns, status.st_ino)


def encode_labels(
    model: OVSegModel, texts: Sequence[str], templates: Sequence[str], *, unit: bool
) -> torch.Tensor:
    """Return ``model.encode_checked``, from the disk where it has been asked before.

    Only models with weights of their own are remembered, and not the tiny ones, which are faster
    than a disk. A file that is damaged is made again; a folder that cannot be written is left
    alone.
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
        # Without space or permission the next run encodes them again.
        with contextlib.suppress(OSError):
            save_tensors({"texts": rows}, path)
    return rows


def _path(
    model: OVSegModel, texts: Sequence[str], templates: Sequence[str], unit: bool
) -> Path | None:
    """Return the file of these embeddings, None where none is kept.

    It is named by all that its numbers depend on: the weights of the text tower, what is made of
    them (its activation is in no tensor), the texts in their order, the templates, how they are
    averaged, the dtype.
    """
    folder = cache_folder()
    parameters = model.text_parameters()
    if folder is None or model.source is None or sum(p.numel() for p in parameters) < _FEW:
        return None
    asked = [_weights_hash(model), model.text_facts(), list(texts), list(templates), unit]
    cast = autocast_type(parameters[0].device.type)
    if cast is not None:
        asked.append(str(cast))
    name = hashlib.blake2b(json.dumps(asked).encode(), digest_size=20).hexdigest()
    return folder / "texts" / f"{name}.safetensors"


def _weights_hash(model: OVSegModel) -> str:
    """Return the hash of the text tower.

    It is made again when a parameter has been written to or moved since.
    """
    parameters = model.text_parameters()
    version, value = _HASHES.get(model, (None, ""))
    if version is None or not version.holds(parameters):
        version = Version(parameters)
        heads = (f"{p.dtype} {tuple(p.shape)}" for p in parameters)
        value = hash_tensors(zip(heads, parameters, strict=True), size=20)
        _HASHES[model] = (version, value)
    return value
