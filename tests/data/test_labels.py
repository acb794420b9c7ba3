"""Label sets: files, command lines, synonyms, what cannot be one."""

import pytest

from ovseg.data.labels import LabelSet
from ovseg.errors import InputError


def write(path, text):
    path.write_text(text, "utf-8")
    return path


def test_text_files_hold_a_class_on_each_line(tmp_path):
    found = LabelSet.read(
        write(
            tmp_path / "a.txt",
            "# mine\nperson, man ,woman # people\n\nroad\nswivel chair|office chair\n",
        )
    )
    assert found.names == ("person", "road", "swivel chair")
    assert found.texts == (("person", "man", "woman"), ("road",), ("swivel chair", "office chair"))
    assert found.queries == [
        "person",
        "man",
        "woman",
        "road",
        "swivel chair",
        "office chair",
    ] and found.owners == [0, 0, 0, 1, 2, 2]
    assert LabelSet.read(write(tmp_path / "bom.txt", "\ufeffcat\r\ndog\r\n")).names == (
        "cat",
        "dog",
    )


def test_yaml_and_json(tmp_path):
    tree = LabelSet.read(
        write(
            tmp_path / "a.yaml",
            "templates: clip80\nlabels:\n  person: [man, woman]\n  road:\n  sky: blue sky\n",
        )
    )
    assert tree.names == ("person", "road", "sky") and tree.texts == (
        ("man", "woman"),
        ("road",),
        ("blue sky",),
    )
    assert tree.templates == "clip80"
    listed = LabelSet.read(
        write(tmp_path / "b.json", '{"templates": ["a {}.", "the {}."], "labels": ["cat", "dog"]}')
    )
    assert listed == LabelSet(("cat", "dog"), (("cat",), ("dog",)), ("a {}.", "the {}.")) and hash(
        listed
    )
    assert LabelSet.read(write(tmp_path / "c.yml", "[cat, dog]")).names == ("cat", "dog")


def test_command_line_and_python():
    assert LabelSet.parse("person|man, road").texts == (("person", "man"), ("road",))
    assert LabelSet.of("a cat, sitting").names == (
        "a cat, sitting",
    )  # one label, not characters and not two
    assert LabelSet.of({"person": ["man", "woman"], "road": "road"}).texts == (
        ("man", "woman"),
        ("road",),
    )


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: LabelSet.of([]), "labels is empty"),
        (lambda: LabelSet.of(["cat", " "]), r"labels\[1\] is blank"),
        (lambda: LabelSet.of(["cat", 3]), r"labels\[1\] is a int"),
        (lambda: LabelSet.of(["cat", "dog", "cat"]), r"labels\[2\] and labels\[0\] are both 'cat'"),
        (lambda: LabelSet.of({"a": ["x", "y"], "b": "y"}), "text 'y' stands for both 'a' and 'b'"),
        (lambda: LabelSet.parse("cat,,dog"), r"labels\[1\] is blank"),
        (lambda: LabelSet.parse("cat|kitten,cat"), r"labels\[1\] and labels\[0\] are both 'cat'"),
        (lambda: LabelSet.read("nowhere.txt"), "label file 'nowhere.txt' does not exist"),
    ],
)
@pytest.mark.bad_input("data", "label sets that cannot be")
def test_bad_sets(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize(
    "name,data,message",
    [
        ("a.txt", b"# nothing\n", "labels is empty"),
        ("a.txt", b"\xff\xfe\x00", "no UTF-8"),
        ("a.yaml", b"labels: {a: [", "no YAML"),
        ("a.yaml", b"!!python/object/apply:os.system ['true']", "no YAML"),
        ("a.yaml", b"42", "a int stands where"),
        ("a.json", b'{"labels": [1, 2]}', r"labels\[0\] is a int"),
    ],
)
@pytest.mark.bad_input("data", "label files that cannot be")
def test_bad_files(tmp_path, name, data, message):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError, match=message):
        LabelSet.read(tmp_path / name)


@pytest.mark.third_trial(9)
@pytest.mark.parametrize(
    "make,message",
    [
        (
            lambda: LabelSet.of(["cat\ndog"]),
            r"labels\[0\] is 'cat\\ndog', which holds a line break \(U\+000A\)",
        ),
        (lambda: LabelSet.of("cat\rdog"), "a line break"),
        (
            lambda: LabelSet.of({"pets": ["cat", "dog\u2029hound"]}),
            "text 1 of 'pets' is .* a line break",
        ),
        (lambda: LabelSet.of({0: "cat\ndog"}), "a line break"),
        (lambda: LabelSet.parse("cat\ndog"), "a line break"),
        (lambda: LabelSet(("cat\ndog",), (("cat",),)), "a line break"),
        (lambda: LabelSet(("cat",), (("cat\ndog",),)), "a line break"),
        (lambda: LabelSet(("cat", "dog"), (("cat",),)), "names holds 2 classes and texts 1"),
        (lambda: LabelSet.of(["cat\tdog"]), "a tab"),
        (lambda: LabelSet.of(["cat\0"]), r"a control character \(U\+0000\)"),
        (
            lambda: LabelSet.of(["cat", "cat\u200b"]),
            r"labels\[1\] .* an invisible character \(U\+200B\)",
        ),
        (lambda: LabelSet.of(["\ufeffcat"]), "an invisible character"),
        (lambda: LabelSet.of(["c\u200dat"]), "an invisible character"),
        (lambda: LabelSet.of(["\u200b"]), "an invisible character"),
        (lambda: LabelSet.of(["caf\udce9"]), "a byte that is no UTF-8"),
        (lambda: LabelSet.of(["caf\u00e9", "cafe\u0301"]), r"labels\[1\] and labels\[0\] are both"),
        (
            lambda: LabelSet.of({"cat", "dog"}),
            "labels is a set, whose order is chance; expected a list",
        ),
        (lambda: LabelSet.of(None), "labels is a NoneType; expected a list of names"),
        (lambda: LabelSet.parse("cat, , dog"), r"labels\[1\] is blank"),
        (lambda: LabelSet.parse("a|"), r"labels\[0\] is 'a\|', of which a synonym is blank"),
        (lambda: LabelSet.parse("b,a||c"), r"labels\[1\] is 'a\|\|c', of which a synonym is blank"),
        (
            lambda: LabelSet.parse("'cat','dog'"),
            "is in quotation marks; expected a name without them",
        ),
        (lambda: LabelSet.parse('road,"cat"|kitty'), '"cat" is in quotation marks'),
    ],
)
def test_names_that_are_not_what_they_look_like(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.third_trial(9)
def test_space_around_names_is_left_out():
    assert LabelSet.of(["cat\n", " big\u00a0 dog "]).names == ("cat", "big dog")
    assert LabelSet.of(["\U0001f469\u200d\U0001f692"]).names == (
        "\U0001f469\u200d\U0001f692",
    )  # one emoji of two
