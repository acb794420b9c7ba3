"""Make the file of names and text vectors that a table of vectors begins with.

    python scripts/make_teacher.py voc12_single.npy voc20 voc12.npz --center
    ovseg train zegclip_lite0_voc model.options.text.teacher=voc12.npz ...

VECTORS is a .npy file [C, E] of text embeddings by a CLIP, a row for each class, such as ZegCLIP
publishes them. NAMES says whose they are: a set of `ovseg data list`, whose classes are meant, or a
text file with a name on each line, in the order of the rows. OUT is a .npz file with `names`,
`vectors` and `center`, what `teacher` of the text tower `vectors` reads at the start of training.

Text vectors of a CLIP are much alike: of the 20 names of VOC the mean cosine is 0.81. `--center`
has the mean of the unit vectors taken off, which the file and the model then say.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from ovseg.data.class_lists import class_list
from ovseg.data.set_descriptions import list_sets
from ovseg.errors import CheckpointError, ConfigError, InputError
from ovseg.replacing import file_for
from ovseg.text_files import lines_of
from ovseg.weights.teachers import write_teacher


def names_of(which: str) -> list[str]:
    if which in list_sets():
        return list(class_list(which).names)
    expected = f"a text file with a name on each line, or one of {list_sets()}"
    return lines_of(Path(which), "names", expected, InputError)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("vectors", help=".npy [C, E]")
    parser.add_argument("names", help="a set of `ovseg data list`, or a text file")
    parser.add_argument("out", help=".npz")
    parser.add_argument("--center", action="store_true", help="take the mean vector off")
    parser.add_argument("--width", type=int, default=512, help="E (512)")
    options = parser.parse_args(argv)
    try:
        if Path(options.out).suffix != ".npz":
            raise InputError(f"out is {options.out!r}; expected a name that ends in .npz")
        out = file_for(options.out, "out")
        table = (names_of(options.names), Path(options.vectors))
        write_teacher(out, [table], options.width, fold=False, center=options.center)
    except (CheckpointError, ConfigError, InputError) as error:
        print(f"make_teacher: {error}", file=sys.stderr)
        return 2
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
