"""Evaluation protocols: named, versioned, and every choice of one in the open.

A protocol says how pictures are resized and cut (``View``), which texts stand for the classes and
the background, through which templates (``Queries``), and how labels are decided (the model's
rule). It is a file in ``evaluation/protocols`` or in a system's folder ``protocols``; its
``settings`` go to the one of the three that has them, and where it is silent their defaults hold.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..data.benchmark_sets import SetDescription
from ..data.entities import load_entities
from ..data.labels import LabelSet
from ..data.templates import templates
from ..errors import ConfigError, InputError
from ..inference import Decision, Predictor, Queries, View
from ..inference.flat_options import option_names, route
from ..inference.rules import rule_of
from ..registration import Registry, yaml_files
from ..systems import OVSegModel
from ..systems.registry import files_of_systems
from ..text_files import text_of, tree_of

PROTOCOLS: Registry[Path] = Registry(
    "protocol",
    lambda: yaml_files(Path(__file__).parent / "protocols", *files_of_systems("protocols")),
)
METRIC = (
    "IoU per class over all counted pixels of the set, mean over the classes that occur or are "
    "predicted; accuracy per class over the classes that occur; pixels without a truth are not "
    "counted"
)
_FOREGROUND = (
    "pixels whose truth is one of the classes, all others are ignored; mIoU of names that occur: "
    "mean over the classes of the truth; first name right: share of pictures in which the name of "
    "the largest labelled area of the counted pixels stands, of those that show a class"
)


@dataclass(frozen=True)
class Protocol:
    """A protocol for one data set and model, nothing left open.

    Attributes:
        name, version, title, source, notes: of the file.
        view, queries, decision: for ``Predictor``; the labels of ``queries`` are the classes
            without the background.
        changed: what the caller changed about the named protocol.
        present_only: only the classes of a picture's truth compete in it. It uses the truth.
    """

    name: str
    version: int
    title: str
    source: str
    notes: tuple[str, ...]
    view: View
    queries: Queries
    decision: Decision
    changed: tuple[str, ...] = ()
    present_only: bool = False

    @property
    def label(self) -> str:
        """The name with its version, ``sclip v1``, with a star if something was changed."""
        return f"{self.name} v{self.version}" + ("*" if self.changed or self.present_only else "")

    @property
    def labels(self) -> LabelSet:
        """The classes without the background, with their texts."""
        assert self.queries.labels is not None
        return self.queries.labels

    def predictor(self, model: OVSegModel) -> Predictor:
        """Return what labels pictures by the protocol."""
        return Predictor(model, self.queries, view=self.view, decision=self.decision)

    def choices(self, model: OVSegModel, data: SetDescription) -> dict[str, Any]:
        """Return every choice, for result files and for people."""
        view = self.view
        queries = self.queries
        decision = self.decision
        spec = model.spec
        used = () if queries.embeddings else templates(queries.templates_for(model))
        seen = "whole, upsampled once to the picture's size"
        if view.crop is not None:
            seen = f"windows of {view.crop}, stride {view.step}, merged by the mean, then resized"
        background = "none: its pixels are not counted"
        if data.background:
            rules = [f"one of {len(queries.rivals)} texts wins"] if queries.rivals else []
            background = " or ".join(rules + decision.background_rules()) or "never predicted"
        values = (view, queries, decision)
        settings = {name: getattr(value, name) for value in values for name in option_names(value)}
        return {
            "model": model.name,
            "model_options": dict(model.config),
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "protocol": self.label,
            "title": self.title,
            "source": self.source,
            "notes": list(self.notes),
            "changed": list(self.changed),
            "data": data.title,
            "classes": data.number,
            "background": background,
            "background_texts": list(queries.rivals),
            "class_texts": dict(zip(self.labels.names, map(list, self.labels.texts), strict=True)),
            "templates": len(used),
            "template_texts": list(used),
            "text_mean": queries.text_mean,
            "class_embeddings": queries.embeddings,
            "synonyms": queries.synonyms,
            "resize": f"short side {view.short_side or spec.image_size}"
            + (f", long side at most {view.long_side}" if view.long_side else "")
            + f", {view.resize}",
            "seen": seen,
            "normalisation": {"mean": list(spec.mean), "std": list(spec.std)},
            "decision": decision.name,
            **decision.describe(),
            "present_only": self.present_only,
            "counted": _FOREGROUND if data.foreground else None,
            "metric": METRIC,
            "settings": {k: v for k, v in settings.items() if k not in ("bias", "background")},
        }


def list_protocols() -> list[str]:
    """Return the names of the protocols in the package."""
    return list(PROTOCOLS)


def protocol(
    name: str,
    data: SetDescription,
    model: OVSegModel,
    *,
    labels: LabelSet | None = None,
    present_only: bool = False,
    **changes: Any,
) -> Protocol:
    """Return the protocol for a data set.

    Args:
        name: of ``list_protocols``, or a ``.yaml`` file of the same form.
        data: the data set.
        model: one that labels by the rule that the protocol is made for, where it is made for one
            (``model: groups``).
        labels: class texts in place of the protocol's, in the order of the classes without the
            background.
        present_only: see ``Protocol``.
        changes: fields of ``View``, ``Queries`` and of the model's rule.

    Raises:
        ConfigError: for an unknown protocol, a data set it says nothing about, or a model it is not
            made for.
    """
    tree = read_protocol(name)
    own = _of_set(name, tree, data, model)
    given = own.pop("texts", None)
    if given and data.like:  # of a set that asks for some of these classes alone
        given = {c: texts for c, texts in given.items() if c in data.classes}
    if given != {}:  # an empty one takes back what the protocol says for all sets
        of_all = {c: texts for c, texts in tree.get("texts", {}).items() if c in data.classes}
        given = {**of_all, **(given or {})}
    label_set = labels or _with_texts(data.label_set, given)
    if len(label_set) != data.number - data.background:
        beside = " besides the background" if data.background else ""
        raise InputError(
            f"labels holds {len(label_set)} classes; {data.name} has "
            f"{data.number - data.background}{beside}"
        )
    background = own.pop("background", tree.get("background", []))
    if not data.background:
        background = []
    elif isinstance(background, str):  # a list of entities
        background = load_entities(background).names
    wanted = Queries(label_set, background=tuple(background))
    notes = tuple(tree.get("notes", ()))
    dropped = [text for text in wanted.background if text not in wanted.rivals]
    if dropped:
        notes += (f"left out of the background, being classes: {', '.join(dropped)}",)
    settings = {**tree.get("settings", {}), **own, "background": wanted.rivals}
    if "seen_bias" in tree and data.unseen:
        settings["bias"] = {c: tree["seen_bias"] for c in data.classes if c not in data.unseen}
    base = route(settings, View(), Queries(label_set), rule_of(model))
    own_values = {key: getattr(value, key) for value in base for key in option_names(value)}
    changed = [
        f"{key} = {value!r}" for key, value in changes.items() if own_values.get(key) != value
    ]
    if labels is not None:
        changed.append("class texts")
    view, queries, decision = route(changes, *base)
    return Protocol(
        name=Path(name).stem,
        version=int(tree["version"]),
        title=tree["title"],
        source=tree["source"],
        notes=notes,
        view=view,
        queries=queries,
        decision=decision,
        changed=tuple(changed),
        present_only=present_only,
    )


def _of_set(
    name: str, tree: dict[str, Any], data: SetDescription, model: OVSegModel
) -> dict[str, Any]:
    """Return what a protocol says about a data set.

    Raises:
        ConfigError: if it is not made for the model or says nothing about the set.
    """
    made_for = tree.get("model")
    if made_for not in (None, model.decision):
        fitting = [
            other
            for other in list_protocols()
            if read_protocol(other).get("model") in (None, model.decision)
        ]
        raise ConfigError(
            f"protocol {name!r} is made for models that label {made_for} and {model.name} labels "
            f"{model.decision}; expected one of {fitting}"
        )
    known = tree.get("data", {})
    name_of_set = data.like if data.like and data.name not in known else data.name
    if known and name_of_set not in known:
        raise ConfigError(
            f"protocol {name!r} says nothing about {data.name}; it is for {', '.join(known)}. "
            "Expected one of them, or the protocol plain"
        )
    return dict(known.get(name_of_set) or {})


def _with_texts(labels: LabelSet, texts: dict[str, str | list[str]]) -> LabelSet:
    """Return a label set with other texts for some classes."""
    unknown = sorted(set(texts) - set(labels.names))
    if unknown:
        raise ConfigError(f"texts are given for {unknown[0]!r}, which is none of the classes")
    merged = {
        name: texts.get(name, list(own))
        for name, own in zip(labels.names, labels.texts, strict=True)
    }
    return replace(LabelSet.of(merged), templates=labels.templates)


def read_protocol(name: str, below: tuple[str, ...] = ()) -> dict[str, Any]:
    """Read the file of a protocol, with what it takes over from another one.

    Args:
        name: of ``list_protocols``, or a file.
        below: the protocols that led here.

    Raises:
        ConfigError: for an unknown name, one that is like itself, and a file that describes none.
    """
    is_file = Path(name).suffix in (".yaml", ".yml")
    if not (is_file or name in PROTOCOLS) or name in below:
        raise ConfigError(
            f"protocol is {name!r}; expected one of {list_protocols()}, or a .yaml file"
            + (f"; {below[0]!r} is like itself" if name in below else "")
        )
    path = Path(name) if is_file else PROTOCOLS[name]
    text = text_of(path, "protocol", f"one of {list_protocols()}, or a .yaml file", ConfigError)
    try:
        tree = tree_of(text)
        if "like" in tree:
            base = read_protocol(tree["like"], (*below, name))
            tree = {
                **base,
                **tree,
                "settings": {**base.get("settings", {}), **tree.get("settings", {})},
            }
        if not {"version", "title", "source"} <= set(tree):
            raise KeyError("version, title, source")
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path} describes no protocol: {error}") from error
    return tree
