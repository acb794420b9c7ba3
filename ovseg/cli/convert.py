"""Published checkpoints to this package's folders, and back.

ovseg convert segclip.bin segclip_vit_b16 --out models/segclip
                                                a folder for from_pretrained, ovseg segment -m,
                                                ovseg eval
ovseg convert models/segclip --out segclip.bin  the published layout again
"""

from __future__ import annotations

import argparse
from pathlib import Path


def arguments(sub: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    sub.add_argument(
        "source", help="a published checkpoint, or a folder of save_pretrained or of a run"
    )
    sub.add_argument(
        "model", nargs="?", help="the model that a published checkpoint belongs to: segclip_vit_b16"
    )
    sub.add_argument(
        "--out",
        required=True,
        help="a folder, or for a folder as source a .bin or .safetensors file",
    )


def run(options: argparse.Namespace) -> int:
    """Convert; returns the exit code."""
    from ..errors import InputError
    from ..paths import no_folder

    if not options.source:
        raise InputError("source is empty; expected a published checkpoint, or a folder")
    if no_folder(options.source) is None:
        return _to_published(options)
    return _from_published(options)


def _to_published(options: argparse.Namespace) -> int:
    """Write the published layout of a folder."""
    from ..errors import InputError
    from ..output_lock import locked_file
    from ..progress import waiting
    from ..replacing import file_for
    from ..systems import official_state_dict
    from ..weights.pickles import write_published
    from .options import load_model

    out = file_for(options.out, "--out")
    if options.model:
        raise InputError(
            f"model is {options.model!r} and the source a folder; expected a folder to know "
            "its model"
        )
    options.held.enter_context(locked_file(out, "--out", "convert"))
    model = load_model(options.source)
    with waiting(f"writing {out}"):
        write_published(official_state_dict(model), out)
    print(out)
    return 0


def _from_published(options: argparse.Namespace) -> int:
    """Write a folder of this package's from a published checkpoint."""
    from ..errors import InputError
    from ..output_lock import locked_folder
    from ..progress import waiting
    from ..replacing import folder_for
    from ..systems import create_model, load_official_state_dict, save_pretrained
    from ..systems.names import check_name
    from ..systems.registry import has_published_layout
    from ..weights.pickles import read_published

    if options.model is None:
        raise InputError(
            "model is missing; expected the name of the model that the checkpoint belongs to, "
            "such as segclip_vit_b16"
        )
    if not has_published_layout(check_name(options.model)):
        raise InputError(
            f"model is {options.model!r}, whose authors published no checkpoint that is known; "
            "expected one such as segclip_vit_b16"
        )
    out = folder_for(options.out, "--out")
    options.held.enter_context(locked_folder(out, "--out", "convert"))
    with waiting(f"reading {options.source}"):
        state = read_published(options.source)  # before the model, which may be large
        model = create_model(options.model)
    lacking = load_official_state_dict(model, state)
    if lacking:
        print(
            f"{len(lacking)} tensors that only training needs are not in the checkpoint and stay "
            f"random: {', '.join(lacking[:3])}, ..."
        )
    with waiting(f"writing {out}"):
        save_pretrained(model, out, source=Path(options.source).name)
    print(out)
    return 0
