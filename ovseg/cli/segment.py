"""Segment pictures with free-text labels.

  ovseg segment street.png --labels "a red car,road,sky"
  ovseg segment photos/ --labels-file names.txt -o out/
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("images", nargs="*", help="picture files and folders")
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
    sub.add_argument("--device", default="cpu")


def run(options: argparse.Namespace) -> int:
    from ..data.images import SUFFIXES
    from ..errors import InputError
    from ..inference import Predictor
    from ..progress import bar

    formats = options.format.split(",")
    for name in formats:
        if name not in ("overlay", "mask", "json"):
            raise InputError(f"--format holds {name!r}; expected overlay, mask or json")
    labels = _labels(options)
    model = _model(options.model, options.device)
    inputs: list[tuple[str, object]] = []
    if options.demo:
        from ..data.scenes import Scenes

        scenes = Scenes("digits", "val", 8)
        labels = labels or list(scenes.vocabulary.prompts)
        inputs.append(("demo", next(scene for scene in scenes if len(scene.things) == 2).image))
    for name in options.images:
        path = Path(name)
        found = sorted(p for p in path.rglob("*") if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        inputs += [(str(p), p) for p in found]
    if not inputs:
        raise InputError("no pictures: give files or folders, or --demo")
    if not labels:
        raise InputError('no labels: give --labels "cat,grass" or --labels-file')
    predictor = Predictor(model, labels, templates=options.templates, background=options.background, short_side=options.short_side,
                          crop=options.crop, stride=options.stride)
    _warn_unknown(model, labels)
    out, bad, used = Path(options.out), 0, set()
    for name, source in bar(inputs, show=len(inputs) > 2, unit="picture"):
        try:
            result = predictor.set_image(source).predict()
        except InputError as error:
            if len(inputs) == 1:
                raise
            bad += 1
            print(f"skipped: {error}", file=sys.stderr)
            continue
        stem = Path(name).stem
        while stem in used:  # pictures of one name in several folders
            stem += "_"
        used.add(stem)
        written = []
        if "overlay" in formats:
            written.append(result.save(out / f"{stem}.overlay.png"))
        if "mask" in formats:
            written.append(result.save_mask(out / f"{stem}.mask.png"))
        if "json" in formats:
            path = out / f"{stem}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            areas = {label: round(share, 6) for label, share in result.areas.items()}
            path.write_text(json.dumps({"image": name, "labels": result.names, "areas": areas}, indent=2))
            written.append(path)
        if len(inputs) < 3:
            top = sorted(result.areas.items(), key=lambda item: -item[1])[:5]
            print(", ".join(f"{label} {100 * share:.1f} %" for label, share in top if share > 0))
            print(*written, sep="\n")
    if len(inputs) >= 3 or bad:
        print(f"{len(inputs) - bad} pictures into {out}, {bad} skipped")
    return 3 if bad else 0


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
