"""Segment pictures with free-text labels.

  ovseg segment street.png --labels "a red car,road,sky"
  ovseg segment photos/ --labels-file names.txt -o out/
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..inference import Segmentation

_ENDINGS = {"overlay": ".overlay.png", "mask": ".mask.png", "json": ".json"}


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("images", nargs="*", help="picture files, folders and patterns")
    sub.add_argument("--demo", action="store_true", help="segment a built-in scene with its own labels")
    source = sub.add_mutually_exclusive_group()
    source.add_argument("--labels", help="comma-separated")
    source.add_argument("--labels-file", help="one label a line")
    sub.add_argument("-m", "--model", default="pacl_tiny", help="a model with bundled weights, or a save_pretrained folder")
    sub.add_argument("-o", "--out", default="segmented", help="output folder (default: %(default)s)")
    sub.add_argument("--format", default="overlay", help="comma-separated: overlay, mask, json (default: %(default)s)")
    sub.add_argument("--background", type=float, help="smallest cosine of a winning label; pixels below get none")
    sub.add_argument("--short-side", type=int, help="resize pictures to this short side before encoding")
    sub.add_argument("--crop", type=int, help="see the resized picture through square windows of this side")
    sub.add_argument("--stride", type=int, help="pixels from one window to the next (default: half of --crop)")
    sub.add_argument("--templates", help="set of prompt templates: label, simple, scenes, pacl7, clip80")
    sub.add_argument("--overwrite", action="store_true", help="do pictures again that were done with the same labels, model and options")
    sub.add_argument("--device", default="cpu")


def run(options: argparse.Namespace) -> int:
    from ..errors import InputError
    from ..inference import Predictor
    from ..inference.folder import Journal, find_pictures, fingerprint
    from ..progress import bar

    formats = options.format.split(",")
    for name in formats:
        if name not in _ENDINGS:
            raise InputError(f"--format holds {name!r}; expected overlay, mask or json")
    labels = _labels(options)
    model = _model(options.model, options.device)
    inputs: list[tuple[str, Any]] = []
    if options.demo:
        from ..data.scenes import Scenes

        scenes = Scenes("digits", "val", 8)
        labels = labels or list(scenes.vocabulary.prompts)
        inputs.append(("demo", next(scene for scene in scenes if len(scene.things) == 2).image))
    inputs += find_pictures(options.images)
    if not inputs:
        raise InputError("no pictures: give files or folders, or --demo")
    if not labels:
        raise InputError('no labels: give --labels "cat,grass" or --labels-file')
    seeing = {name: getattr(options, name) for name in ("templates", "background", "short_side", "crop", "stride")}
    predictor = Predictor(model, labels, **seeing)
    _warn_unknown(model, labels)
    out, bad, before = Path(options.out), [], 0
    journal = Journal(out, {**seeing, "labels": labels, "model": fingerprint(model)})
    for name, source in bar(inputs, show=len(inputs) > 2, unit="picture"):
        files = [out / f"{name}{_ENDINGS[kind]}" for kind in formats]
        if len(inputs) > 2 and isinstance(source, Path) and not options.overwrite and journal.has(name, source, files):
            before += 1
            continue
        try:
            result = predictor.set_image(source).predict()
        except InputError as error:
            if len(inputs) == 1:
                raise
            bad.append(str(source))
            print(f"skipped: {error}", file=sys.stderr)
            continue
        for kind, file in zip(formats, files, strict=True):
            _write(result, kind, file, str(source) if isinstance(source, Path) else name)
        if isinstance(source, Path):
            journal.add(name, source)
        if len(inputs) < 3:
            top = sorted(result.areas.items(), key=lambda item: -item[1])[:5]
            print(", ".join(f"{label} {100 * share:.1f} %" for label, share in top if share > 0))
            print(*files, sep="\n")
    if len(inputs) >= 3 or bad or before:
        earlier = f", {before} done before" if before else ""
        print(f"{len(inputs) - len(bad) - before} pictures into {out}{earlier}, {len(bad)} skipped")
    if bad:
        print("\n".join(["bad pictures:", *bad]), file=sys.stderr)
    return 3 if bad else 0


def _write(result: Segmentation, kind: str, path: Path, image: str) -> None:
    from ..inference.folder import replacing

    with replacing(path) as part:
        if kind == "overlay":
            result.save(part)
        elif kind == "mask":
            result.save_mask(part)
        else:
            areas = {label: round(share, 6) for label, share in result.areas.items()}
            part.write_text(json.dumps({"image": image, "labels": result.names, "areas": areas}, indent=2))


def _labels(options: argparse.Namespace) -> list[str]:
    from ..errors import InputError

    if options.labels_file:
        path = Path(options.labels_file)
        if not path.is_file():
            raise InputError(f"--labels-file {options.labels_file!r} does not exist; expected a text file, one label a line")
        return [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    return [] if options.labels is None else [label.strip() for label in options.labels.split(",")]


def _model(name: str, device: str):
    from ..models import create_model, from_pretrained, list_pretrained

    if Path(name).is_dir():
        return from_pretrained(Path(name) / "model" if (Path(name) / "model").is_dir() else name, device=device)
    tags = [tag for known, tag in list_pretrained() if known == name]
    if not tags:
        raise ValueError(f"--model is {name!r}; expected a folder or one of {sorted({m for m, _ in list_pretrained()})}")
    if name.endswith("_tiny"):
        print(f"{name}: trained on synthetic scenes; it knows their words only", file=sys.stderr)
    return create_model(name, tags[0], device=device)


def _warn_unknown(model, labels: list[str]) -> None:
    unknown = getattr(model.backbone.tokenizer, "unknown", None)
    words = sorted({word for label in labels for word in unknown(label)}) if unknown else []
    if words:
        print(f"this model does not know: {', '.join(words)}", file=sys.stderr)
