"""Models as folders, here and on the Hub: ``config.json``, ``model.safetensors``, a card.

``config.json`` of format 2 holds

    format   2
    model    the name that the model was made by; it stays a name
    system   the folder of its system; null where a function of ``register_model`` made the model
    options  all options: the system's, and in ``backbone`` its kind and options
    ...      whatever else ``save_pretrained`` was given: metrics, seed, ...

so that a preset or a default that changes later does not change the model. In format 1 ``options``
held what the caller had asked for, above the preset of ``model``.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch

from ..errors import CheckpointError, InputError, NoCheckpoint
from ..replacing import folder_for, write_text
from .files import load_json, save_weights
from .hub import PREFIX, check_repo, upload
from .state_dicts import unwrapped

FORMAT = 2
_TOKENIZER = "tokenizer"  # a folder in the folder, where the words are not open_clip's own
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "spiece.model",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "config.json",  # where the others do not say what kind of tokenizer it is
)


def check_model(model: Any) -> None:
    """Check that it is a system, whatever wraps it."""
    if not isinstance(model, torch.nn.Module) or not hasattr(model, "encode_image"):
        raise InputError(
            f"model is a {type(model).__name__}; expected a model of create_model or "
            "from_pretrained"
        )


def save_pretrained(model: Any, folder: str | Path, **facts: Any) -> Path:
    """Write ``config.json`` and ``model.safetensors``.

    A model that is wrapped (``torch.compile``, DDP, DataParallel, ``AveragedModel``) is written as
    the bare one is; one that is sharded has to be saved by all processes together. Frozen weights
    that a model keeps by their name are not among the tensors; their hash is written, so that
    others are noticed.

    Args:
        model: a system.
        folder: made if there is none.
        facts: metrics, seed, ...; they go into the config as they are.
    """
    whole = model
    model = unwrapped(whole)
    check_model(model)
    folder = folder_for(folder, "folder")
    options = _options_to_save(model)
    if model.named_weights is not None:
        facts = {model.named_weights.hash_key: model.weights_hash(), **facts}
    folder.mkdir(parents=True, exist_ok=True)
    towers = options["backbone"] if model.system else options
    if isinstance(towers.get("architecture"), dict):
        towers["architecture"] = _with_tokenizer(towers["architecture"], folder)
    config = {"format": FORMAT, "model": model.name, "system": model.system, "options": options}
    text = json.dumps({**config, **facts}, indent=2)
    save_weights(whole, folder / "model.safetensors")
    write_text(folder / "config.json", text + "\n")  # last: a folder that was begun is none yet
    return folder


def _options_to_save(model: Any) -> dict[str, Any]:
    """Return what builds the model anew, without the weights that it began with.

    Those are all in the file, unless it is some that the folder names.
    """
    options = deepcopy(model.config)
    towers = options.get("backbone", {})
    if model.system:
        begun = dict.fromkeys(model.starting_options)
        options |= {key: None for key in begun if key in options}
        towers |= {key: None for key in begun if key in towers}
        towers |= model.backbone.lasting_options()
    else:  # a function may not know the others
        for part in (options, towers):
            for key in model.starting_options:
                part.pop(key, None)
        options |= model.backbone.lasting_options()
    if model.named_weights is not None:
        model.named_weights.write(options)
    return options


def is_saved(folder: Path) -> bool:
    """Return whether ``save_pretrained`` wrote a folder.

    One with a damaged config counts, so that it is named.
    """
    try:
        found = load_json(folder / "config.json")
    except (FileNotFoundError, NotADirectoryError):
        return False
    except (OSError, ValueError):
        return True
    return not isinstance(found, dict) or "model_type" not in found


def read_config(folder: Path) -> dict[str, Any]:
    """Read the ``config.json`` of a saved folder, of any format up to today's.

    Raises:
        NoCheckpoint: where there is none; CheckpointError: for one that is damaged, or of a format
            that a later version writes.
    """
    path = folder / "config.json"
    try:
        config = load_json(path)
        _check_config(config)
    except FileNotFoundError as error:
        raise NoCheckpoint(
            f"{folder} has no config.json; expected a folder written by save_pretrained"
        ) from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({error}); expected JSON with 'model' and 'options'"
        ) from error
    if config["format"] > FORMAT:
        raise CheckpointError(
            f"{path} has format {config['format']}, of a later version of ovseg; expected 1 or "
            f"{FORMAT}: pip install -U ovseg-kernels"
        )
    towers = config["options"]["backbone"] if config["system"] else config["options"]
    architecture = towers.get("architecture")
    text = architecture.get("text_cfg") if isinstance(architecture, dict) else None
    if isinstance(text, dict) and text.get("hf_tokenizer_name") == _TOKENIZER:
        text["hf_tokenizer_name"] = str((folder / _TOKENIZER).resolve())
    return config


def _check_config(config: Any) -> None:
    """Refuse a config that lacks what its format has, and fill in what format 1 has not.

    Raises:
        KeyError, TypeError, ValueError: saying what is wrong.
    """
    if not isinstance(config["model"], str) or not isinstance(config["options"], dict):
        raise KeyError("model, options")
    number = config.setdefault("format", 1)  # the first folders have none
    if type(number) is not int or number < 1:
        raise ValueError(f"format is {number!r}")
    system = config.setdefault("system", None) if number == FORMAT else None
    config["system"] = system
    if system is None or number > FORMAT:
        return
    towers = config["options"].get("backbone")
    if not isinstance(system, str) or not isinstance(towers, dict) or "kind" not in towers:
        raise ValueError("options: backbone.kind is missing")


def push_to_hub(
    model: Any,
    repo: str,
    *,
    licence: str,
    labels: Sequence[str] | None = None,
    private: bool = False,
    token: str | None = None,
    **facts: Any,
) -> str:
    """Upload a model to the Hub, where ``-m hf-hub:OWNER/NAME`` finds it; return its address.

    Args:
        model: a system.
        repo: owner/name; made if there is none.
        licence: of the weights, as the Hub writes it: ``mit``, ``apache-2.0``, ``cc-by-4.0``,
            ``other``. What they were trained from and on decides it, so there is no default.
        labels: the words that it was trained on, where those are few; None for any words.
        private: as the Hub has it.
        token: of the Hub; the one of ``hf auth login`` if None.
        facts: as in ``save_pretrained``.

    Raises:
        InputError: for a model that names frozen weights by a path, which nobody else has.
    """
    check_repo(repo)
    whole = model
    model = unwrapped(whole)
    _check_portable(model)
    with tempfile.TemporaryDirectory() as parent:
        folder = save_pretrained(whole, Path(parent) / "model", **facts)
        text = card(model, f"{PREFIX}{repo}", licence, labels, facts)
        write_text(folder / "README.md", text)
        return upload(folder, repo, private=private, message=f"Upload {model.name}", token=token)


def save_bundled(
    model: Any, bundled: str | Path, tag: str, *, licence: str, saw: str, **facts: Any
) -> Path:
    """Write weights that come with the package, with their card; return their folder.

    Args:
        model: a system.
        bundled: the folder ``bundled`` of the system; the weights get one of their own in it.
        tag: as in ``NAME:TAG``.
        licence: of the weights, as in ``push_to_hub``.
        saw: what they were trained from and on, with the licences of those; ``ovseg models`` says
            it.
        facts: as in ``save_pretrained``.

    Raises:
        InputError: for a model that names frozen weights by a path, which nobody else has.
    """
    bare = unwrapped(model)
    check_model(bare)
    _check_portable(bare)
    facts = {"saw": saw, **facts}
    folder = Path(bundled) / f"{bare.name}.{tag}"
    save_pretrained(model, folder, licence=licence, **facts)
    write_text(folder / "README.md", card(bare, f"{bare.name}:{tag}", licence, None, facts))
    return folder


def _check_portable(model: Any) -> None:
    """Refuse to give away a model that names frozen weights by a path."""
    named = model.named_weights
    if named is not None and named.local:
        raise InputError(
            f"{model.name} is built on the {named.what} {named.source!r}, a path of this machine; "
            f"expected one that others can name, {named.portable}, in the option {named.option}"
        )


def card(
    model: Any, named: str, licence: str, labels: Sequence[str] | None, facts: dict[str, Any]
) -> str:
    """Write the page of weights: what they are, what they know, how they are used.

    Args:
        model: a system.
        named: what ``-m`` takes.
        licence: as in ``push_to_hub``.
        labels: likewise.
        facts: the rows of its table.
    """
    words = getattr(model.tokenizer, "words", None)
    known = list(labels) if labels is not None else words
    about = (
        f"It knows these words only: {', '.join(known)}."
        if known
        else "Labels may be any words that its CLIP knows."
    )
    label = known[0] if known else "cat"
    rows = "".join(f"| {key} | {value} |\n" for key, value in facts.items())
    source = f"Weights from {model.source}.\n\n" if model.source else ""
    return (
        f"---\nlibrary_name: ovseg\nlicense: {licence}\npipeline_tag: image-segmentation\n"
        f"tags: [open-vocabulary, semantic-segmentation, clip]\n---\n\n"
        f"# {named.rpartition('/')[2]}\n\n"
        f"`{model.name}`: open-vocabulary semantic segmentation with "
        "[ovseg](https://pypi.org/project/ovseg-kernels), "
        f"licence {licence}. {about}\n\n{source}"
        f"```\npip install 'ovseg-kernels[models]'\novseg segment photo.jpg --labels \"{label}\" "
        f"-m {named}\n```\n\n"
        f'```python\nimport ovseg\n\nmodel = ovseg.from_pretrained("{named}")\n'
        f'ovseg.segment("photo.jpg", ["{label}"], model=model).save("out.png")\n```\n'
        + (f"\n| fact | value |\n|---|---|\n{rows}" if rows else "")
    )


def _with_tokenizer(architecture: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Copy the files of the tokenizer beside the weights, if they are a folder of this machine.

    Return the configuration with its name there.
    """
    text = architecture["text_cfg"]
    source = Path(text.get("hf_tokenizer_name") or "")
    if not source.is_absolute():
        return architecture
    target = folder / _TOKENIZER
    target.mkdir(exist_ok=True)
    for name in _TOKENIZER_FILES:
        if (source / name).is_file() and (source / name).resolve() != (target / name).resolve():
            shutil.copyfile(source / name, target / name)
    return {**architecture, "text_cfg": {**text, "hf_tokenizer_name": _TOKENIZER}}
