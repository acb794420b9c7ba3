"""``--offline``, ``--no-cache``, ``--readout`` and ``--proxy`` of every command that names a model,
and the model that a name means.

``--device``, ``--dtype`` and ``--compile`` of every command that runs a model: where it runs, in
which numbers, and how.

Options of commands that label pictures: one for each field of ``View``, ``Queries`` and the rules
of labelling that has a help text.

Numbers on the command line.

Notes of a command, before its work, about what will not come of it.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

from ..errors import ConfigError, InputError

MODEL_HELP = (
    "NAME:TAG (ViT-B-16:laion2b_s34b_b88k, clip_dense_vit_b16:openai), a NAME with one set of "
    "weights (pacl_tiny), "
    "hf-hub:OWNER/NAME, or the PATH of a run, of a folder or a checkpoint of open_clip, "
    "transformers or a system"
)


def add_weights(sub: argparse.ArgumentParser, *, several: bool = False) -> None:
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
        help=("comma-separated, of" if several else "of a")
        + " clip_dense model"
        + ("s" if several else "")
        + ": clip, maskclip, sclip, clearclip, naclip, gem, proxyclip",
    )
    sub.add_argument(
        "--proxy",
        metavar="NAME[:FILE]",
        help="second encoder, for proxyclip: a ViT of timm's, such as "
        "vit_base_patch8_224.dino, and its weights where timm shall not fetch them",
    )


def proxy_option(options: argparse.Namespace) -> dict[str, Any]:
    """What ``--proxy`` says, as an option of clip_dense."""
    if options.proxy is None:
        return {}
    name, _, file = options.proxy.partition(":")
    return {"proxy": {"name": name, "weights": file or "timm"}}


@contextmanager
def in_force(options: argparse.Namespace) -> Iterator[None]:
    """What the switches say, for the libraries that ask the environment."""
    asked = {"HF_HUB_OFFLINE": "1"} if getattr(options, "offline", False) else {}
    asked |= {"OVSEG_CACHE": "off"} if getattr(options, "no_cache", False) else {}
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
    """The error for ``--readout`` or ``--proxy`` with a model that they do nothing for."""
    return InputError(
        f"{what} is given and {name} is no clip_dense model; its attention is part of its "
        "training. Expected a model that "
        "needs none, such as clip_dense_vit_b16:openai, or the command without it"
    )


def load_model(name: str | None, **options: Any) -> Any:
    """The model that ``-m`` names, on the CPU; the default one without it.

    ``options`` change how it was built.
    """
    from ..distributed import is_main
    from ..progress import note, waiting
    from ..systems import default_model, from_pretrained

    asked = {"readout": "--readout", "proxy": "--proxy"}
    try:
        with waiting(
            "loading the default model" if name is None else f"loading {name}", show=is_main()
        ):
            model = default_model(**options) if name is None else from_pretrained(name, **options)
    except (ConfigError, TypeError) as error:  # TypeError: of a registered function
        bare = None if name is None or not asked.keys() & options else from_pretrained(name)
        if bare is None or hasattr(bare, "set_readout"):
            raise
        raise no_readouts(asked[next(key for key in asked if key in options)], bare.name) from error
    if model.name.endswith("_tiny") and hasattr(model.tokenizer, "unknown"):
        note(f"{model.name}: trained on synthetic scenes; it knows their words only")
    return model


if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_device(sub: argparse.ArgumentParser) -> None:
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
    from .. import distributed

    return distributed.device(options.device)


def dtype_of(options: argparse.Namespace, device: torch.device) -> torch.dtype:
    """What ``--dtype`` says; ``auto`` is bfloat16 on a GPU that has it, float16 on others, float32
    on the CPU.
    """
    import torch

    if options.dtype != "auto":
        return getattr(torch, options.dtype)
    if device.type != "cuda":
        return torch.float32
    # Emulated bfloat16 (before Ampere) is slower than float16.
    return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16


def to_device(model: Any, options: argparse.Namespace, *, quiet: bool = False) -> Any:
    """The model on its device in its dtype, which is printed unless that is float32 on the CPU."""
    import torch

    device = device_of(options)
    dtype = dtype_of(options, device)
    if not quiet and (device.type, dtype) != ("cpu", torch.float32):
        print(
            f"{model.name} runs on {device} in {str(dtype).removeprefix('torch.')}; --device and "
            "--dtype change that",
            file=sys.stderr,
        )
    model = model.to(device, dtype)
    if options.compile:
        model.compile()  # in place: it keeps its name, options and methods
    return model


def add_inference_options(sub: argparse.ArgumentParser) -> None:
    group = sub.add_argument_group("how pictures are seen, what is asked and how it is decided")
    for name, found in _fields().items():
        texts = dict.fromkeys(text for _, text in found)
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=found[0][0],
            help="; or ".join(texts).replace("%", "%%"),
        )


def given_inference_options(options: argparse.Namespace) -> dict[str, Any]:
    """Those that the command line names, as ``Predictor`` takes them."""
    given = {
        name: getattr(options, name) for name in _fields() if getattr(options, name) is not None
    }
    if "background" in given:
        given["background"] = tuple(text.strip() for text in given["background"].split(","))
    return given


def _fields() -> dict[str, list[tuple[type, str]]]:
    """Name -> (kind, help) of the fields of that name, which rules may share."""
    from ..inference import Queries, View
    from ..inference.rules import rule, rule_names

    found: dict[str, list[tuple[type, str]]] = {}
    for value in (View, Queries, *(rule(name) for name in rule_names())):
        hints = get_type_hints(value)
        for field in fields(value):
            if "help" in field.metadata:
                found.setdefault(field.name, []).append(
                    (_kind(hints[field.name]), field.metadata["help"])
                )
    return found


def _kind(hint: Any) -> type:
    """int of ``int | None``; what is neither that nor a float is read as text."""
    kinds = get_args(hint) or (hint,)
    return next((kind for kind in (int, float) if kind in kinds), str)


def at_least(least: int, options: argparse.Namespace, *names: str) -> None:
    """Raises InputError for an option, or one of several numbers of an option, below ``least``.

    One that is not given is none.
    """
    for name in names:
        given = getattr(options, name)
        for number in given if isinstance(given, list) else [given]:
            if number is not None and number < least:
                raise InputError(
                    f"--{name.replace('_', '-')} is {number}; expected at least {least}"
                )


def no_plots(what: str) -> None:
    """Say once, before the work, that ``what`` follows from a missing matplotlib."""
    from ..figures import say_if_missing

    say_if_missing(what)
