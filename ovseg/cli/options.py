"""Options that several commands share, and what they stand for.

* numbers within bounds, ``Within``;
* the model that a name means: ``--offline``, ``--no-cache``, ``--readout``, ``--proxy``;
* where it runs, in which numbers, and how: ``--device``, ``--dtype``, ``--compile``;
* how pictures are labelled: one option for each field of ``View``, ``Queries`` and the rules of
  labelling that has a help text;
* a note of a command, before its work, about plots that will not be drawn.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from ..bounds import AT_LEAST_0, AT_LEAST_1, Bound
from ..errors import ConfigError, InputError

if TYPE_CHECKING:
    import torch

SCENE_MODEL = "segclip_tiny"  # the best of the bundled systems on these scenes: docs/results.md
DTYPES = ("auto", "float32", "bfloat16", "float16")
MODEL_HELP = (
    "NAME:TAG (ViT-B-16:laion2b_s34b_b88k, clip_dense_vit_b16:openai), a NAME with one set of "
    "weights (pacl_tiny), hf-hub:OWNER/NAME, or the PATH of a run, of a folder or a checkpoint of "
    "open_clip, transformers or a system"
)


class Within(argparse.Action):
    """A number, or several, that lie within a bound: ``action=Within, bound=COUNT``."""

    def __init__(self, *names: Any, bound: Bound, **declared: Any):
        super().__init__(*names, **declared)
        self.bound = bound

    def __call__(self, parser, namespace, values, option_string=None):
        """Check the numbers and keep them.

        Raises:
            InputError: naming the option, the number and what was expected.
        """
        for number in values if isinstance(values, list) else [values]:
            self.bound.check(self.option_strings[0], number, InputError)
        setattr(namespace, self.dest, values)


COUNT: dict[str, Any] = {"type": int, "action": Within, "bound": AT_LEAST_1}
INDEX: dict[str, Any] = {"type": int, "action": Within, "bound": AT_LEAST_0}


def add_fields(sub: argparse.ArgumentParser, job: type) -> None:
    """Add an option for each field of a job that has a help text, within the field's bound."""
    hints = get_type_hints(job)
    for field in fields(job):
        if "help" not in field.metadata:
            continue
        declared: dict[str, Any] = {"action": "store_true"}
        if hints[field.name] is not bool:
            declared = {"type": _kind(hints[field.name]), "default": field.default}
        if field.metadata["bound"] is not None:
            declared |= {"action": Within, "bound": field.metadata["bound"]}
        name = f"--{field.name.replace('_', '-')}"
        sub.add_argument(name, help=field.metadata["help"].replace("%", "%%"), **declared)


def add_weights(sub: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Add where weights come from and how a CLIP is read out."""
    which = "comma-separated, of clip_dense models" if several else "of a clip_dense model"
    sub.add_argument(
        "--offline",
        action="store_true",
        help="take weights from the cache and ask nobody (HF_HUB_OFFLINE=1 does the same)",
    )
    sub.add_argument(
        "--no-cache",
        action="store_true",
        help="neither read nor write the cache of text embeddings (OVSEG_CACHE=off)",
    )
    sub.add_argument(
        "--readout",
        help=f"{which}: clip, maskclip, sclip, clearclip, naclip, gem, proxyclip",
    )
    sub.add_argument(
        "--proxy",
        metavar="NAME[:FILE]",
        help="second encoder, for proxyclip: a ViT of timm's, such as "
        "vit_base_patch8_224.dino, and its weights where timm shall not fetch them",
    )


@contextmanager
def in_force(options: argparse.Namespace) -> Iterator[None]:
    """Tell the libraries that ask the environment what the switches say."""
    asked = {}
    if getattr(options, "offline", False):
        asked["HF_HUB_OFFLINE"] = "1"
    if getattr(options, "no_cache", False):
        asked["OVSEG_CACHE"] = "off"
    before = {name: os.environ.get(name) for name in asked}
    os.environ.update(asked)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def no_readouts(what: str, name: str) -> InputError:
    """Return the error for ``--readout`` or ``--proxy`` with a model that they do nothing for."""
    return InputError(
        f"{what} is given and {name} is no clip_dense model; its attention is part of its "
        "training. Expected a model that needs none, such as clip_dense_vit_b16:openai, or the "
        "command without it"
    )


def load_model(name: str | None, **options: Any) -> Any:
    """Load the model that ``-m`` names, the default one without it; ``options`` change it."""
    from ..distributed import is_main
    from ..progress import note, waiting
    from ..systems import from_pretrained, model_at_hand

    asked = {"readout": "--readout", "proxy": "--proxy"}
    what = "loading the default model" if name is None else f"loading {name}"
    try:
        with waiting(what, show=is_main()):
            model = model_at_hand(**options) if name is None else from_pretrained(name, **options)
    except (ConfigError, TypeError) as error:  # TypeError: of a registered function
        bare = None if name is None or not asked.keys() & options else from_pretrained(name)
        if bare is None or hasattr(bare, "set_readout"):
            raise
        raise no_readouts(asked[next(key for key in asked if key in options)], bare.name) from error
    if model.name.endswith("_tiny") and hasattr(model.tokenizer, "unknown"):
        note(f"{model.name}: trained on synthetic scenes; it knows their words only")
    return model


def demo_model(which: str) -> str:
    """Return the bundled model that labels a built-in picture, by the word behind ``--demo``."""
    from ..systems import PHOTO_MODEL, list_bundled

    photos = tuple(PHOTO_MODEL.split(":")) in list_bundled()
    return PHOTO_MODEL if which == "photo" or (which == "auto" and photos) else SCENE_MODEL


def model_to_run(name: str | None, options: argparse.Namespace, readout: str | None = None) -> Any:
    """Load a model as the options of ``add_weights`` and ``add_device`` say.

    It is printed where it runs, unless that is in float32 on the CPU.
    """
    import torch

    from ..distributed import is_main

    changes: dict[str, Any] = {} if readout is None else {"readout": readout}
    if options.proxy is not None:
        proxy, _, file = options.proxy.partition(":")
        changes["proxy"] = {"name": proxy, "weights": file or "timm"}
    model = load_model(name, **changes)
    device = device_of(options)
    dtype = dtype_of(options, device)
    if is_main() and (device.type, dtype) != ("cpu", torch.float32):
        print(
            f"{model.name} runs on {device} in {str(dtype).removeprefix('torch.')}; --device and "
            "--dtype change that",
            file=sys.stderr,
        )
    model = model.to(device, dtype)
    if options.compile:
        model.compile()  # in place: it keeps its name, options and methods
    return model


def add_device(sub: argparse.ArgumentParser) -> None:
    """Add where a model runs, in which numbers, and how."""
    sub.add_argument(
        "--device",
        default="auto",
        help="auto (a GPU where there is one), cpu, cuda, cuda:1; of several processes each takes "
        "the GPU of its local rank",
    )
    sub.add_argument(
        "--dtype",
        default="auto",
        choices=DTYPES,
        help="of the model; auto: half precision on a GPU, float32 on the CPU",
    )
    sub.add_argument(
        "--compile",
        action="store_true",
        help="torch.compile the model: slow at first, then faster where shapes repeat",
    )


def device_of(options: argparse.Namespace) -> torch.device:
    """Return the device that ``--device`` means."""
    from .. import distributed

    return distributed.device(options.device)


def dtype_of(options: argparse.Namespace, device: torch.device) -> torch.dtype:
    """Return the dtype that ``--dtype`` means.

    ``auto`` is bfloat16 on a GPU that has it, float16 on others, float32 on the CPU.
    """
    import torch

    if options.dtype != "auto":
        return getattr(torch, options.dtype)
    if device.type != "cuda":
        return torch.float32
    # Emulated bfloat16 (before Ampere) is slower than float16.
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def add_inference_options(sub: argparse.ArgumentParser) -> None:
    """Add an option for each field of the three values that has a help text."""
    group = sub.add_argument_group("how pictures are seen, what is asked and how it is decided")
    for name, found in _fields().items():
        texts = dict.fromkeys(text for _, text in found)
        group.add_argument(
            f"--{name.replace('_', '-')}",
            action=_Given,
            type=found[0][0],
            help="; or ".join(texts).replace("%", "%%"),
        )


class _Given(argparse.Action):
    """Note an option among those that ``given_inference_options`` returns."""

    def __call__(self, parser, namespace, values, option_string=None):
        given = getattr(namespace, "inference", {})
        namespace.inference = {**given, self.dest: values}
        setattr(namespace, self.dest, values)


def given_inference_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return those that the command line names, as ``Predictor`` takes them."""
    given = dict(getattr(options, "inference", {}))
    if "background" in given:
        given["background"] = tuple(text.strip() for text in given["background"].split(","))
    return given


def _fields() -> dict[str, list[tuple[type, str]]]:
    """Return the (kind, help) of the fields of each name, which rules may share."""
    from ..inference import Queries, View
    from ..inference.rules import rule, rule_names

    found: dict[str, list[tuple[type, str]]] = {}
    for value in (View, Queries, *(rule(name) for name in rule_names())):
        hints = get_type_hints(value)
        for field in fields(value):
            if "help" in field.metadata:
                entry = (_kind(hints[field.name]), field.metadata["help"])
                found.setdefault(field.name, []).append(entry)
    return found


def _kind(hint: Any) -> type:
    """Return int for ``int | None``; what is neither that nor a float is read as text."""
    kinds = get_args(hint) or (hint,)
    return next((kind for kind in (int, float) if kind in kinds), str)


def no_plots(what: str) -> None:
    """Say once, before the work, that ``what`` follows from a missing matplotlib."""
    from ..figures import say_if_missing

    say_if_missing(what)
