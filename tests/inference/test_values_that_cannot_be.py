"""Every option of the three values, in Python and on the command line: NaN, infinities and other
kinds are refused by its name. Texts that a model does not read as they were meant.
"""

import json
import warnings
from dataclasses import fields
from typing import get_args, get_type_hints

import numpy as np
import pytest
from PIL import Image

import ovseg
from ovseg.cli.main import main
from ovseg.data.words import WordTokenizer
from ovseg.errors import InputError
from ovseg.inference import GroupTables, PatchArgmax, Queries, View
from ovseg.inference.rules import rule, rule_names
from ovseg.systems.checks import check_reading
from ovseg.weights.tokenizers import ClipTokenizer

VALUES = (View, *(rule(name) for name in rule_names()))
BESIDE = {"stride": {"crop": 64}, "background_entropy": {"scale": 40.0}}  # what an option needs


def numbers(kinds):
    """(value, field) of the options that are numbers."""
    found = []
    for value in VALUES:
        hints = get_type_hints(value)
        found += [
            (value, field.name)
            for field in fields(value)
            if set(get_args(hints[field.name]) or (hints[field.name],)) & set(kinds)
            and field.name != "bias"
        ]
    return found


@pytest.mark.parametrize("wrong", ["inf", "-inf", "nan", "text", "true", "list"])
@pytest.mark.parametrize(
    "value,name",
    [
        pytest.param(
            *row, marks=pytest.mark.bad_input("inference", "an option that is no finite number")
        )
        for row in numbers((int, float))
    ],
)
def test_every_number_is_finite_and_a_number(value, name, wrong):
    given = {
        "inf": float("inf"),
        "-inf": float("-inf"),
        "nan": float("nan"),
        "text": "40",
        "true": True,
        "list": [40],
    }[wrong]
    with pytest.raises(InputError, match=rf"^{name} is "):
        value(**BESIDE.get(name, {}), **{name: given})


@pytest.mark.parametrize(
    "value,name,given",
    [
        pytest.param(*row, marks=pytest.mark.bad_input("inference", "a number beyond its ends"))
        for row in (
            (PatchArgmax, "scale", 0.0),
            (PatchArgmax, "scale", -40.0),
            (PatchArgmax, "scale", 1e-30),
            (PatchArgmax, "scale", 1e30),
            (GroupTables, "scale", 0.0),
            (GroupTables, "scale", 1e300),
            (PatchArgmax, "background_threshold", 1.01),
            (GroupTables, "background_threshold", -0.1),
            (PatchArgmax, "area_threshold", 1.0),
            (PatchArgmax, "area_threshold", -0.1),
            (PatchArgmax, "background_entropy", -1.0),
            (View, "crop", 0),
            (View, "short_side", -1),
            (View, "window_batch", 0),
            (View, "max_pixels", 0),
            (View, "max_tokens", 0),
            (GroupTables, "top_classes", 0),
            (View, "short_side", 2.5),
        )
    ],
)
def test_ends(value, name, given):
    with pytest.raises(InputError, match=rf"^{name} is "):
        value(**BESIDE.get(name, {}), **{name: given})


@pytest.mark.parametrize("value", [rule(name) for name in rule_names()])
@pytest.mark.bad_input("inference", "a bias that is no finite number")
@pytest.mark.parametrize(
    "bias",
    [
        {"a": float("nan")},
        {"a": float("inf")},
        {"a": float("-inf")},
        {"a": "1"},
        {"a": None},
        [0.1],
        0.1,
    ],
)
def test_biases(value, bias):
    with pytest.raises(InputError, match=r"^bias "):
        value(bias=bias)
    value(bias={"a": -0.1, "b": 3})


@pytest.mark.parametrize("given", ["inf", "-inf", "nan", "1e999"])
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(
            name, marks=pytest.mark.bad_input("command line", "a number that is not finite")
        )
        for name in sorted({name.replace("_", "-") for _, name in numbers((float,))})
    ],
)
def test_every_number_of_the_command_line(tmp_path, name, given, capsys):
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    model = "segclip_tiny" if name == "top-classes" else "pacl_tiny"
    line = [
        "segment",
        str(tmp_path / "a.png"),
        "--labels",
        "grass,gravel",
        "-m",
        model,
        "-o",
        str(tmp_path / "out"),
        f"--{name}={given}",
    ]
    assert main(line) == 2 and not (tmp_path / "out").exists()
    assert f"{name.replace('-', '_')} is" in capsys.readouterr().err
    assert main(["eval", model, "--scenes", "1", f"--{name}={given}"]) == 2


LONG = " ".join(["blue"] * 74)


@pytest.mark.bad_input("inference", "a label that reads as nothing")
@pytest.mark.parametrize("label", ["汽车", "!?", "🚗", "\u200b", "машина"])
def test_a_label_that_reads_as_nothing(label, tmp_path, capsys):
    why = "invisible character" if label == "\u200b" else "reads as nothing"
    model = ovseg.from_pretrained("pacl_tiny")
    image = Image.fromarray(np.zeros((48, 48, 3), np.uint8))
    for ask in (
        lambda: ovseg.segment(image, ["grass", label], model=model),
        lambda: ovseg.Predictor(model, [label, "grass"]),
        lambda: model.encode_labels([label]),
        lambda: ovseg.Predictor(model, ["grass"], background=(label,)),
    ):
        with pytest.raises(InputError, match=why):
            ask()
    image.save(tmp_path / "a.png")
    assert (
        main(
            [
                "segment",
                str(tmp_path / "a.png"),
                "--labels",
                f"grass,{label}",
                "-m",
                "pacl_tiny",
                "-o",
                str(tmp_path / "out"),
            ]
        )
        == 2
    )
    assert why in capsys.readouterr().err


@pytest.mark.bad_input("inference", "labels that read the same")
@pytest.mark.parametrize(
    "labels",
    [
        ["a " * 14 + "red", "a " * 14 + "blue"],
        ["a-red one", "a red, one"],
        ["red (seven)", "red seven"],
    ],
)
def test_labels_that_read_the_same(labels):
    model = ovseg.from_pretrained("pacl_tiny")
    with pytest.raises(
        InputError,
        match="read the same: its tokenizer makes the same tokens of both and reads 16 of them",
    ):
        ovseg.Predictor(model, labels)
    with pytest.raises(InputError, match="read the same"):
        model.encode_labels(labels)
    with pytest.raises(InputError, match="read the same"):
        ovseg.Predictor(model, labels[:1], background=(labels[1],))
    found = ovseg.Predictor(model, {"one": labels, "two": "gravel"})  # synonyms may
    assert found._asked().texts.shape[0] == 3


@pytest.mark.parametrize(
    "tokenizer", [WordTokenizer(), ClipTokenizer("ViT-B-16")], ids=["words", "byte pairs"]
)
def test_what_is_cut(tokenizer):
    """Exactly the context is not cut, one word more is; whatever fills what is left of it."""
    context = tokenizer([""]).shape[1]
    words = ["blue", "red", "grass"] * context
    whole, longer = " ".join(words[: context - 2]), " ".join(words[: context - 1])
    assert tokenizer.cut([whole, longer, "", "red", longer * 20]) == [
        False,
        True,
        False,
        False,
        True,
    ]
    others = [f"{whole} {word}" for word in ("one", "two")]
    assert tokenizer(others)[0].tolist() == tokenizer(others)[1].tolist()


@pytest.mark.bad_input("inference", "a label that is cut")
@pytest.mark.parametrize(
    "tokenizer", [WordTokenizer(), ClipTokenizer("ViT-B-16")], ids=["words", "byte pairs"]
)
def test_a_cut_label_is_named(tokenizer):
    context = tokenizer([""]).shape[1]
    label = " ".join(["blue"] * (context - 3))
    with pytest.warns(
        UserWarning,
        match=rf"labels are cut, as the model reads {context} tokens: 'blue .* \(in 1 of 2 templates\)$",
    ):
        check_reading(tokenizer, ["grass", label], [0, 1], ["{}", "a photo of {}"])
    ends = [f"{label} red one red", f"{label} red one blue"]
    with pytest.raises(InputError, match="read the same"):
        check_reading(tokenizer, ends, [0, 1], ["{}", "a photo of {}"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_reading(tokenizer, ["grass", "a red seven"], [0, 1], ["{}", "a photo of {}"])
    with pytest.warns(UserWarning, match=r"in 2 of 2 templates"):
        check_reading(tokenizer, ["grass", ends[0]], [0, 1], ["{}", "a photo of {}"])


def test_labels_that_are_cut_in_one_template_are_told_apart_by_the_others():
    labels = ["a " * 11 + "red", "a " * 11 + "blue"]
    with pytest.warns(UserWarning, match="labels are cut"):
        check_reading(WordTokenizer(), labels, [0, 1], ["{}", "there is a photo of {}"])
    with pytest.raises(InputError, match="read the same"):
        check_reading(
            WordTokenizer(), labels, [0, 1], ["there is a photo of {}", "a photo of a photo of {}"]
        )


@pytest.mark.bad_input("inference", "labels of words that a model does not know")
def test_unknown_words_are_told(tmp_path):
    """``check_words`` refuses them where a user asks; who goes on without it is warned that they
    are all alike.
    """
    model = ovseg.from_pretrained("pacl_tiny")
    with pytest.warns(
        UserWarning,
        match=r"labels read the same, as the model knows none of their words: 'zebra', 'lion', 'tiger' and",
    ):
        ovseg.Predictor(model, ["zebra", "lion", "tiger", "ape", "grass"])
    with pytest.raises(InputError, match="does not know: lion, zebra"):
        ovseg.segment(Image.new("RGB", (48, 48)), ["zebra", "lion"], model=model)


def test_texts_of_a_context_of_77_on_clip():
    """open_clip's byte pairs read any script; only what is beyond the context is lost."""
    check_reading(
        ClipTokenizer("ViT-B-16"), ["汽车", "街道", "машина"], [0, 1, 2], ["a photo of a {}."]
    )
    with pytest.raises(
        InputError,
        match="read the same: its tokenizer makes the same tokens of both and reads 77 of them",
    ):
        check_reading(
            ClipTokenizer("ViT-B-16"),
            [f"{LONG} red {x}" for x in ("grass", "sand")],
            [0, 1],
            ["{}"],
        )


def test_queries_and_options_hold_no_other_kind():
    with pytest.raises(InputError, match=r"background is 0\.3; expected texts"):
        Queries(background=0.3)
    assert json.dumps(View().max_tokens)
