"""Label files as they are published and as people get them wrong: tables, numbers, synonyms of two
classes, templates, damage.
"""

import csv
import io
import json
import logging
import os

import pytest

import ovseg
from ovseg.cli.main import main
from ovseg.data.benchmark_sets import describe
from ovseg.data.entities import Entities
from ovseg.data.labels import LabelSet
from ovseg.data.scenes import Scenes
from ovseg.data.templates import check_templates, templates
from ovseg.errors import ConfigError, InputError
from ovseg.inference import Queries

CAT_DOG = ("cat", "dog")


def case(what, *values):
    return pytest.param(*values, marks=pytest.mark.bad_input("label files", what), id=what)


@pytest.mark.parametrize(
    "name,text,names",
    [
        case("a .csv with a header Idx,Name", "a.csv", "Idx,Name\n1,cat\n2,dog\n", CAT_DOG),
        case("a table whose rows are out of order", "a.csv", "Idx,Name\n2,dog\n1,cat\n", CAT_DOG),
        case(
            "ADE20K's own table",
            "a.csv",
            "Idx,Ratio,Train,Val,Stuff,Name\n1,0.1,9,8,1,cat;kitty\n2,0.1,9,8,0,dog\n",
            CAT_DOG,
        ),
        case("a table without numbers", "a.csv", "name,colour\ncat,black\ndog,brown\n", CAT_DOG),
        case("a table with semicolons", "a.csv", "Id;Label\r\n0;cat\r\n1;dog\r\n", CAT_DOG),
        case("a table with tabs", "a.tsv", "Id\tName\n0\tcat\n1\tdog\n", CAT_DOG),
        case("a table in a .txt", "a.txt", "Idx\tRatio\tName\n1\t0.1\tcat\n2\t0.2\tdog\n", CAT_DOG),
        case("a table with a byte order mark", "a.csv", "\ufeffIdx,Name\n1,cat\n2,dog\n", CAT_DOG),
        case("numbered lines, 0: cat", "a.txt", "0: cat\n1: dog\n", CAT_DOG),
        case("numbered lines, out of order, with tabs", "a.txt", "1\tdog\n0\tcat\n", CAT_DOG),
        case("id2label.json", "a.json", '{"0": "cat", "1": "dog"}', CAT_DOG),
        case("id2label.json, out of order", "a.json", '{"1": "dog", "0": "cat"}', CAT_DOG),
        case("label2id.json", "a.json", '{"dog": 1, "cat": 0}', CAT_DOG),
        case("label2id.json with numbers as texts", "a.json", '{"dog": "1", "cat": "0"}', CAT_DOG),
        case("numbers in .yaml", "a.yaml", "1: cat\n2: dog\n", CAT_DOG),
        case(
            "JSON that is indented by tabs", "a.json", '{\n\t"labels": ["cat", "dog"]\n}', CAT_DOG
        ),
        case("names with .names at the end", "coco.names", "cat\ndog\n", CAT_DOG),
        case("lines that end as on old Macs", "a.txt", "cat\rdog\r", CAT_DOG),
    ],
)
def test_published_forms_are_read(tmp_path, name, text, names):
    (tmp_path / name).write_text(text, "utf-8", newline="")
    assert LabelSet.read(tmp_path / name).names == names


def test_numbers_in_python():
    assert (
        LabelSet.of({0: "cat", 1: "dog"}).names
        == LabelSet.of({"cat": 1, "dog": 2}).names
        == CAT_DOG
    )
    assert LabelSet.of({"0": ["zero"], "1": ["one"]}).names == (
        "0",
        "1",
    )  # texts in lists: names that are numbers


@pytest.mark.parametrize(
    "name,text,texts",
    [
        case(
            "; between synonyms in a .txt",
            "a.txt",
            "cat;kitty\ndog\n",
            (("cat", "kitty"), ("dog",)),
        ),
        case(
            "; between synonyms in a .csv",
            "a.csv",
            'Idx,Name\n1,"cat;kitty, puss"\n2,dog\n',
            (("cat", "kitty", "puss"), ("dog",)),
        ),
        case(
            "; between synonyms in a list of JSON",
            "a.json",
            '["cat;kitty", "dog"]',
            (("cat", "kitty"), ("dog",)),
        ),
        case(
            "; between synonyms in id2label.json",
            "a.json",
            '{"0": "cat;kitty", "1": "dog"}',
            (("cat", "kitty"), ("dog",)),
        ),
        case(
            "; between synonyms in {name: texts}",
            "a.yaml",
            "cat: cat;kitty\ndog:\n",
            (("cat", "kitty"), ("dog",)),
        ),
        case(
            "a column of synonyms",
            "a.csv",
            "name,synonyms\ncat,kitty|puss\ndog,\n",
            (("cat", "kitty", "puss"), ("dog",)),
        ),
        case(
            "a text that stands for two classes",
            "a.txt",
            "cat, pet\ndog, pet\n",
            (("cat", "pet"), ("dog",)),
        ),
        case(
            "a synonym that is the name of a later class",
            "a.txt",
            "cat, dog\ndog, hound\n",
            (("cat",), ("dog", "hound")),
        ),
        case(
            "a text that stands twice for one class",
            "a.txt",
            "cat, kitty, kitty\ndog\n",
            (("cat", "kitty"), ("dog",)),
        ),
    ],
)
def test_synonyms(tmp_path, name, text, texts, caplog):
    (tmp_path / name).write_text(text)
    assert LabelSet.read(tmp_path / name).texts == texts
    told = "stand for several classes and count for one" in caplog.text
    assert told == any(
        text in other for other in ("cat, pet\ndog, pet\n", "cat, dog\ndog, hound\n")
    )


def test_what_is_dropped_is_named(caplog):
    found = LabelSet.of(
        {"earth": ["earth", "ground"], "land": ["land", "ground", "soil"], "path": "path"}
    )
    assert found.texts == (("earth", "ground"), ("land", "soil"), ("path",))
    assert "'ground' (for 'earth', not 'land')" in caplog.text
    assert LabelSet.parse("building;edifice,door|gate").texts == (
        ("building", "edifice"),
        ("door", "gate"),
    )


@pytest.mark.bad_input("label files", "a background word that is a class too")
def test_published_backgrounds_may_hold_a_class(caplog):
    """The SCLIP family's words for COCO-Object hold bed, which is one of its classes."""
    model = ovseg.from_pretrained("pacl_tiny")
    predictor = ovseg.Predictor(model, ["gravel", "grass"], background=["gravel", "brick", "brick"])
    image = Scenes("digits", "val", 1)[0].image
    caplog.clear()
    first = predictor.set_image(image).predict()
    plain = (
        ovseg.Predictor(model, ["gravel", "grass"], background=["brick"]).set_image(image).predict()
    )
    assert (first.labels == plain.labels).all() and predictor.classify().keys() == {
        "gravel",
        "grass",
    }
    with caplog.at_level(logging.WARNING):
        predictor.set_labels(["grass"])
        ovseg.Predictor(model, ["gravel"], background=["gravel", "brick"])
    assert (
        caplog.text.count("left out of the background, being labels: 'gravel'") == 1
    )  # of the second; the first had been told before
    assert predictor.queries.rivals == (
        "gravel",
        "brick",
    )  # a label no more, it is a word of the background again


@pytest.mark.parametrize(
    "name,data,message",
    [
        case(
            "a table without a header",
            "a.csv",
            b"0,cat\n1,dog\n",
            r"header \['0', 'cat'\] names no column of names; expected one",
        ),
        case(
            "a table without a header in a .txt",
            "a.txt",
            b"0,cat\n1,dog\n",
            "looks like a row of a table without a header",
        ),
        case(
            "tabs in a .txt", "a.txt", b"cat\t0\ndog\t1\n", "holds a tab as a row of a table does"
        ),
        case(
            "numbers with a gap",
            "a.csv",
            b"Idx,Name\n1,cat\n3,dog\n",
            "'dog.* has the number 3 where 2 is expected",
        ),
        case(
            "one number twice",
            "a.json",
            b'{"cat": 0, "dog": 0}',
            "'dog' has the number 0 where 1 is expected",
        ),
        case(
            "numbers that begin at 7",
            "a.json",
            b'{"7": "cat", "8": "dog"}',
            "'cat' has the number 7 where 0 is expected",
        ),
        case(
            "a number that is none",
            "a.csv",
            b"Idx,Name\none,cat\n",
            "row 2 has 'one' in the column 'Idx'; expected a whole number",
        ),
        case(
            "a row with more cells",
            "a.csv",
            b"Idx,Name\n1,cat, black\n",
            "row 2 has 3 cells and the header 2",
        ),
        case("an open quotation mark", "a.csv", b'Idx,Name\n1,"cat\n', "unexpected end of data"),
        case("a table of a header alone", "a.csv", b"Idx,Name\n", "labels is empty"),
        case("an empty .csv", "a.csv", b"", r"its header \[\] names no column"),
        case(
            "a key that stands twice (YAML)",
            "a.yaml",
            b"cat: a cat\ncat: a dog\n",
            "key 'cat' stands twice",
        ),
        case(
            "a key that stands twice (JSON)",
            "a.json",
            b'{"cat": 0, "cat": 1}',
            "key 'cat' stands twice",
        ),
        case(
            "texts that are numbers",
            "a.json",
            b'{"cat": [1, 2]}',
            "text 0 of 'cat' is 1; expected a text",
        ),
        case(
            "texts that are a mapping",
            "a.json",
            b'{"cat": {"a": 1}}',
            "the texts of 'cat' are a dict",
        ),
        case(
            "fractions as ids",
            "a.json",
            b'{"cat": 0.5, "dog": 1}',
            "the texts of 'cat' are a float, 0.5",
        ),
        case(
            "categories of COCO's JSON",
            "a.json",
            b'[{"id": 1, "name": "cat"}]',
            r"labels\[0\] is a dict; expected a string",
        ),
        case(
            "words that YAML takes for something else",
            "a.yaml",
            b"[yes, no]",
            r"labels\[0\] is a bool",
        ),
        case("no JSON", "a.json", b"cat\ndog\n", "no JSON: "),
        case("a text in place of a list", "a.json", b'"cat"', "a str stands where a list of names"),
        case(
            "100 000 nested brackets (JSON)",
            "a.json",
            b"[" * 100_000,
            "JSON that is nested too deeply",
        ),
        case(
            "100 000 nested brackets (YAML)",
            "a.yaml",
            b"[" * 100_000,
            "YAML that is nested too deeply",
        ),
        case(
            "100 000 nested mappings", "a.yaml", b"{a: " * 100_000, "YAML that is nested too deeply"
        ),
        case(
            "a suffix of another kind",
            "a.xlsx",
            b"PK",
            r"ends in \.xlsx; expected \.txt \(a class on each line\), \.csv",
        ),
        case(
            "a line that is not UTF-8", "a.txt", b"cat\ncaf\xe9\n", "no UTF-8 text, line 2: .*0xe9"
        ),
        case("UTF-16", "a.csv", "Idx,Name\n1,cat\n".encode("utf-16"), "no UTF-8 text, line 1"),
        case(
            "templates of an unknown name",
            "a.yaml",
            b"templates: clip8\nlabels: [cat]\n",
            "templates is 'clip8'; expected one of",
        ),
        case(
            "a template without a place",
            "a.yaml",
            b"templates: [a photo]\nlabels: [cat]\n",
            "template 'a photo' holds 0 '{}'",
        ),
        case(
            "a template with two places",
            "a.json",
            b'{"templates": ["{} {}"], "labels": ["cat"]}',
            "holds 2 '{}'; expected exactly one",
        ),
        case(
            "a template with other braces",
            "a.json",
            b'{"templates": ["{} {0}"], "labels": ["cat"]}',
            "holds other braces than its '{}'",
        ),
        case(
            "a template that is a number",
            "a.json",
            b'{"templates": [3], "labels": ["cat"]}',
            r"templates\[0\] is a int",
        ),
        case(
            "templates that are a mapping",
            "a.json",
            b'{"templates": {"a": 1}, "labels": ["cat"]}',
            "templates is a dict",
        ),
        case(
            "no templates", "a.json", b'{"templates": [], "labels": ["cat"]}', "templates is empty"
        ),
    ],
)
def test_what_is_refused_names_the_file_and_what_is_expected(tmp_path, name, data, message, capsys):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(InputError, match=message) as error:
        LabelSet.read(path)
    assert str(path) in str(error.value)
    assert (
        main(["segment", "x.png", "--labels-file", str(path)]) == 2
        and str(path) in capsys.readouterr().err
    )


@pytest.mark.parametrize(
    "what",
    [
        pytest.param(what, marks=pytest.mark.bad_input("label files", what))
        for what in (
            "a folder",
            "a FIFO",
            "a device",
            "a link to nothing",
            "a name that is too long",
        )
    ],
)
def test_a_label_file_that_is_no_file(tmp_path, what):
    path = tmp_path / "labels.txt"
    if what == "a folder":
        path.mkdir()
    elif what == "a FIFO":
        os.mkfifo(path)
    elif what == "a link to nothing":
        path.symlink_to("gone")
    path = {"a device": "/dev/null", "a name that is too long": "cat, dog, " * 50}.get(what, path)
    words = (
        "cannot be looked at: File name too long"
        if what == "a name that is too long"
        else f"is {what}"
    )
    with pytest.raises(InputError, match=f"label file .* {words}; expected"):
        LabelSet.read(path)


def test_templates_are_checked_in_one_place():
    assert templates(["a {}."]) == ("a {}.",) and templates("label") == ("{}",)
    check_templates("clip80")
    with pytest.raises(InputError, match="expected one of"):
        templates("none")


def test_tables_survive_what_csv_can_write(tmp_path):
    names = ['a "red" car', "grass", "über"]
    buffer = io.StringIO()
    csv.writer(buffer).writerows([("id", "name"), *enumerate(names)])
    (tmp_path / "a.csv").write_text(buffer.getvalue(), "utf-8", newline="")
    assert LabelSet.read(tmp_path / "a.csv").names == tuple(names)
    (tmp_path / "b.json").write_text(json.dumps(names))
    assert LabelSet.read(tmp_path / "b.json").names == tuple(names)


@pytest.mark.third_trial(9)
@pytest.mark.parametrize(
    "text,names",
    [
        ("c# book\nf#\n", ("c# book", "f#")),
        ("cat # a comment\n# another\n#third\ndog #4\n", CAT_DOG),
        (" cat\n\tdog \n", CAT_DOG),
        ("swivel\u00a0chair\noffice\u3000chair\n", ("swivel chair", "office chair")),
        ("18 wheeler\ncat\n3D printer\n", ("18 wheeler", "cat", "3D printer")),
        ("rock 'n' roll\n'n sync\n12\" vinyl\n", ("rock 'n' roll", "'n sync", '12" vinyl')),
        (
            "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645\ncat\n",
            ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "cat"),
        ),
    ],
)
def test_lines_are_the_names_that_were_meant(tmp_path, text, names):
    (tmp_path / "a.txt").write_text(text, "utf-8", newline="")
    assert LabelSet.read(tmp_path / "a.txt").names == names


@pytest.mark.third_trial(9)
@pytest.mark.parametrize(
    "text,message",
    [
        (
            "0: grass\ngravel\n",
            "'0: grass' has a number and 'gravel' has none; expected one before every name",
        ),
        ("gravel\n0\tgrass\n", r"'0\\tgrass' has a number and 'gravel' has none"),
        ("0: grass\n1:\n", "'0: grass' has a number and '1:' has none"),
        (
            "1 wall\n",
            "'1 wall' may be a class of that name, or 'wall' with its number; expected '1: wall' "
            "on every line .* or a .json",
        ),
        ("0 wall\n1 floor\n", "'0 wall' may be a class of that name"),
        ("wall\n2 floor\n", "'2 floor' may be a class of that name"),
        ("7. wall\n8. floor\n", r"'7\. wall' may be a class of that name"),
        ("1) wall\n", r"'1\) wall' may be a class of that name"),
        ("wall: 0\nfloor: 1\n", "'wall: 0' has a number behind the name"),
        ("0, cat\ndog\n", "looks like a row of a table without a header"),
        ('"cat"\ndog\n', '"cat" is in quotation marks; expected a name without them'),
        ('"traffic light, red"\n', "is in quotation marks"),
        ("cat, 'kitty'\n", "'kitty' is in quotation marks"),
        ("\u201ccat\u201d\n", "is in quotation marks"),
        ("- cat\n- dog\n", "'- cat' looks like JSON or YAML"),
        ('["cat", "dog"]\n', "looks like JSON or YAML"),
        (("1" * 5000 + ": wall\n") * 2, "labels.* are both '1111"),
    ],
)
def test_lines_that_may_mean_something_else_are_refused(tmp_path, text, message):
    (tmp_path / "a.txt").write_text(text, "utf-8", newline="")
    with pytest.raises(InputError, match=message):
        LabelSet.read(tmp_path / "a.txt")


@pytest.mark.third_trial(9)
@pytest.mark.parametrize(
    "name,text",
    [
        ("a.txt", "cat\x0bdog\n"),
        ("a.txt", "cat\u2028dog\n"),
        ("a.csv", 'name\n"cat\ndog"\nbird\n'),
        ("a.csv", 'name\r\n"cat\r\ndog"\r\n'),
        ("a.tsv", 'id\tname\n0\t"cat\ndog"\n'),
        ("a.json", '["cat\\ndog"]'),
        ("a.json", '{"0": "cat\\ndog"}'),
        ("a.json", '{"cat\\ndog": 0}'),
        ("a.json", '{"pets": ["cat\\ndog"]}'),
        ("a.yaml", '- "cat\\ndog"\n'),
        ("a.yaml", "- |\n  cat\n  dog\n"),
    ],
)
def test_a_line_break_in_a_name_is_refused_in_files_of_every_kind(tmp_path, name, text):
    (tmp_path / name).write_text(text, "utf-8", newline="")
    with pytest.raises(
        InputError, match=r"which holds a line break \(U\+00..|which holds a line break \(U\+2028"
    ):
        LabelSet.read(tmp_path / name)


@pytest.mark.third_trial(9)
def test_a_cell_in_quotation_marks_is_read_whole(tmp_path):
    (tmp_path / "a.csv").write_text('name\r\n"cat"\r\n"c# book"\r\n', "utf-8", newline="")
    assert LabelSet.read(tmp_path / "a.csv").names == ("cat", "c# book")
    (tmp_path / "a.json").write_text('["# x", "1 wall", "\\"q\\"", "a, b", "cat\\n"]')
    assert LabelSet.read(tmp_path / "a.json").names == (
        "# x",
        "1 wall",
        '"q"',
        "a, b",
        "cat",
    )  # literally


@pytest.mark.third_trial(9)
def test_several_names_on_the_only_line_are_told_to_be_one_class(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("cat, dog, bird\n")
    assert LabelSet.read(tmp_path / "a.txt").names == ("cat",)
    assert "3 texts on the only line are one class, 'cat', and its synonyms" in caplog.text


@pytest.mark.third_trial(9)
def test_a_description_of_a_set_names_its_classes_by_texts(tmp_path):
    (tmp_path / "mine.yaml").write_text("like: voc20\nclasses: [cat, no]\n")
    with pytest.raises(
        InputError, match="the class False is a bool; expected a text, in YAML in quotation marks"
    ):
        describe(str(tmp_path / "mine.yaml"))


@pytest.mark.third_trial(9)
@pytest.mark.parametrize(
    "make",
    [
        lambda: templates(["a photo of\na {}"]),
        lambda: Queries(background=("wall\nsky",)),
        lambda: Entities({"traffic\nlight": ()}),
    ],
)
def test_other_texts_with_a_line_break(make):
    with pytest.raises((InputError, ConfigError), match=r"holds a line break \(U\+000A\)"):
        make()
