"""The table of docs/towers.md: ``python tests/models/towers_table.py`` writes it, a test compares
it.
"""

import re
import sys
from pathlib import Path

import open_clip

sys.path.insert(0, str(Path(__file__).parent))
from reduced_towers import key, reduced

from ovseg.nn.readout import READOUTS, Readout
from ovseg.systems.backbones import build_backbone

PAGE = Path(__file__).parents[2] / "docs" / "towers.md"
BEGIN, END = (
    "<!-- the table, written by tests/models/towers_table.py -->\n",
    "<!-- end of the table -->",
)
_built = {}


def build(name):
    """Our backbone at the reduced size, or the error that says why not; once for all that are
    alike.
    """
    same = key(name)
    if same not in _built:
        try:
            with reduced(name):
                _built[same] = build_backbone("open_clip", architecture=name).eval()
        except ValueError as error:
            _built[same] = error
    return _built[same]


def supported():
    return [name for name in open_clip.list_models() if not isinstance(build(name), Exception)]


def accepts(check, *arguments):
    try:
        check(*arguments)
    except ValueError:
        return False
    return True


def row(name):
    found, config = build(name), open_clip.get_model_config(name)
    text = config["text_cfg"].get("hf_model_name")
    if isinstance(found, Exception):
        reason = re.search(r"the image tower is (.*); expected", str(found))
        return f"| {name} | not supported: {reason[1]} | | | | |"
    tower = found.tower
    readouts = [readout for readout in READOUTS if accepts(tower.check_readout, READOUTS[readout])]
    assert len(readouts) in (1, len(READOUTS)) and accepts(tower.check_readout, Readout())
    stride = "any" if accepts(tower.step, 1) else "the patch"
    size, words = (
        config["vision_cfg"]["image_size"],
        f"transformers: {text} ¹" if text else "open_clip",
    )
    return f"| {name} | {tower.kind} | {size} / {tower.patch_size} | {words} | {'all' if len(readouts) > 1 else 'clip'} | {stride} |"


def table():
    names = open_clip.list_models()
    rows = [
        "| architecture | image tower | picture / patch | text tower | readouts | stride |",
        "|---|---|---|---|---|---|",
    ]
    count = (
        f"{len(supported())} of {len(names)} architectures of open_clip {open_clip.__version__}."
    )
    return "\n".join([count, "", *rows, *map(row, names)]) + "\n"


def page(text):
    """The page with its table made again."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + table() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(PAGE.read_text("utf-8")), "utf-8")
