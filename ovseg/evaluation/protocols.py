"""Evaluation protocols: named, versioned, and every choice of one in the open.

A protocol says how pictures are resized and cut, which texts stand for the classes and the background, through which templates, and how
labels are decided. It is a file in ``evaluation/protocols``; where it is silent the defaults of ``Settings`` hold.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from ..data.labels import LabelSet
from ..data.segmentation_sets import SetDescription
from ..data.templates import templates
from ..errors import ConfigError, InputError
from ..inference.settings import Settings
from ..models import OVSegModel

_PROTOCOLS = Path(__file__).parent / "protocols"
METRIC = ("IoU per class over all counted pixels of the set, mean over the classes that occur or are predicted; "
          "accuracy per class over the classes that occur; pixels without a truth are not counted")


@dataclass(frozen=True)
class Protocol:
    """A protocol for one data set and model, nothing left open.

    Attributes:
        name, version, title, source, notes: of the file.
        settings: for ``Predictor``.
        labels: the classes without the background, with their texts.
        changed: what the caller changed about the named protocol.
        present_only: only the classes of a picture's truth compete in it. It uses the truth.
    """

    name: str
    version: int
    title: str
    source: str
    notes: tuple[str, ...]
    settings: Settings
    labels: LabelSet
    changed: tuple[str, ...] = ()
    present_only: bool = False

    @property
    def label(self) -> str:
        """``sclip v1``, with a star if something was changed."""
        return f"{self.name} v{self.version}" + ("*" if self.changed or self.present_only else "")

    def choices(self, model: OVSegModel, data: SetDescription) -> dict[str, Any]:
        """Every choice, for result files and for people."""
        settings, backbone = self.settings, model.backbone
        used = templates(settings.templates or self.labels.templates or model.templates)
        seen = "whole, upsampled once to the picture's size" if settings.crop is None else (
            f"windows of {settings.crop}, stride {settings.stride or max(1, settings.crop // 2)}, merged by the mean, then resized")
        if not data.background:
            background = "none: its pixels are not counted"
        else:
            rules = [f"one of {len(settings.background)} texts wins"] if settings.background else []
            rules += [f"the winner scores below {settings.background_threshold}"] if settings.background_threshold is not None else []
            rules += [f"entropy above {settings.background_entropy} nats"] if settings.background_entropy is not None else []
            background = " or ".join(rules) or "never predicted"
        return {
            "model": model.name, "model_options": dict(model.config),
            "protocol": self.label, "title": self.title, "source": self.source, "notes": list(self.notes), "changed": list(self.changed),
            "data": data.title, "classes": data.number, "background": background, "background_texts": list(settings.background),
            "class_texts": {name: list(texts) for name, texts in zip(self.labels.names, self.labels.texts, strict=True)},
            "templates": len(used), "template_texts": list(used), "text_mean": settings.text_mean, "synonyms": settings.synonyms,
            "resize": f"short side {settings.short_side or backbone.image_size}"
                      + (f", long side at most {settings.long_side}" if settings.long_side else "") + f", {settings.resize}",
            "seen": seen, "normalisation": {"mean": list(backbone.image_mean), "std": list(backbone.image_std)},
            "scores": "cosines" + (f" times {settings.scale:g}" if settings.scale else "")
                      + (f", {settings.activation} at the {settings.stage} stage" if settings.activation else ""),
            "area_threshold": settings.area_threshold, "bias": settings.bias or {}, "refine": settings.refine,
            "present_only": self.present_only, "metric": METRIC,
            "settings": {k: v for k, v in asdict(settings).items() if k not in ("bias", "background")},
        }  # fmt: skip


def list_protocols() -> list[str]:
    return sorted(path.stem for path in _PROTOCOLS.glob("*.yaml"))


def protocol(name: str, data: SetDescription, model: OVSegModel, *, labels: LabelSet | None = None, present_only: bool = False,
             **changes: Any) -> Protocol:
    """The protocol for a data set.

    Args:
        name: of ``list_protocols``, or a ``.yaml`` file of the same form.
        data: the data set.
        model: a model of groups where the protocol is made for one.
        labels: class texts in place of the protocol's, in the order of the classes without the background.
        present_only: see ``Protocol``.
        changes: fields of ``Settings``.

    Raises:
        ConfigError: for an unknown protocol, a data set it says nothing about, or a model it is not made for.
    """
    tree = read_protocol(name)
    groups = tree.get("model") == "groups"
    if groups and model.decision != "groups":
        raise ConfigError(f"protocol {name!r} is made for models that label groups and {model.name} labels patches; expected one of "
                          f"{[other for other in list_protocols() if read_protocol(other).get('model') != 'groups']}")
    known = tree.get("data", {})
    if known and data.name not in known:
        raise ConfigError(f"protocol {name!r} says nothing about {data.name}; it is for {', '.join(known)}. Expected one of them, or the "
                          "protocol plain")
    own = dict(known.get(data.name) or {})
    given = own.pop("texts", None)
    if given != {}:  # an empty one takes back what the protocol says for all sets
        given = {**{k: v for k, v in tree.get("texts", {}).items() if k in data.classes}, **(given or {})}
    label_set = labels or _with_texts(data.label_set, given)
    if len(label_set) != data.number - data.background:
        raise InputError(f"labels holds {len(label_set)} classes; {data.name} has {data.number - data.background}"
                         + (" besides the background" if data.background else ""))
    background = own.pop("background", tree.get("background", [])) if data.background else []
    settings = {**tree.get("settings", {}), **own, "background": tuple(t for t in background if t not in label_set.queries)}
    if "seen_bias" in tree and data.unseen:
        settings["bias"] = {c: tree["seen_bias"] for c in data.classes if c not in data.unseen}
    base = Settings.of(settings)
    changed = tuple(f"{key} = {value!r}" for key, value in changes.items() if getattr(base, key, None) != value)
    changed += ("class texts",) if labels is not None else ()
    return Protocol(Path(name).stem, int(tree["version"]), tree["title"], tree["source"], tuple(tree.get("notes", ())),
                    Settings.of(changes, base), label_set, changed, present_only)


def _with_texts(labels: LabelSet, texts: dict[str, str | list[str]]) -> LabelSet:
    unknown = sorted(set(texts) - set(labels.names))
    if unknown:
        raise ConfigError(f"texts are given for {unknown[0]!r}, which is none of the classes")
    merged = {name: texts.get(name, list(own)) for name, own in zip(labels.names, labels.texts, strict=True)}
    return replace(LabelSet.of(merged), templates=labels.templates)


def read_protocol(name: str) -> dict[str, Any]:
    """The file of a protocol, with what it takes over from another one."""
    import yaml

    path = Path(name) if Path(name).suffix in (".yaml", ".yml") else _PROTOCOLS / f"{name}.yaml"
    if not path.is_file():
        raise ConfigError(f"protocol is {name!r}; expected one of {list_protocols()}, or a .yaml file")
    try:
        tree = yaml.safe_load(path.read_text("utf-8"))
        if "like" in tree:
            base = read_protocol(tree["like"])
            tree = {**base, **tree, "settings": {**base.get("settings", {}), **tree.get("settings", {})}}
        if not {"version", "title", "source"} <= set(tree):
            raise KeyError("version, title, source")
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, KeyError) as error:
        raise ConfigError(f"{path} describes no protocol: {error}") from error
    return tree
