"""The default model on ten photographs, on a machine with a network, in one command: is what it
says true?

  python scripts/first_real_run.py --out first_run    downloads OpenAI's CLIP (600 MB)
  python scripts/first_real_run.py --model ViT-B-16:laion2b_s34b_b88k --readout sclip
  python scripts/first_real_run.py --random-weights   random weights: runs to its end

The photographs ship with scikit-image. Writes index.html with the overlays, table.md with times and
facts, results.json. A fact is a share of a region whose content anybody can see: the middle of the
cat's picture is a cat. Exit code 1 if one does not hold, 2 without weights.
"""

from __future__ import annotations

import argparse
import html
import json
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Fact:
    """At least ``share`` of the region (top, left, bottom, right, of 1) is ``label``."""

    label: str
    region: tuple[float, float, float, float]
    share: float = 0.5

    def seen(self, labels: np.ndarray, names: list[str]) -> float:
        height, width = labels.shape
        top, left, bottom, right = self.region
        part = labels[
            int(top * height) : int(bottom * height), int(left * width) : int(right * width)
        ]
        return float((part == names.index(self.label)).mean())


WHOLE = (0.0, 0.0, 1.0, 1.0)
PHOTOGRAPHS: dict[str, tuple[list[str], list[Fact]]] = {  # of skimage.data; labels; what is certain
    "chelsea": (["cat", "wall"], [Fact("cat", (0.2, 0.15, 0.9, 0.75), 0.6)]),
    "astronaut": (
        ["astronaut", "flag", "rocket", "wall"],
        [Fact("astronaut", (0.45, 0.15, 0.95, 0.5))],
    ),
    "coffee": (
        ["cup of coffee", "wooden table", "spoon"],
        [
            Fact("cup of coffee", (0.1, 0.35, 0.5, 0.65)),
            Fact("wooden table", (0.05, 0.8, 0.5, 1.0)),
        ],
    ),
    "rocket": (["rocket", "sky", "steel tower"], [Fact("sky", (0.0, 0.15, 0.25, 0.85))]),
    "camera": (
        ["man", "grass", "sky", "camera tripod"],
        [Fact("man", (0.4, 0.05, 0.8, 0.25)), Fact("sky", (0.0, 0.6, 0.2, 1.0))],
    ),
    "stereo_motorcycle": (
        ["motorcycle", "wall", "floor"],
        [Fact("motorcycle", (0.4, 0.3, 0.75, 0.65))],
    ),
    "horse": (["horse", "white background"], [Fact("horse", (0.35, 0.25, 0.5, 0.7))]),
    "grass": (["grass", "gravel", "brick wall"], [Fact("grass", WHOLE, 0.6)]),
    "gravel": (["grass", "gravel", "brick wall"], [Fact("gravel", WHOLE, 0.6)]),
    "brick": (["grass", "gravel", "brick wall"], [Fact("brick wall", WHOLE, 0.6)]),
}
SMALL = {
    "embed_dim": 32,
    "quick_gelu": True,
    "vision_cfg": {"image_size": 224, "layers": 2, "width": 32, "head_width": 16, "patch_size": 16},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


def photograph(name: str) -> np.ndarray:
    import skimage.data

    found = getattr(skimage.data, name)()
    picture = np.asarray(found[0] if isinstance(found, tuple) else found)
    picture = picture.astype(np.uint8) * 255 if picture.dtype == bool else picture
    return np.stack([picture] * 3, -1) if picture.ndim == 2 else picture[..., :3]


def run(options: argparse.Namespace) -> int:
    import ovseg
    from ovseg.environment import environment
    from ovseg.output_lock import locked_folder
    from ovseg.progress import bar, waiting
    from ovseg.replacing import folder_for, write_text
    from ovseg.systems import DEFAULT_MODEL, DEFAULT_VIEW, default_model

    out = folder_for(options.out, "--out")
    options.held.enter_context(locked_folder(out, "--out", "first_real_run"))
    chosen: dict[str, Any] = {"readout": options.readout} if options.readout else {}
    began = time.perf_counter()
    with waiting("loading the model"):
        if options.random_weights:
            model = ovseg.create_model(
                "clip_dense", architecture=SMALL, readout=options.readout or "naclip"
            )
        else:
            model = (
                ovseg.from_pretrained(options.model, **chosen)
                if options.model
                else default_model(**chosen)
            )
        model = model.to(options.device)
    loading = time.perf_counter() - began
    predictor = ovseg.Predictor(model, **DEFAULT_VIEW)
    rows: list[dict[str, Any]] = []
    title = "random weights" if options.random_weights else options.model or DEFAULT_MODEL
    found = {
        "model": title,
        "source": model.source,
        "readout": str(model.config.get("readout")),
        "loading_s": loading,
        "environment": environment(options.device),
        "pictures": rows,
    }
    for name, (labels, facts) in bar(PHOTOGRAPHS.items(), unit="picture", leave=False):
        picture = photograph(name)
        times = [time.perf_counter()]
        predictor.set_labels(labels)
        times.append(time.perf_counter())
        result = predictor.set_image(picture).predict()
        times.append(time.perf_counter())
        result.save(out / f"{name}.png")
        checked = [
            {
                "label": fact.label,
                "region": fact.region,
                "expected": fact.share,
                "seen": fact.seen(result.labels, labels),
            }
            for fact in facts
        ]
        rows.append(
            {
                "picture": name,
                "size": list(picture.shape[:2]),
                "labels": labels,
                "areas": result.areas,
                "facts": checked,
                "texts_s": times[1] - times[0],
                "picture_s": times[2] - times[1],
                "holds": None
                if options.random_weights
                else all(fact["seen"] >= fact["expected"] for fact in checked),
            }
        )
        sys.stderr.write(f"{name}: {rows[-1]['picture_s']:.2f} s\n")
        write_text(out / "results.json", json.dumps(found, indent=2) + "\n")
        write_text(out / "table.md", table(rows))
        write_text(out / "index.html", page(found))
    failed = [row["picture"] for row in rows if row["holds"] is False]
    print(table(rows))
    print(
        f"{title}: loaded in {loading:.1f} s; facts "
        + (
            "not checked: random weights know nothing"
            if options.random_weights
            else f"that do not hold: {', '.join(failed)}"
            if failed
            else "hold"
        )
    )
    print(out / "index.html")
    return 1 if failed else 0


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| picture | size | texts, s | picture, s | facts | |", "|---|---|---|---|---|---|"]
    for row in rows:
        seen = "; ".join(
            f"{fact['label']} {100 * fact['seen']:.0f} % (at least {100 * fact['expected']:.0f})"
            for fact in row["facts"]
        )
        verdict = {None: "not checked", True: "holds", False: "DOES NOT HOLD"}[row["holds"]]
        lines.append(
            f"| {row['picture']} | {row['size'][1]} x {row['size'][0]} | {row['texts_s']:.2f} | "
            f"{row['picture_s']:.2f} | {seen} "
            f"| {verdict} |"
        )
    return "\n".join(lines) + "\n"


VERDICTS = {
    None: "Facts not checked.",
    True: "Facts hold.",
    False: "<b>Facts do not hold.</b>",
}
STYLE = (
    "body{font:16px sans-serif;max-width:1200px;margin:auto}"
    "figure{display:inline-block;width:380px;vertical-align:top;margin:6px}img{width:100%}"
)


def page(facts: dict[str, Any]) -> str:
    figures = "\n".join(
        f'<figure><img src="{row["picture"]}.png" alt="{row["picture"]}">'
        f"<figcaption>{html.escape(row['picture'])}: {html.escape(', '.join(row['labels']))}. "
        f"{row['picture_s']:.2f} s. {VERDICTS[row['holds']]}</figcaption></figure>"
        for row in facts["pictures"]
    )
    about = ", ".join(f"{key} {value}" for key, value in facts["environment"].items())
    return (
        f"<!doctype html><meta charset=utf-8><title>First run</title><style>{STYLE}</style>\n"
        f"<h1>First run</h1>\n<p>{html.escape(facts['model'])}, readout "
        f"{html.escape(facts['readout'])}, loaded in {facts['loading_s']:.1f} s; "
        f"{html.escape(about)}.</p>\n{figures}\n"
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default="first_run")
    parser.add_argument(
        "--model", help="whatever ovseg segment -m takes (default: the default model)"
    )
    parser.add_argument("--readout", help="clip, maskclip, sclip, clearclip, naclip, gem")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--random-weights",
        action="store_true",
        help="a small model of random weights; facts are not checked",
    )
    options = parser.parse_args(argv)
    if options.random_weights and options.model:
        parser.error("--random-weights is given with --model; expected one of them")
    from ovseg.cli.main import told
    from ovseg.errors import CheckpointError, InputError

    try:
        with told(), ExitStack() as options.held:
            return run(options)
    except (InputError, CheckpointError) as error:
        print(f"first_real_run: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
